"""Images for the `image` topic: smaller, compressed, and not all of them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.message_types import CompressedImage
from vo.types import Frame

# Half a frame of jitter in the times must not halve the rate.
RATE_TOLERANCE = 0.9


class ImagePreview:
    """Compresses frames at a limited rate of the sensor's clock, so that the same recording gives the same images.

    image_hz     images a second at most; 0: none.
    max_size_px  the longest side; larger images are reduced.
    quality      of the JPEG, 1 to 100.
    """

    def __init__(self, image_hz: float, max_size_px: int, quality: int) -> None:
        self._period_ns = int(1e9 / image_hz * RATE_TOLERANCE) if image_hz > 0 else None
        self._max_size_px, self._quality = max_size_px, quality
        self._last_ns: int | None = None

    def take(self, frame: Frame) -> CompressedImage | None:
        """The image of `frame`, or None where it is not its turn."""
        if self._period_ns is None:
            return None
        if self._last_ns is not None and frame.timestamp_ns - self._last_ns < self._period_ns:
            return None
        self._last_ns = frame.timestamp_ns
        return compressed_image(frame, self._max_size_px, self._quality)


def compressed_image(frame: Frame, max_size_px: int, quality: int) -> CompressedImage:
    """The image of a frame as a JPEG whose longest side is at most `max_size_px`."""
    image = _reduced(frame.image, max_size_px)
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR).astype(np.uint8, copy=False)
    is_done, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))
    if not is_done:
        raise RuntimeError(f"frame {frame.index}: OpenCV cannot write a JPEG of {image.shape}")
    height, width = image.shape[:2]
    return CompressedImage(frame.index, frame.timestamp_ns, width, height, data.reshape(-1).astype(np.uint8))


def _reduced(image: NDArray[np.uint8], max_size_px: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale = max_size_px / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
