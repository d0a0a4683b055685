"""A stand-in for OpenCV's VideoCapture, and a camera server on this machine, for the tests of live sources."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vo.sources.capture import Control


def image(level: int, width: int = 64) -> NDArray[np.uint8]:
    return np.full((48, width, 3), level, np.uint8)


class FakeCapture:
    """Delivers what a test lays out: images, None for one that cannot be decoded, False for a grab that fails."""

    def __init__(
        self,
        images: Sequence[NDArray[np.uint8] | bool | None],
        positions_ms: Sequence[float] | None = None,
        fps: float = 0.0,
        num_frames: int = 0,
    ) -> None:
        self.images = list(images)
        self.positions_ms = positions_ms or [0.0] * len(self.images)
        self.size, self.fps, self.num_frames = (64, 48), fps, num_frames
        self.position, self.num_releases = -1, 0
        self.pixel_format = "MJPG"
        # What the device has, and which of it changes by itself.
        self.controls: dict[Control, float] = {}
        self.automatic: dict[Control, bool] = {}

    def grab(self) -> bool:
        assert self.num_releases == 0
        self.position += 1
        return self.position < len(self.images) and self.images[self.position] is not False

    def position_ms(self) -> float:
        return self.positions_ms[self.position]

    def retrieve(self) -> NDArray[np.uint8] | None:
        image = self.images[self.position]
        return image if isinstance(image, np.ndarray) else None

    def release(self) -> None:
        self.num_releases += 1

    def fix(self, control: Control, value: float) -> float | None:
        if control not in self.controls:
            return None
        self.automatic[control] = False
        self.controls[control] = min(value, 255.0)
        return self.controls[control]

    def is_automatic(self, control: Control) -> bool | None:
        return self.automatic.get(control)


class EndlessCapture(FakeCapture):
    """A camera at 200 Hz; `is_silent` makes every grab fail, `hang` is waited for in the driver."""

    def __init__(self, *, is_silent: bool = False) -> None:
        super().__init__([])
        self.is_silent = is_silent
        self.hang: threading.Event | None = None
        self.is_reading = False

    def grab(self) -> bool:
        assert self.num_releases == 0
        self.is_reading = True
        if self.hang is not None:
            self.hang.wait(10)
        time.sleep(0.005)
        self.is_reading = False
        return not self.is_silent

    def position_ms(self) -> float:
        return 0.0

    def retrieve(self) -> NDArray[np.uint8] | None:
        return image(1)

    def release(self) -> None:
        assert not self.is_reading
        super().release()
