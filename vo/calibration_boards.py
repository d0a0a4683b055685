"""Calibration boards: what the user calls them, where their corners lie, how they are found in an image. Pure.

A corner of a board is where four squares meet. Corners are numbered row by row from the top left of the printed board;
`board_points` puts them on the plane z = 0, x to the right and y down the page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.calibration_corners import CornerGrid, edge_width_px, refined_corners
from vo.types import FloatArray, VoError

MIN_CORNERS = 12
DEFAULT_MARKER_RATIO = 0.75
_DICTIONARIES = tuple(f"{bits}x{bits}_{count}" for bits in (4, 5, 6, 7) for count in (50, 100, 250, 1000))
_EXPECTED = "expected chessboard:9x6 (inner corners) or charuco:10x7 (squares), charuco:10x7:5x5_100:0.75"
_SIDE = re.compile(r"(\d{1,3})x(\d{1,3})")
_MAX_SIDE = 60
_LIVE_WIDTH_PX = 800.0
_MAX_BEND_SQUARES = 0.6  # by a strongly distorting lens, over the whole board


class CalibrationError(VoError):
    """A calibration that cannot be had: names what is wrong with the board, the images or the views, and the remedy."""


class BoardKind(Enum):
    """A chessboard has to be seen whole; a ChArUco board carries markers and may be seen in part."""

    CHESSBOARD = "chessboard"
    CHARUCO = "charuco"


@dataclass(frozen=True, slots=True)
class Board:
    """A printed board.

    columns, rows   corners where four squares meet, along x and y; one less than the squares.
    square_m        side of a square, m. The intrinsics do not depend on it.
    dictionary      of the markers of a ChArUco board, as OpenCV names it without DICT_.
    marker_ratio    side of a marker as a share of the square's.
    is_legacy       ChArUco board with an even number of rows, as OpenCV made them before 4.6: white at the top left.
    """

    kind: BoardKind
    columns: int
    rows: int
    square_m: float
    dictionary: str = "4x4_50"
    marker_ratio: float = DEFAULT_MARKER_RATIO
    is_legacy: bool = False

    @property
    def num_corners(self) -> int:
        return self.columns * self.rows

    @property
    def num_squares(self) -> tuple[int, int]:
        """Squares along x and y."""
        return self.columns + 1, self.rows + 1

    @property
    def text(self) -> str:
        """As the user writes it."""
        if self.kind is BoardKind.CHESSBOARD:
            return f"chessboard:{self.columns}x{self.rows}"
        across, down = self.num_squares
        legacy = ":legacy" if self.is_legacy else ""
        return f"charuco:{across}x{down}:{self.dictionary}:{self.marker_ratio:g}{legacy}"


@dataclass(frozen=True, slots=True, eq=False)
class BoardView:
    """The corners of a board that were found in one image.

    name           of the image.
    corner_ids     (N,) int64, rising.
    corners_px     (N, 2) float64.
    edge_width_px  how far an edge between a black and a white square is spread out; about 2 in a sharp image.
    """

    name: str
    corner_ids: NDArray[np.int64]
    corners_px: FloatArray
    edge_width_px: float

    def __post_init__(self) -> None:
        if self.corners_px.shape != (len(self.corner_ids), 2):
            raise ValueError(f"corners_px: expected ({len(self.corner_ids)}, 2), got {self.corners_px.shape}")


def parse_board(text: str, square_m: float) -> Board:
    """The board that `text` names; raises CalibrationError that says which part is wrong.

    `chessboard:9x6` counts inner corners, `charuco:10x7[:DICTIONARY][:MARKER_RATIO][:legacy]` counts squares: the
    conventions of OpenCV and of the shops that sell boards.
    """
    if not 1e-4 <= square_m <= 10.0:
        raise CalibrationError(f"--square-m: expected the side of a square, 0.0001 to 10 m, got {square_m:g}")
    kind_name, *parts = text.strip().lower().split(":")
    if kind_name not in [kind.value for kind in BoardKind]:
        raise CalibrationError(f"--board {text}: {kind_name!r} is no kind of board; {_EXPECTED}")
    if not parts:
        raise CalibrationError(f"--board {text}: its size is missing; {_EXPECTED}")
    first, second = _sides(text, parts[0])
    if kind_name == BoardKind.CHESSBOARD.value:
        if len(parts) > 1:
            raise CalibrationError(f"--board {text}: a chessboard has a size and nothing else, got {parts[1]!r}")
        board = Board(BoardKind.CHESSBOARD, first, second, square_m)
    else:
        board = _parse_charuco(text, (first, second), parts[1:], square_m)
    if min(board.columns, board.rows) < 2 or board.num_corners < MIN_CORNERS:
        raise CalibrationError(
            f"--board {text}: {board.columns}x{board.rows} inner corners are too few; a board needs at least 2 each "
            f"way and {MIN_CORNERS} in all"
        )
    return board


def board_points(board: Board) -> FloatArray:
    """(columns * rows, 3) corners in m on the plane z = 0; the first inner corner is the origin."""
    y, x = np.mgrid[: board.rows, : board.columns]
    points = np.stack([x.ravel(), y.ravel(), np.zeros(board.num_corners)], axis=1)
    return points * board.square_m


def find_board(image: NDArray[np.uint8], board: Board, name: str, *, is_live: bool = False) -> BoardView | None:
    """The corners of the board in an image (H, W, 3) RGB or (H, W), refined below the pixel; None without a board.

    is_live  search a smaller image, only once, and do not refine: for guidance, in tens of milliseconds.
    """
    gray = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image, np.uint8)
    found = _find_chessboard(gray, board, is_live) if is_chessboard(board) else _find_charuco(gray, board)
    if found is None:
        return None
    grid = _grid(board, *found)
    if is_live:
        ids, corners = found
        return BoardView(name, ids, corners, edge_width_px(gray, grid))
    clear_share = 1.0 if is_chessboard(board) else 0.5 * (1.0 - board.marker_ratio)
    corners = refined_corners(gray, grid, clear_share).reshape(-1, 2)
    ids = np.flatnonzero(np.isfinite(corners).all(axis=1))
    if len(ids) < MIN_CORNERS // 2:
        return None
    return BoardView(name, ids, corners[ids], edge_width_px(gray, grid))


def is_chessboard(board: Board) -> bool:
    """Whether the board has no markers."""
    return board.kind is BoardKind.CHESSBOARD


# --- chessboard -----------------------------------------------------------------------------------------------------


def _find_chessboard(
    gray: NDArray[np.uint8], board: Board, is_live: bool
) -> tuple[NDArray[np.int64], FloatArray] | None:
    pattern = (board.columns, board.rows)
    scale = min(1.0, _LIVE_WIDTH_PX / max(gray.shape)) if is_live else 1.0
    searched = gray if scale == 1.0 else cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    attempts = [cv2.CALIB_CB_NORMALIZE_IMAGE]
    if not is_live:
        attempts.append(attempts[0] | cv2.CALIB_CB_EXHAUSTIVE)
    for flags in attempts:
        is_found, corners = cv2.findChessboardCornersSB(searched, pattern, flags=flags)
        if is_found and corners is not None and len(corners) == board.num_corners:
            return np.arange(board.num_corners), (corners.reshape(-1, 2).astype(np.float64) + 0.5) / scale - 0.5
    return None


# --- ChArUco --------------------------------------------------------------------------------------------------------


def _find_charuco(gray: NDArray[np.uint8], board: Board) -> tuple[NDArray[np.int64], FloatArray] | None:
    # One marker is enough for a corner at the border of the image, where corners are worth most.
    parameters = cv2.aruco.CharucoParameters()
    parameters.minMarkers = 1
    corners, ids, _, _ = cv2.aruco.CharucoDetector(opencv_charuco(board), parameters).detectBoard(gray)
    if ids is None or corners is None or len(ids) < MIN_CORNERS // 2:
        return None
    order = np.argsort(ids.ravel())
    found = ids.ravel()[order].astype(np.int64)
    points = corners.reshape(-1, 2)[order].astype(np.float64)
    keeps = _lie_on_one_plane(board, found, points)
    return (found[keeps], points[keeps]) if keeps.sum() >= MIN_CORNERS // 2 else None


def opencv_charuco(board: Board) -> cv2.aruco.CharucoBoard:
    """OpenCV's description of a ChArUco board."""
    dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, f"DICT_{board.dictionary.upper()}"))
    made = cv2.aruco.CharucoBoard(board.num_squares, board.square_m, board.square_m * board.marker_ratio, dictionary)
    made.setLegacyPattern(board.is_legacy)
    return made


def _lie_on_one_plane(board: Board, ids: NDArray[np.int64], points: FloatArray) -> NDArray[np.bool_]:
    """Which corners lie about where the others say: a marker read wrongly misplaces its neighbours by whole squares."""
    plane = np.ascontiguousarray(board_points(board)[ids, :2] / board.square_m)
    H, mask = cv2.findHomography(points, plane, cv2.RANSAC, _MAX_BEND_SQUARES)
    return np.zeros(len(ids), np.bool_) if H is None else np.asarray(mask.ravel() > 0)


# --- below the pixel ------------------------------------------------------------------------------------------------


def _grid(board: Board, ids: NDArray[np.int64], points: FloatArray) -> CornerGrid:
    corners = np.full((board.num_corners, 2), np.nan)
    corners[ids] = points
    return CornerGrid(corners.reshape(board.rows, board.columns, 2))


# --- parsing --------------------------------------------------------------------------------------------------------


def _sides(text: str, part: str) -> tuple[int, int]:
    match = _SIDE.fullmatch(part)
    if match is None:
        raise CalibrationError(f"--board {text}: size: expected COLUMNSxROWS such as 9x6, got {part!r}")
    first, second = int(match[1]), int(match[2])
    if max(first, second) > _MAX_SIDE:
        raise CalibrationError(f"--board {text}: size: expected at most {_MAX_SIDE} each way, got {part}")
    return first, second


def _parse_charuco(text: str, squares: tuple[int, int], parts: list[str], square_m: float) -> Board:
    is_legacy = bool(parts) and parts[-1] == "legacy"
    parts = parts[:-1] if is_legacy else parts
    dictionary = parts.pop(0).removeprefix("dict_") if parts and "x" in parts[0] else None
    ratio = _ratio(text, parts.pop(0)) if parts else DEFAULT_MARKER_RATIO
    if parts:
        raise CalibrationError(f"--board {text}: {parts[0]!r} is one part too many; {_EXPECTED}")
    num_markers = squares[0] * squares[1] // 2
    if dictionary is None:
        dictionary = next((name for name in _DICTIONARIES if _num_markers(name) >= num_markers), "4x4_1000")
    if dictionary not in _DICTIONARIES:
        raise CalibrationError(
            f"--board {text}: dictionary: {dictionary!r} is not one of {_DICTIONARIES[0]} to {_DICTIONARIES[-1]} "
            "(sizes 4 5 6 7, counts 50 100 250 1000)"
        )
    if _num_markers(dictionary) < num_markers:
        raise CalibrationError(
            f"--board {text}: dictionary: {dictionary} has {_num_markers(dictionary)} markers, the board needs "
            f"{num_markers}"
        )
    return Board(BoardKind.CHARUCO, squares[0] - 1, squares[1] - 1, square_m, dictionary, ratio, is_legacy)


def _ratio(text: str, part: str) -> float:
    try:
        ratio = float(part)
    except ValueError:
        ratio = float("nan")
    if not 0.3 <= ratio <= 0.95:
        raise CalibrationError(
            f"--board {text}: marker ratio: expected 0.3 to 0.95 of the square's side, or a dictionary such as 4x4_50 "
            f"before it, got {part!r}"
        )
    return ratio


def _num_markers(dictionary: str) -> int:
    return int(dictionary.rpartition("_")[2])
