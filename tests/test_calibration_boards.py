"""Boards of a calibration: their names, paper, corners in images, and the command on images of them."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from calibration_samples import BROWN, CHARUCO, CHESSBOARD, SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rendered_boards import board_poses, charuco, chessboard, pixels_of, rays_of, render

from vo import cli
from vo.calibration_boards import Board, CalibrationError, board_points, find_board, parse_board
from vo.calibration_print import black_areas, lay_out, write_board
from vo.sources.cameras import read_camera

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
