"""Times of frames as whole nanoseconds, parsed from decimals without passing through a float."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from vo.sources.textfiles import data_lines, read_text
from vo.types import SourceError

NS_PER_S = 1_000_000_000
_MAX_NS = 2**63 - 1
_SECONDS = re.compile(r"\+?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)
_NANOSECONDS = re.compile(r"\d+", re.ASCII)


def seconds_to_ns(text: str) -> int:
    """Nanoseconds of a decimal number of seconds such as `1305031102.175304` or `1.037359e-01`.

    Exact to the nanosecond; further digits are rounded half to even. Raises ValueError on anything but a finite,
    non-negative decimal below 2**63 ns.
    """
    if len(text) > 64 or not _SECONDS.fullmatch(text):
        raise ValueError(f"{text!r} is not a time in seconds")
    return _in_range(round(Fraction(Decimal(text)) * NS_PER_S), text)


def nanoseconds(text: str) -> int:
    """A whole, non-negative number of nanoseconds below 2**63; raises ValueError on anything else."""
    if len(text) > 64 or not _NANOSECONDS.fullmatch(text):
        raise ValueError(f"{text!r} is not a time in whole nanoseconds")
    return _in_range(int(text), text)


def index_to_ns(index: int, fps: float) -> int:
    """Time of frame `index` at a constant rate, rounded once, so that errors do not add up."""
    return round(Fraction(index * NS_PER_S) / Fraction(fps))


def read_times(path: Path, remedy: str = "expected one number of seconds per line") -> list[int]:
    """Times in ns from a file of one decimal number of seconds per line; raises SourceError with the line."""
    times_ns = []
    for number, line in data_lines(read_text(path, remedy)):
        try:
            times_ns.append(seconds_to_ns(line))
        except ValueError as error:
            raise SourceError(f"{path}:{number}: {error}; expected one number of seconds per line") from None
    return times_ns


def associate(times0_ns: Sequence[int], times1_ns: Sequence[int], max_difference_ns: int) -> list[int | None]:
    """For each time of sequence 0 the index of its partner in sequence 1, or None.

    Pairs at most `max_difference_ns` apart are taken from the closest on, the earlier indices first where two are
    equally close, and no time of either sequence is used twice. `times1_ns` may be in any order.
    """
    order1 = sorted(range(len(times1_ns)), key=lambda index: times1_ns[index])
    sorted1 = [times1_ns[index] for index in order1]
    candidates = []
    for index0, time0 in enumerate(times0_ns):
        first = bisect_left(sorted1, time0 - max_difference_ns)
        last = bisect_right(sorted1, time0 + max_difference_ns)
        candidates += [(abs(times1_ns[index1] - time0), index0, index1) for index1 in order1[first:last]]
    partners: list[int | None] = [None] * len(times0_ns)
    used1: set[int] = set()
    for _, index0, index1 in sorted(candidates):
        if partners[index0] is None and index1 not in used1:
            partners[index0] = index1
            used1.add(index1)
    return partners


def _in_range(time_ns: int, text: str) -> int:
    if time_ns > _MAX_NS:
        raise ValueError(f"{text!r} is too large for a time")
    return time_ns
