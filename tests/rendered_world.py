"""Images with exact depth of a small world of textured planes: a road, a wall and boxes, through any camera."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.geometry import homogeneous, undistort
from vo.types import Camera

ROAD_Y, WALL_Z = 1.65, 14.0
_TEXTURE_PX = 1024


@dataclass(frozen=True)
class Surface:
    """Part of the plane origin + a u + b v (world), with u and v in m along unit vectors, |u|, |v| below the limits."""

    origin: tuple[float, float, float]
    u: tuple[float, float, float]
    v: tuple[float, float, float]
    half_size: tuple[float, float]
    seed: int


ROAD = Surface((0, ROAD_Y, 0), (1, 0, 0), (0, 0, 1), (1e3, 1e3), 1)
WALL = Surface((0, 0, WALL_Z), (1, 0, 0), (0, 1, 0), (1e3, 1e3), 2)
BOXES = (
    Surface((-1.5, 0.6, 6.0), (1, 0, 0), (0, 1, 0), (0.8, 1.0), 3),
    Surface((1.8, 0.2, 9.0), (1, 0, 0), (0, 1, 0), (1.0, 1.4), 4),
)


@cache
def texture(seed: int) -> NDArray[np.float32]:
    """Noise of several sizes, repeating every _TEXTURE_PX px."""
    rng = np.random.default_rng(seed)
    total = np.zeros((_TEXTURE_PX, _TEXTURE_PX), np.float32)
    for sigma, weight in ((1.2, 1.0), (4.0, 1.0), (16.0, 1.0)):
        noise = cv2.GaussianBlur(
            rng.normal(size=total.shape).astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_REFLECT
        )
        total += weight * noise / noise.std()
    return np.clip(128 + 35 * total, 0, 255)


def render(
    camera: Camera,
    T_world_camera: NDArray[np.float64],
    surfaces: tuple[Surface, ...] = (ROAD, WALL, *BOXES),
    pixels_per_m: float = 60.0,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Gray image (H, W) and depth (H, W) m of what `camera` sees, nearest surface first."""
    xs, ys = np.meshgrid(np.arange(camera.width, dtype=np.float64), np.arange(camera.height, dtype=np.float64))
    rays = homogeneous(undistort(np.stack([xs.ravel(), ys.ravel()], axis=1), camera))
    directions, centre = rays @ T_world_camera[:3, :3].T, T_world_camera[:3, 3]
    depth, image = np.full(len(rays), np.inf), np.zeros(len(rays), np.float32)
    for surface in surfaces:
        u, v, origin = (np.array(vector, np.float64) for vector in (surface.u, surface.v, surface.origin))
        normal = np.cross(u, v)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (origin - centre) @ normal / (directions @ normal)
        z = np.where(np.isfinite(z) & (z > 0.1), z, np.inf)
        points = centre + np.where(np.isfinite(z), z, 0.0)[:, None] * directions - origin
        a, b = points @ u, points @ v
        hit = (z < depth) & (np.abs(a) < surface.half_size[0]) & (np.abs(b) < surface.half_size[1])
        where = np.stack([a, b], axis=1)[hit] * pixels_per_m % (_TEXTURE_PX - 1)
        pattern = texture(surface.seed)
        image[hit] = _bilinear(pattern, where)
        depth[hit] = z[hit]
    shape = (camera.height, camera.width)
    blurred = cv2.GaussianBlur(image.reshape(shape), (0, 0), 0.6)
    depth[~np.isfinite(depth)] = 0.0
    return np.rint(blurred).clip(0, 255).astype(np.uint8), depth.reshape(shape).astype(np.float32)


def _bilinear(pattern: NDArray[np.float32], where: NDArray[np.float64]) -> NDArray[np.float32]:
    corner = np.floor(where).astype(np.int64)
    x, y = (where - corner).T
    column, row = corner.T
    top = (1 - x) * pattern[row, column] + x * pattern[row, column + 1]
    bottom = (1 - x) * pattern[row + 1, column] + x * pattern[row + 1, column + 1]
    return ((1 - y) * top + y * bottom).astype(np.float32)
