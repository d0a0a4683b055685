"""Messages with round numbers, and an independent reader of the wire format: helpers of the tests, not tests."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import numpy as np

from vo.messages import (
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
    encode,
)
from vo.types import Camera, FrameTracks, ImageCondition, ImageHealth, PoseEstimate, Rejection, TrackingStatus

# What the topics have gained within version 1; publishers from before leave it out.
ADDED_KEYS = {"pose": {"stop_layer"}, "status": {"image_health", "is_camera_away"}}
PUBLISH_TIME_NS = 1_767_225_600_123_456_789


def a_pose(frame_index: int = 7, status: TrackingStatus = TrackingStatus.TRACKING) -> PoseEstimate:
    """Turned by 90 degrees about z, so that the golden bytes hold round numbers."""
    T = np.array([[0.0, -1, 0, 1.5], [1, 0, 0, -2.25], [0, 0, 1, 4], [0, 0, 0, 1]])
    is_lost = status is TrackingStatus.LOST
    return PoseEstimate(
        frame_index=frame_index,
        timestamp_ns=1_000_000_000 + frame_index * 33_333_333,
        T_world_camera=None if is_lost else T,
        status=status,
        covariance=None if is_lost else np.diag([1.0, 2, 3, 4, 5, 6]) / 1024,
        rejection=Rejection.TOO_FEW_INLIERS if is_lost else None,
        num_matches=400,
        num_inliers=3 if is_lost else 321,
        is_keyframe=not is_lost,
        segment_id=2,
        stop_layer=0 if is_lost else 3,
    )


def some_tracks(frame_index: int = 7) -> FrameTracks:
    return FrameTracks(
        frame_index=frame_index,
        timestamp_ns=1_000_000_000 + frame_index * 33_333_333,
        track_ids=np.array([3, 5, 2**40], np.int64),
        keypoints=np.array([[0.5, 1.25], [320, 240], [639.5, 479.75]], np.float32),
        lengths=np.array([1, 12, 300], np.int32),
        has_landmark=np.array([False, True, True]),
    )


def some_keyframes(frame_index: int = 7, *, is_reset: bool = False) -> KeyframeUpdate:
    """Two keyframes, one of them turned by 90 degrees about z."""
    T = np.stack([np.eye(4), np.array([[0.0, -1, 0, 1.5], [1, 0, 0, -2.25], [0, 0, 1, 4], [0, 0, 0, 1]])])
    return KeyframeUpdate(
        frame_index=frame_index,
        timestamp_ns=1_000_000_000 + frame_index * 33_333_333,
        segment_id=2,
        scale_source="relative",
        keyframe_indices=np.array([1, 5], np.int64),
        keyframe_timestamps_ns=np.array([1_033_333_333, 1_166_666_665], np.int64),
        T_world_keyframes=T,
        is_reset=is_reset,
    )


def some_points(frame_index: int = 7, *, is_reset: bool = False) -> PointsUpdate:
    return PointsUpdate(
        frame_index=frame_index,
        timestamp_ns=1_000_000_000 + frame_index * 33_333_333,
        segment_id=2,
        scale_source="depth",
        landmark_ids=np.array([3, 5, 2**40], np.int64),
        landmarks=np.array([[0.5, 1.25, 4], [-1, 0, 2], [8, -0.5, 16]], np.float64),
        landmark_colors=np.array([[255, 0, 0], [0, 128, 0], [1, 2, 3]], np.uint8),
        removed_landmark_ids=np.array([4], np.int64),
        is_reset=is_reset,
    )


def an_image(frame_index: int = 7) -> CompressedImage:
    """Not a picture, but what begins like one: nobody on the way looks at more."""
    data = np.frombuffer(bytes.fromhex("ffd8ffe000104a46494600010100ffd9"), np.uint8)
    return CompressedImage(frame_index, 1_000_000_000 + frame_index * 33_333_333, 320, 240, data)


TOPICS_OF_BODIES = {
    PoseEstimate: Topic.POSE,
    FrameTracks: Topic.TRACKS,
    KeyframeUpdate: Topic.KEYFRAME,
    PointsUpdate: Topic.POINTS,
    CompressedImage: Topic.IMAGE,
    StatusReport: Topic.STATUS,
    Camera: Topic.CAMERA,
    Snapshot: Topic.SNAPSHOT,
    Reply: Topic.REPLY,
    Refusal: Topic.REFUSAL,
}


def a_message(body: Any, sequence: int = 5) -> Message:
    is_of_frame = isinstance(body, PoseEstimate | FrameTracks | KeyframeUpdate | PointsUpdate | CompressedImage)
    return Message(
        Header(
            topic=TOPICS_OF_BODIES[type(body)],
            session_id="00c0ffee00c0ffee",
            sequence=sequence,
            publish_time_ns=PUBLISH_TIME_NS,
            status=body.status if isinstance(body, PoseEstimate) else TrackingStatus.TRACKING,
            frame_index=body.frame_index if is_of_frame else None,
            capture_time_ns=body.timestamp_ns if is_of_frame else None,
        ),
        body,
    )


def golden_messages() -> dict[str, Message]:
    """One message of every kind."""
    num_sent = {Topic.POSE: 200, Topic.TRACKS: 199, Topic.KEYFRAME: 20, Topic.POINTS: 19, Topic.STATUS: 5}
    health = ImageHealth(0.25, 0.125, 0.5, 0.0625, (ImageCondition.BLURRED, ImageCondition.EXPOSURE_JUMP))
    report = StatusReport(RunState.FINISHED, 29.5, 200, 3, num_sent, 2.0, health, True)
    camera = Camera(640, 480, np.array([[500.0, 0, 320], [0, 501, 240], [0, 0, 1]]), np.array([0.5, -0.25, 0, 0]))
    page = (encode(a_message(some_keyframes(is_reset=True), 8)),)
    return {
        "pose": a_message(a_pose()),
        "pose_lost": a_message(a_pose(8, TrackingStatus.LOST)),
        "tracks": a_message(some_tracks()),
        "keyframe": a_message(some_keyframes()),
        "points": a_message(some_points()),
        "image": a_message(an_image()),
        "status": a_message(report),
        "camera": a_message(camera),
        "snapshot": a_message(Snapshot(Topic.STATUS, 4, 6, RunState.RUNNING, (encode(a_message(report)),))),
        "snapshot_map": a_message(Snapshot(Topic.KEYFRAME, 0, 9, RunState.RUNNING, page, 2, 3, 2, 6)),
        "reply": a_message(Reply(RequestKind.STOP, 42)),
        "refusal": a_message(Refusal("topic: tracks is not kept", 43)),
    }


def golden_requests() -> dict[str, Request]:
    """One request of every kind."""
    return {
        "request_snapshot": Request(RequestKind.SNAPSHOT, tag=1),
        "request_map": Request(RequestKind.SNAPSHOT, Topic.POINTS, first_segment=2, first_id=600, tag=2),
        "request_ping": Request(RequestKind.PING, tag=3),
        "request_stop": Request(RequestKind.STOP, tag=4),
        "request_speed": Request(RequestKind.SCALE, scale=ScaleReading(ScaleQuantity.SPEED, 1.5), tag=5),
        "request_distance": Request(
            RequestKind.SCALE, scale=ScaleReading(ScaleQuantity.DISTANCE, 0.25, 2_000_000_000, 1_000_000_000), tag=6
        ),
        "request_goodbye": Request(RequestKind.GOODBYE),
    }


def read_by_the_book(data: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """docs/PROTOCOL.md once more, with struct alone: nothing here comes from the product."""
    zero = data.index(b"\0")
    (header_bytes,) = struct.unpack_from("<I", data, zero + 1)
    end = zero + 5 + header_bytes
    header = msgpack.unpackb(data[zero + 5 : end])
    while end % 8:
        assert data[end] == 0
        end += 1
    arrays = {}
    formats = {"<f8": "d", "<f4": "f", "<i8": "q", "<i4": "i", "|u1": "B"}
    for name, (dtype, shape, offset) in header["arrays"].items():
        assert offset % 8 == 0
        values = struct.unpack_from(f"<{math.prod(shape)}{formats[dtype]}", data, end + offset)
        arrays[name] = (shape, list(values))
    return data[:zero].decode(), header, arrays


def same(a: Any, b: Any) -> bool:
    """Whether two bodies say the same; arrays bit for bit."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if hasattr(a, "__slots__"):
        return type(a) is type(b) and all(same(getattr(a, key), getattr(b, key)) for key in a.__slots__)
    if isinstance(a, tuple) and a and isinstance(a[0], bytes | memoryview):
        return [bytes(item) for item in a] == [bytes(item) for item in b]
    return bool(a == b)


def edited(message: Message, **changes: Any) -> bytes:
    """The message with other values in its header (`...` removes one); the arrays stay."""
    data = encode(message)
    start = data.index(b"\0") + 5
    end = start + int.from_bytes(data[start - 4 : start], "little")
    header = msgpack.unpackb(data[start:end]) | changes
    packed = msgpack.packb({key: value for key, value in header.items() if value is not ...})
    return framed(data[: start - 5], packed) + data[-(-end // 8) * 8 :]


def framed(topic: bytes, header: bytes) -> bytes:
    start = topic + b"\0" + len(header).to_bytes(4, "little") + header
    return start.ljust(-(-len(start) // 8) * 8, b"\0")
