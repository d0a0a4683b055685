"""Markdown tables of what tools/compare_peers.py found: every cell is measured or says why not."""

from __future__ import annotations

from benchmark_tables import Tree, table

_HEADER = (
    "method",
    "matches",
    "precision",
    "two-view rotation / direction, deg",
    "rejected",
    "ATE, m",
    "rotation per frame, deg",
    "coverage",
    "lost",
    "extract, ms",
    "match, ms",
    "two views, ms",
    "track, ms",
    "**frame, ms**",
    "memory, MB",
    "laps",
)


def peer_lines(result: Tree) -> list[str]:
    """A table for every source, then what is missing."""
    lines: list[str] = []
    for found in result["sources"]:
        size = "" if found["size"] is None else f" {found['size'][0]}x{found['size'][1]}"
        lines += [
            f"{found['source']}{size}, {found['num_frames']} frames, at most {result['max_keypoints']} keypoints, "
            f"laps in turn, {result['date']}{_disturbed(result)}",
            "",
            *table(_HEADER, [_row(method) for method in found["methods"]]),
            "",
        ]
    return [*lines, *(f"- Not measured: {reason}" for reason in result["missing"])]


def _row(method: Tree) -> tuple[str, ...]:
    if "stages" not in method:
        return (method["description"], f"not measured: {method['reason']}", *["not measured"] * (len(_HEADER) - 2))
    views, odometry, stages = method["two_view"], method["odometry"], method["stages"]
    return (
        method["description"],
        f"{views['matches']:.0f}",
        _number(views["precision"], 3),
        f"{_number(views['rotation_median_deg'], 3)} / {_number(views['direction_median_deg'], 2)}",
        f"{views['num_rejected']:.0f} of {views['num_pairs']:.0f}",
        _number(odometry["ate_rmse_m"], 3),
        _number(odometry["rpe_rot_deg"], 3),
        f"{100 * odometry['coverage']:.0f} %",
        f"{odometry['lost_frames']:.0f}",
        *(_time(stages[name]) for name in ("extract", "match", "two_view", "track", "frame")),
        _memory(method),
        f"{method['num_laps']}",
    )


def _number(value: float | None, num_digits: int) -> str:
    return "no pose" if value is None else f"{value:.{num_digits}f}"


def _time(stage: Tree) -> str:
    return f"{stage['median_ms']:.1f} ({stage['low_ms']:.1f} to {stage['high_ms']:.1f})"


def _memory(method: Tree) -> str:
    if method["peak_bytes"] is None or method["imported_bytes"] is None:
        return "unknown on this system"
    return f"{method['peak_bytes'] / 1e6:.0f} ({method['imported_bytes'] / 1e6:.0f} libraries)"


def _disturbed(result: Tree) -> str:
    share = result["others_share"]
    return "" if share is None else f"; other work took {100 * share:.0f} % of the processors"
