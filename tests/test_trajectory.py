"""Trajectory files: round trips, the formats as others write and read them, and every fault by file and line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation
from trajectories import START_NS, disturbed, drive, rigid, timed

from vo.output import OutputError, prepare_directory, write_atomically
from vo.trajectory import (
    Trajectory,
    TrajectoryFormat,
    frames_path,
    normalized_rotations,
    read_body_camera,
    read_trajectory,
    recognised_format,
    tum_line,
    write_euroc,
    write_kitti,
    write_tum,
)
from vo.types import SourceError

TUM_POSE = "1.0 0 0 0 0 0 0 1"
KITTI_POSE = "1 0 0 0.5 0 1 0 0 0 0 1 0"
EUROC_POSE = "1403715275667140000,0.879387,2.141140,0.946982,0.061388,-0.828303,-0.058221,-0.553856"
T_BODY_CAMERA = rigid(Rotation.from_euler("zyx", [89.0, 1.0, -0.5], degrees=True).as_matrix(), np.array([0.1, -0.2, 0]))
SENSOR_YAML = """%YAML:1.0
sensor_type: camera
T_BS:
  cols: 4
  rows: 4
  data: [{}]
"""


def sensor_yaml(T: np.ndarray) -> str:
    return SENSOR_YAML.format(", ".join(map(repr, T.ravel().tolist())))


positions = st.lists(st.tuples(*[st.floats(-1e6, 1e6, allow_subnormal=False)] * 3), min_size=1, max_size=6)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    where = np.array(draw(positions))
    vectors = np.array([draw(st.tuples(*[st.floats(-3.0, 3.0)] * 3)) for _ in where])
    steps = draw(st.lists(st.integers(1, 10**10), min_size=len(where), max_size=len(where)))
    times = draw(st.integers(0, 2**62)) + np.cumsum(steps)
    poses = np.array([rigid(R, p) for R, p in zip(Rotation.from_rotvec(vectors).as_matrix(), where, strict=True)])
    indices = np.cumsum([1 + step % 3 for step in steps]).astype(np.int64) - 1
    return Trajectory(times.astype(np.int64), poses, frame_indices=indices)


@settings(deadline=None, max_examples=60)
@given(trajectory=trajectories())
def test_what_is_written_is_read(trajectory: Trajectory, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("round_trip")
    write_tum(trajectory, directory / "tum.txt")
    write_kitti(trajectory, directory / "kitti.txt")
    write_euroc(trajectory, directory / "euroc.csv", T_BODY_CAMERA)
    (directory / "sensor.yaml").write_text(sensor_yaml(T_BODY_CAMERA))
    tum, kitti = read_trajectory(directory / "tum.txt"), read_trajectory(directory / "kitti.txt")
    euroc = read_trajectory(directory / "euroc.csv", sensor=directory / "sensor.yaml")
    assert tum.has_times and euroc.has_times and not kitti.has_times
    assert tum.is_of_camera and euroc.is_of_camera
    assert_array_equal(tum.timestamps_ns, trajectory.timestamps_ns)
    assert_array_equal(euroc.timestamps_ns, trajectory.timestamps_ns)
    assert_array_equal(kitti.frame_indices, trajectory.frame_indices)
    for read in (tum, kitti):
        assert_array_equal(read.positions, trajectory.positions)
        assert_allclose(read.T_world_camera, trajectory.T_world_camera, rtol=0, atol=1e-14)
    assert_allclose(euroc.T_world_camera[:, :3, :3], trajectory.T_world_camera[:, :3, :3], rtol=0, atol=1e-14)
    assert_allclose(euroc.positions, trajectory.positions, rtol=1e-13, atol=1e-12)


def test_evo_reads_what_is_written(tmp_path: Path) -> None:
    from evo.core.trajectory import PosePath3D

    trajectory = timed(disturbed(drive(50)))
    write_tum(trajectory, tmp_path / "tum.txt")
    write_kitti(trajectory, tmp_path / "kitti.txt")
    # The columns as the TUM benchmark and the KITTI devkit define them, taken apart by NumPy alone.
    table = np.loadtxt(tmp_path / "tum.txt")
    path = PosePath3D(positions_xyz=table[:, 1:4], orientations_quat_wxyz=np.roll(table[:, 4:], 1, axis=1))
    assert_allclose(np.array(path.poses_se3), trajectory.T_world_camera, rtol=0, atol=1e-12)
    assert_allclose(table[:, 0], trajectory.timestamps_ns / 1e9, rtol=1e-15)
    matrices = np.loadtxt(tmp_path / "kitti.txt").reshape(-1, 3, 4)
    assert_array_equal(matrices, trajectory.T_world_camera[:, :3])


def test_times_are_exact_to_the_nanosecond(tmp_path: Path) -> None:
    assert tum_line(START_NS + 1, np.eye(4)).startswith("1403636579.763555585 ")
    assert tum_line(7, np.eye(4)).startswith("0.000000007 ")
    path = tmp_path / "tum.txt"
    path.write_text("1403636579.763555585 0 0 0 0 0 0 1\n1.403636580e9 0 0 0 0 0 0 1\n")
    assert_array_equal(read_trajectory(path).timestamps_ns, [START_NS + 1, 1_403_636_580_000_000_000])
    with pytest.raises(ValueError, match="timestamp_ns"):
        tum_line(-1, np.eye(4))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (TUM_POSE, TrajectoryFormat.TUM),
        (KITTI_POSE, TrajectoryFormat.KITTI),
        (EUROC_POSE, TrajectoryFormat.EUROC),
        (EUROC_POSE + ", 0.1, 0.2", TrajectoryFormat.EUROC),
        ("1.5,0,0,0,1,0,0,0", None),
        ("timestamp,x,y,z,w,x,y,z", None),
        ("1 2 3", None),
        (TUM_POSE.replace(" ", "\t"), TrajectoryFormat.TUM),
    ],
)
def test_formats_are_told_apart_by_content(line: str, expected: TrajectoryFormat | None) -> None:
    assert recognised_format(line) is expected


def test_comments_blank_lines_marks_and_carriage_returns_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "odd.dat"
    path.write_bytes(b"\xef\xbb\xbf# a comment\r\n\r\n" + TUM_POSE.encode() + b"\r\n  2.0 1 0 0  0 0 0 1 \r\n")
    assert_array_equal(read_trajectory(path).timestamps_ns, [10**9, 2 * 10**9])


FAULTS = [
    ("", r"bad.txt: holds no pose"),
    ("# only a comment\n", r"bad.txt: holds no pose"),
    ("1 2 3\n", r"bad.txt:1: not a pose"),
    (f"# c\n{TUM_POSE}\n2.0 0 0 0 0 0 1\n", r"bad.txt:3: 7 columns; expected 8"),
    (f"{TUM_POSE}\n2.0 0 nan 0 0 0 0 1\n", r"bad.txt:2: 'nan' is not a finite number"),
    (f"{TUM_POSE}\n2.0 0 inf 0 0 0 0 1\n", r"bad.txt:2: 'inf' is not a finite number"),
    (f"{TUM_POSE}\n2.0 0 1,5 0 0 0 0 1\n", r"bad.txt:2: '1,5' is not a finite number"),
    (f"{TUM_POSE}\n1.0 0 0 0 0 0 0 1\n", r"bad.txt:2: 1.0 does not rise"),
    (f"{TUM_POSE}\n0.5 0 0 0 0 0 0 1\n", r"bad.txt:2: 0.5 does not rise"),
    (f"nan{TUM_POSE[3:]}\n", r"bad.txt:1: 'nan' is not a time"),
    ("1403715275667140000 0 0 0 0 0 0 1\n", r"bad.txt:1: .* too large"),
    ("1.0 0 0 0 0 0 0 0\n", r"bad.txt:1: not a rotation"),
    ("1.0 0 0 0 0 0 0.5 0.5\n", r"bad.txt:1: not a rotation"),
    (f"{KITTI_POSE}\n2 0 0 0 0 2 0 0 0 0 2 0\n", r"bad.txt:2: not a rotation"),
    (f"{KITTI_POSE}\n1 0 0 0 0 1 0 0 0 0 -1 0\n", r"bad.txt:2: not a rotation"),
    (f"{KITTI_POSE}\n{TUM_POSE}\n", r"bad.txt:2: 8 columns; expected 12"),
    (f"{EUROC_POSE}\n{EUROC_POSE}\n", r"bad.txt:2: .* does not rise"),
    (f"{EUROC_POSE}\n{EUROC_POSE[:-10]}\n", r"bad.txt:2: 7 columns; expected 8"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS)
def test_every_fault_names_the_file_and_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        read_trajectory(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("binary", "missing", "."):
        with pytest.raises(SourceError, match=str(tmp_path)):
            read_trajectory(tmp_path / name)


def test_rotations_are_normalised(tmp_path: Path) -> None:
    truth = disturbed(drive(20), rotation_rad=0.5)
    quat = Rotation.from_matrix(truth[:, :3, :3]).as_quat() * np.linspace(0.97, 1.03, 20)[:, None]
    (tmp_path / "tum.txt").write_text("".join(f"{n}.0 0 0 0 {' '.join(map(str, q))}\n" for n, q in enumerate(quat)))
    assert_allclose(read_trajectory(tmp_path / "tum.txt").T_world_camera[:, :3, :3], truth[:, :3, :3], atol=1e-12)
    np.savetxt(tmp_path / "kitti.txt", truth[:, :3].reshape(-1, 12), fmt="%.4f")
    read = read_trajectory(tmp_path / "kitti.txt").T_world_camera[:, :3, :3]
    assert_allclose(read @ np.swapaxes(read, 1, 2), np.tile(np.eye(3), (20, 1, 1)), atol=1e-12)
    assert_allclose(read, truth[:, :3, :3], atol=2e-4)
    # The nearest rotation, against SciPy's solution of the same problem.
    noisy = truth[:, :3, :3] + np.random.default_rng(3).normal(0, 0.1, (20, 3, 3))
    expected = [Rotation.align_vectors(M.T, np.eye(3))[0].as_matrix() for M in noisy]
    assert_allclose(normalized_rotations(noisy), np.array(expected), atol=1e-9)


def test_kitti_times_from_where_they_lie(tmp_path: Path) -> None:
    poses, sequence = tmp_path / "poses", tmp_path / "sequences" / "07"
    poses.mkdir()
    sequence.mkdir(parents=True)
    path = poses / "07.txt"
    path.write_text(f"{KITTI_POSE}\n{KITTI_POSE}\n")
    without = read_trajectory(path)
    assert not without.has_times
    assert_array_equal(without.timestamps_ns, [0, 1])
    (sequence / "times.txt").write_text("0.0\n1.037359e-01\n2.07e-01\n")
    assert_array_equal(read_trajectory(path).timestamps_ns, [0, 103_735_900])
    (tmp_path / "other.txt").write_text("5.0\n6.0\n")
    assert_array_equal(read_trajectory(path, times=tmp_path / "other.txt").timestamps_ns, [5 * 10**9, 6 * 10**9])
    frames_path(path).write_text("0\n2\n")
    assert_array_equal(read_trajectory(path).timestamps_ns, [0, 207_000_000])
    with pytest.raises(SourceError, match=r"other.txt: 2 times, but .*07.txt has a pose for frame 2"):
        read_trajectory(path, times=tmp_path / "other.txt")
    (sequence / "times.txt").write_text("0.0\n0.2\n0.0\n")
    with pytest.raises(SourceError, match=r"times.txt: the time of frame 2 does not rise"):
        read_trajectory(path)


def test_frame_indices_of_a_kitti_file(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text(f"{KITTI_POSE}\n{KITTI_POSE}\n")
    assert frames_path(path) == tmp_path / "run_frames.txt"
    for text, expected in (("4\n9\n", [4, 9]), ("4\n9\n12\n", [4, 9])):  # one too many: killed between the two
        frames_path(path).write_text(text)
        assert_array_equal(read_trajectory(path).frame_indices, expected)
    for text, message in (
        ("4\n", "1 frame indices for the 2 poses"),
        ("4\n4\n", "frames.txt:2: 4 does not rise"),
        ("4\n-5\n", "frames.txt:2: '-5'"),
    ):
        frames_path(path).write_text(text)
        with pytest.raises(SourceError, match=message):
            read_trajectory(path)


def test_euroc_poses_of_the_body_become_poses_of_the_camera(tmp_path: Path) -> None:
    data = tmp_path / "mav0" / "state_groundtruth_estimate0" / "data.csv"
    data.parent.mkdir(parents=True)
    quat = Rotation.from_euler("z", 90, degrees=True).as_quat().tolist()
    data.write_text(f"#timestamp, p, q\n7,1.0,2.0,3.0,{quat[3]!r},{quat[0]!r},{quat[1]!r},{quat[2]!r}, 0.1, 0.2\n")
    body = read_trajectory(data)
    assert not body.is_of_camera
    assert_allclose(body.T_world_camera[0] @ [1, 0, 0, 1], [1, 3, 3, 1], atol=1e-12)
    sensor = tmp_path / "mav0" / "cam0" / "sensor.yaml"
    sensor.parent.mkdir()
    sensor.write_text(sensor_yaml(T_BODY_CAMERA))
    camera = read_trajectory(data)
    assert camera.is_of_camera
    assert_allclose(camera.T_world_camera, body.T_world_camera @ T_BODY_CAMERA, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sensor_type: camera\n", "T_BS: missing"),
        ("T_BS: {data: [1, 0, 0]}\n", "the 16 numbers"),
        (sensor_yaml(np.diag([1.0, 1.0, 1.0, 2.0])), "the 16 numbers"),
        (sensor_yaml(np.diag([2.0, 1.0, 1.0, 1.0])), "not a rotation"),
    ],
)
def test_faulty_sensor_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sensor.yaml").write_text(text)
    with pytest.raises(SourceError, match=rf"sensor.yaml: .*{message}"):
        read_body_camera(tmp_path / "sensor.yaml")


def test_a_trajectory_refuses_what_is_none() -> None:
    times, poses = np.arange(3, dtype=np.int64), drive(3)
    shear = poses.copy()
    shear[1, 0, 1] += 0.01
    lower = poses.copy()
    lower[1, 3, 0] = 1e-3
    for bad_times, bad_poses, indices in (
        (times[:2], poses, None),
        (times[::-1].copy(), poses, None),
        (times.astype(np.float64), poses, None),
        (times, poses.astype(np.float32), None),
        (times, np.full((3, 4, 4), np.nan), None),
        (times, shear, None),
        (times, lower, None),
        (times, -poses, None),
        (times, poses, times[:2]),
        (times[:0], poses[:0], None),
    ):
        with pytest.raises(ValueError, match="expected"):
            Trajectory(bad_times, bad_poses, frame_indices=indices)
    good = Trajectory(times, poses)
    assert len(good) == 3
    with pytest.raises(ValueError, match="read-only"):
        good.positions[0] = 1.0


def test_writers_need_times(tmp_path: Path) -> None:
    indexed = Trajectory(np.arange(2, dtype=np.int64), drive(2), has_times=False)
    for write in (write_tum, write_euroc):
        with pytest.raises(ValueError, match="times"):
            write(indexed, tmp_path / "x.txt")


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "first")
    write_atomically(path, b"second")
    assert path.read_text() == "second"
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken: cannot write"):
        write_atomically(tmp_path / "taken", "x")
    with pytest.raises(OutputError, match="gone"):
        write_atomically(tmp_path / "gone" / "x", "x")
    with pytest.raises(OutputError, match=r"summary.json: cannot write"):
        prepare_directory(path)
    with pytest.raises(OutputError, match=r"summary.json"):
        prepare_directory(path / "below")
    assert sorted(os.listdir(tmp_path)) == ["summary.json", "taken"]  # nothing unfinished is left behind


DATA = os.environ.get("LIGHTVO_DATA")


@pytest.mark.skipif(DATA is None, reason="LIGHTVO_DATA is not set")
def test_real_ground_truth_files() -> None:
    data = Path(str(DATA))
    kitti = read_trajectory(data / "kitti/poses/00.txt")
    assert len(kitti) == 200 and kitti.has_times and kitti.timestamps_ns[1] == 103_735_900
    assert np.linalg.norm(np.diff(kitti.positions, axis=0), axis=1).sum() == pytest.approx(144.9, abs=0.1)
    tum = read_trajectory(data / "tum/rgbd_7scenes_head/groundtruth.txt")
    assert len(tum) == 500 and tum.timestamps_ns[1] == 1_000_033_333_000
    euroc = read_trajectory(data / "euroc/V1_01_head/mav0/state_groundtruth_estimate0/data.csv")
    assert euroc.is_of_camera and euroc.timestamps_ns[0] == 1_403_715_275_667_140_000
    # The camera of this vehicle looks ahead along the body's z axis, a few cm from the body's origin.
    body = np.array([0.879387, 2.141140, 0.946982])
    assert np.linalg.norm(euroc.positions[0] - body) == pytest.approx(
        np.linalg.norm([0.02164, 0.06468, 0.00981]), abs=1e-4
    )
