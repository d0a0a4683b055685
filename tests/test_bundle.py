from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import approx_fprime, least_squares

from vo.bundle import optimize_window
from vo.bundle_problem import FocalPrior, RadialPrior, WindowProblem, corrected_rays
from vo.geometry import exp_se3, reproject

FOCAL_PX = 500.0
pytestmark = pytest.mark.usefixtures("either_geometry")


def make_problem(num_poses=5, num_points=60, noise_px=0.0, start_error=0.02, seed=0):
    """Poses along a path that all see most points; returns the truth and a problem that starts away from it."""
    rng = np.random.default_rng(seed)
    poses = np.stack(
        [exp_se3(np.array([0.4 * i, 0.05 * i, 0.2 * i, 0.01 * i, -0.03 * i, 0.02 * i])) for i in range(num_poses)]
    )
    points = rng.uniform([-3, -2, 4], [4, 2, 10], (num_points, 3))
    pose_index, point_index, rays = [], [], []
    for i, T in enumerate(poses):
        seen = np.flatnonzero(rng.random(num_points) < 0.8)
        projected, depth = reproject(T, points[seen])
        assert (depth > 0).all()
        pose_index.append(np.full(len(seen), i))
        point_index.append(seen)
        rays.append(projected + rng.normal(0, noise_px / FOCAL_PX, projected.shape))
    start = np.stack([T if i < 2 else T @ exp_se3(rng.normal(0, start_error, 6)) for i, T in enumerate(poses)])
    problem = WindowProblem(
        start,
        2,
        points + rng.normal(0, 5 * start_error, points.shape),
        np.concatenate(pose_index),
        np.concatenate(point_index),
        np.concatenate(rays),
        FOCAL_PX,
    )
    return poses, points, problem


def residuals(problem, poses, points):
    """(O, 2) px, written out with homogeneous coordinates."""
    R, t = poses[problem.pose_index, :3, :3], poses[problem.pose_index, :3, 3]
    seen = np.einsum("nji,nj->ni", R, points[problem.point_index] - t)
    return (seen[:, :2] / seen[:, 2:] - problem.rays) * problem.focal_px


def test_without_noise_the_truth_is_found():
    poses, points, problem = make_problem()
    solution = optimize_window(problem, max_iterations=60)
    np.testing.assert_allclose(solution.T_world_camera, poses, atol=1e-6)
    np.testing.assert_allclose(solution.points, points, atol=1e-5)
    assert solution.errors_px.max() < 1e-4


def test_fixed_poses_stay():
    _, _, problem = make_problem(noise_px=1.0)
    solution = optimize_window(problem)
    np.testing.assert_allclose(solution.T_world_camera[:2], problem.T_world_camera[:2], atol=1e-12)
    assert solution.final_cost < solution.initial_cost


def test_scipy_finds_no_lower_minimum_nearby():
    _, _, problem = make_problem(num_poses=4, num_points=25, noise_px=0.7)
    rng = np.random.default_rng(5)
    rays = problem.rays.copy()
    rays[::17] += rng.normal(0, 20 / FOCAL_PX, rays[::17].shape)
    problem = replace(problem, rays=rays)
    kernel_px = 1.5

    solution = optimize_window(problem, kernel_px, max_iterations=200)

    def unpack(p):
        poses = solution.T_world_camera.copy()
        for i in range(2, 4):
            poses[i] = poses[i] @ exp_se3(p[6 * (i - 2) : 6 * (i - 2) + 6])
        return poses, solution.points + p[12:].reshape(-1, 3)

    def robust(p):
        errors = np.linalg.norm(residuals(problem, *unpack(p)), axis=1)
        return np.sqrt(np.log1p((errors / kernel_px) ** 2))

    best = least_squares(robust, np.zeros(12 + 75), x_scale="jac", max_nfev=100)
    assert solution.final_cost < 0.2 * solution.initial_cost
    assert solution.final_cost == pytest.approx(2 * best.cost * kernel_px**2, rel=1e-4)


def test_cost_never_rises_and_a_single_step_follows_the_gradient():
    _, _, problem = make_problem(noise_px=0.5)
    costs = [optimize_window(problem, max_iterations=n).final_cost for n in range(1, 8)]
    assert all(later <= earlier for earlier, later in pairwise(costs))
    assert costs[0] < optimize_window(problem, max_iterations=1).initial_cost


def test_at_the_minimum_the_numeric_gradient_vanishes():
    _, _, problem = make_problem(num_poses=3, num_points=15, noise_px=0.5)
    solution = optimize_window(problem, 1.0, max_iterations=200)

    def cost(p):
        poses = solution.T_world_camera.copy()
        poses[2] = poses[2] @ exp_se3(p[:6])
        errors = np.linalg.norm(residuals(problem, poses, solution.points + p[6:].reshape(-1, 3)), axis=1)
        return float(np.log1p(errors**2).sum())

    gradient = approx_fprime(np.zeros(6 + 45), cost, 1e-7)
    start = approx_fprime(np.zeros(6 + 45) + 0.01, cost, 1e-7)
    assert np.linalg.norm(gradient) < 0.02 * np.linalg.norm(start)


def test_outliers_hardly_move_the_solution():
    poses, _, problem = make_problem(noise_px=0.2)
    rays = problem.rays.copy()
    rays[::20] += 40 / FOCAL_PX
    solution = optimize_window(replace(problem, rays=rays), 1.0, max_iterations=40)
    np.testing.assert_allclose(solution.T_world_camera, poses, atol=6e-3)
    assert (solution.errors_px[::20] > 10).mean() > 0.9


def test_malformed_problems_are_the_callers_fault():
    _, _, problem = make_problem()
    with pytest.raises(ValueError, match="num_fixed"):
        replace(problem, num_fixed=0)
    with pytest.raises(ValueError, match="pose_index"):
        replace(problem, pose_index=problem.pose_index[:-1])


# --- the lens -------------------------------------------------------------------------------------------------------


def with_wrong_lens(problem, factor, kappa=0.0):
    """The problem as it is seen through a lens whose focal length was taken for `factor` times the true one."""
    distorted = problem.rays
    for _ in range(20):
        distorted = problem.rays / (1 - kappa * (distorted**2).sum(axis=1, keepdims=True))
    return replace(problem, rays=distorted / factor, focal_px=FOCAL_PX * factor, refines_focal=True)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.2])
def test_a_wrong_focal_length_is_found(factor):
    """Two poses are held: they are right whatever the lens."""
    poses, _, problem = make_problem(num_poses=8, num_points=120, start_error=0.01)
    problem = with_wrong_lens(problem, factor)
    solution = optimize_window(problem, max_iterations=100)
    assert np.exp(solution.focal.log_ratio) == pytest.approx(1 / factor, rel=1e-4)
    np.testing.assert_allclose(solution.T_world_camera, poses, atol=1e-4)
    assert solution.focal.information > 0


def test_focal_length_and_distortion_are_told_apart():
    _, _, problem = make_problem(num_poses=10, num_points=200, noise_px=0.0, start_error=0.005)
    problem = replace(with_wrong_lens(problem, 1.1, kappa=0.01), refines_radial=True)
    solution = optimize_window(problem, max_iterations=100)
    assert np.exp(solution.focal.log_ratio) == pytest.approx(1 / 1.1, rel=2e-3)
    assert solution.radial.mean == pytest.approx(0.01, rel=0.1)


def test_the_information_about_the_focal_length_is_that_of_its_errors():
    """Over many draws of noise the estimate scatters as its information says."""
    ratios, predicted = [], []
    for seed in range(30):
        _, _, problem = make_problem(num_poses=5, num_points=60, noise_px=0.1, start_error=0.0, seed=seed)
        solution = optimize_window(with_wrong_lens(problem, 1.0), kernel_px=50.0, max_iterations=20)
        ratios.append(solution.focal.log_ratio)
        predicted.append(0.1**2 / solution.focal.information)
    measured = float(np.mean(np.square(ratios)))
    assert 0.5 < measured / np.mean(predicted) < 1.7


def test_a_prior_holds_the_focal_length_and_a_limit_ends_it():
    _, _, problem = make_problem(start_error=0.01)
    wrong = with_wrong_lens(problem, 1.2)
    held = optimize_window(replace(wrong, focal=FocalPrior(0.0, 1e12)), max_iterations=50)
    assert abs(held.focal.log_ratio) < 1e-3
    limited = optimize_window(replace(wrong, focal=FocalPrior(limit=0.05)), max_iterations=50)
    assert limited.focal.log_ratio == pytest.approx(-0.05)


def test_pure_translation_says_nothing_of_the_focal_length():
    """Without rotation every focal length explains the images, with another depth of the scene (Sturm 1997)."""
    rng = np.random.default_rng(0)
    poses = np.stack([exp_se3(np.array([0.1 * i, 0.0, 0.3 * i, 0.0, 0.0, 0.0])) for i in range(5)])
    points = rng.uniform([-3, -2, 4], [3, 2, 10], (60, 3))
    rays = np.concatenate([reproject(T, points)[0] for T in poses])
    rays += rng.normal(0, 0.3 / FOCAL_PX, rays.shape)
    index = np.repeat(np.arange(5), 60)
    problem = WindowProblem(poses, 1, points, index, np.tile(np.arange(60), 5), rays, FOCAL_PX, refines_focal=True)
    turning = make_problem(noise_px=0.3, start_error=0.0)[2]
    blind = optimize_window(problem, max_iterations=30).focal.information
    seeing = optimize_window(replace(turning, refines_focal=True), max_iterations=30).focal.information
    assert blind < 0.01 * seeing


# --- depths ---------------------------------------------------------------------------------------------------------

DEPTH_GAIN_PX = 40.0


def with_depths(problem, poses, points, noise_px=0.0, seed=1):
    """Two thirds of the observations get the inverse of their true depth."""
    rng = np.random.default_rng(seed)
    depths = np.concatenate(
        [reproject(T, points[problem.point_index[problem.pose_index == i]])[1] for i, T in enumerate(poses)]
    )
    inverse = 1 / depths + rng.normal(0, noise_px / DEPTH_GAIN_PX, depths.shape)
    inverse[rng.random(len(inverse)) < 1 / 3] = np.nan
    return replace(problem, inverse_depths=inverse, depth_gain_px=DEPTH_GAIN_PX)


def test_depths_give_the_scale():
    """With one pose held and everything else 5 % too large, depths bring the lengths back."""
    poses, points, problem = make_problem(num_poses=5)
    start = poses.copy()
    start[:, :3, 3] *= 1.05
    problem = replace(problem, T_world_camera=start, points=1.05 * points, num_fixed=1)
    free = optimize_window(problem, max_iterations=60)
    assert np.linalg.norm(free.T_world_camera[-1, :3, 3]) == pytest.approx(
        1.05 * np.linalg.norm(poses[-1, :3, 3]), rel=1e-3
    )
    held = optimize_window(with_depths(problem, poses, points), max_iterations=100)
    np.testing.assert_allclose(held.T_world_camera, poses, atol=1e-5)


def test_wrong_depths_hardly_move_the_solution():
    poses, points, problem = make_problem(num_poses=5, start_error=0.005)
    problem = with_depths(replace(problem, num_fixed=1), poses, points)
    inverse = problem.inverse_depths.copy()
    inverse[::10] *= 2.0
    solution = optimize_window(replace(problem, inverse_depths=inverse), max_iterations=100)
    np.testing.assert_allclose(solution.T_world_camera, poses, atol=5e-3)


def test_scipy_finds_no_lower_minimum_with_lens_and_depths():
    """Everything at once: poses, points, distortion, focal length, depths, priors and outliers."""
    poses, points, problem = make_problem(num_poses=4, num_points=25, noise_px=0.5, start_error=0.005)
    problem = with_depths(with_wrong_lens(problem, 1.05, 0.01), poses, points, noise_px=0.3)
    inverse = problem.inverse_depths.copy()
    inverse[::13] *= 1.5
    problem = replace(
        problem,
        num_fixed=1,
        inverse_depths=inverse,
        refines_radial=True,
        radial=RadialPrior(0.002, 1e4),
        focal=FocalPrior(0.01, 1e2),
    )
    kernel_px = 1.5
    solution = optimize_window(problem, kernel_px, max_iterations=300)

    def robust(p):
        T = solution.T_world_camera.copy()
        for i in range(1, 4):
            T[i] = T[i] @ exp_se3(p[6 * (i - 1) : 6 * i])
        kappa, log_focal = solution.radial.mean + p[18], solution.focal.log_ratio + p[19]
        seen = replace(problem, rays=corrected_rays(problem.rays / np.exp(log_focal), kappa))
        moved = solution.points + p[20:].reshape(-1, 3)
        image_px = np.linalg.norm(residuals(seen, T, moved), axis=1) * np.exp(log_focal)
        z = np.einsum(
            "nj,nj->n", T[problem.pose_index, :3, 2], moved[problem.point_index] - T[problem.pose_index, :3, 3]
        )
        depth_px = (DEPTH_GAIN_PX * (1 / z - inverse))[np.isfinite(inverse)]
        errors = np.concatenate([image_px, depth_px])
        prior = [100 * (kappa - 0.002), 10 * (log_focal - 0.01)]
        return np.concatenate([kernel_px * np.sqrt(np.log1p((errors / kernel_px) ** 2)), prior])

    best = least_squares(robust, np.zeros(20 + 75), x_scale="jac", max_nfev=100)
    assert 2 * (0.5 * (robust(np.zeros(95)) ** 2).sum()) == pytest.approx(solution.final_cost, rel=1e-9)
    assert solution.final_cost == pytest.approx(2 * best.cost, rel=1e-4)


def test_depths_of_another_number_are_the_callers_fault():
    _, _, problem = make_problem()
    with pytest.raises(ValueError, match="inverse_depths"):
        replace(problem, inverse_depths=np.ones(3))
