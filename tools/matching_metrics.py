"""How good the matches of a pair of frames are under the true motion, and what a method amounts to over many pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from frontends.base import Features, Matches
from vo.bench_statistics import bootstrap_interval
from vo.config import TwoViewConfig
from vo.geometry import essential_matrix, homogeneous, rotation_angle, undistort
from vo.relative_pose import estimate_relative_pose
from vo.types import Camera, FloatArray, RelativePose

TRUE_INLIER_PX = 1.5

_Statistic = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, slots=True)
class PairQuality:
    """One pair of frames, matched by one method.

    num_inliers          that agree with the estimated pose; 0 where the pose was rejected.
    num_true_inliers     that agree with the true motion, within 1.5 px of both epipolar lines.
    rotation_error_deg, direction_error_deg   of the estimated pose; None where it was rejected.
    kept_share           of the points that were still in play when the matcher stopped.
    match_ms             one call, nothing known of either frame before.
    """

    num_matches: int
    num_inliers: int
    num_true_inliers: int
    rotation_error_deg: float | None
    direction_error_deg: float | None
    stop_layer: int
    kept_share: float
    match_ms: float

    @property
    def is_posed(self) -> bool:
        return self.rotation_error_deg is not None


@dataclass(frozen=True, slots=True)
class MethodQuality:
    """A method at one gap between frames: counts are means per pair; inliers and errors are over the posed pairs."""

    extractor: str
    matcher: str
    gap: int
    num_pairs: int
    num_rejected: int
    matches: float
    inliers: float
    true_inliers: float
    precision: float
    rotation_median_deg: float | None
    rotation_mean_deg: float | None
    direction_median_deg: float | None
    direction_mean_deg: float | None
    stop_layer: float
    kept_share: float
    match_median_ms: float


@dataclass(frozen=True, slots=True)
class Change:
    """A figure with the 90 % interval of its bootstrap over the pairs."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class AdaptiveCost:
    """What stopping early and dropping points cost against all layers with all points, over pairs posed by both.

    inlier_loss_percent, true_inlier_loss_percent   of all inliers; negative: there are more.
    rotation_change_deg, direction_change_deg       mean error with less mean error without.
    """

    extractor: str
    gap: int
    num_pairs: int
    inlier_loss_percent: Change
    true_inlier_loss_percent: Change
    rotation_change_deg: Change
    direction_change_deg: Change


def pair_quality(
    features0: Features,
    features1: Features,
    matches: Matches,
    match_ms: float,
    T_true: FloatArray,
    camera: Camera,
    two_view: TwoViewConfig,
) -> PairQuality:
    """Measures the matches of two frames; T_true is camera 1 in the frame of camera 0, (4, 4)."""
    rays0 = undistort(features0.valid_keypoints()[matches.indices[:, 0]], camera)
    rays1 = undistort(features1.valid_keypoints()[matches.indices[:, 1]], camera)
    distances_px = line_distances(essential_matrix(T_true), rays0, rays1) * camera.focal_px
    pose = estimate_relative_pose(rays0, rays1, camera.focal_px, two_view)
    num_inliers, rotation_deg, direction_deg = 0, None, None
    if isinstance(pose, RelativePose):
        num_inliers = int(pose.inliers.sum())
        rotation_deg, direction_deg = pose_errors_deg(pose.T_camera0_camera1, T_true)
    num_points = features0.num_valid + features1.num_valid
    return PairQuality(
        num_matches=len(matches),
        num_inliers=num_inliers,
        num_true_inliers=int((distances_px < TRUE_INLIER_PX).sum()),
        rotation_error_deg=rotation_deg,
        direction_error_deg=direction_deg,
        stop_layer=matches.stop_layer,
        kept_share=(matches.num_kept0 + matches.num_kept1) / num_points if num_points else 0.0,
        match_ms=match_ms,
    )


def line_distances(E: FloatArray, rays0: FloatArray, rays1: FloatArray) -> FloatArray:
    """The larger of a match's two distances (N,) to the epipolar line of the other point, on the plane z = 1."""
    x0, x1 = homogeneous(rays0), homogeneous(rays1)
    lines0, lines1 = x1 @ E.T, x0 @ E
    residual = np.abs(np.einsum("ni,ni->n", x0, lines0))
    shorter = np.minimum(np.linalg.norm(lines0[:, :2], axis=1), np.linalg.norm(lines1[:, :2], axis=1))
    distances: FloatArray = residual / np.maximum(shorter, 1e-12)
    return distances


def pose_errors_deg(T_estimated: FloatArray, T_true: FloatArray) -> tuple[float, float]:
    """Angle of the rotation between two poses, and between their translations, deg."""
    rotation_deg = np.rad2deg(rotation_angle(T_estimated[:3, :3].T @ T_true[:3, :3]))
    t0, t1 = T_estimated[:3, 3], T_true[:3, 3]
    direction_deg = np.rad2deg(np.arctan2(np.linalg.norm(np.cross(t0, t1)), t0 @ t1))
    return float(rotation_deg), float(direction_deg)


def summarise(extractor: str, matcher: str, gap: int, pairs: Sequence[PairQuality]) -> MethodQuality:
    """Means and medians over the pairs, of which there is at least one."""
    posed = [pair for pair in pairs if pair.is_posed]
    rotations, directions = _errors(posed)
    num_matches = sum(pair.num_matches for pair in pairs)
    return MethodQuality(
        extractor=extractor,
        matcher=matcher,
        gap=gap,
        num_pairs=len(pairs),
        num_rejected=len(pairs) - len(posed),
        matches=num_matches / len(pairs),
        inliers=sum(pair.num_inliers for pair in posed) / max(len(posed), 1),
        true_inliers=float(np.mean([pair.num_true_inliers for pair in pairs])),
        precision=sum(pair.num_true_inliers for pair in pairs) / max(num_matches, 1),
        rotation_median_deg=float(np.median(rotations)) if posed else None,
        rotation_mean_deg=float(np.mean(rotations)) if posed else None,
        direction_median_deg=float(np.median(directions)) if posed else None,
        direction_mean_deg=float(np.mean(directions)) if posed else None,
        stop_layer=float(np.mean([pair.stop_layer for pair in pairs])),
        kept_share=float(np.mean([pair.kept_share for pair in pairs])),
        match_median_ms=float(np.median([pair.match_ms for pair in pairs])),
    )


def adaptive_cost(
    extractor: str, gap: int, full: Sequence[PairQuality], adaptive: Sequence[PairQuality]
) -> AdaptiveCost | None:
    """Compares the same pairs, matched in full and adaptively; None where no pair was posed by both."""
    both = [(f, a) for f, a in zip(full, adaptive, strict=True) if f.is_posed and a.is_posed]
    if not both:
        return None
    inliers = np.array([(f.num_inliers, a.num_inliers) for f, a in both], np.float64)
    true_inliers = np.array([(f.num_true_inliers, a.num_true_inliers) for f, a in both], np.float64)
    rotations, directions = (
        np.stack(pair, axis=1)
        for pair in zip(_errors([f for f, _ in both]), _errors([a for _, a in both]), strict=True)
    )
    return AdaptiveCost(
        extractor=extractor,
        gap=gap,
        num_pairs=len(both),
        inlier_loss_percent=_change(inliers, _loss_percent),
        true_inlier_loss_percent=_change(true_inliers, _loss_percent),
        rotation_change_deg=_change(rotations, _mean_change),
        direction_change_deg=_change(directions, _mean_change),
    )


def _change(values: FloatArray, statistic: _Statistic) -> Change:
    return Change(float(statistic(values[None])[0]), *bootstrap_interval(values, statistic))


def _loss_percent(pairs: FloatArray) -> FloatArray:
    """(R, N, 2) counts before and after -> (R,) share that is lost of the sum, percent."""
    before, after = np.moveaxis(pairs.sum(axis=1), -1, 0)
    loss: FloatArray = 100 * (1 - after / np.maximum(before, 1))
    return loss


def _mean_change(pairs: FloatArray) -> FloatArray:
    """(R, N, 2) values before and after -> (R,) mean of after less before."""
    change: FloatArray = (pairs[..., 1] - pairs[..., 0]).mean(axis=1)
    return change


def _errors(posed: Sequence[PairQuality]) -> tuple[FloatArray, FloatArray]:
    rotations = np.array([pair.rotation_error_deg for pair in posed], np.float64)
    return rotations, np.array([pair.direction_error_deg for pair in posed], np.float64)
