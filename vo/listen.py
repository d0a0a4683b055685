"""What `vo listen` prints: one line for each message, for people or as JSON. Everything else goes to stderr."""

from __future__ import annotations

import base64
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from vo.client import Client
from vo.endpoints import DEFAULT_ENDPOINT
from vo.keys import ClientKeys
from vo.messages import (
    HEALTH_FIGURES,
    PUBLISHED_TOPICS,
    CompressedImage,
    Header,
    KeyframeUpdate,
    Message,
    PointsUpdate,
    RunState,
    StatusReport,
    Topic,
    quat_xyzw_from_rotation,
)
from vo.types import Camera, ConfigError, FrameTracks, ImageHealth, PoseEstimate

POLL_S = 0.5
SILENCE_S = 3.0
NUM_SHOWN_TRACKS = 3


@dataclass(frozen=True, slots=True)
class ListenCounts:
    """What came and what did not.

    final_state     how the run ended; None where it has not, or nobody said so.
    is_interrupted  the user ended it with Ctrl-C.
    """

    num_messages: int
    num_lost: int
    num_malformed: int
    num_sessions: int
    final_state: RunState | None
    is_interrupted: bool


def listen(
    endpoint: str = DEFAULT_ENDPOINT,
    topics: Sequence[str] = ("pose",),
    as_json: bool = False,
    max_messages: int | None = None,
    timeout_s: float | None = None,
    until_finished: bool = False,
    stream: TextIO | None = None,
    *,
    keys: ClientKeys | None = None,
) -> ListenCounts:
    """Prints messages to `stream` (stdout) until told otherwise.

    Poses come complete and in order from the first one of the run, however late this starts; every loss is reported.
    Ends after `max_messages`, after `timeout_s` without a message, with `until_finished` when the run is over and
    everything has come, when the reader of `stream` goes away, or by Ctrl-C. Raises ConfigError for a bad address or
    topic and VersionError where the publisher speaks another version.
    """
    wanted = _parsed_topics(topics)
    output = sys.stdout if stream is None else stream
    is_interrupted = False
    with Client(endpoint, wanted, keys=keys) as client:
        inbox = client.inbox
        try:
            _print_all(client, endpoint, output, as_json, max_messages, timeout_s, until_finished)
        except KeyboardInterrupt:
            is_interrupted = True
        except BrokenPipeError:
            _give_up_stream(output)
    return ListenCounts(
        num_messages=sum(inbox.num_received.values()),
        num_lost=sum(inbox.num_lost.values()),
        num_malformed=inbox.num_malformed,
        num_sessions=inbox.num_sessions,
        final_state=inbox.final_state,
        is_interrupted=is_interrupted,
    )


def as_json_line(message: Message) -> str:
    """The message as one JSON object; numbers that JSON does not know are null."""
    header, body = message.header, message.body
    fields = _header_fields(header)
    match body:
        case PoseEstimate():
            fields |= _pose_fields(body)
        case FrameTracks():
            fields |= {
                "track_ids": body.track_ids.tolist(),
                "keypoints": body.keypoints.tolist(),
                "lengths": body.lengths.tolist(),
                "has_landmark": body.has_landmark.tolist(),
            }
        case KeyframeUpdate():
            fields |= _map_fields(body) | {
                "keyframe_indices": body.keyframe_indices.tolist(),
                "keyframe_timestamps_ns": body.keyframe_timestamps_ns.tolist(),
                "T_world_keyframes": body.T_world_keyframes.tolist(),
            }
        case PointsUpdate():
            fields |= _map_fields(body) | {
                "landmark_ids": body.landmark_ids.tolist(),
                "landmarks": body.landmarks.tolist(),
                "landmark_colors": body.landmark_colors.tolist(),
                "removed_landmark_ids": body.removed_landmark_ids.tolist(),
            }
        case CompressedImage():
            data = base64.b64encode(body.data.tobytes()).decode()
            fields |= {"format": "jpeg", "width": body.width, "height": body.height, "data_base64": data}
        case StatusReport():
            fields |= {
                "state": body.state.value,
                "fps": body.fps,
                "num_frames": body.num_frames,
                "num_dropped": body.num_dropped,
                "num_sent": {topic.value: num_messages for topic, num_messages in body.num_sent.items()},
                "heartbeat_hz": body.heartbeat_hz,
                "image_health": None if body.image_health is None else _health_fields(body.image_health),
                "is_camera_away": body.is_camera_away,
            }
        case Camera():
            fields |= {
                "width": body.width,
                "height": body.height,
                "model": body.model.value,
                "K": body.K.tolist(),
                "distortion": body.distortion.tolist(),
            }
        case _:
            raise ValueError(f"topic {header.topic.value} is not published")
    return json.dumps(_finite(fields), allow_nan=False)


def as_text_line(message: Message) -> str:
    """The message as one line for people; long arrays are shortened."""
    header, body = message.header, message.body
    start = f"{header.topic.value:<7}{header.sequence:>6}"
    match body:
        case PoseEstimate():
            return f"{start}  {_frame_text(header)}  {_pose_text(body)}"
        case FrameTracks():
            shown = ", ".join(
                f"{track_id}: ({x:.1f}, {y:.1f})"
                for track_id, (x, y) in zip(
                    body.track_ids[:NUM_SHOWN_TRACKS], body.keypoints[:NUM_SHOWN_TRACKS], strict=True
                )
            )
            rest = ", ..." if len(body.track_ids) > NUM_SHOWN_TRACKS else ""
            counts = f"{len(body.track_ids)} tracks, {int(body.has_landmark.sum())} with a landmark"
            return f"{start}  {_frame_text(header)}  {counts}  px {shown}{rest}"
        case KeyframeUpdate():
            reset = "  whole map begins" if body.is_reset else ""
            return f"{start}  {_frame_text(header)}  {len(body.keyframe_indices)} keyframes placed{reset}"
        case PointsUpdate():
            reset = "  whole map begins" if body.is_reset else ""
            counts = f"{len(body.landmark_ids)} landmarks placed, {len(body.removed_landmark_ids)} removed"
            return f"{start}  {_frame_text(header)}  {counts}{reset}"
        case CompressedImage():
            return f"{start}  {_frame_text(header)}  {body.width} x {body.height} px  jpeg  {len(body.data)} bytes"
        case StatusReport():
            counts = f"{body.num_frames} frames, {body.num_dropped} dropped, {body.num_sent.get(Topic.POSE, 0)} poses"
            return f"{start}  {body.state.value}  {body.fps:.1f} frames/s  {counts}{_camera_text(body)}"
        case Camera():
            focal = f"f {body.K[0, 0]:.2f} {body.K[1, 1]:.2f} px  c {body.K[0, 2]:.2f} {body.K[1, 2]:.2f} px"
            return f"{start}  {body.width} x {body.height} px  {body.model.value}  {focal}"
        case _:
            raise ValueError(f"topic {header.topic.value} is not published")


def _health_fields(health: ImageHealth) -> dict[str, object]:
    figures: dict[str, object] = {name: getattr(health, name) for name in HEALTH_FIGURES}
    return figures | {"conditions": [condition.value for condition in health.conditions]}


def _camera_text(report: StatusReport) -> str:
    """What is wrong with the camera or its images, empty where nothing is."""
    conditions = () if report.image_health is None else report.image_health.conditions
    words = [condition.value.replace("_", " ") for condition in conditions]
    return f"  image: {', '.join(words)}" * bool(words) + "  camera away" * report.is_camera_away


def _parsed_topics(names: Sequence[str]) -> tuple[Topic, ...]:
    valid = {topic.value: topic for topic in PUBLISHED_TOPICS}
    for name in names:
        if name not in valid:
            raise ConfigError(f"--topic {name}: unknown topic; valid: {', '.join(valid)}")
    return tuple(valid[name] for name in names)


def _print_all(
    client: Client,
    endpoint: str,
    output: TextIO,
    as_json: bool,
    max_messages: int | None,
    timeout_s: float | None,
    until_finished: bool,
) -> None:
    notes = _Notes(client, endpoint)
    num_messages = 0
    last_s = time.monotonic()
    while max_messages is None or num_messages < max_messages:
        now_s = time.monotonic()
        left_s = math.inf if timeout_s is None else last_s + timeout_s - now_s
        message = client.receive(max(0.0, min(POLL_S, left_s)))
        notes.report()
        if message is not None:
            print(as_json_line(message) if as_json else as_text_line(message), file=output, flush=True)
            num_messages += 1
            last_s = time.monotonic()
        elif (until_finished and client.inbox.is_complete) or left_s <= 0:
            return


class _Notes:
    """What the user should know besides the messages, on stderr, each once."""

    def __init__(self, client: Client, endpoint: str) -> None:
        self._client, self._inbox, self._endpoint = client, client.inbox, endpoint
        self._start_s = time.monotonic()
        self._session_id: str | None = None
        self._num_malformed = 0
        self._is_silent = False
        self._final_state: RunState | None = None

    def report(self) -> None:
        inbox = self._inbox
        for gap in inbox.take_gaps():
            self._note(f"lost {gap.topic.value} {gap.first_sequence}..{gap.last_sequence}, {gap.num_messages} messages")
        if inbox.session_id != self._session_id:
            if self._session_id is not None:
                self._note(f"the publisher was started anew: session {inbox.session_id}")
            self._session_id, self._final_state = inbox.session_id, None
        if inbox.num_malformed != self._num_malformed:
            self._num_malformed = inbox.num_malformed
            self._note(f"threw away {self._num_malformed} malformed so far; the last: {inbox.last_error}")
        if inbox.final_state is not self._final_state and inbox.is_complete:
            self._final_state = inbox.final_state
            self._note(f"the run is over: {self._final_state.value if self._final_state else 'unknown'}")
        self._report_silence()

    def _report_silence(self) -> None:
        heard_s = self._start_s if self._inbox.last_heard_s is None else self._inbox.last_heard_s
        is_silent = time.monotonic() - heard_s > SILENCE_S and self._final_state is None
        if is_silent and not self._is_silent:
            state = "no publisher yet" if self._inbox.last_heard_s is None else "the publisher has gone silent"
            remedy = self._client.connection_problem or f"vo run ... --publish {self._endpoint}"
            self._note(f"{state}; waiting for {self._endpoint} ({remedy})")
        self._is_silent = is_silent

    @staticmethod
    def _note(text: str) -> None:
        print(f"vo listen: {text}", file=sys.stderr, flush=True)


def _header_fields(header: Header) -> dict[str, object]:
    return {
        "topic": header.topic.value,
        "session": header.session_id,
        "sequence": header.sequence,
        "frame_index": header.frame_index,
        "timestamp_ns": header.capture_time_ns,
        "publish_time_ns": header.publish_time_ns,
        "status": header.status.value,
    }


def _map_fields(update: KeyframeUpdate | PointsUpdate) -> dict[str, object]:
    return {
        "segment_id": update.segment_id,
        "scale_source": update.scale_source,
        "is_reset": update.is_reset,
    }


def _pose_fields(pose: PoseEstimate) -> dict[str, object]:
    T = pose.T_world_camera
    return {
        "position_xyz": None if T is None else T[:3, 3].tolist(),
        "quat_xyzw": None if T is None else quat_xyzw_from_rotation(T[:3, :3]).tolist(),
        "T_world_camera": None if T is None else T.tolist(),
        "covariance": None if pose.covariance is None else pose.covariance.tolist(),
        "segment_id": pose.segment_id,
        "scale_source": pose.scale_source,
        "rejection": None if pose.rejection is None else pose.rejection.value,
        "num_matches": pose.num_matches,
        "num_inliers": pose.num_inliers,
        "is_keyframe": pose.is_keyframe,
        "is_stationary": pose.is_stationary,
        "stop_layer": pose.stop_layer,
    }


def _pose_text(pose: PoseEstimate) -> str:
    parts = [f"{pose.status.value:<12}"]
    if pose.T_world_camera is not None:
        x, y, z = pose.T_world_camera[:3, 3]
        parts.append(f"xyz {x:9.3f} {y:9.3f} {z:9.3f}")
        parts.append("q " + " ".join(f"{value:7.4f}" for value in quat_xyzw_from_rotation(pose.T_world_camera[:3, :3])))
    parts.append(f"inliers {pose.num_inliers}/{pose.num_matches}")
    parts += [f"layers {pose.stop_layer}"] * (pose.stop_layer > 0)
    parts += ["keyframe"] * pose.is_keyframe + ["stationary"] * pose.is_stationary
    if pose.rejection is not None:
        parts.append(pose.rejection.value)
    return "  ".join(parts)


def _frame_text(header: Header) -> str:
    return f"frame {header.frame_index:>6}  t {(header.capture_time_ns or 0) / 1e9:.3f} s"


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [_finite(item) for item in value]
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case _:
            return value


def _give_up_stream(stream: TextIO) -> None:
    """The reader has gone; without this, Python flushes into the closed pipe once more when it exits, and complains."""
    if stream is sys.stdout:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
