"""Motions, cameras and rays against other implementations, numeric derivatives and exact scenes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from two_view_scene import scene, twists

from vo.geometry import (
    essential_matrix,
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
    reproject,
    reproject_each,
    rotation_angle,
    sampson_distance,
    skew,
    solve_symmetric,
    transform,
    translation_scale,
    triangulate,
    undistort,
)
from vo.types import Camera, CameraModel

K = np.array([[700.0, 0.0, 319.5], [0.0, 690.0, 241.0], [0.0, 0.0, 1.0]])


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


def test_translation_scale_is_the_landmarks():
    T, points, _, rays1 = scene()
    unit = make_pose(T[:3, :3], T[:3, 3] / np.linalg.norm(T[:3, 3]))
    assert translation_scale(unit, points, rays1) == pytest.approx(np.linalg.norm(T[:3, 3]), rel=1e-9)
    rays1[:150] += 0.1
    assert translation_scale(unit, points, rays1) == pytest.approx(np.linalg.norm(T[:3, 3]), rel=0.05)
    on_axis = np.array([[0.0, 0.0, 5.0]])
    forward = make_pose(np.eye(3), np.array([0.0, 0.0, 1.0]))
    assert translation_scale(forward, on_axis, np.zeros((1, 2))) is None


# --- definitions, at their edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle_rad", [0.0, 3e-6, 9e-5, 1.2e-4, 1e-3])
def test_exponential_of_a_long_step_with_a_small_turn(angle_rad):
    """Where the series takes over from the closed form, a long translation shows every term of it."""
    xi = np.concatenate([[1e4, -2e4, 1.5e4], angle_rad * np.array([0.6, 0.0, 0.8])])
    generator = np.zeros((4, 4))
    generator[:3, :3], generator[:3, 3] = skew(xi[3:]), xi[:3]
    np.testing.assert_allclose(exp_se3(xi), expm(generator), rtol=1e-13, atol=1e-7)
    np.testing.assert_allclose(log_se3(expm(generator)), xi, rtol=1e-9, atol=1e-7)


def test_many_poses_and_vectors_at_once_are_each_alone():
    rng = np.random.default_rng(3)
    poses = np.array([exp_se3(xi) for xi in rng.normal(size=(6, 6))])
    np.testing.assert_array_equal(invert_pose(poses), [invert_pose(T) for T in poses])
    np.testing.assert_allclose(invert_pose(poses), np.linalg.inv(poses), atol=1e-12)
    v, w = rng.normal(size=(2, 5, 3))
    np.testing.assert_allclose(np.einsum("nij,nj->ni", skew(v), w), np.cross(v, w), atol=1e-12)
    np.testing.assert_array_equal(make_pose(poses[0, :3, :3], poses[0, :3, 3]), poses[0])
    np.testing.assert_allclose(rotation_angle(exp_so3(np.array([0.0, -0.7, 0.0]))), 0.7, atol=1e-12)


def test_orthonormalized_of_a_reflection_is_a_rotation():
    T = exp_se3(np.array([1.0, 2.0, 3.0, 0.4, -0.5, 0.6]))
    # Rounding can push the smallest singular value over zero: the nearest rotation is meant, no reflection.
    flattened = T.copy()
    flattened[:3, :3] = T[:3, :3] @ np.diag([1.0, 1.0, -0.01])
    restored = orthonormalized(flattened)
    assert np.linalg.det(restored[:3, :3]) == pytest.approx(1.0)
    np.testing.assert_allclose(restored, T, atol=1e-12)


@pytest.mark.parametrize("model", list(CameraModel))
def test_no_pixel_and_one_pixel(model):
    distortion = {CameraModel.PINHOLE: np.zeros(0)}.get(model, np.array([0.01, 0.02, -0.005, 0.001]))
    camera = Camera(640, 480, K.copy(), distortion, model)
    assert undistort(np.zeros((0, 2)), camera).shape == (0, 2)
    assert undistort(np.zeros((0, 2), np.float32), camera).dtype == np.float64
    # The principal point looks straight ahead, whatever the lens does elsewhere.
    np.testing.assert_allclose(undistort(np.array([[319.5, 241.0]], np.float32), camera), [[0.0, 0.0]], atol=1e-9)
    mixed = project(np.array([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.1, 0.0, -2.0]]), camera)
    np.testing.assert_allclose(mixed[0], [319.5, 241.0], atol=1e-9)
    assert np.isnan(mixed[1:]).all()


def test_a_pixel_that_is_off_by_the_corner_is_found_again():
    """Strong distortion at the image's corner takes the iteration all its steps."""
    camera = Camera(640, 480, K.copy(), np.array([0.2624, -0.9531, -0.0054, 0.0026, 1.1633]), CameraModel.BROWN)
    corners = np.array([[0.0, 0.0], [639.0, 0.0], [0.0, 479.0], [639.0, 479.0]])
    np.testing.assert_allclose(project(homogeneous(undistort(corners, camera)), camera), corners, atol=1e-5)


def test_sampson_distance_is_its_formula():
    rng = np.random.default_rng(7)
    E, rays0, rays1 = rng.normal(size=(3, 3)), rng.normal(size=(9, 2)), rng.normal(size=(9, 2))
    for row in range(9):
        x0, x1 = np.append(rays0[row], 1.0), np.append(rays1[row], 1.0)
        gradient = np.concatenate([(E @ x1)[:2], (E.T @ x0)[:2]])
        expected = x0 @ E @ x1 / np.linalg.norm(gradient)
        assert sampson_distance(E, rays0[row : row + 1], rays1[row : row + 1])[0] == pytest.approx(expected, rel=1e-12)
    # Without a gradient there is no direction to move in; the distance stays finite.
    assert sampson_distance(np.zeros((3, 3)), rays0, rays1).tolist() == [0.0] * 9


@settings(deadline=None, max_examples=40)
@given(twists)
def test_depths_put_the_points_where_they_are(xi):
    T = exp_se3(xi)
    points = np.random.default_rng(0).uniform([-2, -2, 8], [2, 2, 12], (6, 3))
    moved = transform(invert_pose(T), points)
    seen = np.abs(moved[:, 2]) > 0.5
    rays0, rays1 = points[seen, :2] / points[seen, 2:], moved[seen, :2] / moved[seen, 2:]
    angles = parallax(rays0, rays1, T[:3, :3])
    clear = np.minimum(angles, np.pi - angles) > 0.02
    depth0, depth1 = ray_depths(T, rays0, rays1)
    np.testing.assert_allclose(depth0[clear], points[seen, 2][clear], rtol=1e-6)
    np.testing.assert_allclose(depth1[clear], moved[seen, 2][clear], rtol=1e-6)


def test_depths_of_rays_that_miss_each_other_are_least_squares():
    rng = np.random.default_rng(5)
    T, rays0, rays1 = exp_se3(rng.normal(size=6)), rng.normal(size=(8, 2)), rng.normal(size=(8, 2))
    depth0, depth1 = ray_depths(T, rays0, rays1)
    for row in range(8):
        directions = np.stack([np.append(rays0[row], 1.0), -T[:3, :3] @ np.append(rays1[row], 1.0)], axis=1)
        expected = np.linalg.lstsq(directions, T[:3, 3], rcond=None)[0]
        np.testing.assert_allclose([depth0[row], depth1[row]], expected, rtol=1e-8)
    world = exp_se3(rng.normal(size=6))
    found, angles = triangulate(world, world @ T, rays0, rays1)
    ends0 = transform(world, homogeneous(rays0) * depth0[:, None])
    ends1 = transform(world @ T, homogeneous(rays1) * depth1[:, None])
    np.testing.assert_allclose(found, (ends0 + ends1) / 2, rtol=1e-8)
    cosines = np.einsum("ni,ni->n", homogeneous(rays0), homogeneous(rays1) @ T[:3, :3].T)
    lengths = np.linalg.norm(homogeneous(rays0), axis=1) * np.linalg.norm(homogeneous(rays1), axis=1)
    np.testing.assert_allclose(np.cos(angles), cosines / lengths, atol=1e-12)
    many, _ = triangulate(np.tile(world, (8, 1, 1)), np.tile(world @ T, (8, 1, 1)), rays0, rays1)
    np.testing.assert_allclose(many, found, rtol=1e-12)


def test_parallel_rays_are_far_and_no_error():
    T = make_pose(np.eye(3), np.array([1.0, 0.0, 0.0]))
    straight = np.zeros((1, 2))
    points, angles = triangulate(np.eye(4), T, straight, straight)
    assert np.isfinite(points).all() and angles[0] == 0.0
    nearly = np.array([[-1e-7, 0.0]])
    depth0, _ = ray_depths(T, straight, nearly)
    assert depth0[0] == pytest.approx(1e7, rel=1e-2)


def test_a_point_beside_the_camera_is_projected_to_a_finite_place():
    points = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 4.0]])
    rays, depth = reproject(np.eye(4), points)
    assert np.isfinite(rays).all() and np.abs(rays[0]).min() > 1e6
    np.testing.assert_allclose(rays[1], [0.25, 0.5])
    assert depth.tolist() == [0.0, 4.0]


def test_each_point_with_its_own_pose():
    rng = np.random.default_rng(1)
    poses = np.array([exp_se3(xi) for xi in rng.normal(size=(7, 6))])
    points = rng.normal(size=(7, 3)) * 5
    rays, depth = reproject_each(poses, points)
    for row in range(7):
        alone, alone_depth = reproject(poses[row], points[row : row + 1])
        np.testing.assert_allclose(rays[row], alone[0], rtol=1e-9)
        np.testing.assert_allclose(depth[row], alone_depth[0], rtol=1e-9)
    flat, flat_depth = reproject_each(np.eye(4)[None], np.array([[1.0, 2.0, 0.0]]))
    assert np.isfinite(flat).all() and np.abs(flat).min() > 1e6 and flat_depth[0] == 0.0


def test_fit_rotation_of_a_line_is_no_reflection():
    """All bearings in one plane: which way is up across it nothing but the absence of mirrors says."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        R = exp_so3(rng.normal(0, 0.3, 3))
        rays1 = np.stack([rng.uniform(-0.5, 0.5, 40), np.full(40, 0.1)], axis=1)
        points = homogeneous(rays1) @ R.T
        found = fit_rotation(points[:, :2] / points[:, 2:], rays1, 1e-3)
        np.testing.assert_allclose(found, R, atol=1e-9)


def test_fit_rotation_without_outliers_is_kabsch():
    rng = np.random.default_rng(2)
    rays1 = rng.uniform(-0.5, 0.5, (60, 2))
    moved = homogeneous(rays1) @ exp_so3(np.array([0.3, -0.2, 0.5])).T
    rays0 = moved[:, :2] / moved[:, 2:] + rng.normal(0, 1e-3, (60, 2))
    x0, x1 = (homogeneous(r) / np.linalg.norm(homogeneous(r), axis=1, keepdims=True) for r in (rays0, rays1))
    expected, _ = Rotation.align_vectors(x0, x1)
    np.testing.assert_allclose(fit_rotation(rays0, rays1, 1e3), expected.as_matrix(), atol=1e-8)
    # With a narrow kernel: the fixed point of the weights, found by SciPy's weighted alignment.
    R = fit_rotation(rays0, rays1, 1e-3, 60)
    distances = np.linalg.norm(x0 - x1 @ R.T, axis=1)
    again, _ = Rotation.align_vectors(x0, x1, weights=1 / (1 + (distances / 1e-3) ** 2))
    np.testing.assert_allclose(R, again.as_matrix(), atol=1e-7)


def test_translation_scale_is_a_weighted_median_of_votes():
    rng = np.random.default_rng(9)
    unit = exp_se3(np.array([0.2, 0.1, 0.9, 0.05, -0.1, 0.02]))
    unit[:3, 3] /= np.linalg.norm(unit[:3, 3])
    points = rng.uniform([-4, -3, 2], [4, 3, 20], (25, 3))
    points[:3, 2] *= -1.0
    rays1 = rng.uniform(-0.4, 0.4, (25, 2))
    votes, weights = [], []
    for point, ray in zip(points[3:], homogeneous(rays1)[3:], strict=True):
        # In camera 1 the point is R^T (point - length t): parallel to the ray as nearly as may be.
        fixed, moving = np.cross(ray, unit[:3, :3].T @ point), np.cross(ray, unit[:3, :3].T @ unit[:3, 3])
        votes.append(fixed @ moving / (moving @ moving))
        weights.append(np.linalg.norm(moving) / point[2])
    order = np.argsort(votes)
    half = np.sum(weights) / 2
    expected = next(votes[row] for count, row in enumerate(order, 1) if np.array(weights)[order[:count]].sum() >= half)
    assert translation_scale(unit, points, rays1) == pytest.approx(expected, rel=1e-9)
    assert translation_scale(unit, -np.abs(points), rays1) is None


@given(st.tuples(*[st.floats(-3.0, 3.0)] * 3), st.floats(-9.0, 0.0))
def test_rotation_of_a_vector_is_that_of_scipy(direction: tuple[float, float, float], exponent: float) -> None:
    """Another implementation of the same formula, at every size of angle."""
    phi = np.array(direction) * 10.0**exponent
    np.testing.assert_allclose(exp_so3(phi), Rotation.from_rotvec(phi).as_matrix(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_a_symmetric_system_against_least_squares(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    half, right = generator.normal(size=(5, 5)), generator.normal(size=shape)
    for H in (half @ half.T + np.eye(5), half[:, :3] @ half[:, :3].T):  # definite, and of rank 3
        np.testing.assert_allclose(H @ solve_symmetric(H, right), H @ np.linalg.lstsq(H, right)[0], atol=1e-9)
    # A window whose cameras are all fixed leaves nothing to solve.
    assert solve_symmetric(np.zeros((0, 0)), np.zeros((0, *shape[1:]))).shape == (0, *shape[1:])
