"""Corners of a board below the pixel, and how sharp its edges are. Pure.

Where four squares meet, a blurred image is a product of two blurred steps. Fitting that to the pixels around a corner
is several times as accurate as the saddle of the gradients (cv2.cornerSubPix), and unbiased for blur of any direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from vo.types import FloatArray

_MAX_RADIUS_PX = 9.0
_MIN_RADIUS_PX = 2.5
_NUM_ITERATIONS = 12
_TOLERANCE_PX = 2e-3
_MIN_CONTRAST = 8.0
_MIN_EDGE_CONTRAST = 12.0


@dataclass(frozen=True, slots=True, eq=False)
class CornerGrid:
    """Corners of a view in the order of the board.

    corners_px  (rows, columns, 2) float64; NaN where a corner was not found.
    """

    corners_px: FloatArray

    @property
    def is_found(self) -> NDArray[np.bool_]:
        """(rows, columns)."""
        return np.asarray(np.isfinite(self.corners_px).all(axis=2))

    def steps(self) -> tuple[FloatArray, FloatArray]:
        """From a corner to the next along x, and along y: two arrays (rows, columns, 2) px, NaN without a neighbour."""
        return _step(self.corners_px, 1), _step(self.corners_px, 0)


def refined_corners(gray: NDArray[np.uint8], grid: CornerGrid, clear_share: float) -> FloatArray:
    """Corners (rows, columns, 2) px that fit the image best; NaN where the image does not look like a corner.

    clear_share  how far from a corner, along both sides of its squares, there is nothing but black and white: 1 on a
                 chessboard, less where the white squares carry markers.
    """
    along_x, along_y = grid.steps()
    is_usable = grid.is_found & np.isfinite(along_x + along_y).all(axis=2)
    result = np.full_like(grid.corners_px, np.nan)
    if not is_usable.any():
        return result
    start, u, v = grid.corners_px[is_usable], along_x[is_usable], along_y[is_usable]
    result[is_usable] = _fit(gray, start, u, v, _radii(u, v, clear_share))
    return result


def edge_width_px(gray: NDArray[np.uint8], grid: CornerGrid) -> float:
    """Width of the edges between squares in px: step in brightness over steepest slope, in the blurrier direction.

    A Gaussian blur of standard deviation s gives about 2.5 s, motion by n px gives n; infinite where no edge can be
    measured.
    """
    points = grid.corners_px
    widths = []
    for first, second in ((points[:, :-1], points[:, 1:]), (points[:-1], points[1:])):
        ends = np.stack([first.reshape(-1, 2), second.reshape(-1, 2)], axis=1)
        ends = ends[np.isfinite(ends).all(axis=(1, 2))]
        if len(ends):
            widths.append(_median_edge_width(gray, ends))
    return max(widths, default=float("inf"))


def _step(points: FloatArray, axis: int) -> FloatArray:
    """Mean of the differences to the neighbours before and after, whichever there are."""
    difference = np.diff(points, axis=axis)
    gap = np.full_like(np.take(points, [0], axis=axis), np.nan)
    both = np.stack([np.concatenate([difference, gap], axis), np.concatenate([gap, difference], axis)])
    counts = np.isfinite(both).sum(axis=0)
    total: FloatArray = np.nansum(both, axis=0) / np.where(counts > 0, counts, np.nan)
    return total


def _radii(u: FloatArray, v: FloatArray, clear_share: float) -> FloatArray:
    """(N,) px of the disc around a corner with nothing but two edges in it; u, v (N, 2) are sides of the squares."""
    area = np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])
    heights = area / np.maximum(np.linalg.norm(u, axis=1), np.linalg.norm(v, axis=1))
    if clear_share < 1.0:
        # The nearest thing is the corner of a marker, on a diagonal of its square.
        diagonals = np.minimum(np.linalg.norm(u + v, axis=1), np.linalg.norm(u - v, axis=1))
        heights = np.minimum(heights, clear_share * diagonals - 0.5)
    return np.asarray(np.clip(0.8 * heights if clear_share >= 1.0 else heights, _MIN_RADIUS_PX, _MAX_RADIUS_PX))


def _fit(gray: NDArray[np.uint8], start: FloatArray, u: FloatArray, v: FloatArray, radii: FloatArray) -> FloatArray:
    """Least squares over (x, y, two angles, two blurs, mean, step, slope of the light along x and y).

    The image around a corner is mean + step erf(d1 / (sqrt 2 s1)) erf(d2 / (sqrt 2 s2)) + light, with the distances d1
    and d2 (px) to the two edges.
    """
    half = int(np.ceil(radii.max()))
    offsets = np.mgrid[-half : half + 1, -half : half + 1][::-1].reshape(2, -1).T.astype(np.float64)
    nearest = np.rint(start).astype(int)
    height, width = gray.shape
    columns, rows = nearest[:, :1] + offsets[:, 0].astype(int), nearest[:, 1:] + offsets[:, 1].astype(int)
    is_inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    values = gray[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)].astype(np.float64)
    # The window stays where it is: a weight that moves with the corner would be one more force on it.
    from_start = offsets[None] - (start - nearest)[:, None]
    weights = np.clip(radii[:, None] + 0.5 - np.linalg.norm(from_start, axis=2), 0.0, 1.0) * is_inside
    parameters = np.zeros((len(start), 10))
    parameters[:, 2], parameters[:, 3] = np.arctan2(u[:, 1], u[:, 0]), np.arctan2(v[:, 1], v[:, 0])
    parameters[:, 4:6] = np.log(0.8)
    parameters = _with_best_light(parameters, from_start, values, weights)
    best, cost = _descend(parameters, from_start, values, weights)
    noise = cost / np.maximum(weights.sum(axis=1), 1.0)
    is_corner = (np.linalg.norm(best[:, :2], axis=1) < 0.7 * radii) & (np.abs(best[:, 7]) > _MIN_CONTRAST)
    is_corner &= noise < (0.35 * best[:, 7]) ** 2
    return np.where(is_corner[:, None], start + best[:, :2], np.nan)


def _descend(
    start: FloatArray, offsets: FloatArray, values: FloatArray, weights: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Levenberg-Marquardt, all corners side by side: parameters (N, 10) and weighted squared errors (N,)."""
    best, damping = start, np.full(len(start), 1e-3)
    model, J = _model(best, offsets)
    cost = (weights * (values - model) ** 2).sum(axis=1)
    for _ in range(_NUM_ITERATIONS):
        JtW = np.swapaxes(J, 1, 2) * weights[:, None]
        H, gradient = JtW @ J, JtW @ (values - model)[..., None]
        lifted = np.eye(10) * (damping[:, None] * np.einsum("nii->ni", H) + 1e-9)[:, None]
        step = np.linalg.solve(H + lifted, gradient)[..., 0]
        step[:, :2], step[:, 2:6] = np.clip(step[:, :2], -1.0, 1.0), np.clip(step[:, 2:6], -0.3, 0.3)
        tried = best + step
        tried[:, 4:6] = np.clip(tried[:, 4:6], np.log(0.25), np.log(6.0))
        new_model, new_J = _model(tried, offsets)
        new_cost = (weights * (values - new_model) ** 2).sum(axis=1)
        is_better = new_cost < cost
        best = np.where(is_better[:, None], tried, best)
        model = np.where(is_better[:, None], new_model, model)
        J = np.where(is_better[:, None, None], new_J, J)
        cost, damping = np.where(is_better, new_cost, cost), np.where(is_better, damping * 0.1, damping * 10.0)
        if np.abs(step[:, :2]).max() < _TOLERANCE_PX:
            break
    return best, cost


def _model(p: FloatArray, offsets: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Brightness (N, M) at `offsets` (N, M, 2) px from the start, and its derivatives (N, M, 10)."""
    x, y = offsets[..., 0] - p[:, 0, None], offsets[..., 1] - p[:, 1, None]
    steps, slopes, turned, directions = [], [], [], []
    for angle, log_blur in ((p[:, 2], p[:, 4]), (p[:, 3], p[:, 5])):
        cos, sin, blur = np.cos(angle)[:, None], np.sin(angle)[:, None], np.exp(log_blur)[:, None]
        distance = (-sin * x + cos * y) / blur
        steps.append(erf(distance / np.sqrt(2.0)))
        slopes.append(np.sqrt(2.0 / np.pi) * np.exp(-0.5 * distance**2) / blur)
        turned.append((-cos * x - sin * y, distance * blur))
        directions.append((sin, -cos))
    first, second = steps[0] * p[:, 7, None], steps[1] * p[:, 7, None]
    product = steps[0] * steps[1]
    model = p[:, 6, None] + p[:, 7, None] * product + p[:, 8, None] * offsets[..., 0] + p[:, 9, None] * offsets[..., 1]
    one, two = slopes[0] * second, slopes[1] * first
    J = np.stack(
        [
            one * directions[0][0] + two * directions[1][0],
            one * directions[0][1] + two * directions[1][1],
            one * turned[0][0],
            two * turned[1][0],
            -one * turned[0][1],
            -two * turned[1][1],
            np.ones_like(product),
            product,
            offsets[..., 0],
            offsets[..., 1],
        ],
        axis=-1,
    )
    return model, J


def _with_best_light(p: FloatArray, offsets: FloatArray, values: FloatArray, weights: FloatArray) -> FloatArray:
    """Parameters with the mean, step and light that fit best where the edges are."""
    _, J = _model(p, offsets)
    linear = J[..., 6:]
    JtW = np.swapaxes(linear, 1, 2) * weights[:, None]
    H = JtW @ linear + 1e-6 * np.eye(4)
    light = np.linalg.solve(H, (JtW @ values[..., None]))[..., 0]
    return np.concatenate([p[:, :6], light], axis=1)


def _median_edge_width(gray: NDArray[np.uint8], ends: FloatArray, num_steps: int = 48, num_lanes: int = 5) -> float:
    """Median width over edges, each between two corners `ends` (N, 2, 2), of mean profiles across them."""
    along = ends[:, 1] - ends[:, 0]
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    lanes, steps = np.linspace(-0.12, 0.12, num_lanes), np.linspace(-0.4, 0.4, num_steps)
    at = ends.mean(axis=1)[:, None, None] + lanes[:, None, None] * along[:, None, None]
    at = (at + steps[:, None] * across[:, None, None]).reshape(len(ends), -1, 2).astype(np.float32)
    profiles = cv2.remap(gray, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    profile = profiles.reshape(len(ends), num_lanes, num_steps).astype(np.float64).mean(axis=1)
    spacing_px = np.linalg.norm(along, axis=1) * (steps[1] - steps[0])
    # A slope over less than a pixel would measure the noise.
    reach = np.clip(np.ceil(0.5 / np.maximum(spacing_px, 1e-6)), 1, num_steps // 4).astype(int)
    widths = []
    for row, step_px, far in zip(profile, spacing_px, reach, strict=True):
        slope = np.abs(row[2 * far :] - row[: -2 * far]).max() / (2 * far * step_px)
        contrast = row.max() - row.min()
        if contrast > _MIN_EDGE_CONTRAST and slope > 0:
            widths.append(contrast / slope)
    return float(np.median(widths)) if widths else float("inf")
