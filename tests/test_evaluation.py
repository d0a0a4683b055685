"""The figures against evo's command-line tools, against a slow KITTI metric, and against what must not change them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation
from trajectories import INTERVAL_NS, START_NS, disturbed, drive, rigid, similar, timed

from vo.evaluation import (
    Align,
    associate,
    compare,
    distance_of_stretches,
    evaluate,
    evaluation_json,
    format_evaluation,
    mutual_nearest,
    segment_errors,
)
from vo.plots import errors_figure, path_figure, segments_figure
from vo.trajectory import Trajectory, read_trajectory, write_euroc, write_kitti, write_tum
from vo.types import FloatArray, SourceError

TURN = Rotation.from_rotvec([0.3, -1.0, 0.4]).as_matrix()
FLAGS: dict[Align, list[str]] = {"sim3": ["-as"], "se3": ["-a"], "scale": ["-s"], "none": []}


def run_evo(home: Path, *arguments: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Statistics and arrays that one of evo's tools saves."""
    tool, *rest = arguments
    command = [str(Path(sys.executable).with_name(tool)), *rest, "--save_results", "result.zip", "--no_warnings"]
    environment = {**os.environ, "HOME": str(home), "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(home)}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(home / "result.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        arrays = {name[:-4]: np.load(io.BytesIO(archive.read(name))) for name in names}
        return json.loads(archive.read("stats.json")), arrays


def uneven_pair() -> tuple[Trajectory, Trajectory]:
    """A truth at twice the rate with jittered clocks, and an estimate in another frame and unit, with gaps."""
    rng = np.random.default_rng(5)
    poses = drive(240)
    truth_ns = START_NS + (INTERVAL_NS // 2) * np.arange(240) + rng.integers(-3_000_000, 3_000_000, 240)
    kept = np.setdiff1d(np.arange(6, 236, 2), np.r_[40:60, 100:104])
    times_ns = START_NS + (INTERVAL_NS // 2) * kept + rng.integers(-3_000_000, 3_000_000, len(kept))
    estimate = similar(disturbed(poses)[kept], TURN, np.array([3.0, -2.0, 9.0]), 0.37)
    return Trajectory(times_ns.astype(np.int64), estimate, "estimate"), Trajectory(truth_ns.astype(np.int64), poses)


@pytest.mark.parametrize("align", ["sim3", "se3", "scale", "none"])
def test_agreement_with_evo_on_tum_files(tmp_path: Path, align: Align) -> None:
    trajectory, truth = uneven_pair()
    write_tum(trajectory, tmp_path / "estimate.txt")
    write_tum(truth, tmp_path / "truth.txt")
    result = compare(read_trajectory(tmp_path / "estimate.txt"), read_trajectory(tmp_path / "truth.txt"), align)
    files = ["tum", "truth.txt", "estimate.txt", *FLAGS[align]]
    absolute, arrays = run_evo(tmp_path, "evo_ape", *files)
    assert result.evaluation.num_poses == len(arrays["error_array"]) > 90
    assert result.evaluation.ate_rmse_m == pytest.approx(absolute["rmse"], abs=1e-6)
    assert_allclose(result.position_errors_m, arrays["error_array"], atol=1e-6)
    if align != "none":
        scale = np.cbrt(np.linalg.det(arrays["alignment_transformation_sim3"][:3, :3]))
        assert result.evaluation.scale == pytest.approx(scale, abs=1e-6)
    if align in ("se3", "scale"):
        return
    relative, arrays = run_evo(tmp_path, "evo_rpe", *files, "--pose_relation", "trans_part", "--delta", "1")
    assert result.evaluation.rpe_trans_m == pytest.approx(relative["rmse"], abs=1e-6)
    assert_allclose(result.translation_errors_m, arrays["error_array"], atol=1e-6)
    assert result.evaluation.rpe_distance_m == 10.0
    if align != "sim3":
        return
    by_way = ["-d", "10", "-u", "m", "--pairs_from_reference"]
    relative, _ = run_evo(tmp_path, "evo_rpe", *files, "-r", "trans_part", *by_way)
    assert result.evaluation.rpe_distance_trans_m == pytest.approx(relative["rmse"], abs=1e-6)
    relative, _ = run_evo(tmp_path, "evo_rpe", *files, "-r", "angle_deg", *by_way)
    assert result.evaluation.rpe_distance_rot_deg == pytest.approx(relative["mean"], abs=1e-6)


def test_agreement_with_evo_on_rotation_and_other_formats(tmp_path: Path) -> None:
    trajectory, truth = uneven_pair()
    write_tum(trajectory, tmp_path / "estimate.txt")
    write_euroc(truth, tmp_path / "data.csv")
    result = evaluate(read_trajectory(tmp_path / "estimate.txt"), read_trajectory(tmp_path / "data.csv"))
    absolute, _ = run_evo(tmp_path, "evo_ape", "euroc", "data.csv", "estimate.txt", "-as")
    assert result.ate_rmse_m == pytest.approx(absolute["rmse"], abs=1e-6)
    assert any("body" in note for note in result.notes)
    whole = Trajectory(np.arange(240, dtype=np.int64), disturbed(truth.T_world_camera), has_times=False)
    write_kitti(whole, tmp_path / "estimate_kitti.txt")
    write_kitti(truth, tmp_path / "truth_kitti.txt")
    result = evaluate(
        read_trajectory(tmp_path / "estimate_kitti.txt"), read_trajectory(tmp_path / "truth_kitti.txt"), "se3"
    )
    files = ["kitti", "truth_kitti.txt", "estimate_kitti.txt", "-a"]
    relative, _ = run_evo(tmp_path, "evo_rpe", *files, "-r", "angle_deg", "-d", "1", "-u", "f")
    assert result.num_poses == 240 and result.coverage == 1.0
    assert result.rpe_rot_deg == pytest.approx(relative["mean"], abs=1e-6)


def slow_kitti(truth: FloatArray, poses: FloatArray, lengths_m: list[float]) -> tuple[list[float], list[float]]:
    """Translation in percent and rotation in deg per 100 m of every segment, pose by pose with general inverses."""
    travelled = [0.0]
    for before, after in pairwise(truth):
        travelled.append(travelled[-1] + float(np.sqrt(((after[:3, 3] - before[:3, 3]) ** 2).sum())))
    t_errors, r_errors = [], []
    for first in range(0, len(truth), 10):
        for length_m in lengths_m:
            beyond = [row for row in range(first, len(truth)) if travelled[row] > travelled[first] + length_m]
            if not beyond:
                continue
            true_motion = np.linalg.inv(truth[first]) @ truth[beyond[0]]
            motion = np.linalg.inv(poses[first]) @ poses[beyond[0]]
            error = np.linalg.inv(motion) @ true_motion
            t_errors.append(float(np.sqrt((error[:3, 3] ** 2).sum())) / length_m * 100)
            cosine = np.clip((np.trace(error[:3, :3]) - 1) / 2, -1, 1)
            r_errors.append(float(np.degrees(np.arccos(cosine))) / length_m * 100)
    return t_errors, r_errors


@pytest.mark.parametrize(
    ("num_poses", "step_m", "expected_m"),
    [
        (950, 1.0, [100.0 * k for k in range(1, 9)]),
        (160, 1.0, [100.0]),
        (90, 1.0, [10.0 * k for k in range(1, 9)]),
        (60, 0.1, [1.0, 2.0, 3.0, 4.0, 5.0]),
    ],
)
def test_agreement_with_a_slow_kitti_metric(num_poses: int, step_m: float, expected_m: list[float]) -> None:
    truth = drive(num_poses, step_m=step_m)
    # A drift in rotation and scale, and errors large enough for the arc cosine of the slow one to be exact.
    poses = disturbed(truth, rotation_rad=0.02, position_m=0.03 * step_m)
    poses[:, :3, 3] *= 1.01
    result = evaluate(timed(poses), timed(truth), "none")
    t_errors, r_errors = slow_kitti(truth, poses, expected_m)
    assert list(result.segment_lengths_m) == pytest.approx(expected_m, rel=1e-12)
    assert result.num_segments == len(t_errors)
    assert result.kitti_t_err_percent == pytest.approx(np.mean(t_errors), abs=1e-9)
    assert result.kitti_r_err_deg_per_100m == pytest.approx(np.mean(r_errors), abs=1e-9)
    assert any("instead of 100 m" in note for note in result.notes) == (expected_m[0] < 100.0)


def test_kitti_metric_of_a_known_error() -> None:
    truth = np.tile(np.eye(4), (300, 1, 1))
    truth[:, 2, 3] = np.arange(300.0)
    poses = truth.copy()
    poses[:, 2, 3] *= 1.02
    turns = Rotation.from_rotvec(np.outer(np.arange(300), [0.0, 0.0, np.deg2rad(0.01)]))
    poses[:, :3, :3] = turns.as_matrix()
    errors = segment_errors(poses, truth)
    # Segments are one step longer than their length: the first pose that is farther away than 100 m is at 101 m.
    assert_array_equal(np.unique(errors.lengths_m), [100.0, 200.0])
    expected = 2.0 * (errors.lengths_m + 1) / errors.lengths_m
    assert_allclose(errors.t_err_percent, expected, rtol=1e-9)
    assert_allclose(errors.r_err_deg_per_100m, (errors.lengths_m + 1) / errors.lengths_m, rtol=1e-9)
    assert errors.first_rows[errors.lengths_m == 200.0].tolist() == list(range(0, 99, 10))


@pytest.mark.parametrize(
    ("path_length_m", "expected_m"),
    [(0.0, None), (1e-7, None), (1.0, 0.1), (4.0, 0.1), (99.9, 1.0), (100.0, 10.0), (999.0, 10.0), (5e4, 100.0)],
)
def test_the_stretches_fit_into_the_path_ten_times(path_length_m: float, expected_m: float | None) -> None:
    assert distance_of_stretches(path_length_m) == (None if expected_m is None else pytest.approx(expected_m))


numbers = st.floats(-5.0, 5.0, allow_subnormal=False)


@settings(deadline=None, max_examples=12)
@given(
    vector=st.tuples(numbers, numbers, numbers),
    position=st.tuples(numbers, numbers, numbers),
    scale=st.floats(0.01, 100.0),
)
def test_a_similarity_changes_nothing_after_alignment(
    vector: tuple[float, float, float], position: tuple[float, float, float], scale: float
) -> None:
    truth = timed(drive(60, step_m=3.0))
    poses = disturbed(truth.T_world_camera)
    rotation = Rotation.from_rotvec(vector).as_matrix()
    before = compare(timed(poses), truth)
    after = compare(timed(similar(poses, rotation, np.array(position), scale)), truth)
    assert after.evaluation.scale == pytest.approx(before.evaluation.scale / scale, rel=1e-9)
    assert_allclose(after.position_errors_m, before.position_errors_m, atol=1e-8)
    assert_allclose(after.rotation_errors_deg, before.rotation_errors_deg, atol=1e-8)
    assert_allclose(after.translation_errors_m, before.translation_errors_m, atol=1e-8)
    assert_allclose(after.segments.t_err_percent, before.segments.t_err_percent, atol=1e-8)
    assert_allclose(after.segments.r_err_deg_per_100m, before.segments.r_err_deg_per_100m, atol=1e-8)
    # A rigid motion of the estimate changes nothing under se3, and relative figures not even without alignment.
    moved = timed(similar(poses, rotation, np.array(position), 1.0))
    assert evaluate(moved, truth, "se3").ate_rmse_m == pytest.approx(evaluate(timed(poses), truth, "se3").ate_rmse_m)
    unaligned, reference = evaluate(moved, truth, "none"), evaluate(timed(poses), truth, "none")
    assert unaligned.rpe_trans_m == pytest.approx(reference.rpe_trans_m, abs=1e-9)
    assert unaligned.kitti_t_err_percent == pytest.approx(reference.kitti_t_err_percent, abs=1e-9)


def test_the_alignment_is_the_one_that_was_applied() -> None:
    truth = timed(drive(80))
    result = compare(timed(similar(truth.T_world_camera, TURN, np.array([1.0, 2.0, 3.0]), 0.25)), truth)
    assert result.alignment.scale == pytest.approx(4.0, rel=1e-12)
    assert_allclose(result.alignment.rotation, TURN.T, atol=1e-12)
    aligned = result.alignment.scale * result.trajectory.positions @ result.alignment.rotation.T
    assert_allclose(aligned + result.alignment.translation, truth.positions, atol=1e-10)
    assert result.evaluation.ate_rmse_m == pytest.approx(0.0, abs=1e-10)


@settings(deadline=None, max_examples=150)
@given(
    times0=st.sets(st.integers(0, 60), min_size=1, max_size=12),
    times1=st.sets(st.integers(0, 60), min_size=1, max_size=12),
    max_difference=st.integers(0, 10),
)
def test_mutual_nearest_against_brute_force(times0: set[int], times1: set[int], max_difference: int) -> None:
    sorted0, sorted1 = sorted(times0), sorted(times1)
    nearest1 = [min(range(len(sorted1)), key=lambda j, t=t: (abs(sorted1[j] - t), j)) for t in sorted0]
    nearest0 = [min(range(len(sorted0)), key=lambda i, t=t: (abs(sorted0[i] - t), i)) for t in sorted1]
    expected = [
        (i, j) for i, j in enumerate(nearest1) if nearest0[j] == i and abs(sorted0[i] - sorted1[j]) <= max_difference
    ]
    rows0, rows1 = mutual_nearest(np.array(sorted0), np.array(sorted1), max_difference)
    assert list(zip(rows0.tolist(), rows1.tolist(), strict=True)) == expected


def test_association_by_frame_where_a_file_has_no_times(tmp_path: Path) -> None:
    poses = drive(40)
    kept = np.array([3, 4, 5, 9, 20, 33], dtype=np.int64)
    (tmp_path / "estimate").mkdir()
    write_kitti(Trajectory(kept, poses[kept], frame_indices=kept), tmp_path / "estimate" / "run.txt")
    write_kitti(Trajectory(np.arange(40, dtype=np.int64), poses), tmp_path / "07.txt")
    estimate, truth = read_trajectory(tmp_path / "estimate" / "run.txt"), read_trajectory(tmp_path / "07.txt")
    rows, truth_rows = associate(estimate, truth, 0)
    assert_array_equal(rows, np.arange(6))
    assert_array_equal(truth_rows, kept)
    result = evaluate(estimate, truth, "none")
    assert result.ate_rmse_m == 0.0 and result.coverage == 6 / 40
    (tmp_path / "times.txt").write_text("".join(f"{0.1 * n:.1f}\n" for n in range(40)))
    assert evaluate(estimate, read_trajectory(tmp_path / "07.txt"), "none").num_poses == 6


def test_trajectories_that_cannot_be_associated() -> None:
    truth = timed(drive(30), "truth.txt")
    with pytest.raises(SourceError, match=r"and truth.txt: 0 poses at most 0.01 s apart; they cover 0.000 to"):
        evaluate(timed(drive(30), start_ns=0), truth)
    few = timed(drive(30)[:2])
    with pytest.raises(SourceError, match=r"2 poses .* at least 3"):
        evaluate(few, truth)
    untimed = Trajectory(np.arange(30, dtype=np.int64), drive(30), "run.txt", has_times=False)
    with pytest.raises(SourceError, match=r"run.txt: has no times .* times.txt"):
        evaluate(untimed, truth)


@pytest.mark.parametrize("align", ["sim3", "se3", "scale", "none"])
def test_positions_that_do_not_determine_an_alignment(align: Align) -> None:
    line = np.tile(np.eye(4), (50, 1, 1))
    line[:, 2, 3] = np.arange(50) * 0.5
    moved = timed(similar(line, TURN, np.array([1.0, 2.0, 3.0]), 0.5 if align == "sim3" else 1.0))
    if align in ("sim3", "se3"):
        result = evaluate(moved, timed(line), align)
        assert result.ate_rmse_m == pytest.approx(0.0, abs=1e-9)
        assert result.scale == pytest.approx(2.0 if align == "sim3" else 1.0)
        assert any("on a line" in note for note in result.notes)
    point = np.tile(rigid(TURN, np.array([4.0, 5.0, 6.0])), (50, 1, 1))
    held = evaluate(timed(point), timed(line), align)
    distances = np.linalg.norm(line[:, :3, 3] - line[:, :3, 3].mean(axis=0), axis=1)
    if align in ("sim3", "se3"):  # the best a standing estimate can be is the centre of the path
        assert held.ate_rmse_m == pytest.approx(np.sqrt((distances**2).mean()))
    assert held.scale == 1.0
    still = evaluate(timed(line), timed(point), align)
    assert still.scale == 1.0, "a truth that stands still has no scale to give"
    assert still.kitti_t_err_percent is None and still.num_segments == 0 and still.path_length_m == 0.0
    assert any("hardly moves" in note for note in still.notes) == (align in ("sim3", "scale"))
    assert json.loads(evaluation_json(still))["kitti_t_err_percent"] is None
    assert "the truth does not move" in format_evaluation(still)


def test_coverage() -> None:
    truth = timed(drive(100))
    rows = np.setdiff1d(np.arange(100), np.arange(30, 50))
    gappy = Trajectory(truth.timestamps_ns[rows].copy(), truth.T_world_camera[rows].copy())
    assert evaluate(gappy, truth).coverage == pytest.approx(0.8)
    # A truth at ten times the rate says nothing about how many frames there were: the intervals of the estimate do.
    dense_ns = START_NS + INTERVAL_NS // 10 * np.arange(991, dtype=np.int64)
    dense = Trajectory(dense_ns, np.repeat(truth.T_world_camera, 10, axis=0)[:991])
    assert evaluate(gappy, dense).coverage == pytest.approx(0.8)
    # The frames handed in: 90 were processed, 10 of them before the truth begins.
    frames_ns = START_NS + INTERVAL_NS * np.arange(-10, 80, dtype=np.int64)
    early = Trajectory(truth.timestamps_ns[:40].copy(), truth.T_world_camera[:40].copy())
    result = evaluate(early, truth, frame_timestamps_ns=frames_ns)
    assert result.coverage == 0.5 and result.num_expected_poses == 80


def test_json_has_exactly_the_promised_keys() -> None:
    truth = timed(drive(120))
    result = evaluate(timed(disturbed(truth.T_world_camera), "out/trajectory_tum.txt"), truth)
    tree = json.loads(evaluation_json(result))
    assert list(tree) == [
        *("ate_rmse_m", "rpe_rot_deg", "rpe_trans_m", "rpe_distance_m", "rpe_distance_rot_deg"),
        *("rpe_distance_trans_m", "kitti_t_err_percent", "kitti_r_err_deg_per_100m"),
        *("coverage", "scale", "num_poses"),
    ]
    assert tree["ate_rmse_m"] == result.ate_rmse_m and tree["num_poses"] == 120
    text = format_evaluation(result)
    for part in ("out/trajectory_tum.txt", f"{result.ate_rmse_m:.4g} m", "100.0 %", "segments of 100 m"):
        assert part in text


def test_figures_show_the_path_with_equal_axes_and_every_error() -> None:
    trajectory, truth = uneven_pair()
    result = compare(trajectory, truth)
    axes = path_figure(trajectory, result, breaks=[10, 20]).axes[0]
    assert axes.get_aspect() == 1.0
    true_line, *parts = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [len(part.get_xdata()) for part in parts] == [10, 10, len(trajectory) - 20]
    # Truth and estimate lie on each other in metres, in the frame of the first camera, up to the errors.
    drawn = np.concatenate([np.column_stack(part.get_data()) for part in parts])[result.rows]
    offsets = drawn - np.column_stack(true_line.get_data())[result.truth_rows - result.truth_rows[0]]
    assert (np.linalg.norm(offsets, axis=1) <= result.position_errors_m + 1e-9).all()
    curves = [axes.lines[0].get_ydata() for axes in errors_figure(result).axes]
    assert_array_equal(curves[0], result.position_errors_m)
    assert_array_equal(curves[1], result.rotation_errors_deg)
    assert_array_equal(curves[2], result.translation_errors_m)
    drift = segments_figure(result.segments, result.distances_m)
    drawn = sum(len(line.get_xdata()) for line in drift.axes[1].lines)
    assert len(drift.axes) == 4 and drawn == len(result.segments)
    assert drift.axes[1].lines[0].get_xdata()[1] == result.distances_m[10]
    means = segments_figure(result.segments).axes[0].lines[1].get_ydata()
    assert np.mean(means) == pytest.approx(
        np.mean([result.segments.t_err_percent[result.segments.lengths_m == m].mean() for m in {100.0, 200.0}])
    )


def test_nothing_is_printed_and_nothing_is_left_in_the_home_directory(tmp_path: Path) -> None:
    write_tum(timed(drive(120)), tmp_path / "truth.txt")
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from vo.eval_report import write_report; from vo.eval_runs import evaluate_run\n"
        "from vo.trajectory import read_trajectory\n"
        "run = evaluate_run(Path('truth.txt'), read_trajectory(Path('truth.txt')))\n"
        "assert 'matplotlib' not in sys.modules, 'matplotlib is imported before a figure is drawn'\n"
        "write_report([run], Path('report'))\n"
        "assert not [name for name in sys.modules if name.startswith(('evo.tools', 'matplotlib.pyplot'))]\n"
    )
    environment = {
        **{**os.environ, "HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "matplotlib")},
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(home) == []


DATA = os.environ.get("LIGHTVO_DATA")


@pytest.mark.skipif(DATA is None, reason="LIGHTVO_DATA is not set")
@pytest.mark.parametrize("align", ["sim3", "se3", "scale", "none"])
def test_real_ground_truth_against_itself_is_without_error(align: Align) -> None:
    truth = read_trajectory(Path(str(DATA)) / "kitti/poses/00.txt")
    result = evaluate(truth, truth, align)
    assert result.num_poses == 200 and result.coverage == 1.0
    assert result.scale == pytest.approx(1.0, abs=1e-12)
    assert result.ate_rmse_m < 1e-12 and result.rpe_trans_m < 1e-12 and result.rpe_rot_deg < 1e-12
    assert result.kitti_t_err_percent is not None and result.kitti_t_err_percent < 1e-12
    assert result.kitti_r_err_deg_per_100m is not None and result.kitti_r_err_deg_per_100m < 1e-12
    assert result.segment_lengths_m == (100.0,) and result.path_length_m == pytest.approx(144.9, abs=0.1)
    standing = read_trajectory(Path(str(DATA)) / "euroc/V1_01_head/mav0/state_groundtruth_estimate0/data.csv")
    assert evaluate(standing, standing, align).ate_rmse_m < 1e-9
