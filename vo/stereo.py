"""Metric depths from a second camera: the pair is rectified, matched densely, and read at the keypoints."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.config import StereoScaleConfig
from vo.geometry import homogeneous, undistort
from vo.types import Camera, CameraModel, FloatArray, StereoRig

# Penalties of semi-global matching for steps in disparity of one and of more pixels, per pixel of a block.
_PENALTY_STEP, _PENALTY_JUMP = 8, 32
_UNIQUENESS_PERCENT = 10
_SUBPIXEL = 16.0
_MAX_STEP_PX = 1.0
_PATCH_RADIUS_PX = 5
_PATCH_BLUR_PX = 0.8
_PATCH_ITERATIONS = 5
_MIN_SLOPE = 1.0  # brightness per pixel along the row, root mean square
# What the second camera may stand too high, low, near or far, of the baseline: KITTI's colour pair has 0.005.
_MAX_SLANT = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class _Rectification:
    """How a rig becomes a pair whose rows agree.

    R_rectified_camera0  (3, 3).
    focal_px, centre_px  of rectified camera 0; offset_px is what its centre is to the right of that of camera 1.
    maps0, maps1         x and y (H, W) float32 px in the images as taken; None for images that are rectified already.
    """

    R_rectified_camera0: FloatArray
    focal_px: tuple[float, float]
    centre_px: tuple[float, float]
    offset_px: float
    baseline_m: float
    maps0: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    maps1: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None


class StereoDepth:
    """Depths of keypoints from pairs of images of one rig. Semi-global matching (Hirschmueller 2008), checked from
    right to left.
    """

    def __init__(self, rig: StereoRig, config: StereoScaleConfig) -> None:
        """Raises ValueError unless camera 1 stands to the right of camera 0."""
        x, y, z = rig.T_camera0_camera1[:3, 3]
        if x <= 2.0 * max(abs(y), abs(z)):
            raise ValueError(f"T_camera0_camera1: expected camera 1 to the right of camera 0, got {x:g} {y:g} {z:g} m")
        self._rig = rig
        self._config = config
        self._rectification = _as_taken(rig) if _is_rectified(rig) else _rectified(rig)

    def depths(
        self, image0: NDArray[np.uint8], image1: NDArray[np.uint8], keypoints: NDArray[np.floating]
    ) -> FloatArray:
        """Depths (N,) m, z in the frame of camera 0, of keypoints (N, 2) px in `image0`; NaN where there is none.

        image0, image1  (H, W) or (H, W, 3) uint8 as taken.
        """
        found, config = self._rectification, self._config
        left, right = self._pair(image0, image1)
        R = found.R_rectified_camera0
        rays = homogeneous(undistort(keypoints.astype(np.float64), self._rig.camera0)) @ R.T
        pixels = rays[:, :2] / rays[:, 2:] * found.focal_px + found.centre_px
        whole_px = _bilinear(_checked_disparity(left, right, config), pixels)
        disparity_px = _refined(left, right, pixels, whole_px) - found.offset_px
        with np.errstate(invalid="ignore", divide="ignore"):
            z_rectified = np.where(
                disparity_px >= config.min_disparity_px, found.focal_px[0] * found.baseline_m / disparity_px, np.nan
            )
        # A point at z along its rectified ray, turned back into camera 0: its depth there is the third row's.
        depths: FloatArray = z_rectified * (rays / rays[:, 2:] @ R)[:, 2]
        return depths

    def disparity(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(H, W) px of the rectified pair, left minus right; NaN where the two directions disagree."""
        return _checked_disparity(*self._pair(image0, image1), self._config)

    def _pair(
        self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Both images in gray, rectified."""
        left, right = _gray(image0), _gray(image1)
        found = self._rectification
        if found.maps0 is not None and found.maps1 is not None:
            left = np.asarray(cv2.remap(left, *found.maps0, cv2.INTER_LINEAR), np.uint8)
            right = np.asarray(cv2.remap(right, *found.maps1, cv2.INTER_LINEAR), np.uint8)
        return left, right


def _checked_disparity(
    left: NDArray[np.uint8], right: NDArray[np.uint8], config: StereoScaleConfig
) -> NDArray[np.float32]:
    """(H, W) px of a rectified pair; NaN where matching from the right finds something else."""
    from_left = _matched(left, right, config)
    # Mirrored, the right image is a left one.
    from_right = _matched(right[:, ::-1], left[:, ::-1], config)[:, ::-1]
    columns, rows = np.meshgrid(np.arange(left.shape[1]), np.arange(left.shape[0]))
    partners = np.rint(columns - np.nan_to_num(from_left, nan=np.inf)).clip(-1, left.shape[1] - 1)
    there = from_right[rows, np.maximum(partners, 0).astype(np.int64)]
    with np.errstate(invalid="ignore"):
        agrees = (partners >= 0) & (np.abs(there - from_left) <= config.consistency_px)
    return np.where(agrees, from_left, np.float32(np.nan))


def _refined(
    left: NDArray[np.uint8], right: NDArray[np.uint8], pixels: FloatArray, disparity_px: FloatArray
) -> FloatArray:
    """Disparities (N,) that align the patches around pixels (N, 2) best; NaN where that leads elsewhere.

    Semi-global matching prefers whole pixels by up to a tenth, which is a bias in depth; alignment by gradients along
    the row (Lucas and Kanade 1981) has none.
    """
    known = np.flatnonzero(np.isfinite(disparity_px))
    refined = np.full(len(disparity_px), np.nan)
    if len(known) == 0:
        return refined
    images = [cv2.GaussianBlur(image, (0, 0), _PATCH_BLUR_PX).astype(np.float32) for image in (left, right)]
    slope = np.asarray(cv2.Sobel(images[1], cv2.CV_32F, 1, 0, ksize=1, scale=0.5), np.float32)
    offsets = np.arange(-_PATCH_RADIUS_PX, _PATCH_RADIUS_PX + 1.0)
    xs = pixels[known, 0, None] + np.tile(offsets, offsets.size)
    ys = pixels[known, 1, None] + np.repeat(offsets, offsets.size)
    patches = _centred(_at(images[0], xs, ys))
    found = disparity_px[known].copy()
    energy = np.ones(len(known))
    for _ in range(_PATCH_ITERATIONS):
        partners, slopes = _at(images[1], xs - found[:, None], ys), _centred(_at(slope, xs - found[:, None], ys))
        energy = (slopes**2).sum(axis=1)
        found = found + (slopes * (_centred(partners) - patches)).sum(axis=1) / np.maximum(energy, 1e-6)
    is_near = (np.abs(found - disparity_px[known]) <= _MAX_STEP_PX) & (energy > _MIN_SLOPE**2 * offsets.size**2)
    refined[known[is_near]] = found[is_near]
    return refined


def _at(image: NDArray[np.float32], xs: FloatArray, ys: FloatArray) -> FloatArray:
    """Values between pixels, of the shape of xs and ys; beyond the border those of the border."""
    maps = xs.astype(np.float32), ys.astype(np.float32)
    return np.asarray(cv2.remap(image, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float64)


def _centred(patches: FloatArray) -> FloatArray:
    centred: FloatArray = patches - patches.mean(axis=1, keepdims=True)
    return centred


def _is_rectified(rig: StereoRig) -> bool:
    """Whether a point has the same row in both images as they are taken."""
    camera0, camera1, T = rig.camera0, rig.camera1, rig.T_camera0_camera1
    models = {camera0.model, camera1.model}
    is_aligned = np.allclose(T[:3, :3], np.eye(3), atol=1e-9) and np.abs(T[1:3, 3]).max() < _MAX_SLANT * T[0, 3]
    same_rows = np.allclose(camera0.K[:2, :2], camera1.K[:2, :2]) and abs(camera0.K[1, 2] - camera1.K[1, 2]) < 1e-6
    same_size = (camera0.width, camera0.height) == (camera1.width, camera1.height)
    return bool(models == {CameraModel.PINHOLE} and is_aligned and same_rows and same_size and camera0.K[0, 1] == 0)


def _as_taken(rig: StereoRig) -> _Rectification:
    K = rig.camera0.K
    offset_px = float(K[0, 2] - rig.camera1.K[0, 2])
    centre = (float(K[0, 2]), float(K[1, 2]))
    return _Rectification(np.eye(3), (float(K[0, 0]), float(K[1, 1])), centre, offset_px, rig.baseline_m)


def _rectified(rig: StereoRig) -> _Rectification:
    """Turns both cameras so that the baseline is their common x axis and their rows agree (OpenCV's convention)."""
    camera0, camera1 = rig.camera0, rig.camera1
    R0, R1 = _rectifying_rotations(rig)
    focal_px = min(camera0.focal_px, camera1.focal_px)
    size = (camera0.width, camera0.height)
    centre = _centre(camera0, R0, focal_px)
    K = np.array([[focal_px, 0.0, centre[0]], [0.0, focal_px, centre[1]], [0.0, 0.0, 1.0]])
    maps0, maps1 = _maps(camera0, R0, K, size), _maps(camera1, R1, K, size)
    return _Rectification(R0, (focal_px, focal_px), centre, 0.0, rig.baseline_m, maps0, maps1)


def _rectifying_rotations(rig: StereoRig) -> tuple[FloatArray, FloatArray]:
    """R_rectified_camera0 and R_rectified_camera1: x along the baseline, z as near as can be to both optical axes."""
    T = rig.T_camera0_camera1
    x = T[:3, 3] / rig.baseline_m
    forward = np.array([0.0, 0.0, 1.0]) + T[:3, 2]
    y = np.cross(forward, x)
    y /= np.linalg.norm(y)
    R0 = np.stack([x, y, np.cross(x, y)])
    return R0, R0 @ T[:3, :3]


def _centre(camera: Camera, R_rectified_camera: FloatArray, focal_px: float) -> tuple[float, float]:
    """The principal point that puts the middle of the camera's image into the middle of the rectified one."""
    middle = np.array([[0.5 * (camera.width - 1), 0.5 * (camera.height - 1)]])
    ray = R_rectified_camera @ homogeneous(undistort(middle, camera))[0]
    offset = middle[0] - focal_px * ray[:2] / ray[2]
    return float(offset[0]), float(offset[1])


def _maps(
    camera: Camera, R: FloatArray, K: FloatArray, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """x and y (H, W) px in the image as taken of every rectified pixel."""
    if camera.model is CameraModel.FISHEYE:
        x, y = cv2.fisheye.initUndistortRectifyMap(camera.K, camera.distortion, R, K, size, cv2.CV_32FC1)
    else:
        x, y = cv2.initUndistortRectifyMap(camera.K, camera.distortion, R, K, size, cv2.CV_32FC1)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


def _matched(left: NDArray[np.uint8], right: NDArray[np.uint8], config: StereoScaleConfig) -> NDArray[np.float32]:
    """(H, W) px disparity of the left image, NaN where no match is better than all others."""
    num_disparities = -(-config.max_disparity_px // 16) * 16
    # The first `num_disparities` columns have no full range of partners: a border gives it to them.
    padded = [cv2.copyMakeBorder(image, 0, 0, num_disparities, 0, cv2.BORDER_REPLICATE) for image in (left, right)]
    area = config.block_px**2
    matcher = cv2.StereoSGBM.create(
        minDisparity=0,
        numDisparities=num_disparities,
        blockSize=config.block_px,
        P1=_PENALTY_STEP * area,
        P2=_PENALTY_JUMP * area,
        disp12MaxDiff=-1,
        uniquenessRatio=_UNIQUENESS_PERCENT,
        mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )
    disparity = matcher.compute(padded[0], padded[1])[:, num_disparities:].astype(np.float32) / np.float32(_SUBPIXEL)
    return np.where(disparity > 0, disparity, np.float32(np.nan))


def _bilinear(disparities: NDArray[np.float32], pixels: FloatArray) -> FloatArray:
    """Disparities (N,) between pixels; NaN outside, next to a hole, and where the four around differ: an edge."""
    height, width = disparities.shape
    corner = np.floor(pixels).astype(np.int64)
    inside = (corner >= 0).all(axis=1) & (corner[:, 0] < width - 1) & (corner[:, 1] < height - 1)
    corner = np.where(inside[:, None], corner, 0)
    x, y = (pixels - corner).T
    rows, columns = corner[:, 1, None] + [0, 0, 1, 1], corner[:, 0, None] + [0, 1, 0, 1]
    around = disparities[rows, columns].astype(np.float64)
    weights = np.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y], axis=1)
    with np.errstate(invalid="ignore"):
        is_smooth = around.max(axis=1) - around.min(axis=1) <= _MAX_STEP_PX
    return np.where(inside & is_smooth, (weights * around).sum(axis=1), np.nan)


def _gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image if image.ndim == 2 else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
