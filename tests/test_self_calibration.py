from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic_world import CAMERA, as_frame, driving_path, make_world, match_exactly, observe

from vo.bundle_problem import FocalPrior, WindowProblem, WindowSolution, corrected_rays
from vo.cli import main
from vo.config import OdometryConfig, SelfCalibrationConfig, StereoScaleConfig, TwoViewConfig
from vo.geometry import exp_se3, make_pose, project, reproject, undistort
from vo.odometry import Odometry
from vo.self_calibration import FocalSearch, _posed_for, focal_sigma, solve_lens, with_lens
from vo.sources.cameras import read_camera
from vo.types import Camera, CameraModel

SETTINGS = {"init_parallax_deg": 0.4, "keyframe_parallax_px": 2.0}
ORB = ("frontend.extractor.name=orb", "frontend.matcher.name=nearest", "frontend.extractor.max_keypoints=300")


def with_focal(camera: Camera, factor: float) -> Camera:
    return with_lens(camera, float(np.log(factor)), 0.0)


def calibrate(factor, poses, noise_px=0.2, true_camera=CAMERA):
    """Runs an odometry that takes the focal length for `factor` times what it is."""
    believed = with_focal(CAMERA, factor)
    config = OdometryConfig(**SETTINGS, self_calibration=SelfCalibrationConfig(enabled=True, min_keyframes=10))
    odometry = Odometry(believed, config, TwoViewConfig(), match_exactly)
    world, rng = make_world(700, (-10.0, -5.0, 1.0), (10.0, 5.0, 40.0), 1), np.random.default_rng(3)
    steps = [odometry.step(as_frame(i), observe(world, T, noise_px, rng, true_camera)) for i, T in enumerate(poses)]
    odometry.finish()
    odometry.close()
    return odometry, steps


@pytest.fixture(scope="module", params=[0.8, 1.2])
def calibrated(request):
    poses = driving_path(50)
    return request.param, poses, *calibrate(request.param, poses)


def test_a_focal_length_20_percent_off_is_found(calibrated):
    factor, _, odometry, _ = calibrated
    found = odometry.focal_estimate
    assert found.is_found and found.initial_px == pytest.approx(500 * factor)
    assert found.focal_px == pytest.approx(500.0, rel=0.01)
    assert abs(found.focal_px - 500.0) < 3 * found.sigma_px
    assert odometry.camera.focal_px == found.focal_px
    assert odometry.camera.K[0, 2] == CAMERA.K[0, 2]


def test_a_new_segment_says_that_poses_before_are_bent(calibrated):
    """It begins with every keyframe in its new place, and no frame goes without a pose."""
    _, _, _, steps = calibrated
    segments = [step.pose.segment_id for step in steps]
    assert segments[0] == 0 and segments[-1] == 1 and all(np.diff(segments) >= 0)
    first = next(step for step in steps if step.map_update is not None and step.map_update.segment_id == 1)
    assert len(first.map_update.keyframe_indices) >= 10 and first.map_update.keyframe_indices[0] == 0
    assert all(step.pose.T_world_camera is not None for step in steps)


def test_from_then_on_the_path_is_true(calibrated):
    _, poses, _, steps = calibrated
    late = np.array([step.pose.segment_id == 1 for step in steps])
    assert late.sum() > 15
    estimate = np.array([step.pose.T_world_camera[:3, 3] for step in steps])[late]
    truth = np.array([T[:3, 3] for T in poses])[late]
    length = np.linalg.norm(np.diff(truth, axis=0), axis=1).sum()
    estimate, truth = estimate - estimate.mean(axis=0), truth - truth.mean(axis=0)
    U, S, Vt = np.linalg.svd(truth.T @ estimate)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(U @ Vt))])
    scale = (S * signs).sum() / (estimate**2).sum()
    errors = np.linalg.norm(truth - scale * estimate @ ((U * signs) @ Vt).T, axis=1)
    assert errors.max() < 0.01 * length


def test_a_nearly_true_focal_length_stays_in_one_segment_and_repeats():
    first, second = (calibrate(1.01, driving_path(35)) for _ in range(2))
    assert first[0].focal_estimate.focal_px == pytest.approx(500.0, rel=0.02)
    assert {step.pose.segment_id for step in first[1]} == {0}
    assert first[0].focal_estimate == second[0].focal_estimate
    for a, b in zip(first[1], second[1], strict=True):
        np.testing.assert_array_equal(a.pose.T_world_camera, b.pose.T_world_camera)


def test_distortion_is_found_along_and_goes_into_the_camera():
    lens = Camera(CAMERA.width, CAMERA.height, CAMERA.K.copy(), np.array([0.03, 0, 0, 0.0]), CameraModel.BROWN)
    odometry, _ = calibrate(1.1, driving_path(50), true_camera=lens)
    assert odometry.camera.focal_px == pytest.approx(500.0, rel=0.01)
    assert odometry.camera.model is CameraModel.BROWN
    assert odometry.camera.distortion[0] == pytest.approx(0.03, rel=0.3)


def test_straight_ahead_keeps_the_guess_and_says_so():
    poses = [make_pose(np.eye(3), np.array([0.0, 0.0, 0.2 * i])) for i in range(40)]
    odometry, steps = calibrate(1.2, poses)
    found = odometry.focal_estimate
    assert not found.is_found
    assert found.focal_px == found.initial_px == pytest.approx(600.0)
    assert found.sigma_px > 0.03 * 600
    assert odometry.camera.focal_px == pytest.approx(600.0)
    assert {step.pose.segment_id for step in steps} == {0}


def test_standing_still_is_no_calibration():
    odometry, _ = calibrate(1.2, [np.eye(4)] * 15)
    assert not odometry.focal_estimate.is_found
    assert odometry.focal_estimate.sigma_px is None


def test_without_being_asked_nothing_is_looked_for():
    odometry = Odometry(CAMERA, OdometryConfig(**SETTINGS), TwoViewConfig(), match_exactly)
    odometry.close()
    assert odometry.focal_estimate is None
    assert odometry.camera is CAMERA


# --- parts ----------------------------------------------------------------------------------------------------------


def test_a_camera_takes_a_leftover_distortion_in():
    """Seen through the new camera, points lie where the leftover distortion puts them."""
    rays = np.random.default_rng(0).uniform(-0.6, 0.6, (200, 2))
    pixels = project(np.column_stack([rays, np.ones(200)]), CAMERA)
    wanted = corrected_rays(rays, 0.005)
    for camera in (CAMERA, Camera(640, 480, CAMERA.K.copy(), np.zeros(4), CameraModel.BROWN)):
        np.testing.assert_allclose(undistort(pixels, with_lens(camera, 0.0, 0.005)), wanted, atol=5e-5)
    longer = with_lens(CAMERA, np.log(1.1), 0.0)
    np.testing.assert_allclose(undistort(pixels, longer), rays / 1.1, atol=1e-6)
    assert longer.model is CameraModel.PINHOLE
    fisheye = Camera(640, 480, CAMERA.K.copy(), np.zeros(4), CameraModel.FISHEYE)
    assert with_lens(fisheye, 0.1, 0.0).model is CameraModel.FISHEYE
    with pytest.raises(ValueError, match="fisheye"):
        with_lens(fisheye, 0.0, 0.01)


def make_problem(poses, factor=1.0, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.uniform([-3, -2, 6], [3, 2, 20], (150, 3))
    rays = np.concatenate([reproject(T, points)[0] for T in poses]) / factor
    pose_index, point_index = np.repeat(np.arange(len(poses)), 150), np.tile(np.arange(150), len(poses))
    return WindowProblem(np.stack(poses), 1, points, pose_index, point_index, rays, 500.0 * factor, refines_focal=True)


def test_poses_for_another_focal_length_still_explain_the_images():
    """To first order: what is left is a small part of what a wrong focal length costs with the poses as they were."""
    poses = driving_path(12)
    problem = make_problem(poses)
    stretched = _posed_for(problem, 1.25)
    assert stretched.focal.log_ratio == pytest.approx(np.log(1.25))

    def median_px(p, T, points):
        projected = np.concatenate(
            [reproject(T[i], points[p.point_index[p.pose_index == i]])[0] for i in range(len(T))]
        )
        return float(np.median(np.linalg.norm(projected - p.rays / 1.25, axis=1))) * 625

    assert median_px(problem, stretched.T_world_camera, stretched.points) < 0.1 * median_px(
        problem, problem.T_world_camera, problem.points
    )


@pytest.mark.parametrize("factor", [0.75, 1.35])
def test_the_search_reaches_focal_lengths_far_off(factor):
    """From poses and points as a wrong focal length would have given them."""
    true = make_problem(driving_path(15))
    wrong = _posed_for(true, factor)
    problem = replace(
        true,
        T_world_camera=wrong.T_world_camera,
        points=wrong.points,
        rays=true.rays / factor,
        focal_px=500.0 * factor,
        focal=FocalPrior(0.0, 1.0),
    )
    solution = solve_lens(problem, 1.0)
    assert problem.focal_px * np.exp(solution.focal.log_ratio) == pytest.approx(500.0, rel=1e-3)
    assert np.median(solution.errors_px) < 0.05
    assert len(solution.points) == len(true.points)


def test_precision_is_judged_with_care():
    """Three times the scatter, and never better than the floor."""
    problem = make_problem([exp_se3(np.array([0.2 * i, 0, 0, 0, 0.05 * i, 0])) for i in range(6)])
    solution = solve_lens(problem, 1.0)
    assert focal_sigma(solution) >= 0.003
    noisy = replace(solution, errors_px=np.full(100, 1.1774), focal=FocalPrior(0.0, 1e4))
    assert focal_sigma(noisy) == pytest.approx(np.hypot(0.03, 0.003))


def solution_with(log_ratio, sigma):
    information = (3.0 / np.sqrt(sigma**2 - 0.003**2)) ** 2
    return WindowSolution(
        np.eye(4)[None], np.zeros((1, 3)), np.full(10, 1.1774), 1.0, 1.0, 1, focal=FocalPrior(log_ratio, information)
    )


def test_the_search_believes_what_is_precise_and_ends_when_nothing_changes():
    search = FocalSearch(SelfCalibrationConfig(enabled=True, min_keyframes=10, max_sigma=0.03), CAMERA)
    assert not search.is_due(9) and search.is_due(10)
    search.begin(10)
    assert len(search.starts) > 1
    assert search.take_in(CAMERA, solution_with(0.2, 0.05)) is None
    assert search.estimate.sigma_px == pytest.approx(0.05 * 500) and not search.estimate.is_found
    assert not search.is_due(15) and search.is_due(16) and search.is_due(12, is_last=True)
    assert not search.is_due(10, is_last=True)
    search.begin(16)
    camera = search.take_in(CAMERA, solution_with(0.2, 0.02))
    assert camera.focal_px == pytest.approx(500 * np.exp(0.2)) and search.estimate.is_found
    assert search.starts == (1.0,) and search.is_due(30)
    assert search.take_in(camera, solution_with(0.002, 0.005)) is not None
    assert not search.is_due(1000) and not search.is_due(1000, is_last=True)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="min_keyframes"):
        SelfCalibrationConfig(min_keyframes=50, max_keyframes=20)
    with pytest.raises(ValueError, match="self_calibration: a stereo"):
        OdometryConfig(scale=StereoScaleConfig(), self_calibration=SelfCalibrationConfig(enabled=True))


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_camera_it_found(tmp_path, capsys):
    settings = [flag for setting in ORB for flag in ("--set", setting)]
    arguments = ["run", "demo", *settings, "--publish", "off", "--max-frames", "60", "--output", str(tmp_path)]
    assert main([*arguments, "--fov-deg", "80", "--self-calibrate"]) == 0
    said = capsys.readouterr()
    assert "guess from --fov-deg 80" in said.err
    summary = json.loads((tmp_path / "summary.json").read_text())["self_calibration"]
    assert summary["initial_px"] == pytest.approx(
        read_camera(tmp_path / "camera.yaml").camera.width / 2 / 0.8391, rel=1e-3
    )
    if summary["is_found"]:
        assert f"focal length {summary['focal_px']:.1f} px" in said.out
        assert read_camera(tmp_path / "camera.yaml").camera.focal_px == pytest.approx(summary["focal_px"])
    else:
        assert "do not show the focal length" in said.out
