"""The live view of a calibration: what the camera sees, what is covered, what to do next. The window is OpenCV's."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.calibration_boards import BoardView
from vo.calibration_capture import Offer, ViewCollector

_TITLE = "vo calibrate"
_WIDTH_PX = 960
_GREEN, _AMBER, _WHITE, _BLUE = (90, 200, 90), (60, 170, 240), (245, 245, 245), (220, 140, 60)  # BGR, as OpenCV draws
_KEYS_STOP = (ord("q"), 27)
_KEYS_FINISH = (13, 32)


class CalibrationWindow:
    """A window that shows every image; the caller checks first that there is a display."""

    def __init__(self) -> None:
        cv2.namedWindow(_TITLE, cv2.WINDOW_AUTOSIZE)
        self._has_been_visible = False  # a window manager may take a while

    def show(self, image: NDArray[np.uint8], view: BoardView | None, collector: ViewCollector, offer: Offer) -> bool:
        """Draws; False when the user has had enough: Enter, the space bar, Q, Escape, or a closed window."""
        cv2.imshow(_TITLE, overlay(image, view, collector, offer))
        key = cv2.waitKey(1) & 0xFF
        is_visible = cv2.getWindowProperty(_TITLE, cv2.WND_PROP_VISIBLE) >= 1
        is_closed = self._has_been_visible and not is_visible
        self._has_been_visible |= is_visible
        return key not in (*_KEYS_STOP, *_KEYS_FINISH) and not is_closed

    def close(self) -> None:
        """Takes the window away."""
        cv2.destroyAllWindows()


def overlay(
    image: NDArray[np.uint8], view: BoardView | None, collector: ViewCollector, offer: Offer
) -> NDArray[np.uint8]:
    """(H, W, 3) BGR at most 960 px wide: covered cells tinted, corners, where to go, progress."""
    scale = min(1.0, _WIDTH_PX / image.shape[1])
    conversion = cv2.COLOR_GRAY2BGR if image.ndim == 2 else cv2.COLOR_RGB2BGR
    small = cv2.resize(cv2.cvtColor(image, conversion), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    picture = np.asarray(small, np.uint8)
    width = picture.shape[1]
    _tint_cells(picture, collector)
    if view is not None:
        colour = _GREEN if offer is Offer.KEPT else _AMBER
        for x, y in (view.corners_px * scale).round().astype(int):
            cv2.circle(picture, (int(x), int(y)), 3, colour, -1, cv2.LINE_AA)
    bar = np.zeros((64, width, 3), np.uint8)
    cv2.rectangle(bar, (0, 0), (round(width * collector.progress), 6), _GREEN, -1)
    _write(bar, collector.instruction(), (12, 30), 0.6, _WHITE)
    _write(bar, f"{len(collector.views)} views   {offer.value}   Enter: calibrate now", (12, 53), 0.45, _AMBER)
    return np.asarray(np.concatenate([picture, bar]), np.uint8)


def _tint_cells(picture: NDArray[np.uint8], collector: ViewCollector) -> None:
    height, width = picture.shape[:2]
    covered = collector.covered
    mask = cv2.resize(covered.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    picture[mask] = (0.8 * picture[mask] + 0.2 * np.array(_GREEN)).astype(np.uint8)
    cell = collector.target_cell()
    if cell is not None:
        rows, columns = covered.shape
        corner = (round(cell[0] * width / columns), round(cell[1] * height / rows))
        other = (round((cell[0] + 1) * width / columns), round((cell[1] + 1) * height / rows))
        cv2.rectangle(picture, corner, other, _BLUE, 3)


def _write(
    picture: NDArray[np.uint8], text: str, at: tuple[int, int], size: float, colour: tuple[int, int, int]
) -> None:
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)
