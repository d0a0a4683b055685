"""The first pose of a map or of a chain, from two views that may show nothing but a plane.

Pure float64 functions like those of `vo.geometry`, whose conventions hold here too.
"""

from __future__ import annotations

import cv2
import numpy as np

from vo.config import TwoViewConfig
from vo.geometry import homogeneous, invert_pose, make_pose, ray_depths, rotation_angle
from vo.relative_pose import estimate_relative_pose, refined_pose
from vo.types import FloatArray, Rejection, RelativePose


def estimate_first_pose(
    rays0: FloatArray, rays1: FloatArray, focal_px: float, config: TwoViewConfig
) -> RelativePose | Rejection:
    """As `estimate_relative_pose`, and safe where all points lie on one plane: two motions may explain those alike.

    Where a homography fits nearly all that the essential matrix fits, its motions (Faugeras and Lustman 1988, as OpenCV
    solves them) compete with that of the essential matrix; DEGENERATE where two that differ fit equally well.
    """
    essential = estimate_relative_pose(rays0, rays1, focal_px, config)
    if isinstance(essential, Rejection) and essential is not Rejection.DEGENERATE:
        return essential
    threshold = config.threshold_px / focal_px
    num_needed = config.min_inliers
    if isinstance(essential, RelativePose):
        num_needed = max(num_needed, int(0.85 * essential.inliers.sum()))
    planar = [refined_pose(T, rays0, rays1, threshold) for T in _planar_motions(rays0, rays1, threshold, num_needed)]
    if not planar:
        return essential
    found = [*planar, essential] if isinstance(essential, RelativePose) else planar
    fits = [int(pose.inliers.sum()) for pose in found]
    best = found[int(np.argmax(fits))]
    if best.inliers.sum() < config.min_inliers:
        return Rejection.DEGENERATE
    rivals = [pose for pose, fit in zip(found, fits, strict=True) if fit > 0.97 * max(fits)]
    if any(_differ(best.T_camera0_camera1, rival.T_camera0_camera1) for rival in rivals):
        return Rejection.DEGENERATE
    return best


def _planar_motions(rays0: FloatArray, rays1: FloatArray, threshold: float, num_needed: int) -> list[FloatArray]:
    """The motions (4, 4) that a plane seen by `num_needed` matches allows, with the points before both cameras."""
    # OpenCV's estimator is made for pixels: among rays a few wrong matches lead it astray.
    H, _ = cv2.findHomography(rays0 / threshold, rays1 / threshold, cv2.USAC_MAGSAC, 1.5, maxIters=1000)
    if H is None or not np.isfinite(H).all():
        return []
    unit = np.diag([threshold, threshold, 1.0])
    H = unit @ np.asarray(H, dtype=np.float64) @ np.diag([1 / threshold, 1 / threshold, 1.0])
    moved = homogeneous(rays0) @ H.T
    error = np.linalg.norm(moved[:, :2] / moved[:, 2:] - rays1, axis=1)
    fits = error < 1.5 * threshold
    if fits.sum() < num_needed:
        return []
    _, rotations, translations, _ = cv2.decomposeHomographyMat(H, np.eye(3))
    motions = []
    for R, t in zip(rotations, translations, strict=True):
        length = float(np.linalg.norm(t))
        if length < 1e-6:
            continue
        T = invert_pose(make_pose(np.asarray(R, np.float64), np.asarray(t, np.float64).ravel() / length))
        depth0, depth1 = ray_depths(T, rays0[fits], rays1[fits])
        if np.mean((depth0 > 0) & (depth1 > 0)) > 0.9:
            motions.append(T)
    return motions


def _differ(T0: FloatArray, T1: FloatArray) -> bool:
    """Whether two motions with unit translation are not the same: a degree of rotation, or ten of direction, apart."""
    turned = rotation_angle(T0[:3, :3].T @ T1[:3, :3])
    return bool(turned > np.deg2rad(1.0) or float(T0[:3, 3] @ T1[:3, 3]) < np.cos(np.deg2rad(10.0)))
