"""What a benchmark found: its values, as JSON, and as a table for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vo.bench_machine import Machine
from vo.bench_statistics import Ratio, Timing
from vo.bench_stream import StreamTiming
from vo.summary import UsedWeights

SCHEMA = "lightvo-bench/1"


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Time of one stage for a frame."""

    name: str
    timing: Timing


@dataclass(frozen=True, slots=True)
class OdometryTiming:
    """Our own odometry on consecutive frames, one stage after the other.

    first_frame_ms  the first extraction, which also prepares the networks.
    stages          extract, match, track (the odometry without the matching), frame (all of it).
    fps             frames per second of that loop; a run with one thread per stage overlaps them.
    """

    first_frame_ms: float
    stages: tuple[StageTiming, ...]
    fps: float
    mean_keypoints: float
    mean_matches: float
    mean_stop_layer: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One stage of ours and of a peer, called in turn on the same frames.

    stage          extract: image to features; match: two frames' features to matches; frame: both and the relative
                   pose, with the same robust estimation.
    peer           its name, and `description` its version and precision.
    ours_count, theirs_count   means per call of what `counted` names: keypoints or matches.
    agreement      share of the peer's keypoints that ours has within 0.1 px, or of its matches that ours has too;
                   None where the two are different methods.
    ours_layers, theirs_layers   means of the layers that matchers ran; None where there are none.
    """

    stage: str
    peer: str
    description: str
    ours: Timing
    theirs: Timing
    ratio: Ratio
    counted: str
    ours_count: float
    theirs_count: float
    agreement: float | None = None
    ours_layers: float | None = None
    theirs_layers: float | None = None


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A whole benchmark.

    command        that repeats it, apart from where this machine keeps the frames.
    preset, settings   what of the configuration is not the default.
    extractor_precision, matcher_precision   what was picked on this machine.
    load_s         from the configuration to networks with weights; `warm_up_s` from there to ready ones.
    engine         what the warm-up on a GPU measured and chose; `fallbacks` what took the place of what.
    peak_gpu_bytes allocated on the GPU at most.
    others_share   of the processors' time while it was measured that other work took; None where it is unknown.
    not_compared   why a peer or a stage of it is missing, one sentence each.
    streams        whole runs to a published pose.
    geometry       how poses were computed, see `vo.kernels.status`.
    """

    date: str
    command: str
    preset: str | None
    settings: tuple[str, ...]
    machine: Machine
    versions: tuple[tuple[str, str], ...]
    source: str
    width: int
    height: int
    num_frames: int
    device: str
    extractor: str
    extractor_precision: str
    matcher: str
    matcher_precision: str
    max_keypoints: int
    weights: tuple[UsedWeights, ...]
    load_s: float
    odometry: OdometryTiming
    peak_gpu_bytes: int | None = None
    others_share: float | None = None
    comparisons: tuple[Comparison, ...] = ()
    not_compared: tuple[str, ...] = ()
    warm_up_s: float = 0.0
    engine: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    streams: tuple[StreamTiming, ...] = ()
    geometry: str = ""


def bench_json(result: BenchResult) -> str:
    """The result as JSON: the fields by their names, `stages` and `versions` as mappings. Raises ValueError on NaN."""
    tree: dict[str, Any] = {"schema": SCHEMA, **asdict(result)}
    tree["odometry"]["stages"] = {stage.name: asdict(stage.timing) for stage in result.odometry.stages}
    for stream, timings in zip(tree["streams"], result.streams, strict=True):
        stream["stages"] = {name: asdict(stage) for name, stage in timings.stages}
    tree["versions"] = dict(result.versions)
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def bench_lines(result: BenchResult) -> list[str]:
    """The result in lines of text."""
    r, o = result, result.odometry
    layers = f", {o.mean_stop_layer:.1f} layers" if o.mean_stop_layer is not None else ""
    return [
        f"source     {r.source}, {r.num_frames} frames of {r.width}x{r.height}, {r.date}",
        f"machine    {_machine(r.machine)}",
        *([f"disturbed  other work took {100 * r.others_share:.0f} % of the processors"] if r.others_share else []),
        f"frontend   {r.extractor} ({r.max_keypoints} keypoints; {r.extractor_precision}) + "
        f"{r.matcher} ({r.matcher_precision})",
        f"start      networks {r.load_s:.1f} s, warm-up {r.warm_up_s:.1f} s, first frame {o.first_frame_ms:.0f} ms",
        *(f"engine     {choice}" for choice in r.engine),
        *(f"fallback   {fallback}" for fallback in r.fallbacks),
        f"means      {o.mean_keypoints:.0f} keypoints, {o.mean_matches:.0f} matches{layers}; "
        f"{o.fps:.1f} frames/s one stage after the other",
        *([f"memory     {r.peak_gpu_bytes / 2**20:.0f} MiB on the GPU"] if r.peak_gpu_bytes is not None else []),
        "",
        *_aligned(
            ("stage, ms", "median", "min", "p95", "p99", "max", "calls"),
            [(stage.name, *_timing(stage.timing), str(stage.timing.num_calls)) for stage in o.stages],
        ),
        *(line for stream in r.streams for line in _stream_lines(stream)),
        *_comparison_lines(r.comparisons),
        *(["", *(f"not compared: {reason}" for reason in r.not_compared)] if r.not_compared else []),
    ]


def _stream_lines(stream: StreamTiming) -> list[str]:
    """A whole run in a few lines."""
    s = stream
    pace = "" if s.hz is None else f" at {s.hz:.1f} Hz"
    growth = f"{s.host_growth_bytes / 2**20:+.0f} MiB of the process"
    if s.gpu_growth_bytes is not None:
        growth += f", {s.gpu_growth_bytes / 2**20:+.0f} MiB on the GPU, {s.num_syncs} synchronisations"
    return [
        "",
        f"{s.mode}{pace}: {s.num_frames} frames, {s.num_dropped} dropped, {s.num_poses} poses, lost "
        f"{s.lost_episodes}x, {s.fps:.1f} frames/s; after a fifth of them {growth}",
        *_aligned(
            ("to the published pose, ms", "median", "min", "p95", "p99", "max", "frames"),
            [
                ("latency", *_timing(s.latency), str(s.latency.num_calls)),
                *((name, *_timing(stage), str(stage.num_calls)) for name, stage in s.stages),
            ],
        ),
    ]


def _machine(machine: Machine) -> str:
    threads = "" if machine.num_threads is None else f", {machine.num_threads} thread{'s'[: machine.num_threads - 1]}"
    flags = f", {' '.join(machine.cpu_flags)}" if machine.cpu_flags else ""
    gpu = f"; {machine.gpu}" if machine.gpu is not None else ""
    return f"{machine.cpu}, {machine.num_cores} cores{threads}{flags}{gpu}"


def _timing(timing: Timing) -> tuple[str, ...]:
    values = (timing.median_ms, timing.min_ms, timing.p95_ms, timing.p99_ms, timing.max_ms)
    return tuple(f"{value:.2f}" for value in values)


def _comparison_lines(comparisons: Sequence[Comparison]) -> list[str]:
    lines: list[str] = []
    for description in dict.fromkeys(comparison.description for comparison in comparisons):
        of_peer = [comparison for comparison in comparisons if comparison.description == description]
        header = ("stage, ms", "ours", "min..max", "theirs", "min..max", "ratio", "90 %", "min..max", "count", "same")
        lines += ["", f"against {description}", *_aligned(header, [_comparison_row(c) for c in of_peer])]
    return lines


def _comparison_row(c: Comparison) -> tuple[str, ...]:
    return (
        c.stage,
        f"{c.ours.median_ms:.2f}",
        f"{c.ours.min_ms:.1f}..{c.ours.max_ms:.1f}",
        f"{c.theirs.median_ms:.2f}",
        f"{c.theirs.min_ms:.1f}..{c.theirs.max_ms:.1f}",
        f"{c.ratio.median:.2f}x",
        f"{c.ratio.low:.2f}..{c.ratio.high:.2f}",
        f"{c.ratio.min:.2f}..{c.ratio.max:.2f}",
        f"{c.ours_count:.0f}/{c.theirs_count:.0f} {c.counted}",
        "-" if c.agreement is None else f"{100 * c.agreement:.1f} %",
    )


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first one to the left, the others to the right."""
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
