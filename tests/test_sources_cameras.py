"""camera.yaml and the manifests are read strictly, and every fault names its file and field."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.sources.cameras import CameraChoice, camera_from_fov, make_camera, read_camera, write_camera
from vo.sources.manifest import datasets_directory, read_manifest
from vo.types import Camera, CameraModel, SourceError

BROWN_YAML = """# from a calibration
model: brown
width: 640
height: 480
fx: 517.3
fy: 5.165e2
cx: 318.6
cy: 255.3
distortion: [0.2624, -0.9531, -54e-4, 1e-3, 1.1633]
depth_scale: 5000
"""


def test_a_camera_file(tmp_path: Path) -> None:
    path = tmp_path / "camera.yaml"
    path.write_text(BROWN_YAML)
    read = read_camera(path)
    assert (read.camera.width, read.camera.height, read.camera.model) == (640, 480, CameraModel.BROWN)
    np.testing.assert_array_equal(read.camera.K, [[517.3, 0, 318.6], [0, 516.5, 255.3], [0, 0, 1]])
    np.testing.assert_array_equal(read.camera.distortion, [0.2624, -0.9531, -0.0054, 0.001, 1.1633])
    assert read.depth_scale == 5000.0


focal = st.floats(1e-3, 1e6)
centre = st.floats(-1e6, 1e6)


@given(
    st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
    st.tuples(focal, focal),
    st.tuples(centre, centre),
    st.sampled_from(
        [(CameraModel.PINHOLE, 0), (CameraModel.BROWN, 4), (CameraModel.BROWN, 8), (CameraModel.FISHEYE, 4)]
    ),
    st.none() | st.floats(1e-3, 1e6),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=50)
def test_writing_and_reading_gives_the_same_camera(
    tmp_path_factory, size, focal_px, centre_px, kind, depth_scale, random
):
    model, num_coefficients = kind
    distortion = tuple(random.uniform(-1, 1) * 10 ** random.randint(-9, 0) for _ in range(num_coefficients))
    camera = make_camera(size, focal_px, centre_px, distortion, model)
    path = tmp_path_factory.mktemp("camera") / "camera.yaml"
    write_camera(path, camera, depth_scale, "two\nlines")
    read = read_camera(path)
    assert (read.camera.width, read.camera.height, read.camera.model) == (*size, model)
    np.testing.assert_array_equal(read.camera.K, camera.K)
    np.testing.assert_array_equal(read.camera.distortion, camera.distortion)
    assert read.depth_scale == depth_scale


def test_skew_cannot_be_written(tmp_path: Path) -> None:
    K = np.array([[500.0, 0.1, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="skew"):
        write_camera(tmp_path / "camera.yaml", Camera(640, 480, K))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: brown", "model: fish", "model: 'fish' is not one of pinhole, brown, fisheye"),
        ("model: brown", "model: pinhole", "distortion: pinhole takes 0 coefficients, got 5"),
        ("model: brown", "model: 3", "model: expected text"),
        ("model: brown\n", "", "model: missing"),
        ("fx: 517.3", "fx: wide", "fx: expected a number, got 'wide'"),
        ("fx: 517.3", "fx: -517.3", "fx: expected a positive number"),
        ("fx: 517.3", "fx: .nan", "fx: expected a finite number"),
        ("fx: 517.3", "fx: .inf", "fx: expected a finite number"),
        ("fx: 517.3", "fx: true", "fx: expected a number"),
        ("fx: 517.3", "focal: 517.3", "focal: unknown field; valid: model, width"),
        ("fx: 517.3", "fx: 1\nfx: 2", "fx is given twice"),
        ("cy: 255.3\n", "", "cy: missing"),
        ("width: 640", "width: 640.5", "width: expected a positive whole number"),
        ("width: 640", "width: 0", "width: expected a positive whole number"),
        ("distortion: [0.2624,", "distortion: [", r"distortion: brown takes 4 or 5 or .* got 4|not valid YAML"),
        ("-0.9531", "x", r"distortion\[1\]: expected a number"),
        ("distortion: [", "distortion: 1 #", "distortion: expected a list of numbers"),
        ("depth_scale: 5000", "depth_scale: 0", "depth_scale: expected a positive number"),
        ("model: brown", "model: [", "not valid YAML"),
        ("width: 640", "width: 2024-99-99", "not valid YAML"),
        (BROWN_YAML, "- 1\n", "expected a mapping"),
        (BROWN_YAML, "", "expected a mapping"),
    ],
)
def test_every_fault_names_the_file_and_the_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "camera.yaml"
    path.write_text(BROWN_YAML.replace(old, new))
    if message.startswith("distortion: brown"):
        path.write_text(BROWN_YAML.replace(", 1.1633]", ", 1, 1]"))
        message = "distortion: brown takes 4 or 5 or 8 or 12 or 14 coefficients, got 6"
    with pytest.raises(SourceError, match=message) as raised:
        read_camera(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_camera_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.yaml: not found; expected a camera\.yaml"):
        read_camera(tmp_path / "none.yaml")
    with pytest.raises(SourceError, match="expected a camera"):
        read_camera(tmp_path)


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@settings(deadline=None, max_examples=200)
def test_no_text_breaks_the_reader(tmp_path_factory, text: str) -> None:
    path = tmp_path_factory.mktemp("camera") / "camera.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(SourceError):
        read_camera(path)


@pytest.mark.parametrize("fov_deg", [20.0, 70.0, 150.0])
def test_the_field_of_view_spans_the_image(fov_deg: float) -> None:
    camera = camera_from_fov(640, 480, fov_deg)
    edges = np.array([[[-0.5, 239.5]], [[639.5, 239.5]]])
    rays = cv2.undistortPoints(edges, camera.K, np.zeros(5)).reshape(2, 2)
    angle = np.degrees(np.arctan(rays[1, 0]) - np.arctan(rays[0, 0]))
    assert angle == pytest.approx(fov_deg, abs=1e-9)
    assert rays[:, 1] == pytest.approx(0.0)


def test_choices_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="keep one"):
        CameraChoice(tmp_path / "camera.yaml", 60.0)
    for fov_deg in (0.0, -3.0, 180.0, float("nan")):
        with pytest.raises(SourceError, match="--fov-deg"):
            camera_from_fov(640, 480, fov_deg)


def test_the_manifests() -> None:
    manifests = {name: read_manifest(datasets_directory() / f"{name}.yaml") for name in ("kitti", "tum", "euroc")}
    for name, manifest in manifests.items():
        assert manifest.name == name
        assert manifest.page.startswith("https://")
        assert f"vo run {name}:" in manifest.placement
    assert not manifests["kitti"].cameras
    tum = manifests["tum"]
    assert [named.name for named in tum.cameras] == ["freiburg1", "freiburg2", "freiburg3"]
    freiburg2 = tum.camera_for(Path("data") / "rgbd_dataset_freiburg2_desk")
    assert freiburg2 is not None
    assert freiburg2.camera.K[0, 0] == 520.9
    assert len(freiburg2.camera.distortion) == 5
    assert tum.camera_for(Path("rgbd_7scenes_head")) is None


def test_every_manifest_in_the_directory_is_read() -> None:
    for path in datasets_directory().glob("*.yaml"):
        assert read_manifest(path).name == path.stem


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title:", "titel:", "titel: unknown field"),
        ("page: https", "pages: https", "pages: unknown field"),
        ("licence: CC BY 4.0\n", "", "licence: missing"),
        ("    fx: 517.3\n", "", "cameras.freiburg1: fx: missing"),
        ("    model: brown", "    modle: brown", "cameras.freiburg1: modle: unknown field"),
        (
            "directory_contains: freiburg1",
            "directory_contains: 1",
            "cameras.freiburg1: directory_contains: expected text",
        ),
        ("  rgb.txt:", "  5:", "layout: expected a mapping"),
    ],
)
def test_manifests_are_strict(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (datasets_directory() / "tum.yaml").read_text()
    assert old in text
    path = tmp_path / "tum.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(SourceError, match=message):
        read_manifest(path)
