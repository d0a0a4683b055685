"""The bands that the regression guard holds figures to: read, judged, shown, and set anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from benchmark_tables import table

from vo.types import ConfigError

SCHEMA = "lightvo-bands/1"
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rule:
    """How far from its stored value a figure may go in the bad direction: a share of it and a fixed amount."""

    is_upper: bool
    share: float
    amount: float

    def limit(self, value: float) -> float:
        slack = self.share * abs(value) + self.amount
        return value + slack if self.is_upper else value - slack


RULES = {
    "ate_rmse_m": Rule(True, 0.35, 0.005),
    "rpe_rot_deg": Rule(True, 0.25, 0.003),
    "excursion": Rule(True, 0.5, 0.02),
    "coverage": Rule(False, 0.0, 0.02),
    "lost_episodes": Rule(True, 0.0, 0.0),
    "mean_keypoints": Rule(False, 0.1, 0.0),
    "mean_matches": Rule(False, 0.15, 0.0),
    "extract_ratio": Rule(True, 0.2, 0.02),
    "match_ratio": Rule(True, 0.25, 0.03),
    "track_ratio": Rule(True, 0.25, 0.03),
    "frame_ratio": Rule(True, 0.15, 0.0),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure beside its band; `limit` is None for a figure without a band, `new` for one that was not measured."""

    case: str
    figure: str
    old: float | None
    limit: float | None
    new: float | None
    is_good: bool


def judge(case: str, bands: Mapping[str, Figures], figures: Figures) -> list[Verdict]:
    """Every figure of a case: outside its band, without a band, or missing, it is not good."""
    stored = bands.get(case, {})
    verdicts = []
    for name in dict.fromkeys([*stored, *figures]):
        old, new = stored.get(name), figures.get(name)
        limit = RULES[name].limit(old) if old is not None else None
        is_good = limit is not None and new is not None and _holds(RULES[name], new, limit)
        verdicts.append(Verdict(case, name, old, limit, new, is_good))
    return verdicts


def _holds(rule: Rule, value: float, limit: float) -> bool:
    return value <= limit if rule.is_upper else value >= limit


def verdict_lines(verdicts: list[Verdict]) -> list[str]:
    """A table of old and new."""
    rows = [
        (
            verdict.case,
            verdict.figure,
            _cell(verdict.old),
            _bound(verdict),
            _cell(verdict.new),
            _change(verdict),
            "ok" if verdict.is_good else "**no band**" if verdict.limit is None else "**FAILED**",
        )
        for verdict in verdicts
    ]
    return table(("case", "figure", "old", "band", "new", "change", ""), rows, num_left=2)


def read_bands(path: Path) -> dict[str, dict[str, float]]:
    """Stored values by case and figure. Raises ConfigError in one line."""
    remedy = "run tools/update_bands.py --reason TEXT"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}; {remedy}") from error
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA or not isinstance(tree.get("cases"), dict):
        raise ConfigError(f"{path}: schema: expected {SCHEMA} with cases; {remedy}")
    bands: dict[str, dict[str, float]] = {}
    for case, figures in tree["cases"].items():
        for name, value in figures.items():
            if name not in RULES or isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{path}: cases.{case}.{name}: expected a number of {', '.join(RULES)}; {remedy}")
            bands.setdefault(case, {})[name] = float(value)
    return bands


def read_history(path: Path) -> list[dict[str, str]]:
    """Dates and reasons of the bands so far, newest last; none of a file that is not there."""
    if not path.is_file():
        return []
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return list(tree.get("history", []))


def write_bands(path: Path, cases: Mapping[str, Figures], history: list[dict[str, str]]) -> None:
    """Writes values rounded to four digits. Raises ValueError for what is not finite."""
    rounded = {case: {name: _rounded(value) for name, value in figures.items()} for case, figures in cases.items()}
    tree = {"schema": SCHEMA, "history": history, "cases": rounded}
    text = "# What tools/regression_guard.py holds figures to; written by tools/update_bands.py --reason TEXT.\n"
    path.write_text(text + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def _rounded(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"expected a finite figure, got {value}")
    return float(f"{value:.4g}")


def _cell(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _bound(verdict: Verdict) -> str:
    if verdict.limit is None:
        return "no band"
    return f"{'at most' if RULES[verdict.figure].is_upper else 'at least'} {verdict.limit:.4g}"


def _change(verdict: Verdict) -> str:
    if verdict.old is None or verdict.new is None or not math.isfinite(verdict.new):
        return ""
    difference = verdict.new - verdict.old
    return f"{100 * difference / verdict.old:+.1f} %" if verdict.old else f"{difference:+.4g}"
