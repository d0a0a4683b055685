"""The panel beside the scene: the camera image with its tracks, figures, legend. Drawn with OpenCV, windowless."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.message_types import CompressedImage
from vo.scene import STATUS_COLORS, Color, Layer
from vo.scene_view import KEYS, ViewState
from vo.types import Camera, FrameTracks

PANEL_WIDTH = 420
MARGIN = 10
TEXT_SIZE = 14
TEXT_WEIGHT = 500
LINE_HEIGHT = 20
OLD_AGE = 30
NUM_AGE_COLORS = 16
TAIL_FRAMES = 6
KEPT_FRAMES = 32

PANEL_BACKGROUND: Color = (0.07, 0.08, 0.11)
IMAGE_BACKGROUND: Color = (0.16, 0.17, 0.21)
TEXT_COLOR: Color = (0.88, 0.89, 0.92)
DIM_COLOR: Color = (0.50, 0.52, 0.58)
WARNING_COLOR: Color = (1.00, 0.62, 0.10)

SMALL_DOT = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.int32)
LARGE_DOT = np.array([[x, y] for x in range(-2, 3) for y in range(-2, 3) if abs(x) + abs(y) < 4], np.int32)
MAX_PIXEL = 30_000

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TextLine:
    """One line on the panel."""

    text: str
    color: Color = TEXT_COLOR


def age_colors() -> NDArray[np.uint8]:
    """(NUM_AGE_COLORS, 3) RGB from young to old."""
    ramp = np.linspace(20, 235, NUM_AGE_COLORS).astype(np.uint8)
    bgr = cv2.applyColorMap(ramp[:, None], cv2.COLORMAP_TURBO)[:, 0]
    return np.ascontiguousarray(bgr[:, ::-1])


class TrackPicture:
    """The newest image with the tracks of its frame; their colour is their age, their tail where they come from.

    frame_index  the frame that is shown; None before the first.
    num_tracks   of that frame.
    num_broken   images that could not be read.
    """

    def __init__(self) -> None:
        self._colors = age_colors()
        self._camera: Camera | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets the run, but not its camera."""
        self._tracks: deque[FrameTracks] = deque(maxlen=KEPT_FRAMES)
        self._waiting: tuple[CompressedImage, Picture | None] | None = None
        self._image: Picture | None = None
        self._resized: Picture | None = None
        self._image_frame: int | None = None
        self.num_broken = 0

    @property
    def has_image(self) -> bool:
        return self._image is not None or self._waiting is not None

    @property
    def frame_index(self) -> int | None:
        self._read_image()
        if self._image_frame is not None:
            return self._image_frame
        return self._tracks[-1].frame_index if self._tracks else None

    @property
    def num_tracks(self) -> int:
        self._read_image()
        shown = self._shown_tracks()
        return len(shown[-1].track_ids) if shown else 0

    def set_camera(self, camera: Camera) -> None:
        """Tells the size of the full image: keypoints are given in its pixels."""
        if self._camera is None or (self._camera.width, self._camera.height) != (camera.width, camera.height):
            self._camera, self._resized = camera, None

    def add_tracks(self, tracks: FrameTracks) -> None:
        """Takes the tracks of the next frame."""
        self._tracks.append(tracks)

    def set_image(self, image: CompressedImage, picture: Picture | None = None) -> None:
        """Takes a new image, to be read when it is drawn; where it cannot be, the last one stays.

        picture  what `read_image` has made of it already, in a thread that has the time.
        """
        self._waiting = image, picture

    def draw(self, width: int) -> Picture:
        """(H, width, 3) RGB."""
        self._read_image()
        full_width, full_height = self._full_size()
        size = width, max(1, round(width * full_height / full_width))
        if self._resized is None or self._resized.shape[1::-1] != size:
            self._resized = self._resize(size)
        canvas = self._resized.copy()
        self._draw_tracks(canvas, width / full_width)
        return canvas

    def _read_image(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        image, picture = waiting
        picture = read_image(image) if picture is None else picture
        if picture is None:
            self.num_broken += 1
            return
        self._image, self._image_frame = picture, image.frame_index
        self._resized = None

    def _resize(self, size: tuple[int, int]) -> Picture:
        if self._image is None:
            empty = np.empty((size[1], size[0], 3), np.uint8)
            empty[:] = rgb(IMAGE_BACKGROUND)
            return empty
        # Averaging over areas is slow, and looks better only where the picture shrinks by more than half.
        is_small = 2 * size[0] < self._image.shape[1]
        resized = cv2.resize(self._image, size, interpolation=cv2.INTER_AREA if is_small else cv2.INTER_LINEAR)
        return resized.astype(np.uint8, copy=False)

    def _full_size(self) -> tuple[int, int]:
        if self._camera is not None:
            return self._camera.width, self._camera.height
        return (640, 480) if self._image is None else (self._image.shape[1], self._image.shape[0])

    def _shown_tracks(self) -> list[FrameTracks]:
        """The tracks of the frame that is shown and of the frames before it, at most TAIL_FRAMES of them."""
        last = self._image_frame
        known = [tracks for tracks in self._tracks if last is None or tracks.frame_index <= last]
        return known[-TAIL_FRAMES:]

    def _draw_tracks(self, canvas: Picture, scale: float) -> None:
        shown = self._shown_tracks()
        if not shown:
            return
        newest = shown[-1]
        pixels, ages = to_pixels(newest.keypoints, scale), color_numbers(newest.lengths)
        self._draw_lines(canvas, to_pixels(tails(shown), scale), ages)
        for has_landmark, stamp in ((False, SMALL_DOT), (True, LARGE_DOT)):
            chosen = newest.has_landmark == has_landmark
            stamp_dots(canvas, pixels[chosen], self._colors[ages[chosen]], stamp)

    def _draw_lines(self, canvas: Picture, lines: NDArray[np.int32], ages: NDArray[np.int32]) -> None:
        """Lines (N, L, 2) px, those of one colour at once."""
        order = np.argsort(ages, kind="stable")
        lines = lines[order]
        starts = np.searchsorted(ages[order], np.arange(NUM_AGE_COLORS + 1))
        for number, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
            if end > start:
                color = tuple(int(value) for value in self._colors[number])
                cv2.polylines(canvas, list(lines[start:end]), False, color, 1)


def read_image(image: CompressedImage) -> Picture | None:
    """(H, W, 3) RGB; None of what is no picture of the size it says."""
    picture = cv2.imdecode(np.ascontiguousarray(image.data), cv2.IMREAD_COLOR_RGB)
    if picture is None or picture.shape[:2] != (image.height, image.width):
        return None
    return picture.astype(np.uint8, copy=False)


def tails(frames: Sequence[FrameTracks]) -> NDArray[np.float32]:
    """(N, F, 2) px: where each track of the last of F frames has been in all of them, from the last to the first; where
    it was not seen in one, where it was seen after that.
    """
    newest = frames[-1]
    points = np.repeat(newest.keypoints[:, None], len(frames), axis=1)
    for age, older in enumerate(reversed(frames[:-1]), 1):
        points[:, age] = points[:, age - 1]
        if len(older.track_ids):
            order = np.argsort(older.track_ids, kind="stable")
            places = np.searchsorted(older.track_ids[order], newest.track_ids)
            rows = order[np.minimum(places, len(order) - 1)]
            is_same = older.track_ids[rows] == newest.track_ids
            points[is_same, age] = older.keypoints[rows[is_same]]
    return points


def color_numbers(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Which of `age_colors` tracks of these lengths (N,) have."""
    return np.minimum(lengths * NUM_AGE_COLORS // (OLD_AGE + 1), NUM_AGE_COLORS - 1).astype(np.int32)


def to_pixels(keypoints: NDArray[np.float32], scale: float) -> NDArray[np.int32]:
    """Keypoints (..., 2) of the full image in whole pixels of one that is `scale` times as large."""
    pixels = np.clip((keypoints + 0.5) * scale - 0.5, -MAX_PIXEL, MAX_PIXEL)
    return np.asarray(np.rint(pixels), np.int32)


def stamp_dots(
    canvas: Picture, pixels: NDArray[np.int32], colors: NDArray[np.uint8], offsets: NDArray[np.int32]
) -> None:
    """Sets the pixels around each of (N, 2) to its colour (N, 3)."""
    set_pixels(canvas, (offsets[:, None] + pixels).reshape(-1, 2), np.tile(colors, (len(offsets), 1)))


def set_pixels(canvas: Picture, pixels: NDArray[np.int32], colors: NDArray[np.uint8]) -> None:
    """Sets pixels (N, 2) to colours (N, 3), the last of the same pixel on top; those outside are left out."""
    height, width = canvas.shape[:2]
    x, y = pixels[:, 0], pixels[:, 1]
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    canvas.reshape(-1, 3)[y[is_inside] * width + x[is_inside]] = colors[is_inside]


class Panel:
    """Draws the whole panel. Fonts are loaded once."""

    def __init__(self) -> None:
        self._font = cv2.FontFace("sans")
        self._age_colors = age_colors()
        self._blank = np.zeros((0, 0, 3), np.uint8)

    def draw(
        self, picture: TrackPicture, lines: Sequence[TextLine], view: ViewState, height: int, scale: float = 1.0
    ) -> Picture:
        """(height, round(PANEL_WIDTH * scale), 3) RGB; `scale` is larger on screens with fine pixels."""
        width = round(PANEL_WIDTH * scale)
        if self._blank.shape[:2] != (height, width):
            self._blank = np.tile(np.array(rgb(PANEL_BACKGROUND), np.uint8), (height, width, 1))
        canvas = self._blank.copy()
        y = 0
        if view.shows_image:
            image = picture.draw(width)[:height]
            canvas[: len(image)] = image
            y = self._draw_ages(canvas, len(image), scale)
        y += round(0.4 * LINE_HEIGHT * scale)
        for line in lines:
            y += round(LINE_HEIGHT * scale)
            self._write(canvas, line.text, round(MARGIN * scale), y, line.color, scale)
        if view.shows_help:
            self._draw_help(canvas, y + round(0.6 * LINE_HEIGHT * scale), view, scale)
        return canvas

    def _draw_ages(self, canvas: Picture, top: int, scale: float) -> int:
        """The ramp that says which colour is which age; returns where it ends."""
        thickness = round(6 * scale)
        ramp = np.repeat(self._age_colors, -(-canvas.shape[1] // NUM_AGE_COLORS), axis=0)[: canvas.shape[1]]
        strip = canvas[top : top + thickness]
        strip[:] = ramp[: strip.shape[1]]
        y = top + thickness + round(0.8 * LINE_HEIGHT * scale)
        self._write(canvas, "new track", round(MARGIN * scale), y, DIM_COLOR, scale)
        self._write(canvas, f"seen in {OLD_AGE} frames", canvas.shape[1] - round(136 * scale), y, DIM_COLOR, scale)
        return y

    def _draw_help(self, canvas: Picture, y: int, view: ViewState, scale: float) -> None:
        x, half = round(MARGIN * scale), canvas.shape[1] // 2
        for number, (status, color) in enumerate(STATUS_COLORS.items()):
            row, column = divmod(number, 2)
            left, line = x + column * half, y + round((row + 1) * LINE_HEIGHT * scale)
            middle = line - round(5 * scale)
            cv2.line(canvas, (left, middle), (left + round(22 * scale), middle), rgb(color), 3)
            self._write(canvas, status.value, left + round(32 * scale), line, TEXT_COLOR, scale)
        y += round(2 * LINE_HEIGHT * scale)
        y += round(0.5 * LINE_HEIGHT * scale)
        for number, (key, label) in enumerate(KEYS):
            column, row = divmod(number, -(-len(KEYS) // 2))
            left = x + column * half
            line = y + round((row + 1) * LINE_HEIGHT * scale)
            color = DIM_COLOR if view.is_on(label) is False else TEXT_COLOR
            self._write(canvas, key, left, line, WARNING_COLOR, scale)
            self._write(canvas, label, left + round(32 * scale), line, color, scale)

    def _write(self, canvas: Picture, text: str, x: int, y: int, color: Color, scale: float) -> None:
        cv2.putText(canvas, text, (x, y), rgb(color), self._font, round(TEXT_SIZE * scale), TEXT_WEIGHT)


def compose(panel: Picture | None, scene: Picture) -> Picture:
    """Panel and scene side by side, both RGB and equally high."""
    return scene if panel is None else np.concatenate([panel, scene], axis=1)


def rgb(color: Color) -> tuple[int, int, int]:
    """The colour as the three bytes of a pixel."""
    return round(255 * color[0]), round(255 * color[1]), round(255 * color[2])


def hidden_layers(names: Sequence[str]) -> set[Layer]:
    """The layers of these names. Raises ValueError naming the valid ones."""
    valid = {layer.value: layer for layer in Layer}
    for name in names:
        if name not in valid:
            raise ValueError(f"{name}: no layer; valid: {', '.join(valid)}")
    return {valid[name] for name in names}
