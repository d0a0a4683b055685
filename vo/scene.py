"""What the viewer shows of a run, as chunks of points and lines: pure, without Open3D, window or clock.

A message changes a few chunks of bounded size, and only those are handed out to be drawn anew: the cost of a frame
does not grow with the length of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vo.types import Camera, FloatArray, PoseEstimate, TrackingStatus

POINTS_PER_CHUNK = 1024
SEGMENTS_PER_CHUNK = 128
KEYFRAMES_PER_CHUNK = 32

Color = tuple[float, float, float]

BACKGROUND: Color = (0.10, 0.11, 0.15)
STATUS_COLORS: dict[TrackingStatus, Color] = {
    TrackingStatus.INITIALIZING: (0.36, 0.62, 1.00),
    TrackingStatus.TRACKING: (0.20, 0.90, 0.40),
    TrackingStatus.RELOCALIZED: (1.00, 0.62, 0.10),
    TrackingStatus.LOST: (1.00, 0.20, 0.25),
}
KEYFRAME_COLOR: Color = (0.55, 0.60, 0.85)
CAMERA_COLOR: Color = (1.00, 0.92, 0.20)
TRUTH_COLOR: Color = (0.95, 0.35, 0.95)

FRUSTUM_SHARE = 0.06
DEFAULT_DEPTH = 1.0
MIN_LANDMARKS_FOR_DEPTH = 20
DEFAULT_CORNERS = np.array([[-0.6, -0.45, 1], [0.6, -0.45, 1], [0.6, 0.45, 1], [-0.6, 0.45, 1]])
_FRUSTUM_LINES = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1]], np.int32)
_POINTS_PER_FRUSTUM = 5
_NUM_SAMPLED = 4000

Float32Array = NDArray[np.float32]


class Layer(Enum):
    """What can be shown and hidden on its own."""

    TRAJECTORY = "trajectory"
    KEYFRAMES = "keyframes"
    LANDMARKS = "landmarks"
    CAMERA = "camera"
    TRUTH = "truth"


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A part of a layer that is drawn at once; it replaces what its name stood for, and is removed where it is empty.

    points  (N, 3) float32 in the frame of its layer: the world; the camera for CAMERA; the truth's world for TRUTH.
    colors  (N, 3) float32 in 0..1 for points, (M, 3) for lines.
    lines   (M, 2) int32 into the points; None for a chunk of points.
    """

    name: str
    layer: Layer
    points: Float32Array
    colors: Float32Array
    lines: NDArray[np.int32] | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing to draw: no point, or no line that has a length (which Open3D does not survive)."""
        if self.lines is None:
            return len(self.points) == 0
        return not np.any(self.points[self.lines[:, 0]] != self.points[self.lines[:, 1]])


class PathChunks:
    """A path of lines in the order of time, each with its colour."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._starts = _Rows(3, np.float32)
        self._ends = _Rows(3, np.float32)
        self._colors = _Rows(3, np.float32)
        self.dirty: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, start: FloatArray, end: FloatArray, color: Color) -> None:
        """Adds one line from `start` (3,) to `end` (3,); a camera that stands still adds none."""
        if np.array_equal(start.astype(np.float32), end.astype(np.float32)):
            return
        self.dirty[len(self) // SEGMENTS_PER_CHUNK] = None
        self._starts.append(start[None])
        self._ends.append(end[None])
        self._colors.append(np.array([color]))

    def chunk(self, number: int) -> Chunk:
        part = slice(number * SEGMENTS_PER_CHUNK, (number + 1) * SEGMENTS_PER_CHUNK)
        starts, ends = self._starts.values[part], self._ends.values[part]
        indices = np.arange(len(starts), dtype=np.int32)
        return Chunk(
            f"{self._layer.value}/{number}",
            self._layer,
            np.concatenate([starts, ends]),
            self._colors.values[part].copy(),
            np.stack([indices, indices + len(starts)], 1).astype(np.int32),
        )


class LandmarkChunks:
    """Landmarks by the id of their track. A point keeps its place, so that a correction touches few chunks."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._points = _Rows(3, np.float32)
        self._colors = _Rows(3, np.uint8)
        self._is_alive = _Rows(1, np.bool_)
        self.dirty: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def update(self, ids: NDArray[np.int64], points: FloatArray, colors: NDArray[np.uint8]) -> None:
        """Adds or moves points (L, 3) with colours (L, 3) uint8."""
        id_list = ids.tolist()
        new = np.array([landmark_id not in self._slots for landmark_id in id_list], bool)
        first = len(self._points)
        for slot, index in enumerate(np.flatnonzero(new).tolist(), first):
            self._slots[id_list[index]] = slot
        self._points.append(points[new])
        self._colors.append(colors[new])
        self._is_alive.append(np.ones((int(new.sum()), 1), np.bool_))
        slots = np.array([self._slots[landmark_id] for landmark_id in id_list], np.int64)
        self._points.values[slots] = points
        self._colors.values[slots] = colors
        self._mark(slots)

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Takes points away; ids that are not there are of no consequence."""
        slots = [self._slots.pop(landmark_id) for landmark_id in ids.tolist() if landmark_id in self._slots]
        self._is_alive.values[slots] = False
        self._mark(np.array(slots, np.int64))

    def clear(self) -> None:
        """Takes all points away."""
        self.remove(np.array(list(self._slots), np.int64))

    def sample(self) -> Float32Array:
        """(S, 3) some of the points, evenly from all of them."""
        alive = np.flatnonzero(self._is_alive.values[:, 0])
        return self._points.values[alive[:: max(1, len(alive) // _NUM_SAMPLED)]]

    def chunk(self, number: int) -> Chunk:
        part = slice(number * POINTS_PER_CHUNK, (number + 1) * POINTS_PER_CHUNK)
        alive = self._is_alive.values[part, 0]
        return Chunk(
            f"{Layer.LANDMARKS.value}/{number}",
            Layer.LANDMARKS,
            self._points.values[part][alive],
            self._colors.values[part][alive].astype(np.float32) / np.float32(255),
        )

    def _mark(self, slots: NDArray[np.int64]) -> None:
        self.dirty.update(dict.fromkeys(np.unique(slots // POINTS_PER_CHUNK).tolist()))


class FrustumChunks:
    """The keyframes as small pyramids, by frame index."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._poses = _Rows(16, np.float64)
        self.dirty: dict[int, None] = {}
        self.corners = DEFAULT_CORNERS * (FRUSTUM_SHARE * DEFAULT_DEPTH)

    def __len__(self) -> int:
        return len(self._slots)

    def update(self, frame_indices: NDArray[np.int64], T_world_keyframes: FloatArray) -> None:
        """Adds or moves keyframes, poses (K, 4, 4)."""
        for frame_index, T in zip(frame_indices.tolist(), T_world_keyframes, strict=True):
            slot = self._slots.setdefault(frame_index, len(self._slots))
            if slot == len(self._poses):
                self._poses.append(T.reshape(1, 16))
            self._poses.values[slot] = T.ravel()
            self.dirty[slot // KEYFRAMES_PER_CHUNK] = None

    def clear(self) -> None:
        """Takes all keyframes away."""
        self._mark_all()
        self._slots = {}
        self._poses = _Rows(16, np.float64)

    def set_corners(self, corners: FloatArray) -> None:
        """Changes the shape of every pyramid: the corners (4, 3) of its base in the frame of the camera."""
        self.corners = corners
        self._mark_all()

    def chunk(self, number: int) -> Chunk:
        poses = self._poses.values[number * KEYFRAMES_PER_CHUNK : (number + 1) * KEYFRAMES_PER_CHUNK].reshape(-1, 4, 4)
        pyramid = frustum_points(self.corners)
        points = np.einsum("kij,pj->kpi", poses[:, :3, :3], pyramid) + poses[:, None, :3, 3]
        offsets = np.arange(len(poses), dtype=np.int32) * _POINTS_PER_FRUSTUM
        lines = (_FRUSTUM_LINES[None] + offsets[:, None, None]).reshape(-1, 2)
        return Chunk(
            f"{Layer.KEYFRAMES.value}/{number}",
            Layer.KEYFRAMES,
            points.reshape(-1, 3).astype(np.float32),
            np.tile(np.array(KEYFRAME_COLOR, np.float32), (len(lines), 1)),
            lines,
        )

    def _mark_all(self) -> None:
        self.dirty.update(dict.fromkeys(range(-(-len(self) // KEYFRAMES_PER_CHUNK))))


class Scene:
    """Everything that is drawn in space, of the newest segment of one run: segments share no frame.

    generation      rises when all that was handed out before is to be removed.
    T_world_camera  (4, 4) where the camera is; None before the first pose.
    T_world_truth   (4, 4) similarity from the truth's world, for the layer TRUTH.
    segment_id      the segment that is shown.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._camera: Camera | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets the run, but not what camera it was taken with."""
        self.generation += 1
        self.segment_id = 0
        self.num_poses = 0
        self.T_world_camera: FloatArray | None = None
        self.T_world_truth = np.eye(4)
        self._is_gap = False
        self._depth: float | None = None
        self._path = PathChunks(Layer.TRAJECTORY)
        self._truth = PathChunks(Layer.TRUTH)
        self._landmarks = LandmarkChunks()
        self._keyframes = FrustumChunks()
        self._is_camera_dirty = False
        self._low, self._high = np.full(3, np.inf), np.full(3, -np.inf)
        self._shape_frusta()

    @property
    def num_landmarks(self) -> int:
        return len(self._landmarks)

    @property
    def num_keyframes(self) -> int:
        return len(self._keyframes)

    @property
    def depth(self) -> float:
        """How far away the scene is, as the first landmarks have it: the size that views and symbols follow."""
        return DEFAULT_DEPTH if self._depth is None else self._depth

    def set_camera(self, camera: Camera) -> None:
        """Takes the opening of the camera for its symbols; distortion is left out."""
        is_same = self._camera is not None and np.array_equal(self._camera.K, camera.K)
        self._camera = camera
        if not is_same:
            self._shape_frusta()

    def add_pose(self, pose: PoseEstimate) -> None:
        """Goes on with the trajectory; a lost frame leaves a gap, closed in its colour once the camera is found."""
        if pose.segment_id < self.segment_id:
            return
        self._enter(pose.segment_id)
        T = pose.T_world_camera
        if T is None:
            self._is_gap = True
            return
        if self.T_world_camera is None:
            self._is_camera_dirty = True
        else:
            color = STATUS_COLORS[TrackingStatus.LOST if self._is_gap else pose.status]
            self._path.add(self.T_world_camera[:3, 3], T[:3, 3], color)
        self._is_gap = False
        self.T_world_camera = T
        self.num_poses += 1
        self._low, self._high = np.minimum(self._low, T[:3, 3]), np.maximum(self._high, T[:3, 3])

    def update_keyframes(
        self,
        segment_id: int,
        frame_indices: NDArray[np.int64],
        T_world_keyframes: FloatArray,
        *,
        is_reset: bool = False,
    ) -> None:
        """Adds or moves keyframes; with `is_reset`, they are all there are."""
        if segment_id < self.segment_id:
            return
        self._enter(segment_id)
        if is_reset:
            self._keyframes.clear()
        self._keyframes.update(frame_indices, T_world_keyframes)

    def update_landmarks(
        self,
        segment_id: int,
        ids: NDArray[np.int64],
        points: FloatArray,
        colors: NDArray[np.uint8],
        removed_ids: NDArray[np.int64],
        *,
        is_reset: bool = False,
    ) -> None:
        """Adds, moves and removes landmarks; with `is_reset`, they are all there are."""
        if segment_id < self.segment_id:
            return
        self._enter(segment_id)
        if is_reset:
            self._landmarks.clear()
        self._landmarks.remove(removed_ids)
        self._landmarks.update(ids, points, colors)
        if self._depth is None and len(points) >= MIN_LANDMARKS_FOR_DEPTH and self.T_world_camera is not None:
            distances = np.linalg.norm(points - self.T_world_camera[:3, 3], axis=1)
            self._depth = max(float(np.median(distances)), 1e-6)
            self._shape_frusta()

    def add_truth(self, start: FloatArray, end: FloatArray) -> None:
        """Goes on with the true path, in its own world: positions (3,)."""
        self._truth.add(start, end, TRUTH_COLOR)

    def next_change(self) -> Chunk | None:
        """A chunk that is to be drawn anew; None when everything that is drawn is as it should be."""
        if self._is_camera_dirty:
            self._is_camera_dirty = False
            return self._current_frustum()
        for layer in (self._path, self._truth, self._keyframes, self._landmarks):
            if layer.dirty:
                number = next(iter(layer.dirty))
                del layer.dirty[number]
                return layer.chunk(number)
        return None

    def bounds(self) -> tuple[FloatArray, FloatArray]:
        """Lowest and highest corner (3,) of the path and of most of the landmarks."""
        low, high = self._low, self._high
        points = self._landmarks.sample()
        if len(points):
            percentiles = np.percentile(points.astype(np.float64), (5, 95), axis=0)
            low, high = np.minimum(low, percentiles[0]), np.maximum(high, percentiles[1])
        if not np.isfinite(low).all():
            return np.full(3, -DEFAULT_DEPTH), np.full(3, DEFAULT_DEPTH)
        return low, high

    def _enter(self, segment_id: int) -> None:
        if segment_id > self.segment_id:
            self.clear()
            self.segment_id = segment_id

    def _shape_frusta(self) -> None:
        self._keyframes.set_corners(image_corners(self._camera) * (FRUSTUM_SHARE * self.depth))
        self._is_camera_dirty = self.T_world_camera is not None

    def _current_frustum(self) -> Chunk:
        points = frustum_points(self._keyframes.corners * 1.5).astype(np.float32)
        colors = np.tile(np.array(CAMERA_COLOR, np.float32), (len(_FRUSTUM_LINES), 1))
        return Chunk(f"{Layer.CAMERA.value}/0", Layer.CAMERA, points, colors, _FRUSTUM_LINES)


def image_corners(camera: Camera | None) -> FloatArray:
    """(4, 3) the corners of the image on the plane z = 1, clockwise from the top left."""
    if camera is None:
        return DEFAULT_CORNERS
    right, bottom = camera.width - 0.5, camera.height - 0.5
    pixels = np.array([[-0.5, -0.5, 1], [right, -0.5, 1], [right, bottom, 1], [-0.5, bottom, 1]])
    rays: FloatArray = pixels @ np.linalg.inv(camera.K).T
    return rays


def frustum_points(corners: FloatArray) -> FloatArray:
    """(5, 3) the tip and the corners of a pyramid, in the frame of its camera."""
    return np.concatenate([np.zeros((1, 3)), corners])


class _Rows:
    """Rows that are added at the end of a growing array."""

    def __init__(self, width: int, dtype: type) -> None:
        self._array: NDArray[Any] = np.zeros((256, width), dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> NDArray[Any]:
        """(L, width) a view."""
        return self._array[: self._length]

    def append(self, rows: NDArray[Any]) -> None:
        end = self._length + len(rows)
        if end > len(self._array):
            grown = np.zeros((max(end, 2 * len(self._array)), self._array.shape[1]), self._array.dtype)
            grown[: self._length] = self.values
            self._array = grown
        self._array[self._length : end] = rows
        self._length = end
