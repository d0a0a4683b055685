"""Tables of what `tools/engine_ways.py` and the checks of `tools/measure_gpu.py` found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmark_tables import Tree, table

# What was aimed at on one H200, 640x480, 1024 keypoints: p50 and p99 of capture to pose, ms; frames/s without loss.
BOUNDS = {"aliked-t16": (4.0, 7.0, 400.0), "xfeat": (3.0, 5.0, 600.0)}
RATIO_BOUND = 8.0  # against kornia, every stage


def bound_lines(results: Sequence[Tree]) -> list[str]:
    """Every bound beside what was measured, whether it was reached or not; and what the engine chose."""
    rows = [row for result in results if result["extractor"] in BOUNDS for row in _held_to_bounds(result)]
    if not rows:
        return []
    lines = [*table(("figure", "bound", "measured", "reached"), rows, num_left=1), ""]
    for result in results:
        seconds, mib = result["load_s"] + result["warm_up_s"], (result["peak_gpu_bytes"] or 0) / 2**20
        lines += [
            f"{_named(result)}: start {seconds:.0f} s, GPU memory {mib:.0f} MiB at most. Chosen at the start:",
            "",
        ]
        lines += [*(f"- {choice}" for choice in result["engine"]), ""]
    return lines


def _held_to_bounds(result: Tree) -> Iterator[tuple[str, str, str, str]]:
    p50, p99, fps = BOUNDS[result["extractor"]]
    name = _named(result)
    for run in result["streams"]:
        latency = run["latency"]
        if run["mode"] == "latest":
            found = f"{latency['median_ms']:.1f} / {latency['p99_ms']:.1f} ms"
            is_reached = latency["median_ms"] <= p50 and latency["p99_ms"] <= p99
            yield f"{name}: capture to pose, p50 / p99", f"{p50:g} / {p99:g} ms", found, _said(is_reached)
        else:
            yield f"{name}: every frame", f"{fps:g} frames/s", f"{run['fps']:.0f} frames/s", _said(run["fps"] >= fps)
    for compared in result["comparisons"]:
        times = compared["ratio"]["median"]
        stage = f"{name}: {compared['stage']}, against {compared['peer']}"
        yield stage, f"{RATIO_BOUND:g}x", f"{times:.1f}x", _said(times >= RATIO_BOUND)


def _named(result: Tree) -> str:
    """The extractor, and whether the odometry was the one without a map."""
    has_no_map = "odometry.mode=two_view" in result.get("settings", ())
    return f"{result['extractor']}, two views" if has_no_map else str(result["extractor"])


def _said(is_reached: bool) -> str:
    return "yes" if is_reached else "no"


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
