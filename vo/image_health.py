"""Whether an image can be used at all, and what is wrong with it: per frame, in about a millisecond. No clock.

Brightness and contrast come from a small copy; sharpness from the full resolution, along every 16th row and column: the
energy of differences over 2 px against that over 8 px. An edge that is sharp has a quarter of it, one that is smeared
over more than 8 px a sixteenth, whatever its contrast (compare Crete et al., The blur effect, SPIE 2007).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.types import ImageCondition, ImageHealth

_SMALL_PX, _MEDIUM_PX = 160, 320
_LINE_STEP = 16
# Grey levels of 255.
_DARK_LEVEL, _CLIPPED_LEVEL, _FLAT_LEVELS = 26, 250, 1.5
_DARK_SHARE, _OVEREXPOSED_SHARE, _FLAT_SHARE = 0.98, 0.9, 0.98
_LEVELS = np.arange(256.0)
_CELL_PX = 8
# Ratio of sharpness to the median of the last frames, and a sharpness that is poor by itself.
_BLURRED_RATIO, _BLURRED, _NUM_REFERENCE = 0.76, 0.3, 60
_JUMP_STOPS = 0.35
# Swings of 6 frames and less: slower ones are what a camera sees on its way, and light that changes.
_NUM_FLICKER, _FLICKER_AMPLITUDE, _FLICKER_SHARE, _FLICKER_BIN = 32, 0.015, 0.8, 5


class HealthMonitor:
    """Looks at the images of one camera, in order."""

    def __init__(self) -> None:
        self._previous_lines: NDArray[np.int16] | None = None
        self._previous_brightness: float | None = None
        self._sharpness: deque[float] = deque(maxlen=_NUM_REFERENCE)
        self._log_brightness: deque[float] = deque(maxlen=_NUM_FLICKER)
        self._reference: float | None = None
        self._flickers = False
        self._num_seen = 0

    def look(self, image: NDArray[np.uint8]) -> ImageHealth:
        """What an image (H, W, 3) RGB or (H, W) gray, uint8, is good for, compared with those before."""
        small = _small_gray(image)
        histogram = np.bincount(small.ravel(), minlength=256) / small.size
        brightness = float(histogram @ _LEVELS)
        contrast = math.sqrt(float(histogram @ (_LEVELS - brightness) ** 2))
        clipped = float(histogram[_CLIPPED_LEVEL:].sum())
        rows, columns = _lines(image)
        sharpness = min(_sharpness(rows), _sharpness(columns))
        conditions = _lighting(small, histogram, clipped)
        if self._is_frozen(rows):
            conditions.append(ImageCondition.FROZEN)
        elif not conditions:
            conditions += self._changes(brightness, sharpness)
        self._previous_brightness = brightness
        self._num_seen += 1
        return ImageHealth(
            brightness=brightness / 255,
            contrast=min(contrast / 127.5, 1.0),
            sharpness=sharpness,
            clipped=clipped,
            conditions=tuple(conditions),
        )

    def _is_frozen(self, rows: NDArray[np.int16]) -> bool:
        """Whether these are the very pixels of the frame before; a uniform image tells nothing."""
        previous, self._previous_lines = self._previous_lines, rows
        return previous is not None and bool(rows.size and np.array_equal(previous, rows) and np.ptp(rows))

    def _changes(self, brightness: float, sharpness: float) -> list[ImageCondition]:
        """What only shows against the frames before; frames in which nothing can be seen do not count."""
        conditions = []
        if self._reference is not None and sharpness < max(_BLURRED, _BLURRED_RATIO * self._reference):
            conditions.append(ImageCondition.BLURRED)
        previous = self._previous_brightness
        if previous is not None and abs(math.log2((brightness + 2) / (previous + 2))) > _JUMP_STOPS:
            conditions.append(ImageCondition.EXPOSURE_JUMP)
        self._sharpness.append(sharpness)
        self._log_brightness.append(math.log(brightness + 2))
        if self._num_seen % 8 == 7:
            self._reference = float(np.median(self._sharpness))
            self._flickers = _flickers(np.array(self._log_brightness))
        if self._flickers:
            conditions.append(ImageCondition.FLICKER)
        return conditions


def _small_gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """About 160 px on the longer side: averaged, so that the noise of single pixels is gone."""
    stride = max(1, max(image.shape[:2]) // _MEDIUM_PX)
    medium = image[::stride, ::stride]
    scale = min(1.0, _SMALL_PX / max(medium.shape[:2]))
    size = max(1, round(medium.shape[1] * scale)), max(1, round(medium.shape[0] * scale))
    small = cv2.resize(np.ascontiguousarray(medium), size, interpolation=cv2.INTER_AREA)
    gray = small if small.ndim == 2 else cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    return np.asarray(gray, np.uint8)


def _lines(image: NDArray[np.uint8]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Some rows (N, W) and some columns (M, H) in full resolution; of a colour image the green ones."""
    green = image if image.ndim == 2 else image[:, :, 1]
    start = _LINE_STEP // 2
    rows, columns = green[start::_LINE_STEP], green[:, start::_LINE_STEP].T
    return rows.astype(np.int16), columns.astype(np.int16)


def _sharpness(lines: NDArray[np.int16]) -> float:
    """Square root of the energy of differences over 2 px by that over 8 px, 0 to 1; 1 where there is no difference."""
    if lines.shape[0] == 0 or lines.shape[1] <= 8:
        return 1.0
    near, far = _energy(lines[:, 2:] - lines[:, :-2]), _energy(lines[:, 8:] - lines[:, :-8])
    return min(1.0, math.sqrt(near / far)) if far > 0 else 1.0


def _energy(differences: NDArray[np.int16]) -> float:
    values = differences.ravel().astype(np.float32)
    return float(values @ values) / len(values)


def _lighting(small: NDArray[np.uint8], histogram: NDArray[np.float64], clipped: float) -> list[ImageCondition]:
    """Whether there is anything to be seen in one image, by itself; histogram (256,) in shares."""
    if float(histogram[:_DARK_LEVEL].sum()) > _DARK_SHARE:
        return [ImageCondition.DARK]
    if clipped > _OVEREXPOSED_SHARE:
        return [ImageCondition.OVEREXPOSED]
    height, width = (side - side % _CELL_PX for side in small.shape)
    if height and width:
        smooth = np.asarray(cv2.blur(small, (3, 3)))  # noise is no texture
        cells = smooth[:height, :width].reshape(height // _CELL_PX, _CELL_PX, width // _CELL_PX, _CELL_PX)
        spread = cells.astype(np.float32).std(axis=(1, 3))
        if float(np.mean(spread < _FLAT_LEVELS)) > _FLAT_SHARE:
            return [ImageCondition.COVERED]
    return []


def _flickers(log_brightness: NDArray[np.float64]) -> bool:
    """Whether the brightness swings at one frequency, as under lamps on the mains."""
    if len(log_brightness) < _NUM_FLICKER:
        return False
    steps = np.arange(_NUM_FLICKER)
    swing = log_brightness - np.polyval(np.polyfit(steps, log_brightness, 2), steps)
    power = np.abs(np.fft.rfft(swing * np.hanning(_NUM_FLICKER))) ** 2
    spectrum = power[_FLICKER_BIN:]
    peak = int(spectrum.argmax())
    share = spectrum[max(0, peak - 1) : peak + 2].sum() / max(power.sum(), 1e-12)
    # An oscillation of amplitude a through this window has a quarter of a times the length as its peak.
    amplitude = 4 * math.sqrt(float(spectrum[peak])) / _NUM_FLICKER
    return bool(share > _FLICKER_SHARE and amplitude > _FLICKER_AMPLITUDE)


class HealthLog:
    """Counts what was wrong with the images of a run, and says in words when something begins and ends.

    counts  frames by condition.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
        self.counts: Counter[ImageCondition] = Counter()
        self.last: ImageHealth | None = None
        self._last_seen: dict[ImageCondition, int] = {}

    def note(self, frame_index: int, health: ImageHealth) -> None:
        """The next frame."""
        self.last = health
        for condition in health.conditions:
            self.counts[condition] += 1
            if condition not in self._last_seen and condition in _IN_WORDS:
                self._say(f"image: {_IN_WORDS[condition]}, from frame {frame_index}")
            self._last_seen[condition] = frame_index
        for condition, seen in tuple(self._last_seen.items()):
            if frame_index - seen > _NUM_GONE:
                del self._last_seen[condition]
                if condition in _IN_WORDS:
                    self._say(f"image: no longer {condition.value}, after frame {seen}")


# A condition is over when so many frames came without it.
_NUM_GONE = 30
_IN_WORDS = {
    ImageCondition.DARK: "dark (lights off, or the lens covered?); no pose until something can be seen",
    ImageCondition.COVERED: "nothing with any texture (lens covered, or against a wall?); no pose until there is",
    ImageCondition.OVEREXPOSED: "white all over (exposure too long?); no pose until something can be seen",
    ImageCondition.FROZEN: "the same image again (does the camera hang?)",
    ImageCondition.BLURRED: "less sharp than before (fast motion, long exposure, or out of focus?)",
    ImageCondition.FLICKER: "flickers (lamps on the mains; fix the exposure to a multiple of 1/100 or 1/120 s)",
}
