"""From views of a board to a camera, without images: least squares, contradictions, verdict, capture, report."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from calibration_samples import BROWN, CHESSBOARD, FISHEYE, PINHOLE, SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rendered_boards import board_poses, chessboard, pixels_of

from vo.calibration import Calibration, calibrate, coverage_of
from vo.calibration_boards import BoardView, CalibrationError, board_points
from vo.calibration_capture import Need, Offer, ViewCollector, pose_2d
from vo.calibration_report import report_json, report_png
from vo.calibration_solver import Lens, Observations, fit
from vo.calibration_verdict import Grade, Measures, judge
from vo.calibration_window import overlay
from vo.sources.cameras import make_camera
from vo.types import Camera, CameraModel


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


# --- report ----------------------------------------------------------------------------------------------------------


def test_picture_of_a_fisheye_has_places_that_it_does_not_see() -> None:
    calibration: Calibration = calibrate(exact_views(FISHEYE, 12, 0.02), CHESSBOARD, SIZE, model="fisheye")
    assert report_png(calibration).startswith(b"\x89PNG")
    assert "NaN" not in report_json(calibration)
