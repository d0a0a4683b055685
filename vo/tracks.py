"""Tracks: scene points followed over frames, with stable ids, and the landmarks triangulated from them.

Arrays of all live tracks lie side by side, sorted by id; ids rise for ever and are never used twice. A track lives as
long as a frame of the window or the current frame sees it. Every frame asks for the rows of thousands of ids, so these
are looked up and not searched for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vo.types import FloatArray, FrameTracks, Track

IntArray = NDArray[np.int64]

# Ids that are looked up, for each live track and at least: few tracks live on from before the last thousands of ids.
_SPAN_PER_TRACK, _MIN_SPAN = 4, 1 << 14


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


class _Columns(NamedTuple):
    """What is known of every track; shapes (N,) but for the points and colors (N, 3)."""

    ids: IntArray
    lengths: NDArray[np.int32]
    p_world: FloatArray
    has_landmark: NDArray[np.bool_]
    colors: NDArray[np.uint8]


def _grown(column: NDArray[Any], size: int) -> NDArray[Any]:
    grown = np.empty((size, *column.shape[1:]), column.dtype)
    grown[: len(column)] = column
    return grown


class _RowIndex:
    """The row of every id: by one look for the newest ids, of which a table of bounded size is kept, else by search."""

    def __init__(self) -> None:
        self._ids: IntArray = np.zeros(0, np.int64)
        self._before = -1  # the id whose place, the first, stays empty: what is older ends up there
        self._rows: IntArray = np.full(2, -1, np.int64)
        self._num_older = 0

    def rebuild(self, ids: IntArray, next_id: int) -> None:
        """All rows anew; ids (N,) rise, and none is above `next_id`."""
        span = _SPAN_PER_TRACK * len(ids) + _MIN_SPAN
        first = max(int(ids[0]) if len(ids) else next_id, next_id - span)
        self._ids, self._before = ids, first - 1
        # Half as much again for the ids to come, and a last place that stays empty.
        self._rows = np.full((next_id - first) * 3 // 2 + _MIN_SPAN, -1, np.int64)
        self._num_older = int(np.searchsorted(ids, first))
        self._rows[ids[self._num_older :] - self._before] = np.arange(self._num_older, len(ids))

    def extend(self, ids: IntArray, num_born: int, next_id: int) -> None:
        """The last `num_born` of the ids (N,) are new."""
        if next_id - self._before >= len(self._rows):
            self.rebuild(ids, next_id)
            return
        self._ids = ids
        start = next_id - num_born - self._before
        self._rows[start : start + num_born] = np.arange(len(ids) - num_born, len(ids))

    def rows_of(self, ids: IntArray) -> IntArray:
        """(N,) rows, -1 where there is none."""
        rows = self._rows.take(ids - self._before, mode="clip")
        if self._num_older:
            is_older = np.flatnonzero((ids <= self._before) & (ids >= 0))
            if len(is_older):
                of_older, older = ids[is_older], self._ids[: self._num_older]
                at = np.minimum(np.searchsorted(older, of_older), self._num_older - 1)
                rows[is_older] = np.where(older[at] == of_older, at, -1)
        return rows


class TrackTable:
    """Owns every track's state; frames hold ids only.

    max_history: frames of which keypoints are kept for `track()`.
    """

    def __init__(self, max_history: int = 100) -> None:
        self._next_id = 0
        self._index = _RowIndex()
        # With room for tracks to come; what holds some is looked at under the names below.
        self._columns = _Columns(
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros((0, 3)),
            np.zeros(0, np.bool_),
            np.zeros((0, 3), np.uint8),
        )
        self._ids, self._lengths, self._p_world, self._has_landmark, self._colors = self._columns
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
        self._resize(len(self._ids) + len(born))
        new = slice(len(self._ids) - len(born), None)
        self._ids[new], self._lengths[new], self._has_landmark[new] = track_ids[born], 0, False
        self._p_world[new], self._colors[new] = np.nan, 128 if colors is None else colors[born]
        self._index.extend(self._ids, len(born), self._next_id)
        self._lengths[self._rows(track_ids)] += 1
        self._history.append(_Sighting(frame_index, track_ids, keypoints))
        return track_ids

    def landmarks(self, track_ids: IntArray) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Points (N, 3) in the world, NaN without a landmark, and whether there is one (N,); -1 has none."""
        rows = self.rows_of(track_ids)
        has_landmark = self.has_landmark(rows)
        points = np.full((len(track_ids), 3), np.nan)
        points[has_landmark] = self._p_world[rows[has_landmark]]
        return points, has_landmark

    def rows_of(self, track_ids: IntArray) -> IntArray:
        """Row (N,) of each track in the table, -1 for those that are not alive; good until the table changes.

        Rows rise with the ids and are below `len`, which makes what concerns many tracks a matter of counting.
        """
        return self._index.rows_of(track_ids)

    def ids(self, rows: IntArray) -> IntArray:
        """The tracks (N,) in these rows."""
        return self._ids[rows]

    def has_landmark(self, rows: IntArray) -> NDArray[np.bool_]:
        """Whether the tracks in these rows (N,) have a point; row -1 has none."""
        if len(self._ids) == 0:
            return np.zeros(len(rows), np.bool_)
        found: NDArray[np.bool_] = self._has_landmark[rows] & (rows >= 0)
        return found

    def points(self, rows: IntArray) -> FloatArray:
        """Points (N, 3) in the world of the tracks in these rows, NaN without a landmark."""
        return self._p_world[rows]

    def shared_rows(self, ids0: IntArray, ids1: IntArray) -> tuple[IntArray, IntArray]:
        """Places in two arrays of ids at which both name the same live track, by rising id."""
        rows0, rows1 = self.rows_of(ids0), self.rows_of(ids1)
        # One more for those without a row, which must not meet.
        place = np.full(len(self._ids) + 1, -1, np.int64)
        place[rows0] = np.arange(len(rows0))
        place[-1] = -1
        places0 = place[rows1]
        places1 = np.flatnonzero(places0 >= 0)
        places1 = places1[np.argsort(rows1[places1], kind="stable")]
        return places0[places1], places1

    def colors(self, track_ids: IntArray) -> NDArray[np.uint8]:
        """RGB (N, 3) of where each track was first seen."""
        return self._colors[self._rows(track_ids)]

    def alive(self, track_ids: IntArray) -> NDArray[np.bool_]:
        """Whether each track (N,) is still in the table."""
        return self.rows_of(track_ids) >= 0

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
        self._p_world[:] = center + factor * (self._p_world - center)

    def prune(self, kept_ids: IntArray) -> None:
        """Lets every track die that is not among `kept_ids` (any order, repeats and -1 allowed)."""
        keep = np.zeros(len(self._ids), np.bool_)
        rows = self.rows_of(kept_ids)
        keep[rows[rows >= 0]] = True
        num_kept = int(np.count_nonzero(keep))
        for column in self._columns:
            column[:num_kept] = column[: len(keep)][keep]
        self._resize(num_kept)
        self._index.rebuild(self._ids, self._next_id)

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
        rows = self.rows_of(np.array([track_id]))
        if rows[0] < 0:
            raise KeyError(track_id)
        seen = [(s, np.flatnonzero(s.track_ids == track_id)) for s in self._history]
        seen = [(s, row) for s, row in seen if len(row)]
        point = self._p_world[rows[0]].copy() if self._has_landmark[rows[0]] else None
        keypoints = np.array([s.keypoints[row[0]] for s, row in seen], np.float32).reshape(-1, 2)
        return Track(track_id, np.array([s.frame_index for s, _ in seen], np.int64), keypoints, point)

    def _resize(self, num_tracks: int) -> None:
        """Makes room, half as much again where there is not enough: tracks begin in every frame."""
        if num_tracks > len(self._columns.ids):
            room = num_tracks * 3 // 2
            self._columns = _Columns(*(_grown(column, room) for column in self._columns))
        columns = self._columns
        self._ids, self._lengths = columns.ids[:num_tracks], columns.lengths[:num_tracks]
        self._p_world, self._has_landmark = columns.p_world[:num_tracks], columns.has_landmark[:num_tracks]
        self._colors = columns.colors[:num_tracks]

    def _rows(self, track_ids: IntArray) -> IntArray:
        rows = self.rows_of(track_ids)
        if len(rows) and rows.min() < 0:
            raise KeyError(f"tracks {track_ids[rows < 0][:5].tolist()} are not alive")
        return rows
