"""Image files as arrays: RGB or gray, 8 bit, the way the sensor saw them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class UnreadableImageError(Exception):
    """One image that cannot be used; the message is the reason, without the file's name."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) RGB or (H, W) gray uint8 of an image file.

    16 bit become 8 bit over the full range, an alpha channel is dropped, an EXIF orientation is not applied:
    intrinsics speak of the sensor's pixels. Raises UnreadableImageError.
    """
    stored = _decode(path)
    if stored.dtype not in (np.uint8, np.uint16):
        raise UnreadableImageError(f"holds {stored.dtype} pixels; expected 8 or 16 bit")
    image = ((stored.astype(np.uint32) + 128) // 257 if stored.dtype == np.uint16 else stored).astype(np.uint8)
    if image.ndim == 2:
        return np.ascontiguousarray(image)
    conversion = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}.get(image.shape[2])
    if conversion is None:
        raise UnreadableImageError(f"has {image.shape[2]} channels; expected 1, 3 or 4")
    return np.asarray(cv2.cvtColor(image, conversion), np.uint8)


def read_depth(path: Path, depth_scale: float) -> NDArray[np.float32]:
    """(H, W) float32 m of a 16-bit depth image of `depth_scale` units per metre; 0 where there is no reading.

    Raises UnreadableImageError.
    """
    image = _decode(path)
    if image.dtype != np.uint16 or image.ndim != 2:
        raise UnreadableImageError(f"expected one 16-bit channel, got shape {image.shape} {image.dtype}")
    return image.astype(np.float32) / np.float32(depth_scale)


def _decode(path: Path) -> NDArray[Any]:
    """Pixels as stored, decoded from memory: OpenCV fills the rest of a truncated file on disk with gray."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UnreadableImageError("no such file") from None
    except OSError as error:
        raise UnreadableImageError(f"{error.strerror}") from None
    if not content:
        raise UnreadableImageError("the file is empty")
    if content.startswith(_PNG_SIGNATURE):
        _check_png(content)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UnreadableImageError(f"cannot be decoded: {error.err}") from None
    if image is None:
        raise UnreadableImageError("cannot be decoded: damaged, cut short, or not an image")
    return image


def _check_png(content: bytes) -> None:
    """Raise UnreadableImageError unless every chunk is whole (PNG specification, section 5).

    libpng would notice too, but it writes to the process's standard error, which is not ours to silence.
    """
    offset, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        if offset + 12 > len(content):
            raise UnreadableImageError("cannot be decoded: the PNG file is cut short")
        length, kind = struct.unpack_from(">I4s", content, offset)
        end = offset + 8 + length
        if end + 4 > len(content):
            raise UnreadableImageError("cannot be decoded: the PNG file is cut short")
        if zlib.crc32(memoryview(content)[offset + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise UnreadableImageError("cannot be decoded: the PNG file is damaged (checksum)")
        offset = end + 4
