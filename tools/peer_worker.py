"""One method in a process of its own, for tools/compare_peers.py: a lap over the frames for every line it reads.

    python tools/peer_worker.py --method NAME --source SPEC --frames N ...

Prints one line of JSON when it is ready, or with `not_here` and ends, and then one for every line: `try` warms up and
says what a frame takes, `lap N` measures the first N frames.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from matching_metrics import TRUE_INLIER_PX, line_distances, pose_errors_deg
from peer_methods import METHODS, NotHere, Options

from frontends.base import Extractor, Features, Matcher, Matches
from vo.bench_statistics import time_call
from vo.config import Config
from vo.evaluation import compare, mutual_nearest
from vo.geometry import essential_matrix, invert_pose, undistort
from vo.odometry import Odometry
from vo.odometry_step import OdometryStep
from vo.relative_pose import estimate_relative_pose
from vo.sources import Source, open_source
from vo.trajectory import Trajectory, read_trajectory
from vo.types import FloatArray, Frame, RelativePose, SourceError, TrackingStatus, VoError

CPU = torch.device("cpu")
# Neighbouring frames of a slow camera have no parallax to speak of.
TWO_VIEW_GAP = 3
TRIED_FRAMES = 8
_MAX_DIFFERENCE_NS = 10_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    method = next(method for method in METHODS if method.name == options.method)
    imported_bytes = resident_bytes("VmRSS")
    try:
        source = open_source(options.source)
        frames = list(islice(source.frames(), options.frames))
        truth = read_truth(source, frames)
        weights = tuple(pair.partition("=")[::2] for pair in options.weights)
        settings = Options(options.keypoints, options.opencv_aliked, options.opencv_lightglue, weights)
        extractor, matcher = method.create(settings)
    except NotHere as reason:
        say({"not_here": str(reason)})
        return 0
    except VoError as error:
        say({"error": str(error)})
        return 2
    width, height = source.camera.width, source.camera.height
    say({"ready": True, "width": width, "height": height, "num_frames": len(frames)})
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        if command == "try":
            times_ms = run_frames(source, frames[:TRIED_FRAMES], truth, extractor, matcher)[0]
            # The first calls of a network take much longer, and there is only one first.
            typical_ms = [float(np.median(times_ms[stage])) for stage in ("frame", "match", "two_view")]
            say({"frame_s": sum(typical_ms) * 1e-3})
        else:
            say(lap(source, frames[: int(count)], truth, extractor, matcher) | memory(imported_bytes))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One method in a process of its own, for compare_peers.py.")
    parser.add_argument("--method", required=True, choices=[method.name for method in METHODS])
    parser.add_argument("--source", required=True)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--keypoints", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--opencv-aliked", default="")
    parser.add_argument("--weights", action="append", default=[])
    parser.add_argument("--opencv-lightglue", default="")
    return parser


def say(tree: dict[str, object]) -> None:
    print(json.dumps(tree, allow_nan=False), flush=True)


def read_truth(source: Source, frames: Sequence[Frame]) -> Trajectory:
    """The true poses. SourceError where there are none, or too few frames."""
    if source.ground_truth is None or len(frames) < 2 * TWO_VIEW_GAP:
        raise SourceError(f"{source.name}: expected ground truth and at least 6 frames; got {len(frames)} frames")
    return read_trajectory(source.ground_truth)


def lap(
    source: Source, frames: Sequence[Frame], truth: Trajectory, extractor: Extractor, matcher: Matcher
) -> dict[str, object]:
    """Two views of frames three apart and the full odometry, on the same features; times in ms of every frame."""
    times_ms, views, steps = run_frames(source, frames, truth, extractor, matcher)
    return {"times_ms": times_ms, "two_view": views.figures(), "odometry": odometry_figures(frames, steps, truth)}


def run_frames(
    source: Source, frames: Sequence[Frame], truth: Trajectory, extractor: Extractor, matcher: Matcher
) -> tuple[dict[str, list[float]], TwoViews, list[OdometryStep]]:
    """Everything that is measured of the frames: times in ms by stage, the two views, the steps of the odometry."""
    times_ms: dict[str, list[float]] = {"extract": [], "match": [], "two_view": [], "track": [], "frame": []}
    views = TwoViews(source, frames, truth)
    clock = _MatchClock(matcher)
    odometry = Odometry(source.camera, Config().odometry, Config().two_view, clock.match)
    steps: list[OdometryStep] = []
    earlier: deque[Features] = deque(maxlen=TWO_VIEW_GAP)
    with closing(odometry):
        for row, frame in enumerate(frames):
            found: list[Features] = []
            extract_ms = time_call(lambda f=frame, out=found: out.append(extractor.extract(f.image)), CPU)
            features = found[0]
            times_ms["extract"].append(extract_ms)
            if len(earlier) == TWO_VIEW_GAP:
                match_ms, two_view_ms = views.measure(row, earlier[0], features, matcher)
                times_ms["match"].append(match_ms)
                times_ms["two_view"].append(two_view_ms)
            clock.spent_ms = 0.0
            # The odometry matches for itself: fresh objects, so that a matcher finds nothing that it kept.
            again = replace(features)
            step_ms = time_call(lambda f=frame, a=again: steps.append(odometry.step(f, a)), CPU)
            times_ms["track"].append(step_ms - clock.spent_ms)
            times_ms["frame"].append(extract_ms + step_ms)
            earlier.append(features)
    return times_ms, views, steps


class _MatchClock:
    """A matcher that counts the time it takes."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self.spent_ms = 0.0

    def match(self, features0: Features, features1: Features) -> Matches:
        start_ns = time.perf_counter_ns()
        matches = self._matcher.match(features0, features1)
        self.spent_ms += (time.perf_counter_ns() - start_ns) * 1e-6
        return matches


class TwoViews:
    """Relative poses of frames that lie three apart against the truth."""

    def __init__(self, source: Source, frames: Sequence[Frame], truth: Trajectory) -> None:
        self._camera, self._settings = source.camera, Config().two_view
        times_ns = np.array([frame.timestamp_ns for frame in frames], np.int64)
        rows, truth_rows = mutual_nearest(times_ns, truth.timestamps_ns, _MAX_DIFFERENCE_NS)
        self._true: dict[int, FloatArray] = dict(zip(rows.tolist(), truth.T_world_camera[truth_rows], strict=True))
        self._num_matches: list[int] = []
        self._num_true: list[int] = []
        self._errors_deg: list[tuple[float, float]] = []
        self._num_rejected = 0

    def measure(self, row: int, features0: Features, features1: Features, matcher: Matcher) -> tuple[float, float]:
        """Times of matching and of the relative pose, ms."""
        made: list[Matches] = []
        match_ms = time_call(lambda: made.append(matcher.match(features0, features1)), CPU)
        indices, camera = made[0].indices, self._camera
        rays0 = undistort(features0.valid_keypoints()[indices[:, 0]], camera)
        rays1 = undistort(features1.valid_keypoints()[indices[:, 1]], camera)
        posed: list[object] = []
        two_view_ms = time_call(
            lambda: posed.append(estimate_relative_pose(rays0, rays1, camera.focal_px, self._settings)), CPU
        )
        self._num_matches.append(len(indices))
        if row in self._true and row - TWO_VIEW_GAP in self._true:
            T = invert_pose(self._true[row - TWO_VIEW_GAP]) @ self._true[row]
            distances_px = line_distances(essential_matrix(T), rays0, rays1) * camera.focal_px
            self._num_true.append(int((distances_px < TRUE_INLIER_PX).sum()))
            if isinstance(posed[0], RelativePose):
                self._errors_deg.append(pose_errors_deg(posed[0].T_camera0_camera1, T))
        self._num_rejected += not isinstance(posed[0], RelativePose)
        return match_ms, two_view_ms

    def figures(self) -> dict[str, float | None]:
        errors = np.median(np.array(self._errors_deg), axis=0).tolist() if self._errors_deg else [None, None]
        total = sum(self._num_matches)
        return {
            "num_pairs": len(self._num_matches),
            "num_rejected": self._num_rejected,
            "matches": total / max(1, len(self._num_matches)),
            "precision": sum(self._num_true) / total if total else None,
            "rotation_median_deg": errors[0],
            "direction_median_deg": errors[1],
        }


def odometry_figures(
    frames: Sequence[Frame], steps: Sequence[OdometryStep], truth: Trajectory
) -> dict[str, float | None]:
    """Accuracy and losses; no accuracy where there is no path to compare."""
    posed = [(s.pose.timestamp_ns, s.pose.T_world_camera) for s in steps if s.pose.T_world_camera is not None]
    figures: dict[str, float | None] = {
        "coverage": len(posed) / len(frames),
        "lost_frames": sum(step.pose.status is TrackingStatus.LOST for step in steps),
        "ate_rmse_m": None,
        "rpe_rot_deg": None,
    }
    if len(posed) < 3:
        return figures
    times_ns, matrices = zip(*posed, strict=True)
    evaluation = compare(Trajectory(np.array(times_ns, np.int64), np.array(matrices)), truth).evaluation
    return figures | {"ate_rmse_m": evaluation.ate_rmse_m, "rpe_rot_deg": evaluation.rpe_rot_deg}


def memory(imported_bytes: int | None) -> dict[str, object]:
    """The largest resident set so far, and what the libraries alone took."""
    return {"peak_bytes": resident_bytes("VmHWM"), "imported_bytes": imported_bytes}


def resident_bytes(key: str) -> int | None:
    """A line of Linux's /proc/self/status in bytes; None where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


if __name__ == "__main__":
    sys.exit(main())
