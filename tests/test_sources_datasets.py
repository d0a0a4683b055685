"""KITTI, TUM and EuRoC: small synthetic sequences with every fault, and the real ones under LIGHTVO_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from synthetic_sources import (
    CAMERA_YAML,
    SENSOR_YAML,
    cut_short,
    depth_image,
    gray_image,
    rgb_image,
    write_euroc,
    write_image,
    write_kitti,
    write_tum,
)

from vo.sources import open_source
from vo.types import CameraModel, SourceError


def data_directory() -> Path:
    root = os.environ.get("LIGHTVO_DATA")
    if not root:
        pytest.skip("LIGHTVO_DATA is not set")
    return Path(root)


def test_a_kitti_sequence(tmp_path: Path) -> None:
    sequence = write_kitti(tmp_path)
    source = open_source(f"kitti:{sequence}")
    frames = list(source.frames())
    assert [frame.timestamp_ns for frame in frames] == [0, 103735900, 207471800, 311207700, 414943600]
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.image, gray_image(index))
        assert frame.depth is None
    np.testing.assert_array_equal(source.camera.K, [[30.5, 0, 15], [0, 31, 11], [0, 0, 1]])
    assert source.camera.model is CameraModel.PINHOLE
    assert source.ground_truth == tmp_path / "poses" / "07.txt"
    assert (source.name, source.num_frames, source.skipped) == (f"kitti:{sequence}", 5, ())


def test_colour_kitti_is_read_where_gray_is_missing(tmp_path: Path) -> None:
    sequence = write_kitti(tmp_path, folder="image_2")
    source = open_source(f"kitti:{sequence}")
    np.testing.assert_array_equal(next(source.frames()).image, rgb_image(0))
    assert source.camera.K[0, 0] == 32.5


def test_kitti_intrinsics_can_be_replaced(tmp_path: Path) -> None:
    sequence = write_kitti(tmp_path)
    (sequence / "calib.txt").unlink()
    camera_file = tmp_path / "camera.yaml"
    camera_file.write_text(CAMERA_YAML)
    assert open_source(f"kitti:{sequence}", camera_file=camera_file).camera.K[1, 1] == 31.0
    assert open_source(f"kitti:{sequence}", fov_deg=90.0).camera.K[0, 0] == pytest.approx(16.0)


def test_kitti_times_go_by_the_number_of_the_image(tmp_path: Path) -> None:
    sequence = write_kitti(tmp_path)
    (sequence / "image_0" / "000002.png").unlink()
    (sequence / "image_0" / "000004.png").unlink()
    source = open_source(f"kitti:{sequence}")
    assert [(frame.index, frame.timestamp_ns) for frame in source.frames()] == [
        (0, 0),
        (1, 103735900),
        (3, 311207700),
    ]
    assert [(skipped.index, skipped.name, skipped.reason) for skipped in source.skipped] == [
        (2, "000002.png", "no such file")
    ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: (s / "calib.txt").unlink(), r"calib\.txt: not found; .*--camera FILE"),
        (lambda s: (s / "times.txt").unlink(), r"times\.txt: not found; a KITTI odometry sequence holds"),
        (lambda s: (s / "image_0").rename(s / "images"), "neither image_0 nor image_2"),
        (lambda s: [p.unlink() for p in (s / "image_0").iterdir()], "holds no numbered images"),
        (lambda s: (s / "calib.txt").write_text("P1: 1 2 3\n"), r"calib\.txt: P0: missing"),
        (lambda s: (s / "calib.txt").write_text("\nP0: 1 2 3\n"), r"calib\.txt:2: P0: expected 12 .* got 3"),
        (lambda s: (s / "calib.txt").write_text("P0: 1 2 x\n"), r"calib\.txt:1: P0: expected 12 numbers, got '1 2 x'"),
        (lambda s: (s / "calib.txt").write_text("P0:" + " 1" * 12), r"calib\.txt:1: P0: .* of a rectified camera"),
        (lambda s: (s / "calib.txt").write_text("P0: nan" + " 0" * 11), r"calib\.txt:1: P0: expected 12 finite"),
        (
            lambda s: (s / "times.txt").write_text("0\n0.1\n"),
            r"times\.txt: 2 times, but image_0 goes on to 000004\.png",
        ),
        (lambda s: (s / "times.txt").write_text("0\n0.1\nx\n"), r"times\.txt:3: 'x' is not a time"),
        (lambda s: [p.write_text("x") for p in (s / "image_0").iterdir()], "none of 5 images can be read"),
    ],
)
def test_faults_of_kitti(tmp_path: Path, fault, message: str) -> None:
    sequence = write_kitti(tmp_path)
    fault(sequence)
    with pytest.raises(SourceError, match=message) as raised:
        open_source(f"kitti:{sequence}")
    assert "\n" not in str(raised.value)


def test_tum_depth_is_the_nearest_in_time(tmp_path: Path) -> None:
    colour = ["10.000000", "10.033333", "10.066667", "10.100000"]
    sequence = write_tum(tmp_path, colour, ["10.013333", "10.030000", "10.045000", "10.120001"])
    source = open_source(f"tum:{sequence}")
    frames = list(source.frames())
    assert [frame.timestamp_ns for frame in frames] == [10000000000, 10033333000, 10066667000, 10100000000]
    partners = [0, 1, None, None]  # 10.045 is 21.667 ms from 10.066667, and 10.120001 a microsecond too far
    for index, (frame, partner) in enumerate(zip(frames, partners, strict=True)):
        np.testing.assert_array_equal(frame.image, rgb_image(index))
        if partner is None:
            assert frame.depth is None
        else:
            np.testing.assert_allclose(frame.depth, depth_image(partner) / 5000.0, rtol=1e-6)
    assert source.ground_truth == sequence / "groundtruth.txt"
    assert source.camera.K[0, 0] == 30.0


def test_tum_without_depth(tmp_path: Path) -> None:
    source = open_source(str(write_tum(tmp_path, ["1.0", "2.0"], [])))
    assert [frame.depth for frame in source.frames()] == [None, None]
    assert source.skipped == ()


def test_the_depth_scale_of_the_camera_file_wins(tmp_path: Path) -> None:
    sequence = write_tum(tmp_path, ["1.0"], ["1.0"])

    def depth_scale(**options) -> float:
        depth = next(open_source(f"tum:{sequence}", **options).frames()).depth
        return float(np.median(depth_image(0)[depth > 0] / depth[depth > 0]))

    assert depth_scale() == pytest.approx(5000)
    (sequence / "camera.yaml").write_text(CAMERA_YAML + "depth_scale: 1000\n")
    assert depth_scale() == pytest.approx(1000)
    other = tmp_path / "other.yaml"
    other.write_text(CAMERA_YAML)
    assert depth_scale(camera_file=other) == pytest.approx(1000)
    other.write_text(CAMERA_YAML + "depth_scale: 200\n")
    assert depth_scale(camera_file=other) == pytest.approx(200)
    assert depth_scale(fov_deg=60.0) == pytest.approx(1000)


def test_unreadable_depth_leaves_the_frame_without_it(tmp_path: Path) -> None:
    sequence = write_tum(tmp_path, ["1.0", "2.0", "3.0"], ["1.0", "2.0", "3.0"])
    cut_short(sequence / "depth" / "0.png")
    (sequence / "depth" / "1.png").unlink()
    source = open_source(f"tum:{sequence}")
    assert [frame.depth is None for frame in source.frames()] == [True, True, False]
    assert [(skipped.index, skipped.name, skipped.is_kept) for skipped in source.skipped] == [
        (0, "0.png", True),
        (1, "1.png", True),
    ]
    assert all(skipped.reason.startswith("frame kept without depth: ") for skipped in source.skipped)


def test_unreadable_colour_is_skipped(tmp_path: Path) -> None:
    sequence = write_tum(tmp_path, ["1.0", "2.0", "2.0", "3.0"], ["3.0"])
    cut_short(sequence / "rgb" / "1.png")
    source = open_source(f"tum:{sequence}")
    assert [(frame.index, frame.depth is None) for frame in source.frames()] == [(0, True), (2, True), (3, False)]
    assert [(skipped.index, skipped.is_kept) for skipped in source.skipped] == [(1, False)]


@pytest.mark.parametrize(
    ("name", "fx", "num_coefficients"),
    [
        ("rgbd_dataset_freiburg1_xyz", 517.3, 5),
        ("rgbd_dataset_freiburg2_desk", 520.9, 5),
        ("rgbd_dataset_freiburg3_long_office_household", 535.4, 0),
    ],
)
def test_tum_intrinsics_by_the_name_of_the_directory(
    tmp_path: Path, name: str, fx: float, num_coefficients: int
) -> None:
    sequence = write_tum(tmp_path, ["1.0"], [], name)
    (sequence / "camera.yaml").unlink()
    write_image(sequence / "rgb" / "0.png", rgb_image(0, 640, 480))
    source = open_source(f"tum:{sequence}")
    assert source.camera.K[0, 0] == fx
    assert len(source.camera.distortion) == num_coefficients
    assert next(source.frames()).image.shape == (480, 640, 3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: (s / "rgb.txt").unlink(), r"rgb\.txt: not found; a TUM RGB-D sequence holds"),
        (lambda s: (s / "rgb.txt").write_text("# nothing\n"), r"rgb\.txt: lists no images"),
        (lambda s: (s / "rgb.txt").write_text("# x\n1.0 rgb/0.png\nsoon rgb/1.png\n"), r"rgb\.txt:3: 'soon' is not a"),
        (lambda s: (s / "rgb.txt").write_text("1.0\n"), r"rgb\.txt:1: '1\.0' has no path"),
        (lambda s: (s / "depth.txt").write_text("1.0 depth/0.png\nx\n"), r"depth\.txt:2: 'x' is not a time"),
        (lambda s: (s / "camera.yaml").unlink(), "no intrinsics: neither camera.yaml nor freiburg1.*--camera FILE"),
        (lambda s: (s / "camera.yaml").write_text(CAMERA_YAML + "f: 1"), r"camera\.yaml: f: unknown field"),
        (lambda s: write_image(s / "rgb" / "0.png", rgb_image(0, 40)), r"0\.png: 40x24 px, but the camera is 32x24"),
        (lambda s: write_image(s / "depth" / "0.png", depth_image(0)[:, :20]), r"0\.png: 20x24 px, but the camera is"),
        (lambda s: (s / "rgb" / "0.png").unlink(), r"none of 1 images can be read \(first: 0\.png: no such file"),
    ],
)
def test_faults_of_tum(tmp_path: Path, fault, message: str) -> None:
    sequence = write_tum(tmp_path, ["1.0"], ["1.0"])
    fault(sequence)
    with pytest.raises(SourceError, match=message) as raised:
        list(open_source(f"tum:{sequence}").frames())
    assert "\n" not in str(raised.value)


def test_a_euroc_sequence(tmp_path: Path) -> None:
    times_ns = (1403715275762142976, 1403715275812143104, 1403715275862142976)
    sequence = write_euroc(tmp_path, times_ns)
    ground_truth = sequence / "mav0" / "state_groundtruth_estimate0" / "data.csv"
    ground_truth.parent.mkdir()
    ground_truth.write_text("#\n")
    source = open_source(f"euroc:{sequence}")
    frames = list(source.frames())
    assert tuple(frame.timestamp_ns for frame in frames) == times_ns
    np.testing.assert_array_equal(frames[1].image, gray_image(1))
    np.testing.assert_array_equal(source.camera.K, [[30, 0, 15.5], [0, 31, 11.5], [0, 0, 1]])
    np.testing.assert_array_equal(source.camera.distortion, [-0.28, 0.07, 1e-4, 1.76187114e-05])
    assert source.camera.model is CameraModel.BROWN
    assert source.ground_truth == ground_truth
    assert open_source(str(sequence / "mav0")).camera.K[0, 0] == 30.0


def test_tum_vi_is_read_as_euroc(tmp_path: Path) -> None:
    sequence = write_euroc(tmp_path, (10, 20))
    camera = sequence / "mav0" / "cam0"
    text = SENSOR_YAML.replace("radial-tangential", "equidistant").replace("T_BS:", "T_BS: !!opencv-matrix")
    (camera / "sensor.yaml").write_text(text.replace("%YAML:1.0\n", "%YAML:1.0\n---\n"))
    write_image(camera / "data" / "10.png", np.full((24, 32), 257 * 200, np.uint16))
    (sequence / "mav0" / "mocap0").mkdir()
    (sequence / "mav0" / "mocap0" / "data.csv").write_text("#\n")
    source = open_source(str(sequence))
    assert source.camera.model is CameraModel.FISHEYE
    assert (next(source.frames()).image == 200).all()
    assert source.ground_truth == sequence / "mav0" / "mocap0" / "data.csv"


def test_euroc_intrinsics_can_be_replaced(tmp_path: Path) -> None:
    sequence = write_euroc(tmp_path)
    assert open_source(f"euroc:{sequence}", fov_deg=90.0).camera.K[0, 0] == pytest.approx(16.0)
    (sequence / "mav0" / "cam0" / "sensor.yaml").unlink()
    camera_file = tmp_path / "camera.yaml"
    camera_file.write_text(CAMERA_YAML)
    assert len(list(open_source(f"euroc:{sequence}", camera_file=camera_file).frames())) == 3


def test_euroc_times_that_go_back_are_skipped(tmp_path: Path) -> None:
    sequence = write_euroc(tmp_path, (10, 30, 20, 40))
    source = open_source(f"euroc:{sequence}")
    assert [frame.timestamp_ns for frame in source.frames()] == [10, 30, 40]
    assert [(skipped.index, skipped.name) for skipped in source.skipped] == [(2, "20.png")]


def replace_in_sensor(old: str, new: str):
    def fault(camera: Path) -> None:
        assert old in SENSOR_YAML
        (camera / "sensor.yaml").write_text(SENSOR_YAML.replace(old, new))

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda c: (c / "sensor.yaml").unlink(), r"sensor\.yaml: not found; .*--camera FILE"),
        (lambda c: (c / "data.csv").unlink(), r"data\.csv: not found; a EuRoC sequence holds"),
        (lambda c: (c / "data.csv").write_text("#time\n"), r"data\.csv: lists no images"),
        (lambda c: (c / "data.csv").write_text("#time\n10,10.png\n1.5,x\n"), r"data\.csv:3: '1\.5' is not a time in"),
        (lambda c: (c / "data.csv").write_text("10\n"), r"data\.csv:1: '10' has no file name"),
        (replace_in_sensor("rate_hz: 20", "rate_hz: ]"), r"sensor\.yaml:9: not valid YAML"),
        (replace_in_sensor("camera_model: pinhole", "camera_model: omni"), "camera_model: 'omni' is not supported"),
        (replace_in_sensor("radial-tangential", "fov"), "distortion_model: 'fov' is not one of"),
        (replace_in_sensor("[30.0, 31.0, ", "["), r"intrinsics: expected \[fu, fv, cu, cv\]"),
        (replace_in_sensor("[30.0,", "[-30.0,"), r"intrinsics: expected .* with positive fu"),
        (replace_in_sensor("[-0.28, ", "["), "distortion_coefficients: radial-tangential takes 4, got 3"),
        (replace_in_sensor("[32, 24]", "[32]"), r"resolution: expected \[width, height\]"),
        (replace_in_sensor("resolution", "size"), "resolution: missing"),
        (replace_in_sensor("[32, 24]", "[24, 32]"), r"10\.png: 32x24 px, but the camera is 24x32 px"),
        (lambda c: [path.unlink() for path in (c / "data").iterdir()], "none of 3 images can be read"),
    ],
)
def test_faults_of_euroc(tmp_path: Path, fault, message: str) -> None:
    sequence = write_euroc(tmp_path)
    fault(sequence / "mav0" / "cam0")
    with pytest.raises(SourceError, match=message) as raised:
        list(open_source(f"euroc:{sequence}").frames())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["kitti", "tum", "euroc"])
def test_faults_of_every_dataset(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SourceError, match=r"no such directory; a .* see datasets/README\.md"):
        open_source(f"{kind}:{tmp_path / 'none'}")
    with pytest.raises(SourceError, match=f"'{kind}:': names nothing"):
        open_source(f"{kind}:")
    with pytest.raises(SourceError, match="drop --fps"):
        open_source(f"{kind}:{tmp_path}", fps=30.0)
    with pytest.raises(SourceError, match=str(tmp_path)):
        open_source(f"{kind}:{tmp_path}")


def test_the_real_kitti_head() -> None:
    directory = data_directory() / "kitti"
    source = open_source(f"kitti:{directory / 'sequences' / '00'}")
    frames = list(source.frames())
    assert len(frames) == source.num_frames == 200
    assert all(frame.image.shape == (376, 1241) for frame in frames)
    assert source.camera.K[0, 0] == 718.856
    assert [frame.timestamp_ns for frame in frames[:3]] == [0, 103735900, 207338100]
    assert source.ground_truth == (directory / "poses" / "00.txt").resolve()
    assert source.skipped == ()


def test_the_real_tum_head() -> None:
    directory = data_directory() / "tum" / "rgbd_7scenes_head"
    source = open_source(str(directory))
    has_depth, last_depth = [], None
    for frame in source.frames():
        assert frame.image.shape == (480, 640, 3)
        has_depth.append(frame.depth is not None)
        last_depth = frame.depth if frame.depth is not None else last_depth
    assert has_depth == [True] * 300 + [False] * 200
    raw = cv2.imread(str(directory / "depth" / "1009.966667.png"), cv2.IMREAD_ANYDEPTH)
    np.testing.assert_allclose(last_depth, raw / 5000.0, rtol=1e-6)
    assert 0.3 < np.median(last_depth[last_depth > 0]) < 10.0
    assert source.skipped == ()


def test_the_real_euroc_head() -> None:
    source = open_source(f"euroc:{data_directory() / 'euroc' / 'V1_01_head'}")
    frames = list(source.frames())
    assert len(frames) == 45
    assert all(frame.image.shape == (480, 752) for frame in frames)
    assert frames[0].timestamp_ns == 1403715275762142976
    assert source.camera.model is CameraModel.BROWN
    np.testing.assert_array_equal(source.camera.distortion, [-0.28340811, 0.07395907, 0.00019359, 1.76187114e-05])
    assert source.ground_truth is not None
    assert source.ground_truth.is_file()
