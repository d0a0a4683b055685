"""The tools around `vo bench`: matching quality, peak memory, and the page that shows the figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from synthetic_drive import STEP_M, write_drive

from frontends.nearest import Nearest
from frontends.orb import Orb, OrbConfig
from vo.bench_machine import Machine
from vo.bench_report import BenchResult, Comparison, OdometryTiming, StageTiming, bench_json
from vo.bench_statistics import Ratio, Timing
from vo.cli import build_parser
from vo.config import TwoViewConfig
from vo.config_loader import load_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import benchmark_tables  # noqa: E402
import matching_metrics  # noqa: E402
import matching_quality  # noqa: E402
import matching_tables  # noqa: E402
import run_benchmarks  # noqa: E402
import write_benchmarks  # noqa: E402

STATE = Machine("Some CPU", 2, ("avx2",), 2**34, "Linux x86_64", num_threads=2)
TIMING = Timing(30, 50.04, 48.0, 60.0, 70.0, 80.0)
SLOWER = Timing(30, 251.26, 240.0, 300.0, 310.0, 320.0)
RESULT = BenchResult(
    date="2026-01-02",
    command="vo bench kitti:sequences/05 --config mine.yaml",
    preset="mine.yaml",
    settings=("frontend.extractor.name=xfeat", "frontend.extractor.spread_cell_px=null"),
    machine=STATE,
    versions=(("torch", "2.13.0"), ("scipy", "1.17")),
    source="kitti:sequences/05",
    width=320,
    height=240,
    num_frames=8,
    device="cpu",
    extractor="xfeat",
    extractor_precision="float32",
    matcher="lightglue",
    matcher_precision="bfloat16",
    max_keypoints=1024,
    weights=(),
    load_s=0.5,
    odometry=OdometryTiming(
        300.0, (StageTiming("extract", TIMING), StageTiming("frame", SLOWER)), 4.04, 1000.0, 700.0, 2.5
    ),
    others_share=0.031,
    comparisons=(
        Comparison(
            "match",
            "kornia",
            "kornia 0.9.0, float32",
            TIMING,
            SLOWER,
            Ratio(30, 5.021, 4.9, 5.1, 4.0, 6.0),
            "matches",
            700.4,
            699.6,
            0.9951,
            2.0,
            2.25,
        ),
    ),
    not_compared=("opencv: no model file",),
)


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), 8)


# --- matching quality -----------------------------------------------------------------------------------------------


def test_line_distances_are_the_larger_of_both() -> None:
    rng = np.random.default_rng(0)
    rays0, rays1 = rng.normal(size=(2, 50, 2))
    E = rng.normal(size=(3, 3))
    found = matching_metrics.line_distances(E, rays0, rays1)
    for x0, x1, distance in zip(rays0, rays1, found, strict=True):
        h0, h1 = np.append(x0, 1), np.append(x1, 1)
        line0, line1 = E @ h1, E.T @ h0
        expected = max(abs(h0 @ line0) / np.hypot(*line0[:2]), abs(h1 @ line1) / np.hypot(*line1[:2]))
        assert distance == pytest.approx(expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 170.0), st.floats(0.0, 179.0))
def test_pose_errors_are_angles(seed: int, rotation_deg: float, direction_deg: float) -> None:
    rng = np.random.default_rng(seed)
    axis, across = np.linalg.qr(rng.normal(size=(3, 2)))[0].T
    T_true, T_found = np.eye(4), np.eye(4)
    T_true[:3, :3] = Rotation.random(rng=rng).as_matrix()
    T_found[:3, :3] = T_true[:3, :3] @ Rotation.from_rotvec(np.deg2rad(rotation_deg) * axis).as_matrix()
    T_true[:3, 3] = 3.7 * axis
    T_found[:3, 3] = np.cos(np.deg2rad(direction_deg)) * axis + np.sin(np.deg2rad(direction_deg)) * across
    assert matching_metrics.pose_errors_deg(T_found, T_true) == pytest.approx((rotation_deg, direction_deg), abs=1e-4)


def quality(inliers: int, error_deg: float | None, matches: int = 100, layers: int = 2) -> matching_metrics.PairQuality:
    return matching_metrics.PairQuality(matches, inliers, inliers // 2, error_deg, error_deg, layers, 0.5, 10.0)


def test_summary_counts_rejected_pairs_apart() -> None:
    pairs = [quality(60, 1.0), quality(80, 3.0), quality(70, 2.0), quality(0, None, matches=20, layers=6)]
    found = matching_metrics.summarise("e", "m", 3, pairs)
    assert (found.num_pairs, found.num_rejected, found.matches, found.inliers) == (4, 1, 80.0, 70.0)
    assert (found.true_inliers, found.precision) == (105 / 4, 105 / 320)
    assert (found.rotation_median_deg, found.rotation_mean_deg, found.direction_mean_deg) == (2.0, 2.0, 2.0)
    assert (found.stop_layer, found.kept_share, found.match_median_ms) == (3.0, 0.5, 10.0)
    none_posed = matching_metrics.summarise("e", "m", 3, pairs[3:])
    assert (none_posed.num_rejected, none_posed.inliers, none_posed.rotation_mean_deg) == (1, 0.0, None)


def test_cost_of_adaptive_settings_is_over_pairs_posed_by_both() -> None:
    full = [quality(100, 1.0), quality(200, 2.0), quality(50, None)]
    adaptive = [quality(98, 1.1), quality(190, 2.3), quality(50, 1.0)]
    cost = matching_metrics.adaptive_cost("e", 1, full, adaptive)
    assert cost is not None and cost.num_pairs == 2
    assert cost.inlier_loss_percent.value == pytest.approx(4.0)
    # With two pairs a resample is one of them twice, or both.
    assert (cost.inlier_loss_percent.low, cost.inlier_loss_percent.high) == pytest.approx((2.0, 5.0))
    assert cost.true_inlier_loss_percent.value == pytest.approx(100 * (1 - 144 / 150))
    assert cost.rotation_change_deg.value == pytest.approx(0.2)
    assert matching_metrics.adaptive_cost("e", 1, full[2:], adaptive[2:]) is None


def test_matches_of_a_true_sequence_fit_its_truth(drive: Path) -> None:
    sequence = matching_quality.read_sequence(f"kitti:{drive}", 5)
    assert len(sequence.frames) == len(sequence.T_world_camera) == 5
    assert sequence.T_world_camera[4, 0, 3] == pytest.approx(4 * STEP_M)
    extractor = Orb(OrbConfig(max_keypoints=200))
    features = [extractor.extract(frame.image) for frame in sequence.frames]
    found = matching_quality.match_pair(sequence, features, (0, 4), Nearest(), TwoViewConfig())
    assert found.num_true_inliers > 0.6 * found.num_matches > 60
    assert found.is_posed and found.rotation_error_deg is not None and found.direction_error_deg is not None
    assert found.rotation_error_deg < 1.0 and found.direction_error_deg < 5.0
    assert found.match_ms > 0 and found.kept_share == 1.0


def test_source_without_truth_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequence = write_drive(tmp_path, 3)
    (tmp_path / "poses" / "05.txt").unlink()
    assert matching_quality.main(["--source", f"kitti:{sequence}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("matching_quality: error: kitti:") and "no ground truth" in error


@pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="needs the published weights (LIGHTVO_WEIGHTS)")
def test_tool_measures_every_method_at_every_gap(
    drive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "matching.json"
    arguments = ["--gaps", "1,2", "--frames", "5", "--step", "2", "--keypoints", "400", "--extractors", "xfeat"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert matching_quality.main(["--source", f"kitti:{drive}", *arguments, *threads, "--json", str(output)]) == 0
    tree = json.loads(output.read_text())
    methods = [(method["gap"], method["matcher"], method["num_pairs"]) for method in tree["methods"]]
    assert methods == [(gap, matcher, 2) for gap in (1, 2) for matcher in matching_quality.MATCHERS]
    assert {cost["gap"] for cost in tree["adaptive_costs"]} <= {1, 2}
    by_matcher = {method["matcher"]: method for method in tree["methods"]}
    assert by_matcher[matching_quality.FULL]["stop_layer"] == 6 >= by_matcher[matching_quality.ADAPTIVE]["stop_layer"]
    assert str(drive.parent) not in output.read_text()
    assert capsys.readouterr().out.count("| xfeat |") == 6 + len(tree["adaptive_costs"])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_child(drive: Path, tmp_path: Path) -> None:
    """In a process of its own: a child is charged with the peak of whoever starts it, and pytest is large."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import peak_memory; "
        "command = 'x = bytearray(%d) + bytearray(1); raise SystemExit(3)'; "
        "print(*[peak_memory.run_measured([sys.executable, '-c', command % n]) for n in (1, 100_000_000)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    (small_code, small), (large_code, large) = (map(int, pair) for pair in re.findall(r"\((\d+), (\d+)\)", printed))
    assert small_code == large_code == 3
    assert 1_000_000 < small < 60_000_000
    assert 95_000_000 < large - small < 230_000_000


def test_peak_memory_of_a_run_is_written(drive: Path, tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    command = [sys.executable, "tools/peak_memory.py", f"kitti:{drive}", "--max-frames", "4", "--json", str(output)]
    subprocess.run([*command, "--config", "orb"], check=True, cwd=ROOT)
    tree = json.loads(output.read_text())
    assert tree["schema"] == "lightvo-memory/1" and tree["num_frames"] == 4 and tree["weights"] == []
    assert 50_000_000 < tree["peak_bytes"] < tree["limit_bytes"] == 1_200_000_000
    assert tree["command"] == "vo run kitti:sequences/05 --max-frames 4 --device cpu --publish off --config orb"


# --- the page -------------------------------------------------------------------------------------------------------


def test_page_is_written_from_the_figures(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "PAGE.md"
    results.mkdir()
    (results / "a.json").write_text(bench_json(RESULT))
    summary = {
        "source": "kitti:/somewhere/sequences/05",
        "frames_processed": 8,
        "poses": 7,
        "fps": 12.34,
        "stages_ms": {"extract": {"p50": 81.2, "p95": 99.9}, "track": {"p50": 3.4, "p95": 5.0}},
        "evaluation": {
            "ate_rmse_m": 0.1234,
            "rpe_rot_deg": 0.05,
            "align": "sim3",
            "path_length_m": 144.9,
            "trajectory_name": "kitti:/somewhere/x",
            "truth_name": "/somewhere/05.txt",
        },
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    flags = ["--results", str(results), "--output", str(page)]
    assert write_benchmarks.main([*flags, "--check"]) == 1
    assert write_benchmarks.main([*flags, "--add-run", f"drive-orb={tmp_path / 'out'}"]) == 0
    assert write_benchmarks.main([*flags, "--check"]) == 0
    text = page.read_text()
    assert "| drive-orb | kitti:sequences/05 | 8 | 7 | 12.3 | 81 / - / 3 | 0.123 | 0.050 | sim3 | 144.9 |" in text
    case = "kitti:sequences/05 320x240, 1024 keypoints, preset mine.yaml, `spread_cell_px=null`"
    assert (
        f"| {case} | match | lightglue, bfloat16 | 50.0 | kornia 0.9.0, float32 | 251.3 | **5.02x** | 4.90 to 5.10 "
        "| 4.00 to 6.00 (30) | 700 / 700 matches; layers 2.0 / 2.2 | 99.5 % | 3 % |"
    ) in text
    assert f"| {case} | xfeat + lightglue | 50.0 | - | - | 251.3 | 300 / 310 / 320 | 4.0 | 3 % |" in text
    assert "- Some CPU, 2 cores, 2 of PyTorch's threads; 16 GiB; avx2; torch 2.13.0 (2026-01-02)" in text
    assert "- Not compared: opencv: no model file" in text
    assert "`a.json`: `vo bench kitti:sequences/05 --config mine.yaml`" in text
    assert "/somewhere" not in "".join(path.read_text() for path in results.iterdir()) + text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_files_that_are_no_figures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.json").write_text('{"schema": "other/1"}')
    assert write_benchmarks.main(["--results", str(tmp_path), "--output", str(tmp_path / "PAGE.md")]) == 2
    (tmp_path / "odd.json").write_text("")
    assert write_benchmarks.main(["--results", str(tmp_path), "--output", str(tmp_path / "PAGE.md")]) == 2
    assert write_benchmarks.main(["--results", str(tmp_path), "--add-run", "a/b=c"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "odd.json: schema 'other/1' is none of lightvo-bench/1" in first
    assert "odd.json: not JSON" in second
    assert "expected NAME=DIR" in third


def test_columns_of_a_table_agree() -> None:
    lines = benchmark_tables.table(("a", "b", "c"), [("1", "2", "3")], num_left=2)
    assert lines == ["| a | b | c |", "| --- | --- | ---: |", "| 1 | 2 | 3 |"]


def test_matching_table_shows_what_it_costs() -> None:
    method = matching_metrics.summarise("xfeat", "nearest", 1, [quality(60, 1.0, layers=0)])
    cost = matching_metrics.adaptive_cost("xfeat", 1, [quality(100, 1.0)], [quality(97, 1.5)])
    unposed = matching_metrics.summarise("xfeat", "nearest", 5, [quality(0, None)])
    assert cost is not None
    tree = {
        "source": "kitti:sequences/00",
        "num_frames": 2,
        "max_keypoints": 512,
        "date": "2026-01-01",
        "depth_confidence": 0.95,
        "width_confidence": 0.99,
        "methods": [json.loads(json.dumps(matching_quality.asdict(m))) for m in (method, unposed)],
        "adaptive_costs": [json.loads(json.dumps(matching_quality.asdict(cost)))],
    }
    text = "\n".join(benchmark_tables.matching_lines(tree))
    assert "| 1 | xfeat | nearest | 1 (0) | 100 | 60 | 30 | 0.300 | 1.000 / 1.000 | 1.00 / 1.00 |  |  | 10.0 |" in text
    assert "| 5 | xfeat | nearest | 1 (1) | 100 | 0 | 0 | 0.000 |  |  | 2.0 | 50 % | 10.0 |" in text
    assert "| 3.0 % (3.0 % to 3.0 %) |" in text and "| +0.5000 (+0.5000 to +0.5000) |" in text


def test_our_weights_and_the_learned_matcher_are_compared_row_by_row() -> None:
    def method(extractor: str, matcher: str, inliers: float, rotation: float, direction: float) -> dict[str, object]:
        errors = {f"rotation_{kind}_deg": rotation for kind in ("median", "mean")}
        counts = {"inliers": inliers, "true_inliers": inliers / 2, "precision": 0.5}
        return {
            "extractor": extractor,
            "matcher": matcher,
            "gap": 5,
            "direction_mean_deg": direction,
            **errors,
            **counts,
        }

    full = matching_quality.FULL
    published = [method("xfeat", full, 110, 0.9, 3.0), method("xfeat", "nearest", 100, 1.0, 2.0)]
    text = "\n".join(matching_tables.matcher_gain_lines({"methods": published}))
    assert "| 5 | xfeat | 110 % | 110 % | 0.500 to 0.500 | 0.90 | 1.50 | not in direction |" in text
    assert matching_tables.own_weights_lines({"methods": published}) == []
    for inliers, rotation, verdict in ((105, 0.94, "yes"), (104, 0.94, "no"), (120, 0.95, "no")):
        own = method("own-xfeat", full, inliers, rotation, 3.0)
        (row,) = [
            line for line in matching_tables.own_weights_lines({"methods": [*published, own]}) if line.startswith("| 5")
        ]
        assert row.endswith(f"| {verdict} |"), (row, inliers, rotation)
    unposed = {**method("own-xfeat", full, 0, 1.0, 1.0), "rotation_median_deg": None}
    assert matching_tables.own_weights_lines({"methods": [*published, unposed]}) == []


def test_committed_page_says_what_the_committed_figures_say() -> None:
    assert write_benchmarks.main(["--check"]) == 0
    for path in (ROOT / "benchmarks").glob("*.json"):
        assert not re.search(r'[" :](/home/|/root/|/work/|/tmp/|/Users/)', path.read_text()), path.name


def test_commands_of_the_page_are_commands() -> None:
    names = [case.name for case in run_benchmarks.CASES]
    assert len(set(names)) == len(names) and {case.group for case in run_benchmarks.CASES} == set(run_benchmarks.GROUPS)
    for case in run_benchmarks.CASES:
        if case.group in ("speed", "runs"):
            command = "bench" if case.group == "speed" else "run"
            options = build_parser().parse_args([command, case.source, *case.flags])
            load_config(options.config, options.set)


def test_an_interrupted_measurement_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    failing = {"wire"}

    def measure(case: run_benchmarks.Case, source: str) -> None:
        asked.append(case.name)
        if case.name in failing:
            raise subprocess.CalledProcessError(3, [])

    monkeypatch.setattr(run_benchmarks, "measure", measure)
    monkeypatch.setattr(run_benchmarks, "write_benchmarks", lambda _: 0)
    monkeypatch.setattr(run_benchmarks, "RESULTS", tmp_path)
    monkeypatch.setattr(run_benchmarks, "DONE", tmp_path / ".done")
    monkeypatch.setenv("LIGHTVO_DATA", "nowhere")
    assert run_benchmarks.main(["--only", "wire"]) == 2
    assert asked == ["wire", "stuck-consumer", "viewer"], "one that fails does not keep the others from being measured"
    assert "error: wire failed" in capsys.readouterr().err
    failing.clear()
    assert run_benchmarks.main(["--only", "wire", "--list", "--resume"]) == 0
    assert capsys.readouterr().out.split() == ["1.5", "min", "--only", "wire", "--case", "wire"]
    assert run_benchmarks.main(["--only", "wire", "--resume"]) == 0
    assert asked[3:] == ["wire"]
    assert run_benchmarks.main(["--only", "wire", "--case", "viewer"]) == 0 and asked[4:] == ["viewer"]
    assert run_benchmarks.main(["--only", "air"]) == 2
