"""A made-up run for the viewer: a camera on an arc, landmarks of one colour, an image of another, as messages."""

from __future__ import annotations

import time

import cv2
import numpy as np

from vo.message_stream import MessageStream
from vo.message_types import CompressedImage, Header, KeyframeUpdate, Message, PointsUpdate, Topic
from vo.types import Camera, FrameTracks, MapUpdate, PoseEstimate, TrackingStatus

PERIOD_NS = 33_333_333
LANDMARK_COLOR = (250, 20, 240)
IMAGE_COLOR = (30, 90, 160)
CAMERA = Camera(640, 480, np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]]))


def T_on_arc(index: int) -> np.ndarray:
    """A turn to the right, 120 frames for a quarter."""
    angle = np.pi / 2 * index / 120
    T = np.eye(4)
    T[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    T[:3, 3] = (2 - 2 * np.cos(angle), 0.0, 2 * np.sin(angle))
    return T


def a_pose(index: int, status: TrackingStatus = TrackingStatus.TRACKING, segment_id: int = 0) -> PoseEstimate:
    T = None if status is TrackingStatus.LOST else T_on_arc(index)
    return PoseEstimate(index, PERIOD_NS * index, T, status, num_matches=200, num_inliers=150, segment_id=segment_id)


def some_tracks(index: int, num_tracks: int = 200) -> FrameTracks:
    ids = np.arange(num_tracks) + 3 * index
    keypoints = np.stack([20 + (37 * ids) % 600, 20 + (91 * ids) % 440], 1).astype(np.float32)
    lengths = np.minimum(index + 1, 1 + (num_tracks - np.arange(num_tracks)) // 3).astype(np.int32)
    return FrameTracks(index, PERIOD_NS * index, ids, keypoints, lengths, ids % 3 > 0)


def an_image(index: int) -> CompressedImage:
    picture = np.full((480, 640, 3), IMAGE_COLOR[::-1], np.uint8)
    data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    return CompressedImage(index, PERIOD_NS * index, 640, 480, data.ravel())


def a_map_update(index: int, num_landmarks: int = 100, segment_id: int = 0) -> MapUpdate:
    """The keyframe `index` with landmarks before it, their ids from 1000 times the index on."""
    random = np.random.default_rng(index)
    T = T_on_arc(index)
    points = random.uniform([-1, -0.8, 2], [1, 0.8, 4], (num_landmarks, 3)) @ T[:3, :3].T + T[:3, 3]
    return MapUpdate(
        frame_index=index,
        timestamp_ns=PERIOD_NS * index,
        segment_id=segment_id,
        scale_source="relative",
        keyframe_indices=np.array([index]),
        keyframe_timestamps_ns=np.array([PERIOD_NS * index]),
        T_world_keyframes=T[None].copy(),
        landmark_ids=np.arange(num_landmarks) + 1000 * index,
        landmarks=points,
        landmark_colors=np.tile(np.array(LANDMARK_COLOR, np.uint8), (num_landmarks, 1)),
        removed_landmark_ids=np.zeros(0, np.int64),
    )


def message_of(
    body: PoseEstimate | FrameTracks | KeyframeUpdate | PointsUpdate | CompressedImage, session_id: str = "one"
) -> Message:
    topics = {
        PoseEstimate: Topic.POSE,
        FrameTracks: Topic.TRACKS,
        KeyframeUpdate: Topic.KEYFRAME,
        PointsUpdate: Topic.POINTS,
        CompressedImage: Topic.IMAGE,
    }
    status = body.status if isinstance(body, PoseEstimate) else TrackingStatus.TRACKING
    header = Header(
        topics[type(body)], session_id, body.frame_index, time.time_ns(), status, body.frame_index, body.timestamp_ns
    )
    return Message(header, body)


def publish_frames(stream: MessageStream, first: int, end: int, period_s: float = 0.0) -> None:
    """Everything of the frames `first` to `end`, a keyframe every fifth."""
    for index in range(first, end):
        stream.publish_pose(a_pose(index, TrackingStatus.INITIALIZING if index < 3 else TrackingStatus.TRACKING))
        stream.publish_tracks(some_tracks(index))
        if index % 5 == 0:
            stream.publish_map(a_map_update(index))
        stream.publish_image(an_image(index))
        stream.publish_status(fps=30.0, num_frames=index + 1)
        time.sleep(period_s)
