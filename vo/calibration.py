"""From the corners of a board in many images to a camera, its errors and what it is worth. Pure.

Views that contradict the others are left out, the model is the one that predicts views it has not seen best, and the
uncertainty says where in the image the camera is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.calibration_boards import Board, BoardView, CalibrationError, board_points
from vo.calibration_solver import Fit, Lens, Observations, fit, pose_of, project
from vo.calibration_verdict import MIN_VIEWS, REFERENCE_WIDTH_PX, Measures, Verdict, blur_limit_px, judge
from vo.geometry import project as project_points
from vo.geometry import undistort
from vo.types import Camera, CameraModel, FloatArray

MODELS: dict[str, tuple[Lens, ...]] = {
    "auto": (
        Lens(CameraModel.PINHOLE, 0),
        Lens(CameraModel.BROWN, 4),
        Lens(CameraModel.BROWN, 5),
        Lens(CameraModel.FISHEYE, 4),
    ),
    "pinhole": (Lens(CameraModel.PINHOLE, 0),),
    "brown": (Lens(CameraModel.BROWN, 4), Lens(CameraModel.BROWN, 5)),
    "rational": (Lens(CameraModel.BROWN, 8),),
    "fisheye": (Lens(CameraModel.FISHEYE, 4),),
}
"""What --model names, simplest first."""
COVERAGE_CELLS = (8, 6)
_FLEXIBLE = (Lens(CameraModel.BROWN, 5), Lens(CameraModel.FISHEYE, 4))
_NUM_FOLDS = 5
_NUM_SUBSETS = 16
_SUBSET_SIZE = 5
_TILTED_RAD = np.deg2rad(15.0)
_SIMPLER_WINS = 1.03
_OUTLIER_RATIO = 2.5
_DOUBTFUL_PX = 0.35

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ViewReport:
    """One image: what was found in it, and why it was not used where it was not.

    rms_px  distance of its corners from where the camera puts them, None where that was not computed.
    """

    name: str
    num_corners: int
    rms_px: float | None
    edge_width_px: float | None
    reason: str = ""

    @property
    def is_used(self) -> bool:
        return not self.reason


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model that was tried: error of the views it was fitted to, and of views held out."""

    title: str
    rms_px: float
    cross_validated_px: float


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A camera and everything that is known about how good it is.

    deviations         standard deviation of each parameter, by name: the larger of what the errors of the corners
                       propagate to and of what leaving out groups of views changes (jackknife).
    uncertainty_px     (rows, columns) standard deviation of a projected direction on a grid over the image, NaN where
                       the lens sees nothing; a rotation of the whole camera is taken out, because no calibration tells
                       it from the pose of the board.
    corners_px, residuals_px   (N, 2) of all corners used.
    """

    board: Board
    camera: Camera
    title: str
    models: tuple[ModelReport, ...]
    views: tuple[ViewReport, ...]
    deviations: dict[str, float]
    uncertainty_px: FloatArray
    corners_px: FloatArray
    residuals_px: FloatArray
    num_corners_dropped: int
    measures: Measures
    verdict: Verdict


def calibrate(
    views: Sequence[BoardView],
    board: Board,
    size: tuple[int, int],
    *,
    model: str = "auto",
    without_board: Sequence[tuple[str, str]] = (),
    progress: Progress = lambda _text: None,
) -> Calibration:
    """The camera (width, height px) that took these views.

    model          a key of MODELS; the one with the smallest cross-validated error is chosen among its lenses, or a
                   simpler one within 3 % of it.
    without_board  images in which no board was found: name and reason, for the report.

    Raises CalibrationError where fewer than five views can be used, or where they say nothing about the focal length.
    """
    dropped = _blurred(views, size[0])
    sharp = [view for view in views if view.name not in dropped]
    _check_number(sharp, dropped, without_board)
    points = board_points(board) / board.square_m
    observed = [Observations(points[view.corner_ids], view.corners_px) for view in sharp]
    progress(f"looking for contradictions in {len(sharp)} views")
    consensus = _consistent(observed, size)
    keeps, typical_px = consensus.keeps, float(np.median(consensus.errors_px[consensus.keeps]))
    for view, keep, error_px in zip(sharp, keeps, consensus.errors_px, strict=True):
        if not keep:
            dropped[view.name] = (
                f"its corners miss the model by {error_px:.2g} px, those of the others by {typical_px:.2g} px: another "
                "board, a bent one, or in motion?"
            )
    used = [view for view, keep in zip(sharp, keeps, strict=True) if keep]
    _check_number(used, dropped, without_board)
    agreeing = [one for one, keep in zip(observed, keeps, strict=True) if keep]
    observed, num_corners_dropped = _without_wrong_corners(agreeing, consensus.fit)
    tried = _try_all(MODELS[model], observed, consensus.fit, progress)
    chosen = _choose(tried)
    _check_focal(chosen)
    reports = _view_reports(views, used, chosen.fit, dropped, without_board)
    return _report(board, chosen, tried, reports, observed, num_corners_dropped, used)


# --- which views, which corners -------------------------------------------------------------------------------------


def _blurred(views: Sequence[BoardView], width_px: int) -> dict[str, str]:
    """Reasons, by name, to leave out views that are blurred while most are not."""
    if not views:
        return {}
    typical = float(np.median([view.edge_width_px for view in views]))
    limit = max(blur_limit_px(width_px), 1.6 * typical)
    return {
        view.name: f"blurred: edges {view.edge_width_px:.1f} px wide, in the others {typical:.1f} px"
        for view in views
        if view.edge_width_px > limit
    }


def _check_number(used: Sequence[BoardView], dropped: dict[str, str], without_board: Sequence[tuple[str, str]]) -> None:
    if len(used) >= MIN_VIEWS:
        return
    reasons = Counter(reason.partition(":")[0] for _, reason in without_board)
    reasons.update(reason.partition(":")[0].partition(" miss")[0] for reason in dropped.values())
    others = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4))
    raise CalibrationError(
        f"{len(used)} views of the board can be used, {MIN_VIEWS} are needed and 20 to 40 make a good calibration"
        + (f" (not used: {others})" if others else "")
        + "; check --board against the printed board, and take more images"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Consensus:
    """Which views (V,) agree on one camera, the error of all of them (V,) px under it, and the fit to those that do."""

    keeps: NDArray[np.bool_]
    errors_px: FloatArray
    fit: Fit

    @property
    def disagreement_px(self) -> float:
        """What is made small: the error of the 60th of 100 views."""
        return float(np.quantile(self.errors_px, 0.6))


def _consistent(views: Sequence[Observations], size: tuple[int, int]) -> _Consensus:
    """The camera that most views agree on.

    First everything is fitted at once with robust weights; where that explains too few views, small random sets are
    fitted instead, and the best is what most views agree with (least median of squares, Rousseeuw 1984).
    """
    best = min(
        (_settle(lens, views, fit(lens, views, size, huber_px=1.0), size) for lens in _FLEXIBLE),
        key=lambda made: made.disagreement_px,
    )
    if best.disagreement_px > _DOUBTFUL_PX * _unit_px(size):
        rng = np.random.default_rng(0)
        for number in range(_NUM_SUBSETS):
            chosen = rng.choice(len(views), min(_SUBSET_SIZE, len(views)), replace=False)
            lens = _FLEXIBLE[number % len(_FLEXIBLE)]
            start = fit(lens, [views[i] for i in chosen], size, huber_px=1.0)
            errors = _typical_errors([pose_of(lens, start.theta, view)[1] for view in views])
            if np.quantile(errors, 0.6) < 2.0 * best.disagreement_px:
                settled = _settle(lens, views, start, size)
                best = min(best, settled, key=lambda made: made.disagreement_px)
    return best


def _settle(lens: Lens, views: Sequence[Observations], made: Fit, size: tuple[int, int]) -> _Consensus:
    """Fits to the views that agree and looks which do, until that no longer changes."""
    keeps = np.ones(len(views), np.bool_)
    for _ in range(6):
        posed = [pose_of(lens, made.theta, view, huber_px=0.5) for view in views]
        errors = _typical_errors([residuals for _, residuals in posed])
        limit = max(_OUTLIER_RATIO * float(np.median(errors[keeps])), 0.08 * _unit_px(size))
        agrees = errors <= limit
        if agrees.sum() < MIN_VIEWS or ((agrees == keeps).all() and len(made.poses) == agrees.sum()):
            break
        keeps = agrees
        rows = np.flatnonzero(keeps)
        poses = np.array([posed[i][0] for i in rows.tolist()])
        made = fit(lens, [views[i] for i in rows.tolist()], size, theta=made.theta, poses=poses)
    return _Consensus(keeps, errors, made)


def _typical_errors(residuals: Sequence[FloatArray]) -> FloatArray:
    """(V,) root mean square of the smaller six of seven distances: a few wrong corners do not condemn a view."""
    errors = []
    for view in residuals:
        squares = np.sort((view**2).sum(axis=1))
        errors.append(np.sqrt(squares[: max(1, len(squares) * 6 // 7)].mean()))
    return np.array(errors)


def _without_wrong_corners(views: Sequence[Observations], made: Fit) -> tuple[list[Observations], int]:
    """The views without corners that lie far from where the rest of them says, and how many those were."""
    distances = [np.linalg.norm(pose_of(made.lens, made.theta, view, huber_px=0.5)[1], axis=1) for view in views]
    # A Rayleigh distribution: median 1.18 sigma; six sigma is passed by one corner in 65 million.
    sigma_px = float(np.median(np.concatenate(distances))) / 1.18
    limit = max(6.0 * sigma_px, 0.1 * _unit_px(made.size))
    kept = [
        Observations(view.points[d <= limit], view.pixels[d <= limit]) if (d <= limit).sum() >= 6 else view
        for view, d in zip(views, distances, strict=True)
    ]
    return kept, sum(len(view.points) for view in views) - sum(len(view.points) for view in kept)


def _unit_px(size: tuple[int, int]) -> float:
    return max(1.0, size[0] / REFERENCE_WIDTH_PX)


# --- which model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Tried:
    """A model, its fit to all views, and what leaving views out did.

    jackknife  (P,) standard deviation of theta over the folds.
    """

    fit: Fit
    cross_validated_px: float
    jackknife: FloatArray
    folds: bool

    @property
    def rms_px(self) -> float:
        return _rms_px(self.fit.residuals)


def _try_all(lenses: Sequence[Lens], views: Sequence[Observations], known: Fit, progress: Progress) -> list[_Tried]:
    """Every model fitted; those that already fit the views they were given far worse are not cross-validated."""
    fits = []
    for lens in lenses:
        progress(f"fitting {lens.title}")
        start = _start(lens, known)
        fits.append(fit(lens, views, known.size, theta=start))
    smallest = min(_rms_px(made.residuals) for made in fits)
    return [_cross_validate(made, views, progress) for made in fits if _rms_px(made.residuals) <= 2.0 * smallest]


def _start(lens: Lens, known: Fit) -> FloatArray | None:
    """Parameters to start from: those of the known fit where the models are alike."""
    if (known.lens.model is CameraModel.FISHEYE) != (lens.model is CameraModel.FISHEYE):
        return None
    theta = np.zeros(lens.num_parameters)
    shared = min(len(theta), len(known.theta))
    theta[:shared] = known.theta[:shared]
    return theta


def _cross_validate(whole: Fit, views: Sequence[Observations], progress: Progress) -> _Tried:
    """What the model predicts for views that it has not seen, group by group."""
    lens = whole.lens
    progress(f"cross-validating {lens.title}")
    num_folds = min(_NUM_FOLDS, len(views))
    fold_of = np.random.default_rng(1).permutation(len(views)) % num_folds
    held_out: list[FloatArray] = []
    thetas = []
    for fold in range(num_folds):
        rest = np.flatnonzero(fold_of != fold)
        part = fit(lens, [views[i] for i in rest.tolist()], whole.size, theta=whole.theta, poses=whole.poses[rest])
        thetas.append(part.theta)
        held_out += [pose_of(lens, part.theta, views[i])[1] for i in np.flatnonzero(fold_of == fold).tolist()]
    spread = np.array(thetas) - np.mean(thetas, axis=0)
    jackknife = np.sqrt((num_folds - 1) / num_folds * (spread**2).sum(axis=0))
    return _Tried(whole, _rms_px(held_out), jackknife, _folds_over(whole.camera))


def _rms_px(residuals: Sequence[FloatArray]) -> float:
    return float(np.sqrt(np.concatenate([(r**2).sum(axis=1) for r in residuals]).mean()))


def _choose(tried: Sequence[_Tried]) -> _Tried:
    """The simplest model whose cross-validated error is about the smallest, without folds if there is one."""
    sound = [one for one in tried if not one.folds and np.isfinite(one.cross_validated_px)] or list(tried)
    smallest = min(one.cross_validated_px for one in sound)
    return next(one for one in sound if one.cross_validated_px <= _SIMPLER_WINS * smallest)


def _folds_over(camera: Camera) -> bool:
    """Whether the distortion maps two directions to the same pixel inside the image, so that it cannot be undone.

    The border of a fisheye's image may lie beyond what the lens sees, or beyond a right angle: that is no fault.
    """
    if camera.model is not CameraModel.BROWN:
        return False
    border = _pixel_grid(camera, 9, 7)
    rays = undistort(border, camera)
    again = project_points(np.column_stack([rays, np.ones(len(rays))]), camera)
    return not bool((np.linalg.norm(again - border, axis=1) < 0.5).all())


def _check_focal(chosen: _Tried) -> None:
    theta, deviations = chosen.fit.theta, np.maximum(chosen.fit.deviations, chosen.jackknife)
    share = float((deviations[:2] / theta[:2]).max())
    if not np.isfinite(theta).all() or not share < 0.1:
        raise CalibrationError(
            f"the views do not determine the focal length ({100 * share:.0f} % uncertain): the board is never tilted, "
            "or always far away; take views with the board near and tilted by 20 to 45 degrees, each way"
        )


# --- report ---------------------------------------------------------------------------------------------------------


def _view_reports(
    views: Sequence[BoardView],
    used: Sequence[BoardView],
    made: Fit,
    dropped: dict[str, str],
    without_board: Sequence[tuple[str, str]],
) -> tuple[ViewReport, ...]:
    errors = dict(zip([view.name for view in used], made.view_rms_px.tolist(), strict=True))
    found = [
        ViewReport(
            view.name, len(view.corner_ids), errors.get(view.name), view.edge_width_px, dropped.get(view.name, "")
        )
        for view in views
    ]
    return (*found, *(ViewReport(name, 0, None, None, reason) for name, reason in without_board))


def _report(
    board: Board,
    chosen: _Tried,
    tried: Sequence[_Tried],
    views: tuple[ViewReport, ...],
    observed: Sequence[Observations],
    num_corners_dropped: int,
    used: Sequence[BoardView],
) -> Calibration:
    made = chosen.fit
    camera = made.camera
    pixels = np.concatenate([view.pixels for view in observed])
    deviations = np.maximum(made.deviations, chosen.jackknife)
    uncertainty_px = projection_uncertainty(made)
    measures = Measures(
        width_px=camera.width,
        num_views=len(used),
        num_dropped=sum(not view.is_used and view.num_corners > 0 for view in views),
        rms_px=chosen.rms_px,
        cross_validated_px=chosen.cross_validated_px,
        focal_percent=float(100.0 * (deviations[:2] / made.theta[:2]).max()),
        uncertainty_px=float(np.nanquantile(uncertainty_px, 0.95)),
        coverage=float(coverage_of(pixels, camera.width, camera.height).mean()),
        edge_width_px=float(np.median([view.edge_width_px for view in used])),
        num_tilted=int((_tilts_rad(made.poses) > _TILTED_RAD).sum()),
        folds=chosen.folds,
    )
    return Calibration(
        board,
        camera,
        made.lens.title,
        tuple(ModelReport(one.fit.lens.title, one.rms_px, one.cross_validated_px) for one in tried),
        views,
        dict(zip(made.lens.names, deviations.tolist(), strict=True)),
        uncertainty_px,
        pixels,
        np.concatenate(made.residuals),
        num_corners_dropped,
        measures,
        judge(measures),
    )


def coverage_of(pixels: FloatArray, width: int, height: int) -> NDArray[np.bool_]:
    """(rows, columns) cells of the image in which there are corners (N, 2) px."""
    columns, rows = COVERAGE_CELLS
    cells = np.floor((pixels + 0.5) / [width, height] * [columns, rows]).astype(int)
    cells = np.clip(cells, 0, [columns - 1, rows - 1])
    covered = np.zeros((rows, columns), np.bool_)
    covered[cells[:, 1], cells[:, 0]] = True
    return covered


def projection_uncertainty(made: Fit, columns: int = 17, rows: int = 13) -> FloatArray:
    """(rows, columns) px: standard deviation of where a fixed direction is projected, over a grid of the image.

    What a rotation of the camera explains is taken out. NaN where the lens sees nothing.
    """
    camera = made.camera
    pixels = _pixel_grid(camera, columns, rows)
    rays = undistort(pixels, camera)
    directions = np.column_stack([rays, np.ones(len(rays))])
    back, J, J_pose = project(made.lens, made.theta, np.zeros(6), directions)
    is_seen = np.isfinite(back).all(axis=1) & (np.linalg.norm(back - pixels, axis=1) < 0.5)
    result = np.full(len(pixels), np.nan)
    if is_seen.any():
        twice = np.repeat(is_seen, 2)
        J, turn = J[twice], J_pose[twice, :3]
        J = J - turn @ np.linalg.lstsq(turn, J, rcond=None)[0]
        variances = np.einsum("np,pq,nq->n", J, made.covariance * made.variance_px2, J)
        result[is_seen] = np.sqrt(np.maximum(variances.reshape(-1, 2).sum(axis=1), 0.0))
    return result.reshape(rows, columns)


def _pixel_grid(camera: Camera, columns: int, rows: int) -> FloatArray:
    x, y = np.meshgrid(np.linspace(0, camera.width - 1, columns), np.linspace(0, camera.height - 1, rows))
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _tilts_rad(poses: FloatArray) -> FloatArray:
    """(V,) angle between the optical axis and the normal of the board."""
    angle = np.linalg.norm(poses[:, :3], axis=1)
    axis = poses[:, :3] / np.maximum(angle, 1e-12)[:, None]
    cosine = np.cos(angle) + axis[:, 2] ** 2 * (1.0 - np.cos(angle))
    tilts: FloatArray = np.arccos(np.clip(np.abs(cosine), 0.0, 1.0))
    return tilts
