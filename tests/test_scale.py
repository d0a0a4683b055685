"""Readings of the scale against worlds of known scale, with noise and outliers, and the filter against statistics."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.config import (
    DepthScaleConfig,
    ExternalScaleConfig,
    GroundPlaneScaleConfig,
    GroundTruthScaleConfig,
    RelativeScaleConfig,
    StereoScaleConfig,
)
from vo.config_loader import load_config
from vo.scale import (
    ExternalReadings,
    ScaleFilter,
    ScaleReading,
    depth_reading,
    external_reading,
    groundtruth_reading,
    robust_mean,
    stereo_reading,
)
from vo.types import ConfigError

METRES_PER_UNIT = 3.7
EXACT = {"systematic": 0.0}


def noisy_depths(rng: np.random.Generator, count: int = 300, noise: float = 0.02, outliers: float = 0.3):
    """(depths m, depths in map units) of landmarks, log-normal noise; outliers all lie on one side, up to threefold."""
    z_map = rng.uniform(0.3, 1.8, count)
    depths_m = METRES_PER_UNIT * z_map * np.exp(rng.normal(0.0, noise, count))
    wrong = rng.permutation(count)[: int(outliers * count)]
    depths_m[wrong] *= rng.uniform(1.15, 3.0, len(wrong))
    return depths_m, z_map


def test_a_reading_without_noise_is_exact() -> None:
    z_map = np.linspace(0.1, 2.0, 50)
    reading = stereo_reading(METRES_PER_UNIT * z_map, z_map, StereoScaleConfig(min_depth_m=0.0, **EXACT))
    assert reading is not None
    assert reading.log_ratio == pytest.approx(math.log(METRES_PER_UNIT), abs=1e-12)
    assert reading.sigma <= 1e-6


@pytest.mark.parametrize("outliers", [0.0, 0.3])
def test_the_error_of_a_reading_is_what_it_says(outliers: float) -> None:
    rng, config = np.random.default_rng(0), StereoScaleConfig(**EXACT)
    scores = []
    for _ in range(300):
        reading = stereo_reading(*noisy_depths(rng, outliers=outliers), config)
        assert reading is not None
        scores.append((reading.log_ratio - math.log(METRES_PER_UNIT)) / reading.sigma)
        assert reading.sigma == pytest.approx(0.02 / math.sqrt(300 * (1 - outliers)), rel=0.35)
    assert abs(np.mean(scores)) < 0.25
    assert 0.85 < np.std(scores) < 1.2


def test_readings_need_enough_landmarks_that_agree() -> None:
    rng = np.random.default_rng(1)
    depths_m, z_map = noisy_depths(rng, 40, outliers=0.0)
    config = StereoScaleConfig(min_readings=30)
    assert stereo_reading(depths_m, z_map, config) is not None
    assert stereo_reading(depths_m[:29], z_map[:29], config) is None
    assert stereo_reading(np.full(40, np.nan), z_map, config) is None
    assert stereo_reading(depths_m + 100.0, z_map, config) is None  # beyond max_depth_m
    assert stereo_reading(depths_m, -z_map, config) is None  # behind the camera
    scattered = np.where(np.arange(40) < 12, depths_m, depths_m * rng.uniform(2.0, 9.0, 40)).clip(0.3, 39.0)
    assert stereo_reading(scattered, z_map, config) is None
    with pytest.raises(ValueError, match="of different landmarks"):
        stereo_reading(depths_m, z_map[:-1], config)


def test_what_all_depths_share_stays_in_the_error() -> None:
    reading = stereo_reading(*noisy_depths(np.random.default_rng(2), 5000), StereoScaleConfig(systematic=0.01))
    assert reading is not None
    assert 0.01 <= reading.sigma < 0.0101


def wall_with_step() -> np.ndarray:
    """Depth of a wall at 2 m whose right half stands at 3 m, slanted a little, with a hole."""
    depth = np.tile(np.where(np.arange(100) < 50, 2.0, 3.0), (80, 1)) + 0.0005 * np.arange(80)[:, None]
    depth[30:40, 20:30] = 0.0
    return depth.astype(np.float32)


def test_depth_images_are_read_away_from_edges_and_holes() -> None:
    depth = wall_with_step()
    keypoints = np.array([[x + 0.3, y - 0.2] for x in range(0, 100, 3) for y in range(1, 80, 3)])
    columns, rows = np.rint(keypoints).astype(int).T
    z_map = depth[rows, columns].astype(np.float64) / METRES_PER_UNIT
    near_edge = np.abs(columns - 49.5) < 2.5
    z_map[near_edge] *= 1.5  # what a landmark beside an edge is worth
    z_map[z_map == 0] = 1.0
    reading = depth_reading(depth, keypoints, z_map, DepthScaleConfig(**EXACT))
    assert reading is not None
    assert reading.log_ratio == pytest.approx(math.log(METRES_PER_UNIT), abs=1e-9)
    assert depth_reading(depth, keypoints[near_edge], z_map[near_edge], DepthScaleConfig()) is None
    outside = np.array([[-1.0, 5.0], [100.0, 5.0], [5.0, 80.0]] * 10)
    assert depth_reading(depth, outside, np.full(30, 1.0), DepthScaleConfig()) is None
    assert depth_reading(np.zeros_like(depth), keypoints, z_map, DepthScaleConfig()) is None


def test_depth_with_noise_and_outliers() -> None:
    rng = np.random.default_rng(3)
    depth = np.full((480, 640), 2.5, np.float32)
    keypoints = rng.uniform(5, 470, (400, 2))
    z_map = 2.5 / METRES_PER_UNIT * np.exp(rng.normal(0, 0.03, 400))
    z_map[:120] *= rng.uniform(1.2, 4.0, 120)
    reading = depth_reading(depth, keypoints, z_map, DepthScaleConfig())
    assert reading is not None
    assert reading.log_ratio == pytest.approx(math.log(METRES_PER_UNIT), abs=3 * reading.sigma)
    assert reading.sigma < 0.01


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-5, 5), min_size=1, max_size=40),
    shift=st.floats(-3, 3),
)
def test_the_robust_mean_moves_with_its_values(values: list[float], shift: float) -> None:
    array = np.array(values)
    centre, sigma, count = robust_mean(array)
    assert min(values) - 1e-9 <= centre <= max(values) + 1e-9
    assert sigma >= 0
    assert 1 <= count <= len(values)
    if len(set(values)) == 1:
        assert (centre, count) == (pytest.approx(values[0]), len(values))
        assert robust_mean(array + shift)[0] == pytest.approx(values[0] + shift)


# What others send.

SECOND = 1_000_000_000
EPOCH = 1_700_000_000 * SECOND


def readings(**changes) -> ExternalReadings:
    return ExternalReadings(ExternalScaleConfig(**changes))


def test_speeds_are_integrated_between_frame_times() -> None:
    """Against the integral of a speed that rises evenly, 2 + 3 t m/s, sampled off the frames' times."""
    external = readings()
    for tick in range(0, 41):
        seconds = 0.1 * tick + 0.013
        external.add_speed(EPOCH + round(seconds * SECOND), 2.0 + 3.0 * seconds)
    found = external.distance(EPOCH + SECOND, EPOCH + 3 * SECOND)
    assert found is not None
    assert found[0] == pytest.approx(2.0 * 2 + 1.5 * (9 - 1), rel=1e-9)
    assert found[1] == pytest.approx(0.1 * 2)


def test_speeds_hold_for_a_while_only() -> None:
    external = readings(max_gap_s=0.5)
    external.add_speed(EPOCH, 4.0)
    half = SECOND // 2
    assert external.distance(EPOCH - half, EPOCH + half) == (pytest.approx(4.0), pytest.approx(0.1))
    assert external.distance(EPOCH - half, EPOCH + half + SECOND // 10) is None
    assert external.distance(EPOCH - half - SECOND // 10, EPOCH) is None
    external.add_speed(EPOCH + SECOND, 4.0)
    assert external.distance(EPOCH, EPOCH + SECOND) == (pytest.approx(4.0), pytest.approx(0.1))
    external.add_speed(EPOCH + 3 * SECOND, 4.0)
    assert external.distance(EPOCH, EPOCH + 3 * SECOND) is None
    assert external.distance(EPOCH + SECOND, EPOCH + SECOND) is None
    assert readings().distance(EPOCH, EPOCH + SECOND) is None


def test_distances_add_up_and_overlap_once() -> None:
    external = readings(speed_sigma_mps=0.0)
    external.add_distance(EPOCH + SECOND, EPOCH + 3 * SECOND, 8.0)
    external.add_distance(EPOCH, EPOCH + SECOND, 1.0)
    assert external.distance(EPOCH + SECOND // 2, EPOCH + 2 * SECOND) == (pytest.approx(0.5 + 4.0), 0.0)
    external.add_distance(EPOCH + 2 * SECOND, EPOCH + 4 * SECOND, 2.0)
    assert external.distance(EPOCH, EPOCH + 4 * SECOND) == (pytest.approx(1.0 + 8.0 + 1.0), 0.0)
    assert external.distance(EPOCH, EPOCH + 5 * SECOND) is None


def test_what_is_sent_is_checked_and_bounded() -> None:
    external = readings(max_readings=3)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="speed_mps: expected a finite number that is not negative"):
            external.add_speed(0, value)
        with pytest.raises(ValueError, match="distance_m: expected"):
            external.add_distance(0, 1, value)
    with pytest.raises(ValueError, match="end_ns: 5 is not after start_ns 5"):
        external.add_distance(5, 5, 1.0)
    for tick in range(10):
        external.add_speed(EPOCH + tick * SECOND // 2, 4.0)
    assert external.distance(EPOCH, EPOCH + SECOND) is None  # long gone
    assert external.distance(EPOCH + 4 * SECOND, EPOCH + 9 * SECOND // 2) is not None


def test_many_threads_may_send() -> None:
    external = readings(max_readings=100)

    def send(offset: int) -> None:
        for tick in range(300):
            external.add_speed(EPOCH + (tick * 4 + offset) * 1000, 4.0)

    senders = [threading.Thread(target=send, args=(offset,)) for offset in range(4)]
    for sender in senders:
        sender.start()
    for _ in range(200):
        external.distance(EPOCH, EPOCH + SECOND)
    for sender in senders:
        sender.join(timeout=10)
    assert external.distance(EPOCH, EPOCH + SECOND // 10) is not None


def test_ratios_of_distances() -> None:
    reading = external_reading(6.0, 1.5, 0.3)
    assert reading is not None
    assert (reading.log_ratio, reading.sigma) == (pytest.approx(math.log(4.0)), pytest.approx(0.05))
    assert external_reading(0.0, 1.0, 0.1) is None
    assert external_reading(1.0, 0.0, 0.1) is None
    true = np.array([[0.0, 0, 0], [3.0, 4.0, 0]])
    reading = groundtruth_reading(true, true / 2.5, GroundTruthScaleConfig())
    assert reading is not None
    assert (reading.log_ratio, reading.sigma) == (pytest.approx(math.log(2.5)), pytest.approx(0.01))
    assert groundtruth_reading(true * 0.01, true, GroundTruthScaleConfig()) is None


# The filter.

CONFIG = ExternalScaleConfig()


def test_the_first_reading_sets_the_unit() -> None:
    scale = ScaleFilter(CONFIG)
    assert (scale.is_metric, scale.sigma) == (False, math.inf)
    assert scale.update(None) == 1.0
    assert not scale.is_metric
    assert scale.update(ScaleReading(math.log(7.0), 0.03)) == pytest.approx(7.0)
    assert scale.is_metric
    assert scale.sigma == pytest.approx(0.03)
    assert scale.update(None) == 1.0
    assert scale.sigma > 0.03
    with pytest.raises(ValueError, match="relative scale has no readings"):
        ScaleFilter(RelativeScaleConfig())


def follow(rng: np.random.Generator, num_keyframes: int, sigma: float, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the map's scale, as logarithms, and what the filter says of them, over a map that drifts."""
    scale, remaining = ScaleFilter(ExternalScaleConfig(drift_per_keyframe=drift)), math.log(5.0)
    errors, sigmas = [], []
    for _ in range(num_keyframes):
        remaining += rng.normal(0.0, drift)
        remaining -= math.log(scale.update(ScaleReading(remaining + rng.normal(0.0, sigma), sigma)))
        errors.append(remaining)
        sigmas.append(scale.sigma)
    return np.array(errors), np.array(sigmas)


def test_the_variance_is_honest() -> None:
    """Errors over what is said of them, mean square: 1 within what 200 runs leave open."""
    rng = np.random.default_rng(5)
    scores = []
    for _ in range(200):
        errors, sigmas = follow(rng, 60, sigma=0.04, drift=0.003)
        scores.append((errors[[5, 20, 40, 59]] / sigmas[[5, 20, 40, 59]]) ** 2)
    mean = np.mean(scores, axis=0)
    assert ((mean > 0.7) & (mean < 1.35)).all()


def test_readings_average_out() -> None:
    errors, _ = follow(np.random.default_rng(6), 400, sigma=0.04, drift=0.001)
    assert np.abs(errors[100:]).max() < 0.03
    assert np.sqrt(np.mean(errors[100:] ** 2)) < 0.012


def test_one_step_is_bounded_and_the_rest_follows() -> None:
    scale = ScaleFilter(ExternalScaleConfig(max_step=0.02, gate_sigmas=20.0))
    scale.update(ScaleReading(0.0, 0.05))
    factors = [scale.update(ScaleReading(0.5, 0.03)), *(scale.update(None) for _ in range(40))]
    assert max(factors) == pytest.approx(1.02)
    assert math.prod(factors) == pytest.approx(math.exp(0.5 * 0.05**2 / (0.05**2 + 0.03**2)), rel=2e-3)
    assert factors[-1] == pytest.approx(1.0)


def test_outliers_do_not_move_it() -> None:
    rng, scale = np.random.default_rng(7), ScaleFilter(CONFIG)
    scale.update(ScaleReading(0.0, 0.02))
    total = 0.0
    for index in range(200):
        wrong = index % 10 in (3, 6, 9)
        value = -total + (rng.uniform(0.5, 2.0) * rng.choice([-1, 1]) if wrong else rng.normal(0.0, 0.02))
        total += math.log(scale.update(ScaleReading(value, 0.02)))
    assert abs(total) < 0.02


@pytest.mark.parametrize("start", [-1.5, -0.3, 0.4, 2.0])
def test_a_wrong_start_is_overcome(start: float) -> None:
    rng, scale, total = np.random.default_rng(8), ScaleFilter(CONFIG), 0.0
    for index in range(20):
        value = start if index == 0 else rng.normal(0.0, 0.02)
        total += math.log(scale.update(ScaleReading(value - total, 0.02)))
        if 0 < index < CONFIG.max_outliers:
            assert total == pytest.approx(start, abs=0.05)
    assert abs(total) < 0.02


def test_outliers_that_disagree_are_no_new_start() -> None:
    scale, total = ScaleFilter(CONFIG), 0.0
    scale.update(ScaleReading(0.0, 0.02))
    for index in range(40):
        total += math.log(scale.update(ScaleReading((-1) ** index * (1.0 + 0.5 * (index % 3)) - total, 0.02)))
    assert abs(total) < 0.05


def test_readings_are_numbers() -> None:
    for log_ratio, sigma in ((math.nan, 0.1), (0.0, 0.0), (0.0, -1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="expected a finite log_ratio and a positive sigma"):
            ScaleReading(log_ratio, sigma)


# The configuration.


def test_sources_are_chosen_by_name() -> None:
    assert load_config().odometry.scale == RelativeScaleConfig()
    assert load_config(None, ["odometry.scale.name=depth"]).odometry.scale == DepthScaleConfig()
    height = ["odometry.scale.name=ground_plane", "odometry.scale.camera_height_m=1.65"]
    assert load_config(None, height).odometry.scale == GroundPlaneScaleConfig(camera_height_m=1.65)
    for name in ("stereo", "external", "groundtruth"):
        assert load_config(None, [f"odometry.scale.name={name}"]).odometry.scale.name == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["odometry.scale.name=metric"], "odometry.scale.name: the string 'metric' is not valid; .*valid: relative, d"),
        (["odometry.scale.name=ground_plane"], "odometry.scale.camera_height_m: missing; give the height"),
        (["odometry.scale.max_depth_m=3"], "odometry.scale.max_depth_m: unknown key; valid: name"),
        (["odometry.scale.name=depth", "odometry.scale.min_depth_m=9"], "odometry.scale.min_depth_m: 9.0 is not below"),
        (["odometry.scale.name=stereo", "odometry.scale.block_px=4"], "odometry.scale.block_px: 4 is even"),
        (["odometry.scale.name=external", "odometry.scale.max_step=0"], "odometry.scale.max_step: 0.0 is below"),
        (
            ["odometry.scale={name: ground_plane, camera_height_m: 1, min_ahead: 9}"],
            "odometry.scale.min_ahead: 9.0 is not below max_ahead",
        ),
        (
            ["odometry.scale={name: ground_plane, camera_height_m: 1, min_flow_px: 99}"],
            "odometry.scale.min_flow_px: 99.0 is not below max_flow_px",
        ),
    ],
)
def test_faults_of_the_configuration(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)
