"""Being asked to end: Ctrl-C, SIGTERM, a terminal that closes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C, SIGTERM or SIGHUP sets; the second one raises KeyboardInterrupt.

    Who started us with SIGHUP ignored (nohup) wants us to go on. Only in the main thread; the handlers that were there
    before are put back.
    """
    stop = threading.Event()
    terminals = terminal_descriptors()  # one that has closed does not say any more that it was one

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave(terminals)
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def terminal_descriptors() -> tuple[int, ...]:
    """Where we print to, as far as it is a terminal."""
    streams = (stream for stream in (sys.__stdout__, sys.__stderr__) if stream is not None and not stream.closed)
    return tuple(stream.fileno() for stream in streams if stream.isatty())


def leave(terminals: tuple[int, ...]) -> None:
    """Sends what is printed there from now on nowhere: the terminal has gone, and writing would be an error."""
    for descriptor in terminals:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
