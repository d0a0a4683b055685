"""Windowed bundle adjustment: poses of the last keyframes and the landmarks they share, refined together.

A pure function of a frozen problem, so that it can run on another thread and give the same answer. Levenberg-Marquardt
on the reprojection error with a Cauchy kernel; landmarks are eliminated by the Schur complement (Triggs et al., "Bundle
adjustment: a modern synthesis", section 6.1), which leaves a dense system of six unknowns per free pose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.geometry import exp_se3, orthonormalized, reproject_each, skew, solve_symmetric
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
class _Observations:
    """What one keyframe sees: landmark numbers (n,), no number twice, and their rays (n, 2)."""

    points: IntArray
    rays: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class _NormalEquations:
    """Blocks of J^T W J and J^T W r for F free poses and L points.

    poses (F, 6, 6), pose_gradients (F, 6), points (L, 3, 3), point_gradients (L, 3), and coupling (3, 6 F, L),
    laid out for the products of the Schur complement.
    """

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
    num_free, num_points = len(T) - problem.num_fixed, len(points)
    equations = _NormalEquations(
        np.zeros((num_free, 6, 6)),
        np.zeros((num_free, 6)),
        np.zeros((num_points, 3, 3)),
        np.zeros((num_points, 3)),
        np.zeros((3, 6 * num_free, num_points)),
    )
    for row in range(len(T)):
        mine = problem.pose_index == row
        seen = _Observations(problem.point_index[mine], problem.rays[mine])
        _add_keyframe(equations, row - problem.num_fixed, T[row], points, seen, problem.focal_px, kernel_px)
    return equations


def _add_keyframe(
    equations: _NormalEquations,
    free_row: int,
    T: FloatArray,
    points: FloatArray,
    seen: _Observations,
    focal_px: float,
    kernel_px: float,
) -> None:
    """Adds one keyframe's observations; `free_row` is negative for one that is fixed.

    With A (2, 3) the derivative of a ray by the point in the camera frame, M = w A^T A carries everything: the point
    sees R M R^T, the pose G^T M G with G = [-I, [p]x], and their coupling is G^T M R^T.
    """
    R = T[:3, :3]
    p = (points[seen.points] - T[:3, 3]) @ R
    inverse_depth = 1.0 / np.where(np.abs(p[:, 2]) < 1e-9, 1e-9, p[:, 2])
    u, v = p[:, 0] * inverse_depth, p[:, 1] * inverse_depth
    residual = (np.stack([u, v], axis=1) - seen.rays) * focal_px
    weights = (p[:, 2] > 0) / (1.0 + (residual**2).sum(1) / kernel_px**2)

    M = np.zeros((len(p), 3, 3))
    M[:, 0, 0] = M[:, 1, 1] = weights * (focal_px * inverse_depth) ** 2
    M[:, 0, 2] = M[:, 2, 0] = -M[:, 0, 0] * u
    M[:, 1, 2] = M[:, 2, 1] = -M[:, 0, 0] * v
    M[:, 2, 2] = M[:, 0, 0] * (u * u + v * v)
    gradient = np.empty((len(p), 3))
    gradient[:, :2] = residual * (weights * focal_px * inverse_depth)[:, None]
    gradient[:, 2] = -(gradient[:, 0] * u + gradient[:, 1] * v)

    M_to_point = (M.reshape(-1, 3) @ R.T).reshape(-1, 3, 3)
    equations.points[seen.points] += R @ M_to_point
    equations.point_gradients[seen.points] += gradient @ R.T
    if free_row < 0:
        return
    cross = skew(p)
    block = slice(6 * free_row, 6 * free_row + 6)
    coupling = np.concatenate([-M_to_point, -(cross @ M_to_point)], axis=1)
    equations.coupling[:, block, seen.points] = coupling.transpose(2, 1, 0)
    M_cross = M @ cross
    equations.poses[free_row, :3, :3] = M.sum(0)
    equations.poses[free_row, :3, 3:] = -M_cross.sum(0)
    equations.poses[free_row, 3:, :3] = -M_cross.sum(0).T
    equations.poses[free_row, 3:, 3:] = -(cross @ M_cross).sum(0)
    equations.pose_gradients[free_row, :3] = -gradient.sum(0)
    equations.pose_gradients[free_row, 3:] = -np.cross(p, gradient).sum(0)


def _solve_schur(equations: _NormalEquations, damping: float) -> tuple[FloatArray, FloatArray]:
    """Steps (F, 6) of the poses and (L, 3) of the points for Marquardt's scaled damping."""
    num_free = len(equations.poses)
    inverse = np.linalg.inv(_damped(equations.points, damping))
    coupling = equations.coupling
    by_inverse = np.stack([sum(coupling[j] * inverse[:, j, k] for j in range(3)) for k in range(3)])
    system = -sum(by_inverse[k] @ coupling[k].T for k in range(3))
    for row, block in enumerate(_damped(equations.poses, damping)):
        system[row * 6 : row * 6 + 6, row * 6 : row * 6 + 6] += block
    eliminated = sum(by_inverse[k] @ equations.point_gradients[:, k] for k in range(3))
    pose_steps = -solve_symmetric(system, equations.pose_gradients.ravel() - eliminated)
    remainder = equations.point_gradients + np.stack([pose_steps @ coupling[k] for k in range(3)], axis=1)
    point_steps = -(inverse @ remainder[:, :, None])[:, :, 0]
    return pose_steps.reshape(num_free, 6), point_steps


def _damped(blocks: FloatArray, damping: float) -> FloatArray:
    """Blocks (N, d, d) with their diagonals scaled by 1 + damping, and lifted off zero."""
    size = blocks.shape[-1]
    diagonal = np.einsum("nii->ni", blocks)
    lift = diagonal * damping + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-12
    damped: FloatArray = blocks + lift[:, :, None] * np.eye(size)
    return damped
