"""The map over time: the window beside the frames, leftover distortion, places seen again, metres, what is refined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_world import (
    CAMERA,
    as_frame,
    driving_path,
    empty_features,
    make_world,
    match_exactly,
    observe,
)

from vo.bundle_problem import RadialPrior, corrected_rays
from vo.config import DepthScaleConfig, ExternalScaleConfig, GroundTruthScaleConfig, OdometryConfig, TwoViewConfig
from vo.first_pose import estimate_first_pose
from vo.geometry import (
    exp_se3,
    homogeneous,
    invert_pose,
    make_pose,
    reproject,
    transform,
)
from vo.odometry import Odometry
from vo.refined import RefinedTrajectory
from vo.scale import ExternalReadings, depths_at
from vo.scale_source import ScaleSource
from vo.trajectory import read_trajectory
from vo.types import Camera, CameraModel, Frame, Rejection, RelativePose, TrackingStatus

SETTINGS = {"init_parallax_deg": 0.4, "keyframe_parallax_px": 6.0}


def corridor(seed=0):
    return make_world(1000, (-6.0, -3.0, 1.0), (6.0, 3.0, 30.0), seed)


def noisy_frame(index, rng):
    """No two images are the same, as with a sensor."""
    image = rng.integers(0, 255, (CAMERA.height, CAMERA.width), np.uint8)
    return Frame(index, index * 100_000_000, image, CAMERA)


def follow(odometry, world, poses, noise_px=0.0, camera=CAMERA, seed=7, start=0):
    rng = np.random.default_rng(seed)
    return [odometry.step(as_frame(start + i), observe(world, T, noise_px, rng, camera)) for i, T in enumerate(poses)]


def positions(steps):
    return np.array([step.pose.T_world_camera[:3, 3] for step in steps])


# --- the window beside the frames -----------------------------------------------------------------------------------


def test_every_refinement_comes_out_as_a_correction():
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly)
    steps = follow(odometry, corridor(), driving_path(40), noise_px=0.3)
    updates = [(i, step.map_update) for i, step in enumerate(steps) if step.map_update is not None]
    keyframes = [i for i, step in enumerate(steps) if step.pose.is_keyframe]
    assert len(updates) >= len(keyframes) - 2
    for i, update in updates:
        assert update.frame_index == i
        assert (np.diff(update.keyframe_indices) > 0).all() and set(update.keyframe_indices) <= set(keyframes)
        assert np.isfinite(update.landmarks).all() and (np.diff(update.landmark_ids) > 0).all()
        assert not set(update.removed_landmark_ids) & set(update.landmark_ids)
    assert odometry.finish() is not None
    odometry.close()


def test_a_window_that_waits_gives_the_same_path_whenever_its_thread_runs(monkeypatch):
    """The result is taken in at its frame and at no other, so a slow thread changes nothing."""
    import time

    from vo.window import WindowJob

    def path():
        odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly)
        return positions(follow(odometry, corridor(), driving_path(20), noise_px=0.5))

    quick = path()
    solve = WindowJob.solve
    monkeypatch.setattr(WindowJob, "solve", lambda job: (time.sleep(0.02), solve(job))[1])
    np.testing.assert_array_equal(path(), quick)


def test_a_live_run_never_waits_for_its_window(monkeypatch):
    """While the window's thread hangs, frames go on being posed; what it finds at last is taken in."""
    import threading

    from vo.window import WindowJob

    release = threading.Event()
    solve = WindowJob.solve
    monkeypatch.setattr(WindowJob, "solve", lambda job: (release.wait(20), solve(job))[1])
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly, waits_for_window=False)
    poses = driving_path(30)
    steps = follow(odometry, corridor(), poses[:20], noise_px=0.3)
    assert all(step.map_update is None for step in steps)
    assert steps[-1].pose.status is TrackingStatus.TRACKING
    release.set()
    odometry._map._refinement.solution.result(20)
    later = follow(odometry, corridor(), poses[20:], noise_px=0.3, start=20)
    assert later[0].map_update is not None
    estimate, truth = positions([*steps, *later])[8:], np.array([T[:3, 3] for T in poses])[8:]
    scale = (estimate * truth).sum() / (estimate**2).sum()
    assert np.linalg.norm(scale * estimate - truth, axis=1).max() < 0.1
    odometry.close()


def test_a_failing_window_ends_the_run(monkeypatch):
    from vo.window import WindowJob

    def fail(job):
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(WindowJob, "solve", fail)
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly)
    with pytest.raises(ZeroDivisionError, match="broken"):
        follow(odometry, corridor(), driving_path(10))
    odometry.close()


# --- leftover distortion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.01, -0.01])
def test_distortion_that_the_calibration_left_over_is_found(kappa):
    """The world is seen through a lens that the calibration knows nothing of."""
    lens = Camera(CAMERA.width, CAMERA.height, CAMERA.K.copy(), np.array([kappa, 0, 0, 0.0]), CameraModel.BROWN)
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS, radial_sigma=0.01), TwoViewConfig(), match_exactly)
    follow(odometry, make_world(2000, (-10.0, -5.0, 1.0), (10.0, 5.0, 40.0), 1), driving_path(60), 0.2, lens)
    assert odometry.radial_distortion == pytest.approx(kappa, rel=0.25)
    odometry.close()


def test_a_true_calibration_is_left_alone():
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly)
    follow(odometry, corridor(), driving_path(60), noise_px=0.3)
    assert abs(odometry.radial_distortion) < 2e-3
    odometry.close()


def test_corrected_rays_undo_a_small_distortion():
    rays = np.random.default_rng(0).uniform(-0.5, 0.5, (50, 2))
    distorted = rays * (1 + 1e-3 * (rays**2).sum(1, keepdims=True))
    np.testing.assert_allclose(corrected_rays(distorted, 1e-3), rays, atol=2e-6)
    np.testing.assert_allclose(RadialPrior(1e-3).corrected(distorted), rays, atol=2e-6)


# --- places seen again ----------------------------------------------------------------------------------------------


def test_a_place_seen_again_is_tied_to_its_old_landmarks():
    """Forth and back: at the end the camera sees what it saw at first, under the tracks of then."""
    odometry = Odometry(
        CAMERA, OdometryConfig(**SETTINGS, window_size=3, window_fixed=2, reconnect_keyframes=0), TwoViewConfig(),
        match_exactly,
    )  # fmt: skip
    forth = driving_path(30)
    steps = follow(odometry, corridor(), [*forth, *forth[::-1]], noise_px=0.3)
    first = np.concatenate([step.tracks.track_ids for step in steps[:15]])
    assert np.isin(steps[-1].tracks.track_ids, first).mean() > 0.4
    end, unit = positions(steps)[-1], np.linalg.norm(positions(steps)[29] - positions(steps)[10])
    assert np.linalg.norm(end - positions(steps)[0]) < 0.15 * unit
    odometry.close()


def test_a_lost_camera_is_found_by_votes_in_an_old_keyframe():
    """Carried to where it has been long ago: the newest keyframes see nothing of it."""
    odometry = Odometry(
        CAMERA, OdometryConfig(**SETTINGS, window_size=3, recovery_keyframes=2), TwoViewConfig(), match_exactly
    )
    world = make_world(3000, (-6.0, -3.0, 1.0), (6.0, 3.0, 80.0), 3)
    near = [make_pose(np.eye(3), np.array([0.0, 0.0, 0.8 * i])) for i in range(50)]
    follow(odometry, world, near, noise_px=0.2)
    lost = odometry.step(as_frame(50), empty_features())
    assert lost.pose.status is TrackingStatus.LOST and lost.pose.T_world_camera is None
    back = near[10] @ exp_se3(np.array([0.05, 0.0, 0.0, 0.0, 0.01, 0.0]))
    found = odometry.step(as_frame(51), observe(world, back))
    assert found.pose.status is TrackingStatus.RELOCALIZED and found.pose.segment_id == 0
    odometry.close()


def test_the_map_is_bounded():
    odometry = Odometry(
        CAMERA,
        OdometryConfig(**{**SETTINGS, "keyframe_parallax_px": 0.5}, map_keyframes=20, window_size=3),
        TwoViewConfig(),
        match_exactly,
    )
    world = make_world(2000, (-6.0, -3.0, 1.0), (6.0, 3.0, 80.0), 3)
    poses = [make_pose(np.eye(3), np.array([0.0, 0.0, 0.8 * i])) for i in range(60)]
    steps = follow(odometry, world, poses, noise_px=0.2)
    assert sum(step.pose.is_keyframe for step in steps) > 30
    assert len(odometry._map.window.older) == 20
    odometry.close()


# --- a camera that hangs, a plane -----------------------------------------------------------------------------------


def test_an_image_that_comes_again_has_no_pose_and_costs_nothing():
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly)
    rng, world, poses = np.random.default_rng(0), corridor(), driving_path(30)
    frames = [noisy_frame(i, rng) for i in range(30)]
    for i in range(15):
        odometry.step(frames[i], observe(world, poses[i]))
    held = odometry.step(replace(frames[14], index=15, timestamp_ns=frames[15].timestamp_ns), observe(world, poses[14]))
    assert held.pose.is_stationary
    for i in range(16, 18):
        hung = odometry.step(
            replace(frames[14], index=i, timestamp_ns=frames[i].timestamp_ns), observe(world, poses[14])
        )
        assert hung.pose.T_world_camera is None and hung.pose.rejection is Rejection.REPEATED_IMAGE
    again = odometry.step(frames[18], observe(world, poses[18]))
    assert again.pose.status is TrackingStatus.RELOCALIZED and again.pose.segment_id == 0
    odometry.close()


def plane_views(seed=0, noise_px=0.2):
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.uniform(-3, 3, 300), rng.uniform(-2, 2, 300), np.full(300, 6.0)])
    points[:, 2] += 0.5 * points[:, 0]
    T = exp_se3(np.array([0.9, 0.2, 0.5, 0.03, -0.12, 0.02]))
    rays = []
    for pose in (np.eye(4), T):
        seen, _ = reproject(pose, points)
        rays.append(seen + rng.normal(0, noise_px / 500, seen.shape))
    return T, rays[0], rays[1]


@pytest.mark.parametrize("seed", range(6))
def test_a_map_begins_on_a_plane_with_the_true_motion_or_not_at_all(seed):
    T, rays0, rays1 = plane_views(seed)
    found = estimate_first_pose(rays0, rays1, 500.0, TwoViewConfig())
    if isinstance(found, Rejection):
        assert found is Rejection.DEGENERATE
        return
    direction = T[:3, 3] / np.linalg.norm(T[:3, 3])
    assert found.T_camera0_camera1[:3, 3] @ direction > np.cos(np.deg2rad(6))


def test_points_off_the_plane_settle_it():
    T, rays0, rays1 = plane_views()
    rng = np.random.default_rng(1)
    points = rng.uniform((-3, -2, 3), (3, 2, 12), (300, 3))
    rays0 = np.concatenate([rays0, reproject(np.eye(4), points)[0]])
    rays1 = np.concatenate([rays1, reproject(T, points)[0]])
    found = estimate_first_pose(rays0, rays1, 500.0, TwoViewConfig())
    assert isinstance(found, RelativePose)
    direction = T[:3, 3] / np.linalg.norm(T[:3, 3])
    assert found.T_camera0_camera1[:3, 3] @ direction > np.cos(np.deg2rad(1))


# --- metres ---------------------------------------------------------------------------------------------------------


def depth_image(world, T_world_camera):
    """Depths of the world's points, 5 px wide each, where nothing nearer hides them."""
    points = transform(invert_pose(T_world_camera), world.points)
    points = points[points[:, 2] > 0.1]
    pixels = np.rint(homogeneous(points[:, :2] / points[:, 2:]) @ CAMERA.K.T)[:, :2].astype(int)
    depth = np.zeros((CAMERA.height, CAMERA.width), np.float32)
    order = np.argsort(-points[:, 2])
    for (x, y), z in zip(pixels[order], points[order, 2], strict=True):
        if 3 <= x < CAMERA.width - 3 and 3 <= y < CAMERA.height - 3:
            depth[y - 3 : y + 4, x - 3 : x + 4] = z
    return depth


def test_depth_gives_metres_from_the_first_map_on():
    world, poses = make_world(300, (-4.0, -2.0, 2.0), (4.0, 2.0, 12.0)), driving_path(30)
    scale = ScaleSource(DepthScaleConfig(max_depth_m=30.0))
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly, scale=scale)
    rng = np.random.default_rng(0)
    steps = []
    for i, T in enumerate(poses):
        frame = replace(as_frame(i), depth=depth_image(world, T))
        steps.append(odometry.step(frame, observe(world, T, 0.2, rng)))
    tracked = [i for i, step in enumerate(steps) if step.pose.scale_source == "depth"]
    assert tracked[-1] == 29 and len(tracked) > 22
    truth = np.array([T[:3, 3] for T in poses])
    np.testing.assert_allclose(positions(steps)[tracked], truth[tracked], atol=0.1)
    odometry.close()


def test_speeds_from_outside_give_metres():
    poses = driving_path(40)
    config = ExternalScaleConfig(speed_sigma_mps=0.02)
    external = ExternalReadings(config)
    for i in range(41):
        external.add_speed(i * 100_000_000, 2.0)
    odometry = Odometry(
        CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly, scale=ScaleSource(config, external=external)
    )
    steps = follow(odometry, corridor(), poses, noise_px=0.2)
    assert steps[-1].pose.scale_source == "external"
    length = np.linalg.norm(np.diff(positions(steps)[-20:], axis=0), axis=1).sum()
    assert length == pytest.approx(19 * 0.2, rel=0.05)
    odometry.close()


def test_metric_poses_never_jump():
    """The scale that readings correct changes the map around the camera, not the camera's place."""
    poses = driving_path(40)
    truth = {i: T[:3, 3] * (1.0 if i < 20 else 1.1) for i, T in enumerate(poses)}
    scale = ScaleSource(GroundTruthScaleConfig(), true_position=lambda frame: truth[frame.index])
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly, scale=scale)
    steps = follow(odometry, corridor(), poses, noise_px=0.1)
    metric = [i for i, step in enumerate(steps) if step.pose.scale_source == "groundtruth"]
    lengths = np.linalg.norm(np.diff(positions(steps)[metric], axis=0), axis=1)
    assert lengths.max() < 0.3 and lengths.min() > 0.1
    odometry.close()


@pytest.mark.parametrize("config", [ExternalScaleConfig(), GroundTruthScaleConfig()])
def test_a_scale_source_without_what_it_needs_is_refused(config):
    with pytest.raises(ValueError, match=config.name):
        ScaleSource(config)


# --- uncertainty ----------------------------------------------------------------------------------------------------


def test_the_covariance_of_a_pose_is_that_of_many_runs():
    """Normalised estimation error squared of the posed frame over 200 draws of the noise, within its 95 % bounds."""
    from scipy.stats import chi2

    from vo.absolute_pose import refine_absolute_pose
    from vo.geometry import (
        log_se3,
    )

    rng = np.random.default_rng(0)
    points = rng.uniform((-4, -3, 4), (4, 3, 15), (200, 3))
    T = exp_se3(np.array([0.3, -0.1, 0.2, 0.05, -0.02, 0.03]))
    rays, _ = reproject(T, points)
    errors = []
    for _ in range(200):
        pose = refine_absolute_pose(T, points, rays + rng.normal(0, 0.5 / 500, rays.shape), 500.0, 3.0)
        xi = log_se3(invert_pose(T) @ pose.T_world_camera)
        errors.append(xi @ np.linalg.solve(pose.covariance, xi))
    low, high = chi2.ppf([0.025, 0.975], 6 * 200) / 200
    assert low < np.mean(errors) < high


# --- what is refined ------------------------------------------------------------------------------------------------


def test_the_refined_trajectory_is_better_than_the_online_one(tmp_path):
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly)
    refined, poses = RefinedTrajectory(), driving_path(60)
    steps = follow(odometry, corridor(), poses, noise_px=1.0)
    for step in steps:
        if step.map_update is not None:
            refined.correct(step.map_update)
        refined.add(step.pose)
    refined.correct(odometry.finish())
    truth = np.array([T[:3, 3] for T in poses])

    def error(estimate):
        tracked = slice(12, None)
        scale = (estimate[tracked] * truth[tracked]).sum() / (estimate[tracked] ** 2).sum()
        return np.sqrt(((scale * estimate[tracked] - truth[tracked]) ** 2).sum(1).mean())

    assert error(refined.poses()[:, :3, 3]) < error(positions(steps))
    refined.write(tmp_path)
    written = read_trajectory(tmp_path / "trajectory_refined_tum.txt")
    np.testing.assert_allclose(written.T_world_camera, refined.poses(), atol=1e-6)
    odometry.close()


def test_a_camera_found_in_an_old_keyframe_does_not_revive_dead_tracks():
    """Features of an older keyframe without a landmark have lost their tracks meanwhile."""
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS, window_size=2), TwoViewConfig(), match_exactly)
    poses = driving_path(60)
    steps = follow(odometry, corridor(), poses, noise_px=1.0)
    old = odometry._map.window.older[1]
    dead = np.setdiff1d(old.track_ids[odometry.tracks.landmarks(old.track_ids)[1]], steps[-1].tracks.track_ids)[::2]
    odometry.tracks.drop_landmarks(dead)
    odometry.tracks.prune(np.setdiff1d(odometry.tracks._ids, dead))
    (lost,) = follow(odometry, corridor(seed=9), [poses[-1]], start=60, seed=1)
    assert lost.pose.status is TrackingStatus.LOST and len(dead) > 20
    found = follow(odometry, corridor(), poses[old.frame_index : old.frame_index + 4], noise_px=1.0, start=61)
    assert [step.pose.status for step in found[:2]] == [TrackingStatus.RELOCALIZED, TrackingStatus.TRACKING]
    assert {step.pose.segment_id for step in found} == {0}
    odometry.close()


def test_depths_join_the_window():
    """Landmarks lie nearer to the measured depths than images and unit alone put them."""
    world, poses = make_world(300, (-4.0, -2.0, 2.0), (4.0, 2.0, 12.0)), driving_path(25)

    def disagreement(inverse_sigma):
        scale = DepthScaleConfig(max_depth_m=30.0, inverse_sigma=inverse_sigma)
        odometry = Odometry(
            CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly, scale=ScaleSource(scale)
        )
        rng = np.random.default_rng(0)
        images = [depth_image(world, T) for T in poses]
        for i, (T, depth) in enumerate(zip(poses, images, strict=True)):
            odometry.step(replace(as_frame(i), depth=depth), observe(world, T, 0.5, rng))
        odometry.finish()
        odometry.close()
        view = odometry.keyframes[-1]
        assert (view.inverse_depths is None) == (inverse_sigma == 0)
        points, known = odometry.tracks.landmarks(view.track_ids)
        z = (points[known] - view.T_world_camera[:3, 3]) @ view.T_world_camera[:3, 2]
        measured = depths_at(images[view.frame_index], view.keypoints[known], scale)
        return float(np.nanmedian(np.abs(1 / z - 1 / measured)))

    assert disagreement(0.001) < 0.6 * disagreement(0.0)
