"""Measure how much memory `vo run` takes at its peak.

    python tools/peak_memory.py kitti:DIR --max-frames 60 --json benchmarks/memory-kitti.json [--set a.b=v]...

Runs `vo run` as a child and asks the system for the child's largest resident set. This process itself imports nothing
large: on Linux a child starts with its parent's peak counted as its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from vo.bench_machine import portable_source, read_machine

SCHEMA = "lightvo-memory/1"
LIMIT_BYTES = 1_200_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the peak memory of `vo run`.")
    parser.add_argument("source", metavar="SOURCE", help="where the frames come from, as for vo run")
    parser.add_argument("--max-frames", type=int, default=60, help="stop after so many (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--config", metavar="F", help="as for vo run")
    parser.add_argument("--set", metavar="A.B=V", action="append", default=[], help="as for vo run; repeatable")
    options = parser.parse_args(arguments)
    flags = ["--max-frames", str(options.max_frames), "--device", options.device, "--publish", "off"]
    flags += ["--config", options.config] if options.config is not None else []
    for override in options.set:
        flags += ["--set", override]
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "vo", "run", options.source, "--quiet", "--output", output, *flags]
        return_code, peak_bytes = run_measured(command)
        if return_code != 0:
            print(f"peak_memory: error: vo run ended with {return_code}; see above", file=sys.stderr)
            return 2
        summary = json.loads(Path(output, "summary.json").read_text(encoding="utf-8"))
    tree = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["vo", "run", portable_source(options.source), *flags]),
        "machine": asdict(read_machine()),
        "source": portable_source(options.source),
        "num_frames": summary["frames_processed"],
        "weights": [used["name"] for used in summary["weights"]],
        "versions": summary["versions"],
        "peak_bytes": peak_bytes,
        "limit_bytes": LIMIT_BYTES,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    print(f"peak {peak_bytes / 1e9:.3f} GB of {LIMIT_BYTES / 1e9:.1f} GB: {tree['command']}")
    return 0 if peak_bytes <= LIMIT_BYTES else 1


def run_measured(command: Sequence[str]) -> tuple[int, int]:
    """Runs a command to its end; its exit code and its largest resident set in bytes."""
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts in KiB, macOS in bytes.
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
