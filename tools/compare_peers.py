"""Compare front-ends on the same frames and the same machine: ours, OpenCV's, kornia's with the same weights.

    python tools/compare_peers.py [--json benchmarks/peers.json] [--opencv-aliked F.onnx --opencv-lightglue F.onnx]

The bundled clip, and the head of KITTI 00 where LIGHTVO_DATA has it. Each method has a process of its own, and they
take turns lap by lap, so that all meet the same machine. Every method goes through the same robust two-view estimation
and the same full odometry. Ends within --minutes (12): after a few frames of every method it takes so few frames (but
never fewer than 16) that a lap of all fits, and no method begins a further lap that would not; the table says how many
each got.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_methods import METHODS, Method
from peer_tables import peer_lines

from vo.bench_machine import CpuWatch, portable_source, read_machine
from vo.bench_statistics import bootstrap_interval
from vo.summary import library_versions

TOOLS = Path(__file__).resolve().parent
SCHEMA = "lightvo-peers/1"
KITTI = "kitti/sequences/00"
# With fewer frames there is hardly a path to judge.
MIN_FRAMES = 16
# Of the time that is there, what the first lap of all may take: the guess from the first frames is a rough one.
FIRST_LAP_SHARE = 0.7
STAGES = ("extract", "match", "two_view", "track", "frame")

Tree = dict[str, Any]


class Worker:
    """A method's process; `reason` says why it cannot take part."""

    def __init__(self, method: Method, source: str, options: argparse.Namespace) -> None:
        self.method = method
        flags = ["--method", method.name, "--source", source, "--frames", str(options.frames)]
        flags += ["--keypoints", str(options.keypoints), "--threads", str(options.threads)]
        flags += ["--opencv-aliked", options.opencv_aliked, "--opencv-lightglue", options.opencv_lightglue]
        flags += [flag for pair in options.weights for flag in ("--weights", pair)]
        command = [sys.executable, str(TOOLS / "peer_worker.py"), *flags]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.laps: list[Tree] = []
        self.lap_s = 0.0
        self.reason: str | None = None
        self.size: tuple[int, int] | None = None
        self._is_ready = False

    def wait_until_ready(self) -> None:
        """Until it has read frames and weights, or has said why not."""
        if self._is_ready:
            return
        self._is_ready = True
        answer = self._answer()
        if answer is not None:
            self.reason = answer.get("not_here") or answer.get("error")
            self.size = (answer["width"], answer["height"]) if "width" in answer else None

    def try_frames(self) -> float:
        """Runs a few frames that are not counted; what one takes, s."""
        answer = self._ask("try")
        return 0.0 if answer is None else float(answer["frame_s"])

    def run_lap(self, num_frames: int) -> None:
        """One more lap; a process that ends instead gets a reason."""
        start_s = time.monotonic()
        answer = self._ask(f"lap {num_frames}")
        if answer is not None:
            self.laps.append(answer)
            self.lap_s = time.monotonic() - start_s

    def close(self) -> None:
        """Ends the process, by force where it does not end by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, command: str) -> Tree | None:
        self.wait_until_ready()
        commands = self._process.stdin
        if self.reason is not None or commands is None:
            return None
        commands.write(command + "\n")
        commands.flush()
        return self._answer()

    def _answer(self) -> Tree | None:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            self.reason = f"its process ended with {self._process.wait()}; see standard error"
            return None
        answer: Tree = json.loads(line)
        return answer


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    start_s = time.monotonic()
    watch = CpuWatch()
    sources, missing = chosen_sources(options.source)
    if not sources:
        print(f"compare_peers: error: {missing[0]}", file=sys.stderr)
        return 2
    results = []
    for number, source in enumerate(sources):
        # Each source may use its share of what is left.
        left_s = 60 * options.minutes - (time.monotonic() - start_s)
        results.append(compare(source, options, left_s / (len(sources) - number)))
    tree = result_tree(options, results, missing, watch.others_share())
    if options.json is not None:
        options.json.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print("\n".join(peer_lines(tree)))
    print(f"{time.monotonic() - start_s:.0f} s", file=sys.stderr)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare front-ends on the same frames and the same machine.")
    parser.add_argument("--source", action="append", default=[], help="instead of the clip and KITTI; repeatable")
    parser.add_argument("--method", action="append", default=[], choices=[m.name for m in METHODS], help="repeatable")
    parser.add_argument("--frames", type=int, default=50, help="of each source, at most (default: %(default)s)")
    parser.add_argument("--keypoints", type=int, default=1024, help="per frame at most (default: %(default)s)")
    parser.add_argument("--laps", type=int, default=3, help="over the frames, at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every method")
    parser.add_argument("--opencv-aliked", default="", metavar="F", help="ALIKED as ONNX, for OpenCV")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="METHOD=FILE", help="of ours without weights; repeatable"
    )
    parser.add_argument("--opencv-lightglue", default="", metavar="F", help="LightGlue as ONNX, for OpenCV")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def chosen_sources(named: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sources to measure, and why one is missing."""
    if named:
        return list(named), []
    data = os.environ.get("LIGHTVO_DATA")
    kitti = Path(data) / KITTI if data else None
    if kitti is not None and kitti.is_dir():
        return ["demo", f"kitti:{kitti}"], []
    reason = "LIGHTVO_DATA is not set" if kitti is None else f"{KITTI} is not under LIGHTVO_DATA"
    return ["demo"], [f"KITTI 00: {reason}"]


def compare(source: str, options: argparse.Namespace, budget_s: float) -> Tree:
    """Laps in turn until there are enough or the time is up."""
    end_s = time.monotonic() + budget_s
    methods = [method for method in METHODS if not options.method or method.name in options.method]
    with ExitStack() as resources:
        workers = []
        for method in methods:
            workers.append(Worker(method, source, options))
            resources.callback(workers[-1].close)
        for worker in workers:  # while the first ones are waited for, the others get ready
            worker.wait_until_ready()
        frame_s = sum(worker.try_frames() for worker in workers)
        num_frames = affordable_frames(options.frames, frame_s, end_s - time.monotonic())
        for number in range(options.laps):
            for worker in workers:
                if number == 0 or time.monotonic() + worker.lap_s <= end_s:
                    worker.run_lap(num_frames)
                    lap = f"{worker.method.name}, lap {number + 1}"
                    print(f"{portable_source(source)}: {lap}", file=sys.stderr, flush=True)
    return {
        "source": portable_source(source),
        "size": next((worker.size for worker in workers if worker.size is not None), None),
        "num_frames": num_frames,
        "methods": [method_tree(worker) for worker in workers],
    }


def affordable_frames(num_wanted: int, frame_s: float, left_s: float) -> int:
    """How many frames a lap of all methods has time for, where one frame of all takes `frame_s`."""
    if frame_s <= 0:
        return num_wanted
    return min(num_wanted, max(MIN_FRAMES, int(FIRST_LAP_SHARE * left_s / frame_s)))


def method_tree(worker: Worker) -> Tree:
    """What one method did: accuracy of its last lap, times over all laps."""
    tree: Tree = {"name": worker.method.name, "description": worker.method.description, "reason": worker.reason}
    if not worker.laps:
        return tree | {"reason": worker.reason or "not measured"}
    last = worker.laps[-1]
    stages = {stage: stage_tree([lap["times_ms"][stage] for lap in worker.laps]) for stage in STAGES}
    keys = ("two_view", "odometry", "peak_bytes", "imported_bytes")
    return tree | {key: last[key] for key in keys} | {"num_laps": len(worker.laps), "stages": stages}


def stage_tree(laps_ms: Sequence[Sequence[float]]) -> Tree:
    """Median over all frames and laps, with the 90 % bootstrap interval of the median; the first of a lap apart."""
    times_ms = np.concatenate([np.array(lap[1:]) for lap in laps_ms])
    low, high = bootstrap_interval(times_ms, lambda resamples: np.median(resamples, axis=1))
    return {"median_ms": float(np.median(times_ms)), "low_ms": low, "high_ms": high, "num_calls": len(times_ms)}


def result_tree(
    options: argparse.Namespace, results: Sequence[Tree], missing: Sequence[str], others_share: float | None
) -> Tree:
    command = (
        f"python tools/compare_peers.py --minutes {options.minutes:g} --frames {options.frames} --laps {options.laps}"
    )
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"{command} --keypoints {options.keypoints} --threads {options.threads}",
        "machine": asdict(read_machine(options.threads)),
        "versions": dict(library_versions()),
        "num_frames": options.frames,
        "max_keypoints": options.keypoints,
        "others_share": others_share,
        "sources": list(results),
        "missing": list(missing),
    }


if __name__ == "__main__":
    sys.exit(main())
