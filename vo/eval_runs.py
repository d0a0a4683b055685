"""One or several runs over the same truth: each with what its summary.json says, and their median and spread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vo.evaluation import DEFAULT_MAX_TIME_DIFFERENCE_S, Align, Comparison, compare
from vo.recorder import SUMMARY_NAME, TUM_NAME
from vo.summary import LatencyMs
from vo.trajectory import Trajectory, read_trajectory
from vo.types import SourceError

# A gap in the times of a trajectory: this many of its usual intervals.
_GAP = 1.5

FIGURES = (
    ("ate_rmse_m", "ATE", "m"),
    ("rpe_rot_deg", "RPE rotation", "deg"),
    ("rpe_trans_m", "RPE translation", "m"),
    ("rpe_distance_rot_deg", "rotation by way", "deg"),
    ("rpe_distance_trans_m", "translation by way", "m"),
    ("kitti_t_err_percent", "KITTI t_err", "%"),
    ("kitti_r_err_deg_per_100m", "KITTI r_err", "deg / 100 m"),
    ("coverage", "coverage", ""),
    ("scale", "scale", ""),
    ("lost_episodes", "lost episodes", ""),
    ("latency_p50_ms", "latency p50", "ms"),
    ("latency_p95_ms", "latency p95", "ms"),
    ("latency_p99_ms", "latency p99", "ms"),
    ("fps", "frames per second", ""),
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What summary.json says of a run.

    num_expected_poses   of the evaluation that the run made itself; None where it made none.
    num_truth_poses      of the truth that it used.
    """

    lost_episodes: int
    latency_ms: LatencyMs | None
    fps: float
    num_expected_poses: int | None
    num_truth_poses: int | None


@dataclass(frozen=True, slots=True, eq=False)
class EvaluatedRun:
    """A trajectory against the truth.

    facts          None where no summary.json lies beside the trajectory.
    lost_episodes  of the summary, else the gaps in the trajectory.
    """

    name: str
    comparison: Comparison
    facts: RunFacts | None
    lost_episodes: int

    def figure(self, name: str) -> float | None:
        """A figure of FIGURES; None where this run has none."""
        latency = self.facts.latency_ms if self.facts is not None else None
        match name:
            case "lost_episodes":
                return float(self.lost_episodes)
            case "latency_p50_ms" | "latency_p95_ms" | "latency_p99_ms":
                return None if latency is None else float(getattr(latency, name.split("_")[1]))
            case "fps":
                return None if self.facts is None else self.facts.fps
        value: float | None = getattr(self.comparison.evaluation, name)
        return value


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several runs; `interquartile` is the distance of the quartiles."""

    median: float
    min: float
    max: float
    interquartile: float
    num_runs: int


def evaluate_run(
    path: Path,
    truth: Trajectory,
    align: Align = "sim3",
    max_time_difference_s: float = DEFAULT_MAX_TIME_DIFFERENCE_S,
) -> EvaluatedRun:
    """A trajectory file, or the output directory of a run, against the truth. Raises SourceError."""
    file = path / TUM_NAME if path.is_dir() else path
    trajectory = read_trajectory(file)
    summary = file.with_name(SUMMARY_NAME)
    # Only what a run has written itself belongs to the summary beside it.
    facts = read_facts(summary) if file.name.startswith("trajectory") and summary.is_file() else None
    num_expected = None
    if facts is not None and facts.num_truth_poses == len(truth):
        num_expected = facts.num_expected_poses
    comparison = compare(
        trajectory,
        truth,
        align,
        max_time_difference_s=max_time_difference_s,
        num_expected_poses=num_expected,
    )
    lost_episodes = facts.lost_episodes if facts is not None else num_gaps(trajectory)
    return EvaluatedRun(str(path), comparison, facts, lost_episodes)


def read_facts(path: Path) -> RunFacts:
    """What a summary.json says. Raises SourceError naming the file and the field."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}; remove it, or run again") from error
    if not isinstance(tree, dict):
        raise SourceError(f"{path}: expected a mapping as `vo run` writes it")
    latency = tree.get("latency_ms")
    evaluation = tree.get("evaluation")
    evaluation = evaluation if isinstance(evaluation, dict) else None
    return RunFacts(
        lost_episodes=int(_number(tree, "lost_episodes", path)),
        latency_ms=None if latency is None else _latency(latency, path),
        fps=_number(tree, "fps", path),
        num_expected_poses=None if evaluation is None else int(_number(evaluation, "num_expected_poses", path)),
        num_truth_poses=None if evaluation is None else int(_number(evaluation, "num_truth_poses", path)),
    )


def num_gaps(trajectory: Trajectory) -> int:
    """How often poses are missing between two others: frames left out, or pauses well above the usual interval."""
    if trajectory.frame_indices is not None:
        return int((np.diff(trajectory.frame_indices) > 1).sum())
    if len(trajectory) < 2:
        return 0
    intervals_ns = np.diff(trajectory.timestamps_ns)
    return int((intervals_ns > _GAP * float(np.median(intervals_ns))).sum())


def spread(values: Sequence[float]) -> Spread:
    """Median and spread by linear interpolation. Raises ValueError of nothing."""
    if not values:
        raise ValueError("values: expected at least one")
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return Spread(median, min(values), max(values), high - low, len(values))


def spreads(runs: Sequence[EvaluatedRun]) -> dict[str, Spread]:
    """Every figure that at least one of the runs has."""
    found = {}
    for name, _, _ in FIGURES:
        values = [value for run in runs if (value := run.figure(name)) is not None]
        if values:
            found[name] = spread(values)
    return found


def spread_lines(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Median and spread of several runs for people."""
    found = spreads(runs)
    lines = [f"runs          {len(runs)}: median (smallest to largest)"]
    for name, title, unit in FIGURES:
        if name in found:
            s = found[name]
            lines.append(f"{title:<20}{s.median:.4g} ({s.min:.4g} to {s.max:.4g}){' ' + unit if unit else ''}")
    return lines


def _latency(value: object, path: Path) -> LatencyMs:
    if not isinstance(value, dict):
        raise SourceError(f"{path}: latency_ms: expected p50, p95, p99 and max")
    return LatencyMs(*(_number(value, key, path, "latency_ms.") for key in ("p50", "p95", "p99", "max")))


def _number(tree: Mapping[str, object], key: str, path: Path, prefix: str = "") -> float:
    value = tree.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SourceError(f"{path}: {prefix}{key}: expected a number as `vo run` writes it, got {value!r}")
    return float(value)
