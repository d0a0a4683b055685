"""The values that flow between stages: frozen, checked on construction, arrays read-only.

Frames and units follow ARCHITECTURE.md: `p_a = T_a_b @ p_b`; camera x right, y down, z forward; pixel (0, 0) is
the centre of the top-left pixel; radians, nanoseconds, and metres or the named relative scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frontends.base import VoError, WeightsError

__all__ = [
    "Camera",
    "CameraModel",
    "ConfigError",
    "Frame",
    "FrameTracks",
    "ImageCondition",
    "ImageHealth",
    "MapUpdate",
    "PoseEstimate",
    "Rejection",
    "RelativePose",
    "SourceError",
    "StereoRig",
    "Track",
    "TrackingStatus",
    "VoError",
    "WeightsError",
]

FloatArray = NDArray[np.float64]


class ConfigError(VoError):
    """A configuration that cannot be used: names the file, the key path and what is valid there."""


class SourceError(VoError):
    """A source of frames that cannot be read: names the path and the remedy."""


class CameraModel(Enum):
    """How a ray becomes a pixel. `distortion` of a camera holds OpenCV's coefficients for its model."""

    PINHOLE = "pinhole"
    BROWN = "brown"
    FISHEYE = "fisheye"


class TrackingStatus(Enum):
    """What the odometry can say about the current frame."""

    INITIALIZING = "initializing"
    TRACKING = "tracking"
    LOST = "lost"
    RELOCALIZED = "relocalized"


class Rejection(Enum):
    """Why a pose could not be estimated. An expected outcome in vision, hence a value and not an exception."""

    TOO_FEW_MATCHES = "too_few_matches"
    TOO_FEW_INLIERS = "too_few_inliers"
    LOW_PARALLAX = "low_parallax"
    PURE_ROTATION = "pure_rotation"
    DEGENERATE = "degenerate"
    REPEATED_IMAGE = "repeated_image"


def _checked(name: str, array: NDArray[Any], shape: tuple[int | None, ...], dtype: type) -> None:
    """Raise ValueError unless `array` has the dtype and shape (None: any length), then make it read-only."""
    fits = array.shape == shape or (
        array.ndim == len(shape)
        and all(want is None or have == want for have, want in zip(array.shape, shape, strict=True))
    )
    if not fits or array.dtype != dtype:
        expected = f"{tuple('*' if n is None else n for n in shape)} {np.dtype(dtype).name}"
        raise ValueError(f"{name}: expected {expected}, got {array.shape} {array.dtype}")
    array.setflags(write=False)


@dataclass(frozen=True, slots=True, eq=False)
class Camera:
    """Intrinsics of one camera.

    width, height  px.
    K              (3, 3) float64, px.
    distortion     (k,) float64, OpenCV's order for `model`; empty for a pinhole.
    """

    width: int
    height: int
    K: FloatArray
    distortion: FloatArray = field(default_factory=lambda: np.zeros(0))
    model: CameraModel = CameraModel.PINHOLE

    def __post_init__(self) -> None:
        _checked("K", self.K, (3, 3), np.float64)
        _checked("distortion", self.distortion, (None,), np.float64)
        if self.width < 1 or self.height < 1:
            raise ValueError(f"width, height: expected positive, got {self.width} x {self.height}")
        if self.K[0, 0] <= 0 or self.K[1, 1] <= 0:
            raise ValueError(f"K: expected positive focal lengths, got {self.K[0, 0]}, {self.K[1, 1]}")

    @property
    def focal_px(self) -> float:
        """Geometric mean of the two focal lengths, px."""
        return float(np.sqrt(self.K[0, 0] * self.K[1, 1]))


@dataclass(frozen=True, slots=True, eq=False)
class StereoRig:
    """Two cameras that are fixed to each other and take their images at the same time.

    T_camera0_camera1  (4, 4) float64 m: pose of camera 1 in the frame of camera 0, which is that of the odometry.
    """

    camera0: Camera
    camera1: Camera
    T_camera0_camera1: FloatArray

    def __post_init__(self) -> None:
        _checked("T_camera0_camera1", self.T_camera0_camera1, (4, 4), np.float64)
        R = self.T_camera0_camera1[:3, :3]
        if not np.allclose(R @ R.T, np.eye(3), atol=1e-4) or np.linalg.det(R) < 0:
            raise ValueError(f"T_camera0_camera1: expected a rotation in its first three columns, got {R.tolist()}")
        if not self.baseline_m > 0:
            raise ValueError("T_camera0_camera1: the two cameras are at the same place")

    @property
    def baseline_m(self) -> float:
        """Distance between the cameras, m."""
        return float(np.linalg.norm(self.T_camera0_camera1[:3, 3]))


class ImageCondition(Enum):
    """What can be wrong with an image."""

    DARK = "dark"
    COVERED = "covered"
    OVEREXPOSED = "overexposed"
    FROZEN = "frozen"
    BLURRED = "blurred"
    EXPOSURE_JUMP = "exposure_jump"
    FLICKER = "flicker"


_BLIND = frozenset({ImageCondition.DARK, ImageCondition.COVERED, ImageCondition.OVEREXPOSED})


@dataclass(frozen=True, slots=True)
class ImageHealth:
    """What an image is good for; vo/image_health.py measures it.

    brightness, contrast   mean and standard deviation of the grey levels, of the largest there can be.
    sharpness              0.25 where edges are smeared over 8 px and more, 0.5 where they are sharp, up to 1.
    clipped                share of the image that is white.
    conditions             what is wrong with it.
    """

    brightness: float
    contrast: float
    sharpness: float
    clipped: float
    conditions: tuple[ImageCondition, ...] = ()

    @property
    def is_blind(self) -> bool:
        """Whether nothing can be seen in it: what is matched in such an image is noise."""
        return not _BLIND.isdisjoint(self.conditions)


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One image with its time.

    index         0, 1, 2, ... as the source delivers them; a skipped image leaves a gap.
    timestamp_ns  the sensor's clock; strictly rising within a source.
    image         (H, W, 3) RGB or (H, W) gray, uint8.
    depth         (H, W) float32 m, 0 where there is no reading; None where the source has none for this frame.
    right         (H1, W1, 3) or (H1, W1) uint8 of the second camera of a stereo rig at the same time, in that camera's
                  own size; None where the source has none for this frame, or where nobody asked for it.
    follows_gap   the camera was away before this frame and may have moved anywhere meanwhile.
    health        what the image is good for; None where nobody has looked.
    """

    index: int
    timestamp_ns: int
    image: NDArray[np.uint8]
    camera: Camera
    depth: NDArray[np.float32] | None = None
    right: NDArray[np.uint8] | None = None
    follows_gap: bool = False
    health: ImageHealth | None = None

    def __post_init__(self) -> None:
        height, width = self.camera.height, self.camera.width
        shape = (height, width) if self.image.ndim == 2 else (height, width, 3)
        _checked("image", self.image, shape, np.uint8)
        if self.depth is not None:
            _checked("depth", self.depth, (height, width), np.float32)
        if self.right is not None:
            _checked("right", self.right, (None, None) if self.right.ndim == 2 else (None, None, 3), np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class RelativePose:
    """Pose of camera 1 in the frame of camera 0.

    T_camera0_camera1  (4, 4) float64; unit translation unless `is_metric`.
    inliers            (M,) bool over the matches it was estimated from.
    parallax_rad       median angle between the two rays of an inlier, after removing the rotation.
    covariance         (6, 6) float64 of the right perturbation (rho, phi): T exp(xi); translation in the unit of T.
    """

    T_camera0_camera1: FloatArray
    inliers: NDArray[np.bool_]
    parallax_rad: float
    covariance: FloatArray
    is_metric: bool = False

    def __post_init__(self) -> None:
        _checked("T_camera0_camera1", self.T_camera0_camera1, (4, 4), np.float64)
        _checked("inliers", self.inliers, (None,), np.bool_)
        _checked("covariance", self.covariance, (6, 6), np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One scene point followed over frames: a copy for readers, `TrackTable` owns the arrays.

    frame_indices  (L,) int64, rising.
    keypoints      (L, 2) float32 px.
    p_world        (3,) float64 in the world frame and its scale, or None without a landmark.
    """

    track_id: int
    frame_indices: NDArray[np.int64]
    keypoints: NDArray[np.float32]
    p_world: FloatArray | None = None

    def __post_init__(self) -> None:
        _checked("frame_indices", self.frame_indices, (None,), np.int64)
        _checked("keypoints", self.keypoints, (len(self.frame_indices), 2), np.float32)
        if self.p_world is not None:
            _checked("p_world", self.p_world, (3,), np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class FrameTracks:
    """The tracks seen in one frame, as arrays: what the `tracks` topic carries.

    track_ids     (N,) int64, unique, stable over frames.
    keypoints     (N, 2) float32 px in this frame.
    lengths       (N,) int32, frames the track has been seen in, this one included.
    has_landmark  (N,) bool, whether the track has a triangulated point.
    """

    frame_index: int
    timestamp_ns: int
    track_ids: NDArray[np.int64]
    keypoints: NDArray[np.float32]
    lengths: NDArray[np.int32]
    has_landmark: NDArray[np.bool_]

    def __post_init__(self) -> None:
        _checked("track_ids", self.track_ids, (None,), np.int64)
        num_tracks = len(self.track_ids)
        _checked("keypoints", self.keypoints, (num_tracks, 2), np.float32)
        _checked("lengths", self.lengths, (num_tracks,), np.int32)
        _checked("has_landmark", self.has_landmark, (num_tracks,), np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class PoseEstimate:
    """What the odometry says about one frame; published at once and never revised.

    T_world_camera  (4, 4) float64 in the frame of the first keyframe; None while LOST: nothing is made up.
    covariance      (6, 6) float64 of the right perturbation (rho, phi), unit of `scale_source`; None without a pose.
    status          INITIALIZING poses carry rotation only: the translation is held until there is parallax.
    rejection       why this frame could not be posed, or why only its rotation could; None otherwise.
    num_matches     matches to the previous frame.
    num_inliers     matches that agree with the pose.
    stop_layer      layers the matcher ran before it was confident; 0: it has none, or nothing was matched.
    is_stationary   the image does not move: the pose is held.
    segment_id      rises by one when tracking starts anew without a link to the map so far.
    scale_source    "relative": the unit is that of the first landmarks; otherwise the named metric source.
    """

    frame_index: int
    timestamp_ns: int
    T_world_camera: FloatArray | None
    status: TrackingStatus
    covariance: FloatArray | None = None
    rejection: Rejection | None = None
    num_matches: int = 0
    num_inliers: int = 0
    is_keyframe: bool = False
    is_stationary: bool = False
    segment_id: int = 0
    scale_source: str = "relative"
    stop_layer: int = 0

    def __post_init__(self) -> None:
        if self.T_world_camera is not None:
            _checked("T_world_camera", self.T_world_camera, (4, 4), np.float64)
        if self.covariance is not None:
            _checked("covariance", self.covariance, (6, 6), np.float64)
        if self.T_world_camera is None and self.status is not TrackingStatus.LOST:
            raise ValueError(f"T_world_camera: a frame that is {self.status.value} must have a pose")


@dataclass(frozen=True, slots=True, eq=False)
class MapUpdate:
    """What the window has learned anew: corrected keyframes and landmarks. Poses already published stay as they are.

    frame_index, timestamp_ns    the frame with whose step the update came out.
    segment_id, scale_source     of the map it belongs to, as in `PoseEstimate`.
    keyframe_indices             (K,) int64 frame indices of the keyframes it moves or adds, rising.
    keyframe_timestamps_ns       (K,) int64.
    T_world_keyframes            (K, 4, 4) float64, where they are now; replaces what was said of them before.
    landmark_ids                 (L,) int64 ids of the tracks whose points it moves or adds, rising.
    landmarks                    (L, 3) float64 in the world and its scale.
    landmark_colors              (L, 3) uint8 RGB of the image where the point was first seen; gray images repeat.
    removed_landmark_ids         (D,) int64 tracks whose point proved wrong.
    """

    frame_index: int
    timestamp_ns: int
    segment_id: int
    scale_source: str
    keyframe_indices: NDArray[np.int64]
    keyframe_timestamps_ns: NDArray[np.int64]
    T_world_keyframes: FloatArray
    landmark_ids: NDArray[np.int64]
    landmarks: FloatArray
    landmark_colors: NDArray[np.uint8]
    removed_landmark_ids: NDArray[np.int64]

    def __post_init__(self) -> None:
        _checked("keyframe_indices", self.keyframe_indices, (None,), np.int64)
        _checked("keyframe_timestamps_ns", self.keyframe_timestamps_ns, (len(self.keyframe_indices),), np.int64)
        _checked("T_world_keyframes", self.T_world_keyframes, (len(self.keyframe_indices), 4, 4), np.float64)
        _checked("landmark_ids", self.landmark_ids, (None,), np.int64)
        _checked("landmarks", self.landmarks, (len(self.landmark_ids), 3), np.float64)
        _checked("landmark_colors", self.landmark_colors, (len(self.landmark_ids), 3), np.uint8)
        _checked("removed_landmark_ids", self.removed_landmark_ids, (None,), np.int64)
