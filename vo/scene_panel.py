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
        self._image: Picture | None = None
        self._image_frame: int | None = None
        self.num_broken = 0

    @property
    def has_image(self) -> bool:
        return self._image is not None

    @property
    def frame_index(self) -> int | None:
        if self._image_frame is not None:
            return self._image_frame
        return self._tracks[-1].frame_index if self._tracks else None

    @property
    def num_tracks(self) -> int:
        tracks = self._shown_tracks()
        return len(tracks[-1].track_ids) if tracks else 0

    def set_camera(self, camera: Camera) -> None:
        """Tells the size of the full image: keypoints are given in its pixels."""
        self._camera = camera

    def add_tracks(self, tracks: FrameTracks) -> None:
        self._tracks.append(tracks)

    def set_image(self, image: CompressedImage) -> None:
        """Takes a new image; one that cannot be read is counted, and the last one stays."""
        picture = cv2.imdecode(np.ascontiguousarray(image.data), cv2.IMREAD_COLOR_RGB)
        if picture is None or picture.shape[:2] != (image.height, image.width):
            self.num_broken += 1
            return
        self._image, self._image_frame = picture.astype(np.uint8, copy=False), image.frame_index

    def draw(self, width: int) -> Picture:
        """(H, width, 3) RGB."""
        full_width, full_height = self._full_size()
        height = max(1, round(width * full_height / full_width))
        canvas: Picture
        if self._image is None:
            canvas = np.empty((height, width, 3), np.uint8)
            canvas[:] = rgb(IMAGE_BACKGROUND)
        else:
            resized = cv2.resize(self._image, (width, height), interpolation=cv2.INTER_AREA)
            canvas = resized.astype(np.uint8, copy=False)
        self._draw_tracks(canvas, width / full_width)
        return canvas

    def _full_size(self) -> tuple[int, int]:
        if self._camera is not None:
            return self._camera.width, self._camera.height
        return (640, 480) if self._image is None else (self._image.shape[1], self._image.shape[0])

    def _shown_tracks(self) -> list[FrameTracks]:
        """The tracks of the frame that is shown and of the frames before it, at most TAIL_FRAMES of them."""
        last = self._image_frame
        return [tracks for tracks in self._tracks if last is None or tracks.frame_index <= last][-TAIL_FRAMES:]

    def _draw_tracks(self, canvas: Picture, scale: float) -> None:
        shown = self._shown_tracks()
        if not shown:
            return
        newest = shown[-1]
        ages = np.minimum(newest.lengths * NUM_AGE_COLORS // (OLD_AGE + 1), NUM_AGE_COLORS - 1)
        for older, newer in itertools.pairwise(shown):
            _, index0, index1 = np.intersect1d(older.track_ids, newer.track_ids, return_indices=True)
            is_alive = np.isin(newer.track_ids[index1], newest.track_ids)
            lines = np.stack([older.keypoints[index0], newer.keypoints[index1]], 1)[is_alive]
            lengths = np.minimum(newer.lengths[index1][is_alive] * NUM_AGE_COLORS // (OLD_AGE + 1), NUM_AGE_COLORS - 1)
            self._draw_lines(canvas, lines, lengths, scale, thickness=1)
        dots = np.repeat(newest.keypoints[:, None], 2, axis=1)
        self._draw_lines(canvas, dots[newest.has_landmark], ages[newest.has_landmark], scale, thickness=5)
        self._draw_lines(canvas, dots[~newest.has_landmark], ages[~newest.has_landmark], scale, thickness=2)

    def _draw_lines(
        self,
        canvas: Picture,
        lines: NDArray[np.float32],
        ages: NDArray[np.int32],
        scale: float,
        thickness: int,
    ) -> None:
        """Lines (N, 2, 2) px of the full image, those of one colour at once; a line without length is a dot."""
        pixels = np.rint((lines + 0.5) * scale - 0.5).astype(np.int32)
        for age in np.unique(ages).tolist():
            color = tuple(int(value) for value in self._colors[age])
            cv2.polylines(canvas, list(pixels[ages == age]), False, color, thickness)


class Panel:
    """Draws the whole panel. Fonts are loaded once."""

    def __init__(self) -> None:
        self._font = cv2.FontFace("sans")
        self._age_colors = age_colors()

    def draw(
        self, picture: TrackPicture, lines: Sequence[TextLine], view: ViewState, height: int, scale: float = 1.0
    ) -> Picture:
        """(height, round(PANEL_WIDTH * scale), 3) RGB; `scale` is larger on screens with fine pixels."""
        width = round(PANEL_WIDTH * scale)
        canvas = np.empty((height, width, 3), np.uint8)
        canvas[:] = rgb(PANEL_BACKGROUND)
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
