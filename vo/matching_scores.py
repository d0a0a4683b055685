"""How good matches are under a known homography or a known pose, as the benchmarks of matching define it.

precision        of homography pairs: share of the matches that lie within 3 px of where the homography puts them; of
                 posed pairs: share with a squared symmetric epipolar distance, on the plane z = 1, below a threshold
                 (5e-4 for ScanNet, 1e-4 for MegaDepth and YFCC: Sarlin et al., SuperGlue, section 5).
recall           homography pairs only: share of the true correspondences that are matched. Keypoints correspond that
                 are each other's nearest after mapping, within 3 px.
matching score   correct matches over the keypoints of image 0.
MMA@t            mean over the pairs of the share of matches within t px, t = 1 ... 10 (Dusmanu et al., D2-Net, CVPR
                 2019, section 5.1).
homography AUC   area under the curve of the mean error of the four corners, of the homography that robust estimation
                 finds, up to 1, 3, 5 and 10 px.
pose AUC         the same of the pose error up to 5, 10 and 20 deg: the larger of the angle of rotation and that between
                 the translations, whose sign does not count (SuperGlue, section 5).
A pair without an estimate has an infinite error; one without a match a precision and an MMA of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from vo.config import TwoViewConfig
from vo.geometry import essential_matrix, homogeneous, rotation_angle
from vo.matching_pairs import HomographyPair, PosedPair
from vo.relative_pose import estimate_relative_pose
from vo.types import FloatArray, RelativePose

CORRECT_PX = 3.0
MMA_PX = tuple(range(1, 11))
CORNER_AUC_PX = (1.0, 3.0, 5.0, 10.0)
POSE_AUC_DEG = (5.0, 10.0, 20.0)
_HOMOGRAPHY_RANSAC_PX = 3.0


@dataclass(frozen=True, slots=True)
class PairScore:
    """One pair. recall, mma and corner errors are of homography pairs; the module's docstring defines all.

    error   of the corners in px, or of the pose in deg; infinite where nothing was estimated.
    """

    name: str
    group: str
    num_keypoints: tuple[int, int]
    num_matches: int
    precision: float
    matching_score: float
    error: float
    recall: float | None = None
    mma: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupScore:
    """Means over the pairs of a group, and the areas under the curves of their errors, by threshold."""

    group: str
    num_pairs: int
    num_failed: int
    mean_keypoints: float
    mean_matches: float
    precision: float
    recall: float | None
    matching_score: float
    mma: tuple[float, ...]
    auc: tuple[tuple[float, float], ...]


def score_homography(
    pair: HomographyPair,
    keypoints0: FloatArray,
    keypoints1: FloatArray,
    indices: NDArray[np.int64],
    size0: tuple[int, int],
) -> PairScore:
    """Scores matches `indices` (M, 2) of keypoints (N0, 2) and (N1, 2) px; `size0` is (width, height) of image 0."""
    points0, points1 = keypoints0[indices[:, 0]], keypoints1[indices[:, 1]]
    errors_px = np.linalg.norm(map_points(pair.H_1_0, points0) - points1, axis=1)
    num_correct = int((errors_px <= CORRECT_PX).sum())
    truth = true_correspondences(pair.H_1_0, keypoints0, keypoints1)
    found = set(map(tuple, indices.tolist()))
    num_found = sum(tuple(row) in found for row in truth.tolist())
    return PairScore(
        name=pair.name,
        group=pair.group,
        num_keypoints=(len(keypoints0), len(keypoints1)),
        num_matches=len(indices),
        precision=num_correct / len(indices) if len(indices) else 0.0,
        matching_score=num_correct / len(keypoints0) if len(keypoints0) else 0.0,
        error=corner_error_px(pair.H_1_0, points0, points1, size0),
        recall=num_found / len(truth) if len(truth) else 0.0,
        mma=tuple(float((errors_px <= limit).mean()) if len(indices) else 0.0 for limit in MMA_PX),
    )


def score_posed(
    pair: PosedPair,
    keypoints0: FloatArray,
    keypoints1: FloatArray,
    indices: NDArray[np.int64],
    two_view: TwoViewConfig,
    epipolar_threshold: float,
) -> PairScore:
    """Scores matches `indices` (M, 2) of keypoints px; the pose is estimated as the odometry does."""
    rays0, rays1 = rays_of(keypoints0[indices[:, 0]], pair.K0), rays_of(keypoints1[indices[:, 1]], pair.K1)
    E = essential_matrix(pair.T_camera0_camera1)
    num_correct = int((symmetric_epipolar_distances(E, rays0, rays1) < epipolar_threshold).sum())
    focal_px = float(np.mean([K[axis, axis] for K in (pair.K0, pair.K1) for axis in (0, 1)]))
    pose = estimate_relative_pose(rays0, rays1, focal_px, two_view)
    error_deg = float("inf")
    if isinstance(pose, RelativePose):
        error_deg = pose_error_deg(pose.T_camera0_camera1, pair.T_camera0_camera1)
    return PairScore(
        name=pair.name,
        group=pair.group,
        num_keypoints=(len(keypoints0), len(keypoints1)),
        num_matches=len(indices),
        precision=num_correct / len(indices) if len(indices) else 0.0,
        matching_score=num_correct / len(keypoints0) if len(keypoints0) else 0.0,
        error=error_deg,
    )


def map_points(H: FloatArray, points: FloatArray) -> FloatArray:
    """(N, 2) px through a homography; what it maps to infinity is infinitely far from everything."""
    mapped = homogeneous(np.asarray(points, np.float64)) @ H.T
    depth = mapped[:, 2:]
    result: FloatArray = np.where(np.abs(depth) > 1e-12, mapped[:, :2] / np.where(depth == 0, 1.0, depth), np.inf)
    return result


def true_correspondences(H: FloatArray, keypoints0: FloatArray, keypoints1: FloatArray) -> NDArray[np.int64]:
    """(C, 2): keypoints that are each other's nearest after mapping image 0 into image 1, within 3 px."""
    if len(keypoints0) == 0 or len(keypoints1) == 0:
        return np.zeros((0, 2), np.int64)
    mapped = map_points(H, keypoints0)
    is_finite = np.isfinite(mapped).all(axis=1)
    rows = np.flatnonzero(is_finite)
    if len(rows) == 0:
        return np.zeros((0, 2), np.int64)
    distances_px, nearest1 = cKDTree(keypoints1).query(mapped[rows])
    _, nearest0 = cKDTree(mapped[rows]).query(keypoints1)
    is_mutual = (nearest0[nearest1] == np.arange(len(rows))) & (distances_px <= CORRECT_PX)
    return np.stack([rows[is_mutual], nearest1[is_mutual]], axis=1).astype(np.int64)


def corner_error_px(H_true: FloatArray, points0: FloatArray, points1: FloatArray, size0: tuple[int, int]) -> float:
    """Mean distance of the four corners of image 0 under the homography found from matches; infinite without one."""
    if len(points0) < 4:
        return float("inf")
    H, _ = cv2.findHomography(
        np.ascontiguousarray(points0, np.float64),
        np.ascontiguousarray(points1, np.float64),
        cv2.USAC_MAGSAC,
        _HOMOGRAPHY_RANSAC_PX,
        maxIters=10_000,
        confidence=0.9999,
    )
    if H is None or not np.isfinite(H).all():
        return float("inf")
    width, height = size0
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]], np.float64)
    found, expected = map_points(np.asarray(H, np.float64), corners), map_points(H_true, corners)
    error = float(np.linalg.norm(found - expected, axis=1).mean())
    return error if np.isfinite(error) else float("inf")


def symmetric_epipolar_distances(E: FloatArray, rays0: FloatArray, rays1: FloatArray) -> FloatArray:
    """Squared distances (N,) of both rays to their epipolar lines, summed, on the plane z = 1; ray0^T E ray1 = 0."""
    x0, x1 = homogeneous(rays0), homogeneous(rays1)
    lines0, lines1 = x1 @ E.T, x0 @ E
    residual = np.einsum("ni,ni->n", x0, lines0)
    squares = [np.maximum((lines[:, :2] ** 2).sum(axis=1), 1e-24) for lines in (lines0, lines1)]
    distances: FloatArray = residual**2 * (1 / squares[0] + 1 / squares[1])
    return distances


def pose_error_deg(T_estimated: FloatArray, T_true: FloatArray) -> float:
    """The larger of the error of the rotation and that of the translation's axis, deg."""
    rotation_deg = np.rad2deg(rotation_angle(T_estimated[:3, :3].T @ T_true[:3, :3]))
    t0, t1 = T_estimated[:3, 3], T_true[:3, 3]
    angle_deg = float(np.rad2deg(np.arctan2(np.linalg.norm(np.cross(t0, t1)), t0 @ t1)))
    return max(float(rotation_deg), min(angle_deg, 180.0 - angle_deg))


def rays_of(points: FloatArray, K: FloatArray) -> FloatArray:
    """Rays (N, 2) of pixels (N, 2) of a pinhole camera, skew included."""
    directions = np.asarray(np.linalg.solve(K, homogeneous(np.asarray(points, np.float64)).T).T, np.float64)
    rays: FloatArray = directions[:, :2] / directions[:, 2:]
    return rays


def area_under_curve(errors: Sequence[float], threshold: float) -> float:
    """Area under the share of pairs with at most an error, from 0 to the threshold, divided by the threshold.

    The share is joined by straight lines at the errors, as the published figures are.
    """
    if not len(errors):
        return 0.0
    ordered = np.sort(np.asarray(errors, np.float64))
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    ordered, shares = np.concatenate([[0.0], ordered]), np.concatenate([[0.0], shares])
    last = int(np.searchsorted(ordered, threshold))
    x = np.concatenate([ordered[:last], [threshold]])
    y = np.concatenate([shares[:last], [shares[last - 1]]])
    return float(np.trapezoid(y, x) / threshold)


def summarise(group: str, scores: Sequence[PairScore], thresholds: Sequence[float]) -> GroupScore:
    """Means and areas over pairs of one kind, of which there is at least one."""
    if not scores:
        raise ValueError("scores: expected at least one pair")
    errors = [score.error for score in scores]
    recalls = [score.recall for score in scores if score.recall is not None]
    return GroupScore(
        group=group,
        num_pairs=len(scores),
        num_failed=sum(not np.isfinite(error) for error in errors),
        mean_keypoints=float(np.mean([score.num_keypoints for score in scores])),
        mean_matches=float(np.mean([score.num_matches for score in scores])),
        precision=float(np.mean([score.precision for score in scores])),
        recall=float(np.mean(recalls)) if recalls else None,
        matching_score=float(np.mean([score.matching_score for score in scores])),
        mma=tuple(np.mean([score.mma for score in scores], axis=0).tolist()) if scores[0].mma else (),
        auc=tuple((threshold, area_under_curve(errors, threshold)) for threshold in thresholds),
    )
