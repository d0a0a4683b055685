"""What the cameras of a Linux machine offer, asked of the kernel (Video4Linux2) with nothing but the standard library.

OpenCV opens cameras but cannot list them. The numbers below are those of the kernel's public interface
(include/uapi/linux/videodev2.h); `Kernel` stands between, so that tests need no camera.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_CAPTURE = 1  # type of a buffer, and bit of the capabilities: single-planar video capture
_HAS_DEVICE_CAPS = 0x8000_0000
_DISCRETE = 1
_MAX_LISTED = 256
COMPRESSED = ("MJPG", "JPEG", "H264", "HEVC")


def _request(direction: int, number: int, size: int) -> int:
    """The code of an ioctl of the video group: direction in bits 30-31 (1 write, 2 read), size from bit 16."""
    return direction << 30 | size << 16 | ord("V") << 8 | number


_CAPABILITY = struct.Struct("=16s32s32s3I12x")
_FORMAT = struct.Struct("=3I32sI16x")
_SIZE = struct.Struct("=9I8x")
_INTERVAL = struct.Struct("=11I8x")
QUERY_CAPABILITY = _request(2, 0, _CAPABILITY.size)
ENUMERATE_FORMATS = _request(3, 2, _FORMAT.size)
ENUMERATE_SIZES = _request(3, 74, _SIZE.size)
ENUMERATE_INTERVALS = _request(3, 75, _INTERVAL.size)


class Kernel(Protocol):
    """Asks the driver of one opened device; raises OSError where it does not know the request."""

    def ioctl(self, request: int, data: bytearray) -> None:
        """Fills `data` in."""
        ...

    def close(self) -> None: ...


class LinuxKernel:
    """The real one."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the device cannot be opened."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def ioctl(self, request: int, data: bytearray) -> None:
        import fcntl  # there is none on Windows

        fcntl.ioctl(self._descriptor, request, data, True)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way in which a camera delivers: pixel format as four letters, (width, height) px, frames per second."""

    pixel_format: str
    size: tuple[int, int]
    fps: float

    @property
    def is_compressed(self) -> bool:
        return self.pixel_format in COMPRESSED


@dataclass(frozen=True, slots=True)
class CameraDevice:
    """A camera: device path, name, where it is plugged in, and everything that it offers."""

    path: Path
    name: str
    bus: str
    modes: tuple[Mode, ...]

    def describe(self) -> str:
        """One line: the name, and of every pixel format the largest size with its rate."""
        formats = dict.fromkeys(mode.pixel_format for mode in self.modes)
        best = [max((m for m in self.modes if m.pixel_format == name), key=_extent) for name in formats]
        shown = [f"{mode.pixel_format} {mode.size[0]}x{mode.size[1]} at {mode.fps:g} fps" for mode in best]
        return f"{self.path.name}: {self.name} ({', '.join(shown) or 'says no format'})"


def find_cameras(
    directory: Path = Path("/dev"), open_kernel: Callable[[Path], Kernel] = LinuxKernel
) -> tuple[CameraDevice, ...]:
    """Every device that captures video and may be opened, by number. Others, as those for metadata, are left out."""
    paths = sorted(directory.glob("video*"), key=lambda path: (len(path.name), path.name))
    found = [camera for path in paths if (camera := read_camera_device(path, open_kernel)) is not None]
    return tuple(found)


def read_camera_device(path: Path, open_kernel: Callable[[Path], Kernel] = LinuxKernel) -> CameraDevice | None:
    """What one device offers; None where it is no camera, or cannot be opened."""
    try:
        kernel = open_kernel(path)
    except OSError:
        return None
    try:
        data = bytearray(_CAPABILITY.size)
        kernel.ioctl(QUERY_CAPABILITY, data)
        _, card, bus, _, capabilities, device_capabilities = _CAPABILITY.unpack(data)
        # A driver of several devices says in the second number what this one can.
        if not (device_capabilities if capabilities & _HAS_DEVICE_CAPS else capabilities) & _CAPTURE:
            return None
        return CameraDevice(path, _text(card), _text(bus), tuple(_modes(kernel)))
    except OSError:
        return None
    finally:
        kernel.close()


def choose_mode(
    modes: Sequence[Mode], size: tuple[int, int], fps: float | None, preference: str = "auto"
) -> Mode | None:
    """The mode to ask for; None where nothing of that size is offered.

    The one with the rate nearest to `fps`, or with the highest. Where several have it, raw pixels, which nothing has
    compressed. preference: "mjpeg" or "raw" asks for one of them where the size comes in it at all.
    """
    fitting = [mode for mode in modes if mode.size == size and mode.pixel_format not in ("H264", "HEVC")]
    wanted = [mode for mode in fitting if mode.is_compressed == (preference == "mjpeg")]
    if preference != "auto" and wanted:
        fitting = wanted
    if not fitting:
        return None
    return min(fitting, key=lambda mode: (-mode.fps if fps is None else abs(mode.fps - fps), mode.is_compressed))


def _extent(mode: Mode) -> tuple[int, float]:
    return mode.size[0] * mode.size[1], mode.fps


def _modes(kernel: Kernel) -> Iterator[Mode]:
    for fields in _enumerate(kernel, ENUMERATE_FORMATS, _FORMAT, lambda index: (index, _CAPTURE, 0, b"", 0)):
        code = fields[4]
        pixel_format = _text(code.to_bytes(4, "little"))
        for size in _sizes(kernel, code):
            for fps in _rates(kernel, code, size):
                yield Mode(pixel_format, size, fps)


def _sizes(kernel: Kernel, code: int) -> Iterator[tuple[int, int]]:
    for fields in _enumerate(kernel, ENUMERATE_SIZES, _SIZE, lambda index: (index, code, 0, *[0] * 6)):
        if fields[2] == _DISCRETE:
            yield fields[3], fields[4]
        else:
            # A range: its ends say enough; there is only one such answer.
            yield from {(fields[3], fields[6]), (fields[4], fields[7])}
            return


def _rates(kernel: Kernel, code: int, size: tuple[int, int]) -> Iterator[float]:
    for fields in _enumerate(kernel, ENUMERATE_INTERVALS, _INTERVAL, lambda index: (index, code, *size, *[0] * 7)):
        seconds, parts = fields[5], fields[6]  # the discrete interval, or the shortest of a range
        if seconds:
            yield parts / seconds
        if fields[4] != _DISCRETE:
            return


def _enumerate(
    kernel: Kernel, request: int, layout: struct.Struct, question: Callable[[int], tuple[object, ...]]
) -> Iterator[tuple[int, ...]]:
    """Answers 0, 1, 2, ... until the driver has no more; a broken one that never ends is cut off."""
    for index in range(_MAX_LISTED):
        data = bytearray(layout.pack(*question(index)))
        try:
            kernel.ioctl(request, data)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
            return
        yield layout.unpack(data)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("ascii", "replace").strip()
