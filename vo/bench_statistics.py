"""Times of interleaved calls and what they say: medians, ratios pair by pair, and how sure a ratio is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from vo.types import FloatArray

CONFIDENCE = 0.9
_NUM_RESAMPLES = 5000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """How long calls took, ms."""

    num_calls: int
    median_ms: float
    min_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times longer one method takes than another, from calls made in turn.

    median     of the ratios of neighbouring calls.
    low, high  90 % interval of that median (percentile bootstrap over the pairs, Efron 1979).
    min, max   of single pairs.
    """

    num_pairs: int
    median: float
    low: float
    high: float
    min: float
    max: float


def timing(times_ms: Sequence[float]) -> Timing:
    """Percentiles by linear interpolation. Raises ValueError of nothing."""
    if not times_ms:
        raise ValueError("times_ms: expected at least one time")
    median, p95, p99 = np.percentile(times_ms, (50, 95, 99)).tolist()
    return Timing(len(times_ms), median, min(times_ms), p95, p99, max(times_ms))


def ratio(ours_ms: Sequence[float], theirs_ms: Sequence[float]) -> Ratio:
    """Theirs over ours, pair by pair: above 1, ours is faster. Raises ValueError without as many times of both."""
    if len(ours_ms) != len(theirs_ms) or not ours_ms:
        raise ValueError(f"expected as many times of both, at least one; got {len(ours_ms)} and {len(theirs_ms)}")
    ratios = np.asarray(theirs_ms, np.float64) / np.asarray(ours_ms, np.float64)
    low, high = bootstrap_interval(ratios, lambda resamples: np.median(resamples, axis=1))
    return Ratio(len(ratios), float(np.median(ratios)), low, high, float(ratios.min()), float(ratios.max()))


def bootstrap_interval(values: FloatArray, statistic: Callable[[FloatArray], FloatArray]) -> tuple[float, float]:
    """90 % percentile bootstrap interval of a statistic of `values` (N, ...); the same values give the same interval.

    statistic  (R, N, ...) resampled values -> (R,) values of the statistic.
    """
    rows: NDArray[np.int64] = np.random.default_rng(_SEED).integers(0, len(values), (_NUM_RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(values[rows]), (tail, 1 - tail)).tolist()
    return low, high


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call, ms: from nothing under way on the device to everything of the call done."""
    if device.type != "cuda":
        start_ns = time.perf_counter_ns()
        function()
        return (time.perf_counter_ns() - start_ns) * 1e-6
    event: Callable[[], torch.cuda.Event] = partial(torch.cuda.Event, enable_timing=True)
    start, end = event(), event()
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    function()
    # Work that the call left on other streams counts too: the end is recorded after all of it.
    torch.cuda.synchronize(device)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return float(start.elapsed_time(end))


def time_in_turn(
    calls: Iterable[tuple[Callable[[], object], Callable[[], object]]], device: torch.device
) -> tuple[list[float], list[float]]:
    """Times of two methods, ms, called in turn (ours, theirs, ours, theirs, ...), so that both meet the same machine.

    calls  pairs of calls, drawn one by one: what drawing the next pair takes is not timed.
    """
    ours_ms, theirs_ms = [], []
    for ours, theirs in calls:
        ours_ms.append(time_call(ours, device))
        theirs_ms.append(time_call(theirs, device))
    return ours_ms, theirs_ms
