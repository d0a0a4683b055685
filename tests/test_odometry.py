from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from synthetic_world import (
    CAMERA,
    World,
    as_frame,
    driving_path,
    empty_features,
    make_world,
    match_exactly,
    observe,
)

from vo.config import OdometryConfig, TwoViewConfig
from vo.geometry import exp_se3, exp_so3, invert_pose, make_pose, rotation_angle
from vo.odometry import Odometry
from vo.types import Rejection, TrackingStatus


def make_odometry(**settings) -> Odometry:
    """Short paths: the map begins, and keyframes follow, at less parallax than by default."""
    settings = {"init_parallax_deg": 0.4, "keyframe_parallax_px": 8.0, **settings}
    return Odometry(CAMERA, OdometryConfig(**settings), TwoViewConfig(), match_exactly)


def corridor(seed: int = 0) -> World:
    return make_world(1000, (-6.0, -3.0, 1.0), (6.0, 3.0, 30.0), seed)


def follow(odometry, world, poses, noise_px=0.0, start=0):
    rng = np.random.default_rng(7)
    return [odometry.step(as_frame(start + i), observe(world, T, noise_px, rng)) for i, T in enumerate(poses)]


def aligned_errors(steps, poses):
    """Distances of tracked frames after scaling the estimate: both begin at the identity, so scale is all that is free.

    While the map is not yet begun the translation is held, by contract: those frames are left out.
    """
    tracked = [s.pose.status in (TrackingStatus.TRACKING, TrackingStatus.RELOCALIZED) for s in steps]
    assert np.mean(tracked) > 0.7
    estimate = np.array([step.pose.T_world_camera[:3, 3] for step in steps])[tracked]
    truth = np.array([T[:3, 3] for T in poses])[tracked]
    scale = (estimate * truth).sum() / (estimate**2).sum()
    return np.linalg.norm(scale * estimate - truth, axis=1)


def test_without_noise_the_path_is_exact():
    poses = driving_path(40)
    steps = follow(make_odometry(), corridor(), poses)
    assert all(step.pose.status is TrackingStatus.TRACKING for step in steps[4:])
    assert aligned_errors(steps, poses).max() < 1e-3
    for step, T in zip(steps, poses, strict=True):
        assert rotation_angle(step.pose.T_world_camera[:3, :3].T @ T[:3, :3]) < 1e-4


def test_with_noise_the_scale_holds():
    poses = driving_path(60)
    steps = follow(make_odometry(), corridor(), poses, noise_px=0.5)
    length = sum(np.linalg.norm(b[:3, 3] - a[:3, 3]) for a, b in pairwise(poses))
    assert aligned_errors(steps, poses).max() < 0.01 * length
    errors_deg = [
        np.rad2deg(rotation_angle(step.pose.T_world_camera[:3, :3].T @ T[:3, :3]))
        for step, T in zip(steps, poses, strict=True)
    ]
    assert max(errors_deg) < 0.5


def test_the_first_landmarks_set_the_unit():
    odometry = make_odometry()
    steps = follow(odometry, corridor(), driving_path(6))
    assert sum(step.pose.is_keyframe for step in steps) >= 2
    points, known = odometry.tracks.landmarks(odometry.keyframes[1].track_ids)
    assert np.median(points[known][:, 2]) == pytest.approx(1.0, rel=0.5)


def test_the_same_input_gives_the_same_poses():
    runs = [follow(make_odometry(), corridor(), driving_path(15), noise_px=0.5) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first.pose.T_world_camera, second.pose.T_world_camera)


def test_a_camera_that_stands_is_reported_and_does_not_drift():
    steps = follow(make_odometry(), corridor(), [np.eye(4)] * 30, noise_px=0.2)
    assert all(step.pose.is_stationary for step in steps[1:])
    assert all(step.pose.rejection is Rejection.LOW_PARALLAX for step in steps[1:])
    assert max(np.abs(step.pose.T_world_camera - np.eye(4)).max() for step in steps) == 0.0


def test_standing_in_the_middle_of_a_drive_holds_the_pose():
    poses = driving_path(20)
    steps = follow(make_odometry(), corridor(), [*poses, *[poses[-1]] * 20], noise_px=0.2)
    held = np.array([step.pose.T_world_camera[:3, 3] for step in steps[21:]])
    assert all(step.pose.is_stationary for step in steps[21:])
    assert np.ptp(held, axis=0).max() < 1e-3


def test_pure_rotation_is_followed_without_inventing_translation():
    poses = [make_pose(exp_so3(np.array([0.0, 0.02 * i, 0.0])), np.zeros(3)) for i in range(10)]
    steps = follow(make_odometry(), corridor(), poses, noise_px=0.2)
    for step, T in zip(steps[1:], poses[1:], strict=True):
        assert step.pose.status is TrackingStatus.INITIALIZING
        assert step.pose.rejection is Rejection.PURE_ROTATION
        np.testing.assert_array_equal(step.pose.T_world_camera[:3, 3], 0.0)
        assert np.rad2deg(rotation_angle(step.pose.T_world_camera[:3, :3].T @ T[:3, :3])) < 0.1


def test_slow_creeping_is_not_swallowed_by_standing_still():
    poses = driving_path(15)
    creep = [poses[-1] @ exp_se3(np.array([0.004 * i, 0, 0, 0, 0, 0])) for i in range(1, 60)]
    path = [*poses, *creep]
    steps = follow(make_odometry(), corridor(), path)
    assert aligned_errors(steps, path).max() < 0.02


def test_dark_frames_lose_the_camera_and_it_is_found_again():
    poses, world = driving_path(40), corridor()
    odometry = make_odometry()
    before = follow(odometry, world, poses[:20])
    dark = [odometry.step(as_frame(20 + i), empty_features()) for i in range(5)]
    after = follow(odometry, world, poses[25:], start=25)
    assert all(step.pose.status is TrackingStatus.LOST for step in dark)
    assert all(step.pose.T_world_camera is None for step in dark)
    assert all(step.pose.rejection is Rejection.TOO_FEW_MATCHES for step in dark)
    assert all(len(step.tracks.track_ids) == 0 for step in dark)
    assert after[0].pose.status is TrackingStatus.RELOCALIZED
    assert after[1].pose.status is TrackingStatus.TRACKING
    assert {step.pose.segment_id for step in [*before, *after]} == {0}
    assert aligned_errors([*before, *after], [*poses[:20], *poses[25:]]).max() < 0.02


def test_another_place_begins_a_new_segment():
    odometry = make_odometry(max_lost_frames=5)
    follow(odometry, corridor(0), driving_path(10))
    elsewhere = follow(odometry, corridor(1), driving_path(20), start=10)
    lost = [step for step in elsewhere if step.pose.status is TrackingStatus.LOST]
    assert len(lost) == 5
    assert elsewhere[5].pose.segment_id == 1
    assert elsewhere[5].pose.is_keyframe
    assert elsewhere[-1].pose.status is TrackingStatus.TRACKING
    assert (
        aligned_errors(elsewhere[5:], [invert_pose(driving_path(6)[-1]) @ T for T in driving_path(20)[5:]]).max() < 0.02
    )


def test_a_dark_start_has_no_pose_until_something_is_seen():
    odometry = make_odometry()
    first = odometry.step(as_frame(0), empty_features())
    assert first.pose.status is TrackingStatus.LOST
    steps = follow(odometry, corridor(), driving_path(5), start=1)
    assert steps[0].pose.is_keyframe
    np.testing.assert_array_equal(steps[0].pose.T_world_camera, np.eye(4))
    assert steps[0].pose.segment_id == 0
    assert steps[-1].pose.status is TrackingStatus.TRACKING


def test_wrong_matches_do_not_bend_the_path():
    poses, world = driving_path(30), corridor()
    rng = np.random.default_rng(0)

    def match_badly(features0, features1):
        matches = match_exactly(features0, features1)
        indices = matches.indices.copy()
        wrong = np.flatnonzero(rng.random(len(indices)) < 0.3)
        indices[wrong, 1] = np.roll(indices[wrong, 1], 1)
        return type(matches)(indices, matches.scores.copy())

    odometry = Odometry(CAMERA, OdometryConfig(), TwoViewConfig(), match_badly)
    steps = follow(odometry, world, poses, noise_px=0.3)
    length = 0.2 * len(poses)
    assert aligned_errors(steps, poses).max() < 0.02 * length


def test_tracks_keep_their_point():
    """A track id always names the same scene point."""
    world, poses = corridor(), driving_path(25)
    odometry, owners = make_odometry(), {}
    for i, T in enumerate(poses):
        features = observe(world, T)
        step = odometry.step(as_frame(i), features)
        points = (features.descriptors.numpy() @ world.descriptors.T).argmax(axis=1)
        for track_id, point in zip(step.tracks.track_ids.tolist(), points.tolist(), strict=True):
            assert owners.setdefault(track_id, point) == point
    assert step.tracks.lengths.max() > 10
    assert step.tracks.has_landmark.mean() > 0.5


def test_memory_does_not_grow_with_time():
    world = corridor()
    odometry = make_odometry(window_size=4, keyframe_parallax_px=3.0, map_keyframes=20)
    forth = driving_path(12)
    sizes = []
    for lap in range(4):
        follow(odometry, world, [*forth, *forth[::-1]], start=24 * lap)
        sizes.append(len(odometry.tracks))
    assert sizes[-1] < 1.5 * sizes[1]
    assert len(odometry.keyframes) == 4
