from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import approx_fprime, least_squares

from vo.bundle import WindowProblem, optimize_window
from vo.geometry import exp_se3, reproject

FOCAL_PX = 500.0


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
