"""Boards on paper, to scale: a PDF with vectors, or a PNG that knows its dots per inch. Matplotlib draws."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vo.calibration_boards import Board, BoardKind, CalibrationError, opencv_charuco
from vo.output import prepare_directory, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPERS_MM = {"a4": (210.0, 297.0), "letter": (215.9, 279.4), "a3": (297.0, 420.0), "a2": (420.0, 594.0)}
PNG_DPI = 600
_MM_PER_INCH = 25.4
_SIDE_MARGIN_MM = 8.0
_TOP_MARGIN_MM = 8.0
_TEXT_MM = 17.0
_RULER_MM = 100.0


@dataclass(frozen=True, slots=True)
class Sheet:
    """A board on a page: sizes, and where the board's lower left corner is from that of the page, mm."""

    board: Board
    paper: str
    width_mm: float
    height_mm: float
    square_mm: float
    left_mm: float
    bottom_mm: float

    @property
    def board_mm(self) -> tuple[float, float]:
        """Width and height of all squares."""
        across, down = self.board.num_squares
        return across * self.square_mm, down * self.square_mm


def lay_out(board: Board, paper: str = "a4") -> Sheet:
    """Places a board on a page, upright or across; raises CalibrationError where it does not fit, with what would."""
    across, down = board.num_squares
    square_mm = 1e3 * board.square_m
    short, long = PAPERS_MM[paper]
    largest_mm = 0.0
    for width, height in ((long, short), (short, long)):
        room = (width - 2.0 * _SIDE_MARGIN_MM, height - _TOP_MARGIN_MM - _TEXT_MM)
        largest_mm = max(largest_mm, min(room[0] / across, room[1] / down))
        if across * square_mm <= room[0] and down * square_mm <= room[1]:
            left = 0.5 * (width - across * square_mm)
            bottom = _TEXT_MM + 0.5 * (room[1] - down * square_mm)
            return Sheet(board, paper, width, height, square_mm, left, bottom)
    raise CalibrationError(
        f"--square-m {board.square_m:g}: {board.text} is {across * square_mm:.0f} x {down * square_mm:.0f} mm, too "
        f"large for {paper}; use --square-m {np.floor(largest_mm) * 1e-3:.3f}, a larger --paper, or fewer squares"
    )


def write_board(path: Path, board: Board, paper: str = "a4") -> Sheet:
    """Writes a page as PDF or PNG, by the suffix of `path`; raises CalibrationError and OutputError."""
    if path.suffix.lower() not in (".pdf", ".png"):
        raise CalibrationError(f"{path}: a board is printed to a .pdf or .png file")
    sheet = lay_out(board, paper)
    figure = _draw(sheet)
    buffer = io.BytesIO()
    if path.suffix.lower() == ".pdf":
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Title": board.text})
    else:
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    prepare_directory(path.parent)
    write_atomically(path, buffer.getvalue())
    return sheet


def black_areas(board: Board) -> Iterator[tuple[float, float, float, float]]:
    """Black rectangles (x, y, width, height) in squares, from the top left of the board, y down the page."""
    across, down = board.num_squares
    if board.kind is BoardKind.CHESSBOARD:
        yield from ((float(x), float(y), 1.0, 1.0) for y in range(down) for x in range(across) if (x + y) % 2 == 0)
        return
    charuco = opencv_charuco(board)
    corners = np.array([np.asarray(marker)[:, :2] for marker in charuco.getObjPoints()]) / board.square_m
    white = {(int(x), int(y)) for x, y in corners.mean(axis=1)}
    yield from ((float(x), float(y), 1.0, 1.0) for y in range(down) for x in range(across) if (x, y) not in white)
    dictionary = charuco.getDictionary()
    num_cells = dictionary.markerSize + 2
    cell = board.marker_ratio / num_cells
    for marker, (left, top) in zip(np.asarray(charuco.getIds()).ravel(), corners.min(axis=1), strict=True):
        bits = dictionary.generateImageMarker(int(marker), num_cells, borderBits=1)
        for y, x in np.argwhere(np.asarray(bits) < 128):
            yield float(left + x * cell), float(top + y * cell), cell, cell


def _draw(sheet: Sheet) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sheet.width_mm / _MM_PER_INCH, sheet.height_mm / _MM_PER_INCH), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0.0, sheet.width_mm)
    axes.set_ylim(0.0, sheet.height_mm)
    top = sheet.bottom_mm + sheet.board_mm[1]
    areas = np.array(list(black_areas(sheet.board))) * sheet.square_mm
    x, y = sheet.left_mm + areas[:, 0], top - areas[:, 1]
    right, lower = x + areas[:, 2], y - areas[:, 3]
    quads = np.stack([np.stack(pair, axis=1) for pair in ((x, y), (right, y), (right, lower), (x, lower))], axis=1)
    # Not smoothed: seams would show between the cells of a marker, and gray edges in print.
    axes.add_collection(PolyCollection(list(quads), facecolors="black", linewidths=0, antialiaseds=False))
    _draw_text(axes, sheet)
    return figure


def _draw_text(axes: Axes, sheet: Sheet) -> None:
    """A ruler to check the print with, and what to type."""
    left, base = max(sheet.left_mm, _SIDE_MARGIN_MM), 6.0
    for tick_mm in range(0, int(_RULER_MM) + 1, 5):
        height = 3.0 if tick_mm % 50 == 0 else 2.0 if tick_mm % 10 == 0 else 1.2
        axes.plot([left + tick_mm] * 2, [base, base + height], color="black", linewidth=0.4, solid_capstyle="butt")
    axes.plot([left, left + _RULER_MM], [base, base], color="black", linewidth=0.4, solid_capstyle="butt")
    axes.text(left, base - 3.4, "0", fontsize=6, ha="center")
    axes.text(left + _RULER_MM, base - 3.4, "100 mm", fontsize=6, ha="center")
    width, height = sheet.board_mm
    lines = (
        f"{sheet.board.text}, square {sheet.square_mm:.4g} mm, board {width:.4g} x {height:.4g} mm",
        "Print at 100 %, measure the ruler, fix it flat on something rigid.",
        f"vo calibrate webcam:0 --board {sheet.board.text} --square-m {sheet.board.square_m:.6g} -o camera.yaml",
    )
    for number, line in enumerate(lines):
        axes.text(left + _RULER_MM + 9.0, base + 3.4 - 3.2 * number, line, fontsize=6)
