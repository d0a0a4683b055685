"""Runs without a camera: publishers on ports that the system picks, and what they publish. Helpers, not tests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import zmq

from vo.client import Client, Message
from vo.config import PublisherConfig
from vo.message_stream import MessageStream
from vo.publisher import Publisher
from vo.types import Camera, FrameTracks, PoseEstimate, TrackingStatus

ANY_PORT = PublisherConfig(endpoint="tcp://127.0.0.1:*", heartbeat_hz=50.0)
PATIENCE_S = 20
CAMERA = Camera(640, 480, np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]))


def a_stream(config: PublisherConfig = ANY_PORT, session_id: str | None = None) -> MessageStream:
    return MessageStream(
        CAMERA, session_id=session_id, heartbeat_hz=config.heartbeat_hz, with_tracks=config.publish_tracks
    )


def a_publisher(config: PublisherConfig = ANY_PORT, *, accepts_scale: bool = False) -> Publisher:
    return Publisher(config, a_stream(config), accepts_scale=accepts_scale)


def a_pose(index: int) -> PoseEstimate:
    T = np.eye(4)
    T[:3, 3] = (0.01 * index, -0.02 * index, 0.03 * index)
    return PoseEstimate(index, 33_333_333 * index, T, TrackingStatus.TRACKING, np.eye(6) * 1e-4, num_inliers=index)


def some_tracks(index: int, num_tracks: int = 1000) -> FrameTracks:
    return FrameTracks(
        frame_index=index,
        timestamp_ns=33_333_333 * index,
        track_ids=np.arange(num_tracks),
        keypoints=np.full((num_tracks, 2), index, np.float32),
        lengths=np.ones(num_tracks, np.int32),
        has_landmark=np.zeros(num_tracks, np.bool_),
    )


def wait_until(condition: Callable[[], bool], meanwhile: Callable[[], object] = lambda: time.sleep(0.005)) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        meanwhile()


def wait_until_heard(client: Client) -> None:
    """Until a heartbeat has come: from then on the publisher knows of the subscription."""
    wait_until(lambda: client.inbox.last_heard_s is not None, lambda: client.receive(0.01))


def received(client: Client, num_messages: int) -> list[Message]:
    messages: list[Message] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while len(messages) < num_messages:
        message = client.receive(PATIENCE_S)
        messages += [] if message is None else [message]
        assert time.monotonic() < deadline_s, f"only {len(messages)} of {num_messages} messages came"
    return messages


def all_received(client: Client) -> list[Message]:
    """Everything up to the end of the run."""
    messages: list[Message] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while not client.inbox.is_complete:
        assert time.monotonic() < deadline_s, "the run did not end"
        message = client.receive(0.1)
        messages += [] if message is None else [message]
    return messages


def sequences(messages: list[Message]) -> list[int]:
    return [message.header.sequence for message in messages]


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Whatever goes on in it must end its threads and close its sockets."""
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == files


@contextmanager
def stranger_sockets() -> Iterator[Callable[[int, str], zmq.Socket[bytes]]]:
    """Makes sockets of strangers and closes them in the end."""
    context = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def connected(kind: int, endpoint: str) -> zmq.Socket[bytes]:
        sockets.append(context.socket(kind))
        sockets[-1].connect(endpoint)
        return sockets[-1]

    yield connected
    context.destroy(linger=0)
