"""The pose of a camera from landmarks: against the truth, SciPy's minimum and Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import minimize
from two_view_scene import FOCAL_PX, scene, twists

from vo.absolute_pose import AbsolutePose, Landmarks, closest_pose, estimate_absolute_pose, median, refine_absolute_pose
from vo.geometry import exp_se3, invert_pose, log_se3, reproject, transform, translation_scale, triangulate
from vo.types import Rejection

pytestmark = pytest.mark.usefixtures("either_geometry")


@settings(deadline=None, max_examples=30)
@given(twists)
def test_the_jacobian_of_landmarks_is_the_numeric_derivative(xi):
    T = exp_se3(xi)
    rng = np.random.default_rng(0)
    points = transform(T, rng.uniform([-2, -2, 3], [2, 2, 9], (5, 3)))
    landmarks = Landmarks(points, rng.uniform(-0.3, 0.3, (5, 2)), FOCAL_PX)
    jacobian = landmarks.jacobian(landmarks.seen_from(T))
    for k in range(6):
        step = np.eye(6)[k] * 1e-6
        forth, back = (landmarks.seen_from(T @ exp_se3(s)).residual for s in (step, -step))
        np.testing.assert_allclose(jacobian[k], (forth - back) / 2e-6, atol=1e-6 * FOCAL_PX)


def test_the_closest_pose_is_that_of_the_least_median_error():
    T, points, _, rays1 = scene(num_points=81)
    rays1[:30] += 0.3
    poses = [T @ exp_se3(np.full(6, off)) for off in (0.02, -0.001, 0.01)]
    assert closest_pose(poses, points, rays1) is poses[1]
    assert closest_pose([np.diag([-1.0, 1.0, -1.0, 1.0]), poses[0]], points, rays1) is poses[0]


@pytest.mark.parametrize("num_values", [1, 2, 3, 8, 501])
def test_median_is_numpys(num_values):
    values = np.random.default_rng(num_values).normal(size=num_values)
    assert median(values) == np.median(values)
    assert median(np.append(values, [np.inf] * (num_values + 2))) == np.inf


def test_absolute_pose_without_a_guess():
    T, points, _, rays1 = scene()
    rng = np.random.default_rng(0)
    rays1[:150] += rng.normal(0, 50 / FOCAL_PX, (150, 2))
    pose = estimate_absolute_pose(points, rays1, FOCAL_PX, 2.0, 50)
    assert isinstance(pose, AbsolutePose)
    np.testing.assert_allclose(pose.T_world_camera, T, atol=1e-3)
    assert pose.inliers[150:].all()
    assert estimate_absolute_pose(points[:5], rays1[:5], FOCAL_PX, 2.0, 50) is Rejection.TOO_FEW_MATCHES
    wrong = rng.uniform(-0.5, 0.5, rays1.shape)
    assert estimate_absolute_pose(points, wrong, FOCAL_PX, 2.0, 50) is Rejection.TOO_FEW_INLIERS


def test_refined_absolute_pose_and_its_covariance_match_monte_carlo():
    T, points, _, rays1 = scene(num_points=200)
    errors, predicted, sigmas = [], [], []
    for seed in range(150):
        noisy = rays1 + np.random.default_rng(seed).normal(0, 0.5 / FOCAL_PX, rays1.shape)
        pose = refine_absolute_pose(T @ exp_se3(np.full(6, 0.01)), points, noisy, FOCAL_PX, 10.0)
        errors.append(log_se3(invert_pose(T) @ pose.T_world_camera))
        predicted.append(pose.covariance)
        sigmas.append(pose.sigma_px)
    ratio = np.sqrt(np.diag(np.mean(predicted, axis=0)) / np.var(errors, axis=0))
    assert (ratio > 0.8).all()
    assert (ratio < 1.25).all()
    assert np.mean(sigmas) == pytest.approx(0.5, rel=0.02)


def test_refined_absolute_pose_is_scipys_minimum_with_outliers():
    T, points, _, rays1 = scene(num_points=120, noise_px=0.6)
    rng = np.random.default_rng(3)
    rays1[:40] += rng.normal(0, 6 / FOCAL_PX, (40, 2))
    start = T @ exp_se3(np.full(6, 0.02))
    pose = refine_absolute_pose(start, points, rays1, FOCAL_PX, 4.0, 60)

    def residuals(xi):
        return (reproject(start @ exp_se3(xi), points)[0] - rays1) * FOCAL_PX / 2.0

    def cost(xi):
        return np.log1p((residuals(xi) ** 2).sum(1)).sum()

    ours = log_se3(invert_pose(start) @ pose.T_world_camera)
    from_ours = minimize(cost, ours, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})
    assert cost(ours) <= from_ours.fun + 1e-5
    errors_px = np.linalg.norm(residuals(ours) * 2.0, axis=1)
    np.testing.assert_array_equal(pose.inliers, errors_px < 4.0)
    sigma_px = np.median(errors_px[pose.inliers]) / np.sqrt(2 * np.log(2))
    assert pose.sigma_px == pytest.approx(sigma_px, rel=1e-3)
    steps = np.eye(6) * 1e-6
    moved = [reproject(pose.T_world_camera @ exp_se3(step), points[pose.inliers])[0] for step in (*steps, *-steps)]
    jacobian = (np.array(moved[:6]) - np.array(moved[6:])).reshape(6, -1).T / 2e-6 * FOCAL_PX
    expected = np.linalg.inv(jacobian.T @ jacobian) * pose.sigma_px**2
    np.testing.assert_allclose(pose.covariance, expected, rtol=1e-6)


def test_refinement_of_an_absolute_pose_from_afar():
    """Damping carries it where plain Gauss-Newton steps would overshoot."""
    T, points, _, rays1 = scene(num_points=150)
    for seed in range(5):
        xi = np.random.default_rng(seed).normal(0, 1, 6) * np.array([1.0, 1.0, 1.0, 0.12, 0.12, 0.12])
        pose = refine_absolute_pose(T @ exp_se3(xi), points, rays1, FOCAL_PX, 400.0, 100)
        np.testing.assert_allclose(pose.T_world_camera, T, atol=1e-6)
        assert pose.inliers.all()


def test_landmarks_behind_the_camera_are_no_inliers():
    T, points, _, rays1 = scene(num_points=60)
    # The mirror image through the camera has the same rays.
    mirrored = transform(T, -transform(invert_pose(T), points[:20]))
    pose = refine_absolute_pose(T, np.concatenate([points, mirrored]), np.concatenate([rays1, rays1[:20]]), 700.0, 3.0)
    assert pose.inliers[:60].all() and not pose.inliers[60:].any()
    np.testing.assert_allclose(pose.T_world_camera, T, atol=1e-9)
    nothing = refine_absolute_pose(T, mirrored, rays1[:20], 700.0, 3.0)
    assert not nothing.inliers.any() and np.isinf(nothing.covariance).all() and np.isinf(nothing.sigma_px)


@pytest.mark.parametrize("num_inliers", [0, 2, 3, 4])
def test_an_absolute_pose_of_too_few_inliers_claims_nothing(num_inliers):
    T, points, _, rays1 = scene(num_points=30)
    rays1[num_inliers:] += 5.0
    pose = refine_absolute_pose(T, points, rays1, FOCAL_PX, 1.0, 0)
    assert pose.inliers.sum() == num_inliers
    assert np.isinf(pose.covariance).all() == (num_inliers < 3)
    assert np.isinf(pose.sigma_px) == (num_inliers < 3)


def test_absolute_pose_counts_its_landmarks():
    T, points, _, rays1 = scene(num_points=40)
    assert isinstance(estimate_absolute_pose(points, rays1, FOCAL_PX, 2.0, 40), AbsolutePose)
    assert estimate_absolute_pose(points[:39], rays1[:39], FOCAL_PX, 2.0, 40) is Rejection.TOO_FEW_MATCHES
    assert estimate_absolute_pose(points[:5], rays1[:5], FOCAL_PX, 2.0, 3) is Rejection.TOO_FEW_MATCHES
    assert isinstance(estimate_absolute_pose(points[:6], rays1[:6], FOCAL_PX, 2.0, 3), AbsolutePose)
    rays1[0] += 0.5
    pose = estimate_absolute_pose(points, rays1, FOCAL_PX, 2.0, 39)
    assert isinstance(pose, AbsolutePose) and pose.inliers.sum() == 39 and not pose.inliers[0]
    assert estimate_absolute_pose(points, rays1, FOCAL_PX, 2.0, 40) is Rejection.TOO_FEW_INLIERS
    np.testing.assert_allclose(pose.T_world_camera, T, atol=1e-4)


@pytest.mark.parametrize("unit", [1e-3, 0.03, 50.0])
def test_nothing_depends_on_the_unit_of_length(unit):
    T, points, rays0, rays1 = scene(num_points=80, noise_px=0.3)
    small, near = T.copy(), points * unit
    small[:3, 3] *= unit
    start = np.concatenate([np.full(3, 0.02), np.full(3, 0.01)])
    pose, expected = (
        refine_absolute_pose(pose @ exp_se3(start * [s, s, s, 1, 1, 1]), p, rays1, FOCAL_PX, 3.0, 40)
        for pose, p, s in ((small, near, unit), (T, points, 1.0))
    )
    back = pose.T_world_camera.copy()
    back[:3, 3] /= unit
    np.testing.assert_allclose(back, expected.T_world_camera, atol=1e-6)
    np.testing.assert_array_equal(pose.inliers, expected.inliers)
    found = estimate_absolute_pose(near, rays1, FOCAL_PX, 3.0, 30)
    assert isinstance(found, AbsolutePose)
    np.testing.assert_allclose(found.T_world_camera, pose.T_world_camera, atol=1e-3)
    scale, reference = translation_scale(small, near, rays1), translation_scale(T, points, rays1)
    assert scale == pytest.approx(reference, rel=1e-6)
    midway = [triangulate(np.eye(4), pose, rays0, rays1)[0] for pose in (small, T)]
    np.testing.assert_allclose(midway[0], midway[1] * unit, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_absolute_pose_among_more_wrong_than_right_landmarks(seed):
    T, points, _, rays1 = scene(seed, 300, noise_px=0.3)
    rng = np.random.default_rng(seed)
    # Far off, and all to one side: what takes them for right is far from the truth.
    rays1[:180] += rng.uniform([0.3, 0.1], [0.9, 0.5], (180, 2))
    pose = estimate_absolute_pose(points, rays1, FOCAL_PX, 2.0, 60)
    assert isinstance(pose, AbsolutePose)
    np.testing.assert_allclose(pose.T_world_camera, T, atol=2e-2)
    assert pose.inliers[180:].mean() > 0.95 and pose.inliers[:180].mean() < 0.1


def test_damping_that_grows_at_once_still_gets_there_in_few_steps():
    """From a start that is nearly right, the steps are those of Gauss-Newton: three of them square the error away."""
    T, points, _, rays1 = scene(num_points=100)
    start = T @ exp_se3(np.array([0.05, -0.04, 0.06, 0.004, -0.006, 0.005]))
    pose = refine_absolute_pose(start, points, rays1, FOCAL_PX, 60.0, 6)
    np.testing.assert_allclose(pose.T_world_camera, T, atol=1e-7)
