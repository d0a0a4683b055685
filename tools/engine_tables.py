"""Tables of what `tools/engine_ways.py` and the checks of `tools/measure_gpu.py` found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmark_tables import Tree, table


def engine_lines(results: Sequence[Tree]) -> list[str]:
    """One row per way of running a network."""
    header = ("network", "size", "keypoints", "way", "ms", "same keypoints", "same matches", "remark")
    lines: list[str] = []
    for result in results:
        rows = [
            (
                row["network"],
                row["size"] or "-",
                str(row["num_keypoints"]),
                row["way"],
                "-" if row["ms"] is None else f"{row['ms']:.2f}",
                _percent(row["keypoints"]),
                _percent(row["matches"]),
                row["remark"],
            )
            for row in result["rows"]
        ]
        lines += ["### Ways to run the networks", "", *table(header, rows, num_left=4), ""]
    return lines


def check_lines(results: Sequence[Tree]) -> list[str]:
    """How many of the tests that need a GPU passed, and which did not."""
    return [line for result in results for line in (*_checked(result), "")]


def _checked(result: Tree) -> Iterator[str]:
    counts = ", ".join(f"{count} {word}" for word, count in result["counts"].items())
    yield f"Tests that need a GPU (`python -m pytest -m gpu`): {counts}."
    yield from (f"- failed: `{name}`" for name in result["failed"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
