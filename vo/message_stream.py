"""What a run says, once for all who listen: it numbers and encodes every message, and hands out the same bytes.

No socket and no thread: the publisher's sockets are one consumer, a recorder another.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vo.message_types import MAX_KEYFRAMES, MAX_POINTS, FrameBody
from vo.messages import (
    PUBLISHED_TOPICS,
    Body,
    CompressedImage,
    Header,
    KeyframeUpdate,
    Message,
    PointsUpdate,
    RunState,
    StatusReport,
    Topic,
    encode,
)
from vo.types import Camera, FrameTracks, ImageHealth, MapUpdate, PoseEstimate, TrackingStatus

FINAL_PERIOD_S = 0.1


@dataclass(frozen=True, slots=True)
class EncodedMessage:
    """The bytes of one message and what a consumer may need to know without reading them.

    capture_ns  time of its frame on the sensor's clock; 0 before the first frame.
    publish_ns  Unix time.
    sequence    0, 1, 2, ... within the topic and the session.
    """

    topic: Topic
    data: bytes
    capture_ns: int
    publish_ns: int
    sequence: int


Consumer = Callable[[EncodedMessage], None]
Interest = Callable[[Topic], bool]


class MessageSource(Protocol):
    """Where a publisher gets its messages from: a run (`MessageStream`) or the recording of one."""

    @property
    def session_id(self) -> str: ...

    @property
    def state(self) -> RunState: ...

    def add_consumer(self, consumer: Consumer, wants: Interest | None = None) -> None:
        """Hands every message from now on to `consumer`, in order, in the thread that publishes: it must not wait.

        `wants` tells whether a topic is of any use to it at present; None: all of them always are.
        """

    def remove_consumer(self, consumer: Consumer) -> None:
        """Ends that; does nothing where it has ended already."""

    def beat_if_due(self) -> float:
        """Sends the heartbeat when it is time for one; the seconds until the next one, not negative."""

    def finish(self, state: RunState = RunState.FINISHED) -> None:
        """Announces the end; a final state that was announced before is kept."""

    def answer_header(self, topic: Topic, sequence: int) -> Header:
        """The header of an answer to a request."""


class MessageStream:
    """The messages of one run. Every method may be called from any thread; consumers are called one at a time.

    session_id  names the run.
    num_sent    messages so far, by topic.
    """

    def __init__(
        self,
        camera: Camera,
        *,
        session_id: str | None = None,
        heartbeat_hz: float = 1.0,
        with_tracks: bool = True,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """`clock` gives Unix time in ns."""
        self.camera = camera
        self._session_id = session_id if session_id is not None else secrets.token_hex(8)
        self.num_sent = dict.fromkeys(PUBLISHED_TOPICS, 0)
        self._with_tracks, self._clock = with_tracks, clock
        self._consumers: list[tuple[Consumer, Interest | None]] = []
        self._last_pose: PoseEstimate | None = None
        self._report = StatusReport(RunState.RUNNING, heartbeat_hz=heartbeat_hz)
        self._next_beat_s = time.monotonic()
        self._lock = threading.RLock()

    def __enter__(self) -> MessageStream:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.finish(final_state(error_type))

    @property
    def session_id(self) -> str:
        return self._session_id

    @property
    def state(self) -> RunState:
        return self._report.state

    def is_wanted(self, topic: Topic) -> bool:
        """Whether anybody has a use for a topic at present; what is costly to make can be left out otherwise."""
        with self._lock:
            return any(wants is None or wants(topic) for _, wants in self._consumers)

    def add_consumer(self, consumer: Consumer, wants: Interest | None = None) -> None:
        """Hands every message from now on to `consumer`, in order, in the thread that publishes: it must not wait.

        `wants` tells whether a topic is of any use to it at present; None: all of them always are.
        """
        with self._lock:
            self._consumers.append((consumer, wants))

    def remove_consumer(self, consumer: Consumer) -> None:
        """Ends that; does nothing where it has ended already."""
        with self._lock:
            self._consumers = [(known, wants) for known, wants in self._consumers if known != consumer]

    def publish_pose(self, pose: PoseEstimate) -> None:
        """One pose, also that of a frame that is lost."""
        with self._lock:
            self._check_running()
            self._last_pose = pose
            self._send(Topic.POSE, pose)

    def publish_tracks(self, tracks: FrameTracks) -> None:
        """The tracks of one frame, after its pose; does nothing in a stream without tracks."""
        if not self._with_tracks:
            return
        with self._lock:
            self._check_running()
            self._send(Topic.TRACKS, tracks)

    def publish_map(self, update: MapUpdate) -> None:
        """Corrected keyframes and landmarks, each on its topic; more than a message may hold goes into several."""
        with self._lock:
            self._check_running()
            for keyframes in keyframe_updates(update):
                self._send(Topic.KEYFRAME, keyframes)
            for points in points_updates(update):
                self._send(Topic.POINTS, points)

    def publish_image(self, image: CompressedImage) -> None:
        """The image of one frame, after its pose."""
        with self._lock:
            self._check_running()
            self._send(Topic.IMAGE, image)

    def publish_status(
        self,
        *,
        fps: float = 0.0,
        num_frames: int = 0,
        num_dropped: int = 0,
        image_health: ImageHealth | None = None,
    ) -> None:
        """Says how the run is doing. The figures go out with the next heartbeat, so call it freely."""
        with self._lock:
            self._check_running()
            self._report = replace(
                self._report, fps=fps, num_frames=num_frames, num_dropped=num_dropped, image_health=image_health
            )
            self.beat_if_due()

    def note_camera(self, *, is_away: bool) -> None:
        """Says, with the next heartbeat and from whatever thread, whether the camera is there."""
        with self._lock:
            self._report = replace(self._report, is_camera_away=is_away)

    def beat_if_due(self) -> float:
        """Sends camera and status when it is time for them; the seconds until the next time, not negative.

        The final state is repeated more often: the queue of a consumer that lags may be full, and drop it.
        """
        with self._lock:
            now_s = time.monotonic()
            if now_s >= self._next_beat_s:
                period_s = FINAL_PERIOD_S if self.state.is_final else 1 / self._report.heartbeat_hz
                self._next_beat_s = now_s + period_s
                self._send(Topic.CAMERA, self.camera)
                self._send_status()
            return max(0.0, self._next_beat_s - now_s)

    def finish(self, state: RunState = RunState.FINISHED) -> None:
        """Announces the end at once; a final state that was announced before is kept. No frame may follow."""
        if not state.is_final:
            raise ValueError(f"state: {state.value} is not final")
        with self._lock:
            if self.state.is_final:
                return
            self._report = replace(self._report, state=state)
            self._send_status()
            self._next_beat_s = time.monotonic() + FINAL_PERIOD_S

    def answer_header(self, topic: Topic, sequence: int) -> Header:
        """The header of an answer to a request."""
        with self._lock:
            return self._header(topic, sequence, None)

    def _check_running(self) -> None:
        if self.state.is_final:
            raise ValueError(f"the stream is closed: its run has {self.state.value}")

    def _send(self, topic: Topic, body: Body) -> None:
        """Numbers, encodes and hands out one message, if to anybody; the lock is held."""
        header = self._header(topic, self.num_sent[topic], body)
        self.num_sent[topic] += 1
        if not self._consumers:
            return
        data = encode(Message(header, body))
        message = EncodedMessage(topic, data, header.capture_time_ns or 0, header.publish_time_ns, header.sequence)
        for consumer, _ in tuple(self._consumers):
            consumer(message)

    def _send_status(self) -> None:
        """The last report with the present counts; the lock is held."""
        self._send(Topic.STATUS, replace(self._report, num_sent=dict(self.num_sent)))

    def _header(self, topic: Topic, sequence: int, body: Body | None) -> Header:
        frame = body if isinstance(body, FrameBody) else self._last_pose
        return Header(
            topic=topic,
            session_id=self.session_id,
            sequence=sequence,
            publish_time_ns=self._clock(),
            status=TrackingStatus.INITIALIZING if self._last_pose is None else self._last_pose.status,
            frame_index=None if frame is None else frame.frame_index,
            capture_time_ns=None if frame is None else frame.timestamp_ns,
        )


def final_state(error_type: type[BaseException] | None) -> RunState:
    """How a run ended that left its `with` block by `error_type`."""
    if error_type is None:
        return RunState.FINISHED
    return RunState.INTERRUPTED if issubclass(error_type, KeyboardInterrupt) else RunState.FAILED


def keyframe_updates(update: MapUpdate, max_keyframes: int = MAX_KEYFRAMES) -> list[KeyframeUpdate]:
    """What `update` says of keyframes, in as many messages as it takes: none where it says nothing."""
    return [
        KeyframeUpdate(
            update.frame_index,
            update.timestamp_ns,
            update.segment_id,
            update.scale_source,
            update.keyframe_indices[start : start + max_keyframes],
            update.keyframe_timestamps_ns[start : start + max_keyframes],
            update.T_world_keyframes[start : start + max_keyframes],
        )
        for start in range(0, len(update.keyframe_indices), max_keyframes)
    ]


def points_updates(update: MapUpdate, max_points: int = MAX_POINTS) -> list[PointsUpdate]:
    """What `update` says of landmarks, in as many messages as it takes: none where it says nothing."""
    removed = np.unique(update.removed_landmark_ids)
    num_messages = -(-max(len(update.landmark_ids), len(removed)) // max_points)
    parts = [slice(start * max_points, (start + 1) * max_points) for start in range(num_messages)]
    return [
        PointsUpdate(
            update.frame_index,
            update.timestamp_ns,
            update.segment_id,
            update.scale_source,
            update.landmark_ids[part],
            update.landmarks[part],
            update.landmark_colors[part],
            removed[part],
        )
        for part in parts
    ]
