"""Tracks: scene points followed over frames, with stable ids, and the landmarks triangulated from them.

Arrays of all live tracks lie side by side, sorted by id; ids rise for ever and are never used twice. A track lives as
long as a frame of the window or the current frame sees it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.types import FloatArray, FrameTracks, Track

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Sighting:
    """One frame's tracks: ids (N,), -1 where a feature has none, and keypoints (N, 2) px."""

    frame_index: int
    track_ids: IntArray
    keypoints: NDArray[np.float32]


def is_among(ids: IntArray, others: IntArray) -> NDArray[np.bool_]:
    """Whether each id (N,) is one of the others (M,): `np.isin` for the few hundred ids of a frame, in less time."""
    if len(others) == 0:
        return np.zeros(len(ids), np.bool_)
    others = np.sort(others)
    found: NDArray[np.bool_] = others[np.minimum(np.searchsorted(others, ids), len(others) - 1)] == ids
    return found


class TrackTable:
    """Owns every track's state; frames hold ids only.

    max_history: frames of which keypoints are kept for `track()`.
    """

    def __init__(self, max_history: int = 100) -> None:
        self._next_id = 0
        self._ids: IntArray = np.zeros(0, np.int64)
        self._lengths: NDArray[np.int32] = np.zeros(0, np.int32)
        self._p_world: FloatArray = np.zeros((0, 3))
        self._has_landmark: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._colors: NDArray[np.uint8] = np.zeros((0, 3), np.uint8)
        self._history: deque[_Sighting] = deque(maxlen=max_history)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_landmarks(self) -> int:
        return int(self._has_landmark.sum())

    def observe(
        self,
        frame_index: int,
        extended_ids: IntArray,
        keypoints: NDArray[np.float32],
        colors: NDArray[np.uint8] | None = None,
    ) -> IntArray:
        """Records a frame: features (N,) extend the track they name, those with -1 begin one. Returns all ids (N,).

        colors (N, 3) RGB are kept for the tracks that begin; gray without them.
        """
        track_ids = extended_ids.copy()
        born = np.flatnonzero(track_ids < 0)
        track_ids[born] = np.arange(self._next_id, self._next_id + len(born))
        self._next_id += len(born)
        self._ids = np.concatenate([self._ids, track_ids[born]])
        self._lengths = np.concatenate([self._lengths, np.zeros(len(born), np.int32)])
        self._p_world = np.concatenate([self._p_world, np.full((len(born), 3), np.nan)])
        self._has_landmark = np.concatenate([self._has_landmark, np.zeros(len(born), np.bool_)])
        born_colors = np.full((len(born), 3), 128, np.uint8) if colors is None else colors[born]
        self._colors = np.concatenate([self._colors, born_colors])
        self._lengths[self._rows(track_ids)] += 1
        self._history.append(_Sighting(frame_index, track_ids, keypoints))
        return track_ids

    def landmarks(self, track_ids: IntArray) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Points (N, 3) in the world, NaN without a landmark, and whether there is one (N,); -1 has none."""
        rows, known = self._find(track_ids)
        has_landmark = known & self._has_landmark[rows] if len(self._ids) else known
        points = np.full((len(track_ids), 3), np.nan)
        points[has_landmark] = self._p_world[rows[has_landmark]]
        return points, has_landmark

    def colors(self, track_ids: IntArray) -> NDArray[np.uint8]:
        """RGB (N, 3) of where each track was first seen."""
        return self._colors[self._rows(track_ids)]

    def alive(self, track_ids: IntArray) -> NDArray[np.bool_]:
        """Whether each track (N,) is still in the table."""
        return self._find(track_ids)[1]

    def set_landmarks(self, track_ids: IntArray, p_world: FloatArray) -> None:
        """Gives tracks (N,) their points (N, 3)."""
        rows = self._rows(track_ids)
        self._p_world[rows], self._has_landmark[rows] = p_world, True

    def drop_landmarks(self, track_ids: IntArray) -> None:
        """Takes the points of tracks (N,) away; the tracks go on."""
        rows = self._rows(track_ids)
        self._p_world[rows], self._has_landmark[rows] = np.nan, False

    def scale_landmarks(self, center: FloatArray, factor: float) -> None:
        """Moves every landmark away from `center` (3,) by the factor: a change of the map's unit."""
        self._p_world = center + factor * (self._p_world - center)

    def prune(self, kept_ids: IntArray) -> None:
        """Lets every track die that is not among `kept_ids` (any order, repeats and -1 allowed)."""
        keep = np.zeros(len(self._ids), np.bool_)
        rows, known = self._find(kept_ids)
        keep[rows[known]] = True
        self._ids, self._lengths = self._ids[keep], self._lengths[keep]
        self._p_world, self._has_landmark = self._p_world[keep], self._has_landmark[keep]
        self._colors = self._colors[keep]

    def frame_tracks(self, frame_index: int, timestamp_ns: int) -> FrameTracks:
        """The tracks of the frame observed last, for publishing."""
        sighting = self._history[-1]
        if sighting.frame_index != frame_index:
            raise ValueError(f"frame_index: the last observed frame is {sighting.frame_index}, not {frame_index}")
        rows = self._rows(sighting.track_ids)
        return FrameTracks(
            frame_index,
            timestamp_ns,
            sighting.track_ids.copy(),
            sighting.keypoints.copy(),
            self._lengths[rows],
            self._has_landmark[rows],
        )

    def track(self, track_id: int) -> Track:
        """One track over the frames still in the history; raises KeyError if it has died."""
        rows, known = self._find(np.array([track_id]))
        if not known[0]:
            raise KeyError(track_id)
        seen = [(s, np.flatnonzero(s.track_ids == track_id)) for s in self._history]
        seen = [(s, row) for s, row in seen if len(row)]
        point = self._p_world[rows[0]].copy() if self._has_landmark[rows[0]] else None
        keypoints = np.array([s.keypoints[row[0]] for s, row in seen], np.float32).reshape(-1, 2)
        return Track(track_id, np.array([s.frame_index for s, _ in seen], np.int64), keypoints, point)

    def _find(self, track_ids: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        """Rows (N,) and whether the row is the track's; rows of unknown ids are 0."""
        if len(self._ids) == 0:
            return np.zeros(len(track_ids), np.int64), np.zeros(len(track_ids), np.bool_)
        rows = np.minimum(np.searchsorted(self._ids, track_ids), len(self._ids) - 1)
        known = self._ids[rows] == track_ids
        return np.where(known, rows, 0), known

    def _rows(self, track_ids: IntArray) -> IntArray:
        rows, known = self._find(track_ids)
        if not known.all():
            raise KeyError(f"tracks {track_ids[~known][:5].tolist()} are not alive")
        return rows
