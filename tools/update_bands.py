"""Set the bands of the regression guard anew from what the code does now, with the reason kept beside them.

    python tools/update_bands.py --reason TEXT [--case NAME]... [--figure NAME]... [--laps N]

Every case is measured N times and the median kept; cases that cannot be measured here keep their bands. Shows the
table of old and new first. About 3 minutes a lap on two cores with everything; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from guard_bands import judge, read_bands, read_history, verdict_lines, write_bands
from guard_cases import Case
from regression_guard import BANDS, chosen_cases, measure_all

from vo.types import VoError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Set the bands of the regression guard anew.")
    parser.add_argument("--reason", required=True, type=_reason, help="why the figures are right as they are now")
    parser.add_argument("--case", action="append", default=[], help="only the case of that name; repeatable")
    parser.add_argument("--figure", action="append", default=[], help="only the figure of that name; repeatable")
    parser.add_argument("--laps", type=int, default=1, help="measurements of each case (default: %(default)s)")
    parser.add_argument("--bands", type=Path, default=BANDS, help="default: benchmarks/bands.yaml")
    options = parser.parse_args(arguments)
    try:
        bands = read_bands(options.bands) if options.bands.is_file() else {}
        measured, left_out = measure_laps(chosen_cases(options.case), options.laps)
    except VoError as error:
        print(f"update_bands: error: {error}", file=sys.stderr)
        return 2
    wanted = options.figure
    verdicts = [v for name, figures in measured.items() for v in judge(name, bands, figures)]
    print("\n".join(verdict_lines([verdict for verdict in verdicts if not wanted or verdict.figure in wanted])))
    if wanted:
        measured = {name: {**bands.get(name, {}), **only(figures, wanted)} for name, figures in measured.items()}
    for name, reason in left_out.items():
        print(f"kept as it was: {name}: {reason}")
    entry = {"date": datetime.now(UTC).date().isoformat(), "reason": options.reason, "cases": ", ".join(measured)}
    write_bands(options.bands, {**bands, **measured}, [*read_history(options.bands), entry])
    return 0


def measure_laps(cases: Sequence[Case], num_laps: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Medians by case over several measurements, and why a case was left out."""
    laps = [measure_all(cases) for _ in range(max(1, num_laps))]
    measured = {name: medians([lap[name] for lap, _ in laps]) for name in laps[0][0]}
    return measured, laps[0][1]


def only(figures: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The figures of these names."""
    return {name: value for name, value in figures.items() if name in names}


def medians(laps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every figure."""
    return {name: statistics.median(lap[name] for lap in laps) for name in laps[0]}


def _reason(text: str) -> str:
    if len(text.split()) < 3:
        raise argparse.ArgumentTypeError("say in a few words why the figures may change")
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
