"""The motion between the first two views, which may see a plane alone: two motions explain those alike."""

from __future__ import annotations

import numpy as np
import pytest

from vo.config import TwoViewConfig
from vo.first_pose import _differ, _planar_motions, estimate_first_pose
from vo.geometry import exp_se3, exp_so3, log_so3, make_pose, parallax, reproject
from vo.relative_pose import estimate_relative_pose, refined_pose
from vo.types import FloatArray, Rejection, RelativePose

FOCAL_PX = 500.0
THRESHOLD = 1.0 / FOCAL_PX
T_TRUE = exp_se3(np.array([0.9, 0.2, 0.5, 0.03, -0.12, 0.02]))
DIRECTION = T_TRUE[:3, 3] / np.linalg.norm(T_TRUE[:3, 3])
UNIT_TRUE = make_pose(T_TRUE[:3, :3], DIRECTION)


def points_on_a_plane(count: int, slope: float = 0.5) -> FloatArray:
    """(N, 3) on a slanted wall, 6 m away in the middle."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, count)
    return np.column_stack([x, rng.uniform(-2, 2, count), 6.0 + slope * x])


def points_in_space(count: int, seed: int = 1) -> FloatArray:
    return np.random.default_rng(seed).uniform((-3, -2, 3), (3, 2, 12), (count, 3))


def seen(points: FloatArray, noise_px: float = 0.0, T: FloatArray = T_TRUE) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(7)
    rays0, rays1 = (reproject(pose, points)[0] for pose in (np.eye(4), T))
    return tuple(rays + rng.normal(0, noise_px / FOCAL_PX, rays.shape) for rays in (rays0, rays1))  # type: ignore[return-value]


def errors_deg(T: FloatArray, truth: FloatArray = UNIT_TRUE) -> tuple[float, float]:
    """Of rotation and direction."""
    turned = np.linalg.norm(log_so3(T[:3, :3].T @ truth[:3, :3]))
    cosine = np.clip(T[:3, 3] @ truth[:3, 3] / np.linalg.norm(truth[:3, 3]), -1, 1)
    return float(np.rad2deg(turned)), float(np.rad2deg(np.arccos(cosine)))


def test_the_true_motion_is_among_those_of_a_plane() -> None:
    """With the points before both cameras two of the four solutions remain at most; their translations are units."""
    rays0, rays1 = seen(points_on_a_plane(120))
    motions = _planar_motions(rays0, rays1, THRESHOLD, 120)
    assert 1 <= len(motions) <= 2
    assert min(max(errors_deg(T)) for T in motions) < 0.01
    for T in motions:
        assert np.linalg.norm(T[:3, 3]) == pytest.approx(1.0)
        assert np.linalg.det(T[:3, :3]) == pytest.approx(1.0)


def test_a_plane_needs_enough_matches_on_it() -> None:
    """A tenth of the matches is wrong."""
    rays0, rays1 = seen(points_on_a_plane(200))
    rays1[::10] += np.array([0.15, 0.1])
    assert min(max(errors_deg(T)) for T in _planar_motions(rays0, rays1, THRESHOLD, 178)) < 0.1
    assert _planar_motions(rays0, rays1, THRESHOLD, 190) == []
    assert _planar_motions(*seen(points_in_space(200)), THRESHOLD, 100) == []


def test_a_rotation_alone_is_no_motion_of_a_plane() -> None:
    turned = make_pose(exp_so3(np.array([0.02, 0.1, -0.03])), np.zeros(3))
    assert _planar_motions(*seen(points_on_a_plane(100), T=turned), THRESHOLD, 50) == []


def test_a_finished_motion_has_the_inliers_and_the_parallax_of_the_scene() -> None:
    rays0, rays1 = seen(points_in_space(200), noise_px=0.1)
    rays1[::10] += 0.1  # a tenth of the matches is wrong by 50 px
    start = UNIT_TRUE @ exp_se3(np.array([0.01, 0.01, 0, 0.002, -0.002, 0.001]))
    pose = refined_pose(start, rays0, rays1, THRESHOLD)
    assert max(errors_deg(pose.T_camera0_camera1)) < 0.2
    is_wrong = np.arange(200) % 10 == 0
    assert (pose.inliers & ~is_wrong).sum() >= 178 and (pose.inliers & is_wrong).sum() <= 2
    angles = parallax(rays0[~is_wrong], rays1[~is_wrong], T_TRUE[:3, :3])
    assert pose.parallax_rad == pytest.approx(np.median(angles), rel=0.02)
    assert not pose.is_metric and np.linalg.eigvalsh(pose.covariance).min() > -1e-12
    assert not refined_pose(start, rays0, rays1 + np.array([0.0, 1.0]), THRESHOLD).inliers.all()


@pytest.mark.parametrize(
    ("turn_deg", "tilt_deg", "expected"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (1.1, 0.0, True), (0.0, 9.0, False), (0.0, 11.0, True), (0.0, 180.0, True)],
)
def test_motions_differ_by_a_degree_of_rotation_or_ten_of_direction(
    turn_deg: float, tilt_deg: float, expected: bool
) -> None:
    axis = np.array([0.6, 0.0, 0.8])
    R = UNIT_TRUE[:3, :3] @ exp_so3(np.deg2rad(turn_deg) * axis)
    across = np.cross(DIRECTION, [0.0, 0.0, 1.0])
    tilt = exp_so3(np.deg2rad(tilt_deg) * across / np.linalg.norm(across))
    other = make_pose(R, tilt @ DIRECTION)
    assert _differ(UNIT_TRUE, other) is expected
    assert _differ(other, UNIT_TRUE) is expected


def test_a_plane_that_one_motion_alone_explains_is_enough() -> None:
    """The other one would have points behind a camera."""
    rays0, rays1 = seen(points_on_a_plane(210))
    assert len(_planar_motions(rays0, rays1, THRESHOLD, 200)) == 1
    found = estimate_first_pose(rays0, rays1, FOCAL_PX, TwoViewConfig())
    assert isinstance(found, RelativePose) and max(errors_deg(found.T_camera0_camera1)) < 0.01
    assert found.inliers.all()


def test_a_plane_that_two_motions_explain_is_degenerate() -> None:
    rays0, rays1 = seen(points_on_a_plane(210, slope=0.2))
    motions = _planar_motions(rays0, rays1, THRESHOLD, 200)
    assert len(motions) == 2 and _differ(*motions)
    assert estimate_first_pose(rays0, rays1, FOCAL_PX, TwoViewConfig()) is Rejection.DEGENERATE


def test_a_few_points_off_the_plane_decide_between_the_two() -> None:
    """An eighth of the points: the plane is still found, and its wrong motion fits those on it."""
    T = exp_se3(np.array([0.2, 0.1, -0.6, 0, 0.03, 0]))
    truth = make_pose(T[:3, :3], T[:3, 3] / np.linalg.norm(T[:3, 3]))
    points = np.concatenate([points_on_a_plane(210, slope=0.2), points_in_space(30)])
    rays0, rays1 = seen(points, 0.1, T)
    motions = _planar_motions(rays0, rays1, THRESHOLD, 204)
    assert len(motions) == 2 and _differ(*motions)
    found = estimate_first_pose(rays0, rays1, FOCAL_PX, TwoViewConfig())
    assert isinstance(found, RelativePose)
    assert max(errors_deg(found.T_camera0_camera1, truth)) < 0.5
    assert found.inliers.sum() >= 235


def test_a_scene_without_a_plane_is_left_to_the_essential_matrix() -> None:
    rays0, rays1 = seen(points_in_space(200), noise_px=0.2)
    found = estimate_first_pose(rays0, rays1, FOCAL_PX, TwoViewConfig())
    expected = estimate_relative_pose(rays0, rays1, FOCAL_PX, TwoViewConfig())
    assert isinstance(found, RelativePose) and isinstance(expected, RelativePose)
    np.testing.assert_array_equal(found.T_camera0_camera1, expected.T_camera0_camera1)
    np.testing.assert_array_equal(found.inliers, expected.inliers)
    assert max(errors_deg(found.T_camera0_camera1)) < 0.5


def test_failures_stay_what_they_are() -> None:
    rays0, rays1 = seen(points_on_a_plane(150))
    assert estimate_first_pose(rays0[:10], rays1[:10], FOCAL_PX, TwoViewConfig()) is Rejection.TOO_FEW_MATCHES
    turned = make_pose(exp_so3(np.array([0.0, 0.1, 0.0])), np.zeros(3))
    rotation_alone = estimate_first_pose(*seen(points_in_space(150), 0.1, turned), FOCAL_PX, TwoViewConfig())
    assert rotation_alone in (Rejection.PURE_ROTATION, Rejection.LOW_PARALLAX)
