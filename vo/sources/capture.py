"""The little that videos and cameras need of OpenCV's VideoCapture, so that tests can stand in for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

_log_level_lock = threading.Lock()


class Control(Enum):
    """What of a camera can be fixed."""

    EXPOSURE = "exposure"
    GAIN = "gain"
    FOCUS = "focus"
    WHITE_BALANCE = "white_balance"


class Capture(Protocol):
    """A device or file that delivers images one after the other.

    size          (width, height) px.
    fps           frames per second as announced, 0 where nothing is.
    num_frames    as announced, 0 where nothing is.
    pixel_format  four letters, as "MJPG"; empty where nobody says.
    """

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def fps(self) -> float: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def pixel_format(self) -> str: ...

    def grab(self) -> bool:
        """Takes the next image; False at the end or where none came in time."""
        ...

    def position_ms(self) -> float:
        """Time of the grabbed image as the container says, or the driver of a device: on V4L2 that of its buffer."""
        ...

    def fix(self, control: Control, value: float) -> float | None:
        """Switches an automatism of a device off and sets the value; the value it then has, None where it has none."""
        ...

    def is_automatic(self, control: Control) -> bool | None:
        """Whether the device changes it by itself; None where it does not say."""
        ...

    def retrieve(self) -> NDArray[np.uint8] | None:
        """The grabbed image, (H, W, 3) RGB or (H, W) gray; None where it cannot be decoded."""
        ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Automatism:
    """OpenCV's property that switches it, and the value that means off (V4L2: exposure 1 is manual, the rest 0)."""

    property: int
    off: float


_PROPERTIES = {
    Control.EXPOSURE: cv2.CAP_PROP_EXPOSURE,
    Control.GAIN: cv2.CAP_PROP_GAIN,
    Control.FOCUS: cv2.CAP_PROP_FOCUS,
    Control.WHITE_BALANCE: cv2.CAP_PROP_WB_TEMPERATURE,
}
_AUTOMATISMS = {
    Control.EXPOSURE: _Automatism(cv2.CAP_PROP_AUTO_EXPOSURE, 1.0),
    Control.FOCUS: _Automatism(cv2.CAP_PROP_AUTOFOCUS, 0.0),
    Control.WHITE_BALANCE: _Automatism(cv2.CAP_PROP_AUTO_WB, 0.0),
}


class OpenCvCapture:
    """A `Capture` over an opened cv2.VideoCapture."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self._capture = capture

    @property
    def size(self) -> tuple[int, int]:
        width, height = self._capture.get(cv2.CAP_PROP_FRAME_WIDTH), self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        return round(width), round(height)

    @property
    def fps(self) -> float:
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        return rate if 0 < rate < float("inf") else 0.0

    @property
    def num_frames(self) -> int:
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        return int(count) if 0 < count < 2**31 else 0

    @property
    def pixel_format(self) -> str:
        code = int(self._capture.get(cv2.CAP_PROP_FOURCC))
        return code.to_bytes(4, "little").decode("ascii", "replace").strip("\0 ") if 0 < code < 2**32 else ""

    def grab(self) -> bool:
        return self._capture.grab()

    def fix(self, control: Control, value: float) -> float | None:
        automatism = _AUTOMATISMS.get(control)
        if automatism is not None:
            self._capture.set(automatism.property, automatism.off)
        self._capture.set(_PROPERTIES[control], value)
        # Drivers round, and drivers refuse without saying so.
        found = self._capture.get(_PROPERTIES[control])
        return None if found == -1 else found

    def is_automatic(self, control: Control) -> bool | None:
        automatism = _AUTOMATISMS.get(control)
        if automatism is None:
            return None
        state = self._capture.get(automatism.property)
        return None if state == -1 else state != automatism.off

    def position_ms(self) -> float:
        return self._capture.get(cv2.CAP_PROP_POS_MSEC)

    def retrieve(self) -> NDArray[np.uint8] | None:
        is_decoded, image = self._capture.retrieve()
        if not is_decoded or image is None or image.dtype != np.uint8:
            return None
        if image.ndim == 2 or image.shape[2] == 1:
            return np.ascontiguousarray(image.reshape(image.shape[:2]), np.uint8)
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)

    def release(self) -> None:
        self._capture.release()


def open_file(path: str) -> OpenCvCapture | None:
    """A video file or URL; None where it cannot be opened. Rotation tags are not applied, as for images."""
    backend = cv2.CAP_FFMPEG if cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG) else cv2.CAP_ANY
    with quiet_opencv():
        capture = cv2.VideoCapture(path, backend)
    if not capture.isOpened():
        return None
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
    return OpenCvCapture(capture)


def open_stream(url: str, timeout_s: float) -> OpenCvCapture | None:
    """A live stream behind a URL; None where it cannot be opened. Neither opening nor reading waits for longer.

    FFmpeg is told not to keep what it read ahead while it looked for the format: those frames would come late.
    """
    timeout_ms = int(1000 * timeout_s)
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
    with quiet_opencv(), _low_latency():
        capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, limits)
    if not capture.isOpened():
        return None
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
    return OpenCvCapture(capture)


def open_device(
    device: int | str, size: tuple[int, int] | None, fps: float | None, pixel_format: str | None = None
) -> OpenCvCapture | None:
    """A camera by index or device path; None where it cannot be opened.

    `size` (px), `fps` and `pixel_format` (four letters) are asked for; what the driver grants is in the capture's own.
    """
    backend = cv2.CAP_V4L2 if sys.platform.startswith("linux") else cv2.CAP_ANY
    with quiet_opencv():
        capture = cv2.VideoCapture(device, backend)
    if not capture.isOpened():
        return None
    if pixel_format is not None:  # first: sizes and rates depend on it
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*pixel_format))
    if size is not None:
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, size[0])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, size[1])
    if fps is not None:
        capture.set(cv2.CAP_PROP_FPS, fps)
    # Frames waiting in the driver are stale: without a bound the newest is several periods away.
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return OpenCvCapture(capture)


@contextmanager
def _low_latency() -> Iterator[None]:
    """Opens without FFmpeg's read-ahead, which can be told by the environment only; who has set it keeps it."""
    name = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "fflags;nobuffer|flags;low_delay|rtsp_transport;tcp"
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Opens without OpenCV's and FFmpeg's own lines on standard error: the failure is ours to report.

    OpenCV's log level is put back afterwards. FFmpeg's can be set only by this variable, read once; who has set it
    keeps it.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    with _log_level_lock:
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            yield
        finally:
            cv2.utils.logging.setLogLevel(level)
