"""The boards and cameras of the tests of calibration."""

from __future__ import annotations

from rendered_boards import SQUARE_M

from vo.calibration_boards import parse_board
from vo.sources.cameras import make_camera
from vo.types import CameraModel

SIZE = (640, 480)
CHESSBOARD = parse_board("chessboard:9x6", SQUARE_M)
CHARUCO = parse_board("charuco:10x7", SQUARE_M)
BROWN = make_camera(SIZE, (520.0, 518.0), (331.0, 236.0), (-0.28, 0.09, 0.0008, -0.0005, -0.012), CameraModel.BROWN)
FISHEYE = make_camera(SIZE, (300.0, 299.0), (326.0, 243.0), (-0.02, 0.006, -0.004, 0.001), CameraModel.FISHEYE)
PINHOLE = make_camera(SIZE, (610.0, 605.0), (322.0, 239.0))
