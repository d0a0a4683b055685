"""docs/RELIABILITY.md promises nothing that no test exercises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    line
    for line in (ROOT / "docs" / "RELIABILITY.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| fault |")
]


def names_of(path: Path) -> set[str]:
    """The names of the test functions in a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_there_is_a_table_of_faults() -> None:
    assert len(ROWS) >= 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_is_exercised_by_a_test_that_exists(row: str) -> None:
    cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
    assert len(cells) == 4 and all(cells), "fault, what you see, what is kept, test"
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cells[3])
    assert names and len(names) == cells[3].count("`") / 2
    for file, name in names:
        assert name in names_of(ROOT / "tests" / file), f"{file} has no {name}"
