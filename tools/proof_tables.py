"""Markdown of what proves the other figures: batches, matches under known motion, the guard, faults in geometry."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark_tables import Tree, table
from guard_bands import Verdict, verdict_lines


def batch_lines(results: Sequence[Tree]) -> list[str]:
    """The table of every batch."""
    lines: list[str] = []
    for result in results:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in result["rows"]]
        notes = [f"- {note}" for note in result["notes"]]
        marked = table(result["header"], rows, num_left=2)
        lines += [f"{result['title']}, {result['date']}:", "", *marked, "", *notes, *([""] if notes else [])]
    return lines or ["Not measured yet.", ""]


def known_pair_lines(results: Sequence[Tree]) -> list[str]:
    """What `vo bench-matching --output` found: one row for each method and group."""
    rows = [_pair_row(result, group) for result in results for group in result["groups"]]
    if not rows:
        return ["Not measured here: HPatches, MegaDepth-1500 and ScanNet-1500 are for you to download.", ""]
    header = (
        "pairs",
        "method",
        "group",
        "count",
        "matches",
        "precision",
        "recall",
        "score",
        "MMA@3",
        "AUC",
        "settings",
    )
    return [*table(header, rows, num_left=3), ""]


def _pair_row(result: Tree, group: Tree) -> tuple[str, ...]:
    unit = "px" if group["mma"] else "deg"
    areas = ", ".join(f"@{threshold:g} {unit}: {100 * area:.1f}" for threshold, area in group["auc"])
    return (
        result["source"],
        result["method"],
        group["group"],
        f"{group['num_pairs']} ({group['num_failed']} failed)",
        f"{group['mean_matches']:.0f}",
        f"{group['precision']:.3f}",
        "none without depth" if group["recall"] is None else f"{group['recall']:.3f}",
        f"{group['matching_score']:.3f}",
        f"{group['mma'][result['mma_px'].index(3)]:.3f}" if group["mma"] else "",
        areas,
        " ".join(f"`{setting}`" for setting in result["settings"]),
    )


def guard_lines(results: Sequence[Tree], checks: Sequence[Tree]) -> list[str]:
    """Figures beside their bands, then what happened to deliberately worsened code."""
    lines: list[str] = []
    for result in results:
        lines += [*verdict_lines([Verdict(**verdict) for verdict in result["verdicts"]]), ""]
        lines += [f"- Not measured: {name}: {reason}" for name, reason in result["left_out"].items()]
    rows = [
        (
            outcome["description"],
            f"failed: {', '.join(outcome['figures'])}" if outcome["figures"] else "passed",
            "yes" if outcome["is_as_expected"] else "**no**",
        )
        for check in checks
        for outcome in check["outcomes"]
    ]
    if rows:
        lines += ["Worsened on purpose, in a copy (`python tools/check_guard.py`):", ""]
        lines += [*table(("code", "the guard", "as expected"), rows, num_left=3), ""]
    return lines or ["Not measured yet.", ""]


def fault_lines(results: Sequence[Tree]) -> list[str]:
    """How many small faults the tests notice, and those that they do not."""
    lines: list[str] = []
    for result in results:
        survivors = [verdict for verdict in result["verdicts"] if verdict["outcome"] == "survived"]
        num_faults = len(result["verdicts"])
        num_killed = num_faults - len(survivors)
        share = 100 * num_killed / num_faults
        lines += [
            f"`{result['module']}`: {num_killed} of {num_faults} faults noticed ({share:.0f} %), "
            f"drawn from {result['num_possible']}, {result['date']}."
            + (" Not noticed, some because they change nothing:" if survivors else ""),
            "",
            *(f"- line {verdict['line']}: `{verdict['change']}`" for verdict in survivors),
            *([""] if survivors else []),
        ]
    return lines or ["Not measured yet.", ""]
