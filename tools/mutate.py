"""Check that the tests of a module notice when it is wrong: one small fault at a time, in a copy of the code.

    python tools/mutate.py [--module vo/geometry.py] [--tests FILE]... [--count 60] [--seed 0]

Faults are drawn at random from all that these operators give: + and -, * and /, & and |, `and` and `or` exchanged, the
sides of @ exchanged, comparisons negated, minus signs and `not` dropped, whole numbers raised by one (the ends of
slices lowered, for there is often nothing behind them), other numbers doubled, min and max, sin and cos exchanged.
A fault is killed where a test fails, or the tests take far longer than they should. Exit code 1 where fewer than
--minimum are killed. Two minutes on two cores for 60 faults in geometry.py.

mutmut and cosmic-ray start the tests anew for every fault, five seconds of imports here; this forks a process that has
imported everything already.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = "lightvo-mutation/1"
TESTS = (
    "tests/test_geometry.py",
    "tests/test_absolute_pose.py",
    "tests/test_relative_pose.py",
    "tests/test_first_pose.py",
)
FOLDERS = ("vo", "frontends", "configs", "datasets", "tests")
FILES = ("pyproject.toml",)
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"

_BINARY: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Div(),
    ast.Div: ast.Mult(),
    ast.Pow: ast.Mult(),
    ast.FloorDiv: ast.Mult(),
    ast.BitAnd: ast.BitOr(),
    ast.BitOr: ast.BitAnd(),
}
_COMPARISONS: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.GtE(),
    ast.GtE: ast.Lt(),
    ast.Gt: ast.LtE(),
    ast.LtE: ast.Gt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "sin": "cos", "cos": "sin"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault: the whole source with it, and what it is."""

    line: int
    change: str
    source: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests said of a fault."""

    line: int
    change: str
    outcome: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    module = options.module
    # The tests run in a directory of their own.
    json_file = None if options.json is None else options.json.resolve()
    source = (ROOT / module).read_text(encoding="utf-8")
    faults = faults_in(source)
    chosen = random.Random(options.seed).sample(faults, min(options.count, len(faults)))
    mutants = [mutant(source, *fault) for fault in sorted(chosen)]
    tests = options.tests or TESTS
    with tempfile.TemporaryDirectory() as directory:
        try:
            verdicts = judge(Path(directory), module, mutants, tests)
        except RuntimeError as error:
            print(f"mutate: error: {error}", file=sys.stderr)
            return 2
    num_killed = sum(verdict.outcome != SURVIVED for verdict in verdicts)
    share = num_killed / len(verdicts)
    print(f"{module}: {num_killed} of {len(verdicts)} faults killed ({100 * share:.0f} %), {len(faults)} possible")
    if json_file is not None:
        tree = result_tree(options, len(faults), verdicts, tests)
        json_file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return 0 if share >= options.minimum else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check that the tests of a module notice faults in it.")
    parser.add_argument("--module", default="vo/geometry.py", help="default: %(default)s")
    parser.add_argument("--tests", action="append", metavar="FILE", help="repeatable (default: those of geometry)")
    parser.add_argument("--count", type=int, default=60, help="faults drawn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--minimum", type=float, default=0.9, help="share to be killed (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    return parser


def result_tree(
    options: argparse.Namespace, num_possible: int, verdicts: Sequence[Verdict], tests: Sequence[str]
) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python tools/mutate.py --module {options.module} --count {options.count} --seed {options.seed}",
        "module": options.module,
        "tests": list(tests),
        "num_possible": num_possible,
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }


# --- faults ---------------------------------------------------------------------------------------------------------


def faults_in(source: str) -> list[tuple[int, int]]:
    """Every fault that the operators give, as the number of a node and of an edit of it."""
    nodes = _sites(ast.parse(source))
    return [(number, variant) for number, node in enumerate(nodes) for variant, _ in enumerate(_edits(node))]


def mutant(source: str, number: int, variant: int) -> Mutant:
    """The source with one fault of `faults_in`."""
    tree = ast.parse(source)
    site = list(_sites(tree))[number]
    before = ast.unparse(site)
    list(_edits(site))[variant]()
    return Mutant(getattr(site, "lineno", 0), f"{before} -> {ast.unparse(site)}", ast.unparse(tree))


def _sites(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: neither annotations, decorators nor docstrings."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_text(child):
                if not (field == "upper" and isinstance(child, ast.Constant)):
                    yield child
                yield from _sites(child)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _edits(node: ast.AST) -> Iterator[Callable[[], None]]:
    """Changes of a node in place."""
    match node:
        case ast.BinOp(op=ast.MatMult()) if ast.dump(node.left) != ast.dump(node.right):
            yield lambda: _set(node, left=node.right, right=node.left)
        case ast.BinOp() | ast.AugAssign() if type(node.op) in _BINARY:
            yield lambda: _set(node, op=_BINARY[type(node.op)])
        case ast.Compare() if type(node.ops[0]) in _COMPARISONS:
            yield lambda: _set(node, ops=[_COMPARISONS[type(node.ops[0])], *node.ops[1:]])
        case ast.BoolOp():
            yield lambda: _set(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield lambda: _set(node, op=ast.UAdd()) if isinstance(node.op, ast.USub) else _drop(node)
        case ast.Constant(value=bool()):
            yield lambda: _set(node, value=not node.value)
        case ast.Slice(upper=ast.Constant(value=int())):
            yield lambda: _set(node.upper, value=node.upper.value - 1)
        case ast.Constant(value=int()):
            yield lambda: _set(node, value=node.value + 1)
        case ast.Constant(value=float()):
            yield lambda: _set(node, value=2 * node.value if node.value else 1.0)
        case ast.Call(func=ast.Name(id=name)) if name in _NAMES:
            yield lambda: _set(node.func, id=_NAMES[name])
        case ast.Call(func=ast.Attribute(attr=name)) if name in _NAMES:
            yield lambda: _set(node.func, attr=_NAMES[name])


def _set(node: ast.AST, **fields: object) -> None:
    for name, value in fields.items():
        setattr(node, name, value)


def _drop(node: ast.UnaryOp) -> None:
    """`not x` and `~x` become `not not x` and `~~x`, which are x."""
    node.operand = ast.UnaryOp(op=type(node.op)(), operand=node.operand)


# --- tests ----------------------------------------------------------------------------------------------------------


def judge(directory: Path, module: str, mutants: Sequence[Mutant], tests: Sequence[str]) -> list[Verdict]:
    """Every fault in turn, printed as it comes. RuntimeError where the tests fail without a fault."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, directory / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, directory / file)
    path = directory / module
    original = path.read_text(encoding="utf-8")
    prepare(directory, module)
    outcome, seconds = run_tests(directory, tests, limit_s=300.0)
    if outcome != SURVIVED:
        raise RuntimeError(f"{', '.join(tests)}: {outcome} without any fault; mend the tests first")
    # Hypothesis looks for the simplest failure, which takes its time and is no sign of a fault that hangs.
    limit_s = 20.0 + 10.0 * seconds
    verdicts = []
    for mutant in mutants:
        path.write_text(mutant.source, encoding="utf-8")
        verdict = Verdict(mutant.line, mutant.change, *run_tests(directory, tests, limit_s))
        print(f"{verdict.outcome:9} {module}:{verdict.line}: {verdict.change}", flush=True)
        verdicts.append(verdict)
    path.write_text(original, encoding="utf-8")
    return verdicts


def prepare(directory: Path, module: str) -> None:
    """Imports what the tests need from the copy, apart from the module itself and what is built on it."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(directory))
    os.chdir(directory)
    for name in ("numpy", "cv2", "scipy.optimize", "scipy.linalg", "scipy.spatial.transform", "hypothesis", "pytest"):
        importlib.import_module(name)
    importlib.import_module("vo.config")
    dotted = ".".join(Path(module).with_suffix("").parts)
    if dotted in sys.modules or not Path(importlib.import_module("vo").__file__ or "").is_relative_to(directory):
        raise RuntimeError(f"{dotted}: imported already, or not from the copy; its faults would not be seen")


def run_tests(directory: Path, tests: Sequence[str], limit_s: float) -> tuple[str, float]:
    """What the tests say in a process of their own, and how long they took, s."""
    start_s = time.monotonic()
    child = os.fork()
    if child == 0:
        _run_in_child(directory, tests)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start_s
        if done:
            return (SURVIVED if os.waitstatus_to_exitcode(status) == 0 else KILLED), seconds
        if seconds > limit_s:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return TIMED_OUT, seconds
        time.sleep(0.02)


def _run_in_child(directory: Path, tests: Sequence[str]) -> None:
    import pytest

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    flags = ["-q", "-x", "-p", "no:cacheprovider", "-o", "timeout=0", "--hypothesis-seed=0", "--tb=no"]
    # Hypothesis is imported already, on purpose.
    flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    try:
        code = int(pytest.main([*flags, f"--rootdir={directory}", *tests]))
    finally:
        # Never back into the caller's stack, whatever happened.
        shutil.rmtree(directory / ".hypothesis", ignore_errors=True)
        os._exit(code if "code" in locals() else 3)


if __name__ == "__main__":
    sys.exit(main())
