"""Depth images that were not taken through the colour camera: what they look like from there.

A Kinect, and every depth camera whose driver does not do it itself, measures depth with a second camera of another
focal length a few centimetres away. Read at the same pixel, such depths belong to other points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.types import Camera, FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class DepthCamera:
    """A pinhole that measures depth, beside the colour camera and looking the same way.

    focal_px, centre_px  (fx, fy) and (cx, cy).
    offset_m             (3,) of the depth camera's centre in the colour camera's frame.
    """

    focal_px: tuple[float, float]
    centre_px: tuple[float, float]
    offset_m: FloatArray


def register_depth(depth_m: NDArray[np.float32], depth_camera: DepthCamera, camera: Camera) -> NDArray[np.float32]:
    """(H, W) m as the colour camera sees it, from (H0, W0) m of the depth camera; 0 where nothing was measured.

    Every reading goes to the pixel its point falls on, the nearest one stays; where the colour camera has the longer
    focal length, to the neighbours too, so that no gaps open. The colour camera's distortion is left out: a few px at
    most in the corners of a depth camera's companion.
    """
    rows, columns = np.nonzero(depth_m > 0)
    z = depth_m[rows, columns].astype(np.float64)
    x = (columns - depth_camera.centre_px[0]) / depth_camera.focal_px[0] * z + depth_camera.offset_m[0]
    y = (rows - depth_camera.centre_px[1]) / depth_camera.focal_px[1] * z + depth_camera.offset_m[1]
    z = z + depth_camera.offset_m[2]
    is_ahead = z > 0
    x, y, z = x[is_ahead], y[is_ahead], z[is_ahead]
    u, v = camera.K[0, 0] * x / z + camera.K[0, 2], camera.K[1, 1] * y / z + camera.K[1, 2]
    registered = np.full(camera.height * camera.width, np.inf, np.float32)
    is_magnified = camera.K[0, 0] > depth_camera.focal_px[0] or camera.K[1, 1] > depth_camera.focal_px[1]
    for round_u, round_v in _FOOTPRINT if is_magnified else ((np.rint, np.rint),):
        column, row = round_u(u).astype(np.int64), round_v(v).astype(np.int64)
        inside = (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
        np.minimum.at(registered, row[inside] * camera.width + column[inside], z[inside].astype(np.float32))
    registered[np.isinf(registered)] = 0.0
    return registered.reshape(camera.height, camera.width)


_FOOTPRINT = ((np.floor, np.floor), (np.floor, np.ceil), (np.ceil, np.floor), (np.ceil, np.ceil))
