"""What the updates of a map amount to: the state that a publisher keeps for consumers that come late. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vo.message_types import KeyframeUpdate, PointsUpdate

MapMessage = KeyframeUpdate | PointsUpdate
# About 600 and 700 kB: an answer must stay well below the limit of a message.
PAGE_KEYFRAMES = 4_000
PAGE_POINTS = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class MapPage:
    """A part of the map, one update for each segment, and where the next part begins: None after the last."""

    updates: tuple[MapMessage, ...]
    next_start: tuple[int, int] | None


class MapStore:
    """All keyframes or all landmarks as they are now, at most `capacity`: the oldest are given up first."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self._capacity = capacity
        self._segments: dict[int, MapMessage] = {}

    def apply(self, update: MapMessage) -> None:
        """Enters one update; a reset forgets everything before it."""
        if update.is_reset:
            self._segments.clear()
        known = self._segments.get(update.segment_id)
        self._segments[update.segment_id] = _as_state(update) if known is None else _merged(known, update)
        self._trim()

    def page(self, first_segment: int, first_id: int, max_elements: int, max_updates: int) -> MapPage:
        """What lies at and behind `first_id` of `first_segment`, in order, within both limits."""
        updates: list[MapMessage] = []
        num_left = max_elements
        for segment_id in sorted(segment for segment in self._segments if segment >= first_segment):
            state = self._segments[segment_id]
            ids = _ids(state)
            start = int(np.searchsorted(ids, first_id)) if segment_id == first_segment else 0
            if start == len(ids):
                continue
            if num_left == 0 or len(updates) == max_updates:
                return MapPage(tuple(updates), (segment_id, int(ids[start])))
            part = _part(state, slice(start, start + num_left))
            updates.append(part)
            num_left -= len(_ids(part))
            if start + len(_ids(part)) < len(ids):
                return MapPage(tuple(updates), (segment_id, int(ids[start + len(_ids(part))])))
        return MapPage(tuple(updates), None)

    def _trim(self) -> None:
        newest = max(self._segments)
        for segment_id in [number for number, state in self._segments.items() if not len(_ids(state))]:
            if segment_id != newest:
                del self._segments[segment_id]
        num_over = sum(len(_ids(state)) for state in self._segments.values()) - self._capacity
        for segment_id in sorted(self._segments):
            if num_over <= 0:
                return
            state = self._segments[segment_id]
            num_elements = len(_ids(state))
            if num_elements <= num_over:
                del self._segments[segment_id]
            else:
                self._segments[segment_id] = _part(state, slice(num_over, None))
            num_over -= num_elements


def _ids(update: MapMessage) -> NDArray[np.int64]:
    return update.keyframe_indices if isinstance(update, KeyframeUpdate) else update.landmark_ids


def _as_state(update: MapMessage) -> MapMessage:
    """The update as a first state, with arrays of its own: those of a message keep all its bytes in memory."""
    if isinstance(update, KeyframeUpdate):
        return replace(
            update,
            keyframe_indices=update.keyframe_indices.copy(),
            keyframe_timestamps_ns=update.keyframe_timestamps_ns.copy(),
            T_world_keyframes=update.T_world_keyframes.copy(),
            is_reset=False,
        )
    return replace(
        update,
        landmark_ids=update.landmark_ids.copy(),
        landmarks=update.landmarks.copy(),
        landmark_colors=update.landmark_colors.copy(),
        removed_landmark_ids=np.zeros(0, np.int64),
        is_reset=False,
    )


def _part(state: MapMessage, part: slice) -> MapMessage:
    if isinstance(state, KeyframeUpdate):
        return replace(
            state,
            keyframe_indices=state.keyframe_indices[part],
            keyframe_timestamps_ns=state.keyframe_timestamps_ns[part],
            T_world_keyframes=state.T_world_keyframes[part],
        )
    return replace(
        state,
        landmark_ids=state.landmark_ids[part],
        landmarks=state.landmarks[part],
        landmark_colors=state.landmark_colors[part],
    )


def _merged(state: MapMessage, update: MapMessage) -> MapMessage:
    """The state after the update: removals first, then what is new or moved."""
    if isinstance(state, KeyframeUpdate) and isinstance(update, KeyframeUpdate):
        ids, order = _merge_order(state.keyframe_indices, update.keyframe_indices)
        return replace(
            update,
            keyframe_indices=ids,
            keyframe_timestamps_ns=np.concatenate((state.keyframe_timestamps_ns, update.keyframe_timestamps_ns))[order],
            T_world_keyframes=np.concatenate((state.T_world_keyframes, update.T_world_keyframes))[order],
            is_reset=False,
        )
    if isinstance(state, PointsUpdate) and isinstance(update, PointsUpdate):
        ids, order = _merge_order(state.landmark_ids, update.landmark_ids, update.removed_landmark_ids)
        return replace(
            update,
            landmark_ids=ids,
            landmarks=np.concatenate((state.landmarks, update.landmarks))[order],
            landmark_colors=np.concatenate((state.landmark_colors, update.landmark_colors))[order],
            removed_landmark_ids=np.zeros(0, np.int64),
            is_reset=False,
        )
    raise ValueError(f"a {type(update).__name__} does not belong into a store of {type(state).__name__}")


def _merge_order(
    known: NDArray[np.int64], new: NDArray[np.int64], removed: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sorted ids after an update, and where each comes from in the known ones followed by the new ones."""
    gone = new if removed is None else np.concatenate((new, removed))
    kept = np.flatnonzero(~np.isin(known, gone))
    ids = np.concatenate((known[kept], new))
    rows = np.concatenate((kept, len(known) + np.arange(len(new))))
    order = np.argsort(ids, kind="stable")
    return ids[order], rows[order]
