"""Measure the matches of every extractor with every matcher on a sequence with ground truth.

    python tools/matching_quality.py --source kitti:DIR --gaps 1,3,5 --json benchmarks/matching.json

{ALIKED-T16, XFeat} x {LightGlue with all layers and points, LightGlue adaptive, mutual nearest neighbours}, for frames
that lie the given numbers of frames apart; own-aliked-t16 and own-xfeat are the same networks with our weights. R2D2,
XFeat* and LoFTR with the one matcher they have, where their weights are given (--extractors r2d2 --weights r2d2=FILE).
Features are extracted once per frame and kept in memory. Prints the
tables of BENCHMARKS.md; --json keeps the figures for tools/write_benchmarks.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from benchmark_tables import matching_lines
from matching_metrics import AdaptiveCost, MethodQuality, PairQuality, adaptive_cost, pair_quality, summarise

from frontends.base import Features, Matcher
from frontends.lightglue import LightGlueConfig
from vo.bench_machine import CpuWatch, portable_source, read_machine
from vo.config import TwoViewConfig
from vo.config_loader import load_config
from vo.evaluation import mutual_nearest
from vo.frontend import create_frontend
from vo.geometry import invert_pose
from vo.output import write_atomically
from vo.sources import open_source
from vo.summary import library_versions
from vo.trajectory import read_trajectory
from vo.types import Camera, ConfigError, FloatArray, Frame, SourceError, VoError

SCHEMA = "lightvo-matching/1"
EXTRACTORS = {
    "aliked-t16": ("frontend.extractor.name=aliked", "frontend.extractor.variant=t16"),
    "xfeat": ("frontend.extractor.name=xfeat",),
    "own-aliked-t16": ("frontend.extractor.name=aliked", "frontend.extractor.weights=own-aliked-t16"),
    "own-xfeat": ("frontend.extractor.name=xfeat", "frontend.extractor.weights=own-xfeat"),
    "r2d2": ("frontend.extractor.name=r2d2",),
    "xfeat-star": ("frontend.extractor.name=xfeat-star",),
    "loftr": ("frontend.extractor.name=loftr",),
}
DEFAULT_EXTRACTORS = ("aliked-t16", "xfeat")
FULL, ADAPTIVE = "lightglue, full", "lightglue, adaptive"
MATCHERS = {
    FULL: ("frontend.matcher.name=lightglue", "frontend.matcher.preset=accurate"),
    ADAPTIVE: ("frontend.matcher.name=lightglue",),
    "nearest": ("frontend.matcher.name=nearest",),
}
FOLLOWED = {"followed": ("frontend.matcher.name=followed",)}
_MAX_TIME_DIFFERENCE_NS = 10_000_000
_PERIOD_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class TrueSequence:
    """Frames of one camera with the true pose of each."""

    name: str
    camera: Camera
    frames: list[Frame]
    T_world_camera: FloatArray


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        tree = run(options)
    except VoError as error:
        print(f"matching_quality: error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        write_atomically(options.json, json.dumps(tree, indent=2, allow_nan=False) + "\n")
    print("\n".join(matching_lines(tree)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure matches on a sequence with ground truth.")
    parser.add_argument("--source", required=True, help="kitti:DIR, tum:DIR, euroc:DIR with ground truth")
    parser.add_argument("--gaps", type=_integers, default=(1, 3, 5), help="frames apart, with commas (default: 1,3,5)")
    parser.add_argument("--step", type=int, default=1, help="take every STEP-th pair of a gap (default: every pair)")
    parser.add_argument("--frames", type=int, help="use the first N frames (default: all)")
    parser.add_argument("--keypoints", type=int, default=1024, help="per frame at most (default: %(default)s)")
    parser.add_argument(
        "--extractors", type=_words, default=DEFAULT_EXTRACTORS, help="with commas (default: aliked-t16,xfeat)"
    )
    parser.add_argument(
        "--weights", type=_weights, action="append", default=[], metavar="EXTRACTOR=FILE", help="repeatable"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=V", help="change one key of the adaptive runs"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Every extractor in turn, so that the features of only one lie in memory; the figures as a tree for JSON."""
    watch = CpuWatch()
    adaptive_config(options)
    sequence = read_sequence(options.source, options.frames)
    methods: list[MethodQuality] = []
    costs: list[AdaptiveCost] = []
    for extractor in options.extractors:
        found = measure(sequence, extractor, options)
        for gap in options.gaps:
            methods += [summarise(extractor, matcher, gap, found[matcher, gap]) for matcher in matchers_of(extractor)]
            if FULL in matchers_of(extractor):
                cost = adaptive_cost(extractor, gap, found[FULL, gap], found[ADAPTIVE, gap])
                costs += [cost] if cost is not None else []
    depth, width, _ = adaptive_config(options).limits()
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(options),
        "machine": asdict(read_machine(torch.get_num_threads())),
        "versions": dict(library_versions()),
        "source": portable_source(sequence.name),
        "num_frames": len(sequence.frames),
        "max_keypoints": options.keypoints,
        "depth_confidence": depth,
        "width_confidence": width,
        "others_share": watch.others_share(),
        "methods": [asdict(method) for method in methods],
        "adaptive_costs": [asdict(cost) for cost in costs],
    }


def matchers_of(extractor: str) -> dict[str, tuple[str, ...]]:
    """The matchers that know the features of an extractor, each by its overrides."""
    if extractor in ("xfeat-star", "loftr"):
        return FOLLOWED
    return {"nearest": MATCHERS["nearest"]} if extractor == "r2d2" else MATCHERS


def extractor_overrides(extractor: str, options: argparse.Namespace) -> list[str]:
    """What chooses an extractor, with as many keypoints as asked for."""
    section = "frontend.extractor" + (".following" if matchers_of(extractor) is FOLLOWED else "")
    weights = [f"frontend.extractor.weights={file}" for name, file in options.weights if name == extractor]
    return [*EXTRACTORS[extractor], f"{section}.max_keypoints={options.keypoints}", *weights]


def adaptive_config(options: argparse.Namespace) -> LightGlueConfig:
    """The adaptive settings in use; ConfigError where --set chose another matcher."""
    matcher = load_config(None, [*MATCHERS[ADAPTIVE], *options.set]).frontend.matcher
    if not isinstance(matcher, LightGlueConfig):
        raise ConfigError(f"--set frontend.matcher.name: expected lightglue here, got {matcher.name}")
    return matcher


def read_sequence(spec: str, num_frames: int | None) -> TrueSequence:
    """The frames that have a true pose. SourceError where the source has no ground truth, or for fewer than two."""
    source = open_source(spec)
    try:
        frames = list(islice(source.frames(), num_frames))
    finally:
        source.close()
    if source.ground_truth is None:
        raise SourceError(f"{spec}: no ground truth lies beside it; matches are measured under the true motion")
    truth = read_trajectory(source.ground_truth)
    times_ns = np.array([frame.timestamp_ns for frame in frames], np.int64)
    rows, truth_rows = mutual_nearest(times_ns, truth.timestamps_ns, _MAX_TIME_DIFFERENCE_NS)
    if len(rows) < 2:
        raise SourceError(f"{spec}: {len(rows)} of {len(frames)} frames have a true pose; expected 2 or more")
    return TrueSequence(source.name, source.camera, [frames[row] for row in rows], truth.T_world_camera[truth_rows])


def measure(
    sequence: TrueSequence, extractor: str, options: argparse.Namespace
) -> dict[tuple[str, int], list[PairQuality]]:
    """Every matcher on every pair of every gap, by matcher and gap."""
    device = torch.device(options.device)
    common = extractor_overrides(extractor, options)
    matchers: dict[str, Matcher] = {}
    for name, overrides in matchers_of(extractor).items():
        extra = options.set if name == ADAPTIVE else []
        frontend = create_frontend(load_config(None, [*common, *overrides, *extra]).frontend, device)
        matchers[name] = frontend.matcher
    count = len(sequence.frames)
    wanted = {
        frame for gap in options.gaps for start in range(0, count - gap, options.step) for frame in (start, start + gap)
    }
    progress = Progress(f"{extractor}: frame", len(wanted))
    features: dict[int, Features] = {}
    for index in sorted(wanted):
        features[index] = frontend.extractor.extract(sequence.frames[index].image)
        progress.advance()
    two_view = load_config(None, []).two_view
    found: dict[tuple[str, int], list[PairQuality]] = {}
    for gap in options.gaps:
        starts = range(0, count - gap, options.step)
        if not starts:
            raise SourceError(f"{options.source}: {count} frames have no pair that is {gap} apart")
        progress = Progress(f"{extractor}: gap {gap}, pair", len(starts))
        for start in starts:
            pair = (start, start + gap)
            for name, matcher in matchers.items():
                quality = match_pair(sequence, features, pair, matcher, two_view)
                found.setdefault((name, gap), []).append(quality)
            progress.advance()
    return found


def match_pair(
    sequence: TrueSequence,
    features: Mapping[int, Features],
    pair: tuple[int, int],
    matcher: Matcher,
    two_view: TwoViewConfig,
) -> PairQuality:
    """One pair; copies of the features, so that nothing a matcher kept of a frame shortens the time of some calls."""
    features0, features1 = (replace(features[index]) for index in pair)
    start_ns = time.perf_counter_ns()
    matches = matcher.match(features0, features1)
    match_ms = (time.perf_counter_ns() - start_ns) * 1e-6
    T_true = invert_pose(sequence.T_world_camera[pair[0]]) @ sequence.T_world_camera[pair[1]]
    return pair_quality(features0, features1, matches, match_ms, T_true, sequence.camera, two_view)


class Progress:
    """A line on standard error every few seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._count = 0
        self._next_s = time.monotonic() + _PERIOD_S

    def advance(self) -> None:
        self._count += 1
        if time.monotonic() >= self._next_s:
            print(f"{self._what} {self._count} of {self._total}", file=sys.stderr, flush=True)
            self._next_s = time.monotonic() + _PERIOD_S


def command_line(options: argparse.Namespace) -> str:
    """The command that repeats the measurement, apart from where this machine keeps the frames."""
    words = ["python", "tools/matching_quality.py", "--source", portable_source(options.source)]
    words += ["--gaps", ",".join(map(str, options.gaps)), "--step", str(options.step)]
    words += ["--keypoints", str(options.keypoints)]
    words += ["--frames", str(options.frames)] if options.frames is not None else []
    if options.extractors != DEFAULT_EXTRACTORS:
        words += ["--extractors", ",".join(options.extractors)]
    for name, file in options.weights:
        words += ["--weights", f"{name}={Path(file).name}"]
    for override in options.set:
        words += ["--set", override]
    return shlex.join(words)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    for word in words:
        if word not in EXTRACTORS:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(EXTRACTORS)}")
    return words


def _weights(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals or name not in EXTRACTORS:
        raise argparse.ArgumentTypeError(f"{text!r} is no EXTRACTOR=FILE with one of {', '.join(EXTRACTORS)}")
    return name, file


if __name__ == "__main__":
    sys.exit(main())
