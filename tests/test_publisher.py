"""Publisher and subscriber on real sockets: this machine only, ports that the system picks."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
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
    wait_until,
    wait_until_heard,
)

from vo.client import Client
from vo.config import PublisherConfig
from vo.endpoints import request_endpoint
from vo.message_stream import MessageStream
from vo.messages import (
    MAX_REQUEST_BYTES,
    Message,
    Refusal,
    Request,
    RequestKind,
    RunState,
    Snapshot,
    StatusReport,
    Topic,
    VersionError,
    decode,
    encode_request,
)
from vo.publisher import Publisher, PublishError
from vo.types import Camera, ConfigError, FrameTracks, PoseEstimate, TrackingStatus

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def connect() -> Iterator[Callable[[int, str], zmq.Socket[bytes]]]:
    """Makes sockets of strangers and closes them in the end."""
    context = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def connected(kind: int, endpoint: str) -> zmq.Socket[bytes]:
        sockets.append(context.socket(kind))
        sockets[-1].connect(endpoint)
        return sockets[-1]

    yield connected
    context.destroy(linger=0)


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


# --- addresses ---


def test_a_port_that_is_taken_is_one_clear_line() -> None:
    with a_publisher() as publisher:
        config = dataclasses.replace(ANY_PORT, endpoint=publisher.endpoint)
        with pytest.raises(PublishError) as caught:
            a_publisher(config)
        assert str(caught.value) == (
            f"{publisher.endpoint} is already in use; use --publish tcp://127.0.0.1:PORT or --publish off"
        )
        publisher.stream.publish_pose(a_pose(0))
    # The port next to it may be the one that is taken: no half of a publisher is left then.
    with socket.socket() as taken:
        host, port = _free_pair()
        taken.bind((host, port + 1))
        with pytest.raises(PublishError, match=f"127.0.0.1:{port + 1} is already in use"):
            a_publisher(dataclasses.replace(ANY_PORT, endpoint=f"tcp://{host}:{port}"))
    a_publisher(dataclasses.replace(ANY_PORT, endpoint=f"tcp://{host}:{port}")).close()


def _free_pair() -> tuple[str, int]:
    with a_publisher() as publisher:
        return "127.0.0.1", int(publisher.endpoint.rsplit(":", 1)[1])


@pytest.mark.parametrize(
    ("endpoint", "complaint"),
    [
        ("tcp://0.0.0.0:5570", "without encryption.*--publish off"),
        ("tcp://*:5570", "without encryption"),
        ("tcp://192.168.1.5:5570", "without encryption"),
        ("tcp://robot.local:5570", "without encryption"),
        ("tcp://127.0.0.1", "give tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:0", "port"),
        ("tcp://127.0.0.1:65535", "port"),
        ("tcp://127.0.0.1:99999", "port"),
        ("ipc:///tmp/x", "give tcp://127.0.0.1:PORT"),
        ("127.0.0.1:5570", "give tcp://127.0.0.1:PORT"),
        ("", "give tcp://127.0.0.1:PORT"),
    ],
)
def test_addresses_that_are_refused(endpoint: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        a_publisher(dataclasses.replace(ANY_PORT, endpoint=endpoint))
    assert "\n" not in str(caught.value)


def test_addresses_to_connect_to() -> None:
    assert request_endpoint("tcp://localhost:5570") == "tcp://127.0.0.1:5571"
    assert request_endpoint("tcp://robot.local:1") == "tcp://robot.local:2"
    for endpoint in ("tcp://127.0.0.1:*", "tcp://*:5570", "tcp://:1", "http://127.0.0.1:1", "tcp://127.0.0.1:x"):
        with pytest.raises(ConfigError):
            Client(endpoint)
    with pytest.raises(ValueError, match="topics"):
        Client("tcp://127.0.0.1:5570", [])
    with pytest.raises(ValueError, match="off"):
        a_publisher(PublisherConfig(endpoint="off"))
    with a_publisher(dataclasses.replace(ANY_PORT, endpoint="tcp://localhost:*")) as publisher:
        assert publisher.endpoint.startswith("tcp://127.0.0.1:")


# --- strangers ---


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.REQ])
def test_requests_of_strangers_are_answered_or_refused(
    kind: int, connect: Callable[[int, str], zmq.Socket[bytes]]
) -> None:
    with a_publisher() as publisher:
        publisher.stream.publish_pose(a_pose(0))
        client = connect(kind, request_endpoint(publisher.endpoint))

        def answer(request: bytes) -> object:
            client.send(request)
            assert client.poll(PATIENCE_S * 1000)
            return decode(client.recv()).body

        for bad in (b"", b"rubbish", msgpack.packb({"schema": "lightvo/2"}), msgpack.packb({"schema": "lightvo/1"})):
            refusal = answer(bad)
            assert isinstance(refusal, Refusal) and refusal.reason
        tracks = answer(encode_request(Request(RequestKind.SNAPSHOT, Topic.TRACKS)))
        assert isinstance(tracks, Refusal) and "not kept" in tracks.reason
        assert publisher.num_refused == 5
        for topic, num_messages in ((Topic.POSE, 1), (Topic.CAMERA, 1), (Topic.STATUS, 1)):
            snapshot = answer(encode_request(Request(RequestKind.SNAPSHOT, topic)))
            assert isinstance(snapshot, Snapshot) and len(snapshot.messages) == num_messages
            assert decode(snapshot.messages[0]).header.topic is topic
        beyond = answer(encode_request(Request(RequestKind.SNAPSHOT, Topic.POSE, 2**60)))
        assert isinstance(beyond, Snapshot) and beyond.messages == () and beyond.num_sent == 1
        client.send(encode_request(Request(RequestKind.GOODBYE)))


def test_a_flood_of_rubbish_does_not_harm_the_publisher(connect: Callable[[int, str], zmq.Socket[bytes]]) -> None:
    with a_publisher() as publisher:
        publisher.stream.publish_pose(a_pose(0))
        for rubbish in ([b"x" * (MAX_REQUEST_BYTES + 1)], [b"", b"", b"x"], [b"a", b"b"], [b"x"] * 50):
            client = connect(zmq.DEALER, request_endpoint(publisher.endpoint))
            for _ in range(20):
                client.send_multipart(rubbish, zmq.NOBLOCK)
        with socket.create_connection(("127.0.0.1", int(publisher.endpoint.rsplit(":", 1)[1]))) as raw:
            raw.sendall(os.urandom(4096))
        wait_until(lambda: publisher.num_refused >= 60)
        with Client(publisher.endpoint) as subscriber:
            assert sequences(received(subscriber, 1)) == [0]


def test_malformed_messages_are_thrown_away_and_another_version_refused() -> None:
    """A publisher that is not ours, with nobody to answer requests."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as fake:
        port = fake.bind_to_random_port("tcp://127.0.0.1", 20_000, 60_000)
        _check_malformed(fake, f"tcp://127.0.0.1:{port}")


def _check_malformed(fake: zmq.Socket[bytes], endpoint: str) -> None:
    with Client(endpoint) as subscriber:
        assert fake.poll(PATIENCE_S * 1000)
        fake.recv()  # the subscription has arrived
        for _ in range(3):
            fake.send(b"pose\0rubbish")
        wait_until(lambda: subscriber.inbox.num_malformed == 3, lambda: subscriber.receive(0.01))
        assert subscriber.inbox.last_error is not None
        header = msgpack.packb({"schema": "lightvo/2", "arrays": {}})
        start = b"pose\0" + len(header).to_bytes(4, "little") + header
        fake.send(start + bytes(-len(start) % 8))
        with pytest.raises(VersionError, match="lightvo/2"):
            wait_until(lambda: False, lambda: subscriber.receive(0.01))


@pytest.mark.parametrize("name", ["subscribe_raw.py", "subscribe_minimal.py"])
def test_the_example_subscribers_print_what_was_published(name: str) -> None:
    """The raw one imports only pyzmq, msgpack and numpy, and takes at most 20 lines."""
    script = REPOSITORY / "tools" / name
    is_raw = name == "subscribe_raw.py"
    lines = script.read_text().split('"""', 2)[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 20
    with a_publisher() as publisher:
        isolation = ["-I"] if is_raw else []
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            [sys.executable, *isolation, str(script), publisher.endpoint],
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env=environment,
        )
        stop = threading.Event()

        def publish() -> None:
            index = 0
            while not stop.wait(0.005):
                publisher.stream.publish_pose(a_pose(index))
                index += 1

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            assert process.stdout is not None
            printed = [process.stdout.readline().split(maxsplit=3) for _ in range(20)]
        finally:
            stop.set()
            thread.join(PATIENCE_S)
            process.kill()
            process.communicate()
    first = int(printed[0][0])
    assert is_raw or first == 0
    for index, (sequence, time_ns, status, position) in enumerate(printed, first):
        assert (int(sequence), int(time_ns), status) == (index, 33_333_333 * index, "tracking")
        values = [float(value) for value in position.strip("[] \n").split()]
        assert values == pytest.approx([0.01 * index, -0.02 * index, 0.03 * index], abs=1e-6)
