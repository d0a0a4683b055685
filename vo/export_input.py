"""What can be exported: read from a recording, or from the output directory of a run."""

from __future__ import annotations

import bisect
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vo.export_scene import Landmarks, PosedFrame
from vo.foxglove import KEYFRAME_TOPIC, jpeg_of
from vo.geometry import invert_pose
from vo.messages import CompressedImage, KeyframeUpdate, PointsUpdate, Topic
from vo.recorder import KITTI_NAME, SUMMARY_NAME, TUM_NAME
from vo.recording import Recording
from vo.replay import own_messages
from vo.run_files import CAMERA_NAME, TRACKS_DIRECTORY
from vo.sources.cameras import read_camera
from vo.tracks_archive import read_tracks
from vo.trajectory import frames_path, read_trajectory
from vo.types import Camera, ConfigError, FloatArray, FrameTracks, PoseEstimate, TrackingStatus, VoError

REFINED_NAME = "trajectory_refined_tum.txt"
FRAME_CHOICES = ("keyframes", "all")


class ExportError(VoError):
    """Something that cannot be exported: names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which frames: "keyframes" or "all", and every how many of them."""

    frames: str = "keyframes"
    every: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class ExportInput:
    """What is known of a run.

    frames        those selected, in order of time.
    tracks        by frame index; of some frames there may be none.
    landmarks     None where the run did not keep any.
    scale_source  of the poses and points.
    notes         what the user should know, one line each.
    """

    camera: Camera
    frames: tuple[PosedFrame, ...]
    tracks: dict[int, FrameTracks]
    landmarks: Landmarks | None
    scale_source: str
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Segment:
    """One part of a run whose poses share a world.

    keyframes   frame index to time and pose, as corrected last.
    landmarks   track id to point and colour.
    poses       of the frames that were tracked, as published.
    """

    keyframes: dict[int, tuple[int, FloatArray]] = field(default_factory=dict)
    landmarks: dict[int, tuple[FloatArray, NDArray[np.uint8]]] = field(default_factory=dict)
    poses: dict[int, PoseEstimate] = field(default_factory=dict)

    @property
    def num_keyframes(self) -> int:
        return len(self.keyframes) or sum(pose.is_keyframe for pose in self.poses.values())


# --- recordings ---


def input_from_recording(recording: Recording, selection: Selection) -> ExportInput:
    """Raises ExportError where the recording holds no camera or no pose."""
    camera, segments = _read_segments(recording)
    segment_id = max(segments, key=lambda number: segments[number].num_keyframes, default=None)
    if camera is None or segment_id is None:
        raise ExportError(f"{recording.path}: holds no {'pose' if camera else 'camera'}; record more of the run")
    segment, notes = segments[segment_id], []
    left_out = [number for number in sorted(segments) if number != segment_id and segments[number].poses]
    if left_out:
        numbers = ", ".join(str(number) for number in left_out)
        notes.append(f"segment {segment_id} is exported; {numbers} left out: segments share no world")
    if not segment.keyframes:
        notes.append("the recording holds no corrected keyframes: poses are those published, never revised")
    frames = _selected(segment, selection)
    wanted = {frame.frame_index for frame in frames}
    tracks = {}
    for message in own_messages(recording, (Topic.TRACKS,)):
        if isinstance(message.body, FrameTracks) and message.body.frame_index in wanted:
            tracks[message.body.frame_index] = message.body
    if not tracks:
        notes.append("the recording holds no tracks: no points (publisher.publish_tracks)")
    scale_source = next(reversed(segment.poses.values())).scale_source if segment.poses else "relative"
    return ExportInput(camera, frames, tracks, _landmarks(segment), scale_source, tuple(notes))


def recorded_images(recording: Recording, selection: Selection) -> Iterator[tuple[int, bytes]]:
    """Frame index and JPEG file of every image that was recorded: of keyframes in full, of other frames if published.

    Either those of keyframes or the others, since the two may differ in size.
    """
    if selection.frames == "keyframes":
        for message in recording.messages([KEYFRAME_TOPIC]):
            yield message.sequence, jpeg_of(message.data)
        return
    for image in own_messages(recording, (Topic.IMAGE,)):
        if isinstance(image.body, CompressedImage):
            yield image.body.frame_index, image.body.data.tobytes()


def _read_segments(recording: Recording) -> tuple[Camera | None, dict[int, _Segment]]:
    """The camera, and what was said of every segment in the end."""
    camera: Camera | None = None
    segments: dict[int, _Segment] = defaultdict(_Segment)
    for message in own_messages(recording, (Topic.CAMERA, Topic.POSE, Topic.KEYFRAME, Topic.POINTS)):
        match message.body:
            case Camera():
                camera = message.body
            case PoseEstimate() if message.body.T_world_camera is not None:
                segments[message.body.segment_id].poses[message.body.frame_index] = message.body
            case KeyframeUpdate():
                _move_keyframes(segments[message.body.segment_id], message.body)
            case PointsUpdate():
                _move_landmarks(segments[message.body.segment_id], message.body)
    return camera, dict(segments)


def _move_keyframes(segment: _Segment, update: KeyframeUpdate) -> None:
    rows = zip(update.keyframe_indices, update.keyframe_timestamps_ns, update.T_world_keyframes, strict=True)
    for index, timestamp_ns, T in rows:
        segment.keyframes[int(index)] = (int(timestamp_ns), T.copy())  # a view would keep the whole message


def _move_landmarks(segment: _Segment, update: PointsUpdate) -> None:
    rows = zip(update.landmark_ids.tolist(), update.landmarks, update.landmark_colors, strict=True)
    for landmark_id, point, color in rows:
        segment.landmarks[landmark_id] = (point.copy(), color.copy())
    for landmark_id in update.removed_landmark_ids.tolist():
        segment.landmarks.pop(landmark_id, None)


def _landmarks(segment: _Segment) -> Landmarks | None:
    if not segment.landmarks:
        return None
    ids = sorted(segment.landmarks)
    points, colors = zip(*(segment.landmarks[landmark_id] for landmark_id in ids), strict=True)
    return Landmarks(np.array(ids, np.int64), np.array(points, np.float64), np.array(colors, np.uint8))


def _selected(segment: _Segment, selection: Selection) -> tuple[PosedFrame, ...]:
    """The frames asked for, each where the last word on its keyframe puts it."""
    keyframes = segment.keyframes or {
        index: (pose.timestamp_ns, pose.T_world_camera)
        for index, pose in segment.poses.items()
        if pose.is_keyframe and pose.T_world_camera is not None
    }
    if selection.frames == "keyframes":
        frames = [PosedFrame(index, *keyframes[index]) for index in sorted(keyframes)]
    else:
        frames = _corrected_frames(segment, keyframes)
    return tuple(frames[:: selection.every])


def _corrected_frames(segment: _Segment, keyframes: dict[int, tuple[int, FloatArray]]) -> list[PosedFrame]:
    """All frames with a full pose; each moves with the keyframe before it, as published and as corrected."""
    anchors = sorted(index for index in keyframes if index in segment.poses)
    frames = []
    for index, pose in sorted(segment.poses.items()):
        if pose.T_world_camera is None or (pose.status is TrackingStatus.INITIALIZING and not pose.is_keyframe):
            continue
        T = pose.T_world_camera
        if anchors:
            anchor = anchors[max(0, bisect.bisect_right(anchors, index) - 1)]
            published = segment.poses[anchor].T_world_camera
            if published is not None:
                T = keyframes[anchor][1] @ invert_pose(published) @ T
        frames.append(PosedFrame(index, pose.timestamp_ns, T))
    return frames


# --- output directories ---


def input_from_directory(directory: Path, selection: Selection, camera_file: Path | None) -> ExportInput:
    """Trajectory, camera and tracks that `vo run --output` wrote. Raises ExportError, SourceError and TracksError.

    The refined trajectory is taken where there is one.
    """
    path = directory / REFINED_NAME
    if not path.is_file():
        path = directory / TUM_NAME
    if not path.is_file():
        raise ExportError(f"{directory}: holds no {TUM_NAME}; give a directory that vo run --output wrote")
    notes = [] if path.name == REFINED_NAME else [f"no {REFINED_NAME} there: poses are those published, never revised"]
    frames = _trajectory_frames(path, _frame_indices(directory))[:: selection.every]
    wanted = {frame.frame_index for frame in frames}
    tracks: dict[int, FrameTracks] = {}
    if (directory / TRACKS_DIRECTORY).is_dir():
        tracks = {
            seen.frame_index: seen for seen in read_tracks(directory / TRACKS_DIRECTORY) if seen.frame_index in wanted
        }
    else:
        notes.append(f"no {TRACKS_DIRECTORY}/ there: no points (vo run --save-tracks writes them)")
    camera = _directory_camera(directory, camera_file)
    return ExportInput(camera, tuple(frames), tracks, None, _scale_source(directory), tuple(notes))


def _trajectory_frames(path: Path, indices: dict[int, int]) -> list[PosedFrame]:
    """The poses of a file with the frames they belong to; without `indices` those are counted."""
    trajectory = read_trajectory(path)
    times_ns = trajectory.timestamps_ns.tolist()
    unknown = [time_ns for time_ns in times_ns if time_ns not in indices]
    if indices and unknown:
        raise ExportError(f"{path}: the pose at {unknown[0]} ns is not in {TUM_NAME}: are both of the same run?")
    rows = enumerate(zip(times_ns, trajectory.T_world_camera, strict=True))
    return [PosedFrame(indices.get(time_ns, row), time_ns, T) for row, (time_ns, T) in rows]


def _directory_camera(directory: Path, camera_file: Path | None) -> Camera:
    path = camera_file or directory / CAMERA_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the intrinsics are needed: --camera FILE")
    return read_camera(path).camera


def _frame_indices(directory: Path) -> dict[int, int]:
    """Frame index by time, where the run wrote which frames its poses belong to."""
    tum, kitti = directory / TUM_NAME, directory / KITTI_NAME
    if not (tum.is_file() and kitti.is_file() and frames_path(kitti).is_file()):
        return {}
    times_ns, indices = read_trajectory(tum).timestamps_ns, read_trajectory(kitti).frame_indices
    return {} if indices is None else dict(zip(times_ns.tolist(), indices.tolist(), strict=True))


def _scale_source(directory: Path) -> str:
    path = directory / SUMMARY_NAME
    if not path.is_file():
        return "unknown"
    try:
        return str(json.loads(path.read_text())["scale_source"])
    except (ValueError, KeyError) as error:
        raise ExportError(f"{path}: is no summary of a run ({error}); remove it, or run again") from error
