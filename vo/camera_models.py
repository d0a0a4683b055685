"""Cameras in the terms of other programs: at another size, and as COLMAP and nerfstudio name them. Pure.

COLMAP and nerfstudio put (0.5, 0.5) at the centre of the top-left pixel, we put (0, 0) there: half a pixel is added to
principal points and keypoints on the way out. OpenCV's coefficients keep their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.types import Camera, CameraModel, ConfigError, FloatArray

HALF_PIXEL = 0.5
_NUM_RATIONAL = 8


@dataclass(frozen=True, slots=True)
class ColmapCamera:
    """A camera as a line of cameras.txt says it."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]


def scaled_camera(camera: Camera, width: int, height: int) -> Camera:
    """The camera of images that were resized to `width` x `height`; distortion acts on rays and stays."""
    if (width, height) == (camera.width, camera.height):
        return camera
    scale = np.array([width / camera.width, height / camera.height])
    K = camera.K.copy()
    K[:2] *= scale[:, None]
    K[:2, 2] = (camera.K[:2, 2] + HALF_PIXEL) * scale - HALF_PIXEL
    return Camera(width, height, K, camera.distortion.copy(), camera.model)


def scaled_keypoints(keypoints: NDArray[np.floating], camera: Camera, width: int, height: int) -> FloatArray:
    """Keypoints (N, 2) px in images that were resized to `width` x `height`."""
    scale = np.array([width / camera.width, height / camera.height])
    result: FloatArray = (keypoints.astype(np.float64) + HALF_PIXEL) * scale - HALF_PIXEL
    return result


def pinhole_camera(camera: Camera) -> Camera:
    """The camera of images from which the distortion was taken: same size, same intrinsics."""
    return Camera(camera.width, camera.height, camera.K.copy())


def colmap_camera(camera: Camera) -> ColmapCamera:
    """PINHOLE, OPENCV, FULL_OPENCV or OPENCV_FISHEYE, whichever says exactly what `camera` does.

    Raises ConfigError for distortion that COLMAP has no model for.
    """
    K, distortion = camera.K, tuple(camera.distortion.tolist())
    base = (K[0, 0], K[1, 1], K[0, 2] + HALF_PIXEL, K[1, 2] + HALF_PIXEL)
    if K[0, 1] != 0:
        raise ConfigError(f"the camera has a skew of {K[0, 1]:g} px, for which COLMAP has no model; use --undistort")
    if camera.model is CameraModel.PINHOLE:
        model, params = "PINHOLE", base
    elif camera.model is CameraModel.FISHEYE:
        model, params = "OPENCV_FISHEYE", (*base, *distortion)
    elif not any(distortion[4:]):
        model, params = "OPENCV", (*base, *distortion[:4])
    elif not any(distortion[_NUM_RATIONAL:]):
        padded = (*distortion[:_NUM_RATIONAL], *(0.0,) * (_NUM_RATIONAL - len(distortion)))
        model, params = "FULL_OPENCV", (*base, *padded)
    else:
        raise ConfigError(
            f"the camera has {len(distortion)} distortion coefficients (thin prism or tilt), for which COLMAP has no "
            "model; use --undistort"
        )
    return ColmapCamera(model, camera.width, camera.height, tuple(float(value) for value in params))


def nerfstudio_camera(camera: Camera) -> dict[str, str | int | float]:
    """The intrinsics as keys of a transforms.json.

    Raises ConfigError for distortion that nerfstudio has no model for: it knows OpenCV's first five coefficients.
    """
    K, distortion = camera.K, camera.distortion.tolist()
    if K[0, 1] != 0 or (camera.model is CameraModel.BROWN and any(distortion[5:])):
        raise ConfigError("nerfstudio has no model for skew, nor for distortion beyond k1 k2 p1 p2 k3; use --undistort")
    fields: dict[str, str | int | float] = {
        "camera_model": "OPENCV_FISHEYE" if camera.model is CameraModel.FISHEYE else "OPENCV",
        "w": camera.width,
        "h": camera.height,
        "fl_x": float(K[0, 0]),
        "fl_y": float(K[1, 1]),
        "cx": float(K[0, 2] + HALF_PIXEL),
        "cy": float(K[1, 2] + HALF_PIXEL),
    }
    names = ("k1", "k2", "k3", "k4") if camera.model is CameraModel.FISHEYE else ("k1", "k2", "p1", "p2", "k3")
    return fields | {name: float(value) for name, value in zip(names, distortion, strict=False)}
