"""The road as a ruler: the distance of the ground plane below the camera, from how the road moves in the image.

Two keyframes whose relative pose is known in map units see the road through the homography of its plane (Hartley and
Zisserman, Multiple View Geometry, section 13.1). The plane that aligns the two images of the road best, to a fraction
of a pixel over thousands of pixels, tells how many map units the camera is above the ground; its height in metres is
known. Landmarks would be simpler, but detectors find few of them on asphalt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.config import GroundPlaneScaleConfig
from vo.geometry import homogeneous, project, undistort
from vo.types import Camera, CameraModel, FloatArray

_BLUR_PX = 1.0
_PIXEL_STEP = 2
_MAX_PIXELS = 5000
_NUM_CANDIDATES = 40
_ITERATIONS = 12
_MIN_INSIDE = 0.4  # share of the road that must be in both images
_HUBER = 1.345


@dataclass(frozen=True, slots=True, eq=False)
class GroundPlane:
    """A plane n . X = distance in the current camera's frame.

    normal        (3,) unit, down: about (0, 1, 0).
    distance      of the camera from the plane, map units.
    sigma         standard deviation of ln(distance), from the alignment alone.
    correlation   of the two images of the road under it, 1 is perfect.
    tilt_deg      angle between the normal and the one expected.
    """

    normal: FloatArray
    distance: float
    sigma: float
    correlation: float
    tilt_deg: float


@dataclass(frozen=True, slots=True, eq=False)
class _Road:
    """What the alignment compares: values (P,) of the current image on rays (P, 3), and the earlier image with its
    gradients by x and y (H, W, 3).
    """

    rays: FloatArray
    values: FloatArray
    earlier: NDArray[np.float32]
    camera: Camera
    T_earlier_current: FloatArray


def find_ground_plane(
    earlier: NDArray[np.uint8],
    current: NDArray[np.uint8],
    T_earlier_current: FloatArray,
    camera: Camera,
    config: GroundPlaneScaleConfig,
) -> GroundPlane | None:
    """The plane under which the road in the `current` image lands best on the `earlier` one; None if none is found.

    earlier, current   (H, W) or (H, W, 3) uint8.
    T_earlier_current  (4, 4), translation in map units; without enough of it the road does not move and says nothing.
    """
    road = _road(earlier, current, T_earlier_current, camera, config)
    if road is None:
        return None
    normal = prior_normal(config)
    start = _best_candidate(road, normal, config)
    found = None if start is None else _aligned(road, start, normal, config)
    if found is None or not _is_flat(road, found, normal, config):
        return None
    return found


def _is_flat(road: _Road, found: GroundPlane, normal: FloatArray, config: GroundPlaneScaleConfig) -> bool:
    """Whether the near and the far half alone lie as far below: what stands upright in the way moves otherwise."""
    drop = road.rays @ normal
    is_near = drop > np.median(drop)
    halves = [
        _aligned(_selected(road, rows), found.normal / found.distance, normal, config) for rows in (is_near, ~is_near)
    ]
    if halves[0] is None or halves[1] is None:
        return False
    return abs(math.log(halves[0].distance / halves[1].distance)) < config.max_disagreement


def prior_normal(config: GroundPlaneScaleConfig) -> FloatArray:
    """(3,) unit vector down in the camera's frame, of a camera that looks `pitch_deg` below the horizon."""
    pitch = math.radians(config.pitch_deg)
    return np.array([0.0, math.cos(pitch), math.sin(pitch)])


def _road(
    earlier: NDArray[np.uint8],
    current: NDArray[np.uint8],
    T_earlier_current: FloatArray,
    camera: Camera,
    config: GroundPlaneScaleConfig,
) -> _Road | None:
    """The pixels where the road must be for the prior normal: ahead, near, and not far to the sides."""
    rays, pixels = _road_rays(camera, config)
    if len(rays) < config.min_pixels:
        return None
    image0, image1 = _smooth(earlier), _smooth(current)
    values = image1[pixels[:, 1], pixels[:, 0]].astype(np.float64)
    dx = cv2.Scharr(image0, cv2.CV_32F, 1, 0) / 32.0
    dy = cv2.Scharr(image0, cv2.CV_32F, 0, 1) / 32.0
    return _Road(rays, values, np.dstack([image0, dx, dy]).astype(np.float32), camera, T_earlier_current)


def _selected(road: _Road, rows: NDArray[np.bool_] | slice) -> _Road:
    return _Road(road.rays[rows], road.values[rows], road.earlier, road.camera, road.T_earlier_current)


def _road_rays(camera: Camera, config: GroundPlaneScaleConfig) -> tuple[FloatArray, NDArray[np.int64]]:
    """Rays (P, 3) with z = 1 and pixels (P, 2) of the road between the configured distances, in camera heights."""
    xs, ys = np.meshgrid(np.arange(0, camera.width, _PIXEL_STEP), np.arange(0, camera.height, _PIXEL_STEP))
    pixels = np.stack([xs.ravel(), ys.ravel()], axis=1)
    pixels = pixels[pixels[:, 1] > camera.K[1, 2]]
    rays = homogeneous(undistort(pixels.astype(np.float64), camera))
    drop = rays @ prior_normal(config)
    drop = np.where(drop > 1e-6, drop, 1e-6)
    ahead, side = 1.0 / drop, np.abs(rays[:, 0]) / drop
    is_road = (ahead > config.min_ahead) & (ahead < config.max_ahead) & (side < config.max_side)
    chosen = np.flatnonzero(is_road)
    chosen = chosen[:: max(1, len(chosen) // _MAX_PIXELS)]
    return rays[chosen], pixels[chosen]


def _smooth(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.GaussianBlur(gray.astype(np.float32), (0, 0), _BLUR_PX), np.float32)


def _landing(road: _Road, plane: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Where the road's pixels land in the earlier image, (P, 2) px, and their points there (P, 3), up to depth."""
    R, t = road.T_earlier_current[:3, :3], road.T_earlier_current[:3, 3]
    points = road.rays @ R.T + np.outer(road.rays @ plane, t)
    if road.camera.model is CameraModel.PINHOLE:  # cv2.projectPoints would take most of the time here
        K, z = road.camera.K, np.where(np.abs(points[:, 2:]) > 1e-9, points[:, 2:], 1e-9)
        return points[:, :2] / z @ K[:2, :2].T + K[:2, 2], points
    return project(points, road.camera), points


def _sampled(road: _Road, plane: FloatArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Value and gradient (P, 3) where the road's pixels land, their points there (P, 3), and which land inside."""
    pixels, points = _landing(road, plane)
    height, width = road.earlier.shape[:2]
    inside = (pixels >= 1).all(axis=1) & (pixels[:, 0] <= width - 2) & (pixels[:, 1] <= height - 2)
    inside &= points[:, 2] > 0
    where = np.where(inside[:, None], pixels, 1.0).astype(np.float32)
    sampled = cv2.remap(road.earlier, where[None, :, 0].copy(), where[None, :, 1].copy(), cv2.INTER_LINEAR)
    return np.asarray(sampled[0], np.float64), points, inside


def _correlation(road: _Road, plane: FloatArray) -> float:
    """Of the two images under a plane; -1 where too little of the road is in both."""
    sampled, _, inside = _sampled(road, plane)
    if inside.mean() < _MIN_INSIDE:
        return -1.0
    a, b = road.values[inside], sampled[inside, 0]
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / max(math.sqrt(float((a @ a) * (b @ b))), 1e-9))


def _best_candidate(road: _Road, normal: FloatArray, config: GroundPlaneScaleConfig) -> FloatArray | None:
    """The plane, as normal / distance, with the best correlation among distances that move the road by 1 to 60 px."""
    travel = float(np.linalg.norm(road.T_earlier_current[:3, 3]))
    if travel == 0:
        return None
    still, _ = _landing(road, np.zeros(3))
    moved, points = _landing(road, normal / (1000.0 * travel))
    ahead = points[:, 2] > 0
    flow_px = 1000.0 * float(np.median(np.linalg.norm(moved[ahead] - still[ahead], axis=1))) if ahead.any() else 0.0
    if flow_px <= 0:
        return None
    # flow_px: of a camera one `travel` above the ground; the flow goes with 1 / distance.
    flows = np.geomspace(config.min_flow_px, config.max_flow_px, _NUM_CANDIDATES)
    planes = [normal / (travel * flow_px / flow) for flow in flows]
    coarse = _selected(road, slice(None, None, 4))
    scores = [_correlation(coarse, plane) for plane in planes]
    best = int(np.argmax(scores))
    return planes[best] if scores[best] > 0 else None


def _aligned(road: _Road, start: FloatArray, normal: FloatArray, config: GroundPlaneScaleConfig) -> GroundPlane | None:
    """Gauss-Newton on brightness over plane / distance, gain and offset, with Huber weights and the normal's prior."""
    plane = start
    information = np.eye(3)
    for _ in range(_ITERATIONS):
        solved = _step(road, plane, normal, config)
        if solved is None:
            return None
        delta, information = solved
        plane = plane + delta
        if np.linalg.norm(delta) < 1e-5 * np.linalg.norm(plane):
            break
    distance = 1.0 / float(np.linalg.norm(plane))
    direction = plane * distance
    # ln(distance) changes with the plane as -direction * distance
    gradient = direction * distance
    sigma = math.sqrt(float(gradient @ np.linalg.solve(information, gradient)))
    tilt_deg = math.degrees(math.acos(min(1.0, float(direction @ normal))))
    return GroundPlane(direction, distance, sigma, _correlation(road, plane), tilt_deg)


def _step(
    road: _Road, plane: FloatArray, normal: FloatArray, config: GroundPlaneScaleConfig
) -> tuple[FloatArray, FloatArray] | None:
    """A Gauss-Newton step of the plane (3,) and the information (3, 3) it stands on."""
    sampled, points, inside = _sampled(road, plane)
    if inside.mean() < _MIN_INSIDE:
        return None
    J_plane = _brightness_jacobian(road, points, sampled[:, 1], sampled[:, 2])[inside]
    now, then = road.values[inside], sampled[inside, 0]
    J = np.column_stack([J_plane, -now, -np.ones(len(now))])
    gain = float((now - now.mean()) @ (then - then.mean())) / max(float(((now - now.mean()) ** 2).sum()), 1e-9)
    residuals = then - then.mean() - gain * (now - now.mean())
    noise = max(1.4826 * float(np.median(np.abs(residuals - np.median(residuals)))), 0.5)
    weights = 1.0 / np.maximum(1.0, np.abs(residuals) / (_HUBER * noise)) / noise**2 / config.pixel_correlation
    H = J.T @ (weights[:, None] * J)
    g = J.T @ (weights * residuals)
    P, prior_g = _normal_prior(plane, normal, config)
    H[:3, :3] += P
    g[:3] += prior_g
    H += 1e-9 * np.diag(np.diag(H))
    delta = -np.linalg.solve(H, g)
    information = H[:3, :3] - H[:3, 3:] @ np.linalg.solve(H[3:, 3:], H[3:, :3])
    return delta[:3], information


def _brightness_jacobian(road: _Road, points: FloatArray, dx: FloatArray, dy: FloatArray) -> FloatArray:
    """(P, 3) change of the earlier image's brightness at the landing with the plane; distortion left out."""
    t, K = road.T_earlier_current[:3, 3], road.camera.K
    z = np.where(points[:, 2] > 1e-9, points[:, 2], 1e-9)
    u = K[0, 0] * (t[0] - points[:, 0] / z * t[2]) / z
    v = K[1, 1] * (t[1] - points[:, 1] / z * t[2]) / z
    jacobian: FloatArray = (dx * u + dy * v)[:, None] * road.rays
    return jacobian


def _normal_prior(
    plane: FloatArray, normal: FloatArray, config: GroundPlaneScaleConfig
) -> tuple[FloatArray, FloatArray]:
    """Information and gradient of the tilt of the plane against the expected normal."""
    across = (np.eye(3) - np.outer(normal, normal)) / (float(plane @ normal) * math.radians(config.tilt_sigma_deg))
    P = across.T @ across
    return P, P @ plane
