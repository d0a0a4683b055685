"""Windowed bundle adjustment: poses of the last keyframes and the landmarks they share, refined together.

A pure function of a frozen problem, so that it can run on another thread and give the same answer. Levenberg-Marquardt
on the reprojection error with a Cauchy kernel; landmarks are eliminated by the Schur complement (Triggs et al., "Bundle
adjustment: a modern synthesis", section 6.1), which leaves a dense system of six unknowns per free pose, and one each
for the radial distortion that the calibration left over and for the focal length, where those are refined along.
Where a depth is known it is a third residual beside the two of the image, as an inverse depth in px of a virtual
disparity (Mur-Artal and Tardos, "ORB-SLAM2", section III-A): that is what depth cameras and stereo measure.
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
class FocalPrior:
    """What is known of the focal length: it truly is the calibration's times exp(log_ratio).

    information in px^2, as in RadialPrior; limit of the absolute log_ratio.
    """

    log_ratio: float = 0.0
    information: float = 0.0
    limit: float = np.inf


@dataclass(frozen=True, slots=True, eq=False)
class WindowProblem:
    """What to refine.

    T_world_camera  (P, 4, 4); the first `num_fixed` stay where they are and hold the gauge, scale included.
    points          (L, 3) landmarks in the world.
    pose_index      (O,) and point_index (O,): who sees whom; each pair at most once.
    rays            (O, 2) undistorted observations on the plane z = 1, before the leftover distortion is taken off.
    focal_px        turns distances on that plane into px.
    radial, focal   what is known of the leftover distortion and of the focal length.
    refines_radial, refines_focal  whether to refine them; they stay at the mean otherwise.
    inverse_depths  (O,) measured, one over the unit of the map, NaN where there is none; None: none at all.
    depth_gain_px   px of residual per unit of inverse depth: focal length times (virtual) baseline.
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
    focal: FocalPrior = FocalPrior()
    refines_focal: bool = False
    inverse_depths: FloatArray | None = None
    depth_gain_px: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_fixed <= len(self.T_world_camera):
            raise ValueError(f"num_fixed: expected 1..{len(self.T_world_camera)}, got {self.num_fixed}")
        num_observations = len(self.rays)
        if self.pose_index.shape != (num_observations,) or self.point_index.shape != (num_observations,):
            raise ValueError(
                f"pose_index, point_index: expected ({num_observations},), "
                f"got {self.pose_index.shape}, {self.point_index.shape}"
            )
        if self.inverse_depths is not None and self.inverse_depths.shape != (num_observations,):
            raise ValueError(f"inverse_depths: expected ({num_observations},), got {self.inverse_depths.shape}")

    @property
    def num_lens(self) -> int:
        """How many unknowns the lens has: kappa, then the focal length."""
        return int(self.refines_radial) + int(self.refines_focal)


@dataclass(frozen=True, slots=True, eq=False)
class WindowSolution:
    """Refined poses (P, 4, 4) and points (L, 3); errors_px (O,), infinite behind a camera; cost before and after.

    radial and focal carry what was refined and the information about each, the prior's included.
    """

    T_world_camera: FloatArray
    points: FloatArray
    errors_px: FloatArray
    initial_cost: float
    final_cost: float
    num_iterations: int
    radial: RadialPrior = RadialPrior()
    focal: FocalPrior = FocalPrior()


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    T: FloatArray
    points: FloatArray
    kappa: float
    log_focal: float


@dataclass(frozen=True, slots=True, eq=False)
class _NormalEquations:
    """Blocks of J^T W J and J^T W r for C camera unknowns (six per free pose, then those of the lens) and L points.

    cameras (C, C), camera_gradient (C,), points (L, 3, 3), point_gradients (L, 3), coupling (C, L, 3). A pose and a
    point that does not see it are not coupled: `blocks` (F, 6, 3) are all that is not zero there, `block_poses` (F,)
    and `block_points` (F,) where they stand.
    """

    cameras: FloatArray
    camera_gradient: FloatArray
    points: FloatArray
    point_gradients: FloatArray
    coupling: FloatArray
    blocks: FloatArray
    block_poses: IntArray
    block_points: IntArray


def optimize_window(problem: WindowProblem, kernel_px: float = 1.0, max_iterations: int = 8) -> WindowSolution:
    """Minimises the robust reprojection error over the free unknowns; never increases it."""
    problem = _sorted_by_pose(problem)
    state = _State(problem.T_world_camera, problem.points, problem.radial.mean, problem.focal.log_ratio)
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
    state = _State(T, state.points, state.kappa, state.log_focal)
    radial, focal = problem.radial, problem.focal
    if problem.num_lens:
        information = _lens_information(_linearize(problem, state, kernel_px), problem.num_lens)
        if problem.refines_radial:
            radial = RadialPrior(state.kappa, information[0], problem.radial.limit)
        if problem.refines_focal:
            focal = FocalPrior(state.log_focal, information[-1], problem.focal.limit)
    errors_px = np.linalg.norm(_residuals(problem, state)[0], axis=1)
    return WindowSolution(T, state.points, errors_px, costs[0], costs[1], num_iterations, radial, focal)


def _moved(problem: WindowProblem, state: _State, camera_step: FloatArray, point_step: FloatArray) -> _State:
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
    return _State(T, state.points + point_step, kappa, log_focal)


def _limited(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def _residuals(problem: WindowProblem, state: _State) -> tuple[FloatArray, FloatArray]:
    """(O, 2) px and depths (O,); infinite where the depth is not positive.

    In px of the image, whatever the focal length: on the plane z = 1 a longer one would shrink every residual.
    """
    projected, depth = reproject_each(state.T[problem.pose_index], state.points[problem.point_index])
    residual = (projected - _seen_rays(problem, state)) * (problem.focal_px * np.exp(state.log_focal))
    return np.where(depth[:, None] > 0, residual, np.inf), depth


def _seen_rays(problem: WindowProblem, state: _State) -> FloatArray:
    """The observations (O, 2) on the plane z = 1 as the lens of the state has them."""
    return corrected_rays(problem.rays * np.exp(-state.log_focal), state.kappa)


def _cost(problem: WindowProblem, state: _State, kernel_px: float) -> float:
    """Cauchy cost; a point behind a camera costs as much as a very large error, so that no step moves it there."""
    residual, depth = _residuals(problem, state)
    squared = np.minimum((residual**2).sum(axis=1), 1e6)
    cost = float(kernel_px**2 * np.log1p(squared / kernel_px**2).sum())
    if problem.inverse_depths is not None:
        is_known = np.isfinite(problem.inverse_depths) & (depth > 0)
        off_px = (1.0 / depth[is_known] - problem.inverse_depths[is_known]) * problem.depth_gain_px
        cost += float(kernel_px**2 * np.log1p(np.minimum(off_px**2, 1e6) / kernel_px**2).sum())
    deviation, ratio = state.kappa - problem.radial.mean, state.log_focal - problem.focal.log_ratio
    return cost + problem.radial.information * deviation**2 + problem.focal.information * ratio**2


def _linearize(problem: WindowProblem, state: _State, kernel_px: float) -> _NormalEquations:
    """Gauss-Newton blocks at the state; every observation weighted by the kernel."""
    jacobians = _weighted_jacobians(problem, state, kernel_px)
    num_free, num_points = len(state.T) - problem.num_fixed, len(state.points)
    size = 6 * num_free + problem.num_lens
    by_point, residual = jacobians.by_point, jacobians.residual
    first = len(problem.pose_index) - len(jacobians.by_pose)
    equations = _NormalEquations(
        np.zeros((size, size)),
        np.zeros(size),
        _summed_outer(by_point, problem.point_index, num_points),
        _summed(np.einsum("noi,no->ni", by_point, residual), problem.point_index, num_points),
        np.zeros((size, num_points, 3)),
        _pose_point_blocks(jacobians.by_pose, by_point[first:]),
        problem.pose_index[first:] - problem.num_fixed,
        problem.point_index[first:],
    )
    _couple_poses(equations, problem, jacobians)
    _add_lens(equations, problem, state, jacobians)
    return equations


@dataclass(frozen=True, slots=True, eq=False)
class _Jacobians:
    """Derivatives of the residuals in px, times the root of their weights; d is 2, or 3 where depths are measured.

    by_pose (F, d, 6) of the F observations of free poses, which come last; by_point (O, d, 3); by_lens: one (O, d) per
    unknown of the lens; residual (O, d) itself.
    """

    by_pose: FloatArray
    by_point: FloatArray
    by_lens: tuple[FloatArray, ...]
    residual: FloatArray


def _weighted_jacobians(problem: WindowProblem, state: _State, kernel_px: float) -> _Jacobians:
    """The point moves in the world, the pose by its right perturbation (rho, phi)."""
    R = state.T[:, :3, :3][problem.pose_index]
    offsets = state.points[problem.point_index] - state.T[:, :3, 3][problem.pose_index]
    p = np.matmul(offsets[:, None, :], R)[:, 0]
    inverse_depth = 1.0 / np.where(np.abs(p[:, 2]) < 1e-9, 1e-9, p[:, 2])
    uv = p[:, :2] * inverse_depth[:, None]
    focal_px = problem.focal_px * np.exp(state.log_focal)
    residual = (uv - _seen_rays(problem, state)) * focal_px
    root = np.sqrt((p[:, 2] > 0) / (1.0 + (residual**2).sum(1) / kernel_px**2))
    gain = root * focal_px
    axes = np.swapaxes(R, 1, 2)
    by_point = (axes[:, :2] - uv[:, :, None] * axes[:, 2:]) * (gain * inverse_depth)[:, None, None]
    first = int(np.searchsorted(problem.pose_index, problem.num_fixed))
    by_pose = _by_pose(uv[first:], inverse_depth[first:]) * gain[first:, None, None]
    image = _Jacobians(by_pose, by_point, _by_lens(problem, state, uv, gain), residual * root[:, None])
    if problem.inverse_depths is None:
        return image
    return _with_depths(problem, image, (uv, inverse_depth, axes[:, 2]), kernel_px)


def _by_lens(problem: WindowProblem, state: _State, uv: FloatArray, gain: FloatArray) -> tuple[FloatArray, ...]:
    """(O, 2) for each unknown of the lens: of f (projection - seen ray) by kappa, and by the logarithm of f."""
    rays = problem.rays * np.exp(-state.log_focal)
    r_squared = (rays**2).sum(axis=1)
    columns = []
    if problem.refines_radial:
        columns.append(rays * (gain * r_squared)[:, None])
    if problem.refines_focal:
        columns.append((uv - rays * (2.0 * state.kappa * r_squared)[:, None]) * gain[:, None])
    return tuple(columns)


def _with_depths(
    problem: WindowProblem,
    image: _Jacobians,
    seen: tuple[FloatArray, FloatArray, FloatArray],
    kernel_px: float,
) -> _Jacobians:
    """The same with a third row for the inverse depths; zero where none was measured.

    seen  projections (O, 2), inverse depths (O,) and the cameras' viewing axes (O, 3) in the world.
    """
    uv, inverse_depth, axis = seen
    measured = problem.inverse_depths if problem.inverse_depths is not None else np.full(len(uv), np.nan)
    is_used = np.isfinite(measured) & (inverse_depth > 0)
    residual = np.where(is_used, inverse_depth - np.where(is_used, measured, 0.0), 0.0) * problem.depth_gain_px
    gain = problem.depth_gain_px * is_used / np.sqrt(1.0 + (residual / kernel_px) ** 2)
    by_point = -axis * (gain * inverse_depth**2)[:, None]
    first = len(uv) - len(image.by_pose)
    by_pose = np.zeros((len(image.by_pose), 6))
    by_pose[:, 2] = inverse_depth[first:] ** 2
    by_pose[:, 3], by_pose[:, 4] = uv[first:, 1] * inverse_depth[first:], -uv[first:, 0] * inverse_depth[first:]
    return _Jacobians(
        np.concatenate([image.by_pose, (by_pose * gain[first:, None])[:, None]], axis=1),
        np.concatenate([image.by_point, by_point[:, None]], axis=1),
        tuple(np.concatenate([column, np.zeros((len(uv), 1))], axis=1) for column in image.by_lens),
        np.concatenate([image.residual, (residual / np.sqrt(1.0 + (residual / kernel_px) ** 2))[:, None]], axis=1),
    )


def _by_pose(uv: FloatArray, inverse_depth: FloatArray) -> FloatArray:
    """(N, 2, 6) derivative of a projection by the right perturbation of its camera's pose."""
    u, v = uv[:, 0], uv[:, 1]
    jacobian = np.zeros((len(uv), 2, 6))
    jacobian[:, 0, 0] = jacobian[:, 1, 1] = -inverse_depth
    jacobian[:, :, 2] = uv * inverse_depth[:, None]
    jacobian[:, 0, 3], jacobian[:, 0, 4], jacobian[:, 0, 5] = u * v, -1.0 - u * u, v
    jacobian[:, 1, 3], jacobian[:, 1, 4], jacobian[:, 1, 5] = 1.0 + v * v, -u * v, -u
    return jacobian


def _pose_point_blocks(by_pose: FloatArray, by_point: FloatArray) -> FloatArray:
    """(F, 6, 3): J^T J of the pose and the point of each observation (F, d, 6) and (F, d, 3)."""
    blocks = by_pose[:, 0, :, None] * by_point[:, 0, None, :]
    for row in range(1, by_pose.shape[1]):
        blocks += by_pose[:, row, :, None] * by_point[:, row, None, :]
    return blocks


def _couple_poses(equations: _NormalEquations, problem: WindowProblem, jacobians: _Jacobians) -> None:
    """Fills in what belongs to the free poses, whose observations are the last ones."""
    by_pose = jacobians.by_pose
    first = len(problem.pose_index) - len(by_pose)
    residual, free_row = jacobians.residual[first:], equations.block_poses
    num_free = len(problem.T_world_camera) - problem.num_fixed
    _by_pose_and_point(equations.coupling, num_free)[free_row, :, equations.block_points] = equations.blocks
    bounds = np.searchsorted(free_row, np.arange(num_free + 1))
    for row in range(num_free):
        mine = slice(bounds[row], bounds[row + 1])
        block = slice(6 * row, 6 * row + 6)
        stacked = by_pose[mine].reshape(-1, 6)
        equations.cameras[block, block] = stacked.T @ stacked
        equations.camera_gradient[block] = stacked.T @ residual[mine].ravel()
        for number, column in enumerate(jacobians.by_lens, start=6 * num_free):
            of_lens = stacked.T @ column[first:][mine].ravel()
            equations.cameras[block, number] = equations.cameras[number, block] = of_lens


def _add_lens(equations: _NormalEquations, problem: WindowProblem, state: _State, jacobians: _Jacobians) -> None:
    """Fills in what belongs to the lens alone, to it and the points, and its prior."""
    priors = []
    if problem.refines_radial:
        priors.append((problem.radial.information, state.kappa - problem.radial.mean))
    if problem.refines_focal:
        priors.append((problem.focal.information, state.log_focal - problem.focal.log_ratio))
    first, num_points = len(equations.cameras) - len(priors), len(problem.points)
    for i, (column, (information, deviation)) in enumerate(zip(jacobians.by_lens, priors, strict=True), start=first):
        equations.cameras[i, i] = (column**2).sum() + information
        equations.camera_gradient[i] = (column * jacobians.residual).sum() + information * deviation
        by_both = np.einsum("noi,no->ni", jacobians.by_point, column)
        equations.coupling[i] = _summed(by_both, problem.point_index, num_points)
        for j, other in enumerate(jacobians.by_lens[: i - first], start=first):
            equations.cameras[i, j] = equations.cameras[j, i] = (column * other).sum()


def _summed(values: FloatArray, index: IntArray, num_sums: int) -> FloatArray:
    """(num_sums, d) sums of the rows (N, d) that share an index."""
    return np.stack([np.bincount(index, column, num_sums) for column in values.T], axis=1)


def _summed_outer(jacobian: FloatArray, index: IntArray, num_sums: int) -> FloatArray:
    """(num_sums, 3, 3) sums of J^T J over the rows (N, d, 3) that share an index."""
    sums = np.empty((num_sums, 3, 3))
    for i in range(3):
        for j in range(i, 3):
            products = np.asarray(sum(jacobian[:, row, i] * jacobian[:, row, j] for row in range(jacobian.shape[1])))
            sums[:, i, j] = sums[:, j, i] = np.bincount(index, products, num_sums)
    return sums


def _reduced(equations: _NormalEquations, damping: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The system left for the cameras: (C, C) matrix, (C,) gradient; and the inverse blocks (L, 3, 3) of the points."""
    inverse: FloatArray = np.asarray(np.linalg.inv(_damped(equations.points, damping)), np.float64)
    coupling = equations.coupling
    size = len(coupling)
    width = 3 * len(inverse)
    flat = _coupling_by_inverse(equations, inverse).reshape(size, width)
    system = equations.cameras - flat @ coupling.reshape(size, width).T
    gradient = equations.camera_gradient - flat @ equations.point_gradients.ravel()
    return system, gradient, inverse


def _coupling_by_inverse(equations: _NormalEquations, inverse: FloatArray) -> FloatArray:
    """(C, L, 3): the coupling times the inverse block of each point, where there is any coupling."""
    product = np.zeros_like(equations.coupling)
    num_free = int(equations.block_poses[-1]) + 1 if len(equations.block_poses) else 0
    lens = slice(6 * num_free, None)
    blocks, inverse_of = equations.blocks, inverse[equations.block_points]
    of_blocks = blocks[:, :, 0, None] * inverse_of[:, None, 0, :]
    of_lens = equations.coupling[lens, :, 0, None] * inverse[None, :, 0, :]
    for j in (1, 2):
        of_blocks += blocks[:, :, j, None] * inverse_of[:, None, j, :]
        of_lens += equations.coupling[lens, :, j, None] * inverse[None, :, j, :]
    _by_pose_and_point(product, num_free)[equations.block_poses, :, equations.block_points] = of_blocks
    product[lens] = of_lens
    return product


def _by_pose_and_point(coupling: FloatArray, num_free: int) -> FloatArray:
    """A view (P, 6, L, 3) of the coupling's rows that belong to poses."""
    return coupling[: 6 * num_free].reshape(num_free, 6, *coupling.shape[1:])


def _solve_schur(equations: _NormalEquations, damping: float) -> tuple[FloatArray, FloatArray]:
    """Steps (C,) of the cameras and (L, 3) of the points for Marquardt's scaled damping."""
    system, gradient, inverse = _reduced(equations, damping)
    diagonal = np.diag(equations.cameras)
    lift = damping * diagonal + 1e-9 * diagonal.max(initial=0.0) * (diagonal == 0) + 1e-12
    camera_step = -solve_symmetric(system + np.diag(lift), gradient)
    remainder = equations.point_gradients + np.tensordot(camera_step, equations.coupling, axes=1)
    point_step = -np.matmul(inverse, remainder[:, :, None])[:, :, 0]
    return camera_step, point_step


def _lens_information(equations: _NormalEquations, num_lens: int) -> FloatArray:
    """Information (num_lens,) in px^2 about each unknown of the lens once everything else has been marginalised."""
    system, _, _ = _reduced(equations, 0.0)
    poses, cross = system[:-num_lens, :-num_lens], system[:-num_lens, -num_lens:]
    information = system[-num_lens:, -num_lens:] - cross.T @ solve_symmetric(poses, cross)
    if num_lens == 1:
        return np.maximum(np.diag(information), 0.0)
    determinant = float(np.linalg.det(information))
    return np.maximum(determinant / np.maximum(np.diag(information)[::-1], 1e-12), 0.0)


def _damped(blocks: FloatArray, damping: float) -> FloatArray:
    """Blocks (N, d, d) with their diagonals scaled by 1 + damping, and lifted off zero."""
    size = blocks.shape[-1]
    diagonal = np.einsum("nii->ni", blocks)
    lift = diagonal * damping + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-12
    damped: FloatArray = blocks + lift[:, :, None] * np.eye(size)
    return damped
