"""Which live views to keep, and where the board should go next. Pure: no window, no clock, no camera.

A view is kept when it is sharp, when the board stands still, and when it shows the board where, as large as, or tilted
as no kept view does. Corners everywhere fix the distortion, tilted and near boards the focal length.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.calibration import COVERAGE_CELLS, coverage_of
from vo.calibration_boards import Board, BoardView, board_points
from vo.calibration_verdict import blur_limit_px
from vo.types import FloatArray

TARGET_VIEWS = 30
_GUESSED_FOV_RAD = np.deg2rad(65.0)
_TILT_RAD = np.deg2rad(18.0)
_NEAR, _FAR = 0.55, 0.35
_VIEWS_PER_NEED = 3
_MAX_MOTION = 0.004
_MIN_DIFFERENCE = 0.16
_WANTED_COVERAGE = 0.85


class Offer(Enum):
    """What became of an image."""

    KEPT = "kept"
    NO_BOARD = "no board in view"
    BLURRED = "blurred: hold still, more light, or focus"
    MOVING = "hold still"
    SIMILAR = "like a view that is kept"
    COMPLETE = "all views are there"


class Need(Enum):
    """What the views so far lack, as an instruction."""

    TILT_LEFT = "tilt the board: its left edge away from the camera"
    TILT_RIGHT = "tilt the board: its right edge away from the camera"
    TILT_UP = "tilt the board: its upper edge away from the camera"
    TILT_DOWN = "tilt the board: its lower edge away from the camera"
    NEAR = "bring the board nearer"
    FAR = "take the board further away"


@dataclass(frozen=True, slots=True)
class Pose2D:
    """How a board lies in an image.

    x, y            middle of the board, as shares of width and height.
    size            its diagonal as a share of the image's.
    turn_x, turn_y  components of its normal to the right and down, radians; from a guessed focal length, good enough to
                    tell views apart. Positive turn_x: the left edge is further away.
    """

    x: float
    y: float
    size: float
    turn_x: float
    turn_y: float

    def difference(self, other: Pose2D) -> float:
        """Distance to another view; 1 is across the image, or a turn of a radian."""
        mine = np.array([self.x, self.y, self.size, self.turn_x, self.turn_y])
        theirs = np.array([other.x, other.y, other.size, other.turn_x, other.turn_y])
        return float(np.linalg.norm(mine - theirs))


class ViewCollector:
    """The views kept so far, and what they still lack."""

    def __init__(self, board: Board, size: tuple[int, int], target: int = TARGET_VIEWS) -> None:
        self.views: list[BoardView] = []
        self._board = board
        self._size = size
        self._target = target
        self._poses: list[Pose2D] = []
        self._previous: BoardView | None = None
        self._sharpest_px = np.inf

    @property
    def covered(self) -> NDArray[np.bool_]:
        """(rows, columns) cells of the image in which there are corners."""
        corners = [view.corners_px for view in self.views]
        return coverage_of(np.concatenate(corners) if corners else np.empty((0, 2)), *self._size)

    @property
    def progress(self) -> float:
        """0 to 1: views and coverage, whichever is further behind."""
        return min(1.0, len(self.views) / self._target, float(self.covered.mean()) / _WANTED_COVERAGE)

    @property
    def is_complete(self) -> bool:
        """Enough views, of every kind; or half as many again, where the image cannot be covered."""
        is_full = len(self.views) >= self._target and self.progress >= 1.0 and not self.needs()
        return is_full or len(self.views) >= self._target + self._target // 2

    def consider(self, view: BoardView | None, *, is_live: bool = True) -> Offer:
        """Whether to keep a view; the caller hands the refined one to `keep`. It has to stand still if `is_live`.

        Only what differs from the views kept is worth keeping; of a region that has no corners yet, more is.
        """
        previous, self._previous = self._previous, view
        if view is None:
            return Offer.NO_BOARD
        if self.is_complete:
            return Offer.COMPLETE
        self._sharpest_px = min(self._sharpest_px, view.edge_width_px)
        if view.edge_width_px > max(blur_limit_px(self._size[0]), 1.5 * self._sharpest_px):
            return Offer.BLURRED
        if is_live and not self._is_still(previous, view):
            return Offer.MOVING
        pose = pose_2d(view, self._board, self._size)
        if pose is None or self._is_similar(pose, view):
            return Offer.SIMILAR
        return Offer.KEPT

    def keep(self, view: BoardView) -> None:
        """Adds a view."""
        pose = pose_2d(view, self._board, self._size)
        if pose is not None:
            self.views.append(view)
            self._poses.append(pose)

    def needs(self) -> list[Need]:
        """The kinds of views of which there are too few."""
        turns = np.array([[pose.turn_x, pose.turn_y, pose.size] for pose in self._poses]).reshape(-1, 3)
        counts = {
            Need.TILT_LEFT: turns[:, 0] > _TILT_RAD,
            Need.TILT_RIGHT: turns[:, 0] < -_TILT_RAD,
            Need.TILT_UP: turns[:, 1] > _TILT_RAD,
            Need.TILT_DOWN: turns[:, 1] < -_TILT_RAD,
            Need.NEAR: turns[:, 2] > _NEAR,
            Need.FAR: turns[:, 2] < _FAR,
        }
        return [need for need, has in counts.items() if has.sum() < _VIEWS_PER_NEED]

    def target_cell(self) -> tuple[int, int] | None:
        """(column, row) in the middle of the largest region without corners; None where enough is covered."""
        covered = self.covered
        if covered.mean() >= _WANTED_COVERAGE:
            return None
        open_cells = np.pad((~covered).astype(np.uint8), 1)
        depth = cv2.distanceTransform(open_cells, cv2.DIST_L1, 3)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        return int(column), int(row)

    def instruction(self) -> str:
        """What to do next, in one line."""
        if self.is_complete:
            return "done"
        cell = self.target_cell()
        # Tilts come in between, or all views of one place would be taken before the next.
        needs = self.needs()
        if cell is not None and (not needs or len(self.views) % 2 == 0):
            return f"move the board to the {_place(cell)} of the image"
        if needs:
            return needs[(len(self.views) // 2) % len(needs)].value
        return "move the board to a new place, with another tilt"

    def _is_still(self, previous: BoardView | None, view: BoardView) -> bool:
        """Whether the corners seen in both images moved by less than 0.4 % of the image's width."""
        if previous is None:
            return False
        _, old, new = np.intersect1d(previous.corner_ids, view.corner_ids, return_indices=True)
        if len(old) == 0:
            return False
        motion = np.linalg.norm(view.corners_px[new] - previous.corners_px[old], axis=1)
        return bool(np.median(motion) < _MAX_MOTION * self._size[0])

    def _is_similar(self, pose: Pose2D, view: BoardView) -> bool:
        nearest = min((pose.difference(other) for other in self._poses), default=np.inf)
        if nearest >= _MIN_DIFFERENCE:
            return False
        is_new = coverage_of(view.corners_px, *self._size) & ~self.covered
        return not (is_new.any() and nearest >= 0.4 * _MIN_DIFFERENCE)


def pose_2d(view: BoardView, board: Board, size: tuple[int, int]) -> Pose2D | None:
    """Where and how a board lies in the image, from a guessed field of view; None for corners on one line."""
    points = board_points(board)[view.corner_ids] / board.square_m
    width, height = size
    focal_px = 0.5 * width / np.tan(0.5 * _GUESSED_FOV_RAD)
    K = np.array([[focal_px, 0.0, 0.5 * (width - 1)], [0.0, focal_px, 0.5 * (height - 1)], [0.0, 0.0, 1.0]])
    try:
        is_found, rotation, translation = cv2.solvePnP(
            points, np.ascontiguousarray(view.corners_px), K, None, flags=cv2.SOLVEPNP_IPPE
        )
    except cv2.error:
        return None
    if not is_found:
        return None
    R, t = cv2.Rodrigues(rotation)[0], np.asarray(translation).ravel()
    normal: FloatArray = R[:, 2] * np.sign(R[2, 2] or 1.0)
    outline = np.array([[-1.0, -1.0], [board.columns, -1.0], [board.columns, board.rows], [-1.0, board.rows]])
    H, _ = cv2.findHomography(points[:, :2], np.ascontiguousarray(view.corners_px), 0)
    if H is None or not np.isfinite(t).all():
        return None
    corners = cv2.perspectiveTransform(outline[:, None], H)[:, 0]
    middle = view.corners_px.mean(axis=0)
    diagonal = 0.5 * (np.linalg.norm(corners[2] - corners[0]) + np.linalg.norm(corners[3] - corners[1]))
    return Pose2D(
        float(middle[0] / width),
        float(middle[1] / height),
        float(min(diagonal / np.hypot(width, height), 2.0)),
        float(np.arcsin(np.clip(normal[0], -1.0, 1.0))),
        float(np.arcsin(np.clip(normal[1], -1.0, 1.0))),
    )


def _place(cell: tuple[int, int]) -> str:
    columns, rows = COVERAGE_CELLS
    across = ("left", "middle", "right")[min(2, 3 * cell[0] // columns)]
    down = ("upper", "middle", "lower")[min(2, 3 * cell[1] // rows)]
    if across == "middle" and down == "middle":
        return "middle"
    if down == "middle":
        return f"{across} edge"
    if across == "middle":
        return f"{down} edge"
    return f"{down} {across} corner"
