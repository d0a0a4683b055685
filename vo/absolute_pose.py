"""The pose of a camera against landmarks: P3P RANSAC from scratch, robust refinement from a guess.

Pure float64 functions like those of `vo.geometry`, whose conventions hold here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vo.geometry import (
    BoolArray,
    exp_se3,
    exp_so3,
    invert_pose,
    make_pose,
    orthonormalized,
    projection_jacobians,
    reproject,
    solve_symmetric,
)
from vo.types import FloatArray, Rejection


@dataclass(frozen=True, slots=True, eq=False)
class AbsolutePose:
    """A camera posed against landmarks.

    T_world_camera (4, 4); covariance (6, 6) of its right perturbation; inliers (N,) bool; sigma_px: the residuals'
    robust standard deviation along one axis.
    """

    T_world_camera: FloatArray
    covariance: FloatArray
    inliers: BoolArray
    sigma_px: float


def refine_absolute_pose(
    T_world_camera: FloatArray,
    points_world: FloatArray,
    rays: FloatArray,
    focal_px: float,
    threshold_px: float,
    num_iterations: int = 15,
) -> AbsolutePose:
    """Minimises the reprojection error over the pose alone, with a Cauchy kernel of width `threshold_px` / 2.

    Levenberg-Marquardt from the given pose; inliers lie before the camera and within `threshold_px`.
    """
    kernel_px = threshold_px / 2
    T, damping = T_world_camera, 1e-4
    residual, depth = _reprojection_residual(T, points_world, rays, focal_px)
    cost = _cauchy_cost(residual, depth, kernel_px)
    H, gradient = _pose_system(T, points_world, residual, depth, focal_px, kernel_px)
    for _ in range(num_iterations):
        step = -solve_symmetric(H + damping * np.diag(np.diag(H)), gradient)
        candidate = T @ exp_se3(step)
        residual, depth = _reprojection_residual(candidate, points_world, rays, focal_px)
        candidate_cost = _cauchy_cost(residual, depth, kernel_px)
        if candidate_cost < cost:
            converged = cost - candidate_cost < 1e-7 * cost
            T, cost, damping = candidate, candidate_cost, max(damping / 10, 1e-9)
            if converged:
                break
            H, gradient = _pose_system(T, points_world, residual, depth, focal_px, kernel_px)
        else:
            damping *= 10
            if damping > 1e6:
                break
    return _as_absolute_pose(orthonormalized(T), points_world, rays, focal_px, threshold_px)


def _reprojection_residual(
    T: FloatArray, points_world: FloatArray, rays: FloatArray, focal_px: float
) -> tuple[FloatArray, FloatArray]:
    """(N, 2) px and depths (N,)."""
    projected, depth = reproject(T, points_world)
    return (projected - rays) * focal_px, depth


def _cauchy_cost(residual: FloatArray, depth: FloatArray, kernel_px: float) -> float:
    squared = np.where(depth > 0, (residual**2).sum(1), 1e6)
    return float(np.log1p(squared / kernel_px**2).sum())


def _pose_system(
    T: FloatArray, points_world: FloatArray, residual: FloatArray, depth: FloatArray, focal_px: float, kernel_px: float
) -> tuple[FloatArray, FloatArray]:
    """Gauss-Newton Hessian (6, 6) and gradient (6,) of the Cauchy-weighted reprojection error in px."""
    weights = 1.0 / (1.0 + (residual**2).sum(1) / kernel_px**2) * (depth > 0)
    jacobian = projection_jacobians(T, points_world)[1] * focal_px
    weighted = (jacobian * weights[:, None, None]).reshape(-1, 6)
    return weighted.T @ jacobian.reshape(-1, 6), weighted.T @ residual.ravel()


def _as_absolute_pose(
    T: FloatArray, points_world: FloatArray, rays: FloatArray, focal_px: float, threshold_px: float
) -> AbsolutePose:
    projected, depth = reproject(T, points_world)
    error = np.linalg.norm((projected - rays) * focal_px, axis=1)
    inliers = (error < threshold_px) & (depth > 0)
    if inliers.sum() < 3:
        return AbsolutePose(T, np.full((6, 6), np.inf), inliers, float("inf"))
    # The median of a Rayleigh distributed length is 1.177 sigma.
    sigma_px = max(float(np.median(error[inliers])) / 1.177, 1e-6)
    jacobian = projection_jacobians(T, points_world[inliers])[1].reshape(-1, 6) * focal_px
    information = np.asarray(jacobian.T @ jacobian, dtype=np.float64)
    covariance = np.asarray(np.linalg.pinv(information, hermitian=True), dtype=np.float64) * sigma_px**2
    return AbsolutePose(T, covariance, inliers, sigma_px)


def estimate_absolute_pose(
    points_world: FloatArray, rays: FloatArray, focal_px: float, threshold_px: float, min_inliers: int
) -> AbsolutePose | Rejection:
    """Camera pose from landmarks (N, 3) and their rays (N, 2) without a first guess: P3P RANSAC, then refinement."""
    if len(points_world) < max(min_inliers, 6):
        return Rejection.TOO_FEW_MATCHES
    # In units of their own spread: OpenCV takes points that lie close together, as a map's unit may have it, for one.
    center = np.median(points_world, axis=0)
    spread = max(float(np.median(np.abs(points_world - center))), 1e-300)
    found, rotation_vector, translation, _ = cv2.solvePnPRansac(
        np.ascontiguousarray((points_world - center) / spread),
        np.ascontiguousarray(rays),
        np.eye(3),
        None,
        iterationsCount=500,
        reprojectionError=threshold_px / focal_px,
        confidence=0.999,
        flags=cv2.SOLVEPNP_AP3P,
    )
    if not found:
        return Rejection.TOO_FEW_INLIERS
    rotation_vector, translation = (np.asarray(v, dtype=np.float64).ravel() for v in (rotation_vector, translation))
    R = exp_so3(rotation_vector)
    pose = refine_absolute_pose(
        invert_pose(make_pose(R, spread * translation - R @ center)), points_world, rays, focal_px, threshold_px
    )
    return pose if pose.inliers.sum() >= min_inliers else Rejection.TOO_FEW_INLIERS
