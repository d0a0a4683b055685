"""Times are exact integers, and depth finds its nearest colour image."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.sources.timestamps import associate, index_to_ns, nanoseconds, read_times, seconds_to_ns
from vo.types import SourceError

MAX_NS = 2**63 - 1


@given(st.integers(0, MAX_NS))
@settings(deadline=None)
def test_nine_decimals_are_read_back_exactly(time_ns: int) -> None:
    assert seconds_to_ns(f"{time_ns // 10**9}.{time_ns % 10**9:09d}") == time_ns
    assert nanoseconds(str(time_ns)) == time_ns


@given(st.integers(0, 10**12), st.integers(-12, -3), st.sampled_from("eE"))
@settings(deadline=None)
def test_scientific_notation_is_the_rounded_fraction(mantissa: int, exponent: int, letter: str) -> None:
    exact = mantissa * Fraction(10) ** (exponent + 9)
    assert seconds_to_ns(f"{mantissa}{letter}{exponent:+d}") == round(exact)


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1305031102.175304", 1305031102175304000),  # float64 is off by up to 119 ns here
        ("1403715275.762142976", 1403715275762142976),
        ("1.037359e-01", 103735900),
        ("0", 0),
        (".5", 500_000_000),
        ("7.", 7_000_000_000),
        ("+2.25", 2_250_000_000),
        ("0.0000000005", 0),  # half to even
        ("0.0000000015", 2),
    ],
)
def test_seconds(text: str, time_ns: int) -> None:
    assert seconds_to_ns(text) == time_ns


@pytest.mark.parametrize(
    "text",
    ["", " 1", "-1", "nan", "inf", "1,5", "0x10", "1e", "1e9999", "1_000", "1/3", "٣", "1.2.3", "9" * 70, "1e11", "."],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        seconds_to_ns(text)


@pytest.mark.parametrize("text", ["", "-5", "1.0", "1e3", "abc", str(2**63), "٣"])
def test_what_are_no_nanoseconds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        nanoseconds(text)


def test_a_broken_rate_does_not_drift() -> None:
    fps = 30000 / 1001
    for index in (1, 1000, 10**7):
        assert abs(index_to_ns(index, fps) - Fraction(index * 1001 * 10**9, 30000)) <= Fraction(index, 10**6) + 1
    assert [index_to_ns(index, 30.0) for index in range(4)] == [0, 33333333, 66666667, 100000000]


def test_a_times_file_names_the_line_at_fault(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("# seconds\n0.0\n\n0.1\r\n")
    assert read_times(path) == [0, 100_000_000]
    path.write_text("0.0\n\nnow\n")
    with pytest.raises(SourceError, match=r"times\.txt:3: 'now' is not a time"):
        read_times(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="not a text file"):
        read_times(path)
    with pytest.raises(SourceError, match="not found"):
        read_times(tmp_path / "none.txt")


def associate_slowly(times0: list[int], times1: list[int], limit: int) -> list[int | None]:
    """Takes the closest pair that is left, again and again, over all pairs."""
    partners: list[int | None] = [None] * len(times0)
    free0, free1 = set(range(len(times0))), set(range(len(times1)))
    while True:
        pairs = [
            (abs(times0[i] - times1[j]), i, j) for i in free0 for j in free1 if abs(times0[i] - times1[j]) <= limit
        ]
        if not pairs:
            return partners
        _, index0, index1 = min(pairs)
        partners[index0] = index1
        free0.remove(index0)
        free1.remove(index1)


@given(st.lists(st.integers(0, 60), max_size=12), st.lists(st.integers(0, 60), max_size=12), st.integers(0, 15))
@settings(deadline=None, max_examples=300)
def test_association_agrees_with_the_closest_pair_first(times0: list[int], times1: list[int], limit: int) -> None:
    assert associate(times0, times1, limit) == associate_slowly(times0, times1, limit)


def test_association_uses_nothing_twice() -> None:
    assert associate([0, 4], [3], 10) == [None, 0]
    assert associate([0, 10], [], 5) == [None, None]
    assert associate([0], [6], 5) == [None]
    assert associate([0], [5], 5) == [0]
