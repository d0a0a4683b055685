"""EuRoC sequences (Burri et al. 2016) in the ASL layout, which TUM VI shares: mav0/cam0, sensor.yaml, data.csv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from vo.sources.cameras import CameraChoice, make_camera
from vo.sources.images import refuse_fps
from vo.sources.sequence import ImageEntry, ImageSequence, make_rig, refuse_replaced_cameras
from vo.sources.textfiles import data_lines, numbers_field, read_text, read_yaml, text_field
from vo.sources.timestamps import associate, nanoseconds
from vo.types import Camera, CameraModel, FloatArray, SourceError, StereoRig

_LAYOUT = "a EuRoC sequence holds mav0/cam0 with sensor.yaml, data.csv and data/; see datasets/README.md"
_MODELS = {
    "radial-tangential": CameraModel.BROWN,
    "radtan": CameraModel.BROWN,
    "equidistant": CameraModel.FISHEYE,
    "none": CameraModel.PINHOLE,
}
_MAX_RIGHT_DELAY_NS = 1_000_000
_GROUND_TRUTHS = ("state_groundtruth_estimate0", "mocap0")


def open_euroc(
    name: str, directory: Path, choice: CameraChoice, fps: float | None = None, *, wants_stereo: bool = False
) -> ImageSequence:
    """The left camera of a sequence: `directory` holds mav0, or is mav0 itself.

    `wants_stereo` reads the right camera (cam1) too.

    The ground truth is the data.csv of state_groundtruth_estimate0 (EuRoC) or mocap0 (TUM VI), which is of the body
    and not of the camera. Raises SourceError.
    """
    refuse_fps(fps, "EuRoC frames carry their own times (data.csv)")
    recording = _recording(directory)
    entries = _read_list(recording / "cam0")
    camera = _read_sensor(recording / "cam0" / "sensor.yaml", choice)
    ground_truths = (recording / folder / "data.csv" for folder in _GROUND_TRUTHS)
    ground_truth = next((path for path in ground_truths if path.is_file()), None)
    if not wants_stereo:
        return ImageSequence(name, camera, entries, ground_truth=ground_truth)
    refuse_replaced_cameras(choice, name)
    rig = _read_rig(recording, camera)
    return ImageSequence(name, camera, _paired(entries, recording), ground_truth=ground_truth, stereo=rig)


def _paired(entries: list[ImageEntry], recording: Path) -> list[ImageEntry]:
    """Each frame with the image that cam1 took at its time, if it took one."""
    right = _read_list(recording / "cam1")
    times = [entry.timestamp_ns for entry in entries]
    partners = associate(times, [entry.timestamp_ns for entry in right], _MAX_RIGHT_DELAY_NS)
    return [
        entry if partner is None else replace(entry, right=right[partner].image)
        for entry, partner in zip(entries, partners, strict=True)
    ]


def _read_rig(recording: Path, camera0: Camera) -> StereoRig:
    """Both cameras, from their poses on the body (T_BS)."""
    sensors = [recording / folder / "sensor.yaml" for folder in ("cam0", "cam1")]
    if not sensors[1].parent.is_dir():
        raise SourceError(f"{sensors[1].parent}: no such directory; stereo needs the images of the right camera there")
    camera1 = _read_sensor(sensors[1], CameraChoice())
    T_body_camera0, T_body_camera1 = (_read_mounting(path) for path in sensors)
    return make_rig(camera0, camera1, np.linalg.inv(T_body_camera0) @ T_body_camera1, f"{sensors[1]}: T_BS")


def _read_mounting(path: Path) -> FloatArray:
    """T_BS of a sensor.yaml: (4, 4) pose of the sensor on the body, m."""
    mounting, where = read_yaml(path, _LAYOUT).get("T_BS"), f"{path}: T_BS"
    if not isinstance(mounting, dict):
        raise SourceError(f"{where}: missing; stereo needs the pose of both cameras")
    T = np.array(numbers_field(mounting, "data", where))
    if T.size != 16:
        raise SourceError(f"{where}: data: expected 16 numbers, got {T.size}")
    T = T.reshape(4, 4)
    is_rotation = np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-4) and np.linalg.det(T[:3, :3]) > 0
    if not is_rotation or not np.array_equal(T[3], [0.0, 0.0, 0.0, 1.0]):
        raise SourceError(f"{where}: data: expected a rotation and a translation, got {T.ravel().tolist()}")
    return T


def _recording(directory: Path) -> Path:
    """The directory that holds cam0."""
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; {_LAYOUT}")
    for candidate in (directory / "mav0", directory):
        if (candidate / "cam0").is_dir():
            return candidate
    raise SourceError(f"{directory}: no mav0/cam0 there; {_LAYOUT}")


def _read_list(camera_directory: Path) -> list[ImageEntry]:
    listing, entries = camera_directory / "data.csv", []
    for number, line in data_lines(read_text(listing, _LAYOUT)):
        time, _, file_name = (part.strip() for part in line.partition(","))
        try:
            time_ns = nanoseconds(time)
        except ValueError as error:
            raise SourceError(f"{listing}:{number}: {error}; expected `nanoseconds,file name`") from None
        if not file_name:
            raise SourceError(f"{listing}:{number}: {line!r} has no file name; expected `nanoseconds,file name`")
        entries.append(ImageEntry(time_ns, camera_directory / "data" / file_name))
    if not entries:
        raise SourceError(f"{listing}: lists no images; {_LAYOUT}")
    return entries


def _read_sensor(path: Path, choice: CameraChoice) -> Camera:
    if choice.camera_file is not None:
        return choice.require(0, 0, str(path)).camera
    fields, where = read_yaml(path, f"{_LAYOUT}; or pass --camera FILE"), str(path)
    width, height = _resolution(fields, where)
    guessed = choice.resolve(width, height)
    if guessed is not None:
        return guessed.camera
    projection = text_field(fields, "camera_model", where)
    if projection != "pinhole":
        raise SourceError(f"{where}: camera_model: {projection!r} is not supported, only pinhole; pass --camera FILE")
    intrinsics = numbers_field(fields, "intrinsics", where)
    if len(intrinsics) != 4 or min(intrinsics[:2]) <= 0:
        raise SourceError(f"{where}: intrinsics: expected [fu, fv, cu, cv] with positive fu, fv, got {intrinsics}")
    model, distortion = _distortion(fields, where)
    fu, fv, cu, cv = intrinsics
    return make_camera((width, height), (fu, fv), (cu, cv), distortion, model)


def _resolution(fields: Mapping[str, object], where: str) -> tuple[int, int]:
    resolution = numbers_field(fields, "resolution", where)
    if len(resolution) != 2 or any(side < 1 or side != int(side) for side in resolution):
        raise SourceError(f"{where}: resolution: expected [width, height] in px, got {resolution}")
    return int(resolution[0]), int(resolution[1])


def _distortion(fields: Mapping[str, object], where: str) -> tuple[CameraModel, tuple[float, ...]]:
    name = text_field(fields, "distortion_model", where)
    if name not in _MODELS:
        raise SourceError(f"{where}: distortion_model: {name!r} is not one of {', '.join(_MODELS)}; pass --camera FILE")
    model = _MODELS[name]
    if model is CameraModel.PINHOLE:
        return model, ()
    coefficients = numbers_field(fields, "distortion_coefficients", where)
    if len(coefficients) != 4:
        raise SourceError(f"{where}: distortion_coefficients: {name} takes 4, got {len(coefficients)}")
    return model, coefficients
