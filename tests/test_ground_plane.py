"""The height above the road from two images of it: rendered roads of known height, and the head of KITTI 00."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rendered_world import ROAD, ROAD_Y, Surface, render

from vo.config import GroundPlaneScaleConfig
from vo.geometry import exp_so3, invert_pose, make_pose
from vo.ground_plane import find_ground_plane, prior_normal
from vo.scale import ScaleReading, ground_plane_reading
from vo.sources import open_source
from vo.types import Camera, CameraModel

CAMERA = Camera(480, 320, np.array([[400.0, 0.0, 239.5], [0.0, 400.0, 150.0], [0.0, 0.0, 1.0]]))
CONFIG = GroundPlaneScaleConfig(camera_height_m=ROAD_Y)
HOUSES = Surface((0, 0, 40.0), (1, 0, 0), (0, 1, 0), (1e3, 1e3), 2)
UNIT = 0.43  # map units per metre
FORWARD = make_pose(exp_so3(np.array([0.002, 0.01, -0.003])), np.array([0.03, 0.0, 1.1]))


def pair(
    T_earlier_current: np.ndarray = FORWARD,
    surfaces: tuple[Surface, ...] = (ROAD, HOUSES),
    camera: Camera = CAMERA,
    T_level_camera: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both images, and the relative pose in map units."""
    start = np.eye(4) if T_level_camera is None else T_level_camera
    images = [render(camera, T, surfaces, pixels_per_m=25.0)[0] for T in (start, start @ T_earlier_current)]
    T_units = T_earlier_current.copy()
    T_units[:3, 3] *= UNIT
    return images[0], images[1], T_units


def read(images_and_pose: tuple[np.ndarray, np.ndarray, np.ndarray], **changes) -> ScaleReading | None:
    return ground_plane_reading(*images_and_pose, CAMERA, replace(CONFIG, **changes))


def test_the_height_gives_the_scale() -> None:
    images = pair()
    reading = read(images)
    assert reading is not None
    assert reading.log_ratio == pytest.approx(-math.log(UNIT), abs=0.004)
    assert reading.sigma >= CONFIG.systematic
    plane = find_ground_plane(*images, CAMERA, CONFIG)
    assert plane is not None
    np.testing.assert_allclose(plane.normal, FORWARD[:3, :3].T @ [0.0, 1.0, 0.0], atol=0.004)
    assert plane.correlation > 0.95
    twice = read(images, camera_height_m=2 * ROAD_Y)
    assert twice is not None
    assert twice.log_ratio == pytest.approx(reading.log_ratio + math.log(2))


@pytest.mark.parametrize("unit", [1e-3, 0.05, 1.0, 40.0])
def test_no_guess_of_the_unit_is_needed(unit: float) -> None:
    earlier, current, T = pair()
    T = T.copy()
    T[:3, 3] *= unit / UNIT
    reading = read((earlier, current, T))
    assert reading is not None
    assert reading.log_ratio == pytest.approx(-math.log(unit), abs=0.004)


def test_exposure_noise_and_a_tilted_camera() -> None:
    pitched = make_pose(exp_so3(np.array([-math.radians(1.0), 0.0, math.radians(0.5)])), np.zeros(3))
    earlier, current, T = pair(T_level_camera=pitched)
    rng = np.random.default_rng(0)
    darker = (0.7 * current + 12 + rng.normal(0, 4, current.shape)).clip(0, 255).astype(np.uint8)
    reading = read((earlier, darker, T), tilt_sigma_deg=1.0)
    assert reading is not None
    assert reading.log_ratio == pytest.approx(-math.log(UNIT), abs=0.02)


def test_a_camera_that_looks_down() -> None:
    pitch = math.radians(12.0)
    down = make_pose(exp_so3(np.array([-pitch, 0.0, 0.0])), np.zeros(3))
    along = invert_pose(down) @ make_pose(np.eye(3), np.array([0.0, 0.0, 1.1])) @ down
    images = pair(along, T_level_camera=down)
    reading = read(images, pitch_deg=12.0)
    assert reading is not None
    assert reading.log_ratio == pytest.approx(-math.log(UNIT), abs=0.006)
    np.testing.assert_allclose(
        prior_normal(replace(CONFIG, pitch_deg=12.0)), down[:3, :3].T @ [0.0, 1.0, 0.0], atol=1e-12
    )


def test_a_lens_with_distortion() -> None:
    camera = Camera(480, 320, CAMERA.K.copy(), np.array([-0.2, 0.03, 2e-4, -1e-4]), CameraModel.BROWN)
    reading = ground_plane_reading(*pair(camera=camera), camera, CONFIG)
    assert reading is not None
    assert reading.log_ratio == pytest.approx(-math.log(UNIT), abs=0.01)


def test_where_there_is_no_road_there_is_no_reading() -> None:
    earlier, current, T = pair()
    assert read((earlier, earlier, np.eye(4))) is None  # standing still
    turn = make_pose(exp_so3(np.array([0.0, 0.05, 0.0])), np.zeros(3))
    assert read(pair(turn)) is None
    black = np.zeros_like(current)
    assert read((black, black, T)) is None
    noise = np.random.default_rng(1).integers(0, 255, current.shape, np.uint8)
    assert read((earlier, noise, T)) is None
    for z in (3.0, 4.0, 5.0, 6.0):
        truck = Surface((0, 0.2, z), (1, 0, 0), (0, 1, 0), (1.2, 1.4), 5)
        assert read(pair(surfaces=(ROAD, HOUSES, truck))) is None
    assert read((earlier, current, T), min_pixels=1_000_000) is None


def kitti_head() -> tuple[list[np.ndarray], np.ndarray, Camera]:
    root = os.environ.get("LIGHTVO_DATA")
    if not root:
        pytest.skip("LIGHTVO_DATA is not set")
    source = open_source(f"kitti:{Path(root) / 'kitti' / 'sequences' / '00'}")
    rows = np.loadtxt(Path(root) / "kitti" / "poses" / "00.txt").reshape(-1, 3, 4)[: source.num_frames]
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3] = rows
    return [frame.image for frame in source.frames()], poses, source.camera


def test_the_head_of_kitti() -> None:
    """True poses in map units give the unit back: within 2 % on the average, and 5 % for most single pairs."""
    images, poses, camera = kitti_head()
    config = GroundPlaneScaleConfig(camera_height_m=1.65)
    errors, sigmas = [], []
    for index in range(20, 196, 12):  # before, the true poses are those of a filter that has not settled
        T = invert_pose(poses[index]) @ poses[index + 2]
        T[:3, 3] *= UNIT
        reading = ground_plane_reading(images[index], images[index + 2], T, camera, config)
        if reading is not None:
            errors.append(reading.log_ratio + math.log(UNIT))
            sigmas.append(reading.sigma)
    assert len(errors) >= 13
    assert abs(np.mean(errors)) < 0.02
    assert np.mean(np.abs(errors) < 0.05) > 0.7
    assert np.mean((np.array(errors) / sigmas) ** 2) < 2.5
