"""The parts of a calibration: names of boards, paper, corners, least squares, capture, verdict, wrong inputs."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rendered_boards import SQUARE_M, board_poses, charuco, chessboard, pixels_of, rays_of, render

from vo import cli
from vo.calibration import Calibration, calibrate, coverage_of
from vo.calibration_boards import Board, BoardView, CalibrationError, board_points, find_board, parse_board
from vo.calibration_capture import Need, Offer, ViewCollector, pose_2d
from vo.calibration_print import black_areas, lay_out, write_board
from vo.calibration_report import report_json, report_png
from vo.calibration_solver import Lens, Observations, fit
from vo.calibration_verdict import Grade, Measures, judge
from vo.calibration_window import overlay
from vo.sources.cameras import make_camera, read_camera
from vo.types import Camera, CameraModel

SIZE = (640, 480)
CHESSBOARD = parse_board("chessboard:9x6", SQUARE_M)
CHARUCO = parse_board("charuco:10x7", SQUARE_M)
BROWN = make_camera(SIZE, (520.0, 518.0), (331.0, 236.0), (-0.28, 0.09, 0.0008, -0.0005, -0.012), CameraModel.BROWN)
FISHEYE = make_camera(SIZE, (300.0, 299.0), (326.0, 243.0), (-0.02, 0.006, -0.004, 0.001), CameraModel.FISHEYE)
PINHOLE = make_camera(SIZE, (610.0, 605.0), (322.0, 239.0))


def exact_views(camera: Camera, num_views: int, noise_px: float, seed: int = 0) -> list[BoardView]:
    """Views of the chessboard without images: the reference projection plus noise."""
    rng = np.random.default_rng(seed)
    points = board_points(CHESSBOARD)
    return [
        BoardView(
            f"view{i}",
            np.arange(len(points)),
            pixels_of(points, pose, camera) + rng.normal(0.0, noise_px, (len(points), 2)),
            2.0,
        )
        for i, pose in enumerate(board_poses(camera, chessboard(), num_views, seed))
    ]


def moved(view: BoardView, corners_px: NDArray[np.float64]) -> BoardView:
    return replace(view, corners_px=corners_px)


# --- names of boards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "corners", "written"),
    [
        ("chessboard:9x6", (9, 6), "chessboard:9x6"),
        ("charuco:10x7", (9, 6), "charuco:10x7:4x4_50:0.75"),
        ("charuco:12x9", (11, 8), "charuco:12x9:4x4_100:0.75"),
        ("ChArUco:8x6:DICT_5X5_100:0.7", (7, 5), "charuco:8x6:5x5_100:0.7"),
        ("charuco:8x6:0.6", (7, 5), "charuco:8x6:4x4_50:0.6"),
        ("charuco:8x6:legacy", (7, 5), "charuco:8x6:4x4_50:0.75:legacy"),
    ],
)
def test_names_of_boards(text: str, corners: tuple[int, int], written: str) -> None:
    board = parse_board(text, 0.03)
    assert (board.columns, board.rows) == corners
    assert board.text == written
    assert parse_board(board.text, 0.03) == board


@pytest.mark.parametrize(
    ("text", "square_m", "says"),
    [
        ("checkers:9x6", 0.025, "'checkers' is no kind of board"),
        ("chessboard", 0.025, "its size is missing"),
        ("chessboard:9", 0.025, "size: expected COLUMNSxROWS such as 9x6, got '9'"),
        ("chessboard:9x", 0.025, "size: expected COLUMNSxROWS"),
        ("chessboard:99x6", 0.025, "size: expected at most 60"),
        ("chessboard:3x2", 0.025, "3x2 inner corners are too few"),
        ("chessboard:9x6:4x4_50", 0.025, "a chessboard has a size and nothing else, got '4x4_50'"),
        ("charuco:10x7:9x9_50", 0.025, "dictionary: '9x9_50' is not one of"),
        ("charuco:20x20:4x4_50", 0.025, "dictionary: 4x4_50 has 50 markers, the board needs 200"),
        ("charuco:10x7:4x4_50:2", 0.025, "marker ratio: expected 0.3 to 0.95"),
        ("charuco:10x7:4x4_50:x", 0.025, "marker ratio: expected 0.3 to 0.95"),
        ("charuco:10x7:4x4_50:0.7:more", 0.025, "'more' is one part too many"),
        ("chessboard:9x6", 0.0, "--square-m: expected the side of a square"),
        ("chessboard:9x6", float("nan"), "--square-m: expected the side of a square"),
    ],
)
def test_every_wrong_part_of_a_board_is_named(text: str, square_m: float, says: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(says)):
        parse_board(text, square_m)


@given(st.text(alphabet="charuco:essbd0123456789x_.-", max_size=24))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_board_or_one_line(text: str) -> None:
    try:
        assert parse_board(text, 0.02).num_corners >= 12
    except CalibrationError as error:
        assert "\n" not in str(error)


# --- paper -----------------------------------------------------------------------------------------------------------


def drawn(board: Board, cells: int) -> NDArray[np.uint8]:
    """The areas to be printed black as an image of `cells` pixels per square."""
    across, down = board.num_squares
    image = np.full((down * cells, across * cells), 255, np.uint8)
    for x, y, width, height in black_areas(board):
        left, top = round(x * cells), round(y * cells)
        image[top : top + round(height * cells), left : left + round(width * cells)] = 0
    return image


@pytest.mark.parametrize("text", ["charuco:10x7", "charuco:8x6:4x4_50:0.75:legacy", "charuco:7x10"])
def test_printed_board_is_the_one_opencv_draws(text: str) -> None:
    board = parse_board(text, 0.02)
    dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    reference = cv2.aruco.CharucoBoard(board.num_squares, 1.0, 0.75, dictionary)
    reference.setLegacyPattern(board.is_legacy)
    size = (board.num_squares[0] * 8, board.num_squares[1] * 8)
    np.testing.assert_array_equal(drawn(board, 8), reference.generateImage(size, marginSize=0, borderBits=1))


@pytest.mark.parametrize("text", ["chessboard:9x6", "charuco:10x7"])
def test_png_is_to_scale_and_can_be_found(text: str, tmp_path: Path) -> None:
    """The file says how many dots make a metre; corners measured in it are as far apart as squares should be."""
    board = parse_board(text, 0.024)
    sheet = write_board(tmp_path / "board.png", board, "letter")
    content = (tmp_path / "board.png").read_bytes()
    at = content.index(b"pHYs") + 4
    per_metre = struct.unpack(">II", content[at : at + 8])
    assert abs(per_metre[0] * 0.0254 - 600) < 0.1 and per_metre[0] == per_metre[1]
    page = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert page.shape == (round(215.9 / 25.4 * 600), round(279.4 / 25.4 * 600))
    small = np.asarray(cv2.resize(page, None, fx=0.2, fy=0.2, interpolation=cv2.INTER_AREA), np.uint8)
    view = find_board(small, board, "page")
    assert view is not None and len(view.corner_ids) == board.num_corners
    corners_mm = (view.corners_px + 0.5) / small.shape[1] * sheet.width_mm
    truth = board_points(board)[:, :2] * 1e3 + [sheet.left_mm, sheet.height_mm - sheet.bottom_mm - sheet.board_mm[1]]
    errors = np.abs(np.sort(corners_mm, axis=0) - np.sort(truth + sheet.square_mm, axis=0))
    assert errors.max() < 0.05, f"off by {errors.max():.3f} mm on paper"


def test_pdf_is_of_the_paper_and_of_vectors(tmp_path: Path) -> None:
    write_board(tmp_path / "board.pdf", CHARUCO, "a4")
    content = (tmp_path / "board.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ *0 0 ([\d.]+) ([\d.]+) *\]", content)
    assert box is not None
    width_mm, height_mm = (float(number) / 72 * 25.4 for number in box.groups())
    assert (round(width_mm, 1), round(height_mm, 1)) == (297.0, 210.0)
    assert b"/Subtype /Image" not in content
    write_board(tmp_path / "again.pdf", CHARUCO, "a4")
    assert (tmp_path / "again.pdf").read_bytes() == content, "the same board is the same file"


def test_board_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(CalibrationError, match=r"too large for a4; use --square-m 0\.026") as raised:
        lay_out(parse_board("charuco:10x7", 0.05), "a4")
    fitting = float(str(raised.value).partition("--square-m 0.026")[1].split()[1])
    assert lay_out(parse_board("charuco:10x7", fitting), "a4").width_mm == 297.0
    assert lay_out(parse_board("charuco:7x10", fitting), "a4").width_mm == 210.0, "turned as the board is"


# --- corners ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rays() -> NDArray[np.float32]:
    return rays_of(BROWN)


def test_edges_are_as_wide_as_the_blur(rays: NDArray[np.float32]) -> None:
    pose = board_poses(BROWN, chessboard(), 3, seed=3)[2]
    widths = {}
    for blur_px in (0.6, 1.5, 2.5):
        view = find_board(render(chessboard(), pose, BROWN, rays, 0, blur_px=blur_px), CHESSBOARD, "one")
        assert view is not None
        widths[blur_px] = view.edge_width_px
    assert widths[2.5] == pytest.approx(2.5 * np.sqrt(2 * np.pi), rel=0.15)
    assert widths[1.5] == pytest.approx(1.5 * np.sqrt(2 * np.pi), rel=0.15)
    assert widths[0.6] < 2.5
    streaked = find_board(
        render(chessboard(), pose, BROWN, rays, 0, motion_px=(7.0, 0.0)), CHESSBOARD, "motion along one axis"
    )
    assert streaked is not None and 5.0 < streaked.edge_width_px < 9.0, "the blurrier direction counts"


@pytest.mark.parametrize("blur", [{"blur_px": 0.4}, {"blur_px": 1.5}, {"blur_px": 0.6, "motion_px": (4.0, 2.0)}])
def test_corners_are_unbiased_under_blur(rays: NDArray[np.float32], blur: dict[str, object]) -> None:
    errors = []
    for seed, pose in enumerate(board_poses(BROWN, charuco(), 4, seed=6)):
        view = find_board(render(charuco(), pose, BROWN, rays, seed, **blur), CHARUCO, "one")  # type: ignore[arg-type]
        if view is None:  # the markers of a distant board are lost in the blur
            continue
        errors.append(view.corners_px - pixels_of(board_points(CHARUCO)[view.corner_ids], pose, BROWN))
    assert len(errors) >= 2
    distances = np.linalg.norm(np.concatenate(errors), axis=1)
    assert np.abs(np.median(np.concatenate(errors), axis=0)).max() < 0.01
    assert np.median(distances) < 0.05


def test_part_of_a_charuco_board_is_enough(rays: NDArray[np.float32]) -> None:
    pose = board_poses(BROWN, charuco(), 3, seed=6)[2]
    image = render(charuco(), pose, BROWN, rays, 0)
    corners = pixels_of(board_points(CHARUCO), pose, BROWN)
    hidden = image.copy()
    hidden[:, : int(np.median(corners[:, 0]))] = 90
    view = find_board(hidden, CHARUCO, "half")
    assert view is not None and 12 <= len(view.corner_ids) < 40
    assert np.linalg.norm(view.corners_px - corners[view.corner_ids], axis=1).max() < 0.3
    hidden[:] = 90
    assert find_board(hidden, CHARUCO, "nothing") is None
    assert find_board(hidden, CHESSBOARD, "nothing") is None


# --- least squares ---------------------------------------------------------------------------------------------------


def test_the_same_minimum_as_opencv() -> None:
    """cv2.calibrateCamera minimises the same sum without weights: same parameters, same deviations."""
    views = exact_views(BROWN, 12, 0.05)
    points = board_points(CHESSBOARD)
    observed = [Observations(points, view.corners_px) for view in views]
    ours = fit(Lens(CameraModel.BROWN, 5), observed, SIZE, huber_px=np.inf)
    rms, K, coefficients, _, _, deviations, _, _ = cv2.calibrateCameraExtended(
        [points.astype(np.float32)] * len(views),
        [view.corners_px[:, None].astype(np.float32) for view in views],
        SIZE,
        None,
        None,
        criteria=(cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 200, 1e-12),
    )
    theirs = np.concatenate([K[[0, 1, 0, 1], [0, 1, 2, 2]], coefficients.ravel()])
    np.testing.assert_allclose(ours.theta, theirs, atol=0.01 * ours.deviations.max(), rtol=2e-4)
    np.testing.assert_allclose(ours.deviations, deviations.ravel()[[0, 1, 2, 3, 4, 5, 6, 7, 8]], rtol=0.1)
    squares = np.concatenate([(r**2).sum(axis=1) for r in ours.residuals])
    assert np.sqrt(squares.mean()) <= rms * 1.0001


@given(
    focal=st.floats(0.45, 2.5),
    aspect=st.floats(0.97, 1.03),
    centre=st.tuples(st.floats(-0.05, 0.05), st.floats(-0.05, 0.05)),
    k1=st.floats(-0.25, 0.15),
    is_fisheye=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_exact_corners_give_the_exact_camera(
    focal: float, aspect: float, centre: tuple[float, float], k1: float, is_fisheye: bool
) -> None:
    """Whatever the camera: without noise, it is found."""
    lens = Lens(CameraModel.FISHEYE, 4) if is_fisheye else Lens(CameraModel.BROWN, 4)
    distortion = (0.2 * k1, 0.0, 0.0, 0.0) if is_fisheye else (min(k1, 0.0) if focal < 0.9 else k1, 0.0, 1e-4, -2e-4)
    if not is_fisheye and focal < 0.9:
        distortion = (max(distortion[0], -0.05), *distortion[1:])
    K = ((focal * 640, focal * 640 * aspect), (319.5 + centre[0] * 640, 239.5 + centre[1] * 480))
    camera = make_camera(SIZE, *K, distortion, lens.model)
    observed = [Observations(board_points(CHESSBOARD), view.corners_px) for view in exact_views(camera, 10, 0.0, 3)]
    made = fit(lens, observed, SIZE)
    assert max(np.abs(r).max() for r in made.residuals) < 1e-3
    np.testing.assert_allclose(made.camera.K, camera.K, rtol=1e-4, atol=0.05)


@pytest.mark.parametrize(
    ("camera", "title"), [(PINHOLE, "pinhole"), (BROWN, "brown with 5 coefficients"), (FISHEYE, "fisheye")]
)
def test_the_model_is_chosen_by_views_not_seen(camera: Camera, title: str) -> None:
    calibration = calibrate(exact_views(camera, 24, 0.03), CHESSBOARD, SIZE)
    assert calibration.title == title
    assert {"fx", "fy", "cx", "cy"} <= set(calibration.deviations)


def test_deviations_are_those_of_repeated_calibrations() -> None:
    """Calibrations with other noise scatter as each of them says."""
    exact = exact_views(PINHOLE, 8, 0.0)
    made = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        noisy = [moved(view, view.corners_px + rng.normal(0.0, 0.05, view.corners_px.shape)) for view in exact]
        made.append(calibrate(noisy, CHESSBOARD, SIZE, model="pinhole"))
    focal = np.array([calibration.camera.K[0, 0] for calibration in made])
    stated = float(np.median([calibration.deviations["fx"] for calibration in made]))
    assert 0.4 < focal.std(ddof=1) / stated < 2.0


# --- contradictions --------------------------------------------------------------------------------------------------


def test_swapped_corners_are_dropped_and_a_wrong_view_is() -> None:
    views = exact_views(BROWN, 20, 0.03)
    swapped = views[3].corners_px.copy()
    swapped[[5, 20]] = swapped[[20, 5]]
    views[3] = moved(views[3], swapped)
    rng = np.random.default_rng(1)
    views[7] = moved(views[7], views[7].corners_px + rng.normal(0.0, 1.0, (54, 2)))
    views[11] = moved(views[11], views[11].corners_px + 0.5 * np.sin(views[11].corners_px[:, ::-1] / 40.0))
    views[15] = replace(views[15], edge_width_px=9.0)
    calibration = calibrate(views, CHESSBOARD, SIZE)
    reasons = {view.name: view.reason for view in calibration.views if not view.is_used}
    assert set(reasons) == {"view7", "view11", "view15"}
    assert "miss the model" in reasons["view7"] and "blurred: edges 9.0 px wide" in reasons["view15"]
    assert calibration.num_corners_dropped == 2
    assert abs(calibration.camera.K[0, 0] - 520.0) < 0.5
    tree = json.loads(report_json(calibration))
    assert sum(view["is_used"] for view in tree["views"]) == 17


def test_most_views_wrong_is_said() -> None:
    """Half of the views from another camera: whatever is chosen, nobody is told that it is good."""
    views = exact_views(BROWN, 7, 0.03) + [
        replace(view, name=f"other {view.name}") for view in exact_views(PINHOLE, 7, 0.03, seed=1)
    ]
    assert calibrate(views, CHESSBOARD, SIZE).verdict.grade is not Grade.GOOD


def test_views_that_tell_nothing_of_the_focal_length() -> None:
    """A board that is never tilted: any focal length explains it with another distance."""
    points = board_points(CHESSBOARD)
    rng = np.random.default_rng(0)
    views = []
    for i in range(8):
        pose = np.eye(4)
        pose[:3, 3] = rng.uniform(-0.05, 0.05) - 0.1, rng.uniform(-0.03, 0.03) - 0.06, 0.5
        pixels = pixels_of(points, pose, PINHOLE) + rng.normal(0.0, 0.03, (54, 2))
        views.append(BoardView(f"view{i}", np.arange(54), pixels, 2.0))
    with pytest.raises(CalibrationError, match="do not determine the focal length"):
        calibrate(views, CHESSBOARD, SIZE, model="pinhole")


@pytest.mark.parametrize("num_views", [0, 1, 4])
def test_too_few_views(num_views: int) -> None:
    missing = [("a.png", "no chessboard:9x6 found"), ("b.png", "unreadable: cut short")]
    with pytest.raises(CalibrationError, match=rf"{num_views} views of the board can be used, 5 are needed") as raised:
        calibrate(exact_views(BROWN, num_views, 0.0) if num_views else [], CHESSBOARD, SIZE, without_board=missing)
    assert "1 x unreadable" in str(raised.value)


# --- verdict ---------------------------------------------------------------------------------------------------------

GOOD = Measures(
    width_px=640,
    num_views=30,
    num_dropped=2,
    rms_px=0.1,
    cross_validated_px=0.11,
    focal_percent=0.05,
    uncertainty_px=0.1,
    coverage=0.9,
    edge_width_px=2.2,
    num_tilted=20,
    folds=False,
)


@pytest.mark.parametrize(
    ("name", "usable", "poor", "says"),
    [
        ("num_views", 12, 6, "views were used"),
        ("num_dropped", 15, 40, "had to be dropped"),
        ("rms_px", 0.5, 1.5, "miss the model"),
        ("cross_validated_px", 0.2, 0.5, "left out fit worse"),
        ("focal_percent", 0.5, 3.0, "focal length"),
        ("uncertainty_px", 1.0, 5.0, "directions"),
        ("coverage", 0.6, 0.2, "of the image only"),
        ("edge_width_px", 5.0, 9.0, "blurred"),
        ("num_tilted", 4, 0, "tilted"),
    ],
)
def test_every_measure_can_spoil_the_verdict(name: str, usable: float, poor: float, says: str) -> None:
    assert judge(GOOD).grade is Grade.GOOD
    for value, grade in ((usable, Grade.USABLE), (poor, Grade.POOR)):
        verdict = judge(replace(GOOD, **{name: value}))  # type: ignore[arg-type]
        assert verdict.grade is grade, (name, value, verdict.lines())
        assert any(says in line and ": " in line for line in verdict.lines()[1:])
    assert judge(replace(GOOD, folds=True)).grade is Grade.POOR


# --- capture ---------------------------------------------------------------------------------------------------------


def offer_twice(collector: ViewCollector, view: BoardView) -> Offer:
    """The first image of a new place is in motion against the one before; the second stands still."""
    collector.consider(view)
    offer = collector.consider(view)
    if offer is Offer.KEPT:
        collector.keep(view)
    return offer


def test_a_view_is_kept_once_sharp_and_still() -> None:
    collector = ViewCollector(CHESSBOARD, SIZE)
    first, second = exact_views(BROWN, 2, 0.0, seed=2)
    assert collector.consider(None) is Offer.NO_BOARD
    assert collector.consider(first) is Offer.MOVING
    assert collector.consider(moved(first, first.corners_px + 8.0)) is Offer.MOVING
    assert offer_twice(collector, first) is Offer.KEPT
    assert offer_twice(collector, first) is Offer.SIMILAR
    assert offer_twice(collector, replace(second, edge_width_px=12.0)) is Offer.BLURRED
    assert offer_twice(collector, second) is Offer.KEPT
    assert [view.name for view in collector.views] == ["view0", "view1"]


def obeying(instruction: str, collector: ViewCollector, views: list[BoardView]) -> BoardView:
    """Of the views that a user can show, the one that does best what is asked."""
    poses = [pose_2d(view, CHESSBOARD, SIZE) for view in views]
    sought = {
        Need.TILT_LEFT.value: lambda pose: -pose.turn_x,
        Need.TILT_RIGHT.value: lambda pose: pose.turn_x,
        Need.TILT_UP.value: lambda pose: -pose.turn_y,
        Need.TILT_DOWN.value: lambda pose: pose.turn_y,
        Need.NEAR.value: lambda pose: -pose.size,
        Need.FAR.value: lambda pose: pose.size,
    }
    cell = collector.target_cell()
    if instruction in sought:
        scores = [sought[instruction](pose) for pose in poses]
    elif cell is not None:
        middle = (np.array(cell) + 0.5) * [640 / 8, 480 / 6]
        scores = [float(np.linalg.norm(view.corners_px - middle, axis=1).min()) for view in views]
    else:
        scores = [0.0] * len(views)
    return views[int(np.argmin(scores))]


def test_guidance_leads_to_a_complete_set_in_few_views() -> None:
    """A user who does what is asked: the set is complete, covers the image, and has tilts each way, near and far."""
    collector = ViewCollector(CHESSBOARD, SIZE, target=20)
    can_do = exact_views(BROWN, 120, 0.0, seed=9)
    asked = []
    while not collector.is_complete and can_do:
        asked.append(collector.instruction())
        view = obeying(asked[-1], collector, can_do)
        can_do.remove(view)
        offer_twice(collector, view)
    assert collector.is_complete and collector.instruction() == "done"
    assert 20 <= len(collector.views) < 30 and len(asked) < 60
    assert collector.progress == 1.0 and not collector.needs()
    assert any("corner of the image" in text or "edge of the image" in text for text in asked)
    assert any("tilt the board" in text for text in asked)
    assert collector.consider(view) is Offer.COMPLETE


@pytest.mark.parametrize(
    ("turn", "need"),
    [
        ((0.0, 0.5, 0.0), Need.TILT_LEFT),
        ((0.0, -0.5, 0.0), Need.TILT_RIGHT),
        ((-0.5, 0.0, 0.0), Need.TILT_UP),
        ((0.5, 0.0, 0.0), Need.TILT_DOWN),
    ],
)
def test_instructions_name_the_right_edge(turn: tuple[float, float, float], need: Need) -> None:
    """Three views tilted as one instruction says are what it stops asking for; and that edge is further away."""
    collector = ViewCollector(CHESSBOARD, SIZE)
    R = cv2.Rodrigues(np.array(turn))[0]
    points = board_points(CHESSBOARD)
    away = points - points.mean(axis=0)
    depth = (away @ R.T)[:, 2].reshape(6, 9)
    edges = {
        Need.TILT_LEFT: depth[:, 0],
        Need.TILT_RIGHT: depth[:, -1],
        Need.TILT_UP: depth[0],
        Need.TILT_DOWN: depth[-1],
    }
    assert edges[need].mean() == max(edge.mean() for edge in edges.values())
    for x in (-0.05, 0.0, 0.05):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = R, np.array([x, 0.0, 0.5]) - R @ points.mean(axis=0)
        collector.keep(BoardView("one", np.arange(54), pixels_of(points, pose, PINHOLE), 2.0))
    assert need not in collector.needs()
    assert len([other for other in edges if other in collector.needs()]) == 3


def test_target_cell_is_where_nothing_was_seen() -> None:
    collector = ViewCollector(CHESSBOARD, SIZE)
    rng = np.random.default_rng(0)
    grid = rng.uniform([0, 0], [420, 480], (54, 2))
    collector.keep(BoardView("left", np.arange(54), grid, 2.0))
    view = exact_views(PINHOLE, 1, 0.0)[0]
    assert pose_2d(view, CHESSBOARD, SIZE) is not None
    for _ in range(3):
        collector.keep(moved(view, view.corners_px * [0.6, 1.0]))
    cell = collector.target_cell()
    assert cell is not None and cell[0] >= 5, "the right of the image is empty"


@given(st.lists(st.tuples(st.floats(-50, 700), st.floats(-50, 500)), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_coverage_counts_cells(corners: list[tuple[float, float]]) -> None:
    covered = coverage_of(np.array(corners), *SIZE)
    assert covered.shape == (6, 8)
    assert 1 <= covered.sum() <= len(corners)


def test_overlay_shows_image_corners_and_words() -> None:
    collector = ViewCollector(CHESSBOARD, SIZE)
    view = exact_views(BROWN, 1, 0.0)[0]
    plain = np.full((960, 1280, 3), 60, np.uint8)
    shown = overlay(plain, None, collector, Offer.NO_BOARD)
    assert shown.shape == (720 + 64, 960, 3)
    with_board = overlay(plain, view, collector, Offer.KEPT)
    assert (with_board != shown).any(axis=2).sum() > 54 * 9
    collector.keep(view)
    assert (overlay(plain[..., 0].copy(), view, collector, Offer.SIMILAR)[:6, :10] > 0).any(), "the bar has begun"


# --- the command -----------------------------------------------------------------------------------------------------


def vo(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert vo(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("vo: error: "), err
    return err


@pytest.fixture(scope="module")
def pictures(rays: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of the ChArUco board, one of nothing, and one that is no image."""
    directory = tmp_path_factory.mktemp("pictures")
    for number, pose in enumerate(board_poses(BROWN, charuco(), 9, seed=1, lets_cut=True)):
        cv2.imwrite(str(directory / f"view{number}.png"), render(charuco(), pose, BROWN, rays, number))
    cv2.imwrite(str(directory / "wall.png"), np.full((480, 640), 90, np.uint8))
    (directory / "broken.jpg").write_bytes(b"no image")
    return directory


def test_camera_file_and_report_from_a_directory(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "camera.yaml"
    assert vo("calibrate", pictures, "-o", output, "--picture", tmp_path / "picture.png") == 0
    printed = capsys.readouterr().out
    assert "verdict       " in printed and "left out      wall.png: no charuco:10x7" in printed
    read = read_camera(output).camera
    assert (read.width, read.height) == SIZE and abs(read.K[0, 0] - 520.0) < 5.0
    report = json.loads((tmp_path / "new" / "camera.calibration.json").read_text())
    assert report["camera"]["fx"] == read.K[0, 0]
    assert {view["name"] for view in report["views"] if not view["is_used"]} >= {"wall.png", "broken.jpg"}
    assert report["verdict"] in printed
    assert cv2.imread(str(tmp_path / "picture.png")).shape[2] == 3


def test_what_is_not_good_enough_is_written_and_strict_fails(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number in range(6):
        (few / f"view{number}.png").write_bytes((pictures / f"view{number}.png").read_bytes())
    output = tmp_path / "camera.yaml"
    assert vo("calibrate", few, "-o", output, "--json", "--quiet") == 0
    assert json.loads(capfd.readouterr().out)["verdict"] == "not good enough"
    assert "# WARNING: 6 views were used" in output.read_text()
    read_camera(output)
    said = refused(capfd, "calibrate", few, "-o", output, "--quiet", "--strict")
    assert "written, but not good enough" in said


def test_wrong_input_is_one_line(pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "camera.yaml"
    empty = tmp_path / "mixed"
    empty.mkdir()
    cv2.imwrite(str(empty / "a.png"), np.zeros((48, 64), np.uint8))
    assert "no charuco:10x7:4x4_50:0.75 in any of 1 images" in refused(
        capfd, "calibrate", empty, "-o", output, "--quiet"
    )
    cv2.imwrite(str(empty / "b.png"), np.zeros((40, 64), np.uint8))
    assert "b.png has 64x40 px, a.png 64x48 px" in refused(capfd, "calibrate", empty, "-o", output, "--quiet")
    assert "SOURCE is missing" in refused(capfd, "calibrate", "-o", output)
    assert "no such file" in refused(capfd, "calibrate", tmp_path / "nowhere", "-o", output, "--quiet")
    assert "'go' is no kind of board" in refused(capfd, "calibrate", pictures, "--board", "go:19x19")
    assert "to a .pdf or .png" in refused(capfd, "calibrate", "--print-board", tmp_path / "board.svg")
    blocked = tmp_path / "file"
    blocked.touch()
    assert "cannot write" in refused(capfd, "calibrate", pictures, "-o", blocked / "camera.yaml", "--quiet")
    assert not output.exists()


def test_board_is_printed_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vo("calibrate", "--print-board", tmp_path / "board.pdf", "--board", "chessboard:9x6") == 0
    assert (tmp_path / "board.pdf").stat().st_size > 5000
    assert "squares of 25 mm" in capsys.readouterr().out


def test_video_is_watched_like_a_camera(
    rays: NDArray[np.float32], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every pose is held for two frames; the views are saved, and give the same camera again."""
    poses = board_poses(BROWN, charuco(), 8, seed=1, lets_cut=True)
    writer = cv2.VideoWriter(str(tmp_path / "board.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10.0, SIZE, isColor=True)
    for number, pose in enumerate(poses):
        image = render(charuco(), pose, BROWN, rays, number)
        for _ in range(2):
            writer.write(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    writer.release()
    output = tmp_path / "camera.yaml"
    assert vo("calibrate", tmp_path / "board.avi", "-o", output, "--save-images", tmp_path / "kept") == 0
    assert "move the board to the" in capfd.readouterr().err
    assert len(list((tmp_path / "kept").glob("view_*.png"))) >= 7
    first = read_camera(output).camera
    assert vo("calibrate", tmp_path / "kept", "-o", output, "--quiet") == 0
    np.testing.assert_allclose(read_camera(output).camera.K, first.K, rtol=2e-3)


def test_picture_of_a_fisheye_has_places_that_it_does_not_see() -> None:
    calibration: Calibration = calibrate(exact_views(FISHEYE, 12, 0.02), CHESSBOARD, SIZE, model="fisheye")
    assert report_png(calibration).startswith(b"\x89PNG")
    assert "NaN" not in report_json(calibration)
