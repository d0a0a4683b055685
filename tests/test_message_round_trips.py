"""Every message and every request, there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from wire_samples import a_message, same, some_tracks

from vo.messages import (
    MAX_REQUEST_BYTES,
    PUBLISHED_TOPICS,
    CompressedImage,
    KeyframeUpdate,
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
    decode,
    decode_request,
    encode,
    encode_request,
)
from vo.types import Camera, CameraModel, FrameTracks, PoseEstimate, Rejection, TrackingStatus

times_ns = st.integers(-(2**62), 2**62)
counts = st.integers(0, 2**62)


@st.composite
def poses(draw: st.DrawFn) -> PoseEstimate:
    status = draw(st.sampled_from(TrackingStatus))
    has_pose = status is not TrackingStatus.LOST or draw(st.booleans())
    T = np.eye(4)
    quat = np.array(draw(st.lists(st.floats(-1, 1), min_size=4, max_size=4)))
    T[:3, :3] = Rotation.from_quat(quat if np.linalg.norm(quat) > 1e-6 else [0, 0, 0, 1]).as_matrix()
    T[:3, 3] = draw(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
    covariance = np.array(draw(st.lists(st.floats(width=32), min_size=36, max_size=36))).reshape(6, 6)
    return PoseEstimate(
        frame_index=draw(counts),
        timestamp_ns=draw(times_ns),
        T_world_camera=T if has_pose else None,
        status=status,
        covariance=covariance if draw(st.booleans()) else None,
        rejection=draw(st.none() | st.sampled_from(Rejection)),
        num_matches=draw(counts),
        num_inliers=draw(counts),
        is_keyframe=draw(st.booleans()),
        is_stationary=draw(st.booleans()),
        segment_id=draw(counts),
        scale_source=draw(st.text(max_size=60)),
        stop_layer=draw(counts),
    )


@st.composite
def tracks(draw: st.DrawFn) -> FrameTracks:
    num_tracks = draw(st.integers(0, 50))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return FrameTracks(
        frame_index=draw(counts),
        timestamp_ns=draw(times_ns),
        track_ids=rng.integers(-(2**63), 2**63 - 1, num_tracks),
        keypoints=rng.normal(0, 1e3, (num_tracks, 2)).astype(np.float32),
        lengths=rng.integers(0, 2**31 - 1, num_tracks).astype(np.int32),
        has_landmark=rng.random(num_tracks) < 0.5,
    )


@st.composite
def keyframes(draw: st.DrawFn) -> KeyframeUpdate:
    num_keyframes = draw(st.integers(0, 20))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    T = np.tile(np.eye(4), (num_keyframes, 1, 1))
    if num_keyframes:
        T[:, :3, :3] = Rotation.random(num_keyframes, rng=rng).as_matrix()
    T[:, :3, 3] = rng.normal(0, 100, (num_keyframes, 3))
    return KeyframeUpdate(
        frame_index=draw(counts),
        timestamp_ns=draw(times_ns),
        segment_id=draw(counts),
        scale_source=draw(st.text(max_size=60)),
        keyframe_indices=np.sort(rng.choice(10**6, num_keyframes, replace=False)).astype(np.int64),
        keyframe_timestamps_ns=rng.integers(-(2**63), 2**63 - 1, num_keyframes),
        T_world_keyframes=T,
        is_reset=draw(st.booleans()),
    )


@st.composite
def points(draw: st.DrawFn) -> PointsUpdate:
    num_points, num_removed = draw(st.integers(0, 50)), draw(st.integers(0, 50))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    ids = rng.choice(10**6, num_points + num_removed, replace=False).astype(np.int64)
    return PointsUpdate(
        frame_index=draw(counts),
        timestamp_ns=draw(times_ns),
        segment_id=draw(counts),
        scale_source=draw(st.text(max_size=60)),
        landmark_ids=np.sort(ids[:num_points]),
        landmarks=rng.normal(0, 1e3, (num_points, 3)),
        landmark_colors=rng.integers(0, 256, (num_points, 3)).astype(np.uint8),
        removed_landmark_ids=np.sort(ids[num_points:]),
        is_reset=draw(st.booleans()),
    )


images = st.builds(
    lambda index, time_ns, width, height, data: CompressedImage(
        index, time_ns, width, height, np.frombuffer(b"\xff\xd8" + data, np.uint8)
    ),
    counts,
    times_ns,
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.binary(min_size=2, max_size=200),
)
reports = st.builds(
    StatusReport,
    state=st.sampled_from(RunState),
    fps=st.floats(0, 1e6),
    num_frames=counts,
    num_dropped=counts,
    num_sent=st.fixed_dictionaries(dict.fromkeys(PUBLISHED_TOPICS, counts)),
    heartbeat_hz=st.floats(0, 1e3),
)
cameras = st.builds(
    lambda width, height, focal, model, distortion: Camera(
        width, height, np.diag([focal, focal, 1.0]), np.array(distortion, np.float64), model
    ),
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.floats(1, 1e5),
    st.sampled_from(CameraModel),
    st.lists(st.floats(-10, 10), max_size=14),
)
snapshots = st.builds(
    Snapshot,
    of_topic=st.sampled_from((Topic.POSE, Topic.STATUS, Topic.CAMERA)),
    oldest_sequence=counts,
    num_sent=counts,
    state=st.sampled_from(RunState),
    messages=st.lists(st.binary(min_size=1, max_size=50), max_size=20).map(tuple),
)
map_snapshots = st.builds(
    Snapshot,
    of_topic=st.sampled_from((Topic.KEYFRAME, Topic.POINTS)),
    oldest_sequence=st.just(0),
    num_sent=counts,
    state=st.sampled_from(RunState),
    messages=st.just(()),
    first_segment=counts,
    first_id=counts,
    next_segment=counts,
    next_id=counts,
)


answers = st.one_of(
    snapshots,
    map_snapshots,
    st.builds(Reply, st.sampled_from(RequestKind), counts),
    st.builds(Refusal, st.text(max_size=256), counts),
)


@settings(deadline=None, max_examples=250)
@given(st.one_of(poses(), tracks(), keyframes(), points(), images, reports, cameras, answers), counts)
def test_what_was_encoded_is_decoded(body: Any, sequence: int) -> None:
    message = a_message(body, sequence)
    decoded = decode(encode(message))
    assert decoded.header == message.header
    assert same(decoded.body, body)
    assert encode(decoded) == encode(message)


readings = st.builds(ScaleReading, st.just(ScaleQuantity.SPEED), st.floats(0, 1e6), st.none() | times_ns) | st.builds(
    lambda value, start_ns, duration_ns: ScaleReading(
        ScaleQuantity.DISTANCE, value, None if duration_ns is None else start_ns + duration_ns, start_ns
    ),
    st.floats(0, 1e6),
    times_ns,
    st.none() | st.integers(1, 10**12),
)
requests = st.one_of(
    st.builds(
        Request,
        st.just(RequestKind.SNAPSHOT),
        st.sampled_from((Topic.POSE, Topic.CAMERA, Topic.STATUS, Topic.TRACKS)),
        first_sequence=counts,
        tag=counts,
    ),
    st.builds(
        Request,
        st.just(RequestKind.SNAPSHOT),
        st.sampled_from((Topic.KEYFRAME, Topic.POINTS)),
        first_segment=counts,
        first_id=counts,
        tag=counts,
    ),
    st.builds(Request, st.sampled_from((RequestKind.PING, RequestKind.STOP, RequestKind.GOODBYE)), tag=counts),
    st.builds(Request, st.just(RequestKind.SCALE), scale=readings, tag=counts),
)


@settings(deadline=None, max_examples=100)
@given(requests)
def test_requests_come_back(request: Request) -> None:
    assert decode_request(encode_request(request)) == request
    assert len(encode_request(request)) <= MAX_REQUEST_BYTES


def test_numpy_scalars_are_plain_numbers_on_the_wire() -> None:
    """The odometry counts with NumPy, MessagePack knows nothing of it."""
    pose = PoseEstimate(
        frame_index=1,
        timestamp_ns=2,
        T_world_camera=np.eye(4),
        status=TrackingStatus.TRACKING,
        num_inliers=np.int64(5),  # type: ignore[arg-type]
        is_keyframe=np.bool_(True),  # type: ignore[arg-type]
    )
    body = decode(encode(a_message(pose))).body
    assert isinstance(body, PoseEstimate) and type(body.num_inliers) is int and body.is_keyframe is True


def test_arrays_are_aligned_read_only_views() -> None:
    data = encode(a_message(some_tracks()))
    body = decode(data).body
    assert isinstance(body, FrameTracks)
    raw = np.frombuffer(data, np.uint8)
    for array in (body.track_ids, body.keypoints, body.lengths, body.has_landmark):
        assert np.shares_memory(array, raw)
        assert array.flags.aligned and not array.flags.writeable
        with pytest.raises(ValueError):
            array.setflags(write=True)
    mutable = bytearray(data)
    from_mutable = decode(memoryview(mutable)).body
    assert isinstance(from_mutable, FrameTracks) and not from_mutable.keypoints.flags.writeable
