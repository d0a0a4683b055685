"""Windowed bundle adjustment: poses of the last keyframes and the landmarks they share, refined together.

A pure function of a frozen problem, so that it can run on another thread and give the same answer. Levenberg-Marquardt
on the reprojection error with a Cauchy kernel; landmarks are eliminated by the Schur complement (Triggs et al., "Bundle
adjustment: a modern synthesis", section 6.1), which leaves a dense system of six unknowns per free pose, and one each
for the radial distortion that the calibration left over and for the focal length, where those are refined along.
Where a depth is known it is a third residual beside the two of the image, as an inverse depth in px of a virtual
disparity (Mur-Artal and Tardos, "ORB-SLAM2", section III-A): that is what depth cameras and stereo measure.
"""

from __future__ import annotations

import numpy as np

from vo.bundle_equations import NormalEquations, WindowSums, window_sums
from vo.bundle_problem import FocalPrior, RadialPrior, WindowProblem, WindowSolution, WindowState
from vo.geometry import exp_se3, orthonormalized, solve_symmetric
from vo.types import FloatArray


def optimize_window(problem: WindowProblem, kernel_px: float = 1.0, max_iterations: int = 8) -> WindowSolution:
    """Minimises the robust reprojection error over the free unknowns; never increases it."""
    problem = _sorted_by_pose(problem)
    sums = window_sums(problem, kernel_px)
    state = WindowState(problem.T_world_camera, problem.points, problem.radial.mean, problem.focal.log_ratio)
    cost = initial_cost = sums.cost(state)
    equations = sums.linearize(state)
    damping, num_iterations = 1e-4, 0
    while num_iterations < max_iterations:
        num_iterations += 1
        candidate = _moved(problem, state, *_solve_schur(equations, damping))
        candidate_cost = sums.cost(candidate)
        if candidate_cost < cost:
            converged = cost - candidate_cost < 1e-5 * cost
            state, cost, damping = candidate, candidate_cost, max(damping / 10, 1e-9)
            if converged:
                break
            equations = sums.linearize(state)
        else:
            damping *= 10
            if damping > 1e4:
                break
    return _as_solution(problem, state, sums, (initial_cost, cost), num_iterations)


def _sorted_by_pose(problem: WindowProblem) -> WindowProblem:
    """The same problem if its observations lie pose after pose; raises ValueError otherwise."""
    if np.any(np.diff(problem.pose_index) < 0):
        raise ValueError("pose_index: expected observations ordered by pose")
    return problem


def _as_solution(
    problem: WindowProblem, state: WindowState, sums: WindowSums, costs: tuple[float, float], num_iterations: int
) -> WindowSolution:
    T = np.stack([orthonormalized(pose) for pose in state.T])
    state = WindowState(T, state.points, state.kappa, state.log_focal)
    radial, focal = problem.radial, problem.focal
    if problem.num_lens:
        information = _lens_information(sums.linearize(state), problem.num_lens)
        if problem.refines_radial:
            radial = RadialPrior(state.kappa, information[0], problem.radial.limit)
        if problem.refines_focal:
            focal = FocalPrior(state.log_focal, information[-1], problem.focal.limit)
    return WindowSolution(T, state.points, sums.errors_px(state), costs[0], costs[1], num_iterations, radial, focal)


def _moved(problem: WindowProblem, state: WindowState, camera_step: FloatArray, point_step: FloatArray) -> WindowState:
    T = state.T.copy()
    num_free = len(T) - problem.num_fixed
    for row, step in enumerate(camera_step[: 6 * num_free].reshape(num_free, 6), start=problem.num_fixed):
        T[row] = state.T[row] @ exp_se3(step)
    lens_step = camera_step[6 * num_free :]
    kappa, log_focal = state.kappa, state.log_focal
    if problem.refines_radial:
        kappa = _limited(kappa + float(lens_step[0]), problem.radial.limit)
    if problem.refines_focal:
        log_focal = _limited(log_focal + float(lens_step[-1]), problem.focal.limit)
    return WindowState(T, state.points + point_step, kappa, log_focal)


def _limited(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def _solve_schur(equations: NormalEquations, damping: float) -> tuple[FloatArray, FloatArray]:
    """Steps (C,) of the cameras and (L, 3) of the points for Marquardt's scaled damping."""
    system, gradient = equations.reduced(damping)
    diagonal = np.diag(equations.cameras)
    lift = damping * diagonal + 1e-9 * diagonal.max(initial=0.0) * (diagonal == 0) + 1e-12
    camera_step = -solve_symmetric(system + np.diag(lift), gradient)
    return camera_step, equations.point_steps(camera_step)


def _lens_information(equations: NormalEquations, num_lens: int) -> FloatArray:
    """Information (num_lens,) in px^2 about each unknown of the lens once everything else has been marginalised."""
    system, _ = equations.reduced(0.0)
    poses, cross = system[:-num_lens, :-num_lens], system[:-num_lens, -num_lens:]
    information = system[-num_lens:, -num_lens:] - cross.T @ solve_symmetric(poses, cross)
    if num_lens == 1:
        return np.maximum(np.diag(information), 0.0)
    determinant = float(np.linalg.det(information))
    return np.maximum(determinant / np.maximum(np.diag(information)[::-1], 1e-12), 0.0)
