"""What a run leaves behind: while it goes on, when it is killed, and when the disk refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from trajectories import INTERVAL_NS, START_NS, disturbed, drive, timed

from vo.evaluation import compare
from vo.output import OutputError
from vo.recorder import Recorder
from vo.summary import (
    LatencyMs,
    RunSummary,
    StageTime,
    UsedWeights,
    latency_percentiles,
    library_versions,
    stage_times,
    summary_json,
)
from vo.trajectory import read_trajectory
from vo.types import FloatArray, PoseEstimate, TrackingStatus, VoError

NAMES = ("trajectory_tum.txt", "trajectory_kitti.txt", "trajectory_kitti_frames.txt")

SUMMARY = RunSummary(
    source="kitti:sequences/00",
    interrupted=False,
    frames_read=12,
    frames_processed=10,
    frames_dropped=1,
    frames_skipped=1,
    poses=9,
    keyframes=3,
    lost_episodes=1,
    stationary_frames=2,
    fps=9.5,
    latency_ms=LatencyMs(10.0, 20.0, 30.0, 40.0),
    stages=(StageTime("extract", 5.0, 6.0), StageTime("match", 2.0, 3.0)),
    mean_matches=512.5,
    mean_inliers=400.0,
    mean_stop_layer=None,
    scale_source="relative",
    radial_distortion=0.0,
    device="cpu",
    versions=(("python", "3.11.2"), ("torch", "2.13.0")),
    weights=(UsedWeights("aliked-t16", "ab" * 32),),
    fallbacks=("no GPU: ran on the CPU",),
)


def estimate(index: int, T: FloatArray | None, status: TrackingStatus = TrackingStatus.TRACKING) -> PoseEstimate:
    pose = None if T is None else T.copy()
    return PoseEstimate(index, START_NS + index * INTERVAL_NS, pose, TrackingStatus.LOST if pose is None else status)


def run_of(poses: FloatArray, lost: tuple[int, ...] = ()) -> list[PoseEstimate]:
    return [estimate(index, None if index in lost else T) for index, T in enumerate(poses)]


def test_every_frame_with_a_pose_is_on_the_disk_before_the_next(tmp_path: Path) -> None:
    poses = drive(12)
    with Recorder(tmp_path / "new" / "out") as recorder:
        for pose in run_of(poses, lost=(0, 4, 5)):
            recorder.record(pose)
            with_pose = [n for n in range(pose.frame_index + 1) if n not in (0, 4, 5)]
            lengths = {len((recorder.output_dir / name).read_bytes().splitlines()) for name in NAMES}
            assert lengths == {recorder.num_poses} == {len(with_pose)}
        tum = read_trajectory(recorder.output_dir / NAMES[0])
        kitti = read_trajectory(recorder.output_dir / NAMES[1])
        assert_array_equal(kitti.frame_indices, with_pose)
        assert_array_equal(tum.timestamps_ns, START_NS + INTERVAL_NS * np.array(with_pose))
        for read in (tum, kitti, recorder.trajectory()):
            assert read is not None
            assert_array_equal(read.positions, poses[with_pose, :3, 3])
            assert_allclose(read.T_world_camera, poses[with_pose], atol=1e-14)
        both = recorder.trajectory()
        assert both is not None and both.frame_indices is not None
        assert_array_equal(both.frame_indices, with_pose)


def test_poses_of_every_status_but_lost_are_written(tmp_path: Path) -> None:
    statuses = (TrackingStatus.INITIALIZING, TrackingStatus.TRACKING, TrackingStatus.RELOCALIZED)
    with Recorder(tmp_path) as recorder:
        for index, status in enumerate(statuses):
            recorder.record(estimate(index, np.eye(4), status))
        recorder.record(estimate(3, None))
        assert recorder.num_poses == 3


def test_times_must_rise(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.record(estimate(4, np.eye(4)))
        for index in (4, 3):
            with pytest.raises(ValueError, match="does not rise"):
                recorder.record(estimate(index, np.eye(4)))
        assert recorder.num_poses == 1


def test_summary_holds_every_figure_under_its_key(tmp_path: Path) -> None:
    truth = timed(drive(30))
    evaluation = compare(timed(disturbed(truth.T_world_camera)), truth).evaluation
    with Recorder(tmp_path) as recorder:
        recorder.write_config("frontend:\n  name: aliked\n")
        recorder.write_summary(replace(SUMMARY, evaluation=evaluation))
    assert (tmp_path / "config.yaml").read_text() == "frontend:\n  name: aliked\n"
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert set(tree) == {field.name for field in fields(RunSummary)} - {"stages"} | {"stages_ms"}
    assert tree["latency_ms"] == {"p50": 10.0, "p95": 20.0, "p99": 30.0, "max": 40.0}
    assert tree["stages_ms"] == {"extract": {"p50": 5.0, "p95": 6.0}, "match": {"p50": 2.0, "p95": 3.0}}
    assert tree["versions"] == {"python": "3.11.2", "torch": "2.13.0"}
    assert tree["weights"] == [{"name": "aliked-t16", "sha256": "ab" * 32}]
    assert (tree["frames_read"], tree["frames_dropped"], tree["mean_stop_layer"]) == (12, 1, None)
    assert tree["evaluation"]["ate_rmse_m"] == evaluation.ate_rmse_m
    assert json.loads(summary_json(SUMMARY))["evaluation"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        summary_json(replace(SUMMARY, fps=float("nan")))


def test_percentiles_and_versions() -> None:
    values = np.random.default_rng(0).exponential(20.0, 500).tolist()
    latency = latency_percentiles(values)
    assert latency is not None
    ordered = sorted(values)
    # Linear interpolation between the two order statistics around (n - 1) q.
    for found, share in ((latency.p50, 0.5), (latency.p95, 0.95), (latency.p99, 0.99), (latency.max, 1.0)):
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        assert found == pytest.approx(ordered[below] + (position - below) * (ordered[above] - ordered[below]))
    assert latency_percentiles([]) is None
    assert stage_times({"extract": [3.0, 1.0], "idle": []}) == (StageTime("extract", 2.0, pytest.approx(2.9)),)
    versions = dict(library_versions())
    assert versions["numpy"] == np.__version__ and versions["python"].startswith("3.")


def drawn_blue(path: Path) -> int:
    """Pixels in the colour of the estimate."""
    image = cv2.imread(str(path))
    assert image is not None
    return int((np.abs(image.astype(int) - (0xA4, 0x62, 0x0B)).max(axis=2) < 40).sum())


def test_the_plot_shows_what_was_written(tmp_path: Path) -> None:
    poses = drive(60)
    with Recorder(tmp_path / "a") as recorder:
        recorder.write_plot()
        plot = tmp_path / "a" / "trajectory.png"
        assert drawn_blue(plot) == 0
        for pose in run_of(poses, lost=tuple(range(20, 40))):
            recorder.record(pose)
        recorder.write_plot()
        alone = drawn_blue(plot)
        assert alone > 300
        trajectory = recorder.trajectory()
        assert trajectory is not None
        recorder.write_plot(compare(trajectory, timed(poses)))
        assert drawn_blue(plot) > 300
    with Recorder(tmp_path / "b") as recorder:
        for pose in run_of(poses):
            recorder.record(pose)
        recorder.write_plot()
    assert drawn_blue(tmp_path / "b" / "trajectory.png") > 1.1 * alone, "the gap of lost frames is not drawn over"


def test_an_earlier_run_is_replaced_from_the_first_frame_on(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for pose in run_of(drive(10)):
            recorder.record(pose)
        recorder.write_summary(SUMMARY)
        recorder.write_plot()
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with Recorder(tmp_path) as recorder:
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        recorder.record(estimate(0, np.eye(4)))
        assert sorted(os.listdir(tmp_path)) == sorted([*NAMES, "notes.txt"])
        assert len(read_trajectory(tmp_path / NAMES[0])) == 1
    with Recorder(tmp_path) as recorder:  # a run without a single frame leaves no trajectory of another
        recorder.write_summary(replace(SUMMARY, poses=0))
        assert recorder.trajectory() is None
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [b""] * 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def assert_one_line(error: VoError, path: Path) -> None:
    assert str(path) in str(error) and "\n" not in str(error) and "cannot write" in str(error)


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for output_dir in (taken, taken / "below"):
        with pytest.raises(OutputError) as caught:
            Recorder(output_dir)
        assert_one_line(caught.value, output_dir)
    assert taken.read_text() == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_where_a_file_should_be(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with Recorder(tmp_path) as recorder, pytest.raises(OutputError) as caught:
        recorder.record(estimate(0, np.eye(4)))
    assert_one_line(caught.value, tmp_path / name)


def test_a_directory_that_vanishes(tmp_path: Path) -> None:
    with Recorder(tmp_path / "out") as recorder:
        recorder.record(estimate(0, np.eye(4)))
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(OutputError, match="removed") as caught:
            recorder.record(estimate(1, np.eye(4)))
        assert_one_line(caught.value, tmp_path / "out")
        with pytest.raises(OutputError, match=r"summary.json: cannot write: No such file"):
            recorder.write_summary(SUMMARY)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("full", range(3))
def test_a_full_disk_takes_a_line_from_no_file_or_from_all(tmp_path: Path, full: int) -> None:
    (tmp_path / NAMES[full]).symlink_to("/dev/full")
    with Recorder(tmp_path) as recorder:
        with pytest.raises(OutputError, match="No space left on device") as caught:
            recorder.record(estimate(0, np.eye(4)))
        assert_one_line(caught.value, tmp_path / NAMES[full])
        assert recorder.num_poses == 0
    assert all((tmp_path / name).read_bytes() == b"" for name in NAMES if name != NAMES[full])


LIMITED = """
import resource, sys
from pathlib import Path
from test_recorder import drive, run_of
from vo.output import OutputError
from vo.recorder import Recorder
with Recorder(Path(sys.argv[1])) as recorder:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        for pose in run_of(drive(200)):
            recorder.record(pose)
    except OutputError as error:
        print(recorder.num_poses, error)
"""


def run_script(code: str, output_dir: Path) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", code, str(output_dir)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_fills_up_in_the_middle_of_a_line(tmp_path: Path) -> None:
    process = run_script(LIMITED, tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    num_poses, message = out.split(" ", 1)
    assert message.startswith(f"{tmp_path / 'trajectory_kitti.txt'}: cannot write: File too large")
    assert 10 < int(num_poses) < 100
    for name in NAMES[:2]:
        assert (tmp_path / name).stat().st_size < 5000, "the part of a line that was taken is given back"
        assert len(read_trajectory(tmp_path / name)) == int(num_poses)


KILLED = """
import itertools, sys
from pathlib import Path
import numpy as np
from test_recorder import estimate
from vo.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]))
for index in itertools.count():
    recorder.record(estimate(index, np.eye(4)))
    if index == 500:
        print("under way", flush=True)
"""


def test_a_run_that_is_killed_leaves_every_pose_so_far(tmp_path: Path) -> None:
    process = run_script(KILLED, tmp_path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "under way\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    tum, kitti = (read_trajectory(tmp_path / name) for name in NAMES[:2])
    assert len(tum) > 500 and 0 <= len(kitti) - len(tum) <= 1
    assert kitti.frame_indices is not None
    assert_array_equal(kitti.frame_indices, np.arange(len(kitti)))
    assert_array_equal(tum.timestamps_ns, START_NS + INTERVAL_NS * np.arange(len(tum)))
