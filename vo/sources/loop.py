"""A source again and again, as one that never ends: for demonstrations and for tests of endurance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vo.sources.base import SkipLog, SkippedFrame, Source
from vo.types import Camera, Frame, StereoRig

_FIRST_PERIOD_NS = 33_333_333


class LoopSource:
    """Laps of another source, opened anew for each; see `vo.sources.base.Source` for the attributes.

    Times and indices go on from lap to lap: the first frame of one comes one period after the last frame of the lap
    before. The camera jumps there, and what is written of the truth ends with the first lap, so none is offered.
    """

    is_live = False
    num_frames = None
    ground_truth: Path | None = None

    def __init__(self, name: str, open_lap: Callable[[], Source]) -> None:
        self.name = name
        self._open_lap = open_lap
        self._lap = open_lap()
        self.camera: Camera = self._lap.camera
        self.stereo: StereoRig | None = self._lap.stereo
        self.is_endless = self._lap.is_live
        self.num_laps = 0
        self._skip_log = SkipLog()
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def skipped(self) -> Sequence[SkippedFrame]:
        return self._skip_log.entries()

    def frames(self) -> Iterator[Frame]:
        """Yields frames until `close` is called; raises what the laps raise."""
        shift_ns, shift, period_ns = 0, 0, _FIRST_PERIOD_NS
        while True:
            last_ns, num_frames = None, 0
            for frame in self._lap.frames():
                if last_ns is not None:
                    period_ns = frame.timestamp_ns - last_ns
                elif shift:
                    # Where the clock of the lap does not begin with zero, its first frame is still next.
                    shift_ns -= frame.timestamp_ns
                last_ns, num_frames = frame.timestamp_ns, frame.index + 1
                yield replace(frame, index=frame.index + shift, timestamp_ns=frame.timestamp_ns + shift_ns)
            for skipped in self._lap.skipped:
                self._skip_log.add(skipped)
            if last_ns is None or not self._begin_lap():
                return
            shift, shift_ns = shift + num_frames, last_ns + shift_ns + period_ns
            self.num_laps += 1

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._lap.close()

    def _begin_lap(self) -> bool:
        """Opens the next lap; False once the source is closed."""
        with self._lock:
            if self._is_closed:
                return False
            self._lap.close()
            self._lap = self._open_lap()
            return True
