"""A reconstruction as other programs want it: images with poses and observations, points with colours. Pure.

Everything here is in our conventions; vo/export_formats.py turns them into those of COLMAP and nerfstudio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vo.camera_models import pinhole_camera, scaled_camera, scaled_keypoints
from vo.geometry import homogeneous, invert_pose, project, reproject_each, transform, undistort
from vo.types import Camera, FloatArray, FrameTracks

MIN_PARALLAX_RAD = np.deg2rad(0.5)
REFINEMENT_STEPS = 10
KERNEL_PX = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Landmarks:
    """Points of the map: ids (L,) int64 rising, points (L, 3) in the world, colours (L, 3) uint8 RGB or None."""

    ids: NDArray[np.int64]
    points: FloatArray
    colors: NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True, eq=False)
class PosedFrame:
    """A frame that is to be exported: where its camera was."""

    frame_index: int
    timestamp_ns: int
    T_world_camera: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class ExportImage:
    """One image: its pose, and which landmarks it sees where.

    keypoints     (N, 2) float64 px, (0, 0) is the centre of the top-left pixel.
    landmark_ids  (N,) int64, each in the landmarks of the scene.
    errors_px     (N,) reprojection errors.
    """

    frame: PosedFrame
    keypoints: FloatArray
    landmark_ids: NDArray[np.int64]
    errors_px: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class ExportScene:
    """What is exported; every landmark is seen in at least two images."""

    camera: Camera
    images: tuple[ExportImage, ...]
    landmarks: Landmarks

    @property
    def num_observations(self) -> int:
        return sum(len(image.landmark_ids) for image in self.images)

    @property
    def mean_error_px(self) -> float:
        """Mean reprojection error of all observations; 0 without any."""
        errors = np.concatenate([np.zeros(0), *(image.errors_px for image in self.images)])
        return float(errors.mean()) if len(errors) else 0.0


def build_scene(
    camera: Camera,
    frames: Iterable[PosedFrame],
    tracks: Mapping[int, FrameTracks],
    landmarks: Landmarks,
    max_error_px: float,
) -> ExportScene:
    """The observations that `tracks` (by frame index) hold of `landmarks` in `frames`.

    Observations behind the camera or farther than `max_error_px` from where the landmark projects are left out, and
    so are landmarks that are then seen in fewer than two images.
    """
    images = [_observed(camera, frame, tracks.get(frame.frame_index), landmarks, max_error_px) for frame in frames]
    seen = np.concatenate([np.zeros(0, np.int64), *(image.landmark_ids for image in images)])
    ids, counts = np.unique(seen, return_counts=True)
    kept_ids = ids[counts >= 2]
    is_kept = np.isin(landmarks.ids, kept_ids)
    return ExportScene(
        camera,
        tuple(_restricted(image, kept_ids) for image in images),
        Landmarks(
            landmarks.ids[is_kept],
            landmarks.points[is_kept],
            None if landmarks.colors is None else landmarks.colors[is_kept],
        ),
    )


def rectified(scene: ExportScene) -> ExportScene:
    """The scene in images without distortion: the camera becomes a pinhole, keypoints move accordingly."""
    camera = pinhole_camera(scene.camera)
    K = camera.K
    images = tuple(
        replace(image, keypoints=undistort(image.keypoints, scene.camera) @ K[:2, :2].T + K[:2, 2])
        for image in scene.images
    )
    return _measured(replace(scene, camera=camera, images=images))


def resized(scene: ExportScene, width: int, height: int) -> ExportScene:
    """The scene in images of another size."""
    images = tuple(
        replace(image, keypoints=scaled_keypoints(image.keypoints, scene.camera, width, height))
        for image in scene.images
    )
    return _measured(replace(scene, camera=scaled_camera(scene.camera, width, height), images=images))


def triangulate_tracks(
    camera: Camera, frames: Iterable[PosedFrame], tracks: Mapping[int, FrameTracks], max_error_px: float
) -> Landmarks:
    """Points of all tracks that the frames see under a parallax of at least half a degree, from given poses.

    The point nearest to all rays is refined by a robust Gauss-Newton on the reprojection errors; points whose median
    error is above `max_error_px`, or that lie behind a camera, are left out. The points have no colours.
    """
    observed = [(frame, tracks[frame.frame_index]) for frame in frames if frame.frame_index in tracks]
    if not observed:
        return Landmarks(np.zeros(0, np.int64), np.zeros((0, 3)), None)
    counts = [len(seen.track_ids) for _, seen in observed]
    poses = np.repeat(np.array([frame.T_world_camera for frame, _ in observed]), counts, axis=0)
    rays = undistort(np.concatenate([seen.keypoints for _, seen in observed]), camera)
    ids, tracks_of = np.unique(np.concatenate([seen.track_ids for _, seen in observed]), return_inverse=True)
    order = np.argsort(tracks_of, kind="stable")
    starts = np.searchsorted(tracks_of[order], np.arange(len(ids)))
    points, is_good = _triangulate(poses[order], rays[order], starts, camera.focal_px, max_error_px)
    return Landmarks(ids[is_good].astype(np.int64), points[is_good], None)


def settled(
    landmarks: Landmarks,
    camera: Camera,
    frames: Iterable[PosedFrame],
    tracks: Mapping[int, FrameTracks],
    max_error_px: float,
) -> Landmarks:
    """The landmarks where all frames see them.

    A run refines a landmark with the keyframes of its window: one that lives long follows the newest of them, and the
    oldest do not see it there any more. Those that can be triangulated from all frames are; the others stay.
    """
    points = landmarks.points.copy()
    triangulated = triangulate_tracks(camera, frames, tracks, max_error_px)
    _, rows, others = np.intersect1d(landmarks.ids, triangulated.ids, assume_unique=True, return_indices=True)
    points[rows] = triangulated.points[others]
    return replace(landmarks, points=points)


def _triangulate(
    poses: FloatArray, rays: FloatArray, starts: NDArray[np.intp], focal_px: float, max_error_px: float
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Points of tracks whose observations begin at `starts` of poses (M, 4, 4) and rays (M, 2), and which to trust."""
    counts = np.diff(np.append(starts, len(rays)))
    directions = np.einsum("mij,mj->mi", poses[:, :3, :3], homogeneous(rays))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    across = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    H = np.add.reduceat(across, starts)
    g = np.add.reduceat(np.einsum("mij,mj->mi", across, poses[:, :3, 3]), starts)
    first = np.repeat(directions[starts], counts, axis=0)
    cosines = np.minimum.reduceat(np.einsum("mi,mi->m", first, directions), starts)
    is_good = (counts >= 2) & (cosines < np.cos(MIN_PARALLAX_RAD))
    points = np.zeros((len(starts), 3))
    points[is_good] = np.linalg.solve(H[is_good], g[is_good, :, None])[..., 0]
    for _ in range(REFINEMENT_STEPS):
        points[is_good] += _refinement(poses, rays, starts, points, counts, KERNEL_PX / focal_px)[is_good]
    predicted, depths = reproject_each(poses, np.repeat(points, counts, axis=0))
    errors = np.where(depths > 0, np.linalg.norm(predicted - rays, axis=1), np.inf) * focal_px
    is_good &= np.isfinite(points).all(axis=1) & (_medians(errors, starts, counts) <= max_error_px)
    return points, is_good


def _refinement(
    poses: FloatArray,
    rays: FloatArray,
    starts: NDArray[np.intp],
    points: FloatArray,
    counts: NDArray[np.intp],
    kernel: float,
) -> FloatArray:
    """One damped Gauss-Newton step for every point, with a Cauchy kernel."""
    R = poses[:, :3, :3]
    local = np.einsum("mji,mj->mi", R, np.repeat(points, counts, axis=0) - poses[:, :3, 3])
    depths = np.where(np.abs(local[:, 2]) < 1e-9, 1e-9, local[:, 2])
    predicted = local[:, :2] / depths[:, None]
    residuals = predicted - rays
    J = (R.transpose(0, 2, 1)[:, :2] - predicted[:, :, None] * R.transpose(0, 2, 1)[:, 2:]) / depths[:, None, None]
    weights = 1 / (1 + np.sum(residuals**2, axis=1) / kernel**2)
    H = np.add.reduceat(np.einsum("m,mki,mkj->mij", weights, J, J), starts)
    g = np.add.reduceat(np.einsum("m,mki,mk->mi", weights, J, residuals), starts)
    damping = 1e-9 * np.trace(H, axis1=1, axis2=2) + 1e-300
    return np.asarray(-np.linalg.solve(H + damping[:, None, None] * np.eye(3), g[..., None])[..., 0])


def _medians(values: FloatArray, starts: NDArray[np.intp], counts: NDArray[np.intp]) -> FloatArray:
    """The (upper) median of every run of `values`."""
    groups = np.repeat(np.arange(len(starts)), counts)
    ordered = values[np.lexsort((values, groups))]
    return np.asarray(ordered[starts + counts // 2])


def _observed(
    camera: Camera, frame: PosedFrame, seen: FrameTracks | None, landmarks: Landmarks, max_error_px: float
) -> ExportImage:
    if seen is None or len(landmarks.ids) == 0:
        return ExportImage(frame, np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0))
    rows = np.minimum(np.searchsorted(landmarks.ids, seen.track_ids), len(landmarks.ids) - 1)
    is_known = landmarks.ids[rows] == seen.track_ids
    keypoints = seen.keypoints[is_known].astype(np.float64)
    errors = _errors_px(camera, frame, landmarks.points[rows[is_known]], keypoints)
    is_near = errors <= max_error_px  # False for NaN: behind the camera
    return ExportImage(frame, keypoints[is_near], seen.track_ids[is_known][is_near], errors[is_near])


def _errors_px(camera: Camera, frame: PosedFrame, points: FloatArray, keypoints: FloatArray) -> FloatArray:
    projected = project(transform(invert_pose(frame.T_world_camera), points), camera)
    return np.asarray(np.linalg.norm(projected - keypoints, axis=1))


def _restricted(image: ExportImage, kept_ids: NDArray[np.int64]) -> ExportImage:
    is_kept = np.isin(image.landmark_ids, kept_ids)
    return replace(
        image,
        keypoints=image.keypoints[is_kept],
        landmark_ids=image.landmark_ids[is_kept],
        errors_px=image.errors_px[is_kept],
    )


def _measured(scene: ExportScene) -> ExportScene:
    """The scene with its errors measured in its own camera."""
    landmarks = scene.landmarks
    images = tuple(
        replace(
            image,
            errors_px=_errors_px(
                scene.camera,
                image.frame,
                landmarks.points[np.searchsorted(landmarks.ids, image.landmark_ids)],
                image.keypoints,
            ),
        )
        for image in scene.images
    )
    return replace(scene, images=images)
