from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vo.sources.cameras import make_camera, parse_camera
from vo.sources.registration import DepthCamera, register_depth
from vo.types import SourceError

COLOUR = make_camera((80, 60), (65.6, 65.6), (39.5, 29.5))
FIELDS = {
    "model": "pinhole",
    "width": 640,
    "height": 480,
    "fx": 525.0,
    "fy": 525.0,
    "cx": 319.5,
    "cy": 239.5,
    "distortion": [],
}
DEPTH_CAMERA = {"fx": 585.0, "fy": 585.0, "cx": 320.0, "cy": 240.0, "offset_m": [-0.025, 0.0, 0.0]}


def test_a_camera_at_the_same_place_with_the_same_lens_sees_the_same():
    depth = np.random.default_rng(0).uniform(0.5, 4.0, (60, 80)).astype(np.float32)
    depth[5, 7] = 0.0
    same = DepthCamera((65.6, 65.6), (39.5, 29.5), np.zeros(3))
    np.testing.assert_allclose(register_depth(depth, same, COLOUR), depth, rtol=1e-6)


@pytest.mark.parametrize(("focal_px", "coverage"), [(73.0, 0.95), (55.0, 1.0)])
def test_a_slanted_plane_is_where_it_is(focal_px, coverage):
    """z = 2 + 0.5 x + 0.3 y in the colour camera's frame, rendered by both cameras by intersecting rays with it."""
    other = DepthCamera((focal_px, focal_px), (41.0, 28.0), np.array([-0.025, 0.004, 0.01]))

    def render(width, height, focal, centre, position):
        u, v = np.meshgrid(np.arange(width), np.arange(height))
        x, y = (u - centre[0]) / focal, (v - centre[1]) / focal
        return ((2 + 0.5 * position[0] + 0.3 * position[1] - position[2]) / (1 - 0.5 * x - 0.3 * y)).astype(np.float32)

    seen = render(100, 76, focal_px, (41.0, 28.0), other.offset_m)
    wanted = render(80, 60, 65.6, (39.5, 29.5), np.zeros(3))
    registered = register_depth(seen, other, COLOUR)
    inside = registered[8:-8, 8:-8]
    assert (inside > 0).mean() >= coverage
    # A reading lies up to a pixel from where it is entered.
    error = np.abs(inside - wanted[8:-8, 8:-8])[inside > 0] / wanted[8:-8, 8:-8][inside > 0]
    assert error.max() < 0.02 and np.median(error) < 0.005


def test_the_nearer_surface_hides_the_farther_one():
    depth = np.full((60, 80), 3.0, np.float32)
    depth[:, :40] = 1.0
    shifted = DepthCamera((65.6, 65.6), (39.5, 29.5), np.array([0.1, 0.0, 0.0]))
    registered = register_depth(depth, shifted, COLOUR)
    edge = int(np.rint(39 + 65.6 * 0.1 / 1.0))
    assert (registered[:, 10 : edge + 1] == 1.0).all()
    assert (registered[:, edge + 1 : 78] == 3.0).all()
    assert (registered[:, :6] == 0.0).all()  # nothing was measured there


def test_nothing_measured_is_nothing_seen_and_nothing_behind_the_camera():
    empty = np.zeros((60, 80), np.float32)
    other = DepthCamera((65.6, 65.6), (39.5, 29.5), np.array([0.0, 0.0, -2.0]))
    assert not register_depth(empty, other, COLOUR).any()
    assert not register_depth(np.ones((60, 80), np.float32), other, COLOUR).any()


def test_a_camera_file_names_its_depth_camera():
    read = parse_camera({**FIELDS, "depth_camera": DEPTH_CAMERA}, "camera.yaml").depth_camera
    assert read is not None and read.focal_px == (585.0, 585.0) and read.centre_px == (320.0, 240.0)
    np.testing.assert_array_equal(read.offset_m, [-0.025, 0.0, 0.0])
    assert parse_camera(FIELDS, "camera.yaml").depth_camera is None


@pytest.mark.parametrize(
    ("depth_camera", "message"),
    [
        ("kinect", "depth_camera: expected a mapping with fx, fy, cx, cy, offset_m"),
        ({**DEPTH_CAMERA, "offset_m": [0.025]}, r"depth_camera: offset_m: expected \[x, y, z\], got 1 numbers"),
        ({**DEPTH_CAMERA, "fx": -1.0}, "depth_camera: fx: expected a positive number, got -1"),
        ({**DEPTH_CAMERA, "roll": 1.0}, "depth_camera: roll: unknown field"),
        ({key: value for key, value in DEPTH_CAMERA.items() if key != "cy"}, "depth_camera: cy: missing"),
    ],
)
def test_a_depth_camera_that_cannot_be_is_refused(depth_camera, message):
    with pytest.raises(SourceError, match=message):
        parse_camera({**FIELDS, "depth_camera": depth_camera}, "camera.yaml")


def test_the_file_of_the_kinect_of_7_scenes_can_be_read():
    from vo.sources.cameras import read_camera

    read = read_camera(Path(__file__).parent.parent / "datasets" / "cameras" / "7scenes_kinect.yaml")
    assert read.depth_camera is not None and read.depth_camera.focal_px[0] == 585.0
