"""Measure the compiled geometry against the same in NumPy, on what a run of the odometry asks of it.

    python tools/measure_kernels.py kitti:DIR --frames 60 --json benchmarks/kernels.json

Runs the odometry once, keeps what it asked of the window, the pose against landmarks and the pose of two views, and
does each again both ways in turn: compiled, NumPy, compiled, NumPy. Times are those of this thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

# Both ways alike: one thread each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import torch

import vo.absolute_pose
import vo.bundle_equations
import vo.geometry
import vo.posing
import vo.relative_pose
import vo.window
from frontends.base import VoError
from vo.bench_machine import portable_source, read_machine
from vo.bench_statistics import ratio, timing
from vo.config_loader import load_config
from vo.frontend import create_frontend
from vo.kernels import kernels, status
from vo.odometry import Odometry
from vo.relative_pose import estimate_relative_pose
from vo.sources import open_source
from vo.summary import library_versions

SCHEMA = "lightvo-kernels/1"
# What is measured: a name, and where a run calls it.
CALLS = (
    ("window", vo.window, "optimize_window"),
    ("pose against landmarks", vo.posing, "refine_absolute_pose"),
)
TWO_VIEWS = "pose of two views"
_USERS = (vo.bundle_equations, vo.absolute_pose, vo.relative_pose)

Call = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the compiled geometry against NumPy.")
    parser.add_argument("source", metavar="SOURCE", help="where the frames come from, as for vo run")
    parser.add_argument("--frames", type=int, default=60, help="the first N frames (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=60, help="of each kind, at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--config", metavar="F", help="as for vo run")
    parser.add_argument("--set", metavar="A.B=V", action="append", default=[], help="as for vo run; repeatable")
    options = parser.parse_args(arguments)
    if kernels() is None:
        print(f"measure_kernels: error: {status()}; nothing to compare", file=sys.stderr)
        return 2
    try:
        recorded = record(options)
    except VoError as error:
        print(f"measure_kernels: error: {error}", file=sys.stderr)
        return 2
    rows = [compared(name, calls[: options.calls]) for name, calls in recorded.items() if calls]
    for row in rows:
        print(
            f"{row['name']:24} {row['compiled']['median_ms']:8.2f} ms, NumPy {row['numpy']['median_ms']:8.2f} ms: "
            f"{row['ratio']['median']:.1f}x ({row['ratio']['low']:.1f} to {row['ratio']['high']:.1f})"
        )
    flags = [] if options.config is None else ["--config", options.config]
    flags += [word for override in options.set for word in ("--set", override)]
    command = ["python", "tools/measure_kernels.py", portable_source(options.source), "--frames", str(options.frames)]
    tree = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join([*command, *flags]),
        "machine": asdict(read_machine()),
        "source": portable_source(options.source),
        "versions": dict(library_versions()),
        "rows": rows,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return 0


def record(options: argparse.Namespace) -> dict[str, list[Call]]:
    """What a run over the first frames asked for, as calls that can be made again; spread over the run."""
    config = load_config(options.config, [*options.set, "frontend.device=cpu"])
    cv2.setNumThreads(1)
    recorded: dict[str, list[Call]] = {name: [] for name, _, _ in CALLS}
    recorded[TWO_VIEWS] = []
    source = open_source(options.source)
    try:
        frontend = create_frontend(config.frontend, torch.device("cpu"))
        odometry = Odometry(source.camera, config.odometry, config.two_view, frontend.matcher.match)
        last = None
        with recording(recorded):
            for frame in islice(source.frames(), options.frames):
                features = frontend.extractor.extract(frame.image)
                matches = odometry.step(frame, features).matches
                if last is not None and matches is not None:
                    recorded[TWO_VIEWS].append(two_views(source.camera, config, last, features, matches))
                last = features
            odometry.finish()
        odometry.close()
    finally:
        source.close()
    return {name: calls[:: max(1, len(calls) // options.calls)] for name, calls in recorded.items()}


def two_views(camera: Any, config: Any, features0: Any, features1: Any, matches: Any) -> Call:
    """The pose of two neighbouring frames, as the odometry without a map asks for it."""
    rays0, rays1 = (
        vo.geometry.undistort(features.valid_keypoints(), camera)[matches.indices[:, side]]
        for side, features in enumerate((features0, features1))
    )
    return lambda: estimate_relative_pose(rays0, rays1, camera.focal_px, config.two_view)


@contextmanager
def recording(recorded: dict[str, list[Call]]) -> Iterator[None]:
    """Meanwhile, calls of what is measured are kept."""
    originals = [(module, function, getattr(module, function)) for _, module, function in CALLS]

    def kept(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **named: object) -> object:
            recorded[name].append(lambda: original(*given, **named))
            return original(*given, **named)

        return call

    for (name, _, _), (module, function, original) in zip(CALLS, originals, strict=True):
        setattr(module, function, kept(name, original))
    try:
        yield
    finally:
        for module, function, original in originals:
            setattr(module, function, original)


def compared(name: str, calls: Sequence[Call]) -> dict[str, Any]:
    """Times of every call both ways, in turn; the first of each is not counted."""
    compiled_ms, numpy_ms = [], []
    for number, call in enumerate([calls[0], *calls]):
        first = time_of(call)
        with numpy_alone():
            second = time_of(call)
        if number:
            compiled_ms.append(first)
            numpy_ms.append(second)
    return {
        "name": name,
        "compiled": asdict(timing(compiled_ms)),
        "numpy": asdict(timing(numpy_ms)),
        "ratio": asdict(ratio(compiled_ms, numpy_ms)),
    }


def time_of(call: Call) -> float:
    start_ns = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start_ns) * 1e-6


@contextmanager
def numpy_alone() -> Iterator[None]:
    """Meanwhile, nothing compiled is used."""
    for user in _USERS:
        user.kernels = lambda: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for user in _USERS:
            user.kernels = kernels  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
