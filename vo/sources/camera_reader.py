"""Reads a live capture: when each frame was taken, what cannot be used, and what to do when nothing comes any more."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vo.sources.base import LiveReport, SkippedFrame
from vo.sources.capture import Capture
from vo.sources.sequence import check_size
from vo.types import Camera, SourceError

_RETRY_S = 0.02
# A capture whose grabs fail for so long has ended: a server that closed, a plug that was pulled.
_FAILING_S = 0.5
_FIRST_BACK_OFF_S, _MAX_BACK_OFF_S = 0.1, 5.0
# A driver's time is believed where it lies this far before the moment of the grab: a frame waits at most for the queue
# of the driver, and none comes from the future, give or take the rounding to a microsecond.
_MAX_DRIVER_AGE_NS, _MAX_DRIVER_LEAD_NS = 2_000_000_000, 2_000_000
_RATE_FRAMES = 300


@dataclass(frozen=True, slots=True, eq=False)
class Grabbed:
    """A frame of a camera: its number, its time on the monotonic clock, and whether frames before it are missing
    because the camera was away.
    """

    index: int
    timestamp_ns: int
    image: NDArray[np.uint8]
    follows_gap: bool = False

    def after(self, unseen: Grabbed) -> Grabbed:
        """This frame for somebody who has not seen the one before it."""
        return replace(self, follows_gap=self.follows_gap or unseen.follows_gap)


class CameraReader:
    """Frames of a capture, one after the other, in the thread of whoever asks; `stop` may be called from another.

    The time of a frame is the driver's where that is on the monotonic clock (V4L2 stamps its buffers when the exposure
    ends), otherwise the moment at which the driver handed it over.
    """

    def __init__(
        self,
        name: str,
        capture: Capture,
        camera: Camera,
        *,
        reopen: Callable[[], Capture | None] | None = None,
        silence_s: float = 5.0,
        patience_s: float | None = 0.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        reopen      opens the camera again, None where it is not there; without it a silent camera is an error.
        silence_s   without a frame for so long, the camera is taken for gone.
        patience_s  how long a camera that has gone is waited for; None: for ever.
        """
        self.name = name
        self._capture: Capture | None = capture
        self._camera = camera
        self._reopen = reopen
        self._silence_ns = int(silence_s * 1e9)
        self._patience_s = patience_s if reopen is not None else 0.0
        self._clock_ns = clock_ns
        self._say = say
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._format = _format(capture)
        self._uses_driver_time: bool | None = None
        self._times_ns: deque[int] = deque(maxlen=_RATE_FRAMES)
        self._num_grabbed = self._num_gaps = self._away_ns = 0
        self._last_ns = -1
        self.is_away = False

    @property
    def negotiated(self) -> str:
        """What the camera agreed to deliver."""
        return self._format

    @property
    def clock(self) -> str:
        """Where the times come from, in words."""
        if self._uses_driver_time is None:
            return "no frame yet"
        return "driver, monotonic clock" if self._uses_driver_time else "measured when the frame was handed over"

    def report(self, num_dropped: int) -> LiveReport:
        """What came so far, of which `num_dropped` frames were given up for newer ones."""
        times_ns = tuple(self._times_ns)
        span_s = (times_ns[-1] - times_ns[0]) * 1e-9 if len(times_ns) > 1 else 0.0
        return LiveReport(
            negotiated=self._format,
            clock=self.clock,
            measured_fps=(len(times_ns) - 1) / span_s if span_s > 0 else 0.0,
            frames_grabbed=self._num_grabbed,
            frames_dropped=num_dropped,
            reconnects=self._num_gaps,
            away_s=self._away_ns * 1e-9,
        )

    def frames(self) -> Iterator[Grabbed | SkippedFrame]:
        """Every frame as it comes, and what could not be used; ends with `stop`. Raises SourceError.

        An image of another size than the camera's cannot be used; where nothing else comes, that is an error.
        """
        index, follows_gap = 0, False
        heard_ns = good_ns = self._clock_ns()
        while not self._is_stopped.is_set():
            grabbed = self._grab()
            if grabbed is None:
                now_ns = self._clock_ns()
                if not self._is_stopped.is_set() and now_ns - heard_ns > self._tolerated_ns():
                    self._wait_for_camera(now_ns - heard_ns)
                    follows_gap = True
                    heard_ns = good_ns = self._clock_ns()
                elif not self._is_stopped.is_set():
                    self._is_stopped.wait(_RETRY_S)
                continue
            heard_ns, timestamp_ns, image = grabbed
            reason = self._flaw(timestamp_ns, image)
            if reason is None and image is not None:
                self._last_ns, good_ns = timestamp_ns, heard_ns
                self._times_ns.append(timestamp_ns)
                yield Grabbed(index, timestamp_ns, image, follows_gap)
                follows_gap = False
            else:
                if image is not None and heard_ns - good_ns > self._silence_ns:
                    check_size(image.shape, self._camera, f"{self.name}: frame {index}")
                yield SkippedFrame(index, f"frame {index}", reason or "cannot be decoded")
            index += 1

    def stop(self, wait_s: float) -> None:
        """Ends `frames` and releases the capture; where a read hangs in the driver, the reader does so later."""
        self._is_stopped.set()
        if self._lock.acquire(timeout=wait_s):
            try:
                self._release()
            finally:
                self._lock.release()

    def _tolerated_ns(self) -> int:
        """How long grabs may fail before the camera is taken for gone."""
        return min(self._silence_ns, int(_FAILING_S * 1e9)) if self._reopen is not None else self._silence_ns

    def _grab(self) -> tuple[int, int, NDArray[np.uint8] | None] | None:
        """(when it came, when it was taken, image), or None. A capture must not be released while it is being read."""
        with self._lock:
            if self._is_stopped.is_set() or self._capture is None:
                return None
            try:
                if not self._capture.grab():
                    return None
                now_ns = self._clock_ns()
                self._num_grabbed += 1
                return now_ns, self._taken_ns(now_ns, self._capture.position_ms()), self._capture.retrieve()
            finally:
                if self._is_stopped.is_set():
                    self._release()

    def _taken_ns(self, now_ns: int, driver_ms: float) -> int:
        """The driver's time where it can be believed; once it could not be, never again in this run."""
        driver_ns = round(driver_ms * 1e6) if 0 < driver_ms < 1e15 else 0
        is_sound = -_MAX_DRIVER_LEAD_NS <= now_ns - driver_ns <= _MAX_DRIVER_AGE_NS and driver_ns > 0
        if self._uses_driver_time is None:
            self._uses_driver_time = is_sound
            self._say(f"{self.name}: times of frames: {self.clock}")
        elif self._uses_driver_time and not is_sound:
            self._uses_driver_time = False
            self._say(f"{self.name}: warning: the driver's clock has jumped; times of frames: {self.clock}")
        return min(driver_ns, now_ns) if self._uses_driver_time else now_ns

    def _flaw(self, timestamp_ns: int, image: NDArray[np.uint8] | None) -> str | None:
        """Why a frame cannot be used, None where it can."""
        if image is None:
            return "cannot be decoded"
        if timestamp_ns <= self._last_ns:
            return "the clock did not advance"
        height, width = image.shape[:2]
        if (width, height) != (self._camera.width, self._camera.height):
            return f"{width}x{height} px instead of {self._camera.width}x{self._camera.height}"
        return None

    def _wait_for_camera(self, silent_ns: int) -> None:
        """Opens the camera again, more and more rarely. Raises SourceError where it has been waited for long enough."""
        left_ns = self._clock_ns() - silent_ns
        with self._lock:
            self._release()
        if self._patience_s == 0:
            raise SourceError(f"{self.name}: no frame for {silent_ns * 1e-9:.1f} s; is the camera still plugged in?")
        self._say(f"{self.name}: the camera has gone; waiting for it")
        self.is_away, back_off_s = True, _FIRST_BACK_OFF_S
        while not self._is_stopped.is_set():
            away_ns = self._clock_ns() - left_ns
            if self._patience_s is not None and away_ns * 1e-9 > self._patience_s:
                raise SourceError(f"{self.name}: the camera has not come back within {self._patience_s:g} s")
            if self._try_again():
                self._num_gaps += 1
                self._away_ns += self._clock_ns() - left_ns
                self._say(f"{self.name}: the camera is back after {(self._clock_ns() - left_ns) * 1e-9:.1f} s")
                break
            self._is_stopped.wait(back_off_s)
            back_off_s = min(2 * back_off_s, _MAX_BACK_OFF_S)
        self.is_away = False

    def _try_again(self) -> bool:
        """One attempt to open the camera; only one that delivers is back."""
        capture = self._reopen() if self._reopen is not None else None
        if capture is None:
            return False
        with self._lock:
            if self._is_stopped.is_set() or not capture.grab():
                capture.release()
                return False
            self._capture, self._format = capture, _format(capture)
        return True

    def _release(self) -> None:
        if self._capture is not None:
            self._capture.release()


def _format(capture: Capture) -> str:
    width, height = capture.size
    rate = f"{capture.fps:.4g} fps" if capture.fps > 0 else "a rate it does not say"
    return f"{width}x{height} px, {capture.pixel_format or 'unknown pixels'}, {rate}"
