"""What an evaluation leaves behind: figures as JSON, pictures, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from vo.eval_runs import FIGURES, EvaluatedRun, spreads
from vo.evaluation import Comparison, format_evaluation
from vo.output import prepare_directory, write_atomically
from vo.plots import errors_figure, figure_png, path_figure, segments_figure

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; border-bottom: 1px solid #d5d5d5; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; }
.note { color: #7a4b00; }
"""


def write_report(runs: Sequence[EvaluatedRun], report_dir: Path) -> tuple[Path, ...]:
    """Writes evaluation.json, path.png, errors.png, segments.png (where there are segments) and report.html.

    Several runs have a directory each, run1, run2, ..., and share report.html and runs.json with median and spread.
    Returns the files. Raises OutputError where one cannot be written, ValueError without a run.
    """
    if not runs:
        raise ValueError("runs: expected at least one")
    prepare_directory(report_dir)
    pictures = [run_pictures(run.comparison) for run in runs]
    contents: dict[Path, str | bytes] = {}
    for number, (run, drawn) in enumerate(zip(runs, pictures, strict=True), start=1):
        directory = report_dir if len(runs) == 1 else report_dir / f"run{number}"
        prepare_directory(directory)
        contents[directory / "evaluation.json"] = json.dumps(run_tree(run), indent=2, allow_nan=False) + "\n"
        contents |= {directory / name: picture for name, picture in drawn.items()}
    if len(runs) > 1:
        tree = {name: asdict(found) for name, found in spreads(runs).items()}
        contents[report_dir / "runs.json"] = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    contents[report_dir / "report.html"] = report_html(runs, pictures)
    for path, content in contents.items():
        write_atomically(path, content)
    return tuple(contents)


def run_tree(run: EvaluatedRun) -> dict[str, object]:
    """All of `Evaluation`, and what is known of the run itself."""
    latency = run.facts.latency_ms if run.facts is not None else None
    return {
        **asdict(run.comparison.evaluation),
        "lost_episodes": run.lost_episodes,
        "latency_ms": asdict(latency) if latency is not None else None,
        "fps": run.facts.fps if run.facts is not None else None,
    }


def run_pictures(comparison: Comparison) -> dict[str, bytes]:
    """PNG files by name."""
    pictures = {
        "path.png": figure_png(path_figure(comparison.trajectory, comparison)),
        "errors.png": figure_png(errors_figure(comparison)),
    }
    if len(comparison.segments):
        pictures["segments.png"] = figure_png(segments_figure(comparison.segments, comparison.distances_m))
    return pictures


def report_html(runs: Sequence[EvaluatedRun], pictures: Sequence[dict[str, bytes]]) -> str:
    """One page with every figure and picture inside it; the same runs give the same page."""
    parts = [_spread_html(runs)] if len(runs) > 1 else []
    parts += [_run_html(run, drawn) for run, drawn in zip(runs, pictures, strict=True)]
    truth = escape(runs[0].comparison.evaluation.truth_name)
    return html_page("Evaluation", f"<p>Ground truth: {truth}</p>\n" + "\n".join(parts))


def html_page(title: str, body: str) -> str:
    """A whole page around the body, with its style inside."""
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _spread_html(runs: Sequence[EvaluatedRun]) -> str:
    found = spreads(runs)
    rows = [
        (
            title,
            unit,
            *(f"{value:.4g}" for value in (s.median, s.interquartile, s.min, s.max)),
            *(_cell(run.figure(name)) for run in runs),
        )
        for name, title, unit in FIGURES
        if (s := found.get(name)) is not None
    ]
    names = [f"run {number}" for number in range(1, len(runs) + 1)]
    header = ("figure", "unit", "median", "between quartiles", "smallest", "largest", *names)
    return f"<h2>{len(runs)} runs</h2>\n{html_table(header, rows)}"


def _run_html(run: EvaluatedRun, pictures: dict[str, bytes]) -> str:
    evaluation = run.comparison.evaluation
    rows = [(title, _cell(run.figure(name)), unit) for name, title, unit in FIGURES]
    images = [
        f'<h3>{escape(name.removesuffix(".png"))}</h3>\n<img alt="{escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}">'
        for name, picture in pictures.items()
    ]
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in evaluation.notes)
    return (
        f"<h2>{escape(run.name)}</h2>\n{notes}{html_table(('figure', 'value', 'unit'), rows)}\n"
        f"<pre>{escape(format_evaluation(evaluation))}</pre>\n" + "\n".join(images)
    )


def _cell(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
