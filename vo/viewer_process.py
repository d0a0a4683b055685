"""`vo run --view`: the viewer as a process of its own, whose end is of no consequence for the run."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vo.config import PublisherConfig
from vo.types import ConfigError

READY_TIMEOUT_S = 30.0
READY = b"1"


def check_viewable(config: PublisherConfig) -> None:
    """Raises ConfigError where a viewer on this machine could not listen to the run."""
    if config.endpoint == "off":
        raise ConfigError("--view shows what is published: leave out --publish off")
    if config.keys:
        raise ConfigError(
            "publisher.keys: --view has no key; start the viewer by itself: vo view --key F --server-key F"
        )


class ViewerProcess:
    """A viewer beside a run. It outlives the run, so that the result can be looked at, until its window is closed."""

    def __init__(self, endpoint: str, truth: Path | None, say: Callable[[str], None]) -> None:
        """Starts `vo view ENDPOINT`; `say` is told, once, when it ends before the run does."""
        self._say = say
        self._is_watched = True
        self._ready, write_end = os.pipe()
        arguments = ["view", endpoint, "--ready-fd", str(write_end)]
        arguments += [] if truth is None else ["--truth", str(truth)]
        # A session of its own: a Ctrl-C is meant for the run, and the window stays to show what came out.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vo", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)

    def __enter__(self) -> ViewerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, timeout_s: float = READY_TIMEOUT_S) -> bool:
        """Waits until it hears the publisher, so that it misses nothing; False where it has ended or takes too long."""
        readable, _, _ = select.select([self._ready], [], [], timeout_s)
        is_ready = bool(readable) and os.read(self._ready, 1) == READY
        if not is_ready and readable:
            self._process.wait()
        self.check()
        return is_ready

    def check(self) -> None:
        """Looks whether it is still there; to be called now and then."""
        if not self._is_watched or self._process.poll() is None:
            return
        self._is_watched = False
        self._say(f"{_reason(self._process.returncode)}; the run goes on without it")

    def leave(self) -> None:
        """Lets it go on by itself; safe to call twice."""
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
        if self._process.poll() is None:
            # Otherwise Popen would complain that somebody has forgotten about it.
            self._process.returncode = 0


def _reason(code: int) -> str:
    if code == 0:
        return "the viewer was closed"
    if code < 0:
        return f"the viewer was ended by {signal.Signals(-code).name}"
    return f"the viewer has ended with code {code}"
