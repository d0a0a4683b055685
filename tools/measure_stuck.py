"""Measures whether a stuck consumer slows a real run: the same frames with and without one, in turns.

    python tools/measure_stuck.py demo --config fast-cpu --repeats 3

A consumer that keeps up is always there; in every second run another one is stopped (SIGSTOP) as soon as it is
connected. Prints, as JSON, p50 and p99 of the time from capture to publication and of the stages, the median over the
repeats, and the ratio of stuck to not stuck. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from measure_wire import Consumer

Figures = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures a real run with and without a stuck consumer; prints JSON.")
    parser.add_argument("source", metavar="SOURCE", nargs="?", default="demo", help="as for vo run (default: demo)")
    parser.add_argument("--config", default="default", help="preset or file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of both cases (default: %(default)s)")
    parser.add_argument("--max-frames", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--realtime", action="store_true", help="frames at their own pace: latency without queues")
    options = parser.parse_args()
    command = [options.source, "--config", options.config, "--max-frames", str(options.max_frames)]
    command += ["--realtime"] * options.realtime
    figures: dict[bool, list[Figures]] = {False: [], True: []}
    for _ in range(options.repeats):
        for is_stuck in (False, True):
            figures[is_stuck].append(run_once(command, is_stuck=is_stuck))
    without, stuck = ({key: _median(runs, key) for key in runs[0]} for runs in (figures[False], figures[True]))
    ratios = {key: stuck[key] / without[key] for key in without if without[key] > 0}
    print(json.dumps({"all_keep_up": without, "one_stuck": stuck, "ratio": ratios}, indent=2))
    return 0


def run_once(arguments: list[str], *, is_stuck: bool) -> Figures:
    """One `vo run` in a process of its own; its figures in ms."""
    endpoint = _free_endpoint()
    consumers = [Consumer(endpoint, "live") for _ in range(2 if is_stuck else 1)]
    stopping = threading.Thread(target=_stop_when_ready, args=(consumers[-1],)) if is_stuck else None
    try:
        if stopping is not None:
            stopping.start()
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "vo",
                "run",
                *arguments,
                "--publish",
                endpoint,
                "--output",
                folder,
                "--quiet",
            ]
            subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
            summary = json.loads((Path(folder) / "summary.json").read_text())
    finally:
        for consumer in consumers:
            consumer.end()
        if stopping is not None:
            stopping.join()
    figures = {f"latency_{name}": float(summary["latency_ms"][name]) for name in ("p50", "p99")}
    for stage in ("track", "publish"):
        figures |= {f"{stage}_{name}": float(value) for name, value in summary["stages_ms"][stage].items()}
    return figures


def _stop_when_ready(consumer: Consumer) -> None:
    consumer.wait_until_ready()
    consumer.process.send_signal(signal.SIGSTOP)


def _free_endpoint() -> str:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{first.getsockname()[1]}"


def _median(runs: list[Figures], key: str) -> float:
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
