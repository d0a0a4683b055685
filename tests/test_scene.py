"""What the viewer shows, without Open3D: chunks, views, the panel, the truth, the mailbox, pictures."""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_messages import (
    CAMERA,
    IMAGE_COLOR,
    LANDMARK_COLOR,
    PERIOD_NS,
    T_on_arc,
    a_map_update,
    a_pose,
    an_image,
    message_of,
    some_tracks,
)

from vo.geometry import exp_se3, exp_so3, make_pose, project, transform
from vo.message_stream import keyframe_updates, points_updates
from vo.message_types import CompressedImage
from vo.output import OutputError
from vo.scene import POINTS_PER_CHUNK, SEGMENTS_PER_CHUNK, STATUS_COLORS, Chunk, Layer, Scene
from vo.scene_feed import Mailbox, Received
from vo.scene_live import Link, LiveScene
from vo.scene_panel import (
    PANEL_WIDTH,
    Panel,
    TextLine,
    TrackPicture,
    age_colors,
    hidden_layers,
    read_image,
    rgb,
    stamp_dots,
    tails,
)
from vo.scene_truth import TruthAligner, align
from vo.scene_video import VideoWriter, write_picture
from vo.scene_view import (
    FIELD_OF_VIEW_DEG,
    KEYS,
    Eye,
    ViewState,
    approach,
    camera_matrix,
    follow_gaze,
    overview_gaze,
)
from vo.trajectory import Trajectory
from vo.types import Camera, TrackingStatus


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


# --- the panel ---


def count(picture: np.ndarray, color: tuple[int, int, int], tolerance: int = 12) -> int:
    return int((np.abs(picture.astype(int) - color).max(axis=2) <= tolerance).sum())


def test_tracks_are_dots_where_their_keypoints_are_in_the_colour_of_their_age():
    picture = TrackPicture()
    picture.set_camera(CAMERA)
    tracks = some_tracks(40)
    picture.add_tracks(tracks)
    picture.set_image(an_image(40))
    drawn_image = picture.draw(320)
    assert drawn_image.shape == (240, 320, 3)
    landmarks = np.flatnonzero(tracks.has_landmark)
    x, y = np.rint((tracks.keypoints[landmarks] + 0.5) / 2 - 0.5).astype(int).T
    expected = age_colors()[np.minimum(tracks.lengths[landmarks] * 16 // 31, 15)]
    is_right = np.all(drawn_image[y, x] == expected, axis=1)
    assert is_right.mean() > 0.95  # some are covered by a neighbour
    assert count(drawn_image, IMAGE_COLOR) > 0.7 * 240 * 320
    assert len({tuple(color) for color in expected.tolist()}) > 5


def test_an_image_is_drawn_with_the_tracks_of_its_own_frame():
    picture = TrackPicture()
    for index in (10, 11, 12):
        picture.add_tracks(some_tracks(index, num_tracks=10 * index))
    picture.set_image(an_image(11))
    assert picture.frame_index == 11 and picture.num_tracks == 110


def test_tails_show_where_a_track_comes_from():
    picture = TrackPicture()
    for index, x in enumerate((100.0, 200.0, 300.0)):
        tracks = some_tracks(index, num_tracks=1)
        keypoints = np.array([[x, 240.0]], np.float32)
        picture.add_tracks(replace(tracks, track_ids=np.array([7]), keypoints=keypoints))
    row = picture.draw(640)[240]
    background = rgb((0.16, 0.17, 0.21))
    is_drawn = np.any(row != background, axis=1)
    assert is_drawn[100:300].all() and not is_drawn[:98].any() and not is_drawn[305:].any()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 8), max_size=8), min_size=1, max_size=6))
def test_tails_are_where_each_track_was_in_every_frame(ids_of_frames):
    """Against a dictionary for each frame; a publisher that sends an id twice must not hurt."""
    frames = []
    for index, ids in enumerate(ids_of_frames):
        keypoints = np.array([[index, place] for place in range(len(ids))], np.float32).reshape(-1, 2)
        tracks = some_tracks(index, num_tracks=len(ids))
        frames.append(replace(tracks, track_ids=np.array(ids, np.int64), keypoints=keypoints))
    found = tails(frames)
    assert found.shape == (len(ids_of_frames[-1]), len(frames), 2)
    for row, track_id in enumerate(ids_of_frames[-1]):
        expected = frames[-1].keypoints[row]
        np.testing.assert_array_equal(found[row, 0], expected)
        for age, older in enumerate(frames[-2::-1], 1):
            places = np.flatnonzero(older.track_ids == track_id)
            expected = older.keypoints[places[0]] if len(places) else expected
            np.testing.assert_array_equal(found[row, age], expected)


def test_dots_and_their_edges():
    canvas = np.zeros((6, 8, 3), np.uint8)
    offsets = np.array([[0, 0], [1, 0], [0, -1]], np.int32)
    pixels = np.array([[0, 0], [7, 5], [-1, 3], [100, 2], [3, 3]], np.int32)
    colors = np.arange(1, 6, dtype=np.uint8)[:, None] * np.array([10, 20, 30], np.uint8)
    stamp_dots(canvas, pixels, colors, offsets)
    expected = np.zeros_like(canvas)
    for (x, y), color in zip(pixels.tolist(), colors, strict=True):
        for dx, dy in offsets.tolist():
            if 0 <= x + dx < 8 and 0 <= y + dy < 6:
                expected[y + dy, x + dx] = color
    np.testing.assert_array_equal(canvas, expected)
    assert canvas.any(axis=2).sum() == 8


def test_a_broken_image_is_counted_and_the_last_one_stays():
    picture = TrackPicture()
    picture.set_image(an_image(1))
    expected = picture.draw(320)
    broken = CompressedImage(2, 2 * PERIOD_NS, 640, 480, an_image(2).data[:200].copy())
    assert read_image(broken) is None
    for image in (broken, replace(an_image(3), width=320)):
        picture.set_image(image)
        np.testing.assert_array_equal(picture.draw(320), expected)
    assert picture.num_broken == 2 and picture.frame_index == 1


def test_an_image_that_was_read_elsewhere_is_not_read_again():
    picture, read = TrackPicture(), read_image(an_image(1))
    assert read is not None and read.shape == (480, 640, 3)
    np.testing.assert_allclose(read[240, 320], IMAGE_COLOR, atol=3)
    unreadable = replace(an_image(1), data=an_image(1).data[:200].copy())
    picture.set_image(unreadable, read)
    assert count(picture.draw(320), IMAGE_COLOR) == 320 * 240 and picture.num_broken == 0


def test_the_panel_shows_image_text_and_legend_and_hides_what_it_is_told_to():
    picture = TrackPicture()
    picture.set_image(an_image(0))
    color = (0.2, 1.0, 0.4)
    panel = Panel().draw(picture, [TextLine("TRACKING", color)], ViewState(), 720)
    assert panel.shape == (720, PANEL_WIDTH, 3)
    height = PANEL_WIDTH * 480 // 640
    assert count(panel[:height], IMAGE_COLOR) == height * PANEL_WIDTH
    assert count(panel[height:], rgb(color), tolerance=60) > 20
    for status in TrackingStatus:
        assert count(panel[height:], rgb(STATUS_COLORS[status])) > 30
    bare = Panel().draw(picture, [], ViewState(shows_image=False, shows_help=False), 720)
    assert len(np.unique(bare.reshape(-1, 3), axis=0)) == 1


def test_unknown_layers_are_refused_by_name():
    assert hidden_layers(("truth", "camera")) == {Layer.TRUTH, Layer.CAMERA}
    with pytest.raises(ValueError, match=r"pathway: no layer; valid: trajectory, keyframes"):
        hidden_layers(("pathway",))


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


# --- the mailbox ---


def received(body: object, session_id: str = "one") -> Received:
    return Received(message_of(body, session_id), 0)


def test_the_mailbox_keeps_every_pose_and_the_newest_image():
    mailbox = Mailbox()
    for index in range(50):
        mailbox.put(received(an_image(index)) if index % 2 else received(a_pose(index)))
    taken = [item.message.body.frame_index for item in mailbox.take(10)]
    assert taken == list(range(0, 20, 2))
    assert [item.message.body.frame_index for item in mailbox.take(1000)] == [*range(20, 50, 2), 49]
    assert mailbox.take(1000) == []


def test_pictures_of_the_last_run_do_not_come_after_the_new_one():
    mailbox = Mailbox()
    mailbox.put(received(an_image(1), "one"))
    mailbox.put(received(some_tracks(1), "one"))
    mailbox.put(received(a_pose(0), "two"))
    assert [item.message.header.session_id for item in mailbox.take(10)] == ["two"]


def test_a_full_mailbox_makes_the_receiver_wait_until_it_is_closed():
    mailbox = Mailbox(capacity=2)
    thread = threading.Thread(target=lambda: [mailbox.put(received(a_pose(index))) for index in range(4)])
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive() and len(mailbox.take(1)) == 1
    mailbox.close()
    thread.join(5)
    assert not thread.is_alive()


# --- files ---


def test_a_video_keeps_the_time_of_the_clock(tmp_path):
    now_s = [100.0]
    with VideoWriter(tmp_path / "a.mp4", 10.0, clock=lambda: now_s[0]) as video:
        for shade, wait_s in ((30, 0.5), (130, 0.1), (230, 0.0)):
            assert video.is_due()
            video.write(np.full((96, 128, 3), shade, np.uint8))
            assert not video.is_due()
            now_s[0] += wait_s
    capture = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    shades = []
    while True:
        is_read, frame = capture.read()
        if not is_read:
            break
        shades.append(round(float(frame.mean())))
    np.testing.assert_allclose(shades, [30] * 5 + [130] + [230], atol=6)


def test_files_that_cannot_be_written_are_one_line(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(OutputError, match=r"end the name in \.png"):
        write_picture(tmp_path / "a.unknown", picture)
    with pytest.raises(OutputError, match="cannot be written"):
        write_picture(tmp_path / "missing" / "a.png", picture)
    with pytest.raises(OutputError, match=r"end the name in \.mp4"):
        VideoWriter(tmp_path / "a.avi", 10.0)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    stored = cv2.imread(str(write_picture(tmp_path / "a.png", red)))
    assert stored[0, 0].tolist() == [0, 0, 200]


def test_a_camera_without_images_gives_the_panel_its_shape():
    picture = TrackPicture()
    picture.set_camera(Camera(800, 200, CAMERA.K.copy()))
    assert picture.draw(400).shape == (100, 400, 3)
