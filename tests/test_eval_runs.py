"""Several runs, what a summary says of them, and the report."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from trajectories import INTERVAL_NS, START_NS, disturbed, drive, timed

from vo.cli import main
from vo.eval_report import html_table, write_report
from vo.eval_runs import EvaluatedRun, evaluate_run, num_gaps, read_facts, spread, spreads
from vo.output import OutputError
from vo.trajectory import Trajectory, read_trajectory, write_euroc, write_kitti, write_tum
from vo.types import SourceError

SUMMARY = {
    "lost_episodes": 2,
    "fps": 12.5,
    "latency_ms": {"p50": 10.0, "p95": 20.0, "p99": 30.0, "max": 40.0},
    "evaluation": {"num_expected_poses": 160, "num_truth_poses": 130},
}


@pytest.fixture
def truth_file(tmp_path: Path) -> Path:
    write_tum(timed(drive(130)), tmp_path / "truth.txt")
    return tmp_path / "truth.txt"


def write_run(directory: Path, seed: int, summary: object = SUMMARY) -> Path:
    directory.mkdir(parents=True)
    write_tum(timed(disturbed(drive(130), seed, position_m=0.02 * seed)), directory / "trajectory_tum.txt")
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def three_runs(tmp_path: Path, truth_file: Path) -> list[EvaluatedRun]:
    truth = read_trajectory(truth_file)
    return [evaluate_run(write_run(tmp_path / f"run-{seed}", seed), truth) for seed in (1, 2, 3)]


def test_a_run_has_the_facts_of_its_summary(tmp_path: Path, truth_file: Path) -> None:
    truth = read_trajectory(truth_file)
    run = evaluate_run(write_run(tmp_path / "out", 1), truth)
    assert run.facts is not None and run.facts.latency_ms is not None
    assert (run.lost_episodes, run.figure("latency_p99_ms"), run.figure("fps")) == (2, 30.0, 12.5)
    # The run knew its frames: 160 had a true pose, 130 of them have one here.
    assert run.comparison.evaluation.coverage == pytest.approx(130 / 160)
    (tmp_path / "out" / "trajectory_tum.txt").rename(tmp_path / "out" / "others.txt")
    other = evaluate_run(tmp_path / "out" / "others.txt", truth)
    assert other.facts is None and other.comparison.evaluation.coverage == 1.0 and other.figure("fps") is None
    # A run that was evaluated with another truth does not know how many poses this one has.
    summary = {**SUMMARY, "evaluation": {"num_expected_poses": 160, "num_truth_poses": 5}}
    assert evaluate_run(write_run(tmp_path / "b", 1, summary), truth).comparison.evaluation.coverage == 1.0
    summary = {**SUMMARY, "evaluation": None, "latency_ms": None}
    assert evaluate_run(write_run(tmp_path / "c", 1, summary), truth).figure("latency_p50_ms") is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "expected a mapping"),
        (json.dumps({**SUMMARY, "fps": "fast"}), "fps: expected a number"),
        (json.dumps({**SUMMARY, "lost_episodes": None}), "lost_episodes: expected a number"),
        (json.dumps({**SUMMARY, "latency_ms": 3}), "latency_ms: expected p50"),
        (json.dumps({**SUMMARY, "latency_ms": {"p50": 1.0}}), r"latency_ms\.p95: expected a number"),
        (json.dumps({**SUMMARY, "evaluation": {}}), "num_expected_poses: expected a number"),
    ],
)
def test_a_summary_that_is_none_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(SourceError, match=rf"summary\.json: {complaint}"):
        read_facts(tmp_path / "summary.json")


def test_gaps() -> None:
    poses = drive(60)
    rows = np.setdiff1d(np.arange(60), np.r_[10:15, 30, 58:60])
    times_ns = START_NS + INTERVAL_NS * rows + np.random.default_rng(0).integers(-9_000_000, 9_000_000, len(rows))
    assert num_gaps(Trajectory(times_ns.astype(np.int64), poses[rows])) == 2
    frames = rows.astype(np.int64)
    assert num_gaps(Trajectory(frames, poses[rows], frame_indices=frames, has_times=False)) == 2
    assert num_gaps(timed(poses)) == 0 and num_gaps(timed(poses[:1])) == 0


def test_spread_against_numpy(tmp_path: Path, truth_file: Path) -> None:
    values = np.random.default_rng(0).random(7)
    found = spread(values.tolist())
    assert found.median == np.median(values) and (found.min, found.max) == (values.min(), values.max())
    assert found.interquartile == pytest.approx(np.subtract(*np.percentile(values, (75, 25))))
    runs = three_runs(tmp_path, truth_file)
    errors = [run.comparison.evaluation.ate_rmse_m for run in runs]
    assert errors[0] < errors[1] < errors[2]
    all_spreads = spreads(runs)
    assert all_spreads["ate_rmse_m"].median == errors[1] and all_spreads["ate_rmse_m"].num_runs == 3
    assert all_spreads["latency_p50_ms"].median == 10.0
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_the_report_of_one_run_holds_every_figure_in_one_page(tmp_path: Path, truth_file: Path) -> None:
    run = three_runs(tmp_path, truth_file)[0]
    report = tmp_path / "a" / "report"
    paths = write_report([run], report)
    assert [path.name for path in paths] == ["evaluation.json", "path.png", "errors.png", "segments.png", "report.html"]
    tree = json.loads(paths[0].read_text())
    assert tree["segment_lengths_m"] == [100.0] and tree["lost_episodes"] == 2 and tree["latency_ms"]["p95"] == 20.0
    page = paths[-1].read_text()
    # Self-contained: nothing is loaded, every picture is inside.
    assert not re.search(r"(?:src|href)=\"(?!data:)|<script|<link|@import|url\(", page)
    inside = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]
    assert inside == [path.read_bytes() for path in paths[1:4]]
    for picture in inside:
        image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None and min(image.shape[:2]) > 400 and image.std() > 5
    for text in (f"{tree['ate_rmse_m']:.4g}", f"{tree['kitti_t_err_percent']:.4g}", "latency p99", "truth.txt"):
        assert text in page
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report([run], report)] == first
    with pytest.raises(OutputError, match=r"path.png: cannot write"):
        write_report([run], paths[1])
    with pytest.raises(ValueError, match="at least one"):
        write_report([], report)


def test_the_report_of_several_runs(tmp_path: Path, truth_file: Path) -> None:
    runs = three_runs(tmp_path, truth_file)
    paths = write_report(runs, tmp_path / "report")
    assert len(paths) == 3 * 4 + 2
    tree = json.loads((tmp_path / "report" / "runs.json").read_text())
    assert tree["ate_rmse_m"]["median"] == runs[1].comparison.evaluation.ate_rmse_m
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<h2>") == 4 and page.count("data:image/png") == 9 and "3 runs" in page


def test_names_are_escaped() -> None:
    assert "<td>a&lt;b&gt;&amp;</td>" in html_table(("h",), [("a<b>&",)])


def test_the_command(tmp_path: Path, truth_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directories = [str(write_run(tmp_path / f"run-{seed}", seed)) for seed in (1, 2)]
    assert main(["eval", directories[0], "--truth", str(truth_file)]) == 0
    out = capsys.readouterr().out
    assert "lost          2 times (of the run's summary)" in out and "p95 20.0" in out and "per 10 m" in out
    assert main(["eval", *directories, "--truth", str(truth_file), "--report", str(tmp_path / "report")]) == 0
    assert "runs          2: median" in capsys.readouterr().out
    assert (tmp_path / "report" / "run2" / "segments.png").is_file()
    assert main(["eval", *directories, "--truth", str(truth_file), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert len(tree["runs"]) == 2 and tree["spread"]["lost_episodes"]["max"] == 2.0
    with pytest.raises(SystemExit):
        main(["eval", directories[0], "--truth", str(truth_file), "--max-time-difference-s", "-1"])


def test_any_format_against_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of other systems: no summary, other names, the truth's times or sensor given apart."""
    poses, noisy = timed(drive(130)), timed(disturbed(drive(130)))
    write_tum(noisy, tmp_path / "CameraTrajectory.txt")
    write_tum(poses, tmp_path / "truth_tum.txt")
    write_kitti(Trajectory(np.arange(130, dtype=np.int64), poses.T_world_camera), tmp_path / "truth_kitti.txt")
    seconds = [f"{ns // 10**9}.{ns % 10**9:09d}\n" for ns in poses.timestamps_ns.tolist()]
    (tmp_path / "when.txt").write_text("".join(seconds))
    body = np.eye(4)
    body[:3, 3] = (0.5, -0.2, 0.1)
    write_euroc(poses, tmp_path / "truth.csv", body)
    (tmp_path / "sensor.yaml").write_text(f"T_BS: {{rows: 4, cols: 4, data: {body.ravel().tolist()}}}\n")
    figures = []
    for flags in (
        ["truth_tum.txt"],
        ["truth_kitti.txt", "--truth-times", str(tmp_path / "when.txt")],
        ["truth.csv", "--truth-sensor", str(tmp_path / "sensor.yaml")],
    ):
        arguments = ["--truth", str(tmp_path / flags[0]), *flags[1:], "--json", "--align", "se3"]
        assert main(["eval", str(tmp_path / "CameraTrajectory.txt"), *arguments]) == 0
        tree = json.loads(capsys.readouterr().out)
        assert tree["lost_episodes"] == 0 and tree["latency_ms"] is None
        figures.append([tree[key] for key in ("ate_rmse_m", "rpe_rot_deg", "kitti_t_err_percent", "num_poses")])
    np.testing.assert_allclose(figures, [figures[0]] * 3, rtol=1e-7)


def test_the_way_of_the_truth_is_kept(tmp_path: Path, truth_file: Path) -> None:
    comparison = three_runs(tmp_path, truth_file)[0].comparison
    steps_m = np.linalg.norm(np.diff(comparison.truth.positions, axis=0), axis=1)
    np.testing.assert_allclose(comparison.distances_m, np.concatenate([[0.0], np.cumsum(steps_m)]), rtol=1e-12)
    assert_array_equal(comparison.rows, np.arange(130))
