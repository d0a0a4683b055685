"""The messages of `lightvo/1`: what each topic carries, to bytes and back. Pure: no socket, no clock, no thread.

docs/PROTOCOL.md is the specification; vo/wire.py holds the outer form and its limits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vo import wire
from vo.types import Camera, CameraModel, FloatArray, FrameTracks, PoseEstimate, Rejection, TrackingStatus
from vo.wire import MAX_INTEGER, MAX_TEXT_LENGTH, SCHEMA, Arrays, Fields, ProtocolError, VersionError

__all__ = [
    "MAX_REQUEST_BYTES",
    "MAX_SNAPSHOT_MESSAGES",
    "PUBLISHED_TOPICS",
    "SCHEMA",
    "Body",
    "Header",
    "Message",
    "ProtocolError",
    "Refusal",
    "Request",
    "RequestKind",
    "RunState",
    "Snapshot",
    "StatusReport",
    "Topic",
    "VersionError",
    "decode",
    "decode_request",
    "encode",
    "encode_request",
    "quat_xyzw_from_rotation",
]

WORLD_FRAME, CAMERA_FRAME = "world", "camera"
MAX_REQUEST_BYTES = 1024
MAX_SNAPSHOT_MESSAGES = 1024
ROTATION_TOLERANCE = 1e-6

ArrayMap = dict[str, NDArray[Any]]


class Topic(Enum):
    """What a message is about. The first four are published; the last two answer requests."""

    POSE = "pose"
    TRACKS = "tracks"
    STATUS = "status"
    CAMERA = "camera"
    SNAPSHOT = "snapshot"
    REFUSAL = "refusal"

    @property
    def prefix(self) -> bytes:
        """What a socket subscribes to: the zero byte keeps out topics that merely begin with this one's name."""
        return self.value.encode() + b"\0"


PUBLISHED_TOPICS = (Topic.POSE, Topic.TRACKS, Topic.STATUS, Topic.CAMERA)


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
    GOODBYE = "goodbye"


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
        _check_text("session_id", self.session_id)
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
    """

    state: RunState
    fps: float = 0.0
    num_frames: int = 0
    num_dropped: int = 0
    num_sent: Mapping[Topic, int] = field(default_factory=dict)
    heartbeat_hz: float = 1.0

    def __post_init__(self) -> None:
        for name in ("fps", "heartbeat_hz"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a finite number that is not negative, got {getattr(self, name)}")
        for name in ("num_frames", "num_dropped"):
            _check_range(name, getattr(self, name), 0)
        for topic, num_messages in self.num_sent.items():
            _check_range(f"num_sent of {topic.value}", num_messages, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Answer to a request: messages of one topic as they were published, in order.

    oldest_sequence  the first message that is still kept; what came before it is lost.
    num_sent         messages published on the topic so far; the snapshot may end before the last one.
    messages         each the bytes of one message; after decoding, views into the answer.
    """

    of_topic: Topic
    oldest_sequence: int
    num_sent: int
    state: RunState
    messages: tuple[bytes | memoryview, ...]

    def __post_init__(self) -> None:
        _check_range("oldest_sequence", self.oldest_sequence, 0)
        _check_range("num_sent", self.num_sent, 0)
        if len(self.messages) > MAX_SNAPSHOT_MESSAGES:
            raise ValueError(f"messages: {len(self.messages)} is above {MAX_SNAPSHOT_MESSAGES}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Answer to a request that cannot be served, with the reason."""

    reason: str

    def __post_init__(self) -> None:
        _check_text("reason", self.reason)


@dataclass(frozen=True, slots=True)
class Request:
    """What a consumer asks for: messages of a topic from a sequence number on, or to be waited for no more."""

    kind: RequestKind
    topic: Topic = Topic.POSE
    first_sequence: int = 0

    def __post_init__(self) -> None:
        _check_range("first_sequence", self.first_sequence, 0)


Body = PoseEstimate | FrameTracks | StatusReport | Camera | Snapshot | Refusal
_BODIES: dict[Topic, type] = {
    Topic.POSE: PoseEstimate,
    Topic.TRACKS: FrameTracks,
    Topic.STATUS: StatusReport,
    Topic.CAMERA: Camera,
    Topic.SNAPSHOT: Snapshot,
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
        if isinstance(body, PoseEstimate | FrameTracks) and (
            (header.frame_index, header.capture_time_ns) != (body.frame_index, body.timestamp_ns)
        ):
            raise ValueError(f"header of frame {header.frame_index} on a {header.topic.value} of {body.frame_index}")
        if isinstance(body, PoseEstimate) and header.status is not body.status:
            raise ValueError(f"header says {header.status.value}, the pose {body.status.value}")


def quat_xyzw_from_rotation(R: FloatArray) -> FloatArray:
    """Unit quaternion (x, y, z, w), w >= 0, of a rotation matrix (3, 3).

    Four times the outer product of the quaternion with itself is linear in R; its row with the largest diagonal
    entry is the quaternion times a number that is never near zero.
    """
    outer = np.array(
        [
            [1 + R[0, 0] - R[1, 1] - R[2, 2], R[1, 0] + R[0, 1], R[2, 0] + R[0, 2], R[2, 1] - R[1, 2]],
            [R[1, 0] + R[0, 1], 1 - R[0, 0] + R[1, 1] - R[2, 2], R[2, 1] + R[1, 2], R[0, 2] - R[2, 0]],
            [R[2, 0] + R[0, 2], R[2, 1] + R[1, 2], 1 - R[0, 0] - R[1, 1] + R[2, 2], R[1, 0] - R[0, 1]],
            [R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1], 1 + R[0, 0] + R[1, 1] + R[2, 2]],
        ]
    )
    row = outer[np.argmax(np.diagonal(outer))]
    quat: FloatArray = row / (np.linalg.norm(row) if row[3] >= 0 else -np.linalg.norm(row))
    return quat


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises ValueError where it is larger than the protocol allows."""
    header, (extra, arrays) = message.header, _encode_body(message.body)
    fields = {
        "session": header.session_id,
        "sequence": header.sequence,
        "frame_index": header.frame_index,
        "capture_time_ns": header.capture_time_ns,
        "publish_time_ns": header.publish_time_ns,
        "status": header.status.value,
    }
    return wire.pack(header.topic.value, fields | extra, arrays)


def decode(data: bytes | memoryview) -> Message:
    """The message in `data`; its arrays are read-only views into `data`.

    Raises VersionError for another major version, ProtocolError for everything else that is not a valid message.
    """
    name, fields, arrays = wire.unpack(data)
    topic = next((topic for topic in Topic if topic.value == name), None)
    if topic is None:
        raise ProtocolError(f"unknown topic {wire.shown(name)}")
    header = Header(
        topic=topic,
        session_id=fields.text("session"),
        sequence=fields.integer("sequence"),
        frame_index=fields.optional_integer("frame_index"),
        capture_time_ns=fields.optional_integer("capture_time_ns", -MAX_INTEGER),
        publish_time_ns=fields.integer("publish_time_ns"),
        status=fields.choice("status", TrackingStatus),
    )
    try:
        return Message(header, _DECODERS[topic](header, fields, arrays))
    except ValueError as error:
        raise ProtocolError(f"{name}: {error}") from error


def encode_request(request: Request) -> bytes:
    """The bytes of a request: one MessagePack map."""
    fields: dict[str, object] = {"request": request.kind.value}
    if request.kind is RequestKind.SNAPSHOT:
        fields |= {"topic": request.topic.value, "first_sequence": request.first_sequence}
    return wire.pack_fields(fields)


def decode_request(data: bytes | memoryview) -> Request:
    """The request in `data`. Raises VersionError and ProtocolError like `decode`."""
    if len(data) > MAX_REQUEST_BYTES:
        raise ProtocolError(f"request of {len(data)} bytes is above {MAX_REQUEST_BYTES}")
    fields = wire.unpack_fields(data)
    kind = fields.choice("request", RequestKind)
    if kind is RequestKind.GOODBYE:
        return Request(kind)
    topic = fields.choice("topic", Topic)
    if topic not in PUBLISHED_TOPICS:
        raise ProtocolError(f"topic: {topic.value} is not published")
    return Request(kind, topic, fields.integer("first_sequence"))


def _encode_body(body: Body) -> tuple[dict[str, object], ArrayMap]:
    match body:
        case PoseEstimate():
            return _encode_pose(body)
        case FrameTracks():
            return {}, {
                "track_ids": body.track_ids.astype("<i8", copy=False),
                "keypoints": body.keypoints.astype("<f4", copy=False),
                "lengths": body.lengths.astype("<i4", copy=False),
                "has_landmark": body.has_landmark.astype("|u1"),
            }
        case StatusReport():
            return {
                "state": body.state.value,
                "fps": float(body.fps),
                "num_frames": body.num_frames,
                "num_dropped": body.num_dropped,
                "num_sent": {topic.value: body.num_sent.get(topic, 0) for topic in PUBLISHED_TOPICS},
                "heartbeat_hz": float(body.heartbeat_hz),
            }, {}
        case Camera():
            return {"width": body.width, "height": body.height, "model": body.model.value}, {
                "K": body.K.astype("<f8", copy=False),
                "distortion": body.distortion.astype("<f8", copy=False),
            }
        case Snapshot():
            return {
                "of_topic": body.of_topic.value,
                "oldest_sequence": body.oldest_sequence,
                "num_sent": body.num_sent,
                "state": body.state.value,
            }, {
                "message_lengths": np.array([len(message) for message in body.messages], "<i8"),
                "messages": np.frombuffer(b"".join(body.messages), "|u1"),
            }
        case Refusal():
            return {"reason": body.reason}, {}


def _encode_pose(pose: PoseEstimate) -> tuple[dict[str, object], ArrayMap]:
    _check_text("scale_source", pose.scale_source)
    fields: dict[str, object] = {
        "parent_frame": WORLD_FRAME,
        "child_frame": CAMERA_FRAME,
        "segment_id": int(pose.segment_id),
        "scale_source": pose.scale_source,
        "rejection": None if pose.rejection is None else pose.rejection.value,
        "num_matches": int(pose.num_matches),
        "num_inliers": int(pose.num_inliers),
        "is_keyframe": bool(pose.is_keyframe),
        "is_stationary": bool(pose.is_stationary),
    }
    arrays: ArrayMap = {}
    if pose.T_world_camera is not None:
        T = pose.T_world_camera.astype("<f8", copy=False)
        arrays |= {
            "position_xyz": T[:3, 3],
            "quat_xyzw": quat_xyzw_from_rotation(T[:3, :3]).astype("<f8", copy=False),
            "T_world_camera": T,
        }
    if pose.covariance is not None:
        arrays["covariance"] = pose.covariance.astype("<f8", copy=False)
    return fields, arrays


def _decode_pose(header: Header, fields: Fields, arrays: Arrays) -> PoseEstimate:
    for key, expected in (("parent_frame", WORLD_FRAME), ("child_frame", CAMERA_FRAME)):
        if fields.text(key) != expected:
            raise ProtocolError(f"{key}: expected {expected}, got {wire.shown(fields.text(key))}")
    if header.frame_index is None or header.capture_time_ns is None:
        raise ProtocolError("a pose without frame_index or capture_time_ns")
    return PoseEstimate(
        frame_index=header.frame_index,
        timestamp_ns=header.capture_time_ns,
        T_world_camera=_decode_T_world_camera(arrays) if "T_world_camera" in arrays else None,
        covariance=arrays.take("covariance", "<f8", (6, 6)) if "covariance" in arrays else None,
        status=header.status,
        rejection=fields.optional_choice("rejection", Rejection),
        num_matches=fields.integer("num_matches"),
        num_inliers=fields.integer("num_inliers"),
        is_keyframe=fields.flag("is_keyframe"),
        is_stationary=fields.flag("is_stationary"),
        segment_id=fields.integer("segment_id"),
        scale_source=fields.text("scale_source"),
    )


def _decode_T_world_camera(arrays: Arrays) -> FloatArray:
    """The pose as a matrix; the same as position and quaternion must be there too, for readers that want those."""
    arrays.take("position_xyz", "<f8", (3,))
    arrays.take("quat_xyzw", "<f8", (4,))
    T: FloatArray = arrays.take("T_world_camera", "<f8", (4, 4))
    R = T[:3, :3]
    is_finite = np.abs(T).max() <= np.finfo(np.float32).max  # False for NaN; the bound keeps R @ R.T from overflowing
    if not is_finite or np.any(T[3] != (0, 0, 0, 1)):
        raise ProtocolError("T_world_camera: expected finite values and a last row of 0 0 0 1")
    if np.abs(R @ R.T - np.eye(3)).max() > ROTATION_TOLERANCE or np.linalg.det(R) < 0:
        raise ProtocolError("T_world_camera: expected a rotation")
    return T


def _decode_tracks(header: Header, fields: Fields, arrays: Arrays) -> FrameTracks:
    if header.frame_index is None or header.capture_time_ns is None:
        raise ProtocolError("tracks without frame_index or capture_time_ns")
    has_landmark = arrays.take("has_landmark", "|u1", (None,))
    if has_landmark.max(initial=0) > 1:
        raise ProtocolError("arrays: has_landmark: expected 0 or 1")
    return FrameTracks(
        frame_index=header.frame_index,
        timestamp_ns=header.capture_time_ns,
        track_ids=arrays.take("track_ids", "<i8", (None,)),
        keypoints=arrays.take("keypoints", "<f4", (None, 2)),
        lengths=arrays.take("lengths", "<i4", (None,)),
        has_landmark=has_landmark.view(np.bool_),
    )


def _decode_status(header: Header, fields: Fields, arrays: Arrays) -> StatusReport:
    num_sent = Fields(fields.mapping("num_sent"))
    return StatusReport(
        state=fields.choice("state", RunState),
        fps=fields.number("fps"),
        num_frames=fields.integer("num_frames"),
        num_dropped=fields.integer("num_dropped"),
        num_sent={topic: num_sent.integer(topic.value) for topic in PUBLISHED_TOPICS},
        heartbeat_hz=fields.number("heartbeat_hz"),
    )


def _decode_camera(header: Header, fields: Fields, arrays: Arrays) -> Camera:
    K = arrays.take("K", "<f8", (3, 3))
    distortion = arrays.take("distortion", "<f8", (None,))
    if not (np.isfinite(K).all() and np.isfinite(distortion).all()):
        raise ProtocolError("arrays: K, distortion: expected finite values")
    return Camera(
        width=fields.integer("width", 1),
        height=fields.integer("height", 1),
        K=K,
        distortion=distortion,
        model=fields.choice("model", CameraModel),
    )


def _decode_snapshot(header: Header, fields: Fields, arrays: Arrays) -> Snapshot:
    lengths = arrays.take("message_lengths", "<i8", (None,))
    data = arrays.take("messages", "|u1", (None,)).data
    if len(lengths) > MAX_SNAPSHOT_MESSAGES:
        raise ProtocolError(f"arrays: message_lengths: {len(lengths)} messages are above {MAX_SNAPSHOT_MESSAGES}")
    ends = [0]
    for length in lengths.tolist():
        if length < 1:
            raise ProtocolError(f"arrays: message_lengths: a message of {length} bytes")
        ends.append(ends[-1] + length)
    if ends[-1] != len(data):
        raise ProtocolError(f"arrays: message_lengths: they sum to {ends[-1]}, the messages to {len(data)} bytes")
    return Snapshot(
        of_topic=fields.choice("of_topic", Topic),
        oldest_sequence=fields.integer("oldest_sequence"),
        num_sent=fields.integer("num_sent"),
        state=fields.choice("state", RunState),
        messages=tuple(data[start:end] for start, end in itertools.pairwise(ends)),
    )


def _decode_refusal(header: Header, fields: Fields, arrays: Arrays) -> Refusal:
    return Refusal(fields.text("reason"))


_DECODERS: dict[Topic, Callable[[Header, Fields, Arrays], Body]] = {
    Topic.POSE: _decode_pose,
    Topic.TRACKS: _decode_tracks,
    Topic.STATUS: _decode_status,
    Topic.CAMERA: _decode_camera,
    Topic.SNAPSHOT: _decode_snapshot,
    Topic.REFUSAL: _decode_refusal,
}


def _check_range(name: str, value: int | None, minimum: int) -> None:
    if value is not None and not minimum <= value <= MAX_INTEGER:
        raise ValueError(f"{name}: expected {minimum}..{MAX_INTEGER}, got {value}")


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"{name}: text of {len(text)} characters is above {MAX_TEXT_LENGTH}")
