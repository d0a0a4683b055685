"""The stream of a run: the same bytes to everybody, numbered, in order; and the images that go into it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
from synthetic_drive import write_drive
from wire_runs import CAMERA, PATIENCE_S, a_pose, some_tracks
from wire_samples import an_image, some_keyframes, some_points

from vo.cli import main
from vo.client import Client, CompressedImage, RunState, StatusReport, Topic
from vo.keys import load_client_keys
from vo.message_stream import FINAL_PERIOD_S, EncodedMessage, MessageStream
from vo.messages import decode
from vo.preview import ImagePreview, compressed_image
from vo.types import Camera, Frame, MapUpdate


@pytest.fixture
def clock() -> Iterator[list[float]]:
    """A monotonic clock that stands still unless it is set."""
    now_s = [100.0]
    with patch("vo.message_stream.time.monotonic", lambda: now_s[0]):
        yield now_s


def a_map_update() -> MapUpdate:
    keyframes, points = some_keyframes(), some_points()
    return MapUpdate(
        7,
        keyframes.timestamp_ns,
        2,
        "depth",
        keyframes.keyframe_indices,
        keyframes.keyframe_timestamps_ns,
        keyframes.T_world_keyframes,
        points.landmark_ids,
        points.landmarks,
        points.landmark_colors,
        points.removed_landmark_ids,
    )


def test_everybody_gets_the_same_bytes_in_the_same_order(clock: list[float]) -> None:
    first: list[EncodedMessage] = []
    second: list[EncodedMessage] = []
    times_ns = itertools.count(1000)
    stream = MessageStream(CAMERA, session_id="run", clock=lambda: next(times_ns))
    assert not stream.is_wanted(Topic.POSE)
    stream.publish_pose(a_pose(0))  # nobody listens: numbered all the same
    stream.add_consumer(first.append)
    stream.add_consumer(second.append)
    assert stream.is_wanted(Topic.POSE)
    stream.publish_pose(a_pose(1))
    stream.publish_tracks(some_tracks(1, 3))
    stream.publish_map(a_map_update())
    stream.publish_image(an_image(1))
    stream.publish_status(fps=20.0, num_frames=2, num_dropped=1)
    stream.finish()
    assert [message.data for message in first] == [message.data for message in second]
    assert all(one.data is other.data for one, other in zip(first, second, strict=True)), "encoded once"
    topics = [message.topic.value for message in first]
    assert topics == ["pose", "tracks", "keyframe", "points", "image", "camera", "status", "status"]
    for message in first:
        header = decode(message.data).header
        assert (header.topic, header.sequence, header.session_id) == (message.topic, message.sequence, "run")
        assert (header.capture_time_ns, header.publish_time_ns) == (message.capture_ns, message.publish_ns)
    assert [message.sequence for message in first if message.topic is Topic.POSE] == [1]
    assert [message.publish_ns for message in first] == sorted(message.publish_ns for message in first)
    final = decode(first[-1].data).body
    assert isinstance(final, StatusReport) and final.state is RunState.FINISHED
    assert (final.fps, final.num_frames, final.num_dropped) == (20.0, 2, 1)
    expected = {"pose": 2, "tracks": 1, "keyframe": 1, "points": 1, "image": 1, "status": 1, "camera": 1}
    assert {topic.value: number for topic, number in final.num_sent.items()} == expected
    stream.remove_consumer(first.append)
    stream.remove_consumer(second.append)
    stream.remove_consumer(second.append)


def test_the_map_goes_out_as_it_is(clock: list[float]) -> None:
    sent: list[EncodedMessage] = []
    stream = MessageStream(CAMERA)
    stream.add_consumer(sent.append)
    update = a_map_update()
    stream.publish_map(update)
    keyframes, points = (decode(message.data).body for message in sent)
    for name in ("keyframe_indices", "keyframe_timestamps_ns", "T_world_keyframes"):
        assert np.array_equal(getattr(keyframes, name), getattr(update, name))
    for name in ("landmark_ids", "landmarks", "landmark_colors", "removed_landmark_ids"):
        assert np.array_equal(getattr(points, name), getattr(update, name))


def test_the_heart_beats_at_its_rate_and_the_end_is_repeated(clock: list[float]) -> None:
    sent: list[EncodedMessage] = []
    stream = MessageStream(CAMERA, heartbeat_hz=2.0)
    stream.add_consumer(sent.append)
    assert stream.beat_if_due() == 0.5 and [message.topic for message in sent] == [Topic.CAMERA, Topic.STATUS]
    clock[0] += 0.4
    assert stream.beat_if_due() == pytest.approx(0.1) and len(sent) == 2
    stream.publish_status(fps=1.0)
    assert len(sent) == 2, "figures wait for the heartbeat"
    clock[0] += 0.1
    stream.publish_status(fps=2.0)
    body = decode(sent[-1].data).body
    assert len(sent) == 4 and isinstance(body, StatusReport) and body.fps == 2.0
    stream.finish(RunState.FAILED)
    stream.finish(RunState.FINISHED)
    assert stream.state is RunState.FAILED and len(sent) == 5, "a final state stays"
    for _ in range(3):
        clock[0] += FINAL_PERIOD_S + 1e-6  # sums of floats
        assert stream.beat_if_due() == pytest.approx(FINAL_PERIOD_S)
    states = [body.state for message in sent if isinstance(body := decode(message.data).body, StatusReport)]
    assert states == [RunState.RUNNING] * 2 + [RunState.FAILED] * 4


def test_nothing_follows_the_end(clock: list[float]) -> None:
    with MessageStream(CAMERA) as stream, pytest.raises(ValueError, match="running is not final"):
        stream.finish(RunState.RUNNING)
    for publish in (
        lambda: stream.publish_pose(a_pose(0)),
        lambda: stream.publish_tracks(some_tracks(0)),
        lambda: stream.publish_map(a_map_update()),
        lambda: stream.publish_image(an_image()),
        stream.publish_status,
    ):
        with pytest.raises(ValueError, match="closed: its run has finished"):
            publish()
    for error, state in ((KeyError, RunState.FAILED), (KeyboardInterrupt, RunState.INTERRUPTED)):
        with pytest.raises(error), MessageStream(CAMERA) as other:
            raise error
        assert other.state is state


def test_tracks_can_be_left_out() -> None:
    stream = MessageStream(CAMERA, with_tracks=False)
    stream.publish_tracks(some_tracks(0))
    assert stream.num_sent[Topic.TRACKS] == 0


def test_what_nobody_wants_can_be_left_out() -> None:
    sent: list[EncodedMessage] = []
    stream, wanted = MessageStream(CAMERA), {Topic.POSE}
    stream.add_consumer(sent.append, lambda topic: topic in wanted)
    assert stream.is_wanted(Topic.POSE) and not stream.is_wanted(Topic.IMAGE)
    wanted.add(Topic.IMAGE)
    assert stream.is_wanted(Topic.IMAGE)
    wanted.clear()
    stream.add_consumer(lambda message: None)
    assert stream.is_wanted(Topic.IMAGE), "a recorder wants everything"


def test_threads_do_not_mix_numbers() -> None:
    sent: list[EncodedMessage] = []
    stream = MessageStream(CAMERA)
    stream.add_consumer(sent.append)
    threads = [threading.Thread(target=lambda: [stream.publish_pose(a_pose(i)) for i in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [message.sequence for message in sent] == list(range(800))


# --- images ---


def a_frame(index: int, timestamp_ns: int, image: np.ndarray) -> Frame:
    height, width = image.shape[:2]
    return Frame(index, timestamp_ns, image, Camera(width, height, np.diag([500.0, 500, 1])))


def a_picture(height: int, width: int) -> np.ndarray:
    """Smooth colours, so that a JPEG of it is nearly the same; red rises to the right, blue downwards."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = (255 * x / width, np.full((height, width), 90.0), 255 * y / height)
    return np.stack(channels, axis=-1).astype(np.uint8)


def test_an_image_comes_out_as_it_went_in() -> None:
    picture = a_picture(120, 160)
    image = compressed_image(a_frame(3, 7, picture), 640, 95)
    assert (image.width, image.height, image.frame_index, image.timestamp_ns) == (160, 120, 3, 7)
    seen = cv2.cvtColor(cv2.imdecode(image.data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert np.abs(seen.astype(int) - picture).mean() < 3, "red and blue stay where they are"
    gray = compressed_image(a_frame(0, 0, picture[..., 0].copy()), 640, 95)
    assert np.abs(cv2.imdecode(gray.data, cv2.IMREAD_GRAYSCALE).astype(int) - picture[..., 0]).mean() < 3
    assert len(compressed_image(a_frame(0, 0, picture), 640, 10).data) < len(image.data)


def test_large_images_are_reduced_by_the_rule_of_pixels() -> None:
    picture = a_picture(480, 640)
    image = compressed_image(a_frame(0, 0, picture), 320, 95)
    assert (image.width, image.height) == (320, 240)
    seen = cv2.cvtColor(cv2.imdecode(image.data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    # (p + 0.5) s - 0.5: pixel 100 of the small image lies between pixels 200 and 201 of the large one.
    assert abs(float(seen[120, 100, 0]) - picture[240, 200:202, 0].mean()) < 3
    tall = compressed_image(a_frame(0, 0, a_picture(1000, 10)), 100, 75)
    assert (tall.width, tall.height) == (1, 100)


@pytest.mark.parametrize(
    ("frame_hz", "image_hz", "num_expected"), [(30, 10, 10), (60, 10, 10), (10, 10, 30), (5, 10, 30), (30, 30, 30)]
)
def test_images_keep_to_their_rate(frame_hz: int, image_hz: float, num_expected: int) -> None:
    preview = ImagePreview(image_hz, 64, 50)
    frames = [a_frame(index, round(index * 1e9 / frame_hz), np.zeros((8, 8), np.uint8)) for index in range(30)]
    images = [preview.take(frame) for frame in frames]
    # 30 frames of 60 Hz are half a second.
    expected = num_expected if frame_hz != 60 else 5
    assert sum(image is not None for image in images) == expected and images[0] is not None
    assert all(ImagePreview(0.0, 64, 50).take(frame) is None for frame in frames)


# --- a whole run ---


def test_a_run_with_keys_is_received_and_ended_from_outside(tmp_path: Path, free_port: int) -> None:
    """Poses, tracks, images, camera and state of `vo run`, through encrypted sockets; a client ends it."""
    drive, keys = write_drive(tmp_path / "drive", 40), tmp_path / "keys"
    assert main(["keys", str(keys)]) == 0
    endpoint = f"tcp://127.0.0.1:{free_port}"
    codes: list[int] = []
    # Without an end of its own: however late the client is, it is the client that ends the run.
    arguments = ["run", f"loop:{drive}", "--config", "orb", "--publish", endpoint, "--keys", str(keys), "--realtime"]
    stopper = threading.Thread(target=lambda: codes.append(_stop_after(endpoint, keys, num_poses=8)))
    stopper.start()
    assert main([*arguments, "--quiet", "--set", "publisher.linger_ms=20000"]) == 130
    stopper.join(PATIENCE_S)
    assert codes == [0]


def _stop_after(endpoint: str, keys: Path, num_poses: int) -> int:
    topics = (Topic.POSE, Topic.TRACKS, Topic.IMAGE, Topic.CAMERA, Topic.KEYFRAME, Topic.POINTS)
    received = dict.fromkeys(topics, 0)
    own_keys = load_client_keys(keys / "client.key_secret", keys / "server.key")
    was_stopped = False
    with Client(endpoint, topics, keys=own_keys) as client:
        for message in client.messages(timeout_s=3 * PATIENCE_S):
            received[message.header.topic] += 1
            if isinstance(message.body, CompressedImage):
                image = cv2.imdecode(message.body.data, cv2.IMREAD_COLOR)
                assert image.shape[:2] == (message.body.height, message.body.width) == (240, 320)
            if (
                received[Topic.POSE] >= num_poses
                and received[Topic.IMAGE]
                and received[Topic.CAMERA]
                and not was_stopped
            ):
                client.stop(PATIENCE_S)
                was_stopped = True
        assert client.inbox.final_state is RunState.INTERRUPTED
        assert num_poses <= received[Topic.POSE] and sum(client.inbox.num_lost.values()) == 0
        assert received[Topic.CAMERA] > 0 and received[Topic.IMAGE] > 0
    return 0


def test_headers_of_answers_follow_the_last_pose() -> None:
    stream = MessageStream(CAMERA, session_id="run")
    assert stream.answer_header(Topic.REPLY, 3).frame_index is None
    stream.publish_pose(a_pose(5))
    header = stream.answer_header(Topic.REPLY, 3)
    assert (header.frame_index, header.capture_time_ns, header.sequence) == (5, a_pose(5).timestamp_ns, 3)
