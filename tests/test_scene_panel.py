"""What the viewer shows beside the scene: the panel; the mailbox that feeds it, and the files it writes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_messages import CAMERA, IMAGE_COLOR, PERIOD_NS, a_pose, an_image, message_of, some_tracks

from vo.message_types import CompressedImage
from vo.output import OutputError
from vo.scene import STATUS_COLORS, Layer
from vo.scene_feed import Mailbox, Received
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
from vo.scene_video import VideoWriter, write_picture
from vo.scene_view import ViewState
from vo.types import Camera, TrackingStatus

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


def test_a_camera_without_images_gives_the_panel_its_shape():
    picture = TrackPicture()
    picture.set_camera(Camera(800, 200, CAMERA.K.copy()))
    assert picture.draw(400).shape == (100, 400, 3)


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
