"""The focal length from the map itself: bundle adjustment of many keyframes with the lens among the unknowns.

A camera that only moves straight ahead, or only turns, shows nothing of its focal length: another one explains the same
images with another scene (Sturm, "Critical motion sequences for monocular self-calibration", 1997). So the result comes
with its standard deviation, and it is for the caller to wait for a better one. A start that is 20 % off lies in a long
bent valley of the cost; the search therefore begins at several focal lengths, each with the poses it would have given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vo.bundle import optimize_window
from vo.bundle_problem import WindowProblem, WindowSolution, corrected_rays
from vo.config import SelfCalibrationConfig
from vo.geometry import exp_so3, invert_pose, log_so3, make_pose, triangulate
from vo.types import Camera, CameraModel

IntArray = NDArray[np.int64]

# Focal lengths to begin at, over the present one, while nothing is known of it.
_STARTS = (0.75, 0.87, 1.0, 1.15, 1.33)
_MAX_POINTS = 800
_MIN_POINTS_PER_POSE = 40
_ITERATIONS = 40
# Median of a Rayleigh distribution over its parameter.
_RAYLEIGH_MEDIAN = 1.1774
# Errors of one track are alike from frame to frame, and lenses are no polynomials: the scatter of the residuals alone
# promises several times too much. Measured on sequences with known focal length.
_OVERCONFIDENCE = 3.0
_FLOOR = 0.003
# Below this change, and at a third of the uncertainty allowed, looking again is over.
_SETTLED_CHANGE = 0.01


@dataclass(frozen=True, slots=True)
class FocalEstimate:
    """What has been found of the focal length.

    focal_px    geometric mean of both, px; the initial one while nothing better is known.
    sigma_px    standard deviation; None before the first try.
    is_found    whether `focal_px` comes from the images. False: they do not show it, because the camera has not turned
                and moved enough, or not long enough, and the initial one was kept.
    initial_px  where the search began.
    radial      distortion found along, added to the camera's first coefficient.
    """

    focal_px: float
    sigma_px: float | None
    is_found: bool
    initial_px: float
    radial: float = 0.0


class FocalSearch:
    """When to look for the focal length, and what to believe of what was found."""

    def __init__(self, config: SelfCalibrationConfig, camera: Camera) -> None:
        self._config = config
        self._last_try, self._next_try = 0, config.min_keyframes
        self._is_settled = not config.enabled
        self.estimate = FocalEstimate(camera.focal_px, None, False, camera.focal_px)

    def is_due(self, num_keyframes: int, *, is_last: bool = False) -> bool:
        """Whether to look now, with so many keyframes since the beginning; tries become rarer with their number."""
        if self._is_settled or num_keyframes < self._config.min_keyframes:
            return False
        return num_keyframes >= self._next_try or (is_last and num_keyframes > self._last_try)

    def begin(self, num_keyframes: int) -> None:
        """Notes a try."""
        self._last_try, self._next_try = num_keyframes, num_keyframes + max(6, num_keyframes // 4)

    @property
    def starts(self) -> tuple[float, ...]:
        """Focal lengths to begin at, over the present one."""
        return (1.0,) if self.estimate.is_found else _STARTS

    def take_in(self, camera: Camera, solution: WindowSolution) -> Camera | None:
        """The camera that a solution for `camera` leads to; None where it is not to be believed."""
        sigma = focal_sigma(solution)
        log_ratio = solution.focal.log_ratio
        if sigma > self._config.max_sigma:
            if not self.estimate.is_found:
                self.estimate = replace(self.estimate, sigma_px=min(sigma, 10.0) * camera.focal_px)
            return None
        self._is_settled = abs(log_ratio) < _SETTLED_CHANGE and sigma < self._config.max_sigma / 3
        found = with_lens(camera, log_ratio, solution.radial.mean)
        radial = self.estimate.radial + solution.radial.mean
        self.estimate = FocalEstimate(found.focal_px, sigma * found.focal_px, True, self.estimate.initial_px, radial)
        return found


def focal_sigma(solution: WindowSolution) -> float:
    """Standard deviation of the logarithm of the focal length, what the residuals do not show included."""
    noise_px = float(np.median(solution.errors_px)) / _RAYLEIGH_MEDIAN
    scatter = noise_px / math.sqrt(max(solution.focal.information, 1e-12))
    return math.hypot(_OVERCONFIDENCE * scatter, _FLOOR)


def with_lens(camera: Camera, log_ratio: float, kappa: float) -> Camera:
    """The camera with its focal lengths times exp(log_ratio) and a leftover radial distortion kappa taken in.

    To first order in kappa, which joins the first coefficient; a fisheye camera, whose coefficients mean something
    else, has none to take in.
    """
    K = camera.K.copy()
    K[0, 0] *= math.exp(log_ratio)
    K[1, 1] *= math.exp(log_ratio)
    if kappa == 0.0:
        return Camera(camera.width, camera.height, K, camera.distortion.copy(), camera.model)
    if camera.model is CameraModel.FISHEYE:
        raise ValueError("kappa: a fisheye camera takes no radial distortion of this kind")
    distortion = np.zeros(4) if camera.model is CameraModel.PINHOLE else camera.distortion.copy()
    distortion[0] += kappa
    return Camera(camera.width, camera.height, K, distortion, CameraModel.BROWN)


def solve_lens(problem: WindowProblem, kernel_px: float, starts: Sequence[float] = _STARTS) -> WindowSolution:
    """Refines everything at once: poses, landmarks, leftover distortion where the problem asks for it, focal length.

    problem  with its priors; the first pose is held.
    starts   focal lengths to begin at, over the problem's.
    """
    sample = _sampled(replace(problem, refines_radial=False, refines_focal=True))
    if len(starts) > 1:
        begun = [_posed_for(sample, factor) for factor in starts]
        ended = [optimize_window(start, kernel_px, 4) for start in begun]
        best = int(np.argmin([solution.final_cost for solution in ended]))
        sample = _taken_over(begun[best], ended[best])
    # The focal length first: next to a wrong one, distortion takes its place and does not let go.
    solution = optimize_window(sample, kernel_px, _ITERATIONS)
    joint = replace(_taken_over(sample, solution), refines_radial=problem.refines_radial)
    solution = optimize_window(joint, kernel_px, _ITERATIONS)
    return _with_all_points(problem, solution, kernel_px)


def _with_all_points(problem: WindowProblem, sample: WindowSolution, kernel_px: float) -> WindowSolution:
    """The solution for all landmarks: poses and lens stay where the sample has them."""
    seen = corrected_rays(problem.rays * math.exp(-sample.focal.log_ratio), sample.radial.mean)
    first, last = _first_and_last(problem)
    T = sample.T_world_camera
    points, _ = triangulate(T[problem.pose_index[first]], T[problem.pose_index[last]], seen[first], seen[last])
    fixed = replace(
        problem,
        T_world_camera=T,
        num_fixed=len(T),
        points=points,
        radial=sample.radial,
        refines_radial=False,
        focal=sample.focal,
        refines_focal=False,
    )
    solution = optimize_window(fixed, kernel_px, 10)
    return replace(solution, T_world_camera=T, radial=sample.radial, focal=sample.focal)


def _first_and_last(problem: WindowProblem) -> tuple[IntArray, IntArray]:
    """Rows (L,) and (L,) of each point's first and last observation; observations lie pose after pose."""
    rows = np.arange(len(problem.point_index))
    first, last = np.zeros(len(problem.points), np.int64), np.zeros(len(problem.points), np.int64)
    first[problem.point_index[::-1]] = rows[::-1]
    last[problem.point_index] = rows
    return first, last


def _taken_over(problem: WindowProblem, solution: WindowSolution) -> WindowProblem:
    """The problem, begun where a solution ended."""
    focal = replace(problem.focal, log_ratio=solution.focal.log_ratio)
    return replace(problem, T_world_camera=solution.T_world_camera, points=solution.points, focal=focal)


def _sampled(problem: WindowProblem) -> WindowProblem:
    """The problem with the landmarks that most keyframes see, which say most, and no more than are needed."""
    counts = np.bincount(problem.point_index, minlength=len(problem.points))
    ranked = np.argsort(-counts, kind="stable")
    rank = np.empty(len(ranked), np.int64)
    rank[ranked] = np.arange(len(ranked))
    chosen = [ranked[:_MAX_POINTS]]
    # Every keyframe needs some, whose landmarks may all be young.
    for i in range(len(problem.T_world_camera)):
        mine = problem.point_index[problem.pose_index == i]
        chosen.append(mine[np.argsort(rank[mine])[:_MIN_POINTS_PER_POSE]])
    kept = np.unique(np.concatenate(chosen))
    number = np.full(len(problem.points), -1)
    number[kept] = np.arange(len(kept))
    rows = number[problem.point_index] >= 0
    inverse_depths = None if problem.inverse_depths is None else problem.inverse_depths[rows]
    return replace(
        problem,
        points=problem.points[kept],
        pose_index=problem.pose_index[rows],
        point_index=number[problem.point_index[rows]],
        rays=problem.rays[rows],
        inverse_depths=inverse_depths,
    )


def _posed_for(problem: WindowProblem, factor: float) -> WindowProblem:
    """The problem as the same images would have posed it with a focal length `factor` times as long.

    To first order every motion from keyframe to keyframe turns, and moves sideways, by so much less, and every landmark
    lies by so much nearer to the axis of the camera that saw it first; depths and forward motion stay.
    """
    T_old = problem.T_world_camera
    T_new = [T_old[0]]
    for before, after in pairwise(T_old):
        motion = invert_pose(before) @ after
        turn, move = log_so3(motion[:3, :3]), motion[:3, 3].copy()
        turn[:2] /= factor
        move[:2] /= factor
        T_new.append(T_new[-1] @ make_pose(exp_so3(turn), move))
    stacked = np.stack(T_new)
    seen_first = problem.pose_index[_first_and_last(problem)[0]]
    R, t = T_old[seen_first, :3, :3], T_old[seen_first, :3, 3]
    local = np.einsum("nji,nj->ni", R, problem.points - t)
    local[:, :2] /= factor
    points = np.einsum("nij,nj->ni", stacked[seen_first, :3, :3], local) + stacked[seen_first, :3, 3]
    focal = replace(problem.focal, log_ratio=problem.focal.log_ratio + math.log(factor))
    return replace(problem, T_world_camera=stacked, points=points, focal=focal)
