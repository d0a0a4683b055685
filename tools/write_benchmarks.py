"""Write BENCHMARKS.md from the figures in benchmarks/*.json, so that none is typed by hand.

python tools/write_benchmarks.py                          write BENCHMARKS.md
python tools/write_benchmarks.py --check                  exit with 1 where it is not what the figures say
python tools/write_benchmarks.py --add-run NAME=OUT_DIR   keep the summary.json of `vo run --output OUT_DIR` first
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmark_tables import (
    Tree,
    comparison_lines,
    kernel_lines,
    machine_lines,
    matching_lines,
    memory_lines,
    run_lines,
    stage_lines,
    stream_lines,
    table,
    trajectory_line,
)
from endurance_tables import endurance_lines, robustness_lines
from engine_tables import bound_lines, check_lines, engine_lines
from matching_tables import matcher_gain_lines, own_weights_lines
from peer_tables import peer_lines
from proof_tables import batch_lines, fault_lines, guard_lines, known_pair_lines
from wire_tables import wire_lines

from vo.bench_machine import portable_source, read_machine

ROOT = Path(__file__).resolve().parents[1]
RUN_SCHEMA = "lightvo-run/1"
SCHEMAS = {
    "lightvo-bench/1": "bench",
    "lightvo-matching/1": "matching",
    "lightvo-memory/1": "memory",
    RUN_SCHEMA: "run",
    "lightvo-peers/1": "peers",
    "lightvo-batch/1": "batch",
    "lightvo-bench-matching/1": "pairs",
    "lightvo-guard/1": "guard",
    "lightvo-guard-check/1": "guard-check",
    "lightvo-mutation/1": "faults",
    "lightvo-gpu-trajectory/1": "gpu-trajectory",
    "lightvo-gpu-engine/1": "gpu-engine",
    "lightvo-gpu-checks/1": "gpu-checks",
    "lightvo-wire/1": "wire",
    "lightvo-stuck/1": "stuck",
    "lightvo-viewer/1": "viewer",
    "lightvo-live/1": "live",
    "lightvo-soak/1": "soak",
    "lightvo-robustness/1": "robustness",
    "lightvo-kernels/1": "kernels",
}

PROOFS = ("wire", "stuck", "viewer", "live", "soak", "peers", "batch", "pairs", "guard", "guard-check", "faults")

# What only a GPU can show: the figure, its bound on one H200, the file that holds it and where it stands there. One
# command measures all of them.
GPU_COMMAND = "python tools/measure_gpu.py"
GPU_FIGURES = (
    (
        "capture to pose, p50 and p99, 640x480, ALIKED-T16 + LightGlue",
        "4 ms, 7 ms",
        "gpu-aliked.json",
        "`latest`, latency",
    ),
    ("the same with XFeat", "3 ms, 5 ms", "gpu-xfeat.json", "`latest`, latency"),
    ("throughput, no frame dropped, ALIKED-T16 + LightGlue", "400 frames/s", "gpu-aliked.json", "`lossless`, `fps`"),
    ("the same with XFeat", "600 frames/s", "gpu-xfeat.json", "`lossless`, `fps`"),
    (
        "both without a map (`odometry.mode=two_view`), ALIKED-T16 + LightGlue",
        "4 ms, 7 ms; 400 frames/s",
        "gpu-aliked-two-view.json",
        "`latest`, latency; `lossless`, `fps`",
    ),
    ("the same with XFeat", "3 ms, 5 ms; 600 frames/s", "gpu-xfeat-two-view.json", "the same"),
    (
        "extraction, matching and both with the same robust estimation, against kornia on the same GPU",
        "8x",
        "gpu-aliked.json",
        "`ratio` of every stage",
    ),
    ("the same with XFeat", "8x", "gpu-xfeat.json", "`ratio` of every stage"),
    (
        "every stage (p50, p95, p99, max), start-up, GPU memory, what the engine chose",
        "",
        "gpu-aliked.json",
        "`odometry`, `warm_up_s`, `peak_gpu_bytes`, `engine`",
    ),
    (
        "10,000 frames: memory flat, no synchronisation added",
        "no growth after the first fifth",
        "gpu-long.json",
        "`gpu_growth_bytes`, `num_syncs`",
    ),
    (
        "the trajectory of the GPU against that of the CPU in float32",
        "within the accuracy gate",
        "gpu-trajectory.json",
        "`rmse`",
    ),
    (
        "every way to run the networks: precisions, own kernels, compiled, depth in one graph or in blocks",
        "ALIKED 1.28 ms, XFeat 0.83 ms, LightGlue 0.56 ms of plain and compiled graphs",
        "gpu-engine.json",
        "`rows`",
    ),
    (
        "parity with the CPU, no allocation and no synchronisation after the warm-up",
        "all pass",
        "gpu-checks.json",
        "`counts`",
    ),
)

INTRODUCTION = """# Benchmarks

Every figure here comes from a file in `benchmarks/`, written by the tool that measured it;
`python tools/write_benchmarks.py` turns those into this page, and `python tools/run_benchmarks.py` measures all again.

How speed is measured (`vo bench`): real consecutive frames, calls that are not timed first, then our method and the
other one in turn (ours, theirs, ours, theirs, ...) in one process with the same number of threads. Both have the same
weights, the same images and the same number of keypoints; both start from the frame's pixels (uint8) or, for matching,
from the same features in memory. The ratio is taken pair by pair; given are its median and the 90 % bootstrap interval
of that median. "same" is the share of the other's keypoints that ours has within 0.1 px, or of its matches that ours
has too. By default ours also spreads the keypoints over the image, and refines those of XFeat below the pixel, which
the published methods do not; `spread_cell_px=null` and `subpixel=false` switch that off, so that both find the same.
"frame" is extraction, matching to the previous frame and the relative pose, with the same robust estimation for both.
"disturbed" is the share of the processors' time that other work took meanwhile: above a few percent, the times are too
long, and only the ratios mean something. OpenMP runs as PyTorch sets it up, unless the machine's line says otherwise.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write BENCHMARKS.md from the figures in benchmarks/.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks", help="where the figures lie")
    parser.add_argument("--output", type=Path, default=ROOT / "BENCHMARKS.md", help="the page to write")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    parser.add_argument("--add-run", metavar="NAME=DIR", action="append", default=[], help="keep a run's summary.json")
    options = parser.parse_args(arguments)
    try:
        for run in options.add_run:
            add_run(run, options.results)
        page = render(read_results(options.results))
    except (OSError, ValueError) as error:
        print(f"write_benchmarks: error: {error}", file=sys.stderr)
        return 2
    if options.check:
        is_current = options.output.is_file() and options.output.read_text(encoding="utf-8") == page
        print(f"{options.output.name}: {'as measured' if is_current else 'out of date: run tools/write_benchmarks.py'}")
        return 0 if is_current else 1
    options.output.write_text(page, encoding="utf-8")
    return 0


def add_run(text: str, results: Path) -> Path:
    """Copies DIR/summary.json to run-NAME.json, with this machine and without its paths."""
    name, separator, directory = text.partition("=")
    if not separator or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"--add-run {text}: expected NAME=DIR with letters, digits, - and _ in NAME")
    summary = json.loads((Path(directory) / "summary.json").read_text(encoding="utf-8"))
    summary["source"] = portable_source(summary["source"])
    if summary.get("evaluation") is not None:
        for key in ("trajectory_name", "truth_name"):
            summary["evaluation"][key] = Path(summary["evaluation"][key]).name
    tree = {"schema": RUN_SCHEMA, "label": name, "machine": asdict(read_machine()), "summary": summary}
    path = results / f"run-{name}.json"
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return path


def read_results(directory: Path) -> dict[str, list[Tree]]:
    """The figures of every kind, in the order of the file names. ValueError names a file that is none of them."""
    results: dict[str, list[Tree]] = {kind: [] for kind in SCHEMAS.values()}
    for path in sorted(directory.glob("*.json")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name}: not JSON: {error}") from error
        schema = tree.get("schema") if isinstance(tree, dict) else None
        if schema not in SCHEMAS:
            raise ValueError(f"{path.name}: schema {schema!r} is none of {', '.join(SCHEMAS)}")
        results[SCHEMAS[schema]].append({**tree, "file": path.name})
    return results


def render(results: dict[str, list[Tree]]) -> str:
    """The whole page."""
    on_cpu = [result for result in results["bench"] if result["machine"]["gpu"] is None]
    on_gpu = [result for result in results["bench"] if result["machine"]["gpu"] is not None]
    proofs = [result for kind in PROOFS for result in results[kind]]
    measured = [*on_cpu, *results["kernels"], *results["matching"], *results["memory"], *proofs]
    lines = [
        INTRODUCTION,
        "## CPU",
        "",
        *(
            machine_lines([r for r in [*on_cpu, *results["kernels"], *results["matching"], *proofs] if "machine" in r])
            or ["Not measured yet."]
        ),
        "",
        "### Against other implementations",
        "",
        *comparison_lines(on_cpu),
        "",
        *_reasons(on_cpu),
        "### Stages, one after the other",
        "",
        "Medians; `vo run` overlaps the stages, one thread each. `track` is the odometry without the matching.",
        "",
        *stage_lines(on_cpu),
        "",
        *_streams(on_cpu),
        *kernel_lines(results["kernels"]),
        "### Memory",
        "",
        "Largest resident set of the whole process (`tools/peak_memory.py`).",
        "",
        *memory_lines(results["memory"]),
        "",
        "### Commands",
        "",
        *(_commands(measured) or ["None yet."]),
        "",
        "## Matching quality",
        "",
        MATCHING_INTRODUCTION,
        *_matching(results["matching"]),
        "## Odometry accuracy",
        "",
        "Whole runs of `vo run --output DIR`, kept by `python tools/write_benchmarks.py --add-run NAME=DIR`. Times are",
        "medians per frame with the stages side by side, so each is longer than alone.",
        "",
        *run_lines(results["run"]),
        "",
        "### What faults of a camera cost",
        "",
        "`python tools/measure_robustness.py SOURCE`: the same frames, one passage damaged. Blur is over 31 px;",
        "black frames and those of a camera that hangs have no pose by design.",
        "",
        *robustness_lines(results["robustness"]),
        "## The wire and the viewer",
        "",
        "`tools/measure_wire.py`, `tools/measure_stuck.py`, `tools/measure_viewer.py`.",
        "",
        *wire_lines(results["wire"], results["stuck"], results["viewer"]),
        *endurance_lines(results["live"], results["soak"]),
        *_proofs(results),
        *_gpu(on_gpu, results["gpu-trajectory"], results["gpu-engine"], results["gpu-checks"]),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


MATCHING_INTRODUCTION = """Measured by `tools/matching_quality.py`. `inliers` agree with the estimated relative pose
(RANSAC and refinement, 1 px); `true inliers` lie within 1.5 px of both epipolar lines of the true motion, and
`precision` is their share of the matches. Errors are those of the estimated pose over the pairs that were posed; the
ground truth has an error of its own, so they are worth comparing rather than reading alone. `kept` is the share of
points that were still in play at the end. `match, ms` is one call without anything known of either frame, so a little
more than in a run, where the previous frame is known.
"""


PEERS_INTRODUCTION = """Every method in a process of its own, in turn lap by lap on the same frames (`python
tools/compare_peers.py`). `matches`, `precision` (within 1.5 px of both epipolar lines of the true motion) and two views
are of frames three apart; the odometry is the whole one, with the method in the place of ours. Times are medians over
all frames and laps, with the 90 % bootstrap interval of the median; `frame` is extraction and odometry, in which the
matcher may run more than once. `memory` is the largest resident set, and what the libraries alone take of it.
"""


def _proofs(results: dict[str, list[Tree]]) -> list[str]:
    peers = [line for result in results["peers"] for line in (*peer_lines(result), "")]
    return [
        "## Against other front-ends, through the same odometry",
        "",
        PEERS_INTRODUCTION,
        *(peers or ["Not measured yet.", ""]),
        "## Batches",
        "",
        "`vo batch MANIFEST`; the full data sets: `vo batch kitti`, `vo batch tum`, `vo batch euroc`. Medians where",
        "there are several runs. Published figures of other systems stand beside ours where a manifest has them.",
        "",
        *batch_lines(results["batch"]),
        "## Matches under known homographies and poses",
        "",
        "`vo bench-matching`; how each figure is defined: `vo/matching_scores.py`.",
        "",
        *known_pair_lines(results["pairs"]),
        "## The guard",
        "",
        "`python tools/regression_guard.py`, at every change: figures of the code against `benchmarks/bands.yaml`.",
        "Ratios are times over that of a fixed baseline (OpenCV's ORB, brute force, essential matrix) in the same run.",
        "",
        *guard_lines(results["guard"], results["guard-check"]),
        "## Faults in geometry",
        "",
        "`python tools/mutate.py`: small faults in a copy of the code, one at a time, and whether the tests notice.",
        "",
        *fault_lines(results["faults"]),
    ]


def _matching(results: Sequence[Tree]) -> list[str]:
    lines: list[str] = []
    for result in results:
        lines += [*matching_lines(result), *matcher_gain_lines(result), *own_weights_lines(result), ""]
    return lines or ["Not measured yet.", ""]


def _reasons(results: Sequence[Tree]) -> list[str]:
    reasons = dict.fromkeys(reason for result in results for reason in result["not_compared"])
    return [*(f"- Not compared: {reason}" for reason in reasons), ""] if reasons else []


def _streams(results: Sequence[Tree]) -> list[str]:
    lines = stream_lines(results)
    return ["### Whole runs to a published pose", "", *lines, ""] if lines else []


def _commands(results: Sequence[Tree]) -> list[str]:
    return [f"- `{result['file']}`: `{result['command']}`" for result in results]


def _gpu(
    results: Sequence[Tree], trajectories: Sequence[Tree], engines: Sequence[Tree], checks: Sequence[Tree]
) -> list[str]:
    measured = [*results, *trajectories, *engines, *checks]
    files = {result["file"] for result in measured}
    missing = [figure for figure in GPU_FIGURES if figure[2] not in files]
    if not files:
        return ["## GPU: not yet measured", "", *_gpu_table(missing)]
    lines = ["## GPU", "", *machine_lines(measured), "", *check_lines(checks)]
    lines += [*comparison_lines(results), "", *_reasons(results), *stage_lines(results), "", *stream_lines(results), ""]
    lines += bound_lines(results)
    lines += [*(line for result in trajectories for line in (trajectory_line(result), "")), *engine_lines(engines)]
    lines += [*_commands(measured), ""]
    return [*lines, "### Not yet measured", "", *_gpu_table(missing)] if missing else lines


def _gpu_table(missing: Sequence[tuple[str, str, str, str]]) -> list[str]:
    rows = [(what, bound, f"`{file}`: {where}") for what, bound, file, where in missing]
    return [
        f"One command on a machine with an NVIDIA GPU measures all of it: `{GPU_COMMAND}`. Bounds are for one H200.",
        "",
        *table(("figure", "bound", "where it stands then"), rows, num_left=3),
    ]


if __name__ == "__main__":
    sys.exit(main())
