"""Whether an image stands still, from the motion of its keypoints; whether it is the same image again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vo.types import Camera, FloatArray

# Regions of the image, from side to side and from top to bottom, and keypoints that one needs to be heard.
_COLUMNS, _ROWS, _MIN_KEYPOINTS = 4, 3, 8
# The same image once more than this is a camera that hangs.
_MAX_REPEATS = 1


def is_still(
    keypoints0: NDArray[np.float32], keypoints1: NDArray[np.float32], camera: Camera, stationary_px: float
) -> bool:
    """Whether keypoints (N, 2) px of one image are where they are in another, but for noise.

    Three quarters of the image decide: something that moves before a standing camera may fill the rest.
    """
    shifts = regional_shifts(keypoints0, keypoints1, camera)
    return len(shifts) > 0 and quantile(shifts, 0.75) < stationary_px


def regional_shifts(keypoints0: NDArray[np.float32], keypoints1: NDArray[np.float32], camera: Camera) -> FloatArray:
    """Length in px of the median motion in every region of a grid that holds enough keypoints.

    The noise of single keypoints, a whole pixel with some detectors, cancels in the median; motion common to a region
    does not, and forward motion, which cancels over the whole image, shows towards its borders.
    """
    columns = np.clip(keypoints0[:, 0] * _COLUMNS / camera.width, 0, _COLUMNS - 1).astype(np.int64)
    rows = np.clip(keypoints0[:, 1] * _ROWS / camera.height, 0, _ROWS - 1).astype(np.int64)
    region, shifts = rows * _COLUMNS + columns, keypoints1 - keypoints0
    counts = np.bincount(region, minlength=_COLUMNS * _ROWS)
    filled = np.flatnonzero(counts >= _MIN_KEYPOINTS)
    first = (np.cumsum(counts) - counts)[filled]
    low, high = first + (counts[filled] - 1) // 2, first + counts[filled] // 2
    # Regions far apart on one axis: sorted at once, each has its place.
    offsets = float(1 << 20) * np.arange(float(_COLUMNS * _ROWS))
    squared = np.zeros(len(filled))
    for axis in (0, 1):
        ordered = np.sort(offsets[region] + shifts[:, axis])
        squared += ((ordered[low] + ordered[high]) / 2 - offsets[filled]) ** 2
    return np.sqrt(squared)


def quantile(values: FloatArray, share: float) -> float:
    """Of a handful of values (N,), by linear interpolation: `np.quantile` without what that takes for so few."""
    ordered = sorted(values.tolist())
    below, part = divmod(share * (len(ordered) - 1), 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return float(low + part * (high - low))


class RepeatedImages:
    """Whether a camera delivers the very image of the frame before, again and again: it hangs.

    Sensors have noise: a camera that stands still never sends the same image twice. Now and then a driver does, and the
    pose is held; where it goes on, where the camera is meanwhile nobody knows. A black image tells nothing.
    """

    def __init__(self) -> None:
        self._last: NDArray[np.uint8] | None = None
        self._count = 0

    def is_hanging(self, image: NDArray[np.uint8]) -> bool:
        """To be asked of every image once."""
        self._count = self._count + 1 if self._repeats(image) else 0
        return self._count > _MAX_REPEATS

    def note(self, image: NDArray[np.uint8]) -> None:
        """Takes the image for the one that the next is compared with."""
        self._last = image

    def _repeats(self, image: NDArray[np.uint8]) -> bool:
        before = self._last
        if before is None or before.shape != image.shape:
            return False
        # A few rows tell nearly all images apart.
        is_equal = np.array_equal(before[::32], image[::32]) and np.array_equal(before, image)
        return bool(is_equal and image.min() != image.max())
