"""A display without a screen: Xvfb, whose picture lies in a file, and keys pressed on it."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest


class VirtualDisplay:
    """A display and what is on it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder

    def picture(self) -> np.ndarray:
        """(H, W, 3) RGB of the whole screen. The file is in the format of xwd (X11/XWDFile.h)."""
        data = (self._folder / "Xvfb_screen0").read_bytes()
        header = struct.unpack(">25I", data[:100])
        width, height, bytes_per_line, num_colors = header[4], header[5], header[12], header[19]
        rows = np.frombuffer(data, np.uint8, bytes_per_line * height, header[0] + 12 * num_colors)
        return rows.reshape(height, -1, 4)[:, :width, 2::-1].copy()

    def press(self, letter: str) -> None:
        """Presses a key and lets it go, through the XTEST extension."""
        try:
            x11, xtst = ctypes.CDLL("libX11.so.6"), ctypes.CDLL("libXtst.so.6")
        except OSError as error:
            pytest.skip(f"needs libXtst to press keys: {error}")
        x11.XOpenDisplay.restype = ctypes.c_void_p
        display = ctypes.c_void_p(x11.XOpenDisplay(self.name.encode()))
        code = x11.XKeysymToKeycode(display, ctypes.c_ulong(ord(letter)))
        for is_down in (1, 0):
            xtst.XTestFakeKeyEvent(display, code, is_down, ctypes.c_ulong(0))
            x11.XFlush(display)
            time.sleep(0.1)
        x11.XCloseDisplay(display)


@contextmanager
def virtual_display(width: int, height: int) -> Iterator[VirtualDisplay]:
    """Starts Xvfb on a free display; skips the test where it is not installed."""
    if shutil.which("Xvfb") is None:
        pytest.skip("needs Xvfb (Debian: xvfb)")
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            ["Xvfb", "-displayfd", str(write_end), "-screen", "0", f"{width}x{height}x24", "-fbdir", folder],
            pass_fds=(write_end,),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(write_end)
        try:
            with os.fdopen(read_end) as numbers:
                number = numbers.readline().strip()
            assert number, "Xvfb did not start"
            yield VirtualDisplay(f":{number}", Path(folder))
        finally:
            process.terminate()
            process.wait(10)
