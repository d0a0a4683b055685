"""Intrinsics from a `camera.yaml`, or guessed from the field of view.

A camera.yaml holds `model` (pinhole, brown or fisheye), `width` and `height` in px, `fx fy cx cy` in px with pixel
(0, 0) at the centre of the top-left pixel, `distortion` in OpenCV's order for the model (a list, empty for a pinhole)
and, where depth images belong to it, `depth_scale` in units per metre. Depth images that a second camera took and
nobody registered have `depth_camera` too: a mapping of its `fx fy cx cy` in px and `offset_m`, [x, y, z] of its centre
in the colour camera's frame; both look the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vo.sources.registration import DepthCamera
from vo.sources.textfiles import number_field, numbers_field, only_fields, read_yaml, text_field
from vo.types import Camera, CameraModel, SourceError

CAMERA_FIELDS = ("model", "width", "height", "fx", "fy", "cx", "cy", "distortion", "depth_scale", "depth_camera")
_DEPTH_CAMERA_FIELDS = ("fx", "fy", "cx", "cy", "offset_m")
_NUM_COEFFICIENTS = {CameraModel.PINHOLE: (0,), CameraModel.BROWN: (4, 5, 8, 12, 14), CameraModel.FISHEYE: (4,)}
_REMEDY = "expected a camera.yaml with model, width, height, fx, fy, cx, cy, distortion"


@dataclass(frozen=True, slots=True, eq=False)
class CameraFile:
    """What a camera.yaml says; `depth_scale` in units of a depth image per metre, None where it says nothing.

    depth_camera  what took the depth images, where they still have to be registered to the colour image.
    """

    camera: Camera
    depth_scale: float | None = None
    depth_camera: DepthCamera | None = None


@dataclass(frozen=True, slots=True)
class CameraChoice:
    """Intrinsics the user asks for instead of the dataset's own: a file, or a horizontal field of view in degrees."""

    camera_file: Path | None = None
    fov_deg: float | None = None

    def __post_init__(self) -> None:
        if self.camera_file is not None and self.fov_deg is not None:
            raise SourceError("--camera and --fov-deg both give the intrinsics; keep one of them")

    def resolve(self, width: int, height: int) -> CameraFile | None:
        """The camera asked for, None where nothing was; the size (px) is used by the field of view alone."""
        if self.camera_file is not None:
            return read_camera(self.camera_file)
        if self.fov_deg is not None:
            return CameraFile(camera_from_fov(width, height, self.fov_deg))
        return None

    def require(self, width: int, height: int, name: str) -> CameraFile:
        """The camera asked for; raises SourceError where nothing was."""
        chosen = self.resolve(width, height)
        if chosen is None:
            raise SourceError(
                f"{name}: no intrinsics; pass --camera FILE (a camera.yaml), or --fov-deg DEGREES "
                "to guess them from the horizontal field of view"
            )
        return chosen


def read_camera(path: Path) -> CameraFile:
    """Read a camera.yaml; raises SourceError naming the file and the field."""
    return parse_camera(read_yaml(path, _REMEDY), str(path))


def parse_camera(fields: Mapping[str, object], where: str) -> CameraFile:
    """The camera that the fields of a camera.yaml describe; `where` names them in errors."""
    only_fields(fields, CAMERA_FIELDS, where)
    model = _model(text_field(fields, "model", where), where)
    distortion = numbers_field(fields, "distortion", where)
    if len(distortion) not in _NUM_COEFFICIENTS[model]:
        valid = " or ".join(str(count) for count in _NUM_COEFFICIENTS[model])
        raise SourceError(f"{where}: distortion: {model.value} takes {valid} coefficients, got {len(distortion)}")
    depth_scale = _positive(fields, "depth_scale", where) if "depth_scale" in fields else None
    return CameraFile(
        make_camera(
            (_whole(fields, "width", where), _whole(fields, "height", where)),
            (_positive(fields, "fx", where), _positive(fields, "fy", where)),
            (number_field(fields, "cx", where), number_field(fields, "cy", where)),
            distortion,
            model,
        ),
        depth_scale,
        _depth_camera(fields["depth_camera"], f"{where}: depth_camera") if "depth_camera" in fields else None,
    )


def _depth_camera(value: object, where: str) -> DepthCamera:
    if not isinstance(value, dict):
        raise SourceError(f"{where}: expected a mapping with {', '.join(_DEPTH_CAMERA_FIELDS)}")
    only_fields(value, _DEPTH_CAMERA_FIELDS, where)
    offset_m = numbers_field(value, "offset_m", where)
    if len(offset_m) != 3:
        raise SourceError(f"{where}: offset_m: expected [x, y, z], got {len(offset_m)} numbers")
    return DepthCamera(
        (_positive(value, "fx", where), _positive(value, "fy", where)),
        (number_field(value, "cx", where), number_field(value, "cy", where)),
        np.array(offset_m),
    )


def write_camera(path: Path, camera: Camera, depth_scale: float | None = None, comment: str = "") -> None:
    """Write a camera.yaml that `read_camera` reads back exactly; raises ValueError for a camera with skew."""
    if camera.K[0, 1] != 0.0:
        raise ValueError(f"K: a camera.yaml has no field for skew, got {camera.K[0, 1]}")
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"model: {camera.model.value}", f"width: {camera.width}", f"height: {camera.height}"]
    named = {"fx": camera.K[0, 0], "fy": camera.K[1, 1], "cx": camera.K[0, 2], "cy": camera.K[1, 2]}
    lines += [f"{name}: {float(value)!r}" for name, value in named.items()]
    lines.append(f"distortion: [{', '.join(repr(float(value)) for value in camera.distortion)}]")
    if depth_scale is not None:
        lines.append(f"depth_scale: {float(depth_scale)!r}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def camera_from_fov(width: int, height: int, fov_deg: float) -> Camera:
    """A pinhole with square pixels and the principal point in the middle, from the horizontal field of view.

    The field of view spans the outer edges of the first and the last pixel column.
    """
    if not 1.0 <= fov_deg <= 175.0:
        raise SourceError(f"--fov-deg: expected 1 to 175 degrees, got {fov_deg:g}")
    focal_px = 0.5 * width / math.tan(0.5 * math.radians(fov_deg))
    return make_camera((width, height), (focal_px, focal_px), (0.5 * (width - 1), 0.5 * (height - 1)))


def make_camera(
    size: tuple[int, int],
    focal_px: tuple[float, float],
    centre_px: tuple[float, float],
    distortion: tuple[float, ...] = (),
    model: CameraModel = CameraModel.PINHOLE,
) -> Camera:
    """A camera without skew from (width, height), (fx, fy) and (cx, cy), all px."""
    K = np.array([[focal_px[0], 0.0, centre_px[0]], [0.0, focal_px[1], centre_px[1]], [0.0, 0.0, 1.0]])
    return Camera(size[0], size[1], K, np.array(distortion, np.float64), model)


def _model(name: str, where: str) -> CameraModel:
    try:
        return CameraModel(name)
    except ValueError:
        valid = ", ".join(model.value for model in CameraModel)
        raise SourceError(f"{where}: model: {name!r} is not one of {valid}") from None


def _positive(fields: Mapping[str, object], name: str, where: str) -> float:
    value = number_field(fields, name, where)
    if value <= 0:
        raise SourceError(f"{where}: {name}: expected a positive number, got {value:g}")
    return value


def _whole(fields: Mapping[str, object], name: str, where: str) -> int:
    value = number_field(fields, name, where)
    if value < 1 or value != int(value):
        raise SourceError(f"{where}: {name}: expected a positive whole number, got {value:g}")
    return int(value)
