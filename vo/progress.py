"""How a run shows that it goes on: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_PERIOD_S = 5.0

Advance = Callable[[str], None]


@contextmanager
def progress(num_frames: int | None, *, console: Console | None = None, is_quiet: bool = False) -> Iterator[Advance]:
    """Yields what to call after every frame, with what to say about it (status, rate); writes to standard error.

    num_frames  how many there will be, None where that is not known.
    """
    console = console or Console(stderr=True)
    if is_quiet:
        yield lambda _text: None
    elif console.is_terminal:
        with _bar(num_frames, console) as advance:
            yield advance
    else:
        yield _lines(num_frames, console)


@contextmanager
def _bar(num_frames: int | None, console: Console) -> Iterator[Advance]:
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=num_frames)
        yield lambda text: bar.update(task, advance=1, description=text)


def _lines(num_frames: int | None, console: Console) -> Advance:
    """Says the first frame at once (the networks are ready), then a line every few seconds."""
    count, next_s = 0, 0.0

    def advance(text: str) -> None:
        nonlocal count, next_s
        count += 1
        if time.monotonic() >= next_s:
            of_all = f" of {num_frames}" if num_frames is not None else ""
            console.print(f"frame {count}{of_all}: {text}", highlight=False, soft_wrap=True, markup=False)
            next_s = time.monotonic() + LINE_PERIOD_S

    return advance
