"""Measure on a GPU everything that BENCHMARKS.md says of one, in one call of about nine minutes.

    LIGHTVO_WEIGHTS=DIR python tools/measure_gpu.py [--only checks,aliked,xfeat,...] [--output benchmarks]

Needs the repository, the weights, and for the comparison kornia; no network and no data sets. Writes gpu-*.json; each
part runs in a process of its own, and one that fails leaves the others alone. Then: python tools/write_benchmarks.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from vo.bench_machine import read_machine
from vo.evaluation import compare
from vo.kernels import kernels, status
from vo.summary import library_versions
from vo.trajectory import read_trajectory

ROOT = Path(__file__).resolve().parents[1]
TRAJECTORY_SCHEMA = "lightvo-gpu-trajectory/1"
CHECKS_SCHEMA = "lightvo-gpu-checks/1"


@dataclass(frozen=True, slots=True)
class Part:
    """One process: `vo bench` with these flags, or what the name stands for in `MEASURERS`."""

    name: str
    flags: tuple[str, ...]
    timeout_s: float


# At 60 Hz a p99 of 900 frames rests on 9 of them and takes a quarter of a minute.
_STREAMS = ("--stream", "lossless,latest", "--stream-frames", "900", "--stream-hz", "60")
_COMPARED = ("--against", "kornia", "--repeats", "200", "--frames", "60")
# What is fastest on the GPU is known from the parts before.
_TWO_VIEW = ("--set", "odometry.mode=two_view", "--repeats", "20", "--frames", "60")
PARTS = (
    Part("checks", (), 130),
    Part("aliked", ("demo", *_COMPARED, *_STREAMS), 120),
    Part("xfeat", ("demo", "--config", "xfeat", *_COMPARED, *_STREAMS), 100),
    Part("aliked-two-view", ("demo", *_TWO_VIEW, *_STREAMS), 58),
    Part("xfeat-two-view", ("demo", "--config", "xfeat", *_TWO_VIEW, *_STREAMS), 58),
    Part(
        "long", ("demo", "--repeats", "20", "--frames", "60", "--stream", "lossless", "--stream-frames", "10000"), 220
    ),
    Part("engine", (), 120),
    Part("trajectory", (), 90),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every part has been measured, 1 where one failed, 2 for what cannot be asked for."""
    parser = argparse.ArgumentParser(description="Measure on a GPU everything that BENCHMARKS.md says of one.")
    parser.add_argument("--only", default=",".join(part.name for part in PARTS), help="parts (default: %(default)s)")
    parser.add_argument("--stream-frames", type=int, metavar="N", help="of aliked and xfeat, 900 by default")
    parser.add_argument("--long-frames", type=int, metavar="N", help="of the part long, 10000 by default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="where gpu-*.json go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to test this program")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    unknown = [name for name in names if name not in {part.name for part in PARTS}]
    if unknown or (options.device == "cuda" and not torch.cuda.is_available()):
        problem = f"{unknown[0]!r} is not a part" if unknown else "no GPU: torch.cuda.is_available() is false"
        print(f"measure_gpu: error: {problem}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    if kernels() is None:
        print(f"measure_gpu: geometry: {status()}; python tools/build_kernels.py compiles it", file=sys.stderr)
    num_frames = {"aliked": options.stream_frames, "xfeat": options.stream_frames, "long": options.long_frames}
    parts = [with_frames(part, num_frames.get(part.name.partition("-")[0])) for part in PARTS if part.name in names]
    failed = [part.name for part in parts if not measured(part, options.output, options.device)]
    if failed:
        print(f"measure_gpu: failed: {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


def with_frames(part: Part, num_frames: int | None) -> Part:
    """The part with another number of frames in its whole runs."""
    if num_frames is None:
        return part
    flags = list(part.flags)
    flags[flags.index("--stream-frames") + 1] = str(num_frames)
    return replace(part, flags=tuple(flags))


def measured(part: Part, output: Path, device: str) -> bool:
    """Measures one part and writes its file; False, said aloud, where that did not work."""
    print(f"{part.name} ...", file=sys.stderr, flush=True)
    start_s = time.monotonic()
    path = output / f"gpu-{part.name}.json"
    try:
        text = MEASURERS.get(part.name, bench)(part, device)
    except subprocess.CalledProcessError as error:
        print(f"{part.name}: ended with {error.returncode}", file=sys.stderr)
        return False
    except subprocess.TimeoutExpired:
        print(f"{part.name}: not done after {part.timeout_s:.0f} s", file=sys.stderr)
        return False
    path.write_text(text, encoding="utf-8")
    print(f"{part.name}: {time.monotonic() - start_s:.0f} s, {path.name}", file=sys.stderr, flush=True)
    return True


def bench(part: Part, device: str) -> str:
    return _vo(["bench", *part.flags, "--device", device, "--json"], part.timeout_s)


def checks(part: Part, device: str) -> str:
    """The tests that only a GPU can run, and how many of them passed."""
    # Other files may not even load where packages that a GPU has nothing to do with are missing.
    files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    arguments = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", *map(str, files)]
    done = _run(arguments, part.timeout_s, is_checked=False)
    print(done.stdout[-4000:], file=sys.stderr, flush=True)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    if not counts:
        raise subprocess.CalledProcessError(done.returncode, "pytest", done.stdout)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    tree = {**_heading(CHECKS_SCHEMA, part, device), "counts": counts, "failed": failed}
    return json.dumps(tree, indent=2) + "\n"


def engine_ways(part: Part, device: str) -> str:
    return _run(["tools/engine_ways.py", "--device", device], part.timeout_s).stdout


def trajectories(part: Part, device: str) -> str:
    """The clip on the device and on the CPU in float32, with the same settings: how far the two paths are apart."""
    flags = ["--set", "frontend.matcher.precision=float32", "--publish", "off", "--quiet"]
    with tempfile.TemporaryDirectory() as directory:
        runs = {"theirs": "cpu", "ours": device}
        for name, on in runs.items():
            chosen = flags if on == "cpu" else flags[2:]
            _vo(["run", "demo", *chosen, "--device", on, "--output", f"{directory}/{name}"], part.timeout_s)
        ours, theirs = (read_trajectory(Path(directory, name, "trajectory_tum.txt")) for name in ("ours", "theirs"))
        summary = json.loads(Path(directory, "ours", "summary.json").read_text(encoding="utf-8"))
    evaluation = compare(ours, theirs, "none").evaluation
    aligned = compare(ours, theirs, "sim3").evaluation
    tree = {
        **_heading(TRAJECTORY_SCHEMA, part, device),
        "source": "demo",
        "engine": summary["engine"],
        "fallbacks": summary["fallbacks"],
        "num_poses": [len(ours.positions), len(theirs.positions)],
        "path_length": evaluation.path_length_m,
        "rmse": evaluation.ate_rmse_m,
        "rmse_aligned": aligned.ate_rmse_m,
        "rotation_deg_per_frame": evaluation.rpe_rot_deg,
        "largest_step_difference": _largest_step_difference(ours.positions, theirs.positions),
    }
    return json.dumps(tree, indent=2) + "\n"


def _largest_step_difference(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Between the positions of two frames, in the map's unit; None where the two have different frames."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return None
    return float(np.linalg.norm(np.diff(ours, axis=0) - np.diff(theirs, axis=0), axis=1).max())


def _heading(schema: str, part: Part, device: str) -> dict[str, object]:
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "schema": schema,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "tools/measure_gpu.py", "--only", part.name]),
        "machine": asdict(read_machine(torch.get_num_threads(), gpu)),
        "versions": dict(library_versions()),
    }


def _vo(arguments: list[str], timeout_s: float) -> str:
    return _run(["-m", "vo", *arguments], timeout_s).stdout


def _run(arguments: list[str], timeout_s: float, *, is_checked: bool = True) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in (str(ROOT), os.environ.get("PYTHONPATH", "")) if entry)
    return subprocess.run(
        [sys.executable, *arguments],
        check=is_checked,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )


MEASURERS = {"checks": checks, "engine": engine_ways, "trajectory": trajectories}


if __name__ == "__main__":
    sys.exit(main())
