"""A chain of relative poses without a map: exact truth from a world of points, its scale, its losses, its threads."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from synthetic_world import CAMERA, World, as_frame, driving_path, empty_features, make_world, match_exactly, observe
from test_pipeline import NUM_FRAMES, PATH, PointSource, point_frontend

from frontends.base import Features, Matches
from vo.cli import main
from vo.config import Config, OdometryConfig, TwoViewConfig
from vo.config_loader import load_config
from vo.geometry import exp_se3, exp_so3, invert_pose, log_se3, make_pose, rotation_angle
from vo.odometry_step import OdometryStep
from vo.pair_poses import PairPoser, PairsAhead
from vo.pipeline import run
from vo.stages import FrameResult
from vo.two_view_odometry import TwoViewOdometry
from vo.types import ConfigError, FloatArray, Rejection, TrackingStatus

TWO_VIEW = ["odometry.mode=two_view"]


def make_chain(match=match_exactly, **settings) -> TwoViewOdometry:
    return TwoViewOdometry(CAMERA, OdometryConfig(**{"init_parallax_deg": 0.4, **settings}), TwoViewConfig(), match)


def corridor(seed: int = 0) -> World:
    return make_world(1000, (-6.0, -3.0, 1.0), (6.0, 3.0, 30.0), seed)


def follow(chain, world, poses, noise_px=0.0, start=0, seed=7) -> list[OdometryStep]:
    rng = np.random.default_rng(seed)
    return [chain.step(as_frame(start + i), observe(world, T, noise_px, rng)) for i, T in enumerate(poses)]


def positions(steps: list[OdometryStep]) -> FloatArray:
    return np.array([step.pose.T_world_camera[:3, 3] for step in steps])


def scaled_errors(steps, poses, scale: float | None = None) -> FloatArray:
    """Distances once the unit is the true one; frames that only report a rotation are left out, by contract."""
    is_placed = np.array([step.pose.rejection is None for step in steps])
    estimate, truth = positions(steps)[is_placed], np.array([T[:3, 3] for T in poses])[is_placed]
    scale = (estimate * truth).sum() / (estimate**2).sum() if scale is None else scale
    return np.linalg.norm(scale * estimate - truth, axis=1)


def test_without_noise_the_path_is_exact() -> None:
    """Keypoints are float32, 2e-5 px: no error of the chain itself shows."""
    poses = driving_path(40)
    steps = follow(make_chain(), corridor(), poses)
    assert [step.pose.status for step in steps[4:]] == [TrackingStatus.TRACKING] * 36
    assert [step.pose.is_keyframe for step in steps] == [True] + [False] * 39
    assert scaled_errors(steps, poses).max() < 1e-4
    for step, T in zip(steps, poses, strict=True):
        assert rotation_angle(step.pose.T_world_camera[:3, :3].T @ T[:3, :3]) < 1e-5
        assert step.map_update is None and step.pose.scale_source == "relative"


def test_with_noise_the_scale_drifts_slowly() -> None:
    poses = driving_path(60)
    steps = follow(make_chain(), corridor(), poses, noise_px=0.3)
    lengths = [
        np.linalg.norm(np.diff(path, axis=0), axis=1)[5:] for path in (positions(steps), [T[:3, 3] for T in poses])
    ]
    ratios = lengths[0] / lengths[1]
    assert np.median(ratios[-10:]) == pytest.approx(np.median(ratios[:10]), rel=0.03)
    assert scaled_errors(steps, poses).max() < 0.02 * lengths[1].sum()


def test_the_first_points_set_the_unit() -> None:
    """As in the map: their median depth is 1, whatever the true one."""
    chain, path = make_chain(), driving_path(6)
    steps = follow(chain, corridor(), path)
    depths = [(invert_pose(path[3]) @ np.append(p, 1))[2] for p in corridor().points]
    seen = observe(corridor(), path[3])
    unit = np.median([depth for depth in depths if depth > 0]) if seen.num_valid else 0
    scale = np.linalg.norm(path[5][:3, 3]) / np.linalg.norm(steps[5].pose.T_world_camera[:3, 3])
    assert scale == pytest.approx(unit, rel=0.3)


def test_a_rotation_alone_invents_no_translation() -> None:
    poses = [make_pose(exp_so3(np.array([0.0, 0.02 * i, 0.0])), np.zeros(3)) for i in range(12)]
    steps = follow(make_chain(), corridor(), poses, noise_px=0.2)
    for step, T in zip(steps[1:], poses[1:], strict=True):
        assert step.pose.status is TrackingStatus.INITIALIZING and step.pose.rejection is Rejection.PURE_ROTATION
        np.testing.assert_array_equal(step.pose.T_world_camera[:3, 3], 0.0)
        assert np.rad2deg(rotation_angle(step.pose.T_world_camera[:3, :3].T @ T[:3, :3])) < 0.1


def test_the_scale_outlives_a_turn_on_the_spot() -> None:
    """Nothing but depths that are turned along knows after the turn how long a translation is."""
    drive = driving_path(15)
    turn = [drive[-1] @ make_pose(exp_so3(np.array([0.0, 0.01 * i, 0.0])), np.zeros(3)) for i in range(1, 13)]
    on = [turn[-1] @ exp_se3(np.array([0.05 * i, 0.0, 0.2 * i, 0, 0, 0])) for i in range(1, 10)]
    poses = [*drive, *turn, *on]
    steps = follow(make_chain(), corridor(), poses)
    for step in steps[16:27]:
        assert step.pose.status is TrackingStatus.TRACKING and step.pose.rejection is Rejection.PURE_ROTATION
        np.testing.assert_array_equal(step.pose.T_world_camera[:3, 3], steps[14].pose.T_world_camera[:3, 3])
        assert np.trace(step.pose.covariance[:3, :3]) > np.trace(steps[14].pose.covariance[:3, :3])
    assert {step.pose.segment_id for step in steps} == {0}
    assert scaled_errors(steps, poses).max() < 1e-3


def test_standing_still_holds_the_pose_to_the_bit() -> None:
    poses = driving_path(12)
    steps = follow(make_chain(), corridor(), [*poses, *[poses[-1]] * 12], noise_px=0.2)
    for step in steps[12:]:
        assert step.pose.is_stationary and step.pose.status is TrackingStatus.TRACKING
        np.testing.assert_array_equal(step.pose.T_world_camera, steps[11].pose.T_world_camera)
        np.testing.assert_array_equal(step.pose.covariance, steps[11].pose.covariance)
    still = follow(make_chain(), corridor(), [np.eye(4)] * 10, noise_px=0.2)
    assert all(step.pose.is_stationary and step.pose.status is TrackingStatus.INITIALIZING for step in still[1:])


def test_creeping_adds_up() -> None:
    """From one frame to the next nothing moves that could be seen."""
    poses = driving_path(12)
    path = [*poses, *[poses[-1] @ exp_se3(np.array([0.004 * i, 0, 0, 0, 0, 0])) for i in range(1, 80)]]
    steps = follow(make_chain(), corridor(), path)
    is_held = [step.pose.is_stationary or step.pose.rejection is not None for step in steps[12:]]
    assert 0.3 < np.mean(is_held) < 1.0
    assert scaled_errors(steps, path).max() < 0.02
    # Once it has been seen, the position is that of now and not of the last frame that showed a motion.
    assert np.ptp(np.linalg.norm(np.diff(positions(steps[12:]), axis=0), axis=1)) > 0


def test_a_loss_is_bridged_from_the_last_good_frame() -> None:
    poses, world, chain = driving_path(30), corridor(), make_chain()
    before = follow(chain, world, poses[:12])
    dark = [chain.step(as_frame(12 + i), empty_features()) for i in range(2)]
    after = follow(chain, world, poses[14:], start=14)
    for step in dark:
        assert step.pose.status is TrackingStatus.LOST and step.pose.T_world_camera is None
        assert step.pose.rejection is Rejection.TOO_FEW_MATCHES and len(step.tracks.track_ids) == 0
    assert after[0].pose.status is TrackingStatus.RELOCALIZED and after[1].pose.status is TrackingStatus.TRACKING
    assert {step.pose.segment_id for step in [*before, *dark, *after]} == {0}
    assert scaled_errors([*before, *after], [*poses[:12], *poses[14:]]).max() < 1e-3


def test_another_place_begins_a_new_segment() -> None:
    chain = make_chain(max_lost_frames=3)
    follow(chain, corridor(0), driving_path(10))
    elsewhere = follow(chain, corridor(1), driving_path(20), start=10)
    assert [step.pose.status for step in elsewhere[:3]] == [TrackingStatus.LOST] * 3
    first = elsewhere[3].pose
    assert (first.segment_id, first.status, first.is_keyframe) == (1, TrackingStatus.INITIALIZING, True)
    np.testing.assert_array_equal(first.T_world_camera, np.eye(4))
    assert elsewhere[-1].pose.status is TrackingStatus.TRACKING
    path = [invert_pose(driving_path(4)[-1]) @ T for T in driving_path(20)[3:]]
    assert scaled_errors(elsewhere[3:], path).max() < 1e-3


def test_a_length_that_no_depth_gives_is_not_made_up() -> None:
    """Every pair shares its own half of the points: no depth of one link is seen in the next."""
    world, poses, count = corridor(), driving_path(12), 0

    def match(features0: Features, features1: Features) -> Matches:
        nonlocal count
        count += 1
        found = match_exactly(features0, features1)
        points = (features0.descriptors.numpy()[found.indices[:, 0]] @ world.descriptors.T).argmax(axis=1)
        mine = found.indices[points % 2 == count % 2] if count > 6 else found.indices
        return Matches(mine.copy(), np.ones(len(mine), np.float32))

    steps = follow(make_chain(match), world, poses)
    assert steps[6].pose.status is TrackingStatus.TRACKING and steps[6].pose.segment_id == 0
    broken = next(step for step in steps if step.pose.segment_id == 1)
    assert broken.pose.rejection is Rejection.TOO_FEW_INLIERS and broken.pose.status is TrackingStatus.INITIALIZING


def test_tracks_keep_their_point_and_count_its_frames() -> None:
    world, owners, lengths = corridor(), {}, {}
    chain = make_chain()
    for i, T in enumerate(driving_path(20)):
        features = observe(world, T)
        step = chain.step(as_frame(i), features)
        points = (features.descriptors.numpy() @ world.descriptors.T).argmax(axis=1).tolist()
        for track_id, point, length in zip(
            step.tracks.track_ids.tolist(), points, step.tracks.lengths.tolist(), strict=True
        ):
            assert owners.setdefault(track_id, point) == point
            assert length == lengths.get(track_id, 0) + 1
            lengths[track_id] = length
        assert len(np.unique(step.tracks.track_ids)) == len(step.tracks.track_ids)
    assert step.tracks.lengths.max() == 20
    assert not step.tracks.has_landmark.any()


def test_wrong_matches_do_not_bend_the_path() -> None:
    poses, rng = driving_path(30), np.random.default_rng(0)

    def match_badly(features0: Features, features1: Features) -> Matches:
        found = match_exactly(features0, features1)
        indices = found.indices.copy()
        wrong = np.flatnonzero(rng.random(len(indices)) < 0.3)
        indices[wrong, 1] = np.roll(indices[wrong, 1], 1)
        return Matches(indices, found.scores.copy())

    steps = follow(make_chain(match_badly), corridor(), poses, noise_px=0.2)
    assert {step.pose.segment_id for step in steps} == {0}
    assert scaled_errors(steps, poses).max() < 0.02 * 0.2 * len(poses)


def test_errors_along_the_chain_are_as_large_as_it_says() -> None:
    """16 draws of the noise of a drive of 14 frames: the scatter of the last pose beside its covariance."""
    poses, world = driving_path(14), corridor()
    ends, covariances = [], []
    for seed in range(16):
        pose = follow(make_chain(), world, poses, noise_px=0.3, seed=seed)[-1].pose
        T = pose.T_world_camera.copy()
        # The unit is a convention: brought to the true one.
        factor = np.linalg.norm(poses[-1][:3, 3]) / np.linalg.norm(T[:3, 3])
        T[:3, 3] *= factor
        units = np.array([factor] * 3 + [1.0] * 3)
        ends.append(log_se3(invert_pose(poses[-1]) @ T))
        covariances.append(np.diag(pose.covariance * np.outer(units, units)))
    ratio = np.sqrt(np.mean(covariances, axis=0) / np.mean(np.square(ends), axis=0))
    across = [0, 1, 3, 4, 5]  # along the path the factor has taken the error away
    # Neighbouring links share keypoints, which the chain leaves out of account.
    assert (ratio[across] > 0.33).all() and (ratio[across] < 3.0).all()


# --- threads ----------------------------------------------------------------------------------------------------------


def steps_of_a_run(threaded: bool, **settings: object) -> list[OdometryStep]:
    overrides = [*TWO_VIEW, *(f"odometry.{name}={value}" for name, value in settings.items())]
    collected: list[FrameResult] = []
    run(load_config(None, overrides), PointSource(), point_frontend(), [collected.append], threaded=threaded)
    return [result.step for result in collected]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_and_loop_give_the_same_chain_to_the_bit(num_workers: int) -> None:
    in_threads, in_loop = steps_of_a_run(True, poses_in_flight=num_workers), steps_of_a_run(False)
    assert len(in_threads) == len(in_loop) == NUM_FRAMES
    for one, other in zip(in_threads, in_loop, strict=True):
        assert (one.pose.status, one.pose.rejection) == (other.pose.status, other.pose.rejection)
        np.testing.assert_array_equal(one.pose.T_world_camera, other.pose.T_world_camera)
        np.testing.assert_array_equal(one.pose.covariance, other.pose.covariance)
        np.testing.assert_array_equal(one.tracks.track_ids, other.tracks.track_ids)
    assert in_loop[-1].pose.status is TrackingStatus.TRACKING
    assert scaled_errors(in_loop, PATH).max() < 0.1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pose")]


def test_pairs_are_posed_before_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left for `step` but to take them: only pairs with an older anchor are posed there."""
    callers, motion = [], PairPoser.motion

    def noting(*arguments: object) -> object:
        callers.append(threading.current_thread().name.split("_")[0])
        return motion(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PairPoser, "motion", noting)
    steps_of_a_run(True)
    assert callers.count("pose") == NUM_FRAMES - 1
    assert callers.count("track") < NUM_FRAMES / 2


def test_what_a_worker_raises_ends_the_run_as_a_stage_would(monkeypatch: pytest.MonkeyPatch) -> None:
    motion, count = PairPoser.motion, 0

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 9:
            raise RuntimeError("a worker's own")
        return motion(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PairPoser, "motion", failing)
    with pytest.raises(RuntimeError, match="a worker's own"):
        steps_of_a_run(True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pose")]


def pairs_of(num_frames: int) -> tuple[PairsAhead, list[Features], list[Matches]]:
    poser = PairPoser(CAMERA, OdometryConfig(), TwoViewConfig())
    features = [observe(corridor(), T) for T in driving_path(num_frames)]
    return PairsAhead(poser, CAMERA, 2), features, [match_exactly(*pair) for pair in pairwise(features)]


def test_pairs_are_found_by_the_identity_of_their_features() -> None:
    ahead, features, matches = pairs_of(5)
    for (one, other), found in zip(pairwise(features), matches, strict=True):
        ahead.begin(one, other, found)
    _, motion = ahead.take(features[0], features[1])
    assert motion is not None and motion.pose is not None
    # Of the two that are passed over, neither is waited for any more; a pair from elsewhere is not the one begun.
    seen, motion = ahead.take(features[1], features[3])
    assert motion is None and seen.features is features[3]
    assert ahead.take(features[1], features[2])[1] is None
    assert ahead.take(features[3], features[4])[1] is not None
    assert ahead.take(features[4], observe(corridor(), np.eye(4)))[1] is None
    ahead.close()
    ahead.close()
    ahead.begin(features[0], features[1], matches[0])  # after the end nothing begins
    assert ahead.take(features[0], features[1])[1] is None


@pytest.mark.parametrize("is_passed_over", [True, False])
def test_no_failure_goes_unnoticed(is_passed_over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, features, matches = pairs_of(3)
    begun, may_fail = threading.Event(), threading.Event()

    def failing(*_: object) -> object:
        begun.set()
        may_fail.wait(10)
        raise RuntimeError("broken")

    monkeypatch.setattr(PairPoser, "motion", failing)
    ahead.begin(features[0], features[1], matches[0])
    assert begun.wait(10)
    may_fail.set()
    with pytest.raises(RuntimeError, match="broken"):
        ahead.take(None if is_passed_over else features[0], features[1])
    ahead.close()


def test_pairs_that_nobody_takes_do_not_pile_up() -> None:
    ahead, features, matches = pairs_of(3)
    for _ in range(40):
        ahead.begin(features[0], features[1], matches[0])
    assert len(ahead._begun) <= 16
    ahead.close()


# --- what is asked for and said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["odometry.scale.name=depth"], r"odometry.scale: depth needs a map"),
        (["odometry.self_calibration.enabled=true"], r"odometry.self_calibration: needs a map"),
    ],
)
def test_what_needs_a_map_is_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(None, [*TWO_VIEW, *overrides])
    assert load_config(None, TWO_VIEW).odometry.mode == "two_view" and Config().odometry.mode == "map"


def test_the_bundled_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to the summary; ORB needs no weights."""
    flags = ["--config", "orb", "--set", *TWO_VIEW, "--max-frames", "40", "--publish", "off", "--device", "cpu"]
    assert main(["run", "demo", *flags, "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["mode"], summary["scale_source"], summary["lost_episodes"]) == ("two_view", "relative", 0)
    assert summary["poses"] == 40 and summary["keyframes"] >= 1
    assert summary["evaluation"]["rpe_rot_deg"] < 0.5
    assert "odometry    two_view" in capsys.readouterr().out
