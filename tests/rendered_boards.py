"""Images of calibration boards under a known camera, rendered for tests: the reference that calibration is measured on.

Independent of the code under test: boards are drawn by OpenCV's own generator (ChArUco) or by parity (chessboard),
pixels are integrated over a grid of rays through the lens, and the lens is evaluated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline

from vo.types import Camera, CameraModel

SQUARE_M = 0.025
_CELLS = 8  # cells of the bitmap per square: a marker of 0.75 squares with 4 bits and its border has 6
_SUBPIXELS = 4


@dataclass(frozen=True)
class Pattern:
    """A bitmap of a board with white paper around it; `origin_cells` is where the first inner corner lies in it."""

    bitmap: NDArray[np.uint8]
    origin_cells: tuple[float, float]
    columns: int
    rows: int
    stretch: tuple[float, float] = (1.0, 1.0)


def chessboard(columns: int = 9, rows: int = 6, stretch: tuple[float, float] = (1.0, 1.0)) -> Pattern:
    y, x = np.mgrid[: (rows + 1) * _CELLS, : (columns + 1) * _CELLS] // _CELLS
    squares = np.where((x + y) % 2 == 0, 0, 255).astype(np.uint8)
    return _framed(squares, columns, rows, stretch)


def charuco(across: int = 10, down: int = 7) -> Pattern:
    dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    board = cv2.aruco.CharucoBoard((across, down), 1.0, 0.75, dictionary)
    image = board.generateImage((across * _CELLS, down * _CELLS), marginSize=0, borderBits=1)
    return _framed(image, across - 1, down - 1, (1.0, 1.0))


def _framed(squares: NDArray[np.uint8], columns: int, rows: int, stretch: tuple[float, float]) -> Pattern:
    bitmap = np.pad(squares, _CELLS, constant_values=255)
    return Pattern(bitmap, (2.0 * _CELLS, 2.0 * _CELLS), columns, rows, stretch)


def rays_of(camera: Camera) -> NDArray[np.float32]:
    """(H s, W s, 2) rays through the centres of s x s parts of every pixel, by Newton's method on the lens."""
    s = _SUBPIXELS
    at = [(np.arange(n * s) + 0.5) / s - 0.5 for n in (camera.width, camera.height)]
    # The lens is smooth: solved on a coarse grid, and between its nodes by cubic interpolation.
    coarse = [np.linspace(-4.0, n + 3.0, (n + 7) // 4 + 1) for n in (camera.width, camera.height)]
    u, v = np.meshgrid(*coarse)
    rays = undistorted(np.stack([u.ravel(), v.ravel()], axis=1), camera).reshape(*u.shape, 2)
    spline = [RectBivariateSpline(coarse[1], coarse[0], rays[..., i]) for i in range(2)]
    return np.stack([one(at[1], at[0]) for one in spline], axis=-1).astype(np.float32)


def undistorted(pixels: NDArray[np.float64], camera: Camera) -> NDArray[np.float64]:
    """Rays (N, 2) of pixels: fixed point on the radius, then Newton with numerical derivatives."""
    goal = (pixels - camera.K[:2, 2]) / np.diag(camera.K)[:2]
    ray = goal.copy()
    if camera.model is CameraModel.FISHEYE:
        radius = np.linalg.norm(goal, axis=1, keepdims=True)
        ray = goal * np.where(radius > 1e-9, np.tan(np.minimum(radius, 1.4)) / np.maximum(radius, 1e-9), 1.0)
    for _ in range(30):
        value = distorted(ray, camera)
        h = 1e-6
        dx = (distorted(ray + np.array([h, 0.0]), camera) - value) / h
        dy = (distorted(ray + np.array([0.0, h]), camera) - value) / h
        error = value - goal
        if np.abs(error).max() < 1e-13:
            break
        det = dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]
        step = np.stack(
            [error[:, 0] * dy[:, 1] - error[:, 1] * dy[:, 0], dx[:, 0] * error[:, 1] - dx[:, 1] * error[:, 0]], 1
        )
        ray = ray - step / det[:, None]
    return ray


def distorted(rays: NDArray[np.float64], camera: Camera) -> NDArray[np.float64]:
    """Rays through the lens, on the plane z = 1, from the formulas of OpenCV's manual."""
    x, y = rays.T
    d = np.zeros(8)
    d[: len(camera.distortion)] = camera.distortion
    r2 = x * x + y * y
    if camera.model is CameraModel.FISHEYE:
        r = np.sqrt(r2)
        theta = np.arctan(r)
        t2 = theta**2
        bent = theta * (1 + t2 * (d[0] + t2 * (d[1] + t2 * (d[2] + t2 * d[3]))))
        scale = np.where(r > 1e-9, bent / np.maximum(r, 1e-9), 1.0)
        return np.stack([x * scale, y * scale], 1)
    radial = (1 + r2 * (d[0] + r2 * (d[1] + r2 * d[4]))) / (1 + r2 * (d[5] + r2 * (d[6] + r2 * d[7])))
    return np.stack(
        [
            x * radial + 2 * d[2] * x * y + d[3] * (r2 + 2 * x * x),
            y * radial + d[2] * (r2 + 2 * y * y) + 2 * d[3] * x * y,
        ],
        1,
    )


def pixels_of(points: NDArray[np.float64], pose: NDArray[np.float64], camera: Camera) -> NDArray[np.float64]:
    """Pixels (N, 2) of points (N, 3) on the board; `pose` is T_camera_board (4, 4)."""
    p = points @ pose[:3, :3].T + pose[:3, 3]
    return distorted(p[:, :2] / p[:, 2:], camera) * np.diag(camera.K)[:2] + camera.K[:2, 2]


def render(
    pattern: Pattern,
    pose: NDArray[np.float64],
    camera: Camera,
    rays: NDArray[np.float32],
    seed: int,
    *,
    blur_px: float = 0.5,
    motion_px: tuple[float, float] = (0.0, 0.0),
    noise: float = 2.0,
    contrast: float = 1.0,
    rolling_m: float = 0.0,
) -> NDArray[np.uint8]:
    """A gray image (H, W): the board at `pose` over a gray scene, through blur, motion, light from one side and noise.

    rolling_m  how far the board moves to the right while the rows of the sensor are read, m.
    """
    rng = np.random.default_rng(seed)
    s, (height, width) = _SUBPIXELS, (camera.height, camera.width)
    image = np.full((height, width), 90.0, np.float32)
    top, bottom, left, right = _extent(pattern, pose, camera)
    fine = _lit(
        pattern, pose, rays[top * s : bottom * s, left * s : right * s], top / height, bottom / height, rolling_m
    )
    image[top:bottom, left:right] = fine.reshape(bottom - top, s, right - left, s).mean(axis=(1, 3), dtype=np.float32)
    if blur_px > 0:
        image = cv2.GaussianBlur(image, (0, 0), blur_px)
    if any(motion_px):
        image = cv2.filter2D(image, -1, _streak(motion_px))
    light = np.linspace(0.85, 1.0, width, dtype=np.float32) * contrast
    image = image * light + rng.normal(0.0, noise, image.shape).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _extent(pattern: Pattern, pose: NDArray[np.float64], camera: Camera) -> tuple[int, int, int, int]:
    """Rows and columns of the image that the paper can cover: top, bottom, left, right."""
    cells = np.mgrid[-1 : pattern.bitmap.shape[1] + 1 : 4, -1 : pattern.bitmap.shape[0] + 1 : 4].reshape(2, -1).T
    points = (cells - pattern.origin_cells) * (SQUARE_M / _CELLS) * pattern.stretch
    pixels = pixels_of(np.column_stack([points, np.zeros(len(points))]), pose, camera)
    low = np.clip(np.floor(pixels.min(axis=0)) - 12, 0, [camera.width, camera.height]).astype(int)
    high = np.clip(np.ceil(pixels.max(axis=0)) + 12, 0, [camera.width, camera.height]).astype(int)
    return low[1], high[1], low[0], high[0]


def _lit(
    pattern: Pattern, pose: NDArray[np.float64], rays: NDArray[np.float32], first: float, last: float, rolling_m: float
) -> NDArray[np.uint8]:
    """Brightness along rays (H, W, 2); ray t d meets the board at p = t d, where R^T (p - c) = (x, y, 0).

    So the cell that a ray meets is a homography of the ray, which OpenCV's loops evaluate several times faster.
    """
    normal, centre = pose[:3, 2], pose[:3, 3]
    rows = [
        (pose[:3, axis] * (normal @ centre) - (pose[:3, axis] @ centre) * normal)
        * (_CELLS / (SQUARE_M * pattern.stretch[axis]))
        + pattern.origin_cells[axis] * normal
        for axis in (0, 1)
    ]
    cells = cv2.perspectiveTransform(rays, np.stack([*rows, normal]))
    if rolling_m:
        moved_m = np.linspace(first, last, len(rays), dtype=np.float32) * np.float32(rolling_m)
        cells[..., 0] -= moved_m[:, None] * np.float32(_CELLS / (SQUARE_M * pattern.stretch[0]))
    towards = cv2.transform(rays, (normal * np.sign(normal @ centre))[None])
    cells[towards <= 1e-4] = -100.0  # behind the camera, or seen from the edge
    paper = 25 + (pattern.bitmap > 127) * np.uint8(205)
    # The nearest cell of remap is that of the rounded place, and a cell here reaches from its number to the next.
    return cv2.remap(paper, cells - np.float32(0.5), None, cv2.INTER_NEAREST, None, cv2.BORDER_CONSTANT, (90,))


def _streak(motion_px: tuple[float, float]) -> NDArray[np.float32]:
    """Kernel of a motion of so many px along x and y, symmetrical about its middle."""
    half = int(np.ceil(np.abs(motion_px).max() / 2)) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    for share in np.linspace(-0.5, 0.5, 200):
        kernel += _splat(half + share * motion_px[0], half + share * motion_px[1], len(kernel))
    return kernel / kernel.sum()


def _splat(x: float, y: float, size: int) -> NDArray[np.float32]:
    grid = np.arange(size)
    return np.outer(np.clip(1 - np.abs(grid - y), 0, None), np.clip(1 - np.abs(grid - x), 0, None)).astype(np.float32)


def board_poses(
    camera: Camera, pattern: Pattern, num_views: int, seed: int, *, lets_cut: bool = False
) -> list[NDArray[np.float64]]:
    """T_camera_board of views as a careful user takes them: everywhere in the image, near and far, tilted and rolled.

    lets_cut  boards may leave the image in part, as ChArUco allows; otherwise all corners are inside it.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: pattern.rows, : pattern.columns]
    corners = np.stack([x.ravel(), y.ravel(), 0 * x.ravel()], 1) * SQUARE_M
    middle = corners.mean(axis=0)
    poses: list[NDArray[np.float64]] = []
    attempts = 0
    while len(poses) < num_views:
        attempts += 1
        if attempts > 100 * num_views:
            raise AssertionError("the camera sees no such views")
        tilt, roll = rng.uniform(0.15, 0.75), rng.normal(0.0, 0.25)
        direction = rng.uniform(0, 2 * np.pi)
        R = (
            cv2.Rodrigues(np.array([np.cos(direction), np.sin(direction), 0.0]) * tilt)[0]
            @ cv2.Rodrigues(np.array([0.0, 0.0, roll]))[0]
        )
        # Two of five views reach into a corner of the image, or nothing would be known there.
        right, below = rng.integers(0, 2, 2)
        held = middle
        target = rng.uniform([0.0, 0.0], [camera.width, camera.height])
        if len(poses) % 5 < 2:
            held = corners[right * (pattern.columns - 1) + below * (pattern.rows - 1) * pattern.columns]
            inset = rng.uniform(11.0, 24.0, 2)
            target = np.where([right, below], np.array([camera.width, camera.height]) - inset, inset)
        ray = np.append(undistorted(target[None], camera)[0], 1.0)
        if camera.model is CameraModel.FISHEYE:
            # Far off the axis a board that faces the camera plane is seen edge-on: it faces the lens instead.
            away = np.array([-ray[1], ray[0], 0.0]) / max(np.hypot(ray[0], ray[1]), 1e-9)
            R = cv2.Rodrigues(0.7 * np.arctan(np.hypot(ray[0], ray[1])) * away)[0] @ R
        size_px = rng.uniform(0.3, 0.75) * camera.width
        depth = camera.K[0, 0] * SQUARE_M * pattern.columns / size_px
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = R, ray / np.linalg.norm(ray) * depth - R @ held
        if (corners @ R.T + pose[:3, 3])[:, 2].min() < 0.05:
            continue
        pixels = pixels_of(corners, pose, camera)
        margin = 10.0
        inside = ((pixels > margin) & (pixels < [camera.width - margin, camera.height - margin])).all(axis=1)
        if inside.all() or (lets_cut and inside.mean() > 0.5):
            poses.append(pose)
    return poses


def render_all(
    pattern: Pattern, poses: Sequence[NDArray[np.float64]], camera: Camera, **how: object
) -> list[NDArray[np.uint8]]:
    rays = rays_of(camera)
    return [render(pattern, pose, camera, rays, seed, **how) for seed, pose in enumerate(poses)]  # type: ignore[arg-type]
