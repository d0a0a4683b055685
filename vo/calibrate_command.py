"""`vo calibrate`: from a camera, a video or a directory of images of a board to a camera.yaml."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.calibration import Calibration, calibrate
from vo.calibration_boards import Board, BoardView, CalibrationError, find_board, parse_board
from vo.calibration_capture import Offer, ViewCollector
from vo.calibration_print import write_board
from vo.calibration_report import report_comment, report_json, report_lines, report_png
from vo.calibration_verdict import MIN_VIEWS, Grade
from vo.calibration_window import CalibrationWindow
from vo.output import prepare_directory, write_atomically, writing
from vo.progress import progress
from vo.sources import Source, open_source
from vo.sources.cameras import write_camera
from vo.sources.decode import UnreadableImageError, read_image
from vo.sources.images import list_images
from vo.view_command import ViewerError, check_display

Image = NDArray[np.uint8]
_ANY_FOV_DEG = 65.0
_LINE_PERIOD_S = 2.0


@dataclass(frozen=True, slots=True)
class CalibrateRequest:
    """What the user asked for.

    source       a directory of images, or any source of frames; None to print a board.
    print_board  where to write the page with the board, and nothing else is done.
    num_views    how many live views to take.
    save_images  where to keep the images that live views were taken from.
    picture      PNG with corners, residuals and uncertainty.
    is_strict    a calibration that is not good enough is an error.
    """

    source: str | None
    board: str
    square_m: float
    output: Path
    model: str = "auto"
    print_board: Path | None = None
    paper: str = "a4"
    num_views: int = 30
    save_images: Path | None = None
    picture: Path | None = None
    is_headless: bool = False
    is_strict: bool = False
    is_json: bool = False
    is_quiet: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Collected:
    """Views of the board, images without one (name, reason), and the size of all images (width, height) px."""

    views: list[BoardView]
    without_board: list[tuple[str, str]]
    size: tuple[int, int]


def calibrate_command(request: CalibrateRequest) -> int:
    """Prints a board, or calibrates and writes camera.yaml with a report beside it. Raises VoError in one line."""
    board = parse_board(request.board, request.square_m)
    if request.print_board is not None:
        sheet = write_board(request.print_board, board, request.paper)
        print(f"{request.print_board}: {board.text}, squares of {sheet.square_mm:g} mm, on {request.paper}")
        print("print it at 100 %, check the ruler, fix it flat on something rigid")
        return 0
    if request.source is None:
        raise CalibrationError("SOURCE is missing: webcam:0, a video, or a directory of images; or --print-board F.pdf")
    prepare_directory(request.output.parent)
    directory = _image_directory(request.source)
    collected = _from_images(directory, board, request) if directory else _from_frames(request.source, board, request)
    calibration = calibrate(
        collected.views,
        board,
        collected.size,
        model=request.model,
        without_board=collected.without_board,
        progress=lambda text: None if request.is_quiet else print(text, file=sys.stderr),
    )
    _write(calibration, request)
    if request.is_json:
        print(report_json(calibration))
    elif not request.is_quiet:
        print("\n".join(report_lines(calibration, str(request.output))))
    if calibration.verdict.grade is Grade.POOR and request.is_strict:
        finding = calibration.verdict.findings[0]
        raise CalibrationError(f"{request.output}: written, but not good enough: {finding.text}; {finding.remedy}")
    return 0


def _write(calibration: Calibration, request: CalibrateRequest) -> None:
    with writing(request.output):
        write_camera(request.output, calibration.camera, comment=report_comment(calibration))
    write_atomically(report_path(request.output), report_json(calibration) + "\n")
    if request.picture is not None:
        prepare_directory(request.picture.parent)
        write_atomically(request.picture, report_png(calibration))


def report_path(output: Path) -> Path:
    """The report of camera.yaml is camera.calibration.json beside it."""
    return output.with_name(f"{output.stem}.calibration.json")


# --- images on disk -------------------------------------------------------------------------------------------------


def _image_directory(source: str) -> Path | None:
    """The directory of images that the user means, None for every other source."""
    path = Path(source.removeprefix("images:")).expanduser()
    return path if path.is_dir() and (source.startswith("images:") or list_images(path)) else None


def _from_images(directory: Path, board: Board, request: CalibrateRequest) -> _Collected:
    """Every image of a directory; raises CalibrationError where they differ in size."""
    paths = list_images(directory)
    views: list[BoardView] = []
    without_board: list[tuple[str, str]] = []
    sizes: dict[tuple[int, int], str] = {}
    with progress(len(paths), is_quiet=request.is_quiet) as advance:
        for path in paths:
            try:
                image = read_image(path)
            except UnreadableImageError as error:
                without_board.append((path.name, f"unreadable: {error}"))
                continue
            sizes.setdefault((image.shape[1], image.shape[0]), path.name)
            _check_sizes(directory, sizes)
            view = find_board(image, board, path.name)
            if view is None:
                without_board.append((path.name, f"no {board.text} found"))
            else:
                views.append(view)
            advance(f"{path.name}: {'no board' if view is None else f'{len(view.corner_ids)} corners'}")
    if not sizes:
        raise CalibrationError(f"{directory}: holds no image that can be read")
    if not views:
        raise CalibrationError(
            f"{directory}: no {board.text} in any of {len(paths)} images; chessboard:9x6 counts inner corners, "
            "charuco:10x7 counts squares: count yours again"
        )
    return _Collected(views, without_board, next(iter(sizes)))


def _check_sizes(directory: Path, sizes: dict[tuple[int, int], str]) -> None:
    if len(sizes) > 1:
        (first, first_name), (second, second_name) = list(sizes.items())[:2]
        raise CalibrationError(
            f"{directory}: {second_name} has {second[0]}x{second[1]} px, {first_name} {first[0]}x{first[1]} px; a "
            "calibration is for one size: put the images of each into a directory of its own"
        )


# --- cameras and videos ---------------------------------------------------------------------------------------------


def _from_frames(spec: str, board: Board, request: CalibrateRequest) -> _Collected:
    """Views that are sharp, still and unlike each other; ends when enough are there, at the end, or when told to."""
    with closing(open_source(spec, fov_deg=_ANY_FOV_DEG)) as source, _screen(source, request) as window:
        size = (source.camera.width, source.camera.height)
        collector = ViewCollector(board, size, request.num_views)
        try:
            _collect(source, board, collector, window, request)
        except KeyboardInterrupt:
            if len(collector.views) < MIN_VIEWS:
                raise
            print(f"stopped; calibrating from {len(collector.views)} views", file=sys.stderr)
    if not collector.views:
        raise CalibrationError(
            f"{spec}: no sharp and still view of {board.text} was seen; hold it still, in good light"
        )
    return _Collected(collector.views, [], size)


def _collect(
    source: Source, board: Board, collector: ViewCollector, window: CalibrationWindow | None, request: CalibrateRequest
) -> None:
    next_line_s = 0.0
    for frame in source.frames():
        view = find_board(frame.image, board, f"frame {frame.index}", is_live=True)
        offer = collector.consider(view)
        if offer is Offer.KEPT:
            refined = find_board(frame.image, board, f"frame {frame.index}")
            if refined is None:
                offer = Offer.BLURRED  # no corner of it could be fitted
            else:
                collector.keep(refined)
                _save(frame.image, len(collector.views), request)
        if window is not None and not window.show(frame.image, view, collector, offer):
            return
        if not request.is_quiet and (offer is Offer.KEPT or time.monotonic() >= next_line_s):
            next_line_s = time.monotonic() + _LINE_PERIOD_S
            print(f"{len(collector.views)} views, {offer.value}; {collector.instruction()}", file=sys.stderr)
        if collector.is_complete:
            return


def _save(image: Image, number: int, request: CalibrateRequest) -> None:
    """Keeps the image of a view, so that the calibration can be repeated with other settings."""
    if request.save_images is None:
        return
    prepare_directory(request.save_images)
    stored = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    is_encoded, data = cv2.imencode(".png", stored)
    if is_encoded:
        write_atomically(request.save_images / f"view_{number:03d}.png", data.tobytes())


@contextmanager
def _screen(source: Source, request: CalibrateRequest) -> Iterator[CalibrationWindow | None]:
    """A window for a live camera where there is a display; otherwise the lines on the terminal have to do."""
    window = None
    if source.is_live and not request.is_headless:
        try:
            check_display()
            window = CalibrationWindow()
        except ViewerError as error:
            print(f"vo: no window: {str(error).partition(';')[0]}; guidance goes on here", file=sys.stderr)
        except cv2.error:  # OpenCV built without windows
            print("vo: no window: this OpenCV has none; guidance goes on here", file=sys.stderr)
    try:
        yield window
    finally:
        if window is not None:
            window.close()
