"""Live cameras: frames come at the sensor's pace and carry the time at which they were taken from the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vo.sources.base import SkippedFrame
from vo.sources.cameras import CameraChoice, read_camera
from vo.sources.capture import Capture, open_device
from vo.sources.images import check_fps
from vo.sources.sequence import check_size
from vo.types import Camera, Frame, SourceError

_MAX_SILENCE_S = 5.0
_RETRY_S = 0.02
_CLOSE_WAIT_S = 2.0


class LiveSource:
    """A source over a live capture; see `vo.sources.base.Source` for the attributes.

    Times are of the monotonic clock, read as soon as the driver has handed over the image. `frames()` ends when
    `close()` is called, from whatever thread, and raises SourceError when nothing has come for five seconds.
    """

    is_live = True
    stereo = None
    num_frames = None
    ground_truth = None

    def __init__(
        self, name: str, capture: Capture, camera: Camera, *, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.name = name
        self.camera = camera
        self._capture = capture
        self._clock_ns = clock_ns
        self._skipped: list[SkippedFrame] = []
        self._is_closed = threading.Event()
        self._lock = threading.Lock()

    @property
    def skipped(self) -> Sequence[SkippedFrame]:
        return tuple(self._skipped)

    def frames(self) -> Iterator[Frame]:
        index, last_ns = 0, -1
        last_grab_ns = self._clock_ns()
        while not self._is_closed.is_set():
            grabbed = self._grab()
            if grabbed is None:
                self._check_silence(last_grab_ns)
                continue
            last_grab_ns, image = grabbed
            reason = "cannot be decoded" if image is None else "the clock did not advance"
            if image is None or last_grab_ns <= last_ns:
                self._skipped.append(SkippedFrame(index, f"frame {index}", reason))
            else:
                check_size(image.shape, self.camera, f"{self.name}: frame {index}")
                last_ns = last_grab_ns
                yield Frame(index, last_ns, image, self.camera)
            index += 1

    def close(self) -> None:
        """Ends `frames()` and releases the device; where a read hangs in the driver, the reader releases it later."""
        self._is_closed.set()
        if self._lock.acquire(timeout=_CLOSE_WAIT_S):
            try:
                self._capture.release()
            finally:
                self._lock.release()

    def _grab(self) -> tuple[int, NDArray[np.uint8] | None] | None:
        """(time in ns, image) of the next frame, or None. A capture must not be released while it is being read."""
        with self._lock:
            if self._is_closed.is_set():
                return None
            try:
                if not self._capture.grab():
                    return None
                return self._clock_ns(), self._capture.retrieve()
            finally:
                if self._is_closed.is_set():
                    self._capture.release()

    def _check_silence(self, last_grab_ns: int) -> None:
        if self._is_closed.is_set():
            return
        silence_s = (self._clock_ns() - last_grab_ns) * 1e-9
        if silence_s > _MAX_SILENCE_S:
            raise SourceError(f"{self.name}: no frame for {silence_s:.1f} s; is the camera still plugged in?")
        self._is_closed.wait(_RETRY_S)


def open_webcam(name: str, device: str, choice: CameraChoice, fps: float | None = None) -> LiveSource:
    """The camera with this index (`0`) or device path (`/dev/video0`).

    It is asked for the size of the camera file, if one is given, and for `fps`. Raises SourceError where it cannot be
    opened, or delivers another size than the camera file is for.
    """
    if not device.isdecimal() and not device.startswith("/"):
        raise SourceError(f"{name}: expected webcam:0 or webcam:/dev/video0; {_cameras_found()}")
    wanted = read_camera(choice.camera_file).camera if choice.camera_file is not None else None
    capture = open_device(
        int(device) if device.isdecimal() else device,
        None if wanted is None else (wanted.width, wanted.height),
        None if fps is None else check_fps(fps),
    )
    if capture is None:
        raise SourceError(
            f"{name}: the camera cannot be opened; {_cameras_found()}; is it plugged in, free, and yours to read "
            "(group `video`)?"
        )
    try:
        return LiveSource(name, capture, negotiated_camera(name, capture.size, choice))
    except SourceError:
        capture.release()
        raise


def negotiated_camera(name: str, size: tuple[int, int], choice: CameraChoice) -> Camera:
    """The intrinsics for a device that delivers `size` (px); raises SourceError where they are for another size."""
    camera = choice.require(*size, name).camera
    if (camera.width, camera.height) != size:
        raise SourceError(
            f"{name}: delivers {size[0]}x{size[1]} px, but {choice.camera_file} is for {camera.width}x{camera.height} "
            "px, which the camera does not offer; calibrate at a size that it offers"
        )
    return camera


def _cameras_found() -> str:
    devices = sorted(str(path) for path in Path("/dev").glob("video*"))
    return f"found {', '.join(devices)}" if devices else "no /dev/video* is there"
