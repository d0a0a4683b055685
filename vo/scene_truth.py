"""The true path beside the estimated one while it grows: which true pose belongs to which, and how they align."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vo.geometry import invert_pose, make_pose
from vo.trajectory import Trajectory
from vo.types import FloatArray, PoseEstimate

MAX_TIME_DIFFERENCE_NS = 20_000_000
MIN_PAIRS = 8
MIN_SECOND_DIRECTION = 0.05
GROWTH = 1.05
MAX_PAIRS_FITTED = 2000


@dataclass(frozen=True, slots=True, eq=False)
class TruthAlignment:
    """Where the true path lies in the world of the estimate.

    T_world_truth  (4, 4) similarity: scale times rotation, and translation.
    kind           "first pose", "SE(3)" or "Sim(3)".
    rmse           of the positions after it, in the unit of the estimate.
    """

    T_world_truth: FloatArray
    kind: str
    scale: float
    num_pairs: int
    rmse: float

    @property
    def text(self) -> str:
        """For the screen, whose panel holds fifty-five letters in a line."""
        if self.kind == "first pose":
            return "truth: laid on the first pose, scale not known yet"
        if self.kind == "Sim(3)":
            return f"truth: Sim(3), RMSE {self.rmse:.2g} units, 1 m = {self.scale:.3g} units"
        return f"truth: {self.kind} of {self.num_pairs} poses, RMSE {self.rmse:.2g} m"


class TruthAligner:
    """Pairs poses with true ones as they come and aligns the truth anew when there are enough more of them."""

    def __init__(self, truth: Trajectory) -> None:
        self._truth = truth
        self.clear()

    def clear(self) -> None:
        """Begins again, with another run or segment."""
        self.alignment: TruthAlignment | None = None
        self._estimates: list[FloatArray] = []
        self._indices: list[int] = []
        self._scale_source = "relative"
        self._num_aligned = 0

    def add(self, pose: PoseEstimate) -> tuple[FloatArray, FloatArray] | None:
        """Takes one pose; the line (start, end) by which the true path grows, positions (3,) in the truth's world."""
        index = self._index_of(pose)
        if index is None or pose.T_world_camera is None or (self._indices and index <= self._indices[-1]):
            return None
        self._estimates.append(pose.T_world_camera)
        self._indices.append(index)
        self._scale_source = pose.scale_source
        if len(self._indices) == 1:
            return None
        first, last = self._truth.positions[self._indices[-2]], self._truth.positions[self._indices[-1]]
        return first, last

    def realign(self, *, is_final: bool = False) -> bool:
        """Whether the alignment is another than before: it follows when there are 5 % more poses, or at the end."""
        num_pairs = len(self._indices)
        if num_pairs == 0 or num_pairs == self._num_aligned:
            return False
        if (
            not is_final
            and self._num_aligned > 0
            and num_pairs < max(self._num_aligned + 1, GROWTH * self._num_aligned)
        ):
            return False
        self._num_aligned = num_pairs
        chosen = np.unique(np.linspace(0, num_pairs - 1, min(num_pairs, MAX_PAIRS_FITTED)).astype(np.int64))
        true_poses = self._truth.T_world_camera[np.array(self._indices)[chosen]]
        estimates = np.array([self._estimates[i] for i in chosen])
        self.alignment = align(
            estimates,
            true_poses,
            has_scale=self._scale_source == "relative",
            has_orientations=self._truth.is_of_camera,
        )
        return True

    def _index_of(self, pose: PoseEstimate) -> int | None:
        """Which true pose is that of the same frame."""
        times = self._truth.timestamps_ns
        key = pose.timestamp_ns if self._truth.has_times else pose.frame_index
        at = int(np.searchsorted(times, key))
        candidates = [i for i in (at - 1, at) if 0 <= i < len(times)]
        nearest = min(candidates, key=lambda i: abs(int(times[i]) - key))
        limit = MAX_TIME_DIFFERENCE_NS if self._truth.has_times else 0
        return nearest if abs(int(times[nearest]) - key) <= limit else None


def align(
    estimates: FloatArray, true_poses: FloatArray, *, has_scale: bool, has_orientations: bool = True
) -> TruthAlignment:
    """Aligns true poses (N, 4, 4) to estimated ones (N, 4, 4); `has_scale` fits the scale too.

    Where positions do not determine the rotation (a straight path), the orientations give it; with too few poses, or
    none that moves, the truth is laid on the first one as it is. Closed form: Umeyama 1991, eq. 34-43.
    """
    if len(estimates) < MIN_PAIRS or not np.any(np.ptp(estimates[:, :3, 3], axis=0) > 0):
        T = estimates[0] @ invert_pose(true_poses[0])
        return TruthAlignment(T, "first pose", 1.0, len(estimates), 0.0)
    x, y = true_poses[:, :3, 3], estimates[:, :3, 3]
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x_centred, y_centred = x - x_mean, y - y_mean
    U, singular, Vt = np.linalg.svd(y_centred.T @ x_centred / len(x))
    if singular[1] < MIN_SECOND_DIRECTION**2 * singular[0] and has_orientations:
        U, _, Vt = np.linalg.svd(np.einsum("nij,nkj->ik", estimates[:, :3, :3], true_poses[:, :3, :3]))
    R = U @ np.diag([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
    variance = float((x_centred**2).sum())
    product = float((y_centred * (x_centred @ R.T)).sum())
    scale = product / variance if has_scale and product > 0 and variance > 0 else 1.0
    T = make_pose(scale * R, y_mean - scale * R @ x_mean)
    residuals = y - (x @ T[:3, :3].T + T[:3, 3])
    rmse = float(np.sqrt((residuals**2).sum(axis=1).mean()))
    return TruthAlignment(T, "Sim(3)" if has_scale else "SE(3)", scale, len(estimates), rmse)
