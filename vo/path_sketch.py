"""A path of any length, thinned out to what a picture can show."""

from __future__ import annotations

import numpy as np

from vo.trajectory import Trajectory
from vo.types import FloatArray

CAPACITY = 20_000


class PathSketch:
    """Keeps every pose of a short path; of a long one every second, fourth, eighth, ... so that it never grows beyond
    `capacity`. Raises ValueError for a capacity below 2.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        if capacity < 2:
            raise ValueError(f"capacity: expected at least 2, got {capacity}")
        # Filled, so that the system gives the memory now and not page by page in the hours to come.
        self._timestamps_ns = np.full(capacity, -1, np.int64)
        self._T_world_camera = np.full((capacity, 4, 4), np.nan)
        self._begins_part = np.zeros(capacity, np.bool_)
        self._num_kept = self._num_added = 0
        self._stride = 1
        self._is_broken = False

    def add(self, timestamp_ns: int, T_world_camera: FloatArray) -> None:
        """One more pose (4, 4)."""
        if self._num_added % self._stride == 0:
            if self._num_kept == len(self._timestamps_ns):
                self._thin_out()
            if self._num_added % self._stride == 0:
                self._keep(timestamp_ns, T_world_camera)
        self._num_added += 1

    def interrupt(self) -> None:
        """Says that the path is not known up to the next pose."""
        self._is_broken = self._num_added > 0

    @property
    def breaks(self) -> list[int]:
        """Rows of `trajectory` before which the path was interrupted."""
        found: list[int] = np.flatnonzero(self._begins_part[: self._num_kept]).tolist()
        return found

    def trajectory(self) -> Trajectory | None:
        """What is kept, None of nothing."""
        if self._num_kept == 0:
            return None
        rows = slice(self._num_kept)
        return Trajectory(self._timestamps_ns[rows].copy(), self._T_world_camera[rows].copy(), "path")

    def _keep(self, timestamp_ns: int, T_world_camera: FloatArray) -> None:
        row = self._num_kept
        self._timestamps_ns[row], self._T_world_camera[row] = timestamp_ns, T_world_camera
        self._begins_part[row], self._is_broken = self._is_broken, False
        self._num_kept += 1

    def _thin_out(self) -> None:
        """Every second pose goes; one that began a part hands that to the next."""
        num = self._num_kept
        is_break = self._begins_part[:num].copy()
        is_break[2::2] |= is_break[1 : num - 1 : 2]
        self._is_broken |= bool(num % 2 == 0 and is_break[-1])
        kept = (num + 1) // 2
        for values in (self._timestamps_ns, self._T_world_camera):
            values[:kept] = values[:num:2].copy()
        self._begins_part[:kept] = is_break[::2]
        self._num_kept, self._stride = kept, 2 * self._stride
