"""Draws docs/calibration.png: the live view of `vo calibrate` in the middle of its work, and the picture it ends with.

A camera with known intrinsics looks at the printed board, without anybody in the room:

    python tools/draw_calibration.py --output docs/calibration.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.calibration import calibrate
from vo.calibration_boards import Board, find_board, parse_board
from vo.calibration_capture import Offer, ViewCollector
from vo.calibration_print import black_areas
from vo.calibration_report import report_png
from vo.calibration_window import overlay

SIZE = (640, 480)
K = np.array([[560.0, 0.0, 322.0], [0.0, 558.0, 238.0], [0.0, 0.0, 1.0]])
CELLS = 64
NUM_SHOWN = 8
NUM_VIEWS = 30
WIDTH_PX = 1000

Image = NDArray[np.uint8]


def page(board: Board) -> Image:
    """The board on white paper, one square wider on every side, CELLS pixels to a square."""
    across, down = board.num_squares
    image = np.full(((down + 2) * CELLS, (across + 2) * CELLS), 235, np.uint8)
    for x, y, width, height in black_areas(board):
        top, left = round((y + 1) * CELLS), round((x + 1) * CELLS)
        image[top : top + round(height * CELLS), left : left + round(width * CELLS)] = 25
    return image


def photograph(paper: Image, board: Board, rng: np.random.Generator) -> Image:
    """The page at a random tilt somewhere in the image, over a gray wall, with noise."""
    tilt, direction = rng.uniform(0.2, 0.7), rng.uniform(0.0, 2 * np.pi)
    R = cv2.Rodrigues(np.array([np.cos(direction), np.sin(direction), rng.normal(0.0, 0.2)]) * tilt)[0]
    depth = rng.uniform(12.0, 26.0)
    target = np.linalg.inv(K) @ [*rng.uniform([60.0, 60.0], [580.0, 420.0]), 1.0] * depth
    middle = 0.5 * np.array([*board.num_squares, 0.0])
    # Pixels of the page to squares of the board, to the camera.
    to_squares = np.array([[1 / CELLS, 0.0, -1.0 + 0.5 / CELLS], [0.0, 1 / CELLS, -1.0 + 0.5 / CELLS], [0.0, 0.0, 1.0]])
    H = K @ np.column_stack([R[:, 0], R[:, 1], target - R @ middle]) @ to_squares
    # Drawn four times as large and shrunk, or its edges would be jagged.
    large = np.array([[4.0, 0.0, 1.5], [0.0, 4.0, 1.5], [0.0, 0.0, 1.0]]) @ H
    drawn = cv2.warpPerspective(
        paper, large, (4 * SIZE[0], 4 * SIZE[1]), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_CONSTANT, borderValue=95.0
    )
    image = cv2.resize(drawn, SIZE, interpolation=cv2.INTER_AREA).astype(np.float64) + rng.normal(0.0, 1.0, SIZE[::-1])
    return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/calibration.png"))
    options = parser.parse_args()
    board = parse_board("charuco:10x7", 0.025)
    collector, paper, rng = ViewCollector(board, SIZE, NUM_VIEWS), page(board), np.random.default_rng(4)
    shown = None
    while len(collector.views) < NUM_VIEWS:
        image = photograph(paper, board, rng)
        view = find_board(image, board, f"view {len(collector.views)}")
        if collector.consider(view, is_live=False) is not Offer.KEPT or view is None:
            continue
        collector.keep(view)
        if len(collector.views) == NUM_SHOWN:
            shown = overlay(image, view, collector, Offer.KEPT)
    assert shown is not None
    calibration = calibrate(collector.views, board, SIZE)
    report = cv2.imdecode(np.frombuffer(report_png(calibration), np.uint8), cv2.IMREAD_COLOR)
    height = round(WIDTH_PX / sum(part.shape[1] / part.shape[0] for part in (shown, report)))
    scaled = [
        cv2.resize(part, (round(part.shape[1] * height / part.shape[0]), height), interpolation=cv2.INTER_AREA)
        for part in (shown, report)
    ]
    canvas = np.concatenate(scaled, axis=1)
    if not cv2.imwrite(str(options.output), canvas, [cv2.IMWRITE_PNG_COMPRESSION, 9]):
        raise SystemExit(f"{options.output}: cannot write")


if __name__ == "__main__":
    main()
