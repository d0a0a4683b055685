"""Windowed bundle adjustment: poses of the last keyframes and the landmarks they share, refined together.

A pure function of a frozen problem, so that it can run on another thread and give the same answer. Levenberg-Marquardt
on the reprojection error with a Cauchy kernel; landmarks are eliminated by the Schur complement (Triggs et al., "Bundle
adjustment: a modern synthesis", section 6.1), which leaves a dense system of six unknowns per free pose, and one more
where the radial distortion that the calibration left over is refined along.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.geometry import exp_se3, orthonormalized, reproject_each, solve_symmetric
from vo.types import FloatArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RadialPrior:
    """What is known of the leftover radial distortion kappa: a ray of length r truly is the ray times 1 - kappa r^2.

    mean; information in px^2: the weight of a squared deviation beside squared reprojection errors; limit: no larger
    kappa is believed, whatever noisy keypoints seem to say.
    """

    mean: float = 0.0
    information: float = 0.0
    limit: float = np.inf

    def corrected(self, rays: FloatArray) -> FloatArray:
        """Rays (N, 2) without the leftover distortion."""
        return corrected_rays(rays, self.mean)


def corrected_rays(rays: FloatArray, kappa: float) -> FloatArray:
    """Rays (N, 2) without a leftover radial distortion kappa, first order."""
    corrected: FloatArray = rays * (1.0 - kappa * (rays**2).sum(axis=1, keepdims=True))
    return corrected


@dataclass(frozen=True, slots=True, eq=False)
class WindowProblem:
    """What to refine.

    T_world_camera  (P, 4, 4); the first `num_fixed` stay where they are and hold the gauge, scale included.
    points          (L, 3) landmarks in the world.
    pose_index      (O,) and point_index (O,): who sees whom; each pair at most once.
    rays            (O, 2) undistorted observations on the plane z = 1, before the leftover distortion is taken off.
    focal_px        turns distances on that plane into px.
    radial          what is known of the leftover distortion.
    refines_radial  whether to refine it; it stays at the mean otherwise.
    """

    T_world_camera: FloatArray
    num_fixed: int
    points: FloatArray
    pose_index: IntArray
    point_index: IntArray
    rays: FloatArray
    focal_px: float
    radial: RadialPrior = RadialPrior()
    refines_radial: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_fixed <= len(self.T_world_camera):
            raise ValueError(f"num_fixed: expected 1..{len(self.T_world_camera)}, got {self.num_fixed}")
        num_observations = len(self.rays)
        if self.pose_index.shape != (num_observations,) or self.point_index.shape != (num_observations,):
            raise ValueError(
                f"pose_index, point_index: expected ({num_observations},), "
                f"got {self.pose_index.shape}, {self.point_index.shape}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class WindowSolution:
    """Refined poses (P, 4, 4) and points (L, 3); errors_px (O,), infinite behind a camera; cost before and after.

    radial carries the refined kappa and the information about it, the prior's included.
    """

    T_world_camera: FloatArray
    points: FloatArray
    errors_px: FloatArray
    initial_cost: float
    final_cost: float
    num_iterations: int
    radial: RadialPrior = RadialPrior()


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    T: FloatArray
    points: FloatArray
    kappa: float


@dataclass(frozen=True, slots=True, eq=False)
class _NormalEquations:
    """Blocks of J^T W J and J^T W r for C camera unknowns (six per free pose, then kappa if refined) and L points.

    cameras (C, C), camera_gradient (C,), points (L, 3, 3), point_gradients (L, 3), coupling (C, L, 3).
    """

    cameras: FloatArray
    camera_gradient: FloatArray
    points: FloatArray
    point_gradients: FloatArray
    coupling: FloatArray


def optimize_window(problem: WindowProblem, kernel_px: float = 1.0, max_iterations: int = 8) -> WindowSolution:
    """Minimises the robust reprojection error over the free unknowns; never increases it."""
    problem = _sorted_by_pose(problem)
    state = _State(problem.T_world_camera, problem.points, problem.radial.mean)
    cost = initial_cost = _cost(problem, state, kernel_px)
    damping, num_iterations = 1e-4, 0
    while num_iterations < max_iterations:
        num_iterations += 1
        camera_step, point_step = _solve_schur(_linearize(problem, state, kernel_px), damping)
        candidate = _moved(problem, state, camera_step, point_step)
        candidate_cost = _cost(problem, candidate, kernel_px)
        if candidate_cost < cost:
            converged = cost - candidate_cost < 1e-5 * cost
            state, cost, damping = candidate, candidate_cost, max(damping / 10, 1e-9)
            if converged:
                break
        else:
            damping *= 10
            if damping > 1e4:
                break
    return _as_solution(problem, state, kernel_px, (initial_cost, cost), num_iterations)


def _sorted_by_pose(problem: WindowProblem) -> WindowProblem:
    """The same problem if its observations lie pose after pose; raises ValueError otherwise."""
    if np.any(np.diff(problem.pose_index) < 0):
        raise ValueError("pose_index: expected observations ordered by pose")
    return problem


def _as_solution(
    problem: WindowProblem, state: _State, kernel_px: float, costs: tuple[float, float], num_iterations: int
) -> WindowSolution:
    T = np.stack([orthonormalized(pose) for pose in state.T])
    state = _State(T, state.points, state.kappa)
    radial = problem.radial
    if problem.refines_radial:
        information = _radial_information(_linearize(problem, state, kernel_px))
        radial = RadialPrior(state.kappa, information, problem.radial.limit)
    errors_px = np.linalg.norm(_residuals(problem, state)[0], axis=1)
    return WindowSolution(T, state.points, errors_px, costs[0], costs[1], num_iterations, radial)


def _moved(problem: WindowProblem, state: _State, camera_step: FloatArray, point_step: FloatArray) -> _State:
    T = state.T.copy()
    num_free = len(T) - problem.num_fixed
    for row, step in enumerate(camera_step[: 6 * num_free].reshape(num_free, 6), start=problem.num_fixed):
        T[row] = state.T[row] @ exp_se3(step)
    kappa = state.kappa + (float(camera_step[-1]) if problem.refines_radial else 0.0)
    kappa = min(max(kappa, -problem.radial.limit), problem.radial.limit)
    return _State(T, state.points + point_step, kappa)


def _residuals(problem: WindowProblem, state: _State) -> tuple[FloatArray, FloatArray]:
    """(O, 2) px and depths (O,); infinite where the depth is not positive."""
    projected, depth = reproject_each(state.T[problem.pose_index], state.points[problem.point_index])
    residual = (projected - corrected_rays(problem.rays, state.kappa)) * problem.focal_px
    return np.where(depth[:, None] > 0, residual, np.inf), depth


def _cost(problem: WindowProblem, state: _State, kernel_px: float) -> float:
    """Cauchy cost; a point behind a camera costs as much as a very large error, so that no step moves it there."""
    squared = np.minimum((_residuals(problem, state)[0] ** 2).sum(axis=1), 1e6)
    deviation = state.kappa - problem.radial.mean
    return float(kernel_px**2 * np.log1p(squared / kernel_px**2).sum()) + problem.radial.information * deviation**2


def _linearize(problem: WindowProblem, state: _State, kernel_px: float) -> _NormalEquations:
    """Gauss-Newton blocks at the state; every observation weighted by the kernel."""
    by_pose, by_point, by_kappa, residual = _weighted_jacobians(problem, state, kernel_px)
    num_free, num_points = len(state.T) - problem.num_fixed, len(state.points)
    size = 6 * num_free + int(problem.refines_radial)
    equations = _NormalEquations(
        np.zeros((size, size)),
        np.zeros(size),
        _summed_outer(by_point, problem.point_index, num_points),
        _summed(np.einsum("noi,no->ni", by_point, residual), problem.point_index, num_points),
        np.zeros((size, num_points, 3)),
    )
    first = int(np.searchsorted(problem.pose_index, problem.num_fixed))
    _couple_poses(equations, problem, (by_pose, by_point[first:], by_kappa[first:], residual[first:]), first)
    if problem.refines_radial:
        equations.cameras[-1, -1] = (by_kappa**2).sum() + problem.radial.information
        equations.camera_gradient[-1] = (by_kappa * residual).sum() + problem.radial.information * (
            state.kappa - problem.radial.mean
        )
        equations.coupling[-1] = _summed(np.einsum("noi,no->ni", by_point, by_kappa), problem.point_index, num_points)
    return equations


def _weighted_jacobians(
    problem: WindowProblem, state: _State, kernel_px: float
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Derivatives of the residual in px, times the root of its weight: by pose (free observations, 2, 6), by point
    (O, 2, 3), by kappa (O, 2); and the residual (O, 2) itself.

    The point moves in the world, the pose by its right perturbation (rho, phi).
    """
    R = state.T[:, :3, :3][problem.pose_index]
    offsets = state.points[problem.point_index] - state.T[:, :3, 3][problem.pose_index]
    p = np.matmul(offsets[:, None, :], R)[:, 0]
    inverse_depth = 1.0 / np.where(np.abs(p[:, 2]) < 1e-9, 1e-9, p[:, 2])
    uv = p[:, :2] * inverse_depth[:, None]
    residual = (uv - corrected_rays(problem.rays, state.kappa)) * problem.focal_px
    root = np.sqrt((p[:, 2] > 0) / (1.0 + (residual**2).sum(1) / kernel_px**2))
    gain = root * problem.focal_px
    axes = np.swapaxes(R, 1, 2)
    by_point = (axes[:, :2] - uv[:, :, None] * axes[:, 2:]) * (gain * inverse_depth)[:, None, None]
    r_squared = (problem.rays**2).sum(axis=1)
    by_kappa = problem.rays * (gain * r_squared)[:, None]
    first = int(np.searchsorted(problem.pose_index, problem.num_fixed))
    by_pose = _by_pose(uv[first:], inverse_depth[first:]) * gain[first:, None, None]
    return by_pose, by_point, by_kappa, residual * root[:, None]


def _by_pose(uv: FloatArray, inverse_depth: FloatArray) -> FloatArray:
    """(N, 2, 6) derivative of a projection by the right perturbation of its camera's pose."""
    u, v = uv[:, 0], uv[:, 1]
    jacobian = np.zeros((len(uv), 2, 6))
    jacobian[:, 0, 0] = jacobian[:, 1, 1] = -inverse_depth
    jacobian[:, :, 2] = uv * inverse_depth[:, None]
    jacobian[:, 0, 3], jacobian[:, 0, 4], jacobian[:, 0, 5] = u * v, -1.0 - u * u, v
    jacobian[:, 1, 3], jacobian[:, 1, 4], jacobian[:, 1, 5] = 1.0 + v * v, -u * v, -u
    return jacobian


def _couple_poses(
    equations: _NormalEquations,
    problem: WindowProblem,
    jacobians: tuple[FloatArray, FloatArray, FloatArray, FloatArray],
    first: int,
) -> None:
    """Fills in what belongs to the free poses, from the observations after `first`, which are theirs."""
    by_pose, by_point, by_kappa, residual = jacobians
    free_row = problem.pose_index[first:] - problem.num_fixed
    num_free = len(problem.T_world_camera) - problem.num_fixed
    num_points = len(problem.points)
    blocks = equations.coupling[: 6 * num_free].reshape(num_free, 6, num_points, 3)
    products = by_pose[:, 0, :, None] * by_point[:, 0, None, :] + by_pose[:, 1, :, None] * by_point[:, 1, None, :]
    blocks[free_row, :, problem.point_index[first:]] = products
    bounds = np.searchsorted(free_row, np.arange(num_free + 1))
    for row in range(num_free):
        mine = slice(bounds[row], bounds[row + 1])
        block = slice(6 * row, 6 * row + 6)
        stacked = by_pose[mine].reshape(-1, 6)
        equations.cameras[block, block] = stacked.T @ stacked
        equations.camera_gradient[block] = stacked.T @ residual[mine].ravel()
        if problem.refines_radial:
            equations.cameras[block, -1] = equations.cameras[-1, block] = stacked.T @ by_kappa[mine].ravel()


def _summed(values: FloatArray, index: IntArray, num_sums: int) -> FloatArray:
    """(num_sums, d) sums of the rows (N, d) that share an index."""
    return np.stack([np.bincount(index, column, num_sums) for column in values.T], axis=1)


def _summed_outer(jacobian: FloatArray, index: IntArray, num_sums: int) -> FloatArray:
    """(num_sums, 3, 3) sums of J^T J over the rows (N, 2, 3) that share an index."""
    sums = np.empty((num_sums, 3, 3))
    for i in range(3):
        for j in range(i, 3):
            products = jacobian[:, 0, i] * jacobian[:, 0, j] + jacobian[:, 1, i] * jacobian[:, 1, j]
            sums[:, i, j] = sums[:, j, i] = np.bincount(index, products, num_sums)
    return sums


def _reduced(equations: _NormalEquations, damping: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The system left for the cameras: (C, C) matrix, (C,) gradient; and the inverse blocks (L, 3, 3) of the points."""
    inverse: FloatArray = np.asarray(np.linalg.inv(_damped(equations.points, damping)), np.float64)
    coupling = equations.coupling
    size = len(coupling)
    by_inverse = sum(coupling[:, :, j, None] * inverse[None, :, j, :] for j in range(3))
    flat = np.asarray(by_inverse).reshape(size, -1)
    system = equations.cameras - flat @ coupling.reshape(size, -1).T
    gradient = equations.camera_gradient - flat @ equations.point_gradients.ravel()
    return system, gradient, inverse


def _solve_schur(equations: _NormalEquations, damping: float) -> tuple[FloatArray, FloatArray]:
    """Steps (C,) of the cameras and (L, 3) of the points for Marquardt's scaled damping."""
    system, gradient, inverse = _reduced(equations, damping)
    diagonal = np.diag(equations.cameras)
    lift = damping * diagonal + 1e-9 * diagonal.max(initial=0.0) * (diagonal == 0) + 1e-12
    camera_step = -solve_symmetric(system + np.diag(lift), gradient)
    remainder = equations.point_gradients + np.tensordot(camera_step, equations.coupling, axes=1)
    point_step = -np.matmul(inverse, remainder[:, :, None])[:, :, 0]
    return camera_step, point_step


def _radial_information(equations: _NormalEquations) -> float:
    """Information in px^2 about kappa once poses and points have been marginalised."""
    system, _, _ = _reduced(equations, 0.0)
    poses, cross = system[:-1, :-1], system[:-1, -1]
    return max(float(system[-1, -1] - cross @ solve_symmetric(poses, cross)), 0.0)


def _damped(blocks: FloatArray, damping: float) -> FloatArray:
    """Blocks (N, d, d) with their diagonals scaled by 1 + damping, and lifted off zero."""
    size = blocks.shape[-1]
    diagonal = np.einsum("nii->ni", blocks)
    lift = diagonal * damping + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-12
    damped: FloatArray = blocks + lift[:, :, None] * np.eye(size)
    return damped
