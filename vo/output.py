"""Files that a run leaves behind: written whole or not at all, and every fault is one line with the path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vo.types import VoError


class OutputError(VoError):
    """A result that cannot be written: names the path and the remedy."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write `path` into an OutputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(f"{path}: cannot write: {reason}; free space or choose another directory") from error


def prepare_directory(directory: Path) -> None:
    """Makes the directory and those above it; raises OutputError where that, or a file in it, is not possible."""
    probe = directory / f".probe.{os.getpid()}"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` in one step: a reader, or a crash, meets the old content or the new one and nothing between."""
    data = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with writing(path):
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):  # the directory may be what went away
                unfinished.unlink(missing_ok=True)
            raise
