"""The guard of accuracy and speed, the check that it guards, and the faults that test the tests of geometry."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from synthetic_drive import write_drive

from vo.config_loader import load_config
from vo.types import ConfigError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_guard  # noqa: E402
import compare_peers  # noqa: E402
import guard_bands  # noqa: E402
import guard_cases  # noqa: E402
import mutate  # noqa: E402
import peer_methods  # noqa: E402
import peer_tables  # noqa: E402
import proof_tables  # noqa: E402
import regression_guard  # noqa: E402
import update_bands  # noqa: E402

FIGURES = {"ate_rmse_m": 0.1, "coverage": 1.0, "lost_episodes": 0.0, "track_ratio": 1.0}
BANDS = {"clip": FIGURES}


# --- bands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "good", "bad"),
    [
        ("ate_rmse_m", [0.0, 0.1, 0.1399], [0.1401, float("inf")]),
        ("coverage", [1.0, 0.981], [0.979, 0.0]),
        ("lost_episodes", [0.0], [1.0]),
        ("track_ratio", [0.5, 1.279], [1.281]),
    ],
)
def test_a_band_has_one_side(figure: str, good: list[float], bad: list[float]) -> None:
    for values, is_good in ((good, True), (bad, False)):
        for value in values:
            verdicts = guard_bands.judge("clip", BANDS, {**FIGURES, figure: value})
            assert [v.figure for v in verdicts if not v.is_good] == ([] if is_good else [figure])


def test_a_figure_without_a_band_or_a_band_without_a_figure_is_no_pass() -> None:
    verdicts = guard_bands.judge("clip", BANDS, {"ate_rmse_m": 0.1, "coverage": 1.0, "mean_matches": 5.0})
    assert {v.figure: v.is_good for v in verdicts} == {
        "ate_rmse_m": True,
        "coverage": True,
        "lost_episodes": False,
        "track_ratio": False,
        "mean_matches": False,
    }
    assert not any(v.is_good for v in guard_bands.judge("other", BANDS, {"coverage": 1.0}))
    not_a_number = guard_bands.judge("clip", BANDS, {**FIGURES, "ate_rmse_m": float("nan")})
    assert [v.figure for v in not_a_number if not v.is_good] == ["ate_rmse_m"]


def test_the_table_shows_old_and_new() -> None:
    lines = guard_bands.verdict_lines(guard_bands.judge("clip", BANDS, {**FIGURES, "ate_rmse_m": 0.2}))
    assert "| clip | ate_rmse_m | 0.1 | at most 0.14 | 0.2 | +100.0 % | **FAILED** |" in lines
    assert "| clip | lost_episodes | 0 | at most 0 | 0 | +0 | ok |" in lines
    assert "| clip | fps" not in "".join(lines)


def test_bands_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "bands.yaml"
    assert guard_bands.read_history(path) == []
    guard_bands.write_bands(path, {"clip": {**FIGURES, "ate_rmse_m": 0.123456}}, [{"date": "d", "reason": "r"}])
    assert guard_bands.read_bands(path) == {"clip": {**FIGURES, "ate_rmse_m": 0.1235}}
    assert guard_bands.read_history(path) == [{"date": "d", "reason": "r"}]
    with pytest.raises(ValueError, match="finite"):
        guard_bands.write_bands(path, {"clip": {"ate_rmse_m": float("inf")}}, [])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "cannot be read"),
        ("schema: other/1\ncases: {}", "schema: expected lightvo-bands/1"),
        (
            "schema: lightvo-bands/1\ncases: {clip: {speed: 1.0}}",
            r"cases\.clip\.speed: expected a number of ate_rmse_m",
        ),
        ("schema: lightvo-bands/1\ncases: {clip: {coverage: high}}", r"cases\.clip\.coverage: expected a number"),
    ],
)
def test_wrong_bands_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bands.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"bands\.yaml: {complaint}.*update_bands"):
        guard_bands.read_bands(tmp_path / "bands.yaml")


def test_the_committed_bands_are_of_the_cases_that_are_measured() -> None:
    bands = guard_bands.read_bands(regression_guard.BANDS)
    assert set(bands) <= {case.name for case in guard_cases.CASES} and "clip-orb" in bands
    history = guard_bands.read_history(regression_guard.BANDS)
    assert history and all(len(entry["reason"].split()) >= 3 for entry in history)
    for case in guard_cases.CASES:
        load_config(None, [*case.settings, *(case.speed_settings or ())])


# --- measuring ------------------------------------------------------------------------------------------------------


def small_case(drive: Path, **changes: object) -> guard_cases.Case:
    settings = {"name": "small", "source": f"kitti:{drive}", "settings": guard_cases.ORB, "num_frames": 12}
    return guard_cases.Case(**{**settings, **changes})  # type: ignore[arg-type]


def test_the_figures_of_a_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_cases, "SPEED_FRAMES", 6)
    monkeypatch.setattr(guard_cases, "SPEED_LAPS", 2)
    figures = guard_cases.measure(small_case(write_drive(tmp_path, 12), speed_settings=()))
    assert set(figures) <= set(guard_bands.RULES)
    assert figures["coverage"] == 1.0 and figures["lost_episodes"] == 0.0 and figures["ate_rmse_m"] < 0.1
    assert 100 < figures["mean_matches"] < figures["mean_keypoints"] <= 800
    ratios = [figures[f"{name}_ratio"] for name in ("extract", "match", "track")]
    assert min(ratios) > 0 and figures["frame_ratio"] == pytest.approx(sum(ratios))


def test_what_is_not_here_is_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTVO_DATA", raising=False)
    with pytest.raises(guard_cases.LeftOut, match="LIGHTVO_DATA is not set"):
        guard_cases.measure(small_case(tmp_path, source="kitti:{data}/x"))
    monkeypatch.setenv("LIGHTVO_DATA", str(tmp_path))
    with pytest.raises(guard_cases.LeftOut, match="not under LIGHTVO_DATA"):
        guard_cases.measure(small_case(tmp_path, source="kitti:{data}/x"))


def test_the_shortest_lap_counts() -> None:
    laps = [[9.0, 9.0, 1.0, 5.0, 2.0], [9.0, 9.0, 4.0, 2.0, 3.0]]
    assert guard_cases._undisturbed_ms(laps) == 1.0 + 2.0 + 2.0


def run_main(tool: object, monkeypatch: pytest.MonkeyPatch, figures: dict[str, float], path: Path, *flags: str) -> int:
    """A tool with measurements that are given."""
    measured = ({"clip-orb": dict(figures)}, {"kitti-default": "LIGHTVO_DATA is not set"})
    monkeypatch.setattr(tool, "measure_all", lambda _cases: measured)
    return tool.main(["--bands", str(path), *flags])  # type: ignore[attr-defined, no-any-return]


def test_bands_are_set_with_a_reason_and_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, result = tmp_path / "bands.yaml", tmp_path / "guard.json"
    with pytest.raises(SystemExit):
        update_bands.main(["--reason", "because", "--bands", str(path)])
    assert run_main(update_bands, monkeypatch, FIGURES, path, "--reason", "the first ones ever") == 0
    assert run_main(regression_guard, monkeypatch, FIGURES, path, "--json", str(result)) == 0
    assert "not measured: kitti-default: LIGHTVO_DATA is not set" in capsys.readouterr().out
    worse = {**FIGURES, "lost_episodes": 2.0, "ate_rmse_m": float("inf")}
    assert run_main(regression_guard, monkeypatch, worse, path, "--json", str(result)) == 1
    output = capsys.readouterr()
    assert "FAILED: clip-orb ate_rmse_m, clip-orb lost_episodes" in output.err and "update_bands" in output.err
    tree = json.loads(result.read_text())
    assert [v["new"] for v in tree["verdicts"] if v["figure"] == "ate_rmse_m"] == [None]
    better = {**FIGURES, "ate_rmse_m": 0.05}
    assert run_main(update_bands, monkeypatch, better, path, "--reason", "a better window", "--laps", "3") == 0
    stored = yaml.safe_load(path.read_text())
    assert [entry["reason"] for entry in stored["history"]] == ["the first ones ever", "a better window"]
    assert stored["cases"]["clip-orb"]["ate_rmse_m"] == 0.05
    other = {**FIGURES, "ate_rmse_m": 0.04, "mean_matches": 900.0}
    assert (
        run_main(update_bands, monkeypatch, other, path, "--reason", "only this one", "--figure", "mean_matches") == 0
    )
    renewed = yaml.safe_load(path.read_text())["cases"]["clip-orb"]
    assert renewed == {**stored["cases"]["clip-orb"], "mean_matches": 900.0}
    text = "\n".join(proof_tables.guard_lines([tree], []))
    assert "**FAILED**" in text and "- Not measured: kitti-default: LIGHTVO_DATA is not set" in text


def test_tools_refuse_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert regression_guard.main(["--bands", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "bands.yaml").write_text("schema: lightvo-bands/1\ncases: {}\n")
    assert regression_guard.main(["--case", "clip", "--bands", str(tmp_path / "bands.yaml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "none.yaml: cannot be read" in first and "'clip' is not known; choose from clip-orb" in second


# --- the check of the guard -----------------------------------------------------------------------------------------


def test_every_worsening_still_fits_the_code(tmp_path: Path) -> None:
    for worsening in check_guard.WORSENINGS:
        target = tmp_path / worsening.file
        target.parent.mkdir(exist_ok=True)
        target.write_text((ROOT / worsening.file).read_text())
        original = check_guard.apply(worsening, tmp_path)
        assert target.read_text() != original == (ROOT / worsening.file).read_text()
        ast.parse(target.read_text())
    (tmp_path / "vo" / "geometry.py").write_text("nothing of it")
    with pytest.raises(ValueError, match="adapt WORSENINGS"):
        check_guard.apply(check_guard.WORSENINGS[0], tmp_path)


@pytest.mark.parametrize(
    ("code", "table", "expects_failure", "is_as_expected"),
    [
        (0, "| c | f | 1 | b | 1 | 0 | ok |", False, True),
        (0, "| c | f | 1 | b | 1 | 0 | ok |", True, False),
        (1, "| c | f | 1 | b | 9 | 0 | **FAILED** |", True, True),
        (1, "", True, False),
        (2, "", True, False),
    ],
)
def test_a_crash_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, code: int, table: str, expects_failure: bool, is_as_expected: bool
) -> None:
    done = subprocess.CompletedProcess([], code, table, "traceback")
    monkeypatch.setattr(check_guard, "run_tool", lambda *_: done)
    verdict, figures, _ = check_guard.judged(Path("copy"), "clip-orb", expects_failure=expects_failure)
    assert verdict is is_as_expected and figures == (("f",) if "FAILED" in table else ())


# --- faults ---------------------------------------------------------------------------------------------------------

SOURCE = '''
"""A module of text 1 + 1."""

def half(x: int = 4) -> float:
    """Half of 2."""
    if x < 3 and not x == 1:
        return -x / 2
    return max(x[:2], x @ x, y @ x, 0.5)
'''


def test_every_operator_gives_its_faults_and_nothing_else() -> None:
    faults = mutate.faults_in(SOURCE)
    made = [mutate.mutant(SOURCE, *fault) for fault in faults]
    changes = {mutant.change for mutant in made}
    assert len(made) == len(changes) == len({mutant.source for mutant in made})
    for expected in (
        "4 -> 5",
        "x < 3 and (not x == 1) -> x < 3 or not x == 1",
        "x < 3 -> x >= 3",
        "not x == 1 -> not not x == 1",
        "x == 1 -> x != 1",
        "-x / 2 -> -x * 2",
        "-x -> +x",
        ":2 -> :1",
        "y @ x -> x @ y",
        "0.5 -> 1.0",
    ):
        assert expected in changes, changes
    assert not [change for change in changes if "x @ x" in change.partition(" -> ")[0] and "max" not in change]
    for mutant in made:
        assert ast.unparse(ast.parse(SOURCE)) != mutant.source and "Half of 2." in mutant.source
        compile(mutant.source, "mutant", "exec")


def test_geometry_has_enough_faults_to_draw_from() -> None:
    source = (ROOT / "vo" / "geometry.py").read_text()
    faults = mutate.faults_in(source)
    assert len(faults) > 300
    for fault in random.Random(1).sample(faults, 10):
        compile(mutate.mutant(source, *fault).source, "mutant", "exec")


def test_faults_are_killed_by_tests_that_look_and_survive_those_that_do_not(tmp_path: Path) -> None:
    """On real code, in a process of its own: it changes its directory and its path."""
    blind = tmp_path / "test_blind.py"
    blind.write_text("import vo.channel\n\ndef test_nothing():\n    assert vo.channel\n")
    command = [sys.executable, "tools/mutate.py", "--module", "vo/channel.py", "--count", "3", "--tests", str(blind)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("survived") == 3, done.stdout + done.stderr
    broken = tmp_path / "test_broken.py"
    broken.write_text("def test_nothing():\n    assert False\n")
    done = subprocess.run([*command[:-1], str(broken)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "without any fault; mend the tests first" in done.stderr


# --- peers ----------------------------------------------------------------------------------------------------------


def test_peers_take_turns_and_every_cell_is_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drive, result = write_drive(tmp_path, 10), tmp_path / "peers.json"
    methods = [flag for name in ("ours-orb", "opencv-orb", "opencv-aliked") for flag in ("--method", name)]
    flags = ["--source", f"kitti:{drive}", "--frames", "9", "--laps", "2", "--keypoints", "300", "--json", str(result)]
    assert compare_peers.main([*flags, *methods, "--threads", "1"]) == 0
    output = capsys.readouterr()
    turns = [line.split(": ")[1] for line in output.err.splitlines() if "lap" in line]
    assert turns[:4] == ["opencv-aliked, lap 1", "ours-orb, lap 1", "opencv-orb, lap 1", "opencv-aliked, lap 2"]
    tree = json.loads(result.read_text())
    absent, ours, theirs = tree["sources"][0]["methods"]
    assert "brings no weights" in absent["reason"] and "stages" not in absent
    for method in (ours, theirs):
        assert method["reason"] is None and method["odometry"]["coverage"] == 1.0
        assert method["odometry"]["ate_rmse_m"] < 0.1 and method["two_view"]["precision"] > 0.7
        assert method["peak_bytes"] >= method["imported_bytes"] > 10_000_000
        for stage in method["stages"].values():
            assert stage["low_ms"] <= stage["median_ms"] <= stage["high_ms"]
        # All but the first of each lap; two views begin with the fourth frame.
        assert method["stages"]["extract"]["num_calls"] == 16 and method["stages"]["match"]["num_calls"] == 10
        assert method["num_laps"] == 2
    assert tree["sources"][0]["num_frames"] == 9
    assert str(tmp_path) not in json.dumps(tree["sources"]) + tree["command"]
    rows = [line for line in output.out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4 and all("" not in [cell.strip() for cell in row.split("|")[1:-1]] for row in rows)


def test_a_method_that_dies_has_a_reason(tmp_path: Path) -> None:
    options = compare_peers.build_parser().parse_args(["--frames", "9"])
    worker = compare_peers.Worker(peer_methods.METHODS[-1], f"kitti:{tmp_path / 'nowhere'}", options)
    worker.run_lap(9)
    worker.close()
    assert "nowhere" in (worker.reason or "") and worker.laps == []
    tree = {**compare_peers.method_tree(worker)}
    assert tree["reason"] == worker.reason
    source = {"source": "s", "size": None, "num_frames": 9, "methods": [tree]}
    result = {
        "sources": [source],
        "num_frames": 9,
        "max_keypoints": 5,
        "date": "d",
        "others_share": None,
        "missing": ["m"],
    }
    assert "not measured: " in "\n".join(peer_tables.peer_lines(result))


def test_a_lap_of_all_methods_fits_into_the_time() -> None:
    assert compare_peers.affordable_frames(50, 2.0, 600.0) == 50
    assert compare_peers.affordable_frames(50, 10.0, 400.0) == 28, "seven tenths of the time, for the guess is rough"
    assert compare_peers.affordable_frames(50, 100.0, 400.0) == compare_peers.MIN_FRAMES
    assert compare_peers.affordable_frames(50, 0.0, 400.0) == 50, "no method is here"


def test_sources_that_are_missing_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTVO_DATA", raising=False)
    assert compare_peers.chosen_sources([]) == (["demo"], ["KITTI 00: LIGHTVO_DATA is not set"])
    monkeypatch.setenv("LIGHTVO_DATA", str(tmp_path))
    assert compare_peers.chosen_sources([])[0] == ["demo"]
    (tmp_path / compare_peers.KITTI).mkdir(parents=True)
    assert compare_peers.chosen_sources([]) == (["demo", f"kitti:{tmp_path / compare_peers.KITTI}"], [])


def test_a_stage_is_the_median_over_laps() -> None:
    laps = [[100.0, 1.0, 2.0, 3.0], [100.0, 4.0, 5.0, 6.0]]
    stage = compare_peers.stage_tree(laps)
    assert stage["median_ms"] == np.median([1, 2, 3, 4, 5, 6]) and stage["num_calls"] == 6


def test_tables_of_batches_pairs_and_faults() -> None:
    batch = {"title": "T", "date": "d", "header": ["a", "b", "c"], "rows": [["x|y", "m", "1"]], "notes": ["n"]}
    assert "| x\\|y | m | 1 |" in proof_tables.batch_lines([batch])
    group = {
        **{"group": "viewpoint", "num_pairs": 5, "num_failed": 1, "mean_matches": 10.4, "precision": 0.5},
        **{"recall": 0.25, "matching_score": 0.125, "mma": [0.1, 0.2, 0.3], "auc": [[1.0, 0.5]]},
    }
    pairs = {"source": "hpatches", "method": "orb", "mma_px": [1, 2, 3], "settings": ["a=1"], "groups": [group]}
    row = "| hpatches | orb | viewpoint | 5 (1 failed) | 10 | 0.500 | 0.250 | 0.125 | 0.300 | @1 px: 50.0 | `a=1` |"
    assert row in proof_tables.known_pair_lines([pairs])
    verdicts = [{"line": 3, "change": "a -> b", "outcome": outcome} for outcome in ("killed", "survived", "timed out")]
    faults = {"module": "vo/x.py", "num_possible": 9, "date": "d", "verdicts": verdicts}
    lines = proof_tables.fault_lines([faults])
    assert (
        lines[0].startswith("`vo/x.py`: 2 of 3 faults noticed (67 %), drawn from 9") and "- line 3: `a -> b`" in lines
    )
    outcomes = [{"description": "slow", "figures": ["fps"], "is_as_expected": True}]
    assert "| slow | failed: fps | yes |" in proof_tables.guard_lines([], [{"outcomes": outcomes}])
    for nothing in (proof_tables.batch_lines([]), proof_tables.fault_lines([]), proof_tables.guard_lines([], [])):
        assert nothing[0] == "Not measured yet."
