"""Results of runs that never end: thinned-out paths, refined poses that go to the disk meanwhile, disks that refuse."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.geometry import exp_se3
from vo.map_store import MapStore
from vo.message_types import PointsUpdate
from vo.odometry_step import OdometryStep
from vo.output import OutputError
from vo.path_sketch import PathSketch
from vo.refined import REFINED_NAME, RefinedFile, RefinedTrajectory
from vo.run_results import RunResults
from vo.stages import Captured, FrameResult
from vo.trajectory import read_trajectory
from vo.types import FloatArray, Frame, FrameTracks, MapUpdate, PoseEstimate, TrackingStatus


def pose_at(index: int) -> FloatArray:
    T = exp_se3(np.array([0.3 * index, 0.1 * np.sin(index), 0.2, 0.0, 0.01 * index % 0.5, 0.1]))
    return cast(FloatArray, T)


def estimate(index: int, *, is_keyframe: bool = False, is_lost: bool = False) -> PoseEstimate:
    T = None if is_lost else pose_at(index)
    status = TrackingStatus.LOST if is_lost else TrackingStatus.TRACKING
    return PoseEstimate(index, 10 * index + 1, T, status, is_keyframe=is_keyframe)


def correction(indices: list[int], shift: float) -> MapUpdate:
    poses = np.array([pose_at(index) for index in indices])
    poses[:, 0, 3] += shift
    none = np.zeros(0, np.int64)
    return MapUpdate(
        frame_index=indices[-1],
        timestamp_ns=indices[-1],
        segment_id=0,
        scale_source="relative",
        keyframe_indices=np.array(indices),
        keyframe_timestamps_ns=np.array(indices),
        T_world_keyframes=poses,
        landmark_ids=none,
        landmarks=np.zeros((0, 3)),
        landmark_colors=np.zeros((0, 3), np.uint8),
        removed_landmark_ids=none,
    )


def result_at(index: int) -> FrameResult:
    return cast(FrameResult, SimpleNamespace(step=SimpleNamespace(pose=estimate(index), map_update=None)))


@pytest.mark.parametrize("num_poses", [9, 30])
def test_what_the_plot_needs_is_loaded_while_the_run_goes_on(
    tmp_path: Path, num_poses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and not before the run has begun well; what comes at the end waits for it."""
    begun: list[threading.Thread] = []
    release = threading.Event()

    def load() -> threading.Thread:
        begun.append(threading.Thread(target=release.wait))
        begun[-1].start()
        return begun[-1]

    def report() -> None:
        assert all(not thread.is_alive() for thread in begun)

    monkeypatch.setattr("vo.run_results.load_ahead", load)
    with RunResults(tmp_path, outlives_disk=False, is_evaluated=False, say=print) as results:
        for index in range(num_poses):
            results.add(result_at(index))
        assert len(begun) == (1 if num_poses > 9 else 0)
        threading.Timer(0.05, release.set).start()
        results.finish(report)


def test_without_a_directory_no_plot_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vo.run_results.load_ahead", lambda: pytest.fail("there will be no plot"))
    with RunResults(None, outlives_disk=False, is_evaluated=False, say=print) as results:
        for index in range(20):
            results.add(result_at(index))


def test_plots_loaded_ahead_are_there() -> None:
    code = "import sys; from vo.plots import load_ahead; load_ahead().join(); print('matplotlib.figure' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "True\n"


def test_refined_poses_that_went_to_the_disk_early_are_the_same(tmp_path: Path) -> None:
    """Keyframes every 5 frames; corrections reach the last 3, as a window's do. Memory holds 16 keyframes at most."""
    whole, file = RefinedTrajectory(), RefinedFile(tmp_path, max_open_keyframes=16)
    keyframes: list[int] = []
    for index in range(1000):
        pose = estimate(index, is_keyframe=index % 5 == 0, is_lost=index % 97 in (40, 41))
        for sink in (whole, file):
            sink.add(pose)
        assert (tmp_path / f".{REFINED_NAME}.unfinished").exists(), "open from the first pose on, not after hours"
        if pose.is_keyframe and pose.T_world_camera is not None:
            keyframes.append(index)
            for sink in (whole, file):
                sink.correct(correction(keyframes[-3:], 0.01 * index))
        assert file.trajectory.num_open_keyframes <= 17
        assert len(file.trajectory) <= 17 * 5
    assert not (tmp_path / REFINED_NAME).exists(), "what is not finished does not look like a result"
    file.finish()
    file.close()
    written = read_trajectory(tmp_path / REFINED_NAME)
    assert written.timestamps_ns.tolist() == [10 * i + 1 for i in range(1000) if i % 97 not in (40, 41)]
    np.testing.assert_allclose(written.T_world_camera, whole.poses(), atol=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == [REFINED_NAME]


def test_a_run_that_fails_leaves_no_unfinished_file_and_no_older_result_is_lost(tmp_path: Path) -> None:
    (tmp_path / REFINED_NAME).write_text("1.0 0 0 0 0 0 0 1\n")
    file = RefinedFile(tmp_path, max_open_keyframes=2)
    for index in range(20):
        file.add(estimate(index, is_keyframe=True))
    file.close()
    assert (tmp_path / REFINED_NAME).read_text() == "1.0 0 0 0 0 0 0 1\n"
    assert len(list(tmp_path.iterdir())) == 1


@given(st.lists(st.booleans(), max_size=200), st.integers(2, 9))
@settings(deadline=None)
def test_a_sketch_of_a_path_is_part_of_it(has_pose: list[bool], capacity: int) -> None:
    """Every row kept was added, evenly spaced; a break lies between two rows just where the path was interrupted."""
    sketch = PathSketch(capacity)
    added: list[int] = []
    for index, is_posed in enumerate(has_pose):
        if is_posed:
            sketch.add(index, np.eye(4))
            added.append(index)
        else:
            sketch.interrupt()
    trajectory = sketch.trajectory()
    if not added:
        assert trajectory is None
        return
    assert trajectory is not None
    kept = trajectory.timestamps_ns.tolist()
    stride = -(-len(added) // len(kept))
    assert kept == added[:: added.index(kept[1]) if len(kept) > 1 else stride][: len(kept)]
    assert (len(added) <= capacity and kept == added) or capacity / 2 <= len(kept) <= capacity
    for row, (before, after) in enumerate(itertools.pairwise(kept), start=1):
        assert (row in sketch.breaks) == (not all(has_pose[before:after]))


def test_empty_segments_of_a_map_are_forgotten() -> None:
    """A camera that is lost every minute for a day begins a thousand segments, whose landmarks all prove wrong."""
    store = MapStore(100)
    ids, none = np.arange(3), np.zeros(0, np.int64)
    for segment in range(1000):
        fields: dict[str, Any] = {
            "segment_id": segment,
            "frame_index": 0,
            "timestamp_ns": 0,
            "scale_source": "relative",
        }
        points, colors = np.zeros((3, 3)), np.zeros((3, 3), np.uint8)
        store.apply(
            PointsUpdate(
                **fields, landmark_ids=ids, landmarks=points, landmark_colors=colors, removed_landmark_ids=none
            )
        )
        store.apply(
            PointsUpdate(
                **fields,
                landmark_ids=none,
                landmarks=points[:0],
                landmark_colors=colors[:0],
                removed_landmark_ids=ids,
            )
        )
    assert len(store._segments) == 1


def result(index: int) -> FrameResult:
    none = np.zeros(0, np.int64)
    tracks = FrameTracks(
        index, 10 * index + 1, none, np.zeros((0, 2), np.float32), np.zeros(0, np.int32), np.zeros(0, np.bool_)
    )
    captured = Captured(cast(Frame, None), 0)
    return FrameResult(captured, cast(Any, None), OdometryStep(estimate(index, is_keyframe=True), tracks))


def test_a_camera_goes_on_without_its_output_directory(tmp_path: Path) -> None:
    """Said once; the poses until then were on the disk; the run can still say what it amounts to."""
    said: list[str] = []
    reported: list[bool] = []
    output = tmp_path / "out"
    with RunResults(output, outlives_disk=True, is_evaluated=False, say=said.append) as results:
        results.add(result(0))
        shutil.rmtree(output)
        for index in range(1, 5):
            results.add(result(index))
        results.finish(lambda: reported.append(True))
    assert reported == [True]
    assert results.failure is not None
    assert len(said) == 1 and "the run goes on" in said[0] and str(output) in said[0]


def test_a_file_does_not(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with RunResults(output, outlives_disk=False, is_evaluated=False, say=lambda text: None) as results:
        results.add(result(0))
        shutil.rmtree(output)
        with pytest.raises(OutputError, match="removed while the run went on"):
            results.add(result(1))


def test_a_summary_that_cannot_be_written_is_an_error_of_its_own(tmp_path: Path) -> None:
    def report() -> None:
        raise OutputError("summary.json: cannot write")

    with (
        RunResults(tmp_path, outlives_disk=True, is_evaluated=False, say=lambda text: None) as results,
        pytest.raises(OutputError, match=r"summary\.json"),
    ):
        results.finish(report)
