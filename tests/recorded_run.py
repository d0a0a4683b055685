"""A run whose every message is known: a camera drives through points, and says where it is and what it sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from mcap.reader import make_reader
from numpy.typing import NDArray
from synthetic_world import CAMERA, driving_path, make_world

from vo.geometry import exp_se3, invert_pose, project, transform, undistort
from vo.mcap_recorder import McapRecorder
from vo.message_stream import EncodedMessage, MessageStream
from vo.messages import CompressedImage, RunState
from vo.recording import Recording
from vo.types import Camera, CameraModel, Frame, FrameTracks, MapUpdate, PoseEstimate, TrackingStatus

INTERVAL_NS = 50_000_000
START_NS = 1_305_031_102_000_000_000  # Unix time, as in the TUM data set
KEYFRAME_PERIOD = 4
LOST = 7
K = np.array([[420.0, 0.0, 322.5], [0.0, 430.0, 236.0], [0.0, 0.0, 1.0]])
PINHOLE = Camera(640, 480, K)
BROWN = Camera(640, 480, K, np.array([-0.25, 0.08, 0.001, -0.0015]), CameraModel.BROWN)
BROWN_5 = Camera(640, 480, K, np.array([-0.25, 0.08, 0.001, -0.0015, -0.02]), CameraModel.BROWN)
RATIONAL = Camera(640, 480, K, np.array([0.3, 0.1, 0.001, -0.0015, 0.01, 0.5, 0.15, 0.02]), CameraModel.BROWN)
FISHEYE = Camera(640, 480, K, np.array([-0.02, 0.01, -0.005, 0.001]), CameraModel.FISHEYE)


@dataclass
class Truth:
    """What the run said: poses as published, keyframes as corrected in the end, points, and the images."""

    camera: Camera
    published: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    keyframes: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    points: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    tracks: dict[int, FrameTracks] = field(default_factory=dict)
    images: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    messages: list[EncodedMessage] = field(default_factory=list)


def picture(index: int, camera: Camera = CAMERA) -> NDArray[np.uint8]:
    """A smooth RGB image that differs from frame to frame, and from left to right."""
    rng = np.random.default_rng(index)
    small = rng.integers(0, 255, (6, 8, 3), np.uint8)
    return np.asarray(cv2.resize(small, (camera.width, camera.height), interpolation=cv2.INTER_CUBIC), np.uint8)


def true_frame(index: int, camera: Camera = CAMERA, start_ns: int = START_NS) -> Frame:
    return Frame(index, start_ns + index * INTERVAL_NS, picture(index, camera), camera)


def observed_tracks(
    T: NDArray[np.float64],
    points: NDArray[np.float64],
    camera: Camera,
    index: int,
    time_ns: int,
    noise_px: float,
) -> FrameTracks:
    rng = np.random.default_rng(1000 + index)
    local = transform(invert_pose(T), points)
    pixels = project(local, camera)
    # The polynomials of a lens hold inside its field of view; far outside they may fold back into the image.
    pixels[np.abs(undistort(pixels, camera) - local[:, :2] / local[:, 2:]).max(axis=1) > 1e-3] = np.nan
    pixels = pixels + rng.normal(0.0, noise_px, pixels.shape)
    inside = (pixels > 0).all(axis=1) & (pixels < [camera.width - 1, camera.height - 1]).all(axis=1)
    ids = np.flatnonzero(inside).astype(np.int64)
    return FrameTracks(
        index,
        time_ns,
        ids,
        pixels[inside].astype(np.float32),
        np.full(len(ids), index + 1, np.int32),
        np.ones(len(ids), np.bool_),
    )


def jpeg_of(frame: Frame, reduction: int = 1) -> CompressedImage:
    width, height = frame.camera.width // reduction, frame.camera.height // reduction
    image = cv2.resize(cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR), (width, height), interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", image)[1].reshape(-1)
    return CompressedImage(frame.index, frame.timestamp_ns, width, height, data)


def say_run(
    stream: MessageStream,
    num_frames: int = 24,
    *,
    noise_px: float = 0.3,
    start_ns: int = START_NS,
    with_map: bool = True,
    reduction: int = 1,
    on_keyframe: Callable[[Frame], None] | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> Truth:
    """Publishes a run; frame `LOST` has no pose. Published poses drift away from the truth, keyframes are corrected."""
    camera = stream.camera
    truth = Truth(camera, points=make_world(400, (-6.0, -3.0, 4.0), (6.0, 3.0, 20.0)).points)
    stream.add_consumer(truth.messages.append)
    stream.beat_if_due()
    for index, T in enumerate(driving_path(num_frames)):
        time_ns = start_ns + index * INTERVAL_NS
        drifted = T @ exp_se3(np.array([0.0, 0.002 * index, 0.003 * index, 0.0, 0.0005 * index, 0.0]))
        is_keyframe = index % KEYFRAME_PERIOD == 0
        tracks = observed_tracks(T, truth.points, camera, index, time_ns, noise_px)
        if index == LOST:
            stream.publish_pose(PoseEstimate(index, time_ns, None, TrackingStatus.LOST))
            continue
        stream.publish_pose(
            PoseEstimate(index, time_ns, drifted, TrackingStatus.TRACKING, np.eye(6) * 1e-4, is_keyframe=is_keyframe)
        )
        stream.publish_tracks(tracks)
        truth.published[index], truth.tracks[index] = drifted, tracks
        frame = true_frame(index, camera, start_ns)
        if is_keyframe:
            truth.keyframes[index], truth.images[index] = T, frame.image
            if on_keyframe is not None:
                on_keyframe(frame)
            if with_map:
                stream.publish_map(map_update(truth, index, time_ns, start_ns))
        if index % 5 == 0:
            stream.publish_image(jpeg_of(frame, reduction))
        if on_frame is not None:
            on_frame(index)
    return truth


def map_update(truth: Truth, index: int, time_ns: int, start_ns: int) -> MapUpdate:
    """Where the last keyframes truly are, and the points that this one sees.

    A point that does not exist comes and goes; its id is the number of points plus the frame's index.
    """
    indices = np.array(sorted(truth.keyframes)[-3:], np.int64)
    seen = truth.tracks[index].track_ids
    wrong_id = len(truth.points) + index
    return MapUpdate(
        index,
        time_ns,
        0,
        "relative",
        indices,
        start_ns + indices * INTERVAL_NS,
        np.array([truth.keyframes[i] for i in indices.tolist()]),
        np.append(seen, wrong_id),
        np.vstack([truth.points[seen], [[0.0, 0.0, 5.0]]]),
        np.vstack([np.stack([seen % 256, seen // 256, 0 * seen], axis=1), [[9, 9, 9]]]).astype(np.uint8),
        np.array([wrong_id - KEYFRAME_PERIOD] if index else [], np.int64),
    )


def record_run(path: Path, num_frames: int = 24, camera: Camera = CAMERA, **options: object) -> Truth:
    """A whole recording."""
    with McapRecorder(path, "synthetic") as recorder:
        stream = MessageStream(camera, session_id="00c0ffee00c0ffee")
        stream.add_consumer(recorder.add)
        truth = say_run(stream, num_frames, on_keyframe=recorder.add_keyframe, **options)  # type: ignore[arg-type]
        stream.finish(RunState.FINISHED)
    assert recorder.failure is None and recorder.num_lost == 0
    return truth


def foxglove_messages(path: Path, topic: str) -> list:
    """Messages of a channel and their times, decoded with nothing but the schema that the file itself holds."""
    decoded = []
    with path.open("rb") as file:
        for schema, _, message in make_reader(file, validate_crcs=True).iter_messages(topics=[topic]):
            pool = descriptor_pool.DescriptorPool()
            for definition in descriptor_pb2.FileDescriptorSet.FromString(schema.data).file:
                pool.Add(definition)
            kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(schema.name))
            decoded.append((kind.FromString(message.data), message.log_time))
    return decoded


def own_bytes(path: Path) -> list[bytes]:
    return [message.data for message in Recording(path).messages() if message.topic.startswith("lightvo/")]
