"""Windowed bundle adjustment: poses of the last keyframes and the landmarks they share, refined together.

A pure function of a frozen problem, so that it can run on another thread and give the same answer. Levenberg-Marquardt
on the reprojection error with a Cauchy kernel; landmarks are eliminated by the Schur complement (Triggs et al., "Bundle
adjustment: a modern synthesis", section 6.1), which leaves a dense system of six unknowns per free pose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.geometry import exp_se3, orthonormalized, reproject_each, reprojection_jacobians, solve_symmetric
from vo.types import FloatArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class WindowProblem:
    """What to refine.

    T_world_camera  (P, 4, 4); the first `num_fixed` stay where they are and hold the gauge, scale included.
    points          (L, 3) landmarks in the world.
    pose_index      (O,) and point_index (O,): who sees whom; each pair at most once.
    rays            (O, 2) undistorted observations on the plane z = 1.
    focal_px        turns distances on that plane into px.
    """

    T_world_camera: FloatArray
    num_fixed: int
    points: FloatArray
    pose_index: IntArray
    point_index: IntArray
    rays: FloatArray
    focal_px: float

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
    """Refined poses (P, 4, 4) and points (L, 3); errors_px (O,), infinite behind a camera; cost before and after."""

    T_world_camera: FloatArray
    points: FloatArray
    errors_px: FloatArray
    initial_cost: float
    final_cost: float
    num_iterations: int


@dataclass(frozen=True, slots=True, eq=False)
class _NormalEquations:
    """Blocks of J^T W J and J^T W r: poses (F, 6, 6) and (F, 6), points (L, 3, 3) and (L, 3), coupling (F, 6, L, 3)."""

    poses: FloatArray
    pose_gradients: FloatArray
    points: FloatArray
    point_gradients: FloatArray
    coupling: FloatArray


def optimize_window(problem: WindowProblem, kernel_px: float = 1.0, max_iterations: int = 8) -> WindowSolution:
    """Minimises the robust reprojection error over the free poses and all points; never increases it."""
    T, points, damping = problem.T_world_camera, problem.points, 1e-4
    cost = initial_cost = _cost(problem, T, points, kernel_px)
    num_iterations = 0
    while num_iterations < max_iterations:
        num_iterations += 1
        equations = _linearize(problem, T, points, kernel_px)
        pose_steps, point_steps = _solve_schur(equations, damping)
        candidate_T = _moved(T, pose_steps, problem.num_fixed)
        candidate_points = points + point_steps
        candidate_cost = _cost(problem, candidate_T, candidate_points, kernel_px)
        if candidate_cost < cost:
            converged = cost - candidate_cost < 1e-5 * cost
            T, points, cost, damping = candidate_T, candidate_points, candidate_cost, max(damping / 10, 1e-9)
            if converged:
                break
        else:
            damping *= 10
            if damping > 1e4:
                break
    T = np.stack([orthonormalized(pose) for pose in T])
    return WindowSolution(T, points, _errors_px(problem, T, points), initial_cost, cost, num_iterations)


def _moved(T: FloatArray, steps: FloatArray, num_fixed: int) -> FloatArray:
    moved = T.copy()
    for row, step in enumerate(steps, start=num_fixed):
        moved[row] = T[row] @ exp_se3(step)
    return moved


def _errors_px(problem: WindowProblem, T: FloatArray, points: FloatArray) -> FloatArray:
    rays, depth = reproject_each(T[problem.pose_index], points[problem.point_index])
    errors = np.linalg.norm((rays - problem.rays) * problem.focal_px, axis=1)
    return np.where(depth > 0, errors, np.inf)


def _cost(problem: WindowProblem, T: FloatArray, points: FloatArray, kernel_px: float) -> float:
    """Cauchy cost; a point behind a camera costs as much as a very large error, so that no step moves it there."""
    errors = np.minimum(_errors_px(problem, T, points), 1e3)
    return float(np.log1p((errors / kernel_px) ** 2).sum())


def _linearize(problem: WindowProblem, T: FloatArray, points: FloatArray, kernel_px: float) -> _NormalEquations:
    pose_index, point_index, num_fixed = problem.pose_index, problem.point_index, problem.num_fixed
    observed_T, observed_points = T[pose_index], points[point_index]
    rays, depth = reproject_each(observed_T, observed_points)
    residual = (rays - problem.rays) * problem.focal_px
    weights = (depth > 0) / (1.0 + (residual**2).sum(1) / kernel_px**2)
    by_pose, by_point = reprojection_jacobians(observed_T, observed_points)
    root = np.sqrt(weights)[:, None, None] * problem.focal_px
    by_pose, by_point, residual = by_pose * root, by_point * root, residual * np.sqrt(weights)[:, None]

    num_points, num_free = len(points), len(T) - num_fixed
    point_blocks = _sum_by(np.einsum("oij,oik->ojk", by_point, by_point), point_index, num_points)
    point_gradients = _sum_by(np.einsum("oij,oi->oj", by_point, residual), point_index, num_points)
    free = pose_index >= num_fixed
    row, by_pose, free_residual = pose_index[free] - num_fixed, by_pose[free], residual[free]
    pose_blocks = _sum_by(np.einsum("oij,oik->ojk", by_pose, by_pose), row, num_free)
    pose_gradients = _sum_by(np.einsum("oij,oi->oj", by_pose, free_residual), row, num_free)
    coupling = np.zeros((num_free, 6, num_points, 3))
    coupling[row, :, point_index[free]] = np.einsum("oij,oik->ojk", by_pose, by_point[free])
    return _NormalEquations(pose_blocks, pose_gradients, point_blocks, point_gradients, coupling)


def _sum_by(values: FloatArray, index: IntArray, num_groups: int) -> FloatArray:
    """Sums rows of (O, ...) that share an index into (num_groups, ...)."""
    flat = values.reshape(len(values), -1)
    sums = np.empty((num_groups, flat.shape[1]))
    for column in range(flat.shape[1]):
        sums[:, column] = np.bincount(index, flat[:, column], num_groups)
    return sums.reshape(num_groups, *values.shape[1:])


def _solve_schur(equations: _NormalEquations, damping: float) -> tuple[FloatArray, FloatArray]:
    """Steps (F, 6) of the poses and (L, 3) of the points for Marquardt's scaled damping."""
    num_free, num_points = len(equations.poses), len(equations.points)
    point_blocks = _damped(equations.points, damping)
    inverse = np.linalg.inv(point_blocks)
    coupling = equations.coupling.reshape(num_free * 6, num_points * 3)
    by_inverse = (equations.coupling.transpose(2, 0, 1, 3).reshape(num_points, num_free * 6, 3) @ inverse).transpose(
        1, 0, 2
    )
    by_inverse = np.ascontiguousarray(by_inverse).reshape(num_free * 6, num_points * 3)
    system = -(by_inverse @ coupling.T)
    for row, block in enumerate(_damped(equations.poses, damping)):
        system[row * 6 : row * 6 + 6, row * 6 : row * 6 + 6] += block
    right = equations.pose_gradients.ravel() - by_inverse @ equations.point_gradients.ravel()
    pose_steps = -solve_symmetric(system, right)
    remainder = equations.point_gradients + (coupling.T @ pose_steps).reshape(num_points, 3)
    point_steps = -(inverse @ remainder[:, :, None])[:, :, 0]
    return pose_steps.reshape(num_free, 6), point_steps


def _damped(blocks: FloatArray, damping: float) -> FloatArray:
    """Blocks (N, d, d) with their diagonals scaled by 1 + damping, and lifted off zero."""
    size = blocks.shape[-1]
    diagonal = np.einsum("nii->ni", blocks)
    lift = diagonal * damping + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-12
    damped: FloatArray = blocks + lift[:, :, None] * np.eye(size)
    return damped
