"""Depth from two cameras, against rendered pairs of exact depth, and the right images of KITTI and EuRoC."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from rendered_world import render
from synthetic_sources import gray_image, rgb_image, write_euroc, write_image, write_kitti

from vo.config import StereoScaleConfig
from vo.geometry import exp_so3, invert_pose, make_pose
from vo.scale import stereo_reading
from vo.sources import open_source
from vo.stereo import StereoDepth
from vo.types import Camera, CameraModel, Frame, SourceError, StereoRig

BASELINE_M = 0.54
CONFIG = StereoScaleConfig(max_disparity_px=96)
PINHOLE = Camera(480, 320, np.array([[400.0, 0.0, 239.5], [0.0, 400.0, 150.0], [0.0, 0.0, 1.0]]))
K0 = np.array([[360.0, 0.0, 245.0], [0.0, 358.0, 155.0], [0.0, 0.0, 1.0]])
K1 = np.array([[364.0, 0.0, 236.0], [0.0, 361.0, 162.0], [0.0, 0.0, 1.0]])


def rectified_rig(offset_px: float = 0.0) -> StereoRig:
    K = PINHOLE.K.copy()
    K[0, 2] -= offset_px
    return StereoRig(PINHOLE, Camera(480, 320, K), make_pose(np.eye(3), np.array([BASELINE_M, 0.0, 0.0])))


def turned_rig(model: CameraModel) -> StereoRig:
    """A second camera that is turned by 1 to 2 degrees about every axis, behind and below, with another lens."""
    fisheye = model is CameraModel.FISHEYE
    distortion0 = np.array([-0.05, 0.01, 0.002, -0.001] if fisheye else [-0.28, 0.07, 2e-4, 1e-4])
    distortion1 = np.array([-0.04, 0.012, 0.001, 0.0] if fisheye else [-0.27, 0.06, -1e-4, 3e-4])
    T = make_pose(exp_so3(np.array([0.02, -0.03, 0.025])), np.array([0.4, 0.012, -0.02]))
    return StereoRig(Camera(480, 320, K0, distortion0, model), Camera(480, 320, K1, distortion1, model), T)


RIGS = {
    "rectified": rectified_rig(),
    "rectified with shifted centres": rectified_rig(9.0),
    "brown": turned_rig(CameraModel.BROWN),
    "fisheye": turned_rig(CameraModel.FISHEYE),
}


def grid_keypoints(step_px: float = 9.3) -> np.ndarray:
    xs, ys = np.meshgrid(np.arange(20.0, 460.0, step_px), np.arange(20.0, 300.0, step_px))
    return np.stack([xs.ravel(), ys.ravel()], axis=1).astype(np.float32)


def true_depths(depth: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Depths at keypoints; NaN at the edges of boxes, where no interpolation is true."""
    smooth = cv2.remap(depth, keypoints[:, :1].copy(), keypoints[:, 1:].copy(), cv2.INTER_LINEAR).ravel()
    spread = cv2.dilate(depth, np.ones((15, 15))) - cv2.erode(depth, np.ones((15, 15)))
    columns, rows = np.rint(keypoints).astype(int).T
    return np.where(spread[rows, columns] < 0.15 * smooth, smooth, np.nan)


@pytest.mark.parametrize("name", RIGS)
def test_depths_are_those_of_the_world(name: str) -> None:
    rig = RIGS[name]
    image0, depth = render(rig.camera0, np.eye(4))
    image1, _ = render(rig.camera1, rig.T_camera0_camera1)
    keypoints = grid_keypoints()
    depths = StereoDepth(rig, CONFIG).depths(image0, image1, keypoints)
    truth = true_depths(depth, keypoints)
    known = np.isfinite(depths) & np.isfinite(truth)
    assert known.mean() > 0.6
    # An error of a tenth of a pixel in disparity, as a ratio of the depth.
    tolerance = 0.1 * truth[known] / (K0[0, 0] * rig.baseline_m)
    errors = np.log(depths[known] / truth[known])
    assert (np.abs(errors) < 4 * tolerance).mean() > 0.93
    assert np.median(np.abs(errors) / tolerance) < 0.5
    assert abs(np.median(errors)) < 5e-4
    reading = stereo_reading(depths[known], truth[known] / 0.37, CONFIG)
    assert reading is not None
    assert reading.log_ratio == pytest.approx(np.log(0.37), abs=2e-3)


def test_hidden_points_have_no_depth() -> None:
    """What the box hides from the right camera has no partner there; the check from right to left finds out."""
    rig = RIGS["rectified"]
    image0, depth = render(rig.camera0, np.eye(4))
    image1, depth1 = render(rig.camera1, rig.T_camera0_camera1)
    disparity = StereoDepth(rig, CONFIG).disparity(image0, image1)
    ys, xs = np.mgrid[0:320, 0:480]
    partner = xs - rig.camera0.focal_px * BASELINE_M / depth
    seen_there = cv2.remap(depth1, partner.astype(np.float32), ys.astype(np.float32), cv2.INTER_NEAREST)
    hidden = (partner > 1) & (seen_there < 0.8 * depth)
    hidden = cv2.erode(hidden.astype(np.uint8), np.ones((3, 9), np.uint8)).astype(bool)
    assert hidden.sum() > 300
    assert np.isfinite(disparity[hidden]).mean() < 0.1
    assert np.isnan(StereoDepth(rig, CONFIG).depths(image0, image1, np.array([[-3.0, 5.0], [479.9, 5.0]]))).all()


def test_colour_is_read_as_gray() -> None:
    rig = RIGS["rectified"]
    image0, image1 = render(rig.camera0, np.eye(4))[0], render(rig.camera1, rig.T_camera0_camera1)[0]
    stereo, keypoints = StereoDepth(rig, CONFIG), grid_keypoints(40.0)
    gray = stereo.depths(image0, image1, keypoints)
    colour = stereo.depths(np.dstack([image0] * 3), np.dstack([image1] * 3), keypoints)
    np.testing.assert_array_equal(gray, colour)


def test_a_rig_is_checked() -> None:
    with pytest.raises(ValueError, match="the two cameras are at the same place"):
        StereoRig(PINHOLE, PINHOLE, np.eye(4))
    with pytest.raises(ValueError, match="expected a rotation"):
        StereoRig(PINHOLE, PINHOLE, np.full((4, 4), 0.5))
    left = StereoRig(PINHOLE, PINHOLE, make_pose(np.eye(3), np.array([-0.5, 0.0, 0.0])))
    with pytest.raises(ValueError, match="expected camera 1 to the right"):
        StereoDepth(left, CONFIG)
    with pytest.raises(ValueError, match="right: expected"):
        Frame(0, 0, np.zeros((320, 480), np.uint8), PINHOLE, right=np.zeros((320, 480), np.float32))


# The sources.


def write_right_of_kitti(sequence: Path, folder: str = "image_1", num_frames: int = 5) -> None:
    for index in range(num_frames):
        image = gray_image(100 + index) if folder == "image_1" else rgb_image(100 + index)
        write_image(sequence / folder / f"{index:06d}.png", image)
    # Row i of a real calib.txt: cameras of one focal length, each K (I | -centre).
    rows = [f"P{number}: 30 0 15 {-15.0 * number} 0 31 11 0 0 0 1 0" for number in range(4)]
    (sequence / "calib.txt").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(("left", "right"), [("image_0", "image_1"), ("image_2", "image_3")])
def test_kitti_with_its_right_camera(tmp_path: Path, left: str, right: str) -> None:
    sequence = write_kitti(tmp_path, folder=left)
    write_right_of_kitti(sequence, right)
    assert open_source(f"kitti:{sequence}").stereo is None
    assert next(open_source(f"kitti:{sequence}").frames()).right is None
    for spec in (f"kitti:{sequence}", str(sequence)):
        source = open_source(spec, wants_stereo=True)
        assert source.stereo is not None
        np.testing.assert_allclose(source.stereo.T_camera0_camera1, make_pose(np.eye(3), np.array([0.5, 0.0, 0.0])))
        np.testing.assert_array_equal(source.stereo.camera0.K, source.camera.K)
        for index, frame in enumerate(source.frames()):
            expected = gray_image(100 + index) if right == "image_1" else rgb_image(100 + index)
            np.testing.assert_array_equal(frame.right, expected)
        assert source.skipped == ()


def test_missing_right_images_of_kitti_cost_no_frame(tmp_path: Path) -> None:
    sequence = write_kitti(tmp_path)
    write_right_of_kitti(sequence)
    (sequence / "image_1" / "000003.png").unlink()
    (sequence / "image_1" / "000001.png").write_bytes(b"")
    source = open_source(f"kitti:{sequence}", wants_stereo=True)
    assert [frame.right is not None for frame in source.frames()] == [True, False, True, False, True]
    assert [(item.index, item.name, item.reason, item.is_kept) for item in source.skipped] == [
        (1, "000001.png", "frame kept without right image: the file is empty", True),
        (3, "000003.png", "frame kept without right image: no such file", True),
    ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: (s / "image_1").rename(s / "x"), r"image_1: no such directory; stereo needs"),
        (lambda s: (s / "calib.txt").write_text("P0: 30 0 15 0 0 31 11 0 0 0 1 0\n"), r"calib\.txt: P1: missing"),
        (
            lambda s: (s / "calib.txt").write_text("\n".join(f"P{i}: 30 0 15 9 0 31 11 0 0 0 1 0" for i in (0, 1))),
            r"calib\.txt: P1: expected the second camera to the right",
        ),
        (lambda s: write_image(s / "image_1" / "000002.png", gray_image(0, 8, 8)), r"000002\.png: 8x8 px, but the cam"),
    ],
)
def test_faults_of_a_kitti_pair(tmp_path: Path, fault, message: str) -> None:
    sequence = write_kitti(tmp_path)
    write_right_of_kitti(sequence)
    fault(sequence)
    with pytest.raises(SourceError, match=message) as raised:
        list(open_source(f"kitti:{sequence}", wants_stereo=True).frames())
    assert "\n" not in str(raised.value)


def sensor_yaml(camera: Camera, T_body_camera: np.ndarray) -> str:
    model = "equidistant" if camera.model is CameraModel.FISHEYE else "radial-tangential"
    numbers = [float(value) for value in T_body_camera.ravel()]
    intrinsics = [float(camera.K[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))]
    return (
        f"%YAML:1.0\nT_BS:\n  cols: 4\n  rows: 4\n  data: {numbers}\nresolution: [{camera.width}, {camera.height}]\n"
        f"camera_model: pinhole\nintrinsics: {intrinsics}\ndistortion_model: {model}\n"
        f"distortion_coefficients: {[float(value) for value in camera.distortion]}\n"
    )


def write_stereo_euroc(root: Path) -> tuple[Path, StereoRig]:
    """Rendered frames at 10, 20, 30 and 40 ns of a body that carries the cameras turned; cam1 lacks that at 30."""
    rig = RIGS["brown"]
    T_body_camera0 = make_pose(exp_so3(np.array([0.3, -1.2, 0.5])), np.array([-0.02, -0.06, 0.01]))
    sequence = write_euroc(root, (10_000_000, 20_000_000, 30_000_000, 40_000_000)) / "mav0"
    for folder, camera, T_camera0_camera in (
        ("cam0", rig.camera0, np.eye(4)),
        ("cam1", rig.camera1, rig.T_camera0_camera1),
    ):
        image, _ = render(camera, T_camera0_camera)
        times = [time * 10_000_000 for time in ((1, 2, 3, 4) if folder == "cam0" else (1, 2, 4))]
        for time_ns in times:
            write_image(sequence / folder / "data" / f"{time_ns}.png", image)
        lines = ["#timestamp [ns],filename"] + [f"{time_ns},{time_ns}.png" for time_ns in times]
        (sequence / folder / "data.csv").write_text("\n".join(lines) + "\n")
        (sequence / folder / "sensor.yaml").write_text(sensor_yaml(camera, T_body_camera0 @ T_camera0_camera))
    return sequence, rig


def test_euroc_with_its_right_camera(tmp_path: Path) -> None:
    """From files to metres: calibration, times and images of both cameras give the rendered depths."""
    sequence, rig = write_stereo_euroc(tmp_path)
    source = open_source(f"euroc:{sequence}", wants_stereo=True)
    assert source.stereo is not None
    np.testing.assert_allclose(source.stereo.T_camera0_camera1, rig.T_camera0_camera1, atol=1e-12)
    frames = list(source.frames())
    assert [frame.right is not None for frame in frames] == [True, True, False, True]
    assert [(item.index, item.name, item.reason) for item in source.skipped] == [
        (2, "30000000.png", "frame kept without right image: none at its time")
    ]
    keypoints = grid_keypoints()
    depths = StereoDepth(source.stereo, CONFIG).depths(frames[0].image, frames[0].right, keypoints)
    truth = true_depths(render(rig.camera0, np.eye(4))[1], keypoints)
    known = np.isfinite(depths) & np.isfinite(truth)
    assert known.mean() > 0.6
    assert abs(np.median(np.log(depths[known] / truth[known]))) < 5e-4
    assert open_source(f"euroc:{sequence}").stereo is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda m: (m / "cam1").rename(m / "x"), r"cam1: no such directory; stereo needs"),
        (lambda m: (m / "cam1" / "data.csv").unlink(), r"cam1/data\.csv: not found"),
        (lambda m: (m / "cam1" / "sensor.yaml").unlink(), r"cam1/sensor\.yaml: not found"),
        (
            lambda m: (m / "cam0" / "sensor.yaml").write_text(
                (m / "cam0" / "sensor.yaml").read_text().replace("T_BS", "T_SB")
            ),
            r"cam0/sensor\.yaml: T_BS: missing; stereo needs",
        ),
        (
            lambda m: (m / "cam1" / "sensor.yaml").write_text(sensor_yaml(RIGS["brown"].camera1, np.eye(4)[:2])),
            r"cam1/sensor\.yaml: T_BS: data: expected 16 numbers, got 8",
        ),
        (
            lambda m: (m / "cam1" / "sensor.yaml").write_text(sensor_yaml(RIGS["brown"].camera1, 2 * np.eye(4))),
            r"cam1/sensor\.yaml: T_BS: data: expected a rotation",
        ),
        (
            lambda m: (m / "cam1" / "sensor.yaml").write_text(
                sensor_yaml(RIGS["brown"].camera1, mounting(m / "cam0") @ invert_pose(RIGS["brown"].T_camera0_camera1))
            ),
            r"cam1/sensor\.yaml: T_BS: expected the second camera to the right of the first",
        ),
    ],
)
def test_faults_of_a_euroc_pair(tmp_path: Path, fault, message: str) -> None:
    sequence, _ = write_stereo_euroc(tmp_path)
    fault(sequence)
    with pytest.raises(SourceError, match=message) as raised:
        open_source(f"euroc:{sequence}", wants_stereo=True)
    assert "\n" not in str(raised.value)


def mounting(camera: Path) -> np.ndarray:
    text = (camera / "sensor.yaml").read_text()
    return np.array([float(value) for value in text.split("data: [")[1].split("]")[0].split(",")]).reshape(4, 4)


def test_what_has_one_camera_has_no_stereo(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", gray_image(0))
    for spec in (str(tmp_path), f"images:{tmp_path}", "webcam:0", "demo", "http://host/stream"):
        with pytest.raises(SourceError, match=r"has no second camera; odometry\.scale: stereo needs kitti:DIR"):
            open_source(spec, wants_stereo=True)
    sequence = write_kitti(tmp_path / "k")
    write_right_of_kitti(sequence)
    with pytest.raises(SourceError, match="stereo needs the calibration of both cameras; drop --camera"):
        open_source(f"kitti:{sequence}", fov_deg=90.0, wants_stereo=True)
