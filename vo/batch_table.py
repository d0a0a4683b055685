"""The figures of a batch as one table: Markdown and HTML for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vo.batch_jobs import DONE, Job, read_outcome
from vo.batch_manifest import FIGURES, BatchManifest
from vo.bench_machine import Machine
from vo.eval_report import html_page, html_table
from vo.recorder import SUMMARY_NAME

SCHEMA = "lightvo-batch/1"
_TITLES = {
    "ate_rmse_m": "ATE, m",
    "rpe_rot_deg": "rotation per frame, deg",
    "rpe_trans_m": "translation per frame, m",
    "kitti_t_err_percent": "t_err, %",
    "kitti_r_err_deg_per_100m": "r_err, deg / 100 m",
    "coverage": "coverage",
    "lost_episodes": "lost",
    "fps": "frames/s",
}
_HEADER = ("sequence", "method", "runs", *(_TITLES[name] for name in FIGURES), "note")
MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one sequence; `values` holds every figure over the runs that have it."""

    sequence: str
    method: str
    num_runs: int
    num_expected: int
    values: dict[str, tuple[float, ...]]
    note: str = ""
    is_published: bool = False

    def median(self, figure: str) -> float | None:
        values = self.values.get(figure, ())
        return float(np.median(values)) if values else None


def batch_rows(manifest: BatchManifest, jobs: Sequence[Job]) -> list[Row]:
    """Ours beside the peers' by sequence, then the mean of each of ours over the sequences that it has."""
    rows = []
    for sequence in manifest.sequences:
        for config in manifest.configs:
            mine = [job for job in jobs if (job.sequence, job.config) == (sequence.name, config.name)]
            rows.append(_our_row(sequence.name, config.name, mine))
        for peer in manifest.peers:
            figures: dict[str, tuple[float, ...]] = {
                f.figure: (f.value,) for f in peer.figures if f.sequence == sequence.name
            }
            if figures:
                rows.append(Row(sequence.name, peer.name, 1, 1, figures, f"published: {peer.origin}", True))
    return rows + [_mean_row(config.name, rows) for config in manifest.configs]


def _our_row(sequence: str, config: str, jobs: Sequence[Job]) -> Row:
    values: dict[str, list[float]] = {}
    notes, num_runs = [], 0
    for job in jobs:
        outcome = read_outcome(job)
        if outcome is None:
            notes.append("not run yet")
            continue
        if outcome.status != DONE:
            notes.append(f"{outcome.status}: {outcome.reason}")
            continue
        num_runs += 1
        figures = job_figures(Path(job.output) / SUMMARY_NAME)
        if "ate_rmse_m" not in figures:
            notes.append("no ground truth to compare with")
        for name, value in figures.items():
            values.setdefault(name, []).append(value)
    found = {name: tuple(numbers) for name, numbers in values.items()}
    return Row(sequence, config, num_runs, len(jobs), found, "; ".join(dict.fromkeys(notes)))


def _mean_row(config: str, rows: Sequence[Row]) -> Row:
    mine = [row for row in rows if row.method == config and not row.is_published]
    values: dict[str, tuple[float, ...]] = {}
    for name in FIGURES:
        medians = [median for row in mine if (median := row.median(name)) is not None]
        if medians:
            values[name] = (float(np.mean(medians)),)
    num_done = sum(row.num_runs > 0 for row in mine)
    note = "" if num_done == len(mine) else f"over {num_done} of {len(mine)} sequences"
    return Row(MEAN, config, sum(row.num_runs for row in mine), sum(row.num_expected for row in mine), values, note)


def job_figures(summary: Path) -> dict[str, float]:
    """The figures that a summary.json holds."""
    tree: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    evaluation = tree["evaluation"] or {}
    found = {name: evaluation.get(name, tree.get(name)) for name in FIGURES}
    return {name: float(value) for name, value in found.items() if value is not None}


def markdown(manifest: BatchManifest, rows: Sequence[Row]) -> str:
    """The table, with title and notes; medians, and the range where there are several runs."""
    cells = [[cell.replace("|", "\\|") for cell in _cells(row)] for row in rows]
    marks = ["---", "---", *["---:"] * (len(_HEADER) - 3), "---"]
    lines = ["| " + " | ".join(line) + " |" for line in (list(_HEADER), marks, *cells)]
    notes = [f"- {note}" for note in manifest.notes]
    return "\n".join([f"# {manifest.title}", "", *lines, *([""] if notes else []), *notes]) + "\n"


def html(manifest: BatchManifest, rows: Sequence[Row]) -> str:
    """The same as one page that needs nothing beside it."""
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in manifest.notes)
    return html_page(manifest.title, html_table(_HEADER, [_cells(row) for row in rows]) + notes)


def csv_text(rows: Sequence[Row]) -> str:
    """Medians with all their digits, one line for each row of the table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("sequence", "method", "runs", *FIGURES, "note"))
    for row in rows:
        medians = ["" if (median := row.median(name)) is None else repr(median) for name in FIGURES]
        writer.writerow((row.sequence, row.method, row.num_runs, *medians, row.note))
    return text.getvalue()


def batch_tree(
    manifest: BatchManifest,
    rows: Sequence[Row],
    *,
    date: str,
    command: str,
    machine: Machine,
    versions: tuple[tuple[str, str], ...],
) -> dict[str, Any]:
    """What BENCHMARKS.md shows of a batch."""
    return {
        "schema": SCHEMA,
        "date": date,
        "command": command,
        "machine": asdict(machine),
        "versions": dict(versions),
        "title": manifest.title,
        "notes": list(manifest.notes),
        "header": list(_HEADER),
        "rows": [list(_cells(row)) for row in rows],
    }


def _cells(row: Row) -> tuple[str, ...]:
    runs = "published" if row.is_published else f"{row.num_runs} of {row.num_expected}"
    return (row.sequence, row.method, runs, *(_cell(name, row.values.get(name, ())) for name in FIGURES), row.note)


def _cell(figure: str, values: Sequence[float]) -> str:
    if not values:
        return ""

    def shown(value: float) -> str:
        return f"{100 * value:.1f} %" if figure == "coverage" else f"{value:.4g}"

    median = shown(float(np.median(values)))
    return median if len(values) == 1 else f"{median} ({shown(min(values))} to {shown(max(values))})"
