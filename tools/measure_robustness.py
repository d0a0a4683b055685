"""What faults of a camera do to a run: black, blurred, missing, dark and repeated frames, and every n-th frame only.

    python tools/measure_robustness.py kitti:DIR [--config kitti] [--start 30,60,100] [--json FILE]

Every case runs the whole odometry on the same frames with one passage damaged. For each: poses, the good frames it took
to find the camera again, segments, and the ATE (Sim3) beside that of the undamaged run. Features and matches of frames
that are the same in several cases are computed once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

# As `vo run` sets it for itself: OpenBLAS' threads spin where they wait, and would take the networks' processor.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from frontends.base import Extractor, Features, Matcher, Matches
from vo.bench_machine import portable_source, read_machine
from vo.config import Config
from vo.config_loader import load_config
from vo.evaluation import compare
from vo.frontend import create_frontend, select_device
from vo.odometry import Odometry
from vo.sources import Source, open_source
from vo.trajectory import Trajectory, read_trajectory
from vo.types import Frame, PoseEstimate

Image = NDArray[np.uint8]

SCHEMA = "lightvo-robustness/1"
STARTS, STRIDES = "30,60,100", (3, 5)


@dataclass(frozen=True, slots=True)
class Case:
    """frames given and posed; good frames after the damage until one was posed; segments with a pose; ATE in m."""

    name: str
    frames: int
    poses: int
    frames_to_recover: int | None
    segments: int
    ate_m: float
    rotation_deg: float


def black(image: Image) -> Image:
    return np.zeros_like(image)


def blurred(image: Image) -> Image:
    """Motion blur over 31 px."""
    kernel = np.zeros((31, 31), np.float32)
    kernel[15] = 1 / 31
    return np.asarray(cv2.filter2D(image, -1, kernel), np.uint8)


def dark(image: Image) -> Image:
    return image // 2


DAMAGES: dict[str, Callable[[Image], Image]] = {"black": black, "blurred": blurred, "half exposure": dark}


class Memory:
    """Remembers the features of every image it has seen, and the matches of every pair of them."""

    def __init__(self, extractor: Extractor, matcher: Matcher) -> None:
        self._extractor, self._matcher = extractor, matcher
        self._known: dict[bytes, Features] = {}
        # Features are kept for good, so what they are stored under is theirs alone.
        self._matched: dict[tuple[int, int], Matches] = {}

    def extract(self, image: Image) -> Features:
        key = cv2.resize(image, None, fx=0.125, fy=0.125, interpolation=cv2.INTER_AREA).tobytes()
        if key not in self._known:
            self._known[key] = self._extractor.extract(image)
        return self._known[key]

    def match(self, features0: Features, features1: Features) -> Matches:
        key = id(features0), id(features1)
        if key not in self._matched:
            self._matched[key] = self._matcher.match(features0, features1)
        return self._matched[key]


def damaged(frames: Iterator[Frame], name: str, first: int, count: int) -> Iterator[Frame]:
    """The frames of a source with `count` of them damaged from number `first` on."""
    kept = None
    for frame in frames:
        inside = first <= frame.index < first + count
        if not inside or kept is None:
            kept = frame
            yield frame
        elif name == "repeated":
            yield replace(frame, image=kept.image)
        elif name in DAMAGES:
            yield replace(frame, image=DAMAGES[name](frame.image))


def measure(
    name: str, source: Source, frames: Iterator[Frame], memory: Memory, odometry: Odometry, last_bad: int
) -> Case:
    poses: list[PoseEstimate] = []
    for frame in frames:
        poses.append(odometry.step(frame, memory.extract(frame.image)).pose)
    odometry.close()
    posed = [pose for pose in poses if pose.T_world_camera is not None]
    good = [pose for pose in poses if pose.frame_index > last_bad]
    found = next((i for i, pose in enumerate(good) if pose.T_world_camera is not None), None)
    trajectory = Trajectory(
        np.array([pose.timestamp_ns for pose in posed], np.int64),
        np.array([pose.T_world_camera for pose in posed]),
        name,
        np.array([pose.frame_index for pose in posed], np.int64),
    )
    if source.ground_truth is None:
        raise SystemExit(f"{source.name}: has no ground truth to measure against")
    evaluation = compare(trajectory, read_trajectory(source.ground_truth), "sim3").evaluation
    return Case(
        name,
        len(poses),
        len(posed),
        found,
        len({pose.segment_id for pose in posed}),
        evaluation.ate_rmse_m,
        evaluation.rpe_rot_deg,
    )


def cases(spec: str, config: Config, starts: Sequence[int], max_frames: int | None) -> Iterator[Case]:
    device = select_device(config.frontend.device)
    frontend = create_frontend(config.frontend, device)
    memory = Memory(frontend.extractor, frontend.matcher)
    kinds = (*((name, 10) for name in DAMAGES), ("missing", 10), ("repeated", 5))
    passages = [(f"{count} {name} from {first}", name, first, count) for first in starts for name, count in kinds]
    wanted = [("undamaged", "", 0, 0, 1), *((*passage, 1) for passage in passages)]
    wanted += [(f"every {stride}. frame", "", 0, 0, stride) for stride in STRIDES]
    for title, name, first, count, stride in wanted:
        source = open_source(spec)
        odometry = Odometry(source.camera, config.odometry, config.two_view, memory.match)
        frames = (
            frame
            for frame in damaged(source.frames(), name, first, count)
            if frame.index % stride == 0 and (max_frames is None or frame.index < max_frames)
        )
        yield measure(title, source, frames, memory, odometry, first + count - 1)
        source.close()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--config", help="preset or file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--start", default=STARTS, help="first damaged frames (default: %(default)s)")
    parser.add_argument("--max-frames", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    given = parser.parse_args(arguments)
    torch.set_num_threads(2)
    done: list[Case] = []
    starts = [int(start) for start in given.start.split(",")]
    for case in cases(given.source, load_config(given.config, given.set), starts, given.max_frames):
        done.append(case)
        print(
            f"{case.name:28} {case.poses:4} of {case.frames:4} poses, found after {case.frames_to_recover}, "
            f"{case.segments} segments, ATE {case.ate_m:.3f} m, {case.rotation_deg:.4f} deg",
            flush=True,
        )
    if given.json is not None:
        tree = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).date().isoformat(),
            "command": portable_command(given),
            "machine": asdict(read_machine()),
            "source": portable_source(given.source),
            "cases": [asdict(case) for case in done],
        }
        given.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return 0


def portable_command(given: argparse.Namespace) -> str:
    """What was asked for, without the paths of this machine."""
    flags = ["--start", given.start]
    flags += ["--config", given.config] if given.config else []
    flags += [f"--set {setting}" for setting in given.set]
    flags += [f"--max-frames {given.max_frames}"] if given.max_frames is not None else []
    return " ".join(["python tools/measure_robustness.py", portable_source(given.source), *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
