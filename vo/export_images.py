"""The images of an export: out of a recording as they are, from the source, or with the distortion taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.camera_models import scaled_camera
from vo.export_input import ExportError
from vo.export_scene import ExportScene
from vo.output import prepare_directory, write_atomically
from vo.sources import Source
from vo.types import Camera, CameraModel

JPEG_QUALITY = 95

Image = NDArray[np.uint8]


def image_name(frame_index: int, suffix: str) -> str:
    """The file of a frame."""
    return f"frame_{frame_index:06d}{suffix}"


def write_jpegs(
    images: Iterable[tuple[int, bytes]], wanted: set[int], directory: Path, camera: Camera | None
) -> tuple[dict[int, str], tuple[int, int]]:
    """Writes those of `wanted` frames into `directory`; file names by frame index, and (width, height) of the images.

    They are taken as they are, or, with the `camera` of the run, its distortion is taken out. Raises ExportError for
    images that cannot be read or differ in size, and OutputError.
    """
    prepare_directory(directory)
    names: dict[int, str] = {}
    size: tuple[int, int] | None = None
    for frame_index, jpeg in images:
        if frame_index not in wanted:
            continue
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            raise ExportError(f"the image of frame {frame_index} is no JPEG file that can be read")
        height, width = image.shape[:2]
        if size is not None and size != (width, height):
            raise ExportError(f"frame {frame_index} has {width} x {height} px, those before it {size[0]} x {size[1]}")
        size = (width, height)
        name = image_name(frame_index, ".jpg")
        data = jpeg
        if camera is not None:
            pixels = undistorted(np.asarray(image, np.uint8), scaled_camera(camera, width, height))
            data = _encoded(pixels, ".jpg", name)
        write_atomically(directory / name, data)
        names[frame_index] = name
    return names, size or (0, 0)


def write_source_images(
    source: Source, wanted: set[int], directory: Path, camera: Camera | None
) -> tuple[dict[int, str], tuple[int, int]]:
    """Like `write_jpegs`, with frames of the source, as PNG: nothing is lost once more."""
    prepare_directory(directory)
    names: dict[int, str] = {}
    for frame in source.frames():
        if frame.index in wanted:
            image: Image = frame.image
            if image.ndim == 3:
                image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)
            name = image_name(frame.index, ".png")
            data = image if camera is None else undistorted(image, camera)
            write_atomically(directory / name, _encoded(data, ".png", name))
            names[frame.index] = name
        if len(names) == len(wanted):
            break
    return names, (source.camera.width, source.camera.height)


def undistorted(image: Image, camera: Camera) -> Image:
    """The image of a pinhole with the same intrinsics; black where the camera saw nothing."""
    if camera.model is CameraModel.PINHOLE:
        return image
    size, K, distortion = (camera.width, camera.height), np.ascontiguousarray(camera.K), camera.distortion
    if camera.model is CameraModel.FISHEYE:
        maps = cv2.fisheye.initUndistortRectifyMap(K, distortion, np.eye(3), K, size, cv2.CV_32FC1)
    else:
        maps = cv2.initUndistortRectifyMap(K, distortion, np.eye(3), K, size, cv2.CV_32FC1)
    return np.asarray(cv2.remap(image, maps[0], maps[1], cv2.INTER_LINEAR), np.uint8)


def sampled_colors(scene: ExportScene, read: Callable[[int], Image]) -> NDArray[np.uint8]:
    """(L, 3) RGB of every landmark, where the first image that sees it has its keypoint; `read` gives BGR or gray."""
    colors = np.zeros((len(scene.landmarks.ids), 3), np.uint8)
    is_known = np.zeros(len(colors), np.bool_)
    for image in scene.images:
        rows = np.searchsorted(scene.landmarks.ids, image.landmark_ids)
        is_new = ~is_known[rows]
        if not is_new.any():
            continue
        pixels = read(image.frame.frame_index)
        height, width = pixels.shape[:2]
        x, y = np.clip(np.rint(image.keypoints[is_new]).astype(int), 0, [width - 1, height - 1]).T
        values = pixels[y, x]
        colors[rows[is_new]] = values[:, None] if values.ndim == 1 else values[:, ::-1]
        is_known[rows] = True
    return colors


def image_reader(directory: Path, names: dict[int, str]) -> Callable[[int], Image]:
    """Reads images that were written, as BGR or gray."""

    def read(frame_index: int) -> Image:
        path = directory / names[frame_index]
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if image is None:
            raise ExportError(f"{path}: cannot be read back; was it changed while the export went on?")
        return np.asarray(image, np.uint8)

    return read


def _encoded(image: Image, suffix: str, name: str) -> bytes:
    parameters = (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY) if suffix == ".jpg" else ()
    is_done, data = cv2.imencode(suffix, image, parameters)
    if not is_done:
        raise ExportError(f"{name}: OpenCV cannot write an image of shape {image.shape}")
    return bytes(data.tobytes())
