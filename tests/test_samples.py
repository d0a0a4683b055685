"""Figures of a run of any length: exact while it is short, fair when it is long, never larger than agreed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.run_meter import RunMeter
from vo.samples import Samples
from vo.sources.base import SkipLog, SkippedFrame
from vo.summary import latency_percentiles


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(1, 20))
@settings(deadline=None)
def test_what_is_exact_however_many_there_are(values: list[float], capacity: int) -> None:
    samples = Samples(capacity)
    for value in values:
        samples.append(value)
    assert samples.num_added == len(values)
    assert len(samples) == min(len(values), capacity)
    assert all(value in values for value in samples)
    if values:
        assert samples.mean == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-6)
        assert samples.maximum == max(values)
    if len(values) <= capacity:
        assert list(samples) == values


def test_nothing() -> None:
    assert (Samples().mean, len(Samples()), Samples().num_added) == (None, 0, 0)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        Samples(0)


def test_the_sample_is_fair() -> None:
    """Percentiles of half a million values that drift, from 5000 of them: each part of the run has its share."""
    values = np.linspace(0.0, 100.0, 500_000)
    samples = Samples(5000)
    for value in values.tolist():
        samples.append(value)
    for percentile in (5, 50, 95, 99):
        assert np.percentile(samples, percentile) == pytest.approx(percentile, abs=2.5)
    counts, _ = np.histogram(samples, 10, (0.0, 100.0))
    assert counts.min() > 400 and counts.max() < 600


def test_the_largest_latency_is_never_lost() -> None:
    samples = Samples(2)
    for value in (900.0, *range(100)):
        samples.append(value)
    latency = latency_percentiles(samples, samples.maximum)
    assert latency is not None and latency.max == 900.0


def test_a_meter_of_a_long_run_does_not_grow() -> None:
    meter = RunMeter()
    for _ in range(50_000):
        meter.add_stage("extract", 1_000_000)
    assert len(meter.stages_ms["extract"]) == 20_000
    assert meter.stages_ms["extract"].num_added == 50_000


def test_skipped_frames_are_listed_and_then_counted() -> None:
    log = SkipLog(max_listed=3)
    for index in range(1000):
        log.add(SkippedFrame(index, f"frame {index}", "cannot be decoded" if index % 2 else "late"))
    assert [entry.index for entry in log.entries()] == [0, 1, 2, 3, 4]
    assert sum(entry.count for entry in log.entries()) == 1000
    assert {(entry.reason, entry.count) for entry in log.entries()[3:]} == {("cannot be decoded", 499), ("late", 498)}


def test_reasons_that_differ_every_time_do_not_grow_the_log() -> None:
    log = SkipLog(max_listed=3)
    for index in range(1000):
        log.add(SkippedFrame(index, f"frame {index}", f"timestamp {index} ns does not rise"))
    assert len(log.entries()) <= 8
    assert sum(entry.count for entry in log.entries()) == 1000
