"""The messages of `lightvo/1`, to bytes and back. Pure: no socket, no clock, no thread.

docs/PROTOCOL.md is the specification; vo/message_types.py holds what the messages say, vo/wire.py their outer form
and its limits, vo/map_messages.py the topics of the map and the image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from vo import wire
from vo.map_messages import (
    ArrayMap,
    check_pose,
    decode_image,
    decode_keyframe,
    decode_points,
    encode_image,
    encode_keyframe,
    encode_points,
    frame_of,
)
from vo.message_types import (
    LOGGED_TOPICS,
    MAP_TOPICS,
    MAX_REQUEST_BYTES,
    MAX_SNAPSHOT_MESSAGES,
    PUBLISHED_TOPICS,
    Body,
    CompressedImage,
    Header,
    KeyframeUpdate,
    Message,
    PointsUpdate,
    Refusal,
    Reply,
    Request,
    RequestKind,
    RunState,
    ScaleQuantity,
    ScaleReading,
    Snapshot,
    StatusReport,
    Topic,
    check_text,
)
from vo.types import (
    Camera,
    CameraModel,
    FloatArray,
    FrameTracks,
    ImageCondition,
    ImageHealth,
    PoseEstimate,
    Rejection,
    TrackingStatus,
)
from vo.wire import MAX_INTEGER, SCHEMA, Arrays, Fields, ProtocolError, VersionError

__all__ = [
    "LOGGED_TOPICS",
    "MAP_TOPICS",
    "MAX_REQUEST_BYTES",
    "MAX_SNAPSHOT_MESSAGES",
    "PUBLISHED_TOPICS",
    "SCHEMA",
    "Body",
    "CompressedImage",
    "Header",
    "KeyframeUpdate",
    "Message",
    "PointsUpdate",
    "ProtocolError",
    "Refusal",
    "Reply",
    "Request",
    "RequestKind",
    "RunState",
    "ScaleQuantity",
    "ScaleReading",
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
_TOPICS = {topic.value: topic for topic in Topic}
HEALTH_FIGURES = ("brightness", "contrast", "sharpness", "clipped")


def quat_xyzw_from_rotation(R: FloatArray) -> FloatArray:
    """Unit quaternion (x, y, z, w), w >= 0, of a rotation matrix (3, 3).

    Four times the outer product of the quaternion with itself is linear in R; its row with the largest diagonal
    entry is the quaternion times a number that is never near zero.
    """
    (a, b, c), (d, e, f), (g, h, i) = R.tolist()
    rows = (
        (1 + a - e - i, d + b, g + c, h - f),
        (d + b, 1 - a + e - i, h + f, c - g),
        (g + c, h + f, 1 - a - e + i, d - b),
        (h - f, c - g, d - b, 1 + a + e + i),
    )
    x, y, z, w = max(enumerate(rows), key=lambda row: row[1][row[0]])[1]
    length = math.sqrt(x * x + y * y + z * z + w * w)
    return np.array((x, y, z, w)) / (length if w >= 0 else -length)


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
    topic = _TOPICS.get(name)
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
    fields: dict[str, object] = {"request": request.kind.value, "tag": request.tag}
    if request.kind is RequestKind.SNAPSHOT and request.topic in MAP_TOPICS:
        fields |= {
            "topic": request.topic.value,
            "first_segment": request.first_segment,
            "first_id": request.first_id,
        }
    elif request.kind is RequestKind.SNAPSHOT:
        fields |= {"topic": request.topic.value, "first_sequence": request.first_sequence}
    if request.scale is not None:
        fields |= {
            "quantity": request.scale.quantity.value,
            "value": float(request.scale.value),
            "timestamp_ns": request.scale.timestamp_ns,
            "start_timestamp_ns": request.scale.start_timestamp_ns,
        }
    return wire.pack_fields(fields)


def decode_request(data: bytes | memoryview) -> Request:
    """The request in `data`. Raises VersionError and ProtocolError like `decode`."""
    if len(data) > MAX_REQUEST_BYTES:
        raise ProtocolError(f"request of {len(data)} bytes is above {MAX_REQUEST_BYTES}")
    fields = wire.unpack_fields(data)
    kind = fields.choice("request", RequestKind)
    tag = fields.integer("tag")
    if kind is RequestKind.SCALE:
        return Request(kind, scale=_decode_scale(fields), tag=tag)
    if kind is not RequestKind.SNAPSHOT:
        return Request(kind, tag=tag)
    topic = fields.choice("topic", Topic)
    if topic not in PUBLISHED_TOPICS:
        raise ProtocolError(f"topic: {topic.value} is not published")
    if topic in MAP_TOPICS:
        first_segment, first_id = fields.integer("first_segment"), fields.integer("first_id")
        return Request(kind, topic, first_segment=first_segment, first_id=first_id, tag=tag)
    return Request(kind, topic, fields.integer("first_sequence"), tag=tag)


def _decode_scale(fields: Fields) -> ScaleReading:
    try:
        return ScaleReading(
            quantity=fields.choice("quantity", ScaleQuantity),
            value=fields.number("value"),
            timestamp_ns=fields.optional_integer("timestamp_ns", -MAX_INTEGER),
            start_timestamp_ns=fields.optional_integer("start_timestamp_ns", -MAX_INTEGER),
        )
    except ValueError as error:
        raise ProtocolError(f"scale: {error}") from error


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
        case KeyframeUpdate():
            return encode_keyframe(body)
        case PointsUpdate():
            return encode_points(body)
        case CompressedImage():
            return encode_image(body)
        case StatusReport():
            return {
                "state": body.state.value,
                "fps": float(body.fps),
                "num_frames": body.num_frames,
                "num_dropped": body.num_dropped,
                "num_sent": {topic.value: body.num_sent.get(topic, 0) for topic in PUBLISHED_TOPICS},
                "heartbeat_hz": float(body.heartbeat_hz),
                "image_health": None if body.image_health is None else _encode_health(body.image_health),
                "is_camera_away": body.is_camera_away,
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
                "first_segment": body.first_segment,
                "first_id": body.first_id,
                "next_segment": body.next_segment,
                "next_id": body.next_id,
                "state": body.state.value,
            }, {
                "message_lengths": np.array([len(message) for message in body.messages], "<i8"),
                "messages": np.frombuffer(b"".join(body.messages), "|u1"),
            }
        case Reply():
            return {"request": body.request.value, "tag": body.tag}, {}
        case Refusal():
            return {"reason": body.reason, "tag": body.tag}, {}


def _encode_health(health: ImageHealth) -> dict[str, object]:
    figures: dict[str, object] = {name: float(getattr(health, name)) for name in HEALTH_FIGURES}
    return figures | {"conditions": " ".join(condition.value for condition in health.conditions)}


def _decode_health(values: Mapping[str, object] | None) -> ImageHealth | None:
    """Conditions that this version does not know are left out: publishers may learn to tell more of them."""
    if values is None:
        return None
    fields = Fields(values)
    known = {condition.value: condition for condition in ImageCondition}
    names = fields.text("conditions").split()
    figures = {name: fields.number(name) for name in HEALTH_FIGURES}
    return ImageHealth(**figures, conditions=tuple(known[name] for name in names if name in known))


def _encode_pose(pose: PoseEstimate) -> tuple[dict[str, object], ArrayMap]:
    check_text("scale_source", pose.scale_source)
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
        "stop_layer": int(pose.stop_layer),
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
    frame_index, timestamp_ns = frame_of(header)
    return PoseEstimate(
        frame_index=frame_index,
        timestamp_ns=timestamp_ns,
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
        stop_layer=fields.added_integer("stop_layer", 0),
    )


def _decode_T_world_camera(arrays: Arrays) -> FloatArray:
    """The pose as a matrix; the same as position and quaternion must be there too, for readers that want those."""
    arrays.take("position_xyz", "<f8", (3,))
    arrays.take("quat_xyzw", "<f8", (4,))
    T: FloatArray = arrays.take("T_world_camera", "<f8", (4, 4))
    check_pose("T_world_camera", T)
    return T


def _decode_tracks(header: Header, fields: Fields, arrays: Arrays) -> FrameTracks:
    frame_index, timestamp_ns = frame_of(header)
    has_landmark = arrays.take("has_landmark", "|u1", (None,))
    if has_landmark.max(initial=0) > 1:
        raise ProtocolError("arrays: has_landmark: expected 0 or 1")
    return FrameTracks(
        frame_index=frame_index,
        timestamp_ns=timestamp_ns,
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
        image_health=_decode_health(fields.added_mapping("image_health")),
        is_camera_away=fields.added_flag("is_camera_away"),
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
        first_segment=fields.optional_integer("first_segment"),
        first_id=fields.optional_integer("first_id"),
        next_segment=fields.optional_integer("next_segment"),
        next_id=fields.optional_integer("next_id"),
    )


def _decode_reply(header: Header, fields: Fields, arrays: Arrays) -> Reply:
    return Reply(fields.choice("request", RequestKind), fields.integer("tag"))


def _decode_refusal(header: Header, fields: Fields, arrays: Arrays) -> Refusal:
    return Refusal(fields.text("reason"), fields.integer("tag"))


_DECODERS: dict[Topic, Callable[[Header, Fields, Arrays], Body]] = {
    Topic.POSE: _decode_pose,
    Topic.TRACKS: _decode_tracks,
    Topic.KEYFRAME: decode_keyframe,
    Topic.POINTS: decode_points,
    Topic.IMAGE: decode_image,
    Topic.STATUS: _decode_status,
    Topic.CAMERA: _decode_camera,
    Topic.SNAPSHOT: _decode_snapshot,
    Topic.REPLY: _decode_reply,
    Topic.REFUSAL: _decode_refusal,
}
