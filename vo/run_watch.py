"""Watches a run from outside its stages: whether frames come at all, and who wants to know."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from vo.service import ServiceManager

_PERIOD_S = 0.2


class RunWatch:
    """A thread that looks at the run five times a second. A context manager.

    num_frames   how many frames the source has delivered.
    is_away      whether the source waits for its camera: the run is sound then, whatever --watchdog-s says of it.
    limit_s      without a new frame for so long, `on_silence` is called, once; None: never.
    on_look      is told every time whether the camera is away.
    """

    def __init__(
        self,
        num_frames: Callable[[], int],
        *,
        is_away: Callable[[], bool] = lambda: False,
        limit_s: float | None = None,
        on_silence: Callable[[], None] = lambda: None,
        on_look: Callable[[bool], None] = lambda is_away: None,
        manager: ServiceManager | None = None,
    ) -> None:
        self._num_frames = num_frames
        self._is_away = is_away
        self._limit_s = limit_s
        self._on_silence = on_silence
        self._on_look = on_look
        self._manager = manager or ServiceManager({})
        self._ended = threading.Event()
        self.has_fired = False
        self._thread = threading.Thread(target=self._watch, name="run watch", daemon=True)

    def _watch(self) -> None:
        last_num, last_s = self._num_frames(), time.monotonic()
        while not self._ended.wait(_PERIOD_S):
            num, now_s, is_away = self._num_frames(), time.monotonic(), self._is_away()
            self._on_look(is_away)
            if num != last_num or is_away:
                self._manager.alive("waiting for the camera" if is_away else f"{num} frames")
            if num != last_num:
                last_num, last_s = num, now_s
            elif self._limit_s is not None and now_s - last_s > self._limit_s and not self.has_fired:
                self.has_fired = True
                self._on_silence()

    def __enter__(self) -> RunWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._manager.stopping()
