"""Markdown of live input and of runs that go on for long: what `measure_live.py` and `soak.py` found."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark_tables import Tree, table


def endurance_lines(lives: Sequence[Tree], soaks: Sequence[Tree]) -> list[str]:
    """Both tables; empty lines of a measurement that was not made are left out."""
    lines = ["## Live input, and for long", ""]
    if lives:
        header = (
            "camera",
            "frames sent",
            "posed",
            "given up",
            "unaccounted",
            "period, ms",
            "age p50, p95, max, ms",
            "in periods",
            "first and last third, ms",
            "disturbed",
        )
        lines += [
            "`python tools/measure_live.py`: MJPEG over HTTP at 30 frames/s before a run that is slower. The age of a",
            "frame, from its sending to its pose, is read from the image itself. Bound: 2.5 periods, without growth.",
            "",
            *table(header, [_live_row(live) for live in lives], num_left=1),
            "",
        ]
    if soaks:
        header = (
            "run",
            "minutes",
            "frames",
            "lost",
            "resident memory, MB",
            "spread",
            "growth",
            "open files",
            "threads",
            "flat",
        )
        lines += [
            "`python tools/soak.py`: `vo run` in a loop at full speed, with a consumer of everything. Memory after the",
            "warm-up: largest against smallest (medians of three looks in a row; in brackets single looks: a clip that",
            "is opened anew has a decoder more or less for a moment), the last tenth against the first. Bound: 3 %.",
            "",
            *table(header, [_soak_row(soak) for soak in soaks], num_left=1),
            "",
        ]
    if not lives and not soaks:
        lines += ["Not measured yet.", ""]
    return lines


def _live_row(live: Tree) -> tuple[str, ...]:
    return (
        f"{live['camera_fps']:.1f} fps for {live['seconds'] / 60:g} min",
        f"{live['num_sent']}",
        f"{live['num_processed']}",
        f"{live['num_dropped']}",
        f"{live['num_unaccounted']}",
        f"{live['period_ms']:.0f}",
        f"{live['age_p50_ms']:.0f}, {live['age_p95_ms']:.0f}, {live['age_max_ms']:.0f}",
        f"{live['periods']:.2f}",
        f"{live['first_third_p50_ms']:.0f}, {live['last_third_p50_ms']:.0f}",
        "unknown" if live["others_share"] is None else f"{100 * live['others_share']:.0f} %",
    )


def _soak_row(soak: Tree) -> tuple[str, ...]:
    verdict = soak["verdict"]
    files, threads = verdict["num_files"], verdict["num_threads"]
    return (
        f"`{soak['command']}`",
        f"{soak['minutes']:g}",
        f"{soak['num_frames']}",
        f"{soak['num_lost_episodes']}",
        f"{soak['samples'][-1]['resident_bytes'] / 1e6:.0f}",
        f"{verdict['spread_percent']:.2f} % ({verdict['momentary_spread_percent']:.2f} %)",
        f"{verdict['growth_percent']:+.2f} %",
        _range(files) + "".join(f"; {count} more `{name}`" for name, count in soak.get("added_files", {}).items()),
        _range(threads),
        "yes" if verdict["is_flat"] else "**no**",
    )


def _range(bounds: Sequence[int]) -> str:
    low, high = bounds
    return f"{low}" if low == high else f"{low} to {high}"


def robustness_lines(results: Sequence[Tree]) -> list[str]:
    """One table for each sequence, the undamaged run first; ratios are to its ATE."""
    lines: list[str] = []
    for result in results:
        clean = result["cases"][0]["ate_m"]
        header = (
            "frames",
            "posed",
            "good frames until found",
            "segments",
            "ATE, m",
            "of undamaged",
            "rotation, deg/frame",
        )
        rows = [
            (
                case["name"],
                f"{case['poses']} of {case['frames']}",
                "never" if case["frames_to_recover"] is None else f"{case['frames_to_recover']}",
                f"{case['segments']}",
                f"{case['ate_m']:.3f}",
                f"{case['ate_m'] / clean:.2f}",
                f"{case['rotation_deg']:.4f}",
            )
            for case in result["cases"]
        ]
        lines += [f"`{result['command']}`, {result['date']}:", "", *table(header, rows, num_left=1), ""]
    return lines or ["Not measured yet.", ""]
