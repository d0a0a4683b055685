"""The mapping example: frames that hang on keyframes, the volume, and the mesh against that of true poses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_messages import CAMERA, PERIOD_NS, T_on_arc, a_map_update, a_pose

from vo.config import PublisherConfig
from vo.geometry import exp_se3, make_pose, transform
from vo.message_stream import MessageStream
from vo.message_types import KeyframeUpdate
from vo.publisher import Publisher
from vo.trajectory import Trajectory, write_tum
from vo.types import TrackingStatus
from vo.view_command import ViewerError, check_libraries

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))
from map_poses import PoseGraph, moved  # noqa: E402


def needs_open3d() -> None:
    try:
        check_libraries()
    except ViewerError as error:
        pytest.skip(str(error))


def map_rgbd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/map_rgbd.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
    )


def a_keyframe(index: int) -> object:
    return replace(a_pose(index), is_keyframe=True)


def a_correction(indices: list[int], poses: list[np.ndarray], segment_id: int = 0) -> KeyframeUpdate:
    times = np.array(indices) * 1000
    return KeyframeUpdate(9, 9000, segment_id, "depth", np.array(indices), times, np.stack(poses))


# --- poses ---


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(["keyframe", "frame", "lost"]), min_size=1, max_size=30), st.integers(0, 1000))
def test_frames_move_rigidly_with_their_keyframe(kinds, seed):
    random = np.random.default_rng(seed)
    graph, keyframe_of, newest = PoseGraph(), {}, None
    for index, kind in enumerate(kinds):
        if kind == "lost":
            graph.add(a_pose(index, TrackingStatus.LOST))
            continue
        newest = index if kind == "keyframe" or newest is None else newest
        graph.add(replace(a_pose(index), is_keyframe=kind == "keyframe"))
        keyframe_of[index] = newest
        np.testing.assert_allclose(graph.pose(index), T_on_arc(index), atol=1e-12)
    corrections = {keyframe: exp_se3(random.normal(size=6)) for keyframe in set(keyframe_of.values())}
    for keyframe, change in corrections.items():
        graph.correct(a_correction([keyframe], [change @ T_on_arc(keyframe)]))
    for index in range(len(kinds)):
        if index not in keyframe_of:
            assert graph.pose(index) is None
            continue
        np.testing.assert_allclose(graph.pose(index), corrections[keyframe_of[index]] @ T_on_arc(index), atol=1e-9)


def test_a_frame_is_settled_when_enough_keyframes_have_followed():
    graph = PoseGraph()
    for index in (0, 1, 2, 3):
        graph.add(replace(a_pose(index), is_keyframe=index != 1))
    assert [graph.is_settled(index, 2) for index in range(5)] == [True, True, False, False, False]


def test_a_new_segment_forgets_the_last_one():
    graph = PoseGraph()
    graph.add(a_keyframe(0))
    graph.add(replace(a_pose(5, segment_id=1), is_keyframe=True))
    graph.correct(a_correction([0], [np.eye(4)]))
    assert graph.frame_indices().tolist() == [5] and graph.segment_id == 1


def test_a_shift_is_that_of_the_surface():
    T = T_on_arc(10)
    assert moved(T, T @ make_pose(np.eye(3), np.array([0.02, 0, 0])), 2.0) == pytest.approx(0.02)
    turned = T @ exp_se3(np.array([0, 0, 0, 0, 0.01, 0]))
    point = np.array([[0.0, 0, 2]])
    truth = np.linalg.norm(transform(turned, point) - transform(T, point))
    assert moved(T, turned, 2.0) == pytest.approx(truth, rel=1e-3)


# --- a wall ---


def write_wall(directory: Path, num_frames: int = 6, depth_m: float = 2.0) -> Trajectory:
    """A red wall, green on its right half, seen by a camera that moves along it: a TUM sequence."""
    (directory / "rgb").mkdir(parents=True)
    (directory / "depth").mkdir()
    times = 1_000_000_000 + np.arange(num_frames) * 100_000_000
    poses = np.array([make_pose(np.eye(3), np.array([0.05 * index, 0, 0])) for index in range(num_frames)])
    image = np.zeros((120, 160, 3), np.uint8)
    names = []
    for index in range(num_frames):
        edge = round(80 - 0.05 * index * 100 / depth_m)
        image[:, :edge], image[:, edge:] = (0, 0, 200), (0, 200, 0)
        cv2.imwrite(str(directory / "rgb" / f"{index}.png"), image)
        depth = np.full((120, 160), round(depth_m * 5000), np.uint16)
        cv2.imwrite(str(directory / "depth" / f"{index}.png"), depth)
        names.append(f"{times[index] / 1e9:.6f}")
    for kind in ("rgb", "depth"):
        lines = [f"{name} {kind}/{index}.png\n" for index, name in enumerate(names)]
        (directory / f"{kind}.txt").write_text("".join(lines))
    (directory / "camera.yaml").write_text(
        "model: pinhole\nwidth: 160\nheight: 120\nfx: 100.0\nfy: 100.0\ncx: 79.5\ncy: 59.5\n"
        "distortion: []\ndepth_scale: 5000.0\n"
    )
    trajectory = Trajectory(times, poses)
    write_tum(trajectory, directory / "groundtruth.txt")
    return trajectory


def test_a_wall_becomes_a_flat_mesh_in_its_colours(tmp_path):
    needs_open3d()
    write_wall(tmp_path / "wall")
    mesh_file = tmp_path / "mesh.ply"
    poses = str(tmp_path / "wall" / "groundtruth.txt")
    result = map_rgbd(
        f"tum:{tmp_path / 'wall'}", "-o", str(mesh_file), "--trajectory", poses, "--truth", poses, "--voxel-m", "0.02"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["frames_fused"] == 6 and report["distance_p95_m"] < 1e-4
    vertices, colors = read_ply(mesh_file)
    assert len(vertices) == report["vertices"] > 1000
    np.testing.assert_allclose(vertices[:, 2], 2.0, atol=2e-3)
    is_left, is_right = vertices[:, 0] < -0.1, vertices[:, 0] > 0.1
    red, green = (colors[:, 0] > 180) & (colors[:, 1] < 20), (colors[:, 1] > 180) & (colors[:, 0] < 20)
    assert red[is_left].mean() > 0.95 and green[is_right].mean() > 0.95  # some of the border is mixed


def started(*arguments):
    """The mapping program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "tools/map_rgbd.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("settled_after", "num_rebuilt"), [("12", 0), ("0", 1)])
def test_a_mesh_follows_keyframes_that_are_corrected_later(tmp_path, settled_after, num_rebuilt):
    """The poses are 10 cm off from the third frame on when they come; the keyframes are put right seconds later."""
    needs_open3d()
    trajectory = write_wall(tmp_path / "wall")
    stream = MessageStream(CAMERA, heartbeat_hz=20.0)
    with Publisher(PublisherConfig(endpoint="tcp://127.0.0.1:*", linger_ms=20_000), stream) as publisher:
        arguments = ("-o", str(tmp_path / "mesh.ply"), "--endpoint", publisher.endpoint, "--voxel-m", "0.02")
        program = started(f"tum:{tmp_path / 'wall'}", *arguments, "--settled-after", settled_after)
        program.stderr.readline()
        for index, T in enumerate(trajectory.T_world_camera):
            seen = T.copy()
            seen[2, 3] += 0.1 * (index >= 2)
            pose = replace(a_pose(index), T_world_camera=seen, is_keyframe=index % 2 == 0, scale_source="depth")
            stream.publish_pose(pose)
        time.sleep(3.0)
        update = a_map_update(4)
        stream.publish_map(
            replace(
                update,
                scale_source="depth",
                keyframe_indices=np.array([2, 4]),
                keyframe_timestamps_ns=np.array([2, 4]) * PERIOD_NS,
                T_world_keyframes=trajectory.T_world_camera[[2, 4]].copy(),
            )
        )
        stream.finish()
        output, errors = program.communicate(timeout=100)
    assert program.returncode == 0, errors
    report = json.loads(output)
    assert (report["frames_fused"], report["rebuilt"]) == (6, num_rebuilt)
    vertices, _ = read_ply(tmp_path / "mesh.ply")
    np.testing.assert_allclose(vertices[:, 2], 2.0, atol=5e-3)


def test_wrong_poses_are_found_out(tmp_path):
    needs_open3d()
    trajectory = write_wall(tmp_path / "wall")
    poses = trajectory.T_world_camera.copy()
    poses[3:, 2, 3] += 0.1
    write_tum(Trajectory(trajectory.timestamps_ns, poses), tmp_path / "wrong.txt")
    truth = str(tmp_path / "wall" / "groundtruth.txt")
    arguments = ("--trajectory", str(tmp_path / "wrong.txt"), "--truth", truth, "--voxel-m", "0.02")
    result = map_rgbd(f"tum:{tmp_path / 'wall'}", "-o", str(tmp_path / "mesh.ply"), *arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["distance_p95_m"] > 0.03


def test_what_cannot_be_mapped_is_one_line(tmp_path):
    needs_open3d()
    write_wall(tmp_path / "wall")
    for trajectory, message in ((str(tmp_path / "nowhere.txt"), "nowhere.txt"), (write_later(tmp_path), "no frame")):
        result = map_rgbd(f"tum:{tmp_path / 'wall'}", "-o", str(tmp_path / "a.ply"), "--trajectory", trajectory)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def write_later(directory: Path) -> str:
    """Poses of another day."""
    path = directory / "later.txt"
    write_tum(Trajectory(np.array([10**18]), np.eye(4)[None]), path)
    return str(path)


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N, 3) and colours (N, 3) of a binary PLY file, read by its header and nothing else."""
    data = path.read_bytes()
    end = data.index(b"end_header\n") + len(b"end_header\n")
    types = {"float": "<f4", "double": "<f8", "uchar": "|u1", "int": "<i4", "uint": "<u4"}
    fields, number = [], 0
    for line in data[:end].decode().splitlines():
        words = line.split()
        if words[:2] == ["element", "vertex"]:
            number = int(words[2])
        elif words[:2] == ["element", "face"]:
            break
        elif words[0] == "property":
            fields.append((words[2], types[words[1]]))
    vertices = np.frombuffer(data, np.dtype(fields), number, end)
    positions = np.stack([vertices[name] for name in "xyz"], 1)
    return positions, np.stack([vertices[name] for name in ("red", "green", "blue")], 1)


# --- the real thing ---


@pytest.mark.slow
def test_the_kitchen_is_mapped_with_metric_odometry(tmp_path, free_port):
    """First 150 frames of 7-Scenes, every fifth fused; the distance of vertices to the mesh from true poses."""
    needs_open3d()
    source = Path(os.environ.get("LIGHTVO_DATA", "")) / "tum" / "rgbd_7scenes_head"
    if "LIGHTVO_DATA" not in os.environ or not source.is_dir():
        pytest.skip("needs LIGHTVO_DATA with tum/rgbd_7scenes_head")
    orb = ("--set", "frontend.extractor.name=orb", "--set", "frontend.matcher.name=nearest")
    scale = ("--set", "odometry.scale.name=depth")
    endpoint = f"tcp://127.0.0.1:{free_port}"
    mapping = started(
        *(f"tum:{source}", "-o", str(tmp_path / "mesh.ply")),
        *("--endpoint", endpoint, "--truth", str(source / "groundtruth.txt")),
        *("--max-frames", "150", "--stride", "5", "--voxel-m", "0.02"),
    )
    try:
        mapping.stderr.readline()
        run = subprocess.run(
            [
                *(sys.executable, "-m", "vo", "run", f"tum:{source}", "--config", "tum", "--max-frames", "150"),
                *("--publish", endpoint, "--set", "publisher.linger_ms=20000", *orb, *scale),
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert run.returncode == 0, run.stderr
        output, errors = mapping.communicate(timeout=200)
    finally:
        mapping.kill()
        mapping.wait()
    assert mapping.returncode == 0, errors
    report = json.loads(output)
    # The first map asks for its whole parallax, which is there after about thirty frames.
    assert report["frames_fused"] >= 24
    assert report["distance_median_m"] < 0.02
    assert report["distance_p95_m"] < 0.05
