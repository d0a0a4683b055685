"""EuRoC sequences (Burri et al. 2016) in the ASL layout, which TUM VI shares: mav0/cam0, sensor.yaml, data.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vo.sources.cameras import CameraChoice, make_camera
from vo.sources.images import refuse_fps
from vo.sources.sequence import ImageEntry, ImageSequence
from vo.sources.textfiles import data_lines, numbers_field, read_text, read_yaml, text_field
from vo.sources.timestamps import nanoseconds
from vo.types import Camera, CameraModel, SourceError

_LAYOUT = "a EuRoC sequence holds mav0/cam0 with sensor.yaml, data.csv and data/; see datasets/README.md"
_MODELS = {
    "radial-tangential": CameraModel.BROWN,
    "radtan": CameraModel.BROWN,
    "equidistant": CameraModel.FISHEYE,
    "none": CameraModel.PINHOLE,
}
_GROUND_TRUTHS = ("state_groundtruth_estimate0", "mocap0")


def open_euroc(name: str, directory: Path, choice: CameraChoice, fps: float | None = None) -> ImageSequence:
    """The left camera of a sequence: `directory` holds mav0, or is mav0 itself.

    The ground truth is the data.csv of state_groundtruth_estimate0 (EuRoC) or mocap0 (TUM VI), which is of the body
    and not of the camera. Raises SourceError.
    """
    refuse_fps(fps, "EuRoC frames carry their own times (data.csv)")
    recording = _recording(directory)
    entries = _read_list(recording / "cam0")
    camera = _read_sensor(recording / "cam0" / "sensor.yaml", choice)
    ground_truths = (recording / folder / "data.csv" for folder in _GROUND_TRUTHS)
    return ImageSequence(
        name, camera, entries, ground_truth=next((path for path in ground_truths if path.is_file()), None)
    )


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
