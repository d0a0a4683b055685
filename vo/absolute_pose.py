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
    solve_symmetric,
)
from vo.kernels import kernels
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


class Landmarks:
    """Landmarks (N, 3) and their rays (N, 2), laid out for arithmetic on whole rows, with room for what it needs.

    A pose takes a dozen passes over a few hundred landmarks; made anew in every pass, small arrays would cost more than
    the arithmetic.
    """

    def __init__(self, points_world: FloatArray, rays: FloatArray, focal_px: float) -> None:
        if points_world.shape != (len(rays), 3) or rays.shape != (len(points_world), 2):
            raise ValueError(f"points_world, rays: expected (N, 3), (N, 2), got {points_world.shape}, {rays.shape}")
        self._points = np.ascontiguousarray(points_world.T, dtype=np.float64)
        self._rays = np.ascontiguousarray(rays.T, dtype=np.float64)
        self._focal_px = focal_px
        self._jacobian = np.zeros((6, 2, len(rays)))
        self._compiled = kernels()

    def refined(self, T: FloatArray, kernel_px: float, num_iterations: int) -> FloatArray:
        """`_descended`, compiled or not."""
        found = None
        if self._compiled is not None:
            found = self._compiled.landmarks_refine(
                T, self._points, self._rays, self._focal_px, kernel_px, num_iterations
            )
        return _descended(T, self, kernel_px, num_iterations) if found is None else found

    def seen_from(self, T_world_camera: FloatArray) -> SeenLandmarks:
        R, t = T_world_camera[:3, :3], T_world_camera[:3, 3]
        x_y_z = R.T @ (self._points - t[:, None])
        depth = x_y_z[2]
        is_before = depth > 0
        inverse_depth = 1.0 / np.where(np.abs(depth) < 1e-9, 1e-9, depth)
        projected = x_y_z[:2] * inverse_depth
        residual = (projected - self._rays) * self._focal_px
        squared = residual * residual
        return SeenLandmarks(projected, inverse_depth, is_before, residual, squared[0] + squared[1])

    def system(self, seen: SeenLandmarks, kernel_px: float) -> tuple[FloatArray, FloatArray]:
        """Gauss-Newton Hessian (6, 6) and gradient (6,) of the Cauchy-weighted reprojection error in px."""
        weights = seen.is_before / (1.0 + seen.squared / kernel_px**2)
        jacobian = self.jacobian(seen)
        weighted = (jacobian * weights).reshape(6, -1)
        return weighted @ jacobian.reshape(6, -1).T, weighted @ seen.residual.ravel()

    def jacobian(self, seen: SeenLandmarks) -> FloatArray:
        """(6, 2, N) derivatives of the residuals by the right perturbation of the pose, px; until the next call."""
        jacobian = self._jacobian
        (u, v), inverse_depth = seen.projected, seen.inverse_depth * self._focal_px
        fu, fv = u * self._focal_px, v * self._focal_px
        np.negative(inverse_depth, out=jacobian[0, 0])
        jacobian[1, 1] = jacobian[0, 0]
        np.multiply(u, inverse_depth, out=jacobian[2, 0])
        np.multiply(v, inverse_depth, out=jacobian[2, 1])
        np.multiply(fu, v, out=jacobian[3, 0])
        np.negative(jacobian[3, 0], out=jacobian[4, 1])
        np.subtract(-self._focal_px, fu * u, out=jacobian[4, 0])
        np.add(self._focal_px, fv * v, out=jacobian[3, 1])
        jacobian[5, 0] = fv
        np.negative(fu, out=jacobian[5, 1])
        return jacobian


@dataclass(frozen=True, slots=True, eq=False)
class SeenLandmarks:
    """Landmarks from one pose: projected (2, N) rays, inverse_depth (N,), whether before the camera (N,), the
    residual (2, N) px and its squared length (N,).
    """

    projected: FloatArray
    inverse_depth: FloatArray
    is_before: BoolArray
    residual: FloatArray
    squared: FloatArray

    def cauchy_cost(self, kernel_px: float) -> float:
        squared = np.where(self.is_before, self.squared, 1e6)
        return float(np.log1p(squared / kernel_px**2).sum())


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
    landmarks = Landmarks(points_world, rays, focal_px)
    T = landmarks.refined(T_world_camera, threshold_px / 2, num_iterations)
    return _as_absolute_pose(orthonormalized(T), landmarks, threshold_px)


def _descended(T: FloatArray, landmarks: Landmarks, kernel_px: float, num_iterations: int) -> FloatArray:
    """Levenberg-Marquardt from a pose (4, 4)."""
    damping = 1e-4
    seen = landmarks.seen_from(T)
    cost = seen.cauchy_cost(kernel_px)
    H, gradient = landmarks.system(seen, kernel_px)
    for _ in range(num_iterations):
        damped = H.copy()
        damped.ravel()[::7] *= 1.0 + damping
        candidate = T @ exp_se3(-solve_symmetric(damped, gradient))
        candidate_seen = landmarks.seen_from(candidate)
        candidate_cost = candidate_seen.cauchy_cost(kernel_px)
        if candidate_cost < cost:
            converged = cost - candidate_cost < 1e-7 * cost
            T, seen, cost, damping = candidate, candidate_seen, candidate_cost, max(damping / 10, 1e-9)
            if converged:
                break
            H, gradient = landmarks.system(seen, kernel_px)
        else:
            damping *= 10
            if damping > 1e6:
                break
    return T


def _as_absolute_pose(T: FloatArray, landmarks: Landmarks, threshold_px: float) -> AbsolutePose:
    seen = landmarks.seen_from(T)
    error_px = np.sqrt(seen.squared)
    inliers = (error_px < threshold_px) & seen.is_before
    num_inliers = int(np.count_nonzero(inliers))
    if num_inliers < 3:
        return AbsolutePose(T, np.full((6, 6), np.inf), inliers, float("inf"))
    # The median of a Rayleigh distributed length is 1.177 sigma.
    sigma_px = max(median(error_px[inliers]) / 1.177, 1e-6)
    jacobian = landmarks.jacobian(seen)
    information = (jacobian * inliers).reshape(6, -1) @ jacobian.reshape(6, -1).T
    return AbsolutePose(T, _inverse(information) * sigma_px**2, inliers, sigma_px)


def _inverse(information: FloatArray) -> FloatArray:
    """Moore-Penrose inverse of a symmetric matrix: directions of which nothing is known get no variance."""
    values, vectors = np.linalg.eigh(information)
    is_known = values > 1e-15 * values[-1]
    inverse: FloatArray = (vectors * np.where(is_known, 1.0 / np.where(is_known, values, 1.0), 0.0)) @ vectors.T
    return inverse


def median(values: FloatArray) -> float:
    """The median of (N,) values, N at least 1: NumPy's to the bit, in a fraction of its time for a few hundred."""
    middle = len(values) // 2
    if len(values) % 2:
        return float(np.partition(values, middle)[middle])
    ordered = np.partition(values, (middle - 1, middle))
    return float((ordered[middle - 1] + ordered[middle]) / 2)


def closest_pose(poses: list[FloatArray], points_world: FloatArray, rays: FloatArray) -> FloatArray:
    """The pose (4, 4) whose median reprojection error of landmarks (N, 3) to rays (N, 2) is least; N at least 1."""
    landmarks = Landmarks(points_world, rays, 1.0)

    def off(T_world_camera: FloatArray) -> float:
        seen = landmarks.seen_from(T_world_camera)
        return median(np.where(seen.is_before, seen.squared, np.inf))

    return min(poses, key=off)


def _ransac_settings(threshold: float) -> cv2.UsacParams:
    """Of OpenCV's newer RANSAC: where nothing fits, which a lost camera meets in every frame, it is four times as fast.

    No optimisation of its own on the way: what it finds is refined here with a robust kernel.
    """
    settings = cv2.UsacParams()
    settings.threshold, settings.confidence, settings.maxIterations = threshold, 0.999, 500
    settings.sampler, settings.score = cv2.SAMPLING_UNIFORM, cv2.SCORE_METHOD_MSAC
    settings.loMethod, settings.isParallel, settings.randomGeneratorState = cv2.LOCAL_OPTIM_NULL, False, 0
    return settings


def estimate_absolute_pose(
    points_world: FloatArray, rays: FloatArray, focal_px: float, threshold_px: float, min_inliers: int
) -> AbsolutePose | Rejection:
    """Camera pose from landmarks (N, 3) and their rays (N, 2) without a first guess: P3P RANSAC, then refinement."""
    if len(points_world) < max(min_inliers, 6):
        return Rejection.TOO_FEW_MATCHES
    # In units of their own spread: OpenCV takes points that lie close together, as a map's unit may have it, for one.
    center = np.median(points_world, axis=0)
    spread = max(float(np.median(np.abs(points_world - center))), 1e-300)
    found, _, rotation_vector, translation, _ = cv2.solvePnPRansac(
        np.ascontiguousarray((points_world - center) / spread),
        np.ascontiguousarray(rays),
        np.eye(3),
        None,
        params=_ransac_settings(threshold_px / focal_px),
    )
    if not found:
        return Rejection.TOO_FEW_INLIERS
    rotation_vector, translation = (np.asarray(v, dtype=np.float64).ravel() for v in (rotation_vector, translation))
    R = exp_so3(rotation_vector)
    pose = refine_absolute_pose(
        invert_pose(make_pose(R, spread * translation - R @ center)), points_world, rays, focal_px, threshold_px
    )
    return pose if pose.inliers.sum() >= min_inliers else Rejection.TOO_FEW_INLIERS
