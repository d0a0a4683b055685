"""Show that the regression guard catches deliberately worsened code.

    python tools/check_guard.py [--case clip-orb] [--only sleep]... [--stored] [--json FILE]

Every worsening is one edit in a copy of the code in a temporary directory; the guard runs there and has to fail. The
unchanged copy has to pass. Bands are those that the unchanged copy sets itself, so that the machine of today does not
matter, or with --stored those in benchmarks/bands.yaml. About 2 minutes on two cores; exit code 1 where the guard let
something pass, or stopped the unchanged code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vo", "frontends", "configs", "datasets", "tools", "benchmarks")
SCHEMA = "lightvo-guard-check/1"


@dataclass(frozen=True, slots=True)
class Worsening:
    """One edit of a file: `old` occurs in it exactly once."""

    name: str
    description: str
    file: str
    old: str
    new: str


WORSENINGS = (
    Worsening(
        "triangulation",
        "a swapped sign in triangulation",
        "vo/geometry.py",
        "points0 = centres0 + directions0 * depth0[:, None]",
        "points0 = centres0 - directions0 * depth0[:, None]",
    ),
    Worsening(
        "keypoints",
        "half the keypoints",
        "frontends/orb.py",
        "order[: self.config.max_keypoints]",
        "order[: self.config.max_keypoints // 2]",
    ),
    Worsening(
        "sleep",
        "a 5 ms sleep per frame",
        "vo/odometry.py",
        "    def step(self, frame: Frame, features: Features) -> OdometryStep:\n",
        "    def step(self, frame: Frame, features: Features) -> OdometryStep:\n"
        '        __import__("time").sleep(0.005)\n',
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the guard said of one version of the code; `figures` are those it failed."""

    name: str
    description: str
    is_as_expected: bool
    figures: tuple[str, ...]
    table: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show that the regression guard catches worsened code.")
    parser.add_argument("--case", default="clip-orb", help="case of the guard (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], choices=[w.name for w in WORSENINGS], help="repeatable")
    parser.add_argument("--stored", action="store_true", help="hold to the stored bands instead of the code's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        try:
            outcomes = check(Path(directory), options.case, options.only, is_stored=options.stored)
        except ValueError as error:
            print(f"check_guard: error: {error}", file=sys.stderr)
            return 2
    if options.json is not None:
        tree = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"python tools/check_guard.py --case {options.case}",
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        options.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return 0 if all(outcome.is_as_expected for outcome in outcomes) else 1


def check(copy: Path, case: str, only: Sequence[str], *, is_stored: bool) -> list[Outcome]:
    """The unchanged code first, then every worsening, each printed as it comes. ValueError for an edit that misses."""
    copy_code(copy)
    bands = copy / "benchmarks" / "bands.yaml"
    if not is_stored:
        bands.unlink(missing_ok=True)
        reason = "the unchanged code, for the check of the guard"
        done = run_tool(copy, "update_bands.py", "--case", case, "--laps", "2", "--reason", reason)
        if done.returncode != 0:
            raise ValueError(f"update_bands.py ended with {done.returncode}: {done.stderr.strip()}")
    outcomes = [report(Outcome("unchanged", "the code as it is", *judged(copy, case, expects_failure=False)))]
    for worsening in WORSENINGS:
        if only and worsening.name not in only:
            continue
        original = apply(worsening, copy)
        outcomes.append(
            report(Outcome(worsening.name, worsening.description, *judged(copy, case, expects_failure=True)))
        )
        (copy / worsening.file).write_text(original, encoding="utf-8")
    return outcomes


def copy_code(copy: Path) -> None:
    """The code without caches and results."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def apply(worsening: Worsening, copy: Path) -> str:
    """Edits the file; the text it had. ValueError where the edit does not fit exactly once."""
    path = copy / worsening.file
    text = path.read_text(encoding="utf-8")
    if text.count(worsening.old) != 1:
        raise ValueError(
            f"{worsening.file}: {worsening.old!r} occurs {text.count(worsening.old)} times, expected once: "
            "the code has changed, adapt WORSENINGS"
        )
    path.write_text(text.replace(worsening.old, worsening.new), encoding="utf-8")
    return text


def judged(copy: Path, case: str, *, expects_failure: bool) -> tuple[bool, tuple[str, ...], str]:
    """Whether the guard said what it should, the figures it failed, and its table."""
    done = run_tool(copy, "regression_guard.py", "--case", case)
    failed = tuple(line.split("|")[2].strip() for line in done.stdout.splitlines() if "**FAILED**" in line)
    # An exit code of 1 without a failed figure is a crash, and no verdict.
    has_failed = done.returncode == 1 and bool(failed)
    text = done.stdout if done.returncode in (0, 1) and done.stdout else done.stdout + done.stderr
    return (has_failed if expects_failure else done.returncode == 0), failed, text


def run_tool(copy: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool of the copy with the code of the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(copy / "tools" / name), *flags]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def report(outcome: Outcome) -> Outcome:
    verdict = "as expected" if outcome.is_as_expected else "NOT AS EXPECTED"
    failed = f"failed {', '.join(outcome.figures)}" if outcome.figures else "passed"
    print(f"== {outcome.name} ({outcome.description}): {failed}: {verdict}\n{outcome.table}", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
