"""Run `vo run` for a long time at full speed and watch what a leak would show: memory, open files, threads.

    python tools/soak.py --minutes 60 --json benchmarks/soak-demo.json [SOURCE] [--config F] [--set a.b=v]...

The run replays a source in a loop, publishes everything to a consumer, and writes its results; it is then ended by
SIGTERM, and its results are checked. Exit code 0: after the warm-up the resident memory stayed within 3 %, and there
were never more open files and threads in its last third than in its first. Linux only: it reads /proc.

Where a lap ends, the clip is opened anew: for a moment there is a decoder less, or one more. So memory is judged by the
median of every three looks in a row, which a leak does not escape; the spread of single looks is told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import zmq

from vo.bench_machine import portable_source, read_machine

SCHEMA = "lightvo-soak/1"
LIMIT_PERCENT = 3.0
INTERRUPTED = 130
# Bounds of what late joiners get, small enough to be reached in the warm-up: the run must then stay where it is.
BOUNDS = (
    "publisher.max_snapshot_poses=500",
    "publisher.max_snapshot_keyframes=100",
    "publisher.max_snapshot_landmarks=2000",
)
_END_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What one look at the process found; `second` since its start.

    files  what the open files are, sorted, numbers left out; kept to name one that was added.
    """

    second: float
    resident_bytes: int
    num_files: int
    num_threads: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the samples after the warm-up amount to.

    spread_percent             largest against smallest resident memory, medians of three looks in a row.
    momentary_spread_percent   the same of single looks.
    growth_percent             median of the last tenth of the samples against that of the first tenth.
    num_files, num_threads     smallest and largest.
    added_files, added_threads   how many more there were at most in the last third than in the first.
    """

    spread_percent: float
    momentary_spread_percent: float
    growth_percent: float
    num_files: tuple[int, int]
    num_threads: tuple[int, int]
    added_files: int
    added_threads: int

    @property
    def is_flat(self) -> bool:
        return self.spread_percent <= LIMIT_PERCENT and self.added_files <= 0 and self.added_threads <= 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Watch the memory, files and threads of a long run; prints a verdict.")
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", default="demo", help="replayed in a loop (default: demo)"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--warm-up-minutes", type=float, default=10.0, help="not judged (default: %(default)s)")
    parser.add_argument("--period-s", type=float, default=10.0, help="between two looks (default: %(default)s)")
    parser.add_argument("--config", default="orb", help="as for vo run (default: %(default)s)")
    parser.add_argument("--set", metavar="A.B=V", action="append", default=[], help="as for vo run; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    flags = ["--config", options.config]
    for override in (*BOUNDS, *options.set):
        flags += ["--set", override]
    endpoint = free_endpoint()
    command = [sys.executable, "-m", "vo", "run", f"loop:{options.source}", "--quiet", "--publish", endpoint, *flags]
    with tempfile.TemporaryDirectory() as folder, draining(endpoint) as received:
        run = subprocess.Popen([*command, "--output", folder])
        samples = watch(run, options.minutes * 60, options.period_s)
        run.send_signal(signal.SIGTERM)
        exit_code = run.wait(_END_TIMEOUT_S)
        if exit_code != INTERRUPTED or len(samples) < 3:
            print(f"soak: error: the run ended with {exit_code} after {len(samples)} looks", file=sys.stderr)
            return 2
        summary = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
        with Path(folder, "trajectory_tum.txt").open(encoding="ascii") as trajectory:
            num_poses = sum(1 for _ in trajectory)
    if num_poses != summary["poses"]:
        print(f"soak: error: {num_poses} poses written, {summary['poses']} counted", file=sys.stderr)
        return 2
    verdict = judge(samples, options.warm_up_minutes * 60)
    tree = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["vo", "run", f"loop:{portable_source(options.source)}", "--output", "DIR", *flags]),
        "machine": asdict(read_machine()),
        "minutes": options.minutes,
        "warm_up_minutes": options.warm_up_minutes,
        "num_frames": summary["frames_processed"],
        "num_poses": num_poses,
        "num_lost_episodes": summary["lost_episodes"],
        "num_messages_received": received[0],
        "fps": summary["fps"],
        "limit_percent": LIMIT_PERCENT,
        "verdict": asdict(verdict) | {"is_flat": verdict.is_flat},
        "added_files": added_files([sample for sample in samples if sample.second >= options.warm_up_minutes * 60]),
        "samples": [without_names(sample) for sample in thinned(samples)],
    }
    if options.json is not None:
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(
        f"{'flat' if verdict.is_flat else 'NOT FLAT'}: {tree['num_frames']} frames in {options.minutes:g} min; "
        f"resident memory {samples[-1].resident_bytes / 1e6:.0f} MB, spread {verdict.spread_percent:.2f} % "
        f"(single looks {verdict.momentary_spread_percent:.2f} %), growth "
        f"{verdict.growth_percent:+.2f} %; files {verdict.num_files}, threads {verdict.num_threads}"
        + "".join(f"; {count} more {name}" for name, count in tree["added_files"].items())
    )
    return 0 if verdict.is_flat else 1


def watch(run: subprocess.Popen[bytes], duration_s: float, period_s: float) -> list[Sample]:
    """Looks at a process every so often, until the time is over or it ends."""
    start_s, samples = time.monotonic(), list[Sample]()
    while time.monotonic() - start_s < duration_s:
        try:
            run.wait(period_s)
        except subprocess.TimeoutExpired:
            samples.append(look(run.pid, time.monotonic() - start_s))
        else:
            break
    return samples


def look(pid: int, second: float) -> Sample:
    """One look at a living process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    resident_kib, num_threads = int(status["VmRSS"].split()[0]), int(status["Threads"])
    files = open_files(pid)
    return Sample(second, resident_kib * 1024, len(files), num_threads, files)


def open_files(pid: int) -> tuple[str, ...]:
    """What the open files of a process are: paths by their last part, sockets and the like by their kind."""
    names = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except OSError:
            target = "closed meanwhile"
        names.append(target.rpartition("/")[2] if target.startswith("/") else re.sub(r":\[\d+\]$", "", target))
    return tuple(sorted(names))


def added_files(samples: Sequence[Sample]) -> dict[str, int]:
    """Which files the last look has more of than the first had, and how many."""
    return dict(Counter(samples[-1].files) - Counter(samples[0].files))


def judge(samples: Sequence[Sample], warm_up_s: float) -> Verdict:
    """What is left after the warm-up; raises ValueError where nothing is."""
    judged = [sample for sample in samples if sample.second >= warm_up_s]
    if not judged:
        raise ValueError(f"no sample after the warm-up of {warm_up_s:g} s")
    resident = [sample.resident_bytes for sample in judged]
    tenth = max(1, len(resident) // 10)
    first, last = statistics.median(resident[:tenth]), statistics.median(resident[-tenth:])
    third = max(1, len(judged) // 3)
    smooth = [statistics.median(resident[max(0, row - 1) : row + 2]) for row in range(len(resident))]
    files, threads = [s.num_files for s in judged], [s.num_threads for s in judged]
    return Verdict(
        spread_percent=100 * (max(smooth) / min(smooth) - 1),
        momentary_spread_percent=100 * (max(resident) / min(resident) - 1),
        growth_percent=100 * (last / first - 1),
        num_files=(min(files), max(files)),
        num_threads=(min(threads), max(threads)),
        added_files=max(files[-third:]) - max(files[:third]),
        added_threads=max(threads[-third:]) - max(threads[:third]),
    )


def without_names(sample: Sample) -> dict[str, object]:
    tree = asdict(sample)
    del tree["files"]
    return tree


def thinned(samples: Sequence[Sample], max_samples: int = 60) -> list[Sample]:
    """At most so many of the samples, evenly, the last one among them."""
    step = -(-len(samples) // max_samples)
    return list(samples[::-1][::step][::-1])


class draining:
    """A consumer of everything, in a thread: what it received is counted and thrown away."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._stop = threading.Event()
        self.received = [0]
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def _drain(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as socket_:
            socket_.linger = 0
            socket_.subscribe(b"")
            socket_.connect(self._endpoint)
            while not self._stop.is_set():
                if socket_.poll(200):
                    socket_.recv()
                    self.received[0] += 1

    def __enter__(self) -> list[int]:
        self._thread.start()
        return self.received

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def free_endpoint() -> str:
    """An address of this machine whose two ports are free now."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return f"tcp://127.0.0.1:{port}"


if __name__ == "__main__":
    sys.exit(main())
