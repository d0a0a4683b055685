"""The topics `keyframe`, `points` and `image`: their headers and arrays. Pure; vo/messages.py gives them their form."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vo.message_types import CompressedImage, Header, KeyframeUpdate, PointsUpdate
from vo.types import FloatArray
from vo.wire import Arrays, Fields, ProtocolError

ROTATION_TOLERANCE = 1e-6
_MAX_POSE_VALUE = float(np.finfo(np.float32).max)
JPEG = "jpeg"

ArrayMap = dict[str, NDArray[Any]]


def frame_of(header: Header) -> tuple[int, int]:
    """Frame and capture time of a message that belongs to a frame. Raises ProtocolError where it names none."""
    if header.frame_index is None or header.capture_time_ns is None:
        raise ProtocolError(f"{header.topic.value} without frame_index or capture_time_ns")
    return header.frame_index, header.capture_time_ns


def check_pose(name: str, T: FloatArray) -> None:
    """As `check_poses`, of one T (4, 4); number by number in a tenth of the time, since every frame has one."""
    (a, b, c, x), (d, e, f, y), (g, h, i, z), last = T.tolist()
    is_finite = all(abs(value) <= _MAX_POSE_VALUE for value in (a, b, c, d, e, f, g, h, i, x, y, z))
    if not is_finite or last != [0, 0, 0, 1]:
        raise ProtocolError(f"{name}: expected finite values and a last row of 0 0 0 1")
    errors = (
        a * a + b * b + c * c - 1,
        d * d + e * e + f * f - 1,
        g * g + h * h + i * i - 1,
        a * d + b * e + c * f,
        a * g + b * h + c * i,
        d * g + e * h + f * i,
    )
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    if max(map(abs, errors)) > ROTATION_TOLERANCE or determinant < 0:
        raise ProtocolError(f"{name}: expected a rotation")


def check_poses(name: str, T: FloatArray) -> None:
    """Raises ProtocolError unless T (N, 4, 4) holds rigid motions."""
    if not len(T):
        return
    R = T[:, :3, :3]
    is_finite = np.abs(T).max() <= _MAX_POSE_VALUE  # False for NaN; the bound keeps R R^T from overflowing
    if not is_finite or np.any(T[:, 3] != (0, 0, 0, 1)):
        raise ProtocolError(f"{name}: expected finite values and a last row of 0 0 0 1")
    if np.abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max() > ROTATION_TOLERANCE or np.linalg.det(R).min() < 0:
        raise ProtocolError(f"{name}: expected a rotation")


def encode_keyframe(update: KeyframeUpdate) -> tuple[dict[str, object], ArrayMap]:
    return _map_fields(update), {
        "keyframe_indices": update.keyframe_indices.astype("<i8", copy=False),
        "keyframe_timestamps_ns": update.keyframe_timestamps_ns.astype("<i8", copy=False),
        "T_world_keyframes": update.T_world_keyframes.astype("<f8", copy=False),
    }


def decode_keyframe(header: Header, fields: Fields, arrays: Arrays) -> KeyframeUpdate:
    frame_index, timestamp_ns = frame_of(header)
    T_world_keyframes = arrays.take("T_world_keyframes", "<f8", (None, 4, 4))
    check_poses("T_world_keyframes", T_world_keyframes)
    return KeyframeUpdate(
        frame_index=frame_index,
        timestamp_ns=timestamp_ns,
        segment_id=fields.integer("segment_id"),
        scale_source=fields.text("scale_source"),
        keyframe_indices=arrays.take("keyframe_indices", "<i8", (None,)),
        keyframe_timestamps_ns=arrays.take("keyframe_timestamps_ns", "<i8", (None,)),
        T_world_keyframes=T_world_keyframes,
        is_reset=fields.flag("is_reset"),
    )


def encode_points(update: PointsUpdate) -> tuple[dict[str, object], ArrayMap]:
    return _map_fields(update), {
        "landmark_ids": update.landmark_ids.astype("<i8", copy=False),
        "landmarks": update.landmarks.astype("<f8", copy=False),
        "landmark_colors": update.landmark_colors,
        "removed_landmark_ids": update.removed_landmark_ids.astype("<i8", copy=False),
    }


def decode_points(header: Header, fields: Fields, arrays: Arrays) -> PointsUpdate:
    frame_index, timestamp_ns = frame_of(header)
    landmarks = arrays.take("landmarks", "<f8", (None, 3))
    if not np.isfinite(landmarks).all():
        raise ProtocolError("arrays: landmarks: expected finite values")
    return PointsUpdate(
        frame_index=frame_index,
        timestamp_ns=timestamp_ns,
        segment_id=fields.integer("segment_id"),
        scale_source=fields.text("scale_source"),
        landmark_ids=arrays.take("landmark_ids", "<i8", (None,)),
        landmarks=landmarks,
        landmark_colors=arrays.take("landmark_colors", "|u1", (None, 3)),
        removed_landmark_ids=arrays.take("removed_landmark_ids", "<i8", (None,)),
        is_reset=fields.flag("is_reset"),
    )


def encode_image(image: CompressedImage) -> tuple[dict[str, object], ArrayMap]:
    return {"format": JPEG, "width": int(image.width), "height": int(image.height)}, {"data": image.data}


def decode_image(header: Header, fields: Fields, arrays: Arrays) -> CompressedImage:
    frame_index, timestamp_ns = frame_of(header)
    if fields.text("format") != JPEG:
        raise ProtocolError(f"format: expected {JPEG}")
    return CompressedImage(
        frame_index=frame_index,
        timestamp_ns=timestamp_ns,
        width=fields.integer("width", 1),
        height=fields.integer("height", 1),
        data=arrays.take("data", "|u1", (None,)),
    )


def _map_fields(update: KeyframeUpdate | PointsUpdate) -> dict[str, object]:
    return {
        "segment_id": int(update.segment_id),
        "scale_source": update.scale_source,
        "is_reset": bool(update.is_reset),
    }
