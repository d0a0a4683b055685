from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import expm
from scipy.optimize import least_squares

from vo.config import TwoViewConfig
from vo.geometry import (
    AbsolutePose,
    essential_matrix,
    estimate_absolute_pose,
    estimate_relative_pose,
    exp_se3,
    exp_so3,
    fit_rotation,
    homogeneous,
    invert_pose,
    log_se3,
    make_pose,
    orthonormalized,
    parallax,
    project,
    ray_depths,
    refine_absolute_pose,
    refine_relative_pose,
    reproject,
    reprojection_jacobians,
    rotation_angle,
    sampson_distance,
    skew,
    transform,
    translation_scale,
    triangulate,
    undistort,
)
from vo.types import Camera, CameraModel, Rejection, RelativePose

FOCAL_PX = 700.0
K = np.array([[700.0, 0.0, 319.5], [0.0, 690.0, 241.0], [0.0, 0.0, 1.0]])
twists = arrays(np.float64, 6, elements=st.floats(-1.5, 1.5))
CONFIG = TwoViewConfig()


def scene(seed: int = 0, num_points: int = 500, noise_px: float = 0.0):
    """A forward motion with a turn: T_camera0_camera1, points in camera 0, rays in both cameras."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([-8, -3, 4], [8, 3, 30], (num_points, 3))
    T = exp_se3(np.array([0.15, -0.05, 1.0, 0.01, 0.04, -0.01]))
    moved = transform(invert_pose(T), points)
    rays0, rays1 = points[:, :2] / points[:, 2:], moved[:, :2] / moved[:, 2:]
    noise = rng.normal(0, noise_px / FOCAL_PX, (2, num_points, 2))
    return T, points, rays0 + noise[0], rays1 + noise[1]


def pose_error(estimate, truth):
    """Rotation error and angle between the translations, both in degrees."""
    rotation = np.rad2deg(rotation_angle(estimate[:3, :3].T @ truth[:3, :3]))
    a, b = estimate[:3, 3], truth[:3, 3]
    direction = np.arctan2(np.linalg.norm(np.cross(a, b)), a @ b)
    return rotation, np.rad2deg(direction)


@settings(deadline=None, max_examples=60)
@given(twists)
def test_exponential_agrees_with_the_matrix_exponential(xi):
    generator = np.zeros((4, 4))
    generator[:3, :3], generator[:3, 3] = skew(xi[3:]), xi[:3]
    np.testing.assert_allclose(exp_se3(xi), expm(generator), atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(twists)
def test_logarithm_inverts_the_exponential(xi):
    np.testing.assert_allclose(log_se3(exp_se3(xi)), xi, atol=1e-8)


@settings(deadline=None, max_examples=40)
@given(twists, twists)
def test_frames_cancel(xi_ab, xi_bc):
    T_a_b, T_b_c = exp_se3(xi_ab), exp_se3(xi_bc)
    point_c = np.array([[0.3, -2.0, 5.0]])
    np.testing.assert_allclose(
        transform(T_a_b @ T_b_c, point_c), transform(T_a_b, transform(T_b_c, point_c)), atol=1e-9
    )
    np.testing.assert_allclose(invert_pose(T_a_b) @ T_a_b, np.eye(4), atol=1e-12)


def test_orthonormalized_returns_to_the_group():
    T = exp_se3(np.array([1.0, 2.0, 3.0, 0.4, -0.5, 0.6]))
    drifted = T.copy()
    drifted[:3, :3] *= 1.001
    restored = orthonormalized(drifted)
    np.testing.assert_allclose(restored, T, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "distortion"),
    [
        (CameraModel.PINHOLE, np.zeros(0)),
        (CameraModel.BROWN, np.array([-0.28, 0.074, 0.0002, 0.00002])),
        (CameraModel.BROWN, np.array([0.2624, -0.9531, -0.0054, 0.0026, 1.1633])),
        (CameraModel.FISHEYE, np.array([-0.01, 0.02, -0.005, 0.001])),
    ],
)
def test_undistort_inverts_project(model, distortion):
    camera = Camera(640, 480, K.copy(), distortion, model)
    rays = np.random.default_rng(0).uniform([-0.4, -0.3], [0.4, 0.3], (200, 2))
    pixels = project(homogeneous(rays) * 3.0, camera)
    np.testing.assert_allclose(undistort(pixels, camera), rays, atol=1e-7)


def test_projection_of_a_brown_camera_follows_its_polynomial():
    k1, k2, p1, p2 = -0.28, 0.074, 0.0002, 0.00002
    camera = Camera(640, 480, K.copy(), np.array([k1, k2, p1, p2]), CameraModel.BROWN)
    x, y = 0.3, -0.2
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2
    distorted = np.array(
        [x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y, 1.0]
    )
    np.testing.assert_allclose(project(np.array([[x, y, 1.0]]), camera)[0], (K @ distorted)[:2], atol=1e-9)


def test_projection_behind_the_camera_is_nan():
    camera = Camera(640, 480, K.copy())
    assert np.isnan(project(np.array([[0.0, 0.0, -1.0]]), camera)).all()
    assert project(np.zeros((0, 3)), camera).shape == (0, 2)


def test_sampson_distance_is_the_distance_to_the_constraint_to_first_order():
    T, _, rays0, rays1 = scene()
    E = essential_matrix(T)
    np.testing.assert_allclose(sampson_distance(E, rays0, rays1), 0.0, atol=1e-12)
    pushed = rays0 + np.random.default_rng(1).normal(0, 1e-4, rays0.shape)
    # The exact distance: the smallest change of both rays that satisfies the constraint, found by optimisation.
    for row in range(5):
        start = np.concatenate([pushed[row], rays1[row]])

        def constraint(z):
            return np.append(z[:2], 1.0) @ E @ np.append(z[2:], 1.0)

        best = least_squares(lambda z, s=start: np.append(z - s, 1e6 * constraint(z)), start, xtol=1e-15, ftol=1e-15)
        exact = np.linalg.norm(best.x - start)
        assert abs(sampson_distance(E, pushed[row : row + 1], rays1[row : row + 1])[0]) == pytest.approx(
            exact, rel=0.02
        )


@pytest.mark.parametrize("method", ["usac_magsac", "usac_accurate", "ransac"])
def test_relative_pose_is_camera1_in_camera0(method):
    T, _, rays0, rays1 = scene()
    relative = estimate_relative_pose(rays0, rays1, FOCAL_PX, TwoViewConfig(method=method))
    assert isinstance(relative, RelativePose)
    expected = make_pose(T[:3, :3], T[:3, 3] / np.linalg.norm(T[:3, 3]))
    np.testing.assert_allclose(relative.T_camera0_camera1, expected, atol=1e-6)
    assert relative.inliers.all()
    assert not relative.is_metric


def test_relative_pose_survives_outliers_and_marks_them():
    T, _, rays0, rays1 = scene(noise_px=0.3)
    rng = np.random.default_rng(2)
    wrong = rng.random(len(rays1)) < 0.4
    rays1[wrong] += rng.normal(0, 60 / FOCAL_PX, (wrong.sum(), 2))
    relative = estimate_relative_pose(rays0, rays1, FOCAL_PX, CONFIG)
    assert isinstance(relative, RelativePose)
    rotation, direction = pose_error(relative.T_camera0_camera1, T)
    assert rotation < 0.05
    assert direction < 0.5
    assert relative.inliers[~wrong].mean() > 0.97
    assert relative.inliers[wrong].mean() < 0.15


def test_relative_pose_is_no_worse_than_recover_pose():
    errors = []
    for seed in range(8):
        T, _, rays0, rays1 = scene(seed, 300, noise_px=0.5)
        relative = estimate_relative_pose(rays0, rays1, FOCAL_PX, CONFIG)
        E, mask = cv2.findEssentialMat(rays1, rays0, np.eye(3), cv2.USAC_MAGSAC, 0.999, 1 / FOCAL_PX)
        _, R, t, _ = cv2.recoverPose(E, rays1, rays0, np.eye(3), mask=mask)
        errors.append((pose_error(relative.T_camera0_camera1, T), pose_error(make_pose(R, t[:, 0]), T)))
    ours, theirs = np.median(np.array(errors), axis=0)
    assert (ours <= theirs * 1.05).all()


def test_same_matches_give_the_same_pose():
    _, _, rays0, rays1 = scene(noise_px=0.5)
    first, second = (estimate_relative_pose(rays0, rays1, FOCAL_PX, CONFIG) for _ in range(2))
    np.testing.assert_array_equal(first.T_camera0_camera1, second.T_camera0_camera1)


def test_every_way_to_fail_has_its_value():
    _, _, rays0, rays1 = scene()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1 / FOCAL_PX, rays0.shape)
    turned = homogeneous(rays0) @ exp_so3(np.array([0.02, 0.05, 0.01]))
    scrambled = rng.uniform(-0.4, 0.4, rays0.shape)
    assert estimate_relative_pose(rays0[:10], rays1[:10], FOCAL_PX, CONFIG) is Rejection.TOO_FEW_MATCHES
    assert estimate_relative_pose(rays0, rays0 + noise, FOCAL_PX, CONFIG) is Rejection.LOW_PARALLAX
    pure = turned[:, :2] / turned[:, 2:] + noise
    assert estimate_relative_pose(rays0, pure, FOCAL_PX, CONFIG) is Rejection.PURE_ROTATION
    strict = TwoViewConfig(min_inliers=400, threshold_px=0.3)
    assert estimate_relative_pose(rays0, scrambled, FOCAL_PX, strict) is Rejection.TOO_FEW_INLIERS
    same = np.zeros((50, 2))
    assert isinstance(estimate_relative_pose(same, same, FOCAL_PX, CONFIG), Rejection)


def test_refined_relative_pose_is_scipys_minimum():
    T, _, rays0, rays1 = scene(noise_px=0.5)
    scale = 1.0 / FOCAL_PX
    refined, _ = refine_relative_pose(T, rays0, rays1, scale, 50)

    def residual(p):
        t = T[:3, 3] + p[:3]
        candidate = make_pose(T[:3, :3] @ exp_so3(p[3:]), t / np.linalg.norm(t))
        return sampson_distance(essential_matrix(candidate), rays0, rays1) / scale

    def geman_mcclure(z):
        return np.stack([z / (1 + z), 1 / (1 + z) ** 2, -2 / (1 + z) ** 3])

    best = least_squares(residual, np.zeros(6), loss=geman_mcclure, x_scale=0.01, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    squared = (sampson_distance(essential_matrix(refined), rays0, rays1) / scale) ** 2
    ours = (squared / (1 + squared)).sum() / 2
    assert ours == pytest.approx(best.cost, rel=1e-8)


def test_covariance_of_the_relative_pose_matches_monte_carlo():
    errors, predicted = [], []
    for seed in range(150):
        T, _, rays0, rays1 = scene(0)
        noise = np.random.default_rng(100 + seed).normal(0, 0.4 / FOCAL_PX, (2, *rays0.shape))
        truth = make_pose(T[:3, :3], T[:3, 3] / np.linalg.norm(T[:3, 3]))
        refined, covariance = refine_relative_pose(truth, rays0 + noise[0], rays1 + noise[1], 10 / FOCAL_PX)
        errors.append(log_se3(invert_pose(truth) @ refined))
        predicted.append(np.diag(covariance))
    ratio = np.sqrt(np.mean(predicted, axis=0) / np.var(errors, axis=0))
    assert (ratio[[0, 1, 3, 4, 5]] > 0.8).all()
    assert (ratio[[0, 1, 3, 4, 5]] < 1.25).all()


def test_fit_rotation_ignores_outliers():
    R = exp_so3(np.array([0.1, -0.2, 0.05]))
    rng = np.random.default_rng(0)
    rays1 = rng.uniform(-0.5, 0.5, (200, 2))
    moved = homogeneous(rays1) @ R.T
    rays0 = moved[:, :2] / moved[:, 2:]
    rays0[:40] += 0.2
    assert rotation_angle(fit_rotation(rays0, rays1, 1e-3, 50).T @ R) < 1e-3


def test_parallax_is_the_angle_at_the_point():
    T_camera0_camera1 = make_pose(np.eye(3), np.array([1.0, 0.0, 0.0]))
    rays0, rays1 = np.array([[0.0, 0.0]]), np.array([[-0.1, 0.0]])
    assert parallax(rays0, rays1, np.eye(3))[0] == pytest.approx(np.arctan(0.1))
    depth0, depth1 = ray_depths(T_camera0_camera1, rays0, rays1)
    assert depth0[0] == pytest.approx(10.0)
    assert depth1[0] == pytest.approx(10.0)


def test_triangulation_agrees_with_opencv_and_the_truth():
    T, points, rays0, rays1 = scene()
    world = exp_se3(np.array([3.0, -1.0, 2.0, 0.3, 0.2, -0.4]))
    found, angles = triangulate(world, world @ T, rays0, rays1)
    np.testing.assert_allclose(found, transform(world, points), atol=1e-7)
    np.testing.assert_allclose(angles, parallax(rays0, rays1, T[:3, :3]), atol=1e-9)
    reference = cv2.triangulatePoints(np.eye(4)[:3], invert_pose(T)[:3], rays0.T.copy(), rays1.T.copy())
    np.testing.assert_allclose(transform(invert_pose(world), found), (reference[:3] / reference[3]).T, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(twists)
def test_reprojection_jacobians_are_the_numeric_derivatives(xi):
    T = exp_se3(xi)
    points = transform(T, np.random.default_rng(0).uniform([-2, -2, 3], [2, 2, 9], (5, 3)))
    by_pose, by_point = reprojection_jacobians(T, points)
    for k in range(6):
        step = np.eye(6)[k] * 1e-6
        numeric = (reproject(T @ exp_se3(step), points)[0] - reproject(T @ exp_se3(-step), points)[0]) / 2e-6
        np.testing.assert_allclose(by_pose[:, :, k], numeric, atol=1e-6)
    for k in range(3):
        step = np.eye(3)[k] * 1e-6
        numeric = (reproject(T, points + step)[0] - reproject(T, points - step)[0]) / 2e-6
        np.testing.assert_allclose(by_point[:, :, k], numeric, atol=1e-6)


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
    errors, predicted = [], []
    for seed in range(150):
        noisy = rays1 + np.random.default_rng(seed).normal(0, 0.5 / FOCAL_PX, rays1.shape)
        pose = refine_absolute_pose(T @ exp_se3(np.full(6, 0.01)), points, noisy, FOCAL_PX, 10.0)
        errors.append(log_se3(invert_pose(T) @ pose.T_world_camera))
        predicted.append(pose.covariance)
    ratio = np.sqrt(np.diag(np.mean(predicted, axis=0)) / np.var(errors, axis=0))
    assert (ratio > 0.8).all()
    assert (ratio < 1.25).all()
    assert pose.sigma_px == pytest.approx(0.5, rel=0.2)


def test_translation_scale_is_the_landmarks():
    T, points, _, rays1 = scene()
    unit = make_pose(T[:3, :3], T[:3, 3] / np.linalg.norm(T[:3, 3]))
    assert translation_scale(unit, points, rays1) == pytest.approx(np.linalg.norm(T[:3, 3]), rel=1e-9)
    rays1[:150] += 0.1
    assert translation_scale(unit, points, rays1) == pytest.approx(np.linalg.norm(T[:3, 3]), rel=0.05)
    on_axis = np.array([[0.0, 0.0, 5.0]])
    forward = make_pose(np.eye(3), np.array([0.0, 0.0, 1.0]))
    assert translation_scale(forward, on_axis, np.zeros((1, 2))) is None
