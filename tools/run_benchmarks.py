"""Measure everything in BENCHMARKS.md again on this machine, and write the page.

    LIGHTVO_WEIGHTS=DIR LIGHTVO_DATA=DIR python tools/run_benchmarks.py [--only speed,peers,guard,...]

LIGHTVO_DATA holds kitti/sequences/00 with kitti/poses/00.txt, and tum/rgbd_7scenes_head. Nothing else should run
meanwhile. On two cores about ten minutes for speed, matching and memory; ten for whole runs; 13 for peers; 8 for batch;
6 for guard; 3 for faults.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from write_benchmarks import add_run
from write_benchmarks import main as write_benchmarks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks"
GROUPS = ("speed", "matching", "memory", "runs", "peers", "batch", "guard", "faults")

KITTI, ROOM = "kitti:{data}/kitti/sequences/00", "tum:{data}/tum/rgbd_7scenes_head"
# What the published methods do, so that both sides of a comparison find the same.
ALIKED_AS_PUBLISHED = ("--set", "frontend.extractor.spread_cell_px=null")
XFEAT = ("--set", "frontend.extractor.name=xfeat")
XFEAT_AS_PUBLISHED = (*XFEAT, *ALIKED_AS_PUBLISHED, "--set", "frontend.extractor.subpixel=false")
FEWER = ("--set", "frontend.extractor.max_keypoints=512")


@dataclass(frozen=True, slots=True)
class Case:
    """One command: `name` is that of its file in benchmarks/, or of the run."""

    group: str
    name: str
    source: str
    flags: tuple[str, ...] = ()


CASES = (
    Case("speed", "cpu-aliked-640x480", ROOM, ("--against", "kornia", *ALIKED_AS_PUBLISHED)),
    Case("speed", "cpu-aliked-1241x376", KITTI, ("--against", "kornia", *ALIKED_AS_PUBLISHED)),
    Case("speed", "cpu-aliked-1241x376-512", KITTI, ("--against", "kornia", *ALIKED_AS_PUBLISHED, *FEWER)),
    Case("speed", "cpu-default-1241x376", KITTI, ("--against", "orb")),
    Case("speed", "cpu-xfeat-640x480", ROOM, ("--against", "kornia", *XFEAT_AS_PUBLISHED)),
    Case("speed", "cpu-xfeat-1241x376", KITTI, ("--against", "kornia", *XFEAT_AS_PUBLISHED)),
    Case("speed", "cpu-xfeat-1241x376-512", KITTI, ("--against", "kornia", *XFEAT_AS_PUBLISHED, *FEWER)),
    Case("matching", "matching-kitti-neighbours", KITTI, ("--gaps", "1")),
    Case("matching", "matching-kitti-gaps", KITTI, ("--gaps", "3,5", "--step", "4")),
    Case("memory", "memory-kitti", KITTI),
    Case("runs", "kitti-00-default", KITTI),
    Case("runs", "kitti-00-preset", KITTI, ("--config", "kitti")),
    Case("runs", "kitti-00-xfeat", KITTI, XFEAT),
    Case("runs", "room-default", ROOM),
    Case("runs", "room-preset", ROOM, ("--config", "tum")),
    Case("runs", "demo-default", "demo"),
    Case("runs", "demo-preset", "demo", ("--config", "demo")),
    Case("peers", "peers", ""),
    Case("batch", "batch-heads", "heads", ("--device", "cpu")),
    Case("guard", "guard", ""),
    Case("guard", "guard-check", ""),
    Case("faults", "faults-geometry", ""),
)
TOOLS = {
    "peers": "compare_peers.py",
    "guard": "regression_guard.py",
    "guard-check": "check_guard.py",
    "faults-geometry": "mutate.py",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure everything in BENCHMARKS.md again, and write the page.")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas (default: %(default)s)")
    parser.add_argument("--case", action="append", default=[], help="only the case of that name; repeatable")
    options = parser.parse_args(arguments)
    groups = options.only.split(",")
    unknown = [*(set(groups) - set(GROUPS)), *(set(options.case) - {case.name for case in CASES})]
    if unknown or "LIGHTVO_DATA" not in os.environ:
        problem = f"{unknown[0]!r} is not known" if unknown else "set LIGHTVO_DATA to the directory of the sequences"
        print(f"run_benchmarks: error: {problem}", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    for case in CASES:
        if case.group not in groups or (options.case and case.name not in options.case):
            continue
        try:
            measure(case, case.source.format(data=os.environ["LIGHTVO_DATA"]))
        except subprocess.CalledProcessError as error:
            print(f"run_benchmarks: error: {case.name} ended with {error.returncode}; see above", file=sys.stderr)
            return 2
    return write_benchmarks([])


def measure(case: Case, source: str) -> None:
    """Runs one case; its file is written only when it came to a good end. Raises CalledProcessError."""
    print(f"{case.name} ...", file=sys.stderr, flush=True)
    start_s = time.monotonic()
    result = RESULTS / f"{case.name}.json"
    match case.group:
        case "speed":
            command = [sys.executable, "-m", "vo", "bench", source, "--device", "cpu", "--json", *case.flags]
            printed = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout
            result.write_bytes(printed)
        case "matching":
            run_tool("matching_quality.py", "--source", source, "--json", str(result), *case.flags)
        case "memory":
            run_tool("peak_memory.py", source, "--json", str(result), *case.flags)
        case "batch":
            with tempfile.TemporaryDirectory() as output:
                command = [sys.executable, "-m", "vo", "batch", source, "--output", output, *case.flags]
                subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
                tree = json.loads(Path(output, "batch.json").read_text(encoding="utf-8"))
                tree["command"] = shlex.join(["vo", "batch", source, "--output", f"out/{source}", *case.flags])
                result.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        case "peers" | "guard" | "faults":
            run_tool(TOOLS[case.name], "--json", str(result), *case.flags)
        case _:
            with tempfile.TemporaryDirectory() as output:
                flags = ["--output", output, "--device", "cpu", "--publish", "off", "--quiet", *case.flags]
                subprocess.run([sys.executable, "-m", "vo", "run", source, *flags], check=True, cwd=ROOT)
                add_run(f"{case.name}={output}", RESULTS)
    print(f"{case.name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)


def run_tool(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *flags], check=True, cwd=ROOT, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
