"""Addresses that a publisher takes or refuses, strangers that speak to it, and subscribers in twenty lines."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq
from wire_runs import (
    ANY_PORT,
    PATIENCE_S,
    a_pose,
    a_publisher,
    nothing_left_behind,
    received,
    sequences,
    stranger_sockets,
    wait_until,
)

from vo.client import Client
from vo.config import PublisherConfig
from vo.endpoints import request_endpoint
from vo.messages import (
    MAX_REQUEST_BYTES,
    Refusal,
    Request,
    RequestKind,
    Snapshot,
    Topic,
    VersionError,
    decode,
    encode_request,
)
from vo.publisher import PublishError
from vo.types import ConfigError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def connect() -> Iterator[Callable[[int, str], zmq.Socket[bytes]]]:
    with stranger_sockets() as connected:
        yield connected


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
