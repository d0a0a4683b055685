"""The client of other programs: what it hands out, what it notices, and the requests it sends."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from wire_runs import (
    ANY_PORT,
    PATIENCE_S,
    a_pose,
    a_publisher,
    a_stream,
    nothing_left_behind,
    received,
    sequences,
    some_tracks,
    wait_until,
    wait_until_heard,
)

from vo.client import (
    Client,
    CompressedImage,
    KeyframeUpdate,
    NoAnswerError,
    PointsUpdate,
    RefusedError,
    RunState,
    ScaleQuantity,
    ScaleReading,
    Topic,
)
from vo.publisher import MAX_SCALE_READINGS, Publisher
from vo.types import ConfigError, MapUpdate


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


def a_map_update(index: int, ids: list[int]) -> MapUpdate:
    return MapUpdate(
        frame_index=index,
        timestamp_ns=33_333_333 * index,
        segment_id=0,
        scale_source="depth",
        keyframe_indices=np.array([index]),
        keyframe_timestamps_ns=np.array([33_333_333 * index]),
        T_world_keyframes=np.eye(4)[None],
        landmark_ids=np.array(ids),
        landmarks=np.full((len(ids), 3), float(index)),
        landmark_colors=np.zeros((len(ids), 3), np.uint8),
        removed_landmark_ids=np.array([ids[0] - 1]),
    )


def test_poses_and_tracks_are_iterated_to_the_end_of_the_run() -> None:
    publisher = a_publisher()
    with Client(publisher.endpoint) as client:
        wait_until_heard(client)
        for index in range(5):
            publisher.stream.publish_pose(a_pose(index))
        closing = threading.Thread(target=publisher.close)
        closing.start()
        assert [pose.frame_index for pose in client.poses()] == list(range(5))
        closing.join(PATIENCE_S)
        assert client.inbox.final_state is RunState.FINISHED and client.session_id == publisher.session_id
        with pytest.raises(ValueError, match="does not receive tracks"):
            client.tracks()
    with a_publisher() as publisher, Client(publisher.endpoint, [Topic.TRACKS]) as client:
        wait_until_heard(client)
        for index in range(5):
            publisher.stream.publish_tracks(some_tracks(index))
        assert [tracks.frame_index for tracks in client.tracks(timeout_s=0.3)] == list(range(5))
        with pytest.raises(ValueError, match="does not receive pose"):
            client.poses()


def test_a_pose_is_handed_out_before_the_tracks_behind_it_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_publisher() as publisher, Client(publisher.endpoint, [Topic.POSE, Topic.TRACKS]) as client:
        wait_until_heard(client)
        publisher.stream.publish_pose(a_pose(0))
        received(client, 1)  # caught up: what comes now is only published
        read: list[bytes] = []
        accept = client.inbox.accept_published
        monkeypatch.setattr(
            client.inbox, "accept_published", lambda data, now_s: (read.append(data), accept(data, now_s))
        )
        publisher.stream.publish_pose(a_pose(1))
        for index in range(3):
            publisher.stream.publish_tracks(some_tracks(index))
        time.sleep(0.2)
        topics = [received(client, 1)[0].header.topic for _ in range(2)]
        num_read = [sum(data.startswith(topic.prefix) for data in read) for topic in (Topic.POSE, Topic.TRACKS)]
    assert topics == [Topic.POSE, Topic.TRACKS] and num_read == [1, 1]


def test_a_late_client_gets_the_map_and_then_its_changes() -> None:
    with a_publisher() as publisher:
        publisher.stream.publish_map(a_map_update(1, [10, 11]))
        publisher.stream.publish_map(a_map_update(2, [11, 12]))
        with Client(publisher.endpoint, [Topic.KEYFRAME, Topic.POINTS]) as client:
            whole = [message.body for message in received(client, 2)]
            wait_until_heard(client)
            publisher.stream.publish_map(a_map_update(3, [12, 13]))
            changes = [message.body for message in received(client, 2)]
    keyframes = next(body for body in whole if isinstance(body, KeyframeUpdate))
    points = next(body for body in whole if isinstance(body, PointsUpdate))
    assert keyframes.is_reset and keyframes.keyframe_indices.tolist() == [1, 2]
    assert points.is_reset and points.landmark_ids.tolist() == [11, 12], "10 was removed by the second update"
    assert points.landmarks[:, 0].tolist() == [2, 2] and points.scale_source == "depth"
    moved = next(body for body in changes if isinstance(body, PointsUpdate))
    assert not moved.is_reset and moved.landmark_ids.tolist() == [12, 13]
    assert moved.removed_landmark_ids.tolist() == [11]


def test_images_come_as_they_are() -> None:
    data = np.frombuffer(b"\xff\xd8\xff\xd9", np.uint8)
    with a_publisher() as publisher, Client(publisher.endpoint, [Topic.IMAGE]) as client:
        wait_until_heard(client)
        publisher.stream.publish_image(CompressedImage(3, 99_999_999, 320, 240, data))
        (message,) = received(client, 1)
    assert isinstance(message.body, CompressedImage) and message.body.data.tobytes() == b"\xff\xd8\xff\xd9"
    assert (message.body.width, message.header.frame_index) == (320, 3)


def test_wait_for_fresh_throws_the_backlog_away() -> None:
    now_ns = [0]
    stream = a_stream()
    stream._clock = lambda: now_ns[0]  # the publisher's clock
    with Publisher(ANY_PORT, stream) as publisher, Client(publisher.endpoint, catch_up=False) as client:
        wait_until_heard(client)
        for index in range(50):
            stream.publish_pose(a_pose(index))
        assert client.wait_for_fresh(max_age_s=60, timeout_s=0.2) is None, "all of them are old"
        now_ns[0] = time.time_ns()
        for index in range(50, 100):
            stream.publish_pose(a_pose(index))
        fresh: list[int] = []

        def wait() -> None:
            message = client.wait_for_fresh(max_age_s=60, timeout_s=PATIENCE_S)
            assert message is not None
            fresh.append(message.header.sequence)

        wait_until(lambda: bool(fresh) and fresh[-1] == 99, wait)
        assert fresh == sorted(fresh) and fresh[0] >= 50
        with pytest.raises(ValueError, match="does not receive image"):
            client.wait_for_fresh(Topic.IMAGE)
        publisher.close()
        assert client.wait_for_fresh(timeout_s=PATIENCE_S) is None, "the run is over"


def test_a_dead_publisher_is_noticed_and_its_successor_too() -> None:
    publisher = a_publisher()
    with Client(publisher.endpoint) as client:
        assert client.is_silent
        wait_until_heard(client)
        assert not client.is_silent and client.inbox.heartbeat_hz == 50.0
        publisher.close()
        first = client.session_id
        wait_until(lambda: client.is_silent, lambda: client.receive(0.01))
        with a_publisher(dataclasses.replace(ANY_PORT, endpoint=publisher.endpoint)) as second:
            second.stream.publish_pose(a_pose(7))
            assert sequences(received(client, 1)) == [0]
            assert not client.is_silent
            assert client.session_id == second.session_id != first and client.inbox.num_sessions == 2


def test_losses_are_told() -> None:
    with a_publisher() as publisher, Client(publisher.endpoint, [Topic.TRACKS]) as client:
        wait_until_heard(client)
        publisher.stream.publish_tracks(some_tracks(0))
        received(client, 1)
        publisher.stream.num_sent[Topic.TRACKS] += 3  # what a full queue drops is numbered all the same
        publisher.stream.publish_tracks(some_tracks(4))
        assert sequences(received(client, 1)) == [4]
        (gap,) = client.take_gaps()
        assert (gap.topic, gap.first_sequence, gap.last_sequence) == (Topic.TRACKS, 1, 3)
        assert client.inbox.num_lost[Topic.TRACKS] == 3 and client.take_gaps() == ()


# --- requests ---


def test_ping_and_stop() -> None:
    with a_publisher() as publisher, Client(publisher.endpoint) as client:
        assert 0 < client.ping(PATIENCE_S) < PATIENCE_S
        with pytest.raises(RefusedError, match="cannot be ended from outside"):
            client.stop(PATIENCE_S)
        stop = threading.Event()
        publisher.on_stop = stop.set
        client.stop(PATIENCE_S)
        assert stop.is_set()
        publisher.stream.publish_pose(a_pose(0))
        assert sequences(received(client, 1)) == [0], "what came while a request was under way is not lost"
        for index in range(1, 400):
            publisher.stream.publish_pose(a_pose(index))
        assert client.ping(PATIENCE_S) > 0, "an answer comes through although nobody takes the poses"
        assert sequences(received(client, 399)) == list(range(1, 400))
    with Client(publisher.endpoint) as client, pytest.raises(NoAnswerError, match=r"no answer to ping within 0\.1 s"):
        client.ping(0.1)


def test_scale_readings_reach_the_run() -> None:
    with a_publisher(accepts_scale=True) as publisher, Client(publisher.endpoint) as client:
        client.ping(PATIENCE_S)
        assert client.send_speed(1.0), "refused, since there is no frame whose time it could have"
        wait_until(lambda: client.inbox.num_refused == 1, lambda: client.receive(0.01))
        assert client.inbox.last_error is not None and "give a time" in client.inbox.last_error
        publisher.stream.publish_pose(a_pose(3))
        readings = [
            ScaleReading(ScaleQuantity.SPEED, 2.5, 10**9),
            ScaleReading(ScaleQuantity.DISTANCE, 0.75, 2 * 10**9, 10**9),
            ScaleReading(ScaleQuantity.SPEED, 2.75),
            ScaleReading(ScaleQuantity.DISTANCE, 0.5, None, 10**7),
        ]
        assert client.send_speed(2.5, 10**9) and client.send_distance(0.75, 10**9, 2 * 10**9)
        assert client.send_scale(readings[2]) and client.send_distance(0.5, 10**7)
        client.ping(PATIENCE_S)  # answered in order: the readings are there
        now_ns = a_pose(3).timestamp_ns
        assert publisher.take_scale_readings() == (
            readings[0],
            readings[1],
            dataclasses.replace(readings[2], timestamp_ns=now_ns),
            dataclasses.replace(readings[3], timestamp_ns=now_ns),
        )
        assert publisher.take_scale_readings() == ()
        with pytest.raises(ValueError, match="value"):
            client.send_speed(-1)


def test_readings_that_nobody_takes_are_bounded_and_refused_where_nobody_wants_them() -> None:
    with a_publisher(accepts_scale=True) as publisher, Client(publisher.endpoint) as client:
        client.ping(PATIENCE_S)
        num_readings = MAX_SCALE_READINGS + 10
        for index in range(num_readings):
            wait_until(lambda i=index: client.send_speed(1.0, i + 1))  # type: ignore[misc]
        client.ping(PATIENCE_S)
        readings = publisher.take_scale_readings()
        assert len(readings) == MAX_SCALE_READINGS and publisher.num_scale_readings_dropped == 10
        assert [reading.timestamp_ns for reading in readings] == list(range(11, num_readings + 1))
    with a_publisher() as publisher, Client(publisher.endpoint) as client:
        client.ping(PATIENCE_S)
        assert client.send_speed(1.0, 1)
        wait_until(lambda: client.inbox.num_refused == 1, lambda: client.receive(0.01))
        assert "must be external" in (client.inbox.last_error or "") and publisher.take_scale_readings() == ()


def test_without_a_publisher_nothing_is_on_its_way() -> None:
    with a_publisher() as publisher:
        endpoint = publisher.endpoint
    with Client(endpoint) as client:
        assert not client.send_speed(1.0, 1) and client.is_silent and client.session_id is None
        assert list(client.poses(timeout_s=0.05)) == []
        client.close()
    with pytest.raises(ConfigError, match="no address"):
        Client("here")
