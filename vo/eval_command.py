"""`vo eval`: trajectories against the truth, one or several runs of the same sequence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vo.eval_report import write_report
from vo.eval_runs import EvaluatedRun, evaluate_run, spread_lines, spreads
from vo.evaluation import DEFAULT_MAX_TIME_DIFFERENCE_S, Align, evaluation_json, format_evaluation
from vo.trajectory import read_trajectory


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What the user asked for.

    trajectories   files in TUM, KITTI or EuRoC format, or output directories of `vo run`.
    truth_times, truth_sensor   of a KITTI and of an EuRoC truth, where they do not lie beside it.
    """

    trajectories: tuple[Path, ...]
    truth: Path
    align: Align = "sim3"
    max_time_difference_s: float = DEFAULT_MAX_TIME_DIFFERENCE_S
    truth_times: Path | None = None
    truth_sensor: Path | None = None
    report: Path | None = None
    is_json: bool = False


def eval_command(request: EvalRequest) -> int:
    """Evaluates, writes the report that was asked for, prints the figures. Raises VoError in one line."""
    truth = read_trajectory(request.truth, times=request.truth_times, sensor=request.truth_sensor)
    runs = [evaluate_run(path, truth, request.align, request.max_time_difference_s) for path in request.trajectories]
    if request.report is not None:
        write_report(runs, request.report)
    print(runs_json(runs) if request.is_json else "\n".join(run_lines(runs)))
    return 0


def runs_json(runs: Sequence[EvaluatedRun]) -> str:
    """The figures of one run as one mapping; of several as `runs` and, by figure, `spread`."""
    trees = [_run_tree(run) for run in runs]
    if len(trees) == 1:
        return json.dumps(trees[0], indent=2, allow_nan=False)
    found = {name: asdict(value) for name, value in spreads(runs).items()}
    return json.dumps({"runs": trees, "spread": found}, indent=2, allow_nan=False)


def run_lines(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Every run in a few lines, then the spread of several."""
    lines: list[str] = []
    for run in runs:
        lines += [*format_evaluation(run.comparison.evaluation).splitlines(), *_fact_lines(run), ""]
    return [*lines, *spread_lines(runs)] if len(runs) > 1 else lines[:-1]


def _run_tree(run: EvaluatedRun) -> dict[str, object]:
    tree: dict[str, object] = json.loads(evaluation_json(run.comparison.evaluation))
    latency = run.facts.latency_ms if run.facts is not None else None
    tree["lost_episodes"] = run.lost_episodes
    tree["latency_ms"] = None if latency is None else asdict(latency)
    return tree


def _fact_lines(run: EvaluatedRun) -> list[str]:
    source = "of the run's summary" if run.facts is not None else "gaps in the trajectory; no summary.json beside it"
    lines = [f"lost          {run.lost_episodes} times ({source})"]
    if run.facts is not None and run.facts.latency_ms is not None:
        latency = run.facts.latency_ms
        lines.append(
            f"latency       p50 {latency.p50:.1f}, p95 {latency.p95:.1f}, p99 {latency.p99:.1f}, "
            f"max {latency.max:.1f} ms"
        )
    return lines
