"""What the messages of `lightvo/1` say, as frozen values; vo/messages.py makes bytes of them and back. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vo.types import Camera, FloatArray, FrameTracks, ImageHealth, PoseEstimate, TrackingStatus
from vo.wire import MAX_INTEGER, MAX_TEXT_LENGTH

MAX_REQUEST_BYTES = 1024
MAX_SNAPSHOT_MESSAGES = 1024
MAX_KEYFRAMES = 10_000
MAX_POINTS = 100_000
MAX_IMAGE_BYTES = 8 * 1024 * 1024
MAX_SCALE_VALUE = 1e6


class Topic(Enum):
    """What a message is about. The first seven are published; the last three answer requests."""

    POSE = "pose"
    TRACKS = "tracks"
    KEYFRAME = "keyframe"
    POINTS = "points"
    IMAGE = "image"
    STATUS = "status"
    CAMERA = "camera"
    SNAPSHOT = "snapshot"
    REPLY = "reply"
    REFUSAL = "refusal"

    @property
    def prefix(self) -> bytes:
        """What a socket subscribes to: the zero byte keeps out topics that merely begin with this one's name."""
        return self.value.encode() + b"\0"


PUBLISHED_TOPICS = (
    Topic.POSE,
    Topic.TRACKS,
    Topic.KEYFRAME,
    Topic.POINTS,
    Topic.IMAGE,
    Topic.STATUS,
    Topic.CAMERA,
)
# What a publisher keeps for late joiners: messages as they were published, or the state that they sum up to.
LOGGED_TOPICS = (Topic.POSE, Topic.STATUS, Topic.CAMERA)
MAP_TOPICS = (Topic.KEYFRAME, Topic.POINTS)


class RunState(Enum):
    """Where the run is that the messages come from; only the first is followed by more."""

    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self is not RunState.RUNNING


class RequestKind(Enum):
    """What a consumer can ask for."""

    SNAPSHOT = "snapshot"
    PING = "ping"
    STOP = "stop"
    SCALE = "scale"
    GOODBYE = "goodbye"


class ScaleQuantity(Enum):
    """What a scale reading measures, and its unit."""

    SPEED = "speed_m_s"
    DISTANCE = "distance_m"


@dataclass(frozen=True, slots=True)
class Header:
    """What every message says.

    session_id       names one run of a publisher; sequence numbers start anew with it.
    sequence         0, 1, 2, ... within the topic and the session: a gap is a loss.
    publish_time_ns  Unix time.
    status           of the last frame that was tracked.
    frame_index      the frame the message belongs to, or the last one published; None before the first.
    capture_time_ns  that frame's time on the sensor's clock.
    """

    topic: Topic
    session_id: str
    sequence: int
    publish_time_ns: int
    status: TrackingStatus
    frame_index: int | None = None
    capture_time_ns: int | None = None

    def __post_init__(self) -> None:
        check_text("session_id", self.session_id)
        for name in ("sequence", "publish_time_ns", "frame_index"):
            _check_range(name, getattr(self, name), 0)
        _check_range("capture_time_ns", self.capture_time_ns, -MAX_INTEGER)


@dataclass(frozen=True, slots=True, eq=False)
class StatusReport:
    """The heartbeat: how the run is doing.

    fps           frames per second the run keeps up.
    num_frames    frames processed.
    num_dropped   frames the source delivered and nobody had time for.
    num_sent      messages published on each topic before this one: `num_sent - 1` is its last sequence number.
    heartbeat_hz  how often this message comes: a consumer that hears nothing for longer has lost the publisher.
    image_health  of the last image that the source delivered; None before the first.
    is_camera_away  the camera has gone, and the run waits for it.
    """

    state: RunState
    fps: float = 0.0
    num_frames: int = 0
    num_dropped: int = 0
    num_sent: Mapping[Topic, int] = field(default_factory=dict)
    heartbeat_hz: float = 1.0
    image_health: ImageHealth | None = None
    is_camera_away: bool = False

    def __post_init__(self) -> None:
        for name in ("fps", "heartbeat_hz"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a finite number that is not negative, got {getattr(self, name)}")
        for name in ("num_frames", "num_dropped"):
            _check_range(name, getattr(self, name), 0)
        for topic, num_messages in self.num_sent.items():
            _check_range(f"num_sent of {topic.value}", num_messages, 0)


@dataclass(frozen=True, slots=True, eq=False)
class KeyframeUpdate:
    """Where keyframes are now: new ones, and those that the refinement of the window has moved.

    keyframe_indices        (K,) int64 frame indices, rising; `keyframe_timestamps_ns` (K,) int64 on the sensor's clock.
    T_world_keyframes       (K, 4, 4) float64; replaces what was said of these keyframes before.
    is_reset                the first message of a snapshot: what a consumer knew of keyframes before is void.
    """

    frame_index: int
    timestamp_ns: int
    segment_id: int
    scale_source: str
    keyframe_indices: NDArray[np.int64]
    keyframe_timestamps_ns: NDArray[np.int64]
    T_world_keyframes: FloatArray
    is_reset: bool = False

    def __post_init__(self) -> None:
        num_keyframes = _check_ids("keyframe_indices", self.keyframe_indices, MAX_KEYFRAMES)
        _check_array("keyframe_timestamps_ns", self.keyframe_timestamps_ns, (num_keyframes,), np.int64)
        _check_array("T_world_keyframes", self.T_world_keyframes, (num_keyframes, 4, 4), np.float64)
        check_text("scale_source", self.scale_source)
        _check_range("segment_id", self.segment_id, 0)


@dataclass(frozen=True, slots=True, eq=False)
class PointsUpdate:
    """Where landmarks are now: new ones, moved ones, and those that proved wrong.

    landmark_ids          (L,) int64 ids of their tracks, rising; `landmarks` (L, 3) float64 in the world.
    landmark_colors       (L, 3) uint8 RGB.
    removed_landmark_ids  (D,) int64, rising; none of them is in `landmark_ids`.
    is_reset              the first message of a snapshot: what a consumer knew of landmarks before is void.
    """

    frame_index: int
    timestamp_ns: int
    segment_id: int
    scale_source: str
    landmark_ids: NDArray[np.int64]
    landmarks: FloatArray
    landmark_colors: NDArray[np.uint8]
    removed_landmark_ids: NDArray[np.int64]
    is_reset: bool = False

    def __post_init__(self) -> None:
        num_landmarks = _check_ids("landmark_ids", self.landmark_ids, MAX_POINTS)
        _check_array("landmarks", self.landmarks, (num_landmarks, 3), np.float64)
        _check_array("landmark_colors", self.landmark_colors, (num_landmarks, 3), np.uint8)
        _check_ids("removed_landmark_ids", self.removed_landmark_ids, MAX_POINTS)
        check_text("scale_source", self.scale_source)
        _check_range("segment_id", self.segment_id, 0)


@dataclass(frozen=True, slots=True, eq=False)
class CompressedImage:
    """The image of a frame as a JPEG file, perhaps smaller than what the camera gave.

    width, height  px of the JPEG. A pixel p of the full image lies at (p + 0.5) s - 0.5 in it, s = width / full width.
    data           (n,) uint8, the file.
    """

    frame_index: int
    timestamp_ns: int
    width: int
    height: int
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        _check_array("data", self.data, (None,), np.uint8)
        if not 4 <= len(self.data) <= MAX_IMAGE_BYTES or bytes(self.data[:2]) != b"\xff\xd8":
            raise ValueError(
                f"data: expected a JPEG file of at most {MAX_IMAGE_BYTES} bytes, got {len(self.data)} bytes"
            )
        for name in ("width", "height"):
            _check_range(name, getattr(self, name), 1)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Answer to a request: messages of one topic.

    Of a topic that is logged they are those that were published, in order. Of `keyframe` and `points` they say
    together what all messages up to `num_sent` amount to.

    oldest_sequence  the first message that is still kept; what came before it is lost.
    num_sent         messages published on the topic so far; the snapshot may end before the last one.
    first_segment    with `first_id`: where this page of a map begins, as it was asked for; None for other topics.
    next_segment     with `next_id`: where the next page begins; None where this was the last one.
    messages         each the bytes of one message; after decoding, views into the answer.
    """

    of_topic: Topic
    oldest_sequence: int
    num_sent: int
    state: RunState
    messages: tuple[bytes | memoryview, ...]
    first_segment: int | None = None
    first_id: int | None = None
    next_segment: int | None = None
    next_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("oldest_sequence", "num_sent", "first_segment", "first_id", "next_segment", "next_id"):
            _check_range(name, getattr(self, name), 0)
        for start in ((self.first_segment, self.first_id), (self.next_segment, self.next_id)):
            if (start[0] is None) != (start[1] is None):
                raise ValueError("first_segment, first_id, next_segment, next_id: expected both or none of a pair")
        if (self.of_topic in MAP_TOPICS) != (self.first_id is not None):
            raise ValueError(f"first_segment, first_id: a page of a map has them, a {self.of_topic.value} has not")
        if len(self.messages) > MAX_SNAPSHOT_MESSAGES:
            raise ValueError(f"messages: {len(self.messages)} is above {MAX_SNAPSHOT_MESSAGES}")


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to a request that has been served and has nothing else to tell; `tag` is that of the request."""

    request: RequestKind
    tag: int = 0

    def __post_init__(self) -> None:
        _check_range("tag", self.tag, 0)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Answer to a request that cannot be served, with the reason; `tag` is that of the request, 0 if unreadable."""

    reason: str
    tag: int = 0

    def __post_init__(self) -> None:
        check_text("reason", self.reason)
        _check_range("tag", self.tag, 0)


@dataclass(frozen=True, slots=True)
class ScaleReading:
    """What an odometer, a speed sensor or the like says about the true scale of the motion.

    value                m/s or m, according to `quantity`; not negative.
    timestamp_ns         when it was measured, on the clock of the frames; None: now, at the latest frame published.
    start_timestamp_ns   of a distance: when the way began that ended at `timestamp_ns`; None of a speed.
    """

    quantity: ScaleQuantity
    value: float
    timestamp_ns: int | None = None
    start_timestamp_ns: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and 0 <= self.value <= MAX_SCALE_VALUE):
            raise ValueError(f"value: expected 0..{MAX_SCALE_VALUE:g}, got {self.value}")
        for name in ("timestamp_ns", "start_timestamp_ns"):
            _check_range(name, getattr(self, name), -MAX_INTEGER)
        if (self.quantity is ScaleQuantity.DISTANCE) != (self.start_timestamp_ns is not None):
            raise ValueError("start_timestamp_ns: a distance needs it, a speed has none")
        start_ns, end_ns = self.start_timestamp_ns, self.timestamp_ns
        if start_ns is not None and end_ns is not None and start_ns >= end_ns:
            raise ValueError(f"start_timestamp_ns: expected a time before {end_ns}, got {start_ns}")


@dataclass(frozen=True, slots=True)
class Request:
    """What a consumer asks for.

    topic           of a snapshot.
    first_sequence  of a snapshot of a logged topic: the first message wanted.
    first_segment, first_id   of a snapshot of a map: where the page begins.
    scale           what a scale request brings.
    tag             any number; the answer repeats it, so that several requests may be under way.
    """

    kind: RequestKind
    topic: Topic = Topic.POSE
    first_sequence: int = 0
    first_segment: int = 0
    first_id: int = 0
    scale: ScaleReading | None = None
    tag: int = 0

    def __post_init__(self) -> None:
        for name in ("first_sequence", "first_segment", "first_id", "tag"):
            _check_range(name, getattr(self, name), 0)
        if (self.kind is RequestKind.SCALE) != (self.scale is not None):
            raise ValueError("scale: a scale request needs a reading, others have none")


FrameBody = PoseEstimate | FrameTracks | KeyframeUpdate | PointsUpdate | CompressedImage
Body = FrameBody | StatusReport | Camera | Snapshot | Reply | Refusal
_BODIES: dict[Topic, type] = {
    Topic.POSE: PoseEstimate,
    Topic.TRACKS: FrameTracks,
    Topic.KEYFRAME: KeyframeUpdate,
    Topic.POINTS: PointsUpdate,
    Topic.IMAGE: CompressedImage,
    Topic.STATUS: StatusReport,
    Topic.CAMERA: Camera,
    Topic.SNAPSHOT: Snapshot,
    Topic.REPLY: Reply,
    Topic.REFUSAL: Refusal,
}


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message: its header and what it carries. Raises ValueError where the two disagree."""

    header: Header
    body: Body

    def __post_init__(self) -> None:
        header, body = self.header, self.body
        if not isinstance(body, _BODIES[header.topic]):
            raise ValueError(f"topic {header.topic.value} does not carry {type(body).__name__}")
        if isinstance(body, FrameBody) and (
            (header.frame_index, header.capture_time_ns) != (body.frame_index, body.timestamp_ns)
        ):
            raise ValueError(f"header of frame {header.frame_index} on a {header.topic.value} of {body.frame_index}")
        if isinstance(body, PoseEstimate) and header.status is not body.status:
            raise ValueError(f"header says {header.status.value}, the pose {body.status.value}")


def _check_range(name: str, value: int | None, minimum: int) -> None:
    if value is not None and not minimum <= value <= MAX_INTEGER:
        raise ValueError(f"{name}: expected {minimum}..{MAX_INTEGER}, got {value}")


def check_text(name: str, text: str) -> None:
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"{name}: text of {len(text)} characters is above {MAX_TEXT_LENGTH}")


def _check_array(name: str, array: NDArray[Any], shape: tuple[int | None, ...], dtype: type) -> None:
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        expected = tuple("*" if length is None else length for length in shape)
        raise ValueError(f"{name}: expected {expected} {np.dtype(dtype).name}, got {array.shape} {array.dtype}")
    array.setflags(write=False)


def _check_ids(name: str, ids: NDArray[np.int64], max_length: int) -> int:
    _check_array(name, ids, (None,), np.int64)
    if len(ids) > max_length:
        raise ValueError(f"{name}: {len(ids)} is above {max_length}")
    if np.any(ids[:1] < 0) or np.any(ids[1:] <= ids[:-1]):
        raise ValueError(f"{name}: expected rising numbers from 0")
    return len(ids)
