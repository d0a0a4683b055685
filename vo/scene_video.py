"""Pictures and videos of the scene on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from vo.output import OutputError
from vo.scene_panel import Picture

CODEC = "mp4v"
MAX_REPEATS = 3600
ROUNDING = 1e-6


def write_picture(path: Path, picture: Picture) -> Path:
    """Writes an RGB picture in the format that the name ends in. Raises OutputError where that cannot be."""
    try:
        is_written = cv2.imwrite(str(path), np.ascontiguousarray(picture[..., ::-1]))
    except cv2.error as error:
        raise OutputError(f"{path}: no format for a picture; end the name in .png or .jpg") from error
    if not is_written:
        raise OutputError(f"{path}: cannot be written")
    return path


class VideoWriter:
    """A video whose time is that of the clock: a picture stays until the next one, however long that took to draw.

    MPEG-4 (`mp4v`), because OpenCV's own build writes it everywhere; H.264 it writes only where the system can.
    """

    def __init__(self, path: Path, fps: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds. The file is made with the first picture, which tells its size."""
        if path.suffix.lower() != ".mp4":
            raise OutputError(f"{path}: no format for a video; end the name in .mp4")
        self._path, self._fps, self._clock = path, fps, clock
        self._writer: cv2.VideoWriter | None = None
        self._start_s = 0.0
        self._last: Picture | None = None
        self.num_pictures = 0

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_due(self) -> bool:
        """Whether it is time for another picture."""
        return self._last is None or (self._clock() - self._start_s) * self._fps >= self.num_pictures - ROUNDING

    def write(self, picture: Picture) -> None:
        """Adds an RGB picture, (H, W, 3), as late in the video as it comes. Raises OutputError."""
        if self._writer is None:
            self._writer = self._open(picture.shape[1], picture.shape[0])
            self._start_s = self._clock()
        elif self._last is not None:
            num_due = round((self._clock() - self._start_s) * self._fps) + 1
            for _ in range(min(num_due - self.num_pictures - 1, MAX_REPEATS)):
                self._add(self._last)
        self._last = np.ascontiguousarray(picture[..., ::-1])
        self._add(self._last)

    def close(self) -> None:
        """Completes the file; safe to call twice."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None

    def _add(self, bgr: Picture) -> None:
        if self._writer is not None:
            self._writer.write(bgr)
            self.num_pictures += 1

    def _open(self, width: int, height: int) -> cv2.VideoWriter:
        fourcc = cv2.VideoWriter.fourcc(*CODEC)
        writer = cv2.VideoWriter(str(self._path), fourcc, self._fps, (width, height))
        if not writer.isOpened():
            raise OutputError(f"{self._path}: cannot be written as a video of {width}x{height} in {CODEC}")
        return writer
