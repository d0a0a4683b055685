"""How a camera moved between two frames, from their matches alone: made ahead by a pool of threads, or when asked for.

Pairs do not depend on one another, and OpenCV leaves the interpreter to others while it works: while one pair waits for
its turn, the next ones are posed. The same pair gives the same motion wherever it is made.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from frontends.base import Features, Matches
from vo.config import OdometryConfig, TwoViewConfig
from vo.geometry import (
    BoolArray,
    fit_rotation,
    homogeneous,
    invert_pose,
    make_pose,
    parallax,
    translation_votes,
    undistort,
)
from vo.relative_pose import estimate_relative_pose
from vo.stillness import is_still
from vo.types import Camera, FloatArray, Rejection, RelativePose

IntArray = NDArray[np.int64]

# Pairs that wait for their turn; more than there can be frames between the thread that begins them and the one that
# takes them.
_MAX_BEGUN = 16
_ROTATION_ONLY = (Rejection.LOW_PARALLAX, Rejection.PURE_ROTATION)
# Share of the matches that a rotation must explain, within three times the inlier distance, where nothing else does.
_MIN_TURNED = 0.7


class SeenFrame:
    """What was seen in a frame: its features, their keypoints (N, 2) px on the host, and the rays (N, 2) to them."""

    def __init__(self, features: Features, camera: Camera) -> None:
        self.features = features
        self.keypoints = features.valid_keypoints()
        self._camera = camera
        self._rays: FloatArray | None = None

    @property
    def rays(self) -> FloatArray:
        """Undistorted when they are first asked for, on whichever thread that is; two would find the same."""
        if self._rays is None:
            self._rays = undistort(self.keypoints, self._camera)
        return self._rays


@dataclass(frozen=True, slots=True, eq=False)
class PairMotion:
    """How the camera moved from frame 0 to frame 1.

    rows       (M, 2) features of both frames that agree with the motion.
    T_0_1      (4, 4) of camera 1 in camera 0, unit translation; none where there is a `rejection`.
    pose       with its covariance; None where there is a `rejection`.
    rejection  why there is no translation; the rotation may be known all the same.
    inverse1   (M,) inverse depths in frame 1, one over the length of the translation; empty without one.
    leverage1  (M,) how far a unit of inverse depth moves each point across its ray in frame 0, squared.
    has_rotation  whether T_0_1 has a rotation that explains the matches.
    is_still   the image has not moved at all.
    """

    rows: IntArray
    T_0_1: FloatArray
    pose: RelativePose | None
    rejection: Rejection | None
    inverse1: FloatArray
    leverage1: FloatArray
    has_rotation: bool = True
    is_still: bool = False

    @property
    def direction_sigma_rad(self) -> float:
        """How well the direction of the translation is known, across it where it is known least."""
        return (
            float("inf")
            if self.pose is None
            else math.sqrt(max(0.0, *np.linalg.eigvalsh(self.pose.covariance[:3, :3])))
        )

    def without_translation(self) -> PairMotion:
        """The rotation alone, where the translation is not to be believed."""
        return replace(self, pose=None, rejection=Rejection.LOW_PARALLAX)


class PairPoser:
    """Poses pairs of frames: a pure function of theirs, with what stays the same for all."""

    def __init__(self, camera: Camera, config: OdometryConfig, two_view: TwoViewConfig) -> None:
        self._camera = camera
        self._config = config
        self._two_view = two_view

    def motion(self, frame0: SeenFrame, frame1: SeenFrame, rows: IntArray) -> PairMotion:
        """The motion of frames whose features `rows` (M, 2) were matched."""
        rows0, rows1 = rows[:, 0], rows[:, 1]
        if len(rows) >= self._config.min_matches:
            before, now = frame0.keypoints[rows0], frame1.keypoints[rows1]
            if is_still(before, now, self._camera, self._config.stationary_px):
                return _without_translation(rows, np.eye(3), Rejection.LOW_PARALLAX, is_still=True)
        rays0, rays1 = frame0.rays[rows0], frame1.rays[rows1]
        relative = estimate_relative_pose(rays0, rays1, self._camera.focal_px, self._two_view)
        if isinstance(relative, RelativePose):
            return posed_motion(relative, rays0, rays1, rows)
        threshold = self._two_view.threshold_px / self._camera.focal_px
        R = fit_rotation(rays0, rays1, threshold)
        agrees = parallax(rays0, rays1, R) < 3 * threshold
        # A pair without a consistent translation may still have turned: neighbours of a slow camera have.
        is_turned = relative in _ROTATION_ONLY or (
            relative is Rejection.DEGENERATE and np.count_nonzero(agrees) >= _MIN_TURNED * len(rows)
        )
        return _without_translation(rows[agrees], R, relative, has_rotation=bool(is_turned))


def posed_motion(pose: RelativePose, rays0: FloatArray, rays1: FloatArray, rows: IntArray) -> PairMotion:
    """The motion of matched rays (M, 2) of which `pose` was estimated."""
    inliers: BoolArray = pose.inliers
    # Not from where rays come closest: that is too near on average, the more so the less parallax there is.
    T_1_0 = invert_pose(pose.T_camera0_camera1)
    inverse1, leverage1 = translation_votes(T_1_0, homogeneous(rays1[inliers]), rays0[inliers])
    return PairMotion(rows[inliers], pose.T_camera0_camera1, pose, None, inverse1, leverage1)


def _without_translation(
    rows: IntArray, R: FloatArray, rejection: Rejection, *, has_rotation: bool = True, is_still: bool = False
) -> PairMotion:
    nothing = np.zeros(0)
    return PairMotion(rows, make_pose(R, np.zeros(3)), None, rejection, nothing, nothing, has_rotation, is_still)


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A pair under way."""

    frame0: SeenFrame
    frame1: SeenFrame
    motion: Future[PairMotion]


class PairsAhead:
    """Pairs posed by `num_workers` threads before their turn comes; `close` ends them.

    `begin` is called by one thread in the order of the frames, `take` by another. What a worker raised is raised where
    its pair is taken, or passed over.
    """

    def __init__(self, poser: PairPoser, camera: Camera, num_workers: int) -> None:
        self._poser = poser
        self._camera = camera
        self._num_workers = num_workers
        self._workers: ThreadPoolExecutor | None = None
        self._last: SeenFrame | None = None
        self._begun: deque[_Begun] = deque()
        self._shelf = threading.Lock()
        self._is_closed = False

    def begin(self, features0: Features, features1: Features, matches: Matches) -> None:
        """Hands a pair to the next worker that is free."""
        if self._is_closed:
            return
        if self._workers is None:
            self._workers = ThreadPoolExecutor(self._num_workers, thread_name_prefix="pose")
        last = self._last
        frame0 = last if last is not None and last.features is features0 else self._seen(features0)
        frame1 = self._last = self._seen(features1)
        motion = self._workers.submit(self._poser.motion, frame0, frame1, matches.indices)
        with self._shelf:
            self._begun.append(_Begun(frame0, frame1, motion))
            passed_over = [self._begun.popleft() for _ in range(len(self._begun) - _MAX_BEGUN)]
        _pass_over(passed_over)

    def take(self, features0: Features | None, features1: Features) -> tuple[SeenFrame, PairMotion | None]:
        """The frame of features 1, and the motion to it from features 0 where that pair was begun; waits for it.

        Every older pair is passed over, and this one too where it is not from features 0.
        """
        passed_over, found = [], None
        with self._shelf:
            if any(begun.frame1.features is features1 for begun in self._begun):
                while found is None:
                    begun = self._begun.popleft()
                    if begun.frame1.features is features1:
                        found = begun
                    else:
                        passed_over.append(begun)
        _pass_over(passed_over)
        if found is None:
            return self._seen(features1), None
        if found.frame0.features is not features0:
            _pass_over([found])
            return found.frame1, None
        return found.frame1, found.motion.result()

    def close(self) -> None:
        """Ends the workers, which are at a pair for a few milliseconds at most; safe to call twice."""
        self._is_closed = True
        if self._workers is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)

    def _seen(self, features: Features) -> SeenFrame:
        return SeenFrame(features, self._camera)


def _pass_over(pairs: list[_Begun]) -> None:
    """Pairs that nobody will ask for; that one failed must not go unnoticed."""
    for begun in pairs:
        if not begun.motion.cancel():
            begun.motion.result()
