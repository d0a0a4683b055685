"""Measure everything in BENCHMARKS.md again on this machine, and write the page.

    LIGHTVO_WEIGHTS=DIR LIGHTVO_DATA=DIR python tools/run_benchmarks.py [--only peers,wire,...] [--case NAME] [--resume]

LIGHTVO_DATA holds kitti/sequences/00 with kitti/poses/00.txt, and tum/rgbd_7scenes_head. Nothing else should run
meanwhile. `--list` says what there is and how long each takes on two cores. A run that was interrupted goes on with
`--resume`; a case that fails is named at the end, and the others are measured all the same.
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
# What is done already, for --resume; not a result.
DONE = RESULTS / ".done"
GROUPS = (
    "speed",
    "kernels",
    "matching",
    "memory",
    "runs",
    "wire",
    "endurance",
    "robustness",
    "peers",
    "batch",
    "guard",
    "faults",
)

KITTI, ROOM = "kitti:{data}/kitti/sequences/00", "tum:{data}/tum/rgbd_7scenes_head"
# What the published methods do, so that both sides of a comparison find the same.
ALIKED_AS_PUBLISHED = ("--set", "frontend.extractor.spread_cell_px=null")
XFEAT = ("--set", "frontend.extractor.name=xfeat")
XFEAT_AS_PUBLISHED = (*XFEAT, *ALIKED_AS_PUBLISHED, "--set", "frontend.extractor.subpixel=false")
FEWER = ("--set", "frontend.extractor.max_keypoints=512")


@dataclass(frozen=True, slots=True)
class Case:
    """One command: `name` is that of its file in benchmarks/, or of the run; `minutes` are rough, on two cores."""

    group: str
    name: str
    source: str
    flags: tuple[str, ...] = ()
    minutes: float = 1.0


CASES = (
    Case("speed", "cpu-aliked-640x480", ROOM, ("--against", "kornia", *ALIKED_AS_PUBLISHED)),
    Case("speed", "cpu-aliked-1241x376", KITTI, ("--against", "kornia", *ALIKED_AS_PUBLISHED)),
    Case("speed", "cpu-aliked-1241x376-512", KITTI, ("--against", "kornia", *ALIKED_AS_PUBLISHED, *FEWER)),
    Case("speed", "cpu-default-1241x376", KITTI, ("--against", "orb")),
    Case("speed", "cpu-xfeat-640x480", ROOM, ("--against", "kornia", *XFEAT_AS_PUBLISHED)),
    Case("speed", "cpu-xfeat-1241x376", KITTI, ("--against", "kornia", *XFEAT_AS_PUBLISHED)),
    Case("speed", "cpu-xfeat-1241x376-512", KITTI, ("--against", "kornia", *XFEAT_AS_PUBLISHED, *FEWER)),
    Case("kernels", "kernels", KITTI, (), 1.5),
    Case("matching", "matching-kitti-neighbours", KITTI, ("--gaps", "1"), 2.5),
    Case("matching", "matching-kitti-gaps", KITTI, ("--gaps", "3,5", "--step", "4"), 2),
    Case("memory", "memory-kitti", KITTI, (), 0.5),
    Case("runs", "kitti-00-default", KITTI, (), 1.5),
    Case("runs", "kitti-00-preset", KITTI, ("--config", "kitti"), 1.5),
    Case("runs", "kitti-00-xfeat", KITTI, XFEAT, 1.5),
    Case("runs", "room-default", ROOM, (), 3),
    Case("runs", "room-preset", ROOM, ("--config", "tum"), 3.5),
    Case("runs", "demo-default", "demo"),
    Case("runs", "demo-preset", "demo", ("--config", "demo")),
    Case("wire", "wire", "", ("--seconds", "60"), 1.5),
    Case("wire", "stuck-consumer", "demo", ("--config", "fast-cpu", "--pairs", "5"), 5),
    Case("wire", "viewer", "", (), 0.5),
    Case("endurance", "live-http", "", (), 10.5),
    Case("endurance", "soak-demo", "demo", (), 61),
    Case("robustness", "robustness-kitti", KITTI, (), 12),
    Case("peers", "peers", "", ("--minutes", "12"), 12.5),
    Case("batch", "batch-heads", "heads", ("--device", "cpu"), 8),
    Case("guard", "guard", "", (), 3),
    Case("guard", "guard-check", "", (), 3),
    Case("faults", "faults-geometry", "", (), 3),
    Case("faults", "faults-relative-pose", "", ("--module", "vo/relative_pose.py"), 3),
)
TOOLS = {
    "peers": "compare_peers.py",
    "guard": "regression_guard.py",
    "guard-check": "check_guard.py",
    "faults-geometry": "mutate.py",
    "faults-relative-pose": "mutate.py",
    "wire": "measure_wire.py",
    "stuck-consumer": "measure_stuck.py",
    "viewer": "measure_viewer.py",
    "live-http": "measure_live.py",
    "soak-demo": "soak.py",
    "robustness-kitti": "measure_robustness.py",
    "kernels": "measure_kernels.py",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    groups = options.only.split(",")
    unknown = [*(set(groups) - set(GROUPS)), *(set(options.case) - {case.name for case in CASES})]
    if unknown or ("LIGHTVO_DATA" not in os.environ and not options.list):
        problem = f"{unknown[0]!r} is not known" if unknown else "set LIGHTVO_DATA to the directory of the sequences"
        print(f"run_benchmarks: error: {problem}", file=sys.stderr)
        return 2
    chosen = [case for case in CASES if case.group in groups and (not options.case or case.name in options.case)]
    RESULTS.mkdir(exist_ok=True)
    if not options.resume and not options.list:
        DONE.unlink(missing_ok=True)
    done = DONE.read_text(encoding="utf-8").split() if DONE.is_file() else []
    left = [case for case in chosen if case.name not in done]
    for case in left if options.list else ():
        print(f"{case.minutes:5.1f} min  --only {case.group} --case {case.name}")
    print(f"{len(left)} cases, about {sum(case.minutes for case in left):.0f} min on two quiet cores", file=sys.stderr)
    if options.list:
        return 0
    failed = [case.name for case in left if not measured(case)]
    for name in failed:
        print(f"run_benchmarks: error: {name} failed; see above, or run it alone: --case {name}", file=sys.stderr)
    return write_benchmarks([]) or (2 if failed else 0)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure everything in BENCHMARKS.md again, and write the page.")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas (default: %(default)s)")
    parser.add_argument("--case", action="append", default=[], help="only the case of that name; repeatable")
    parser.add_argument("--list", action="store_true", help="measure nothing; say what there is and how long it takes")
    parser.add_argument("--resume", action="store_true", help="leave out what the last call has measured already")
    return parser


def measured(case: Case) -> bool:
    """Measures one case; whether it came to a good end."""
    print(f"{case.name} ... about {case.minutes:g} min", file=sys.stderr, flush=True)
    start_s = time.monotonic()
    try:
        measure(case, case.source.format(data=os.environ["LIGHTVO_DATA"]))
    except subprocess.CalledProcessError as error:
        print(f"run_benchmarks: error: {case.name} ended with {error.returncode}", file=sys.stderr)
        return False
    with DONE.open("a", encoding="utf-8") as done:
        done.write(f"{case.name}\n")
    print(f"{case.name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    return True


def measure(case: Case, source: str) -> None:
    """Runs one case; its file is written only when it came to a good end. Raises CalledProcessError."""
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
        case "peers" | "guard" | "faults" | "wire" | "endurance" | "robustness" | "kernels":
            run_tool(TOOLS[case.name], *([source] if source else []), "--json", str(result), *case.flags)
        case _:
            with tempfile.TemporaryDirectory() as output:
                flags = ["--output", output, "--device", "cpu", "--publish", "off", "--quiet", *case.flags]
                subprocess.run([sys.executable, "-m", "vo", "run", source, *flags], check=True, cwd=ROOT)
                add_run(f"{case.name}={output}", RESULTS)


def run_tool(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *flags], check=True, cwd=ROOT, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
