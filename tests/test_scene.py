"""What the viewer shows, without Open3D: chunks, views, the truth, a run."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_messages import CAMERA, LANDMARK_COLOR, PERIOD_NS, T_on_arc, a_map_update, a_pose, message_of, some_tracks

from vo.geometry import exp_se3, exp_so3, make_pose, project, transform
from vo.message_stream import keyframe_updates, points_updates
from vo.scene import POINTS_PER_CHUNK, SEGMENTS_PER_CHUNK, STATUS_COLORS, Chunk, Layer, Scene
from vo.scene_live import Link, LiveScene
from vo.scene_truth import TruthAligner, align
from vo.scene_view import FIELD_OF_VIEW_DEG, KEYS, Eye, ViewState, approach, camera_matrix, follow_gaze, overview_gaze
from vo.trajectory import Trajectory
from vo.types import TrackingStatus


def drawn(scene: Scene) -> dict[str, Chunk]:
    """All chunks that are handed out now, by name."""
    chunks = {}
    while (chunk := scene.next_change()) is not None:
        chunks[chunk.name] = chunk
    return chunks


def update(scene: Scene, ids: list[int], points: np.ndarray, removed: tuple[int, ...] = (), **more: bool) -> None:
    colors = np.tile(np.array([[10, 20, 30]], np.uint8), (len(ids), 1))
    scene.update_landmarks(0, np.array(ids, np.int64), points, colors, np.array(removed, np.int64), **more)


# --- the scene ---


def test_the_path_has_the_colour_of_its_status_and_a_gap_that_of_being_lost():
    scene = Scene()
    statuses = [
        TrackingStatus.INITIALIZING,
        TrackingStatus.INITIALIZING,
        TrackingStatus.TRACKING,
        TrackingStatus.LOST,
        TrackingStatus.RELOCALIZED,
        TrackingStatus.TRACKING,
    ]
    for index, status in enumerate(statuses):
        scene.add_pose(a_pose(index, status))
    chunk = drawn(scene)["trajectory/0"]
    expected = [TrackingStatus.INITIALIZING, TrackingStatus.TRACKING, TrackingStatus.LOST, TrackingStatus.TRACKING]
    np.testing.assert_allclose(chunk.colors, [STATUS_COLORS[status] for status in expected], rtol=1e-6)
    ends = chunk.points[chunk.lines]
    np.testing.assert_allclose(ends[:, 0], [T_on_arc(i)[:3, 3] for i in (0, 1, 2, 4)], atol=1e-6)
    np.testing.assert_allclose(ends[:, 1], [T_on_arc(i)[:3, 3] for i in (1, 2, 4, 5)], atol=1e-6)


def test_a_frame_changes_only_the_end_of_a_long_path():
    scene = Scene()
    for index in range(1000):
        scene.add_pose(a_pose(index))
    assert len([name for name in drawn(scene) if name.startswith("trajectory")]) == -(-999 // SEGMENTS_PER_CHUNK)
    scene.add_pose(a_pose(1000))
    assert list(drawn(scene)) == [f"trajectory/{999 // SEGMENTS_PER_CHUNK}"]


def test_a_camera_that_stands_still_draws_no_line_without_length():
    """Open3D crashes on a set of lines that all have no length."""
    scene = Scene()
    for index in range(5):
        scene.add_pose(replace(a_pose(index), T_world_camera=T_on_arc(0)))
    assert not [name for name in drawn(scene) if name.startswith("trajectory")]
    assert scene.num_poses == 5


def test_a_correction_touches_only_the_chunks_of_its_points():
    scene = Scene()
    points = np.random.default_rng(0).normal(size=(10 * POINTS_PER_CHUNK, 3))
    update(scene, list(range(len(points))), points)
    assert len(drawn(scene)) == 10
    moved = np.array([[7.0, 8, 9], [1, 2, 3]])
    update(scene, [5, 4 * POINTS_PER_CHUNK + 1], moved, removed=(6,))
    chunks = drawn(scene)
    assert set(chunks) == {"landmarks/0", "landmarks/4"}
    np.testing.assert_allclose(chunks["landmarks/0"].points[5], moved[0])
    np.testing.assert_allclose(chunks["landmarks/0"].points[6], points[7], rtol=1e-6)
    np.testing.assert_allclose(chunks["landmarks/4"].points[1], moved[1])
    assert scene.num_landmarks == len(points) - 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.lists(st.integers(0, 40), unique=True), st.lists(st.integers(0, 40), unique=True))))
def test_landmarks_are_those_of_a_plain_dictionary(steps):
    scene, expected, shown, value = Scene(), {}, {}, 0.0
    for ids, removed in steps:
        ids = sorted(set(ids) - set(removed))
        value += 1.0
        points = np.stack([np.full(len(ids), value), np.array(ids, float), np.zeros(len(ids))], 1)
        for landmark_id in removed:
            expected.pop(landmark_id, None)
        expected.update({landmark_id: tuple(point) for landmark_id, point in zip(ids, points.tolist(), strict=True)})
        update(scene, ids, points, removed=tuple(removed))
        shown.update(drawn(scene))
    points = [tuple(point) for chunk in shown.values() for point in chunk.points.tolist()]
    assert sorted(points) == sorted(expected.values())
    assert scene.num_landmarks == len(expected)


def test_a_snapshot_replaces_the_map():
    scene = Scene()
    update(scene, [1, 2], np.zeros((2, 3)))
    scene.update_keyframes(0, np.array([1, 2]), np.stack([T_on_arc(1), T_on_arc(2)]))
    drawn(scene)
    update(scene, [9], np.ones((1, 3)), is_reset=True)
    scene.update_keyframes(0, np.array([7]), T_on_arc(7)[None], is_reset=True)
    chunks = drawn(scene)
    np.testing.assert_allclose(chunks["landmarks/0"].points, [[1, 1, 1]])
    assert len(chunks["keyframes/0"].lines) == 8
    assert (scene.num_landmarks, scene.num_keyframes) == (1, 1)


def test_a_keyframe_is_the_pyramid_that_its_image_spans():
    scene = Scene()
    scene.set_camera(CAMERA)
    scene.update_keyframes(0, np.array([30]), T_on_arc(30)[None])
    chunk = drawn(scene)["keyframes/0"]
    np.testing.assert_allclose(chunk.points[0], T_on_arc(30)[:3, 3], atol=1e-6)
    corners = transform(np.linalg.inv(T_on_arc(30)), chunk.points[1:].astype(np.float64))
    pixels = project(corners, CAMERA)
    np.testing.assert_allclose(pixels, [[-0.5, -0.5], [639.5, -0.5], [639.5, 479.5], [-0.5, 479.5]], atol=1e-2)


def test_a_moved_keyframe_moves_its_pyramid():
    scene = Scene()
    scene.update_keyframes(0, np.arange(100), np.stack([T_on_arc(index) for index in range(100)]))
    assert len(drawn(scene)) == 4
    scene.update_keyframes(0, np.array([70]), T_on_arc(0)[None])
    chunks = drawn(scene)
    assert list(chunks) == ["keyframes/2"]
    np.testing.assert_allclose(chunks["keyframes/2"].points[5 * (70 - 64)], [0, 0, 0], atol=1e-6)


def test_a_new_segment_begins_with_an_empty_scene():
    scene = Scene()
    scene.add_pose(a_pose(0))
    update(scene, [1], np.zeros((1, 3)))
    generation = scene.generation
    scene.add_pose(a_pose(5, segment_id=1))
    scene.add_pose(a_pose(3))
    assert scene.generation == generation + 1
    assert (scene.num_poses, scene.num_landmarks, scene.segment_id) == (1, 0, 1)


def test_symbols_follow_the_depth_of_the_scene():
    scene = Scene()
    scene.add_pose(replace(a_pose(0), T_world_camera=np.eye(4)))
    near = drawn(scene)["camera/0"].points
    update(scene, list(range(50)), np.tile([0.0, 0, 20], (50, 1)))
    np.testing.assert_allclose(drawn(scene)["camera/0"].points, 20 * near, rtol=1e-5)


# --- views ---


def test_every_key_does_what_the_legend_says():
    view = ViewState()
    for letter, layer in zip("TKLCG", Layer, strict=True):
        assert view.press(letter) and layer in view.hidden
        assert view.press(letter) and layer not in view.hidden
    assert view.press("F") and view.eye is Eye.FREE
    assert view.press("F") and view.eye is Eye.FOLLOW
    assert view.press("O") and view.eye is Eye.OVERVIEW
    size = view.point_size
    assert view.press("+") and view.point_size > size
    for _ in range(20):
        assert view.press("-")
    assert view.point_size == 1.0
    assert view.press("I") and not view.shows_image
    assert view.press("H") and not view.shows_help
    assert view.press("S") and view.wants_picture
    assert view.press("Q") and view.wants_quit
    assert not view.press("Z")
    assert {letter for keys, _ in KEYS for letter in keys.split()} == set("TKLCGIFO+-SHQ")


def test_following_sees_the_camera_and_what_it_sees():
    T = T_on_arc(40)
    gaze = follow_gaze(T, depth=3.0)
    K, T_eye_world = camera_matrix(gaze, 800, 600)
    points = transform(T_eye_world, np.stack([T[:3, 3], (T @ [0, 0, 3, 1])[:3]]))
    assert np.all((points[:, 2] > gaze.near) & (points[:, 2] < gaze.far))
    pixels = (points / points[:, 2:]) @ K.T
    assert np.all((pixels[:, :2] > 0) & (pixels[:, :2] < [800, 600]))
    assert abs(pixels[0, 0] - 399.5) < 1e-6  # straight behind it


@pytest.mark.parametrize("aspect", (0.5, 1.0, 2.0))
def test_the_overview_has_everything_in_view(aspect):
    low, high = np.array([-3.0, -1, 0]), np.array([12.0, 2, 30])
    width, height = round(600 * aspect), 600
    gaze = overview_gaze(low, high, aspect)
    K, T_eye_world = camera_matrix(gaze, width, height)
    corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
    seen = transform(T_eye_world, corners)
    pixels = (seen / seen[:, 2:]) @ K.T
    assert np.all(seen[:, 2] > gaze.near) and np.all(seen[:, 2] < gaze.far)
    assert np.all((pixels[:, :2] >= -0.05 * height) & (pixels[:, :2] <= [1.05 * width, 1.05 * height]))
    assert K[1, 1] == pytest.approx(300 / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG / 2)))


def test_the_eye_arrives_gently_and_whatever_the_frame_rate():
    start, goal = follow_gaze(np.eye(4), 1.0), follow_gaze(make_pose(np.eye(3), np.array([5.0, 0, 0])), 1.0)
    coarse, _ = approach(start, goal, 0.2)
    fine = start
    for _ in range(20):
        fine, _ = approach(fine, goal, 0.01)
    np.testing.assert_allclose(fine.eye, coarse.eye, atol=1e-9)
    assert 0 < coarse.eye[0] - start.eye[0] < 5
    end, is_there = approach(start, goal, 60.0)
    assert is_there
    np.testing.assert_allclose(end.eye, goal.eye, atol=1e-6)


# --- the truth ---


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_alignment_finds_a_known_similarity(seed):
    random = np.random.default_rng(seed)
    truth = np.array([T_on_arc(index) @ exp_se3(random.normal(size=6) * 0.1) for index in range(40)])
    R, scale, t = exp_so3(random.normal(size=3)), float(random.uniform(0.2, 5)), random.normal(size=3)
    estimate = np.array([make_pose(R @ T[:3, :3], scale * R @ T[:3, 3] + t) for T in truth])
    found = align(estimate, truth, has_scale=True)
    np.testing.assert_allclose(found.T_world_truth, make_pose(scale * R, t), atol=1e-8)
    assert found.kind == "Sim(3)" and found.scale == pytest.approx(scale) and found.rmse < 1e-9


def test_a_straight_path_takes_its_rotation_from_the_orientations():
    truth = np.array([make_pose(np.eye(3), np.array([0, 0, 0.1 * index])) for index in range(30)])
    R = exp_so3(np.array([0.3, -0.2, 0.9]))
    estimate = np.array([make_pose(R, 2 * R @ T[:3, 3]) for T in truth])
    np.testing.assert_allclose(align(estimate, truth, has_scale=True).T_world_truth[:3, :3], 2 * R, atol=1e-9)


def test_metric_poses_are_not_scaled():
    truth = np.array([T_on_arc(index) for index in range(40)])
    estimate = truth.copy()
    estimate[:, :3, 3] *= 1.5
    found = align(estimate, truth, has_scale=False)
    assert found.kind == "SE(3)" and np.linalg.det(found.T_world_truth[:3, :3]) == pytest.approx(1.0)
    assert "scale" not in found.text and found.rmse > 0.1


def test_the_truth_is_paired_by_time_and_laid_on_the_first_pose_at_first():
    times = np.arange(0, 100, 2) * PERIOD_NS + 1_000_000
    aligner = TruthAligner(Trajectory(times, np.array([T_on_arc(index) for index in range(0, 100, 2)])))
    lines = [aligner.add(a_pose(index)) for index in range(40)]
    assert lines[0] is None and all(line is None for line in lines[1::2])
    np.testing.assert_allclose(lines[4], [T_on_arc(2)[:3, 3], T_on_arc(4)[:3, 3]])
    assert aligner.realign() and aligner.alignment.num_pairs == 20
    assert not aligner.realign()
    aligner.clear()
    aligner.add(a_pose(10))
    assert aligner.realign() and aligner.alignment.kind == "first pose"
    np.testing.assert_allclose(aligner.alignment.T_world_truth, np.eye(4), atol=1e-12)


def test_poses_of_another_time_have_no_truth():
    aligner = TruthAligner(Trajectory(np.arange(10) + 10**15, np.array([T_on_arc(index) for index in range(10)])))
    assert aligner.add(a_pose(0)) is None
    assert not aligner.realign() and aligner.alignment is None


# --- a run ---


def accept(live: LiveScene, body: object, session_id: str = "one") -> None:
    live.accept(message_of(body, session_id), time.time_ns())


def test_a_run_is_shown_and_another_begins_anew():
    truth = Trajectory(np.arange(60) * PERIOD_NS, np.array([T_on_arc(index) for index in range(60)]))
    live = LiveScene(truth)
    for index in range(40):
        accept(live, a_pose(index))
        accept(live, some_tracks(index))
        if index % 10 == 0:
            map_update = a_map_update(index)
            for part in (*keyframe_updates(map_update), *points_updates(map_update)):
                accept(live, part)
    live.realign(is_final=True)
    text = "\n".join(line.text for line in live.lines(Link("tcp://x", is_heard=True)))
    for part in ("TRACKING", "frame 39", "150 inliers of 200", "40 poses", "4 keyframes", "400 landmarks", "relative"):
        assert part in text
    assert "layer" not in text
    accept(live, dataclasses.replace(a_pose(39), stop_layer=4))
    text_of_figures = [line.text for line in live.lines(Link("tcp://x", is_heard=True))]
    assert "150 inliers of 200 matches    200 tracks    stop layer 4" in text_of_figures
    (truth_line,) = (line for line in text_of_figures if line.startswith("truth:"))
    assert truth_line.startswith("truth: Sim(3), RMSE ") and truth_line.endswith(", 1 m = 1 units")
    assert len(truth_line) <= 55, "the panel is not wider"
    chunks = drawn(live.scene)
    np.testing.assert_allclose(chunks["landmarks/0"].colors[0] * 255, LANDMARK_COLOR, atol=1e-3)
    assert len(chunks["truth/0"].lines) == 39
    accept(live, a_pose(0), session_id="two")
    assert (live.scene.num_poses, live.scene.num_landmarks, live.picture.num_tracks) == (1, 0, 0)


def test_the_screen_says_what_is_wrong_with_the_connection():
    def last(link: Link) -> str:
        return LiveScene().lines(link)[-1].text

    assert last(Link("tcp://x")) == "waiting for tcp://x"
    assert last(Link("tcp://x", is_heard=True, is_silent=True, num_lost=3)) == "tcp://x is silent    3 lost"
    assert last(Link("tcp://x", problem="wrong key")) == "waiting for tcp://x: wrong key"
