"""Frames that lie on disk as one image file each: what every dataset becomes once its own files are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vo.sources.base import SkippedFrame
from vo.sources.cameras import CameraChoice
from vo.sources.decode import UnreadableImageError, read_depth, read_image
from vo.sources.registration import DepthCamera, register_depth
from vo.types import Camera, FloatArray, Frame, SourceError, StereoRig


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """Where one frame lies and when it was taken; `depth` and `right` are the files of its depth image and of the image
    of the second camera, if it has them.
    """

    timestamp_ns: int
    image: Path
    depth: Path | None = None
    right: Path | None = None


class ImageSequence:
    """A source over image files; see `vo.sources.base.Source` for the attributes."""

    is_live = False

    def __init__(
        self,
        name: str,
        camera: Camera,
        entries: Sequence[ImageEntry],
        *,
        depth_scale: float = 5000.0,
        depth_camera: DepthCamera | None = None,
        ground_truth: Path | None = None,
        stereo: StereoRig | None = None,
    ) -> None:
        """`depth_scale` is in units of the depth images per metre; with `stereo` the right images are read too.

        depth_camera  what took the depth images, where they are not registered to the colour images yet.
        """
        self.name = name
        self.camera = camera
        self.ground_truth = ground_truth
        self.stereo = stereo
        self.num_frames = len(entries)
        self._entries = tuple(entries)
        self._depth_scale = depth_scale
        self._depth_camera = depth_camera
        self._skipped: list[SkippedFrame] = []
        self._is_closed = threading.Event()

    @property
    def skipped(self) -> Sequence[SkippedFrame]:
        return tuple(self._skipped)

    def frames(self) -> Iterator[Frame]:
        """Yields every readable frame; raises SourceError on a change of size or where no image can be read."""
        last_ns = -1
        for index, entry in enumerate(self._entries):
            if self._is_closed.is_set():
                return
            if entry.timestamp_ns <= last_ns:
                self._skip(index, entry.image, f"timestamp {entry.timestamp_ns} ns does not rise above {last_ns} ns")
                continue
            frame = self._read(index, entry)
            if frame is not None:
                last_ns = entry.timestamp_ns
                yield frame
        if last_ns < 0:
            raise SourceError(nothing_readable(self.name, self._skipped))

    def close(self) -> None:
        self._is_closed.set()

    def _read(self, index: int, entry: ImageEntry) -> Frame | None:
        try:
            image = read_image(entry.image)
        except UnreadableImageError as error:
            self._skip(index, entry.image, str(error))
            return None
        check_size(image.shape, self.camera, str(entry.image))
        depth, right = self._read_depth(index, entry.depth), self._read_right(index, entry)
        return Frame(index, entry.timestamp_ns, image, self.camera, depth, right)

    def _read_depth(self, index: int, path: Path | None) -> NDArray[np.float32] | None:
        if path is None:
            return None
        try:
            depth = read_depth(path, self._depth_scale)
        except UnreadableImageError as error:
            self._skipped.append(SkippedFrame(index, path.name, f"frame kept without depth: {error}", is_kept=True))
            return None
        check_size(depth.shape, self.camera, str(path))
        return depth if self._depth_camera is None else register_depth(depth, self._depth_camera, self.camera)

    def _read_right(self, index: int, entry: ImageEntry) -> NDArray[np.uint8] | None:
        if self.stereo is None:
            return None
        name = entry.image.name if entry.right is None else entry.right.name
        try:
            if entry.right is None:
                raise UnreadableImageError("none at its time")
            image = read_image(entry.right)
        except UnreadableImageError as error:
            self._skipped.append(SkippedFrame(index, name, f"frame kept without right image: {error}", is_kept=True))
            return None
        check_size(image.shape, self.stereo.camera1, str(entry.right))
        return image

    def _skip(self, index: int, path: Path, reason: str) -> None:
        self._skipped.append(SkippedFrame(index, path.name, reason))


def image_size(name: str, paths: Sequence[Path]) -> tuple[int, int]:
    """(width, height) px of the first image that can be read; raises SourceError where none can."""
    unreadable = []
    for index, path in enumerate(paths):
        try:
            height, width = read_image(path).shape[:2]
        except UnreadableImageError as error:
            unreadable.append(SkippedFrame(index, path.name, str(error)))
        else:
            return width, height
    raise SourceError(nothing_readable(name, unreadable))


def check_size(shape: tuple[int, ...], camera: Camera, name: str) -> None:
    """Raise SourceError unless an image of this (H, W, ...) is of the camera's size."""
    height, width = shape[:2]
    if (width, height) != (camera.width, camera.height):
        raise SourceError(
            f"{name}: {width}x{height} px, but the camera is {camera.width}x{camera.height} px; "
            "all frames must have the size of the calibration: use matching images or another --camera file"
        )


def make_rig(camera0: Camera, camera1: Camera, T_camera0_camera1: FloatArray, where: str) -> StereoRig:
    """Raises SourceError, naming `where`, unless camera 1 stands to the right of camera 0."""
    x, y, z = (float(value) for value in T_camera0_camera1[:3, 3])
    if x <= 2.0 * max(abs(y), abs(z)):
        raise SourceError(
            f"{where}: expected the second camera to the right of the first, it is at {x:g} {y:g} {z:g} m; "
            "choose another odometry.scale than stereo"
        )
    try:
        return StereoRig(camera0, camera1, T_camera0_camera1)
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from None


def refuse_replaced_cameras(choice: CameraChoice, where: str) -> None:
    """Raise SourceError for intrinsics of the user's: stereo needs those the two cameras were calibrated with."""
    if choice != CameraChoice():
        raise SourceError(f"{where}: stereo needs the calibration of both cameras; drop --camera and --fov-deg")


def nothing_readable(name: str, skipped: Sequence[SkippedFrame]) -> str:
    """The one line for a source of which no frame could be used."""
    if not skipped:
        return f"{name}: holds no frames"
    first = skipped[0]
    return f"{name}: none of {len(skipped)} images can be read (first: {first.name}: {first.reason})"
