"""The little that videos and cameras need of OpenCV's VideoCapture, so that tests can stand in for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

_log_level_lock = threading.Lock()


class Capture(Protocol):
    """A device or file that delivers images one after the other.

    size        (width, height) px.
    fps         frames per second as announced, 0 where nothing is.
    num_frames  as announced, 0 where nothing is.
    """

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def fps(self) -> float: ...
    @property
    def num_frames(self) -> int: ...

    def grab(self) -> bool:
        """Takes the next image; False at the end or where none came in time."""
        ...

    def position_ms(self) -> float:
        """Time of the grabbed image since the start of the file, as the container says."""
        ...

    def retrieve(self) -> NDArray[np.uint8] | None:
        """The grabbed image, (H, W, 3) RGB or (H, W) gray; None where it cannot be decoded."""
        ...

    def release(self) -> None: ...


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

    def grab(self) -> bool:
        return self._capture.grab()

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


def open_device(device: int | str, size: tuple[int, int] | None, fps: float | None) -> OpenCvCapture | None:
    """A camera by index or device path; None where it cannot be opened.

    `size` (px) and `fps` are asked for; what the driver grants is in the capture's own `size` and `fps`.
    """
    backend = cv2.CAP_V4L2 if sys.platform.startswith("linux") else cv2.CAP_ANY
    with quiet_opencv():
        capture = cv2.VideoCapture(device, backend)
    if not capture.isOpened():
        return None
    if size is not None:
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, size[0])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, size[1])
    if fps is not None:
        capture.set(cv2.CAP_PROP_FPS, fps)
    # Frames waiting in the driver are stale: without a bound the newest is several periods away.
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return OpenCvCapture(capture)


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
