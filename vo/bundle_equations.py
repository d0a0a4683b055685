"""The normal equations of a bundle adjustment, in NumPy or compiled: cost, linearisation, elimination of the points.

Landmarks are eliminated by the Schur complement (Triggs et al., "Bundle adjustment: a modern synthesis", section 6.1),
which leaves a dense system of six unknowns per free pose, and those of the lens. Both ways give the same sums but for
rounding; a window takes a fifth of the time compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vo.bundle_problem import IntArray, WindowProblem, WindowState, corrected_rays
from vo.geometry import reproject_each
from vo.kernels import Kernels, Window, kernels, window
from vo.types import FloatArray


class NormalEquations(Protocol):
    """Blocks of J^T W J and J^T W r for C camera unknowns (six per free pose, then those of the lens) and L points."""

    @property
    def cameras(self) -> FloatArray:
        """(C, C), before the points are taken out."""

    def reduced(self, damping: float) -> tuple[FloatArray, FloatArray]:
        """The system left for the cameras: (C, C) matrix, (C,) gradient; points by Marquardt's scaled damping."""

    def point_steps(self, camera_step: FloatArray) -> FloatArray:
        """Steps (L, 3) of the points beside those (C,) of the cameras, by the damping of the last `reduced`."""


class WindowSums(Protocol):
    """One problem at a time; what it gives is valid until it is asked for the next."""

    def cost(self, state: WindowState) -> float:
        """Cauchy cost with the priors of the lens.

        A point behind a camera costs as much as a very large error, so that no step moves it there.
        """

    def errors_px(self, state: WindowState) -> FloatArray:
        """(O,) lengths of the residuals in the image, infinite behind a camera."""

    def linearize(self, state: WindowState) -> NormalEquations:
        """Gauss-Newton blocks at the state; every observation weighted by the kernel."""


def window_sums(problem: WindowProblem, kernel_px: float) -> WindowSums:
    """Compiled where that is to be had."""
    compiled = kernels()
    return NumpySums(problem, kernel_px) if compiled is None else CompiledSums(problem, kernel_px, compiled)


def _residuals(problem: WindowProblem, state: WindowState) -> tuple[FloatArray, FloatArray]:
    """(O, 2) px and depths (O,); infinite where the depth is not positive.

    In px of the image, whatever the focal length: on the plane z = 1 a longer one would shrink every residual.
    """
    projected, depth = reproject_each(state.T[problem.pose_index], state.points[problem.point_index])
    residual = (projected - _seen_rays(problem, state)) * (problem.focal_px * np.exp(state.log_focal))
    return np.where(depth[:, None] > 0, residual, np.inf), depth


def _seen_rays(problem: WindowProblem, state: WindowState) -> FloatArray:
    """The observations (O, 2) on the plane z = 1 as the lens of the state has them."""
    return corrected_rays(problem.rays * np.exp(-state.log_focal), state.kappa)


def _prior_cost(problem: WindowProblem, state: WindowState) -> float:
    deviation, ratio = state.kappa - problem.radial.mean, state.log_focal - problem.focal.log_ratio
    return problem.radial.information * deviation**2 + problem.focal.information * ratio**2


def _add_priors(cameras: FloatArray, camera_gradient: FloatArray, problem: WindowProblem, state: WindowState) -> None:
    """What is known of the lens, whose unknowns come last."""
    number = len(cameras) - problem.num_lens
    if problem.refines_radial:
        cameras[number, number] += problem.radial.information
        camera_gradient[number] += problem.radial.information * (state.kappa - problem.radial.mean)
        number += 1
    if problem.refines_focal:
        cameras[number, number] += problem.focal.information
        camera_gradient[number] += problem.focal.information * (state.log_focal - problem.focal.log_ratio)


# --- compiled -------------------------------------------------------------------------------------------------------


class CompiledSums:
    """`WindowSums` by kernels.c."""

    def __init__(self, problem: WindowProblem, kernel_px: float, compiled: Kernels) -> None:
        self._problem = problem
        self._kernel_px = kernel_px
        self._compiled = compiled
        pose_index, point_index = (_contiguous(index, np.int64) for index in (problem.pose_index, problem.point_index))
        self._observations = (_contiguous(problem.rays, np.float64), pose_index, point_index)
        depths = problem.inverse_depths
        self._depths = None if depths is None else _contiguous(depths, np.float64)
        first = int(np.searchsorted(pose_index, problem.num_fixed))
        self._block_poses = pose_index[first:] - problem.num_fixed
        # The blocks of each point, its poses ascending.
        self._rows = np.argsort(point_index[first:], kind="stable")
        counts = np.bincount(point_index[first:], minlength=len(problem.points))
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def cost(self, state: WindowState) -> float:
        poses, points = _contiguous(state.T, np.float64), _contiguous(state.points, np.float64)
        return self._compiled.window_cost(self._window(state, poses, points)) + _prior_cost(self._problem, state)

    def errors_px(self, state: WindowState) -> FloatArray:
        poses, points = _contiguous(state.T, np.float64), _contiguous(state.points, np.float64)
        return self._compiled.window_errors(self._window(state, poses, points))

    def linearize(self, state: WindowState) -> NormalEquations:
        problem = self._problem
        poses, points = _contiguous(state.T, np.float64), _contiguous(state.points, np.float64)
        num_free, num_lens, num_points = len(poses) - problem.num_fixed, problem.num_lens, len(points)
        size = 6 * num_free + num_lens
        sums = _CompiledEquations(
            np.zeros((size, size)),
            np.zeros(size),
            np.zeros((num_points, 3, 3)),
            np.zeros((num_points, 3)),
            np.empty((len(self._block_poses), 6, 3)),
            np.zeros((num_lens, num_points, 3)),
            (self._rows, self._starts, self._block_poses),
            np.empty((num_points, 3, 3)),
            self._compiled,
        )
        self._compiled.window_linearize(
            self._window(state, poses, points),
            *(sums.cameras, sums.camera_gradient, sums.points, sums.point_gradients, sums.blocks, sums.lens_points),
        )
        _add_priors(sums.cameras, sums.camera_gradient, problem, state)
        return sums

    def _window(self, state: WindowState, poses: FloatArray, points: FloatArray) -> Window:
        problem = self._problem
        numbers = (problem.focal_px, state.kappa, state.log_focal, problem.depth_gain_px, self._kernel_px)
        refines = (problem.refines_radial, problem.refines_focal)
        return window(poses, points, self._observations, self._depths, problem.num_fixed, refines, numbers)


@dataclass(frozen=True, slots=True, eq=False)
class _CompiledEquations:
    """cameras (C, C), camera_gradient (C,), points (L, 3, 3), point_gradients (L, 3), blocks (F, 6, 3) of the F
    observations of free poses, lens_points (lens, L, 3); order: blocks of each point, where each begins, their poses;
    inverse (L, 3, 3): room for those of the points.
    """

    cameras: FloatArray
    camera_gradient: FloatArray
    points: FloatArray
    point_gradients: FloatArray
    blocks: FloatArray
    lens_points: FloatArray
    order: tuple[IntArray, IntArray, IntArray]
    inverse: FloatArray
    compiled: Kernels

    @property
    def _counts(self) -> tuple[int, int, int]:
        num_lens = len(self.lens_points)
        return (len(self.cameras) - num_lens) // 6, num_lens, len(self.points)

    def reduced(self, damping: float) -> tuple[FloatArray, FloatArray]:
        system, gradient = self.cameras.copy(), self.camera_gradient.copy()
        given = (*self.order, self.blocks, self.lens_points, self.points, self.point_gradients)
        self.compiled.window_reduce(self._counts, given, damping, self.inverse, system, gradient)
        return system, gradient

    def point_steps(self, camera_step: FloatArray) -> FloatArray:
        steps = np.empty_like(self.point_gradients)
        given = (
            self.blocks,
            self.lens_points,
            self.point_gradients,
            self.inverse,
            _contiguous(camera_step, np.float64),
        )
        self.compiled.window_points(self._counts, *self.order, *given, steps)
        return steps


def _contiguous(array: NDArray[np.generic], kind: type) -> NDArray:  # type: ignore[type-arg]
    return np.ascontiguousarray(array, dtype=kind)


# --- NumPy ----------------------------------------------------------------------------------------------------------


class NumpySums:
    """`WindowSums` on whole arrays."""

    def __init__(self, problem: WindowProblem, kernel_px: float) -> None:
        self._problem = problem
        self._kernel_px = kernel_px

    def cost(self, state: WindowState) -> float:
        problem, kernel_px = self._problem, self._kernel_px
        residual, depth = _residuals(problem, state)
        squared = np.minimum((residual**2).sum(axis=1), 1e6)
        cost = float(kernel_px**2 * np.log1p(squared / kernel_px**2).sum())
        if problem.inverse_depths is not None:
            is_known = np.isfinite(problem.inverse_depths) & (depth > 0)
            off_px = (1.0 / depth[is_known] - problem.inverse_depths[is_known]) * problem.depth_gain_px
            cost += float(kernel_px**2 * np.log1p(np.minimum(off_px**2, 1e6) / kernel_px**2).sum())
        return cost + _prior_cost(problem, state)

    def errors_px(self, state: WindowState) -> FloatArray:
        lengths: FloatArray = np.linalg.norm(_residuals(self._problem, state)[0], axis=1)
        return lengths

    def linearize(self, state: WindowState) -> NormalEquations:
        problem = self._problem
        jacobians = _weighted_jacobians(problem, state, self._kernel_px)
        num_free, num_points = len(state.T) - problem.num_fixed, len(state.points)
        size = 6 * num_free + problem.num_lens
        by_point, residual = jacobians.by_point, jacobians.residual
        first = len(problem.pose_index) - len(jacobians.by_pose)
        equations = _NumpyEquations(
            np.zeros((size, size)),
            np.zeros(size),
            _summed_outer(by_point, problem.point_index, num_points),
            _summed(np.einsum("noi,no->ni", by_point, residual), problem.point_index, num_points),
            np.zeros((size, num_points, 3)),
            _pose_point_blocks(jacobians.by_pose, by_point[first:]),
            problem.pose_index[first:] - problem.num_fixed,
            problem.point_index[first:],
            np.empty((num_points, 3, 3)),
        )
        _couple_poses(equations, problem, jacobians)
        _add_lens(equations, problem, jacobians)
        _add_priors(equations.cameras, equations.camera_gradient, problem, state)
        return equations


@dataclass(frozen=True, slots=True, eq=False)
class _NumpyEquations:
    """Blocks of J^T W J and J^T W r for C camera unknowns (six per free pose, then those of the lens) and L points.

    cameras (C, C), camera_gradient (C,), points (L, 3, 3), point_gradients (L, 3), coupling (C, L, 3). A pose and a
    point that does not see it are not coupled: `blocks` (F, 6, 3) are all that is not zero there, `block_poses` (F,)
    and `block_points` (F,) where they stand. inverse (L, 3, 3): room for those of the points.
    """

    cameras: FloatArray
    camera_gradient: FloatArray
    points: FloatArray
    point_gradients: FloatArray
    coupling: FloatArray
    blocks: FloatArray
    block_poses: IntArray
    block_points: IntArray
    inverse: FloatArray

    def reduced(self, damping: float) -> tuple[FloatArray, FloatArray]:
        self.inverse[:] = np.linalg.inv(_damped(self.points, damping))
        coupling, size = self.coupling, len(self.coupling)
        width = 3 * len(self.inverse)
        flat = _coupling_by_inverse(self, self.inverse).reshape(size, width)
        system = self.cameras - flat @ coupling.reshape(size, width).T
        gradient = self.camera_gradient - flat @ self.point_gradients.ravel()
        return system, gradient

    def point_steps(self, camera_step: FloatArray) -> FloatArray:
        remainder = self.point_gradients + np.tensordot(camera_step, self.coupling, axes=1)
        steps: FloatArray = -np.matmul(self.inverse, remainder[:, :, None])[:, :, 0]
        return steps


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


def _weighted_jacobians(problem: WindowProblem, state: WindowState, kernel_px: float) -> _Jacobians:
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


def _by_lens(problem: WindowProblem, state: WindowState, uv: FloatArray, gain: FloatArray) -> tuple[FloatArray, ...]:
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


def _couple_poses(equations: _NumpyEquations, problem: WindowProblem, jacobians: _Jacobians) -> None:
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


def _add_lens(equations: _NumpyEquations, problem: WindowProblem, jacobians: _Jacobians) -> None:
    """Fills in what belongs to the lens alone, and to it and the points."""
    first, num_points = len(equations.cameras) - problem.num_lens, len(problem.points)
    for i, column in enumerate(jacobians.by_lens, start=first):
        equations.camera_gradient[i] = (column * jacobians.residual).sum()
        by_both = np.einsum("noi,no->ni", jacobians.by_point, column)
        equations.coupling[i] = _summed(by_both, problem.point_index, num_points)
        for j, other in enumerate(jacobians.by_lens[: i - first + 1], start=first):
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


def _coupling_by_inverse(equations: _NumpyEquations, inverse: FloatArray) -> FloatArray:
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


def _damped(blocks: FloatArray, damping: float) -> FloatArray:
    """Blocks (N, d, d) with their diagonals scaled by 1 + damping, and lifted off zero."""
    size = blocks.shape[-1]
    diagonal = np.einsum("nii->ni", blocks)
    lift = diagonal * damping + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-12
    damped: FloatArray = blocks + lift[:, :, None] * np.eye(size)
    return damped
