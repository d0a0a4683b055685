"""Intrinsics and poses of the board from corners: bundle adjustment with the poses eliminated. Pure.

The start is a search over the focal length with closed-form poses; then Levenberg-Marquardt on the reprojection error
of all corners with Huber weights (Zhang, "A flexible new technique for camera calibration", 2000, section 3.3; Triggs
et al., "Bundle adjustment: a modern synthesis", 2000, sections 4.3 and 6). OpenCV's projection gives the derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.types import Camera, CameraModel, FloatArray

_MAX_ITERATIONS = 80
_MAX_POSE_ITERATIONS = 20
_NUM_FOCAL = 13
_NUM_START_VIEWS = 8
_PENALTY_PX = 1e4


@dataclass(frozen=True, slots=True)
class Lens:
    """A camera model and how many distortion coefficients of it are estimated."""

    model: CameraModel
    num_coefficients: int

    @property
    def num_parameters(self) -> int:
        """fx, fy, cx, cy and the coefficients."""
        return 4 + self.num_coefficients

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, in the order of the vector."""
        fisheye, brown = ("k1", "k2", "k3", "k4"), ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")
        coefficients = fisheye if self.model is CameraModel.FISHEYE else brown
        return ("fx", "fy", "cx", "cy", *coefficients[: self.num_coefficients])

    @property
    def title(self) -> str:
        """For people."""
        match self.model:
            case CameraModel.PINHOLE:
                return "pinhole"
            case CameraModel.FISHEYE:
                return "fisheye"
            case _:
                return f"brown with {self.num_coefficients} coefficients"


@dataclass(frozen=True, slots=True, eq=False)
class Observations:
    """Corners of one view: points (N, 3) on the board in its unit, pixels (N, 2)."""

    points: FloatArray
    pixels: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Intrinsics and poses that fit best.

    theta       (P,) in the order of `lens.names`.
    poses       (V, 6) rotation vector and translation of the board in the camera of each view.
    residuals   (N, 2) px for each view, pixel minus projection.
    covariance  (P, P) of theta for corner errors of one pixel; multiply by the variance of a coordinate.
    """

    lens: Lens
    size: tuple[int, int]
    theta: FloatArray
    poses: FloatArray
    residuals: tuple[FloatArray, ...]
    covariance: FloatArray

    @property
    def camera(self) -> Camera:
        return camera_of(self.lens, self.theta, self.size)

    @property
    def view_rms_px(self) -> FloatArray:
        """(V,) reprojection error of each view, root mean square of distances."""
        return rms_of(self.residuals)

    @property
    def variance_px2(self) -> float:
        """Of one coordinate of a corner, with the degrees of freedom that the parameters took."""
        total = sum(float((r**2).sum()) for r in self.residuals)
        count = 2 * sum(len(r) for r in self.residuals)
        return total / max(count - self.lens.num_parameters - 6 * len(self.poses), 1)

    @property
    def deviations(self) -> FloatArray:
        """(P,) standard deviations of theta as the corner errors propagate."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0) * self.variance_px2)


def rms_of(residuals: Sequence[FloatArray]) -> FloatArray:
    """(V,) root mean square distance of each view."""
    return np.array([np.sqrt((r**2).sum(axis=1).mean()) for r in residuals])


def camera_of(lens: Lens, theta: FloatArray, size: tuple[int, int]) -> Camera:
    """The camera that a parameter vector describes."""
    fx, fy, cx, cy = theta[:4]
    K = np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])
    return Camera(size[0], size[1], K, np.array(theta[4:], np.float64), lens.model)


def project(
    lens: Lens, theta: FloatArray, pose: FloatArray, points: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Pixels (N, 2) of points (N, 3) at a pose (6,), with derivatives by theta (2N, P) and by the pose (2N, 6)."""
    K = np.array([[theta[0], 0.0, theta[2]], [0.0, theta[1], theta[3]], [0.0, 0.0, 1.0]])
    if lens.model is CameraModel.FISHEYE:
        projected, derivatives = cv2.fisheye.projectPoints(points[:, None], pose[:3], pose[3:], K, theta[4:8])
        pixels, J = np.asarray(projected, np.float64).reshape(-1, 2), np.asarray(derivatives, np.float64)
        return pixels, J[:, :8], J[:, 8:14]
    coefficients = theta[4:] if lens.num_coefficients else np.zeros(4)
    projected, derivatives = cv2.projectPoints(points, pose[:3], pose[3:], K, coefficients)
    pixels, J = np.asarray(projected, np.float64).reshape(-1, 2), np.asarray(derivatives, np.float64)
    return pixels, J[:, 6 : 10 + lens.num_coefficients], J[:, :6]


def initial_theta(lens: Lens, views: Sequence[Observations], size: tuple[int, int]) -> FloatArray:
    """Parameters without distortion at the focal length whose poses explain the views best (their median error)."""
    best, best_error = None, np.inf
    views = views[:: max(1, len(views) // _NUM_START_VIEWS)]
    for focal_px in np.geomspace(0.25, 4.0, _NUM_FOCAL) * max(size):
        theta = np.zeros(lens.num_parameters)
        theta[:4] = focal_px, focal_px, 0.5 * (size[0] - 1), 0.5 * (size[1] - 1)
        residuals = [_closed_form(lens, theta, view)[1] for view in views]
        error = float(np.median(rms_of(residuals)))
        if error < best_error:
            best, best_error = theta, error
    if best is None:
        raise ValueError("no focal length explains any view")
    return best


def fit(
    lens: Lens,
    views: Sequence[Observations],
    size: tuple[int, int],
    *,
    theta: FloatArray | None = None,
    poses: FloatArray | None = None,
    huber_px: float = 2.0,
) -> Fit:
    """Least squares over intrinsics and poses, from `theta` and `poses` where they are known.

    A start that is not known comes from `initial_theta`, refined with one radial coefficient before all are let go.
    Raises ValueError without views, or where no finite start is found.
    """
    if not views:
        raise ValueError("no views to fit")
    if theta is None:
        theta = initial_theta(lens, views, size)
        poses = np.array([pose_of(lens, theta, view)[0] for view in views])
        free = np.zeros(lens.num_parameters, np.bool_)
        free[[0, 1, *([4] if lens.num_coefficients else [])]] = True
        theta, poses = _adjust(lens, views, theta, poses, huber_px, free, tolerance=1e-3)
    if poses is None:
        poses = np.array([pose_of(lens, theta, view)[0] for view in views])
    theta, poses = _adjust(lens, views, theta, poses, huber_px, np.ones(lens.num_parameters, np.bool_))
    residuals = tuple(
        view.pixels - project(lens, theta, pose, view.points)[0] for view, pose in zip(views, poses, strict=True)
    )
    H, _, _ = _reduced(*_blocks(lens, views, theta, poses, np.inf)[:5], damping=0.0)
    return Fit(lens, size, theta, poses, residuals, np.asarray(np.linalg.pinv(H, hermitian=True), np.float64))


def pose_of(lens: Lens, theta: FloatArray, view: Observations, huber_px: float = 2.0) -> tuple[FloatArray, FloatArray]:
    """Pose (6,) of the board under fixed intrinsics and residuals (N, 2) px; both solutions of a plane are tried."""
    best, best_cost = None, np.inf
    for start in _candidates(lens, theta, view):
        pose = _adjust_pose(lens, theta, view, start, huber_px)
        residuals = view.pixels - project(lens, theta, pose, view.points)[0]
        cost = _robust(residuals, huber_px)[1]
        if cost < best_cost:
            best, best_cost = (pose, residuals), cost
    if best is None:
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]), np.full_like(view.pixels, _PENALTY_PX)
    return best


# --- start ----------------------------------------------------------------------------------------------------------


def _closed_form(lens: Lens, theta: FloatArray, view: Observations) -> tuple[FloatArray, FloatArray]:
    """The better closed-form pose and its residuals."""
    best = (np.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]), np.full_like(view.pixels, _PENALTY_PX))
    for pose in _candidates(lens, theta, view):
        residuals = view.pixels - project(lens, theta, pose, view.points)[0]
        if np.isfinite(residuals).all() and (residuals**2).sum() < (best[1] ** 2).sum():
            best = (pose, residuals)
    return best


def _candidates(lens: Lens, theta: FloatArray, view: Observations) -> list[FloatArray]:
    """The two poses of a plane (Collins and Bartoli, "Infinitesimal plane-based pose estimation", 2014), in front."""
    K = np.array([[theta[0], 0.0, theta[2]], [0.0, theta[1], theta[3]], [0.0, 0.0, 1.0]])
    pixels = np.ascontiguousarray(view.pixels[:, None])
    if lens.model is CameraModel.FISHEYE:
        rays = cv2.fisheye.undistortPoints(pixels, K, theta[4:8]).reshape(-1, 2)
    elif lens.num_coefficients:
        rays = cv2.undistortPoints(pixels, K, theta[4:]).reshape(-1, 2)
    else:
        rays = (view.pixels - theta[2:4]) / theta[:2]
    # A fisheye's ray at a right angle or more lies on no plane z = 1.
    usable = np.isfinite(rays).all(axis=1) & (np.abs(rays).max(axis=1) < 50.0)
    if usable.sum() < 4:
        return []
    centre = view.points.mean(axis=0)
    local = np.ascontiguousarray(view.points[usable] - centre)
    try:
        _, rotations, translations, _ = cv2.solvePnPGeneric(
            local, np.ascontiguousarray(rays[usable]), np.eye(3), None, flags=cv2.SOLVEPNP_IPPE
        )
    except cv2.error:  # a degenerate view: all corners on one line
        return []
    poses = []
    for rotation, translation in zip(rotations, translations, strict=True):
        shifted = translation.ravel() - cv2.Rodrigues(rotation)[0] @ centre
        pose = np.concatenate([rotation.ravel(), shifted])
        if np.isfinite(pose).all() and translation.ravel()[2] > 0:
            poses.append(pose)
    return poses


# --- least squares --------------------------------------------------------------------------------------------------


def _robust(residuals: FloatArray, huber_px: float) -> tuple[FloatArray, float]:
    """Huber's weights (N,) of the distances, and the sum of his loss; infinite where a residual is not a number."""
    squared = np.einsum("ij,ij->i", residuals, residuals)
    weights = np.minimum(1.0, huber_px / np.sqrt(np.maximum(squared, 1e-24)))
    cost = float((weights * squared * (1.0 - 0.5 * weights)).sum())
    return weights, cost if np.isfinite(cost) else np.inf


def _blocks(
    lens: Lens, views: Sequence[Observations], theta: FloatArray, poses: FloatArray, huber_px: float
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, float]:
    """Normal equations: H (P, P), gradient (P,), coupling (V, P, 6), H and gradients of poses (V, 6, 6), cost."""
    num = lens.num_parameters
    H, gradient, cost = np.zeros((num, num)), np.zeros(num), 0.0
    coupling, H_pose, g_pose = np.zeros((len(views), num, 6)), np.zeros((len(views), 6, 6)), np.zeros((len(views), 6))
    for row, (view, pose) in enumerate(zip(views, poses, strict=True)):
        pixels, J, J_pose = project(lens, theta, pose, view.points)
        residuals = view.pixels - pixels
        view_weights, view_cost = _robust(residuals, huber_px)
        weights, cost = np.repeat(view_weights, 2), cost + view_cost
        JtW, JptW = J.T * weights, J_pose.T * weights
        flat = residuals.ravel()
        H += JtW @ J
        gradient += JtW @ flat
        coupling[row], H_pose[row], g_pose[row] = JtW @ J_pose, JptW @ J_pose, JptW @ flat
    return H, gradient, coupling, H_pose, g_pose, cost


def _reduced(
    H: FloatArray, gradient: FloatArray, coupling: FloatArray, H_pose: FloatArray, g_pose: FloatArray, damping: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Schur complement of the poses: reduced H (P, P), reduced gradient (P,), damped inverse blocks (V, 6, 6)."""
    lifted = H_pose + np.eye(6) * (damping * np.einsum("vii->vi", H_pose) + 1e-12)[:, None]
    inverse = np.linalg.inv(lifted)
    through = coupling @ inverse
    reduced = H + np.diag(damping * np.diag(H)) - (through @ np.swapaxes(coupling, 1, 2)).sum(axis=0)
    return reduced, gradient - np.einsum("vpi,vi->p", through, g_pose), inverse


def _adjust(
    lens: Lens,
    views: Sequence[Observations],
    theta: FloatArray,
    poses: FloatArray,
    huber_px: float,
    free: NDArray[np.bool_],
    tolerance: float = 1e-8,
) -> tuple[FloatArray, FloatArray]:
    """Levenberg-Marquardt over the free intrinsics and all poses."""
    damping = 1e-3
    *blocks, cost = _blocks(lens, views, theta, poses, huber_px)
    for _ in range(_MAX_ITERATIONS):
        H, gradient, coupling, H_pose, g_pose = blocks
        reduced, g, inverse = _reduced(
            H[np.ix_(free, free)], gradient[free], coupling[:, free], H_pose, g_pose, damping
        )
        step = np.zeros_like(theta)
        step[free] = np.linalg.lstsq(reduced, g, rcond=None)[0]
        pose_step = np.einsum("vij,vj->vi", inverse, g_pose - np.einsum("vpi,p->vi", coupling, step))
        new_theta, new_poses = theta + step, poses + pose_step
        new_blocks, new_cost = blocks, np.inf
        if np.isfinite(new_theta).all() and new_theta[:2].min() > 1.0 and np.isfinite(new_poses).all():
            *new_blocks, new_cost = _blocks(lens, views, new_theta, new_poses, huber_px)
        if new_cost < cost:
            is_done = cost - new_cost < tolerance * cost
            theta, poses, blocks, cost = new_theta, new_poses, new_blocks, new_cost
            damping = max(damping * 0.1, 1e-12)
            if is_done:
                break
        else:
            damping *= 10.0
            if damping > 1e6:
                break
    return theta, poses


def _adjust_pose(lens: Lens, theta: FloatArray, view: Observations, pose: FloatArray, huber_px: float) -> FloatArray:
    """Levenberg-Marquardt over one pose."""
    damping = 1e-4
    pixels, _, J = project(lens, theta, pose, view.points)
    residuals = view.pixels - pixels
    weights, cost = _robust(residuals, huber_px)
    for _ in range(_MAX_POSE_ITERATIONS):
        JtW = J.T * np.repeat(weights, 2)
        H = JtW @ J
        step = np.linalg.solve(H + np.diag(damping * np.diag(H) + 1e-12), JtW @ residuals.ravel())
        pixels, _, new_J = project(lens, theta, pose + step, view.points)
        new_residuals = view.pixels - pixels
        new_weights, new_cost = _robust(new_residuals, huber_px)
        if new_cost < cost:
            is_done = cost - new_cost < 1e-6 * cost
            pose, J, residuals, weights, cost = pose + step, new_J, new_residuals, new_weights, new_cost
            damping *= 0.1
            if is_done:
                break
        else:
            damping *= 10.0
            if damping > 1e2:
                break
    return pose
