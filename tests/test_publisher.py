"""Publisher and subscriber on real sockets: this machine only, ports that the system picks."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import zmq
from wire_runs import (
    ANY_PORT,
    CAMERA,
    PATIENCE_S,
    a_pose,
    a_publisher,
    all_received,
    nothing_left_behind,
    received,
    sequences,
    some_tracks,
    stranger_sockets,
    wait_until,
    wait_until_heard,
)

from vo.client import Client
from vo.endpoints import request_endpoint
from vo.message_stream import MessageStream
from vo.messages import Message, Request, RequestKind, RunState, Snapshot, StatusReport, Topic, decode, encode_request
from vo.publisher import Publisher
from vo.types import Camera, FrameTracks, PoseEstimate, TrackingStatus


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def connect() -> Iterator[Callable[[int, str], zmq.Socket[bytes]]]:
    with stranger_sockets() as connected:
        yield connected


# --- what is published arrives ---


def test_every_topic_arrives_as_it_was_published() -> None:
    with Publisher(
        ANY_PORT, MessageStream(CAMERA, session_id="session", clock=lambda: 123, heartbeat_hz=50.0)
    ) as publisher:
        topics = (Topic.POSE, Topic.TRACKS, Topic.STATUS, Topic.CAMERA)
        with Client(publisher.endpoint, topics) as subscriber:
            wait_until_heard(subscriber)
            publisher.stream.publish_pose(a_pose(4))
            publisher.stream.publish_tracks(some_tracks(4, 10))
            publisher.stream.publish_pose(PoseEstimate(5, 10**9, None, TrackingStatus.LOST))
            publisher.stream.publish_status(fps=12.5, num_frames=6, num_dropped=1)
            got: dict[Topic, Message] = {}

            def have_come() -> bool:
                """Both poses, and the state after them; heartbeats from before may come in between, or none."""
                if not set(topics) <= set(got) or got[Topic.POSE].header.sequence != 1:
                    return False
                report = got[Topic.STATUS].body
                return isinstance(report, StatusReport) and report.num_frames == 6

            while not have_come():
                message = received(subscriber, 1)[0]
                assert message.header.session_id == "session" and message.header.publish_time_ns == 123
                got[message.header.topic] = message
    report = got[Topic.STATUS].body
    assert isinstance(report, StatusReport)
    assert got[Topic.TRACKS].header.status is TrackingStatus.TRACKING
    tracks = got[Topic.TRACKS].body
    assert isinstance(tracks, FrameTracks) and np.array_equal(tracks.keypoints, some_tracks(4, 10).keypoints)
    lost = got[Topic.POSE].body
    assert isinstance(lost, PoseEstimate) and lost.T_world_camera is None and lost.frame_index == 5
    assert (report.fps, report.num_dropped, report.state) == (12.5, 1, RunState.RUNNING)
    assert report.num_sent[Topic.POSE] == 2 and report.num_sent[Topic.TRACKS] == 1
    assert got[Topic.STATUS].header.status is TrackingStatus.LOST and got[Topic.STATUS].header.frame_index == 5
    camera = got[Topic.CAMERA].body
    assert isinstance(camera, Camera) and np.array_equal(camera.K, CAMERA.K) and camera.width == 640


def test_burst_reaches_a_consumer_that_keeps_up() -> None:
    """Through the subscription alone: no snapshot fills in."""
    with (
        a_publisher() as publisher,
        Client(publisher.endpoint, [Topic.POSE, Topic.TRACKS], catch_up=False) as subscriber,
    ):
        wait_until_heard(subscriber)
        messages: list[Message] = []
        consumer = threading.Thread(target=lambda: messages.extend(received(subscriber, 2000)))
        consumer.start()
        for index in range(1000):
            publisher.stream.publish_pose(a_pose(index))
            publisher.stream.publish_tracks(some_tracks(index, 200))
        consumer.join(PATIENCE_S)
        assert sequences(messages) == [index // 2 for index in range(2000)]
        assert subscriber.inbox.take_gaps() == ()
        assert subscriber.inbox.num_malformed == subscriber.inbox.num_duplicates == 0


def test_late_joiner_gets_every_pose_of_the_run() -> None:
    with a_publisher() as publisher:
        for index in range(2500):
            publisher.stream.publish_pose(a_pose(index))
        with Client(publisher.endpoint) as subscriber:
            early = received(subscriber, 2500)
            for index in range(2500, 2600):
                publisher.stream.publish_pose(a_pose(index))
            late = received(subscriber, 50)
            closing = threading.Thread(target=publisher.close)
            closing.start()
            late += all_received(subscriber)
            closing.join(PATIENCE_S)
            assert sequences(early + late) == list(range(2600))
            assert subscriber.inbox.final_state is RunState.FINISHED
            assert subscriber.inbox.num_lost[Topic.POSE] == 0
    for message in (early + late)[::100]:
        pose, expected = message.body, a_pose(message.header.sequence)
        assert isinstance(pose, PoseEstimate) and pose.T_world_camera is not None
        assert np.array_equal(pose.T_world_camera, np.array(expected.T_world_camera))
        assert pose.num_inliers == expected.num_inliers and pose.timestamp_ns == expected.timestamp_ns


def test_what_no_longer_is_kept_is_reported_as_lost() -> None:
    config = dataclasses.replace(ANY_PORT, max_snapshot_poses=100)
    with a_publisher(config) as publisher:
        for index in range(250):
            publisher.stream.publish_pose(a_pose(index))
        with Client(publisher.endpoint) as subscriber:
            assert sequences(received(subscriber, 100)) == list(range(150, 250))
            (gap,) = subscriber.inbox.take_gaps()
            assert (gap.topic, gap.first_sequence, gap.last_sequence) == (Topic.POSE, 0, 149)
            assert gap.session_id == publisher.session_id and gap.num_messages == 150


def test_stuck_consumer_slows_nobody_and_recovers() -> None:
    """It loses tracks, knows how many, and gets every pose; the publisher and the other consumer notice nothing."""
    config = dataclasses.replace(ANY_PORT, send_hwm=100, linger_ms=60_000)
    with (
        a_publisher(config) as publisher,
        Client(publisher.endpoint, [Topic.POSE, Topic.TRACKS]) as stuck,
        Client(publisher.endpoint, [Topic.POSE, Topic.TRACKS]) as good,
    ):
        wait_until_heard(stuck)
        wait_until_heard(good)
        num_frames = 600
        durations_s = []
        for index in range(num_frames):
            start_s = time.perf_counter()
            publisher.stream.publish_pose(a_pose(index))
            publisher.stream.publish_tracks(some_tracks(index, 5000))  # 85 kB each: more than all buffers hold together
            durations_s.append(time.perf_counter() - start_s)
            assert sequences(received(good, 2)) == [index, index]
        assert np.median(durations_s) < 0.01
        assert publisher.stream.num_sent[Topic.TRACKS] == num_frames
        closing = threading.Thread(target=publisher.close)
        closing.start()
        assert all_received(good) == []
        messages = all_received(stuck)
        closing.join(PATIENCE_S)
        assert not closing.is_alive(), "both have everything: nobody is waited for"
        poses = [message for message in messages if message.header.topic is Topic.POSE]
        num_tracks = len(messages) - len(poses)
        assert sequences(poses) == list(range(num_frames))
        assert num_tracks < num_frames and num_tracks + stuck.inbox.num_lost[Topic.TRACKS] == num_frames
        assert good.inbox.num_lost == dict.fromkeys(good.inbox.num_lost, 0)


def test_a_consumer_that_finds_the_end_behind_its_last_message_says_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(ANY_PORT, linger_ms=60_000)
    with a_publisher(config) as publisher, Client(publisher.endpoint) as client:
        wait_until_heard(client)
        publisher.stream.publish_pose(a_pose(0))
        assert sequences(received(client, 1)) == [0]
        monkeypatch.setattr("vo.client.WORK_PERIOD_S", 1e12)  # messages that wait are taken without looking further
        publisher.stream.publish_pose(a_pose(1))
        closing = threading.Thread(target=publisher.close)
        closing.start()
        time.sleep(0.3)  # until both the pose and the end are here: were they not, the test could only pass
        assert sequences(received(client, 1)) == [1]
        assert all_received(client) == []
        closing.join(PATIENCE_S)
        assert not closing.is_alive()


def test_conflating_consumer_gets_the_newest() -> None:
    with (
        a_publisher() as publisher,
        Client(publisher.endpoint, [Topic.POSE, Topic.TRACKS], conflate=True) as subscriber,
    ):
        newest = {Topic.POSE: -1, Topic.TRACKS: -1}

        def receive_one() -> None:
            message = subscriber.receive(0.01)
            if message is not None:
                assert message.header.sequence > newest[message.header.topic]
                newest[message.header.topic] = message.header.sequence

        def publish(index: int) -> None:
            publisher.stream.publish_pose(a_pose(index))
            publisher.stream.publish_tracks(some_tracks(index, 3))

        publish(0)
        index = 1
        while min(newest.values()) < 0:  # until both of its sockets are known to the publisher
            publish(index)
            index += 1
            receive_one()
        num_received = sum(subscriber.inbox.num_received.values())
        for later in range(index, index + 500):
            publish(later)
        wait_until(lambda: min(newest.values()) == index + 499, receive_one)
        assert sum(subscriber.inbox.num_received.values()) - num_received < 1000
        assert subscriber.inbox.take_gaps() == ()


def test_the_publisher_knows_what_is_subscribed_to(connect: Callable[[int, str], zmq.Socket[bytes]]) -> None:
    with a_publisher() as publisher:
        assert not publisher.stream.is_wanted(Topic.IMAGE)
        with Client(publisher.endpoint, [Topic.IMAGE]), Client(publisher.endpoint, [Topic.POSE]):
            wait_until(lambda: publisher.is_wanted(Topic.IMAGE) and publisher.is_wanted(Topic.POSE))
            assert publisher.stream.is_wanted(Topic.IMAGE) and not publisher.is_wanted(Topic.TRACKS)
        wait_until(lambda: not publisher.is_wanted(Topic.IMAGE))
        everything = connect(zmq.SUB, publisher.endpoint)
        everything.subscribe(b"")
        wait_until(lambda: publisher.is_wanted(Topic.TRACKS))
        everything.subscribe(b"nothing that is published")
        everything.subscribe(b"pos")
        everything.unsubscribe(b"")
        wait_until(lambda: not publisher.is_wanted(Topic.TRACKS))
        assert publisher.is_wanted(Topic.POSE) and publisher._prefixes == {b"pos"}


def test_tracks_can_be_left_out() -> None:
    with a_publisher(dataclasses.replace(ANY_PORT, publish_tracks=False)) as publisher:
        publisher.stream.publish_tracks(some_tracks(0))
        assert publisher.stream.num_sent[Topic.TRACKS] == 0


def test_heartbeat_comes_by_itself_and_a_new_state_at_once() -> None:
    slow = dataclasses.replace(ANY_PORT, heartbeat_hz=0.1)
    for config, num_expected in ((ANY_PORT, 4), (slow, 1)):
        with a_publisher(config) as publisher:
            wait_until(lambda publisher=publisher, n=num_expected: publisher.stream.num_sent[Topic.STATUS] >= n)  # type: ignore[misc]
            publisher.stream.publish_status(fps=3.0)
            num_before = publisher.stream.num_sent[Topic.STATUS]
            publisher.stream.finish(RunState.INTERRUPTED)
            assert publisher.stream.num_sent[Topic.STATUS] >= num_before + 1


# --- the end, and what comes after it ---


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, RunState.FINISHED), (KeyError, RunState.FAILED), (KeyboardInterrupt, RunState.INTERRUPTED)],
)
def test_the_end_is_announced(error: type[BaseException] | None, state: RunState) -> None:
    publisher = a_publisher()
    with Client(publisher.endpoint) as subscriber:
        wait_until_heard(subscriber)

        def run() -> None:
            with publisher:
                publisher.stream.publish_pose(a_pose(0))
                if error is not None:
                    raise error

        def run_caught() -> None:
            if error is None:
                run()
            else:
                with pytest.raises(error):
                    run()

        thread = threading.Thread(target=run_caught)
        thread.start()
        assert sequences(all_received(subscriber)) == [0]
        assert subscriber.inbox.final_state is state
        thread.join(PATIENCE_S)
    with pytest.raises(ValueError, match="closed"):
        publisher.stream.publish_pose(a_pose(1))
    publisher.close()


def test_close_waits_for_consumers_no_longer_than_the_linger(connect: Callable[[int, str], zmq.Socket[bytes]]) -> None:
    def request_snapshot(publisher: Publisher) -> zmq.Socket[bytes]:
        dealer = connect(zmq.DEALER, request_endpoint(publisher.endpoint))
        dealer.send(encode_request(Request(RequestKind.SNAPSHOT)))
        assert dealer.poll(PATIENCE_S * 1000)
        assert isinstance(decode(dealer.recv()).body, Snapshot)
        return dealer

    patient = dataclasses.replace(ANY_PORT, linger_ms=60_000)
    start_s = time.monotonic()
    a_publisher(patient).close()
    publisher = a_publisher(patient)
    request_snapshot(publisher).send(encode_request(Request(RequestKind.GOODBYE)))
    publisher.close()
    assert time.monotonic() - start_s < 30, "nobody is there, or everybody has said goodbye"

    publisher = a_publisher(dataclasses.replace(ANY_PORT, linger_ms=300))
    request_snapshot(publisher)
    start_s = time.monotonic()
    publisher.close()
    assert 0.29 < time.monotonic() - start_s < 10


def test_close_does_not_hang_on_a_stuck_consumer() -> None:
    publisher = a_publisher(dataclasses.replace(ANY_PORT, linger_ms=200))
    with Client(publisher.endpoint, [Topic.TRACKS]) as stuck:
        wait_until_heard(stuck)
        for index in range(1000):
            publisher.stream.publish_tracks(some_tracks(index, 2000))
        start_s = time.monotonic()
        publisher.close()
        assert time.monotonic() - start_s < 10


def test_close_does_not_wait_for_a_thread_that_has_ended_already() -> None:
    """Its thread may see the end before it is woken for it, and there is nobody left to take the waking."""
    with a_publisher() as publisher:
        publisher._close_deadline_s = time.monotonic()
        publisher._thread.join(20)
        assert not publisher._thread.is_alive()


def test_restart_is_noticed_and_followed() -> None:
    first = a_publisher()
    with Client(first.endpoint) as subscriber:
        wait_until_heard(subscriber)
        first.stream.publish_pose(a_pose(0))
        first.stream.publish_pose(a_pose(1))
        before = received(subscriber, 2)
        first.close()
        assert first.session_id == subscriber.inbox.session_id
        with a_publisher(dataclasses.replace(ANY_PORT, endpoint=first.endpoint)) as second:
            for index in range(3):
                second.stream.publish_pose(a_pose(index))
            after = received(subscriber, 3)
            assert subscriber.inbox.num_sessions == 2 and subscriber.inbox.session_id == second.session_id
    assert sequences(before + after) == [0, 1, 0, 1, 2]
    assert {message.header.session_id for message in after} == {second.session_id} != {first.session_id}


def test_subscriber_may_come_first() -> None:
    with a_publisher() as publisher:
        endpoint = publisher.endpoint
    with Client(endpoint) as subscriber:
        assert subscriber.receive(0.05) is None and subscriber.inbox.session_id is None
        with a_publisher(dataclasses.replace(ANY_PORT, endpoint=endpoint)) as publisher:
            publisher.stream.publish_pose(a_pose(0))
            assert sequences(received(subscriber, 1)) == [0]
