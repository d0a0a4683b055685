"""What the regression guard measures: a few sequences through the odometry, and their speed beside a fixed baseline.

The baseline is OpenCV's ORB, brute-force matching and the essential matrix, written out here with nothing of this
project in it, so that no change of ours changes it. Speed is a ratio to it on the same frames in the same process: of
every frame the shortest of several laps counts, which other work on the machine hardly touches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from frontends.base import Features, Matches, WeightsError
from frontends.weights import load_state_dict
from vo.config import Config
from vo.config_loader import load_config
from vo.evaluation import compare
from vo.frontend import Frontend, create_frontend
from vo.odometry import Odometry
from vo.odometry_step import OdometryStep
from vo.sources import Source, open_source
from vo.trajectory import Trajectory, read_trajectory
from vo.types import Camera, Frame, TrackingStatus

SPEED_FRAMES, SPEED_LAPS = 30, 6


@dataclass(frozen=True, slots=True)
class Case:
    """One sequence with one configuration.

    source     with {data} for LIGHTVO_DATA.
    weights    names it needs; the case is left out, with a word, where they are not here.
    speed_settings  its speed is measured with these on top; None: not at all. A light load, so that what a change
               adds to every frame stands out.
    """

    name: str
    source: str
    settings: tuple[str, ...]
    num_frames: int
    weights: tuple[str, ...] = ()
    speed_settings: tuple[str, ...] | None = None


ORB = ("frontend.extractor.name=orb", "frontend.matcher.name=nearest", "frontend.extractor.max_keypoints=800")
ALIKED = ("aliked-t16", "lightglue-light-aliked-t16")
XFEAT_SETTINGS, XFEAT = ("frontend.extractor.name=xfeat",), ("xfeat", "lightglue-light-xfeat")
KITTI, ROOM = "kitti:{data}/kitti/sequences/00", "tum:{data}/tum/rgbd_7scenes_head"
CASES = (
    Case("clip-orb", "demo", ORB, 150, speed_settings=("frontend.extractor.max_keypoints=250",)),
    Case("clip-default", "demo", (), 100, ALIKED, ("frontend.extractor.max_keypoints=256",)),
    Case("kitti-default", KITTI, (), 120, ALIKED),
    Case("kitti-xfeat", KITTI, XFEAT_SETTINGS, 120, XFEAT),
    Case("room-default", ROOM, (), 120, ALIKED),
    Case("still-default", "euroc:{data}/euroc/V1_01_head", (), 45, ALIKED),
)


class LeftOut(Exception):
    """Why a case cannot be measured here, in one line."""


def measure(case: Case) -> dict[str, float]:
    """The figures of a case by name. Raises LeftOut where data or weights are missing, VoError for what is broken."""
    source = _open(case)
    config = load_config(None, [*case.settings, "frontend.device=cpu"])
    frames = list(islice(source.frames(), case.num_frames))
    source.close()
    frontend = create_frontend(config.frontend, torch.device("cpu"))
    lap = Lap(source.camera, config, frontend)
    with lap:
        steps = [lap.step(frame) for frame in frames]
    figures = lap.counts() | _accuracy(source, frames, steps)
    if case.speed_settings is not None:
        light = load_config(None, [*case.settings, *case.speed_settings, "frontend.device=cpu"])
        frontend = create_frontend(light.frontend, torch.device("cpu"))
        figures |= speed_ratios(source.camera, light, frontend, frames[:SPEED_FRAMES])
    return figures


def _open(case: Case) -> Source:
    if "{data}" in case.source and "LIGHTVO_DATA" not in os.environ:
        raise LeftOut("LIGHTVO_DATA is not set")
    spec = case.source.format(data=os.environ.get("LIGHTVO_DATA", ""))
    kind, _, directory = spec.partition(":")
    if directory and not Path(directory).is_dir():
        raise LeftOut(f"{kind}: not under LIGHTVO_DATA")
    for name in case.weights:
        try:
            load_state_dict(name)
        except WeightsError as error:
            raise LeftOut(str(error)) from error
    return open_source(spec)


class Lap:
    """One pass of the odometry over frames, with the time of every stage of every frame, ms."""

    def __init__(self, camera: Camera, config: Config, frontend: Frontend) -> None:
        self._frontend = frontend
        self._resources = ExitStack()
        self._odometry = Odometry(camera, config.odometry, config.two_view, self._match)
        self._match_ms = 0.0
        self.times_ms: dict[str, list[float]] = {"extract": [], "match": [], "track": []}
        self._num_keypoints: list[int] = []
        self._num_matches: list[int] = []

    def __enter__(self) -> Lap:
        close = getattr(self._odometry, "close", None)
        if close is not None:
            self._resources.callback(close)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def step(self, frame: Frame) -> OdometryStep:
        self._match_ms = 0.0
        start_ms = _now_ms()
        features = self._frontend.extractor.extract(frame.image)
        extracted_ms = _now_ms()
        step = self._odometry.step(frame, features)
        self.times_ms["extract"].append(extracted_ms - start_ms)
        self.times_ms["match"].append(self._match_ms)
        self.times_ms["track"].append(_now_ms() - extracted_ms - self._match_ms)
        self._num_keypoints.append(features.num_valid)
        if step.matches is not None:
            self._num_matches.append(len(step.matches))
        return step

    def counts(self) -> dict[str, float]:
        return {
            "mean_keypoints": float(np.mean(self._num_keypoints)),
            "mean_matches": float(np.mean(self._num_matches)),
        }

    def _match(self, features0: Features, features1: Features) -> Matches:
        start_ms = _now_ms()
        matches = self._frontend.matcher.match(features0, features1)
        self._match_ms += _now_ms() - start_ms
        return matches


def _accuracy(source: Source, frames: Sequence[Frame], steps: Sequence[OdometryStep]) -> dict[str, float]:
    """Coverage, losses and errors; where the truth stands still, how far the estimate goes."""
    poses = [step.pose for step in steps]
    is_lost = np.array([pose.status is TrackingStatus.LOST for pose in poses])
    posed = [(pose.timestamp_ns, pose.T_world_camera) for pose in poses if pose.T_world_camera is not None]
    figures = {
        "coverage": len(posed) / len(frames),
        "lost_episodes": float(np.count_nonzero(np.diff(is_lost.astype(np.int8), prepend=0) > 0)),
    }
    if source.ground_truth is None or len(posed) < 3:
        return figures | {"ate_rmse_m": float("inf"), "rpe_rot_deg": float("inf")}
    times_ns, matrices = zip(*posed, strict=True)
    trajectory = Trajectory(np.array(times_ns, np.int64), np.array(matrices), source.name)
    evaluation = compare(trajectory, read_trajectory(source.ground_truth)).evaluation
    if evaluation.path_length_m < 0.05:
        return figures | {"excursion": float(np.linalg.norm(trajectory.positions, axis=1).max())}
    return figures | {"ate_rmse_m": evaluation.ate_rmse_m, "rpe_rot_deg": evaluation.rpe_rot_deg}


def speed_ratios(camera: Camera, config: Config, frontend: Frontend, frames: Sequence[Frame]) -> dict[str, float]:
    """Time of every stage over that of the whole baseline, in turn lap by lap; below 1 is faster than the baseline."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        ours: dict[str, list[list[float]]] = {"extract": [], "match": [], "track": []}
        baseline: list[list[float]] = []
        for _ in range(SPEED_LAPS):
            with Lap(camera, config, frontend) as lap:
                for frame in frames:
                    lap.step(frame)
            for name, times_ms in lap.times_ms.items():
                ours[name].append(times_ms)
            baseline.append(baseline_times(camera, [frame.image for frame in frames]))
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    fixed_ms = _undisturbed_ms(baseline)
    ratios = {f"{name}_ratio": _undisturbed_ms(laps) / fixed_ms for name, laps in ours.items()}
    return ratios | {"frame_ratio": sum(ratios.values())}


def baseline_times(camera: Camera, images: Sequence[NDArray[np.uint8]]) -> list[float]:
    """Time of each frame, ms: 1000 ORB features, brute force with cross check, essential matrix by MAGSAC."""
    detector = cv2.ORB.create(nfeatures=1000)
    matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)
    K = np.ascontiguousarray(camera.K)
    times_ms, previous = [], None
    for image in images:
        start_ms = _now_ms()
        gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        corners, descriptors = detector.detectAndCompute(gray, None)
        if previous is not None:
            matches = matcher.match(previous[1], descriptors)
            points0 = np.float64([previous[0][match.queryIdx].pt for match in matches])
            points1 = np.float64([corners[match.trainIdx].pt for match in matches])
            cv2.findEssentialMat(points0, points1, K, cv2.USAC_MAGSAC, 0.999, 1.0)
        previous = corners, descriptors
        times_ms.append(_now_ms() - start_ms)
    return times_ms


def _undisturbed_ms(laps: Sequence[Sequence[float]]) -> float:
    """Sum over the frames of the shortest lap; the first two frames, which start things up, apart."""
    return float(np.min(np.array(laps)[:, 2:], axis=0).sum())


def _now_ms() -> float:
    return time.perf_counter_ns() * 1e-6
