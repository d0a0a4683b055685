"""Sends the messages of a recording again: the same bytes in the same order and rhythm, published now.

A `RecordedStream` takes the place of the `MessageStream` of a run, so that the publisher of a run publishes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgpack

from vo.mcap_recorder import own_topic
from vo.message_stream import Consumer, EncodedMessage, Interest
from vo.messages import (
    PUBLISHED_TOPICS,
    Header,
    Message,
    ProtocolError,
    RunState,
    StatusReport,
    Topic,
    decode,
    encode,
)
from vo.recording import RecordedMessage, Recording, RecordingError
from vo.types import PoseEstimate, TrackingStatus
from vo.wire import ALIGNMENT_BYTES

# What a consumer needs from the time before the start to stand where a consumer of the run would have stood.
STATE_TOPICS = (Topic.POSE, Topic.KEYFRAME, Topic.POINTS, Topic.CAMERA)
NS_PER_S = 1_000_000_000
_BEAT_S = 1.0
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Passage:
    """Which part of a recording is played, and how fast.

    start_s, end_s  from the first message, on the clock of the recording; `end_s` None: to the last one.
    rate            2 plays twice as fast.
    """

    start_s: float = 0.0
    end_s: float | None = None
    rate: float = 1.0


class RecordedStream:
    """A recording as the source of a publisher's messages. Consumers are called in the thread that plays.

    session_id   of the run that was recorded, or of the pass through it.
    num_sent     messages sent, by topic.
    """

    def __init__(self, recording: Recording, *, pass_index: int = 0, clock: Callable[[], int] = time.time_ns) -> None:
        """`pass_index` above 0 makes another session of it. Raises RecordingError where it holds no messages."""
        first = next(recording.messages(_OWN_TOPICS), None)
        if first is None:
            raise RecordingError(f"{recording.path}: holds no messages of lightvo; record some: vo run ... --record F")
        session_id = decoded(first, recording).header.session_id
        self._recording, self._clock = recording, clock
        self._new_session_id = f"{session_id}-{pass_index}" if pass_index else None
        self._session_id = self._new_session_id or session_id
        self._consumers: list[Consumer] = []
        self._report = StatusReport(RunState.RUNNING)
        self._last: Header | None = None
        self._next_sequence = dict.fromkeys(PUBLISHED_TOPICS, 0)
        self.num_sent = dict.fromkeys(PUBLISHED_TOPICS, 0)
        self._lock = threading.RLock()

    @property
    def session_id(self) -> str:
        return self._session_id

    @property
    def state(self) -> RunState:
        return self._report.state

    @property
    def has_consumers(self) -> bool:
        return bool(self._consumers)

    def add_consumer(self, consumer: Consumer, wants: Interest | None = None) -> None:
        """Hands every message from now on to `consumer`, in order, in the thread that plays: it must not wait."""
        with self._lock:
            self._consumers.append(consumer)

    def remove_consumer(self, consumer: Consumer) -> None:
        """Ends that; does nothing where it has ended already."""
        with self._lock:
            if consumer in self._consumers:
                self._consumers.remove(consumer)

    def beat_if_due(self) -> float:
        """The heartbeats are those of the recording: none is due."""
        return _BEAT_S

    def play(self, passage: Passage, stop: threading.Event) -> None:
        """Sends the passage in its rhythm; ends early when `stop` is set.

        The path and the map from before the start go out at once.
        """
        recording = self._recording
        start_ns = recording.start_ns + round(passage.start_s * NS_PER_S)
        end_ns = None if passage.end_s is None else recording.start_ns + round(passage.end_s * NS_PER_S)
        if passage.start_s > 0:
            earlier = tuple(own_topic(topic) for topic in STATE_TOPICS)
            for message in recording.messages(earlier, end_ns=start_ns - 1):
                self._send(message)
                if stop.is_set():
                    return
        began_s = time.monotonic()
        for message in recording.messages(_OWN_TOPICS, start_ns, end_ns):
            due_s = began_s + (message.time_ns - start_ns) / NS_PER_S / passage.rate
            if stop.wait(max(0.0, due_s - time.monotonic())):
                return
            self._send(message)

    def finish(self, state: RunState = RunState.FINISHED) -> None:
        """Announces the end, unless the recording did: a killed run, or a passage, has no final state of its own."""
        with self._lock:
            if self.state.is_final:
                return
            self._report = StatusReport(
                state,
                self._report.fps,
                self._report.num_frames,
                self._report.num_dropped,
                dict(self._next_sequence),
                self._report.heartbeat_hz,
            )
            header = self.answer_header(Topic.STATUS, self._next_sequence[Topic.STATUS])
            self._hand_out(header, encode(Message(header, self._report)))

    def answer_header(self, topic: Topic, sequence: int) -> Header:
        """The header of an answer to a request."""
        last = self._last
        return Header(
            topic=topic,
            session_id=self.session_id,
            sequence=sequence,
            publish_time_ns=self._clock(),
            status=TrackingStatus.INITIALIZING if last is None else last.status,
            frame_index=None if last is None else last.frame_index,
            capture_time_ns=None if last is None else last.capture_time_ns,
        )

    def _send(self, recorded: RecordedMessage) -> None:
        """Hands out one message, as published now."""
        message = decoded(recorded, self._recording)
        data = restamped(recorded.data, self._clock(), self._new_session_id)
        with self._lock:
            if isinstance(message.body, PoseEstimate):
                self._last = message.header
            if isinstance(message.body, StatusReport):
                self._report = message.body
            self._hand_out(message.header, data)

    def _hand_out(self, header: Header, data: bytes) -> None:
        encoded = EncodedMessage(
            header.topic, data, header.capture_time_ns or 0, header.publish_time_ns, header.sequence
        )
        self._next_sequence[header.topic] = header.sequence + 1
        self.num_sent[header.topic] += 1
        for consumer in tuple(self._consumers):
            consumer(encoded)


_OWN_TOPICS = tuple(own_topic(topic) for topic in PUBLISHED_TOPICS)


def decoded(recorded: RecordedMessage, recording: Recording) -> Message:
    """A recorded message of `lightvo/1`. Raises RecordingError where it is none."""
    try:
        return decode(recorded.data)
    except ProtocolError as error:
        raise RecordingError(f"{recording.path}: {recorded.topic}: {error}") from error


def own_messages(
    recording: Recording, topics: tuple[Topic, ...], start_ns: int | None = None, end_ns: int | None = None
) -> Iterator[Message]:
    """The recorded messages of some topics, decoded. Raises RecordingError."""
    for recorded in recording.messages([own_topic(topic) for topic in topics], start_ns, end_ns):
        yield decoded(recorded, recording)


def restamped(data: bytes, publish_time_ns: int, session_id: str | None = None) -> bytes:
    """The message with another publish time, and another session if one is given; all else is kept, byte for byte.

    Also keys that this version does not know: the header is changed as it is, not made anew.
    """
    topic_end = data.index(b"\0") + 1
    header_start = topic_end + _LENGTH_BYTES
    header_end = header_start + int.from_bytes(data[topic_end:header_start], "little")
    header = msgpack.unpackb(data[header_start:header_end])
    header["publish_time_ns"] = publish_time_ns
    if session_id is not None:
        header["session"] = session_id
    packed = msgpack.packb(header)
    start = data[:topic_end] + len(packed).to_bytes(_LENGTH_BYTES, "little") + packed
    return bytes(start.ljust(_aligned(len(start)), b"\0") + data[_aligned(header_end) :])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
