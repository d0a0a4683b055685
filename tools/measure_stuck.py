"""Measures whether a stuck consumer slows tracking: the same frames of a real run with and without one.

    python tools/measure_stuck.py demo --config fast-cpu --pairs 5 --json benchmarks/stuck-consumer.json

One process runs the pipeline with its publisher, as fast as it goes (with --realtime at the pace of the frames, for a
machine that keeps up); a consumer of everything that keeps up is always there. In every second stretch of frames there
is another one, which stops itself (SIGSTOP) after its first message and is killed where the stretch ends. Runs come in
pairs in which the stretches change places, so that every frame is met both ways and slow changes of the machine hit
both alike. Given are p50 and p99 over all frames and the ratio of stuck to not stuck, with the 90 % bootstrap interval
over the pairs; in wall time, which other work on the machine disturbs, and in processor time of the tracking thread,
which it hardly does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import NDArray

from vo.bench_machine import CpuWatch, portable_source, read_machine
from vo.bench_statistics import bootstrap_interval
from vo.config import Config
from vo.config_loader import load_config
from vo.frontend import Frontend, create_frontend, select_device
from vo.message_stream import MessageStream
from vo.pipeline import run
from vo.progress import progress
from vo.publisher import Publisher
from vo.run_command import image_preview, sinks
from vo.run_meter import RunMeter
from vo.run_results import RunResults
from vo.sources import open_source
from vo.stages import FrameResult
from vo.types import VoError

SCHEMA = "lightvo-stuck/1"
MAX_RATIO = 1.05
# The first frames of a stretch see the consumer come or go.
SETTLING_FRAMES = 5
FIGURES = ("track_ms", "track_processor_ms", "publish_ms", "latency_ms")

# Keeps up, or stops itself after the first message: a process like that of any subscriber, and quick to start.
CONSUMER = """
import os, signal, sys, zmq
socket = zmq.Context().socket(zmq.SUB)
socket.subscribe(b"")
print("ready", flush=True)
sys.stdin.readline()
socket.connect(sys.argv[1])
socket.recv()
if sys.argv[2] == "stops":
    os.kill(os.getpid(), signal.SIGSTOP)
while True:
    socket.recv()
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """stretch: frames with or without the stuck consumer; starts_stuck: whether the first stretch is with it."""

    stretch: int
    starts_stuck: bool

    def is_stuck(self, index: int) -> bool:
        return (index // self.stretch % 2 == 0) == self.starts_stuck

    def is_settled(self, index: int) -> bool:
        return index % self.stretch >= SETTLING_FRAMES


class Consumer:
    """A subscriber's process, started before it is needed."""

    def __init__(self, endpoint: str, *, stops: bool) -> None:
        command = [sys.executable, "-c", CONSUMER, endpoint, "stops" if stops else "keeps up"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        if self._process.stdout is None or self._process.stdout.readline().strip() != "ready":
            raise RuntimeError("a consumer did not start")

    def connect(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write("connect\n")
            self._process.stdin.flush()

    @property
    def is_stopped(self) -> bool:
        """Whether the kernel has it stopped (Linux)."""
        state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2][0]
        return state == "T"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


class FrameMeter(RunMeter):
    """Keeps the time of every single frame in the tracking thread."""

    def __init__(self) -> None:
        super().__init__()
        self.track_ms: list[tuple[float, float]] = []
        self.rest_ms: list[tuple[float, float]] = []
        self._publish_ms = 0.0
        self._spent_ns: int | None = None

    def add_track(self, elapsed_ns: int) -> None:
        spent_ns, before_ns = time.thread_time_ns(), self._spent_ns
        self._spent_ns = spent_ns
        self.track_ms.append(
            ((elapsed_ns - self._waited_ns) * 1e-6, 0.0 if before_ns is None else (spent_ns - before_ns) * 1e-6)
        )
        super().add_track(elapsed_ns)

    def add_stage(self, stage: str, elapsed_ns: int) -> None:
        if stage == "publish":
            self._publish_ms = elapsed_ns * 1e-6
        super().add_stage(stage, elapsed_ns)

    def add_frame(self, step: Any, latency_ns: int) -> None:
        self.rest_ms.append((self._publish_ms, latency_ns * 1e-6))
        super().add_frame(step, latency_ns)


class Stretches:
    """A sink that lets a stuck consumer come and go; `num_stopped` counts those that truly were stopped."""

    def __init__(self, plan: Plan, waiting: list[Consumer]) -> None:
        self._plan, self._waiting = plan, waiting
        self._present: Consumer | None = None
        self.indices: list[int] = []
        self.num_stopped = 0

    def add(self, result: FrameResult) -> None:
        index = result.step.pose.frame_index
        self.indices.append(index)
        is_stuck = self._plan.is_stuck(index + 1)
        if is_stuck and self._present is None and self._waiting:
            self._present = self._waiting.pop()
            self._present.connect()
        elif not is_stuck and self._present is not None:
            self.leave()

    def leave(self) -> None:
        if self._present is not None:
            self.num_stopped += self._present.is_stopped
            self._present.end()
            self._present = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        config = load_config(options.config, [])
        frontend = create_frontend(config.frontend, select_device(config.frontend.device))
        watch, pairs, num_stuck = CpuWatch(), [], 0
        for number in range(options.pairs):
            pair = []
            for starts_stuck in (number % 2 == 0, number % 2 == 1):
                rows, num_stopped = run_once(config, frontend, options, Plan(options.stretch, starts_stuck))
                pair.append(rows)
                num_stuck += num_stopped
            pairs.append(np.concatenate(pair))
            print(f"pair {number + 1} of {options.pairs}: {_ratios(pairs[-1:])}", file=sys.stderr, flush=True)
    except VoError as error:
        print(f"measure_stuck: error: {error}", file=sys.stderr)
        return 2
    tree = result_tree(options, pairs, num_stuck, watch.others_share())
    text = json.dumps(tree, indent=2)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measures a real run with and without a stuck consumer; prints JSON.")
    parser.add_argument("source", metavar="SOURCE", nargs="?", default="demo", help="as for vo run (default: demo)")
    parser.add_argument("--config", default="fast-cpu", help="preset or file (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="of runs (default: %(default)s)")
    parser.add_argument("--stretch", type=int, default=55, help="frames with or without (default: %(default)s)")
    parser.add_argument("--realtime", action="store_true", help="frames at their own pace; late ones are dropped")
    parser.add_argument("--max-frames", type=int, default=330, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def run_once(
    config: Config, frontend: Frontend, options: argparse.Namespace, plan: Plan
) -> tuple[NDArray[np.float64], int]:
    """One run: (frames, 1 + figures), the first column 1 where a consumer was stuck; and how many truly were."""
    source = open_source(options.source)
    meter, consumers = FrameMeter(), []
    publisher_config = replace(config.publisher, endpoint="tcp://127.0.0.1:*", linger_ms=0)
    stream = MessageStream(source.camera, heartbeat_hz=publisher_config.heartbeat_hz)
    try:
        with Publisher(publisher_config, stream) as publisher, progress(None, is_quiet=True) as advance:
            num_stretches = -(-options.max_frames // plan.stretch)
            consumers = [Consumer(publisher.endpoint, stops=number > 0) for number in range(num_stretches)]
            for consumer in consumers:
                consumer.wait_until_ready()
            consumers[0].connect()
            stretches = Stretches(plan, consumers[1:])
            preview = image_preview(publisher_config)
            results = RunResults(None, outlives_disk=False, is_evaluated=False, say=print)
            ends = sinks(stream, preview, results, meter, advance)
            run(
                config,
                source,
                frontend,
                (*ends, stretches.add),
                is_paced=options.realtime,
                max_frames=options.max_frames,
                meter=meter,
            )
            stretches.leave()
    finally:
        for consumer in consumers:
            consumer.end()
    rows = [
        (float(plan.is_stuck(index)), *track, *rest)
        for index, track, rest in zip(stretches.indices, meter.track_ms, meter.rest_ms, strict=True)
        if plan.is_settled(index)
    ]
    return np.array(rows), stretches.num_stopped


def result_tree(
    options: argparse.Namespace, pairs: list[NDArray[np.float64]], num_stuck: int, others_share: float | None
) -> dict[str, Any]:
    rows = np.concatenate(pairs)
    is_stuck = rows[:, 0] == 1
    figures = {}
    for column, name in enumerate(FIGURES, 1):
        without, stuck = (_percentiles(rows[chosen, column]) for chosen in (~is_stuck, is_stuck))
        figures[name] = {"all_keep_up": without, "one_stuck": stuck}
        for key, rank in (("p50", 50), ("p99", 99)):
            low, high = _interval(pairs, column, rank)
            figures[name][f"{key}_ratio"] = {"ratio": stuck[key] / without[key], "low": low, "high": high}
    command = f"python tools/measure_stuck.py {portable_source(options.source)} --config {options.config}"
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"{command} --pairs {options.pairs} --stretch {options.stretch} --max-frames {options.max_frames}"
        + " --realtime" * options.realtime,
        "machine": asdict(read_machine()),
        "source": portable_source(options.source),
        "config": options.config,
        "others_share": others_share,
        "num_frames": {"all_keep_up": int((~is_stuck).sum()), "one_stuck": int(is_stuck.sum())},
        "num_stuck_consumers": num_stuck,
        "max_ratio": MAX_RATIO,
        "figures": figures,
    }


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99)}


def _ratio(pairs: Sequence[NDArray[np.float64]], column: int, rank: float) -> float:
    rows = np.concatenate(pairs)
    is_stuck = rows[:, 0] == 1
    return float(np.percentile(rows[is_stuck, column], rank) / np.percentile(rows[~is_stuck, column], rank))


def _interval(pairs: list[NDArray[np.float64]], column: int, rank: float) -> tuple[float, float]:
    """90 % bootstrap interval of the ratio over the pairs of runs."""
    numbers = np.arange(len(pairs), dtype=np.float64)

    def ratios(resamples: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([_ratio([pairs[int(number)] for number in row], column, rank) for row in resamples])

    return bootstrap_interval(numbers, ratios)


def _ratios(pairs: list[NDArray[np.float64]]) -> str:
    return ", ".join(f"{name} p99 x {_ratio(pairs, column, 99):.3f}" for column, name in enumerate(FIGURES, 1))


if __name__ == "__main__":
    sys.exit(main())
