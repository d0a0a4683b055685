"""Hold accuracy, coverage, losses and relative speed to stored bands; exit with 1 and a table where one is left.

    python tools/regression_guard.py [--case clip-orb]... [--json FILE] [--bands FILE]

The bundled clip with ORB is always measured; what needs weights (LIGHTVO_WEIGHTS) or sequences (LIGHTVO_DATA), where
they are. About 3 minutes on two cores with everything, 20 s for the bundled clip with ORB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

# As `vo run` sets it, before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from guard_bands import Verdict, judge, read_bands, verdict_lines
from guard_cases import CASES, Case, LeftOut, measure

from vo.bench_machine import CpuWatch, read_machine
from vo.summary import library_versions
from vo.types import ConfigError, VoError

ROOT = Path(__file__).resolve().parents[1]
BANDS = ROOT / "benchmarks" / "bands.yaml"
SCHEMA = "lightvo-guard/1"


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    watch = CpuWatch()
    try:
        bands = read_bands(options.bands)
        measured, left_out = measure_all(chosen_cases(options.case))
    except VoError as error:
        print(f"regression_guard: error: {error}", file=sys.stderr)
        return 2
    verdicts = [verdict for name, figures in measured.items() for verdict in judge(name, bands, figures)]
    print("\n".join(verdict_lines(verdicts)))
    for name, reason in left_out.items():
        print(f"not measured: {name}: {reason}")
    share = watch.others_share()
    if share is not None:
        print(f"other work took {100 * share:.0f} % of the processors")
    if options.json is not None:
        options.json.write_text(json.dumps(result_tree(verdicts, left_out, share), indent=2) + "\n", encoding="utf-8")
    failed = [verdict for verdict in verdicts if not verdict.is_good]
    if failed:
        names = ", ".join(f"{verdict.case} {verdict.figure}" for verdict in failed)
        print(f"FAILED: {names}. Where this is meant: python tools/update_bands.py --reason TEXT", file=sys.stderr)
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Hold accuracy, coverage, losses and relative speed to stored bands.")
    parser.add_argument("--case", action="append", default=[], help="only the case of that name; repeatable")
    parser.add_argument("--bands", type=Path, default=BANDS, help="default: benchmarks/bands.yaml")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def chosen_cases(names: Sequence[str]) -> list[Case]:
    """The cases of these names, all of them for none. ConfigError for a name that is none."""
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        known = ", ".join(case.name for case in CASES)
        raise ConfigError(f"--case: {sorted(unknown)[0]!r} is not known; choose from {known}")
    return [case for case in CASES if not names or case.name in names]


def measure_all(cases: Iterable[Case]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Figures by case, and why a case was left out. Raises VoError."""
    measured: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for case in cases:
        start_s = time.monotonic()
        try:
            measured[case.name] = measure(case)
        except LeftOut as reason:
            left_out[case.name] = str(reason)
        print(f"{case.name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    return measured, left_out


def result_tree(verdicts: Sequence[Verdict], left_out: dict[str, str], others_share: float | None) -> dict[str, object]:
    """What BENCHMARKS.md shows; a figure that is not finite is none."""
    rows = [{**asdict(v), "new": v.new if v.new is None or math.isfinite(v.new) else None} for v in verdicts]
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python tools/regression_guard.py",
        "machine": asdict(read_machine(1)),
        "versions": dict(library_versions()),
        "others_share": others_share,
        "verdicts": rows,
        "left_out": left_out,
    }


if __name__ == "__main__":
    sys.exit(main())
