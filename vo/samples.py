"""Figures of a run of any length in bounded memory: exact counts, means and extremes, percentiles of a fair sample.

A run of a day has millions of frames; keeping a number of each would grow by gigabytes. Vitter's algorithm R (Random
sampling with a reservoir, ACM TOMS 11, 1985) keeps every value while there are few, then a uniform sample of all.
"""

from __future__ import annotations

import operator
import random
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

CAPACITY = 20_000


class Samples(Sequence[float]):
    """The values added so far, or a uniform sample of `capacity` of them, in no particular order once it is one.

    As a sequence it is what is kept. Repeatable: the same values give the same sample.

    num_added  how many values there were.
    mean       of all of them, None of nothing.
    maximum    of all of them; minus infinity of nothing.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        """Raises ValueError for a capacity below 1."""
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        # All at once: what grows for an hour leaves holes behind, and looks like a leak meanwhile.
        self._kept = array("d", bytes(8 * capacity))
        self._num_kept = 0
        self._random = random.Random(0)
        self._sum = 0.0
        self.num_added = 0
        self.maximum = float("-inf")

    def append(self, value: float) -> None:
        self.num_added += 1
        self._sum += value
        self.maximum = max(self.maximum, value)
        place = self._num_kept
        if place < len(self._kept):
            self._num_kept += 1
        else:
            place = int(self._random.random() * self.num_added)
        if place < len(self._kept):
            self._kept[place] = value

    @property
    def mean(self) -> float | None:
        return self._sum / self.num_added if self.num_added else None

    def __len__(self) -> int:
        return self._num_kept

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        return self._kept[: self._num_kept][index] if isinstance(index, slice) else self._kept[self._place(index)]

    def __iter__(self) -> Iterator[float]:
        return iter(self._kept[: self._num_kept])

    def _place(self, index: int) -> int:
        place = operator.index(index)
        if not -self._num_kept <= place < self._num_kept:
            raise IndexError(f"sample {place} of {self._num_kept}")
        return place % self._num_kept if place < 0 else place
