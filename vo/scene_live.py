"""A run as it is being shown: takes messages as they come and keeps scene, picture and figures current. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from vo.message_types import (
    CompressedImage,
    Header,
    KeyframeUpdate,
    Message,
    PointsUpdate,
    RunState,
    StatusReport,
)
from vo.scene import STATUS_COLORS, Scene
from vo.scene_panel import DIM_COLOR, WARNING_COLOR, Picture, TextLine, TrackPicture
from vo.scene_truth import TruthAligner
from vo.trajectory import Trajectory
from vo.types import Camera, FrameTracks, PoseEstimate

MAX_PLAUSIBLE_LATENCY_MS = 60_000.0
LATENCY_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Link:
    """How the connection is.

    is_silent  nothing has come for longer than the heartbeat allows.
    problem    why not, where that is known.
    """

    endpoint: str
    is_heard: bool = False
    is_silent: bool = False
    num_lost: int = 0
    num_malformed: int = 0
    problem: str = ""


class LiveScene:
    """One publisher's run on the screen; begins again when the publisher does.

    scene, picture  what to draw.
    version         rises with every message that changes the picture or the figures.
    """

    def __init__(self, truth: Trajectory | None = None) -> None:
        self.scene = Scene()
        self.picture = TrackPicture()
        self.version = 0
        self._aligner = None if truth is None else TruthAligner(truth)
        self._session_id: str | None = None
        self._pose: PoseEstimate | None = None
        self._report: StatusReport | None = None
        self._latency_ms: float | None = None

    @property
    def state(self) -> RunState | None:
        """Where the run is, as its publisher said last."""
        return None if self._report is None else self._report.state

    def accept(self, message: Message, received_ns: int, picture: Picture | None = None) -> None:
        """Takes one message, which came at `received_ns`, Unix time; of an image, what `read_image` made of it."""
        if message.header.session_id != self._session_id:
            self._session_id = message.header.session_id
            self._forget()
        self.version += 1
        match message.body:
            case PoseEstimate() as pose:
                self._add_pose(pose)
                self._note_latency(message.header, received_ns)
            case FrameTracks() as tracks:
                self.picture.add_tracks(tracks)
            case CompressedImage() as image:
                self.picture.set_image(image, picture)
            case KeyframeUpdate() as update:
                self.scene.update_keyframes(
                    update.segment_id, update.keyframe_indices, update.T_world_keyframes, is_reset=update.is_reset
                )
            case PointsUpdate() as update:
                self.scene.update_landmarks(
                    update.segment_id,
                    update.landmark_ids,
                    update.landmarks,
                    update.landmark_colors,
                    update.removed_landmark_ids,
                    is_reset=update.is_reset,
                )
            case StatusReport() as report:
                self._report = report
            case Camera() as camera:
                self.scene.set_camera(camera)
                self.picture.set_camera(camera)

    def realign(self, *, is_final: bool = False) -> None:
        """Aligns the truth anew where there is enough more of it."""
        if self._aligner is None or not self._aligner.realign(is_final=is_final):
            return
        if self._aligner.alignment is not None:
            self.scene.T_world_truth = self._aligner.alignment.T_world_truth

    def lines(self, link: Link) -> list[TextLine]:
        """The figures, from the most to the least important."""
        pose, report, scene = self._pose, self._report, self.scene
        lines = [self._status_line()]
        fps = 0.0 if report is None else report.fps
        latency = "-" if self._latency_ms is None else f"{self._latency_ms:.1f} ms"
        lines.append(TextLine(f"{fps:.1f} fps    wire latency {latency}    {self._num_dropped()} dropped"))
        if pose is not None:
            inliers = f"{pose.num_inliers} inliers of {pose.num_matches} matches"
            layer = f"    stop layer {pose.stop_layer}" if pose.stop_layer else ""
            lines.append(TextLine(f"{inliers}    {self.picture.num_tracks} tracks{layer}"))
        counts = (scene.num_poses, "poses"), (scene.num_keyframes, "keyframes"), (scene.num_landmarks, "landmarks")
        lines.append(TextLine("    ".join(f"{number} {name}" for number, name in counts)))
        if pose is not None:
            is_relative = pose.scale_source == "relative"
            unit = "unit: depth of the first landmarks" if is_relative else "metres"
            segment = f"    segment {pose.segment_id}" if pose.segment_id else ""
            lines.append(TextLine(f"scale {pose.scale_source} ({unit}){segment}"))
        if self._aligner is not None:
            alignment = self._aligner.alignment
            lines.append(TextLine("truth: no pose of its time yet" if alignment is None else alignment.text))
        if report is not None and (trouble := _trouble(report)):
            lines.append(TextLine(trouble, WARNING_COLOR))
        if not self.picture.has_image:
            lines.append(TextLine("no images (publisher.image_hz is 0?)", DIM_COLOR))
        lines.append(self._link_line(link))
        return lines

    def _forget(self) -> None:
        self.scene.clear()
        self.picture.clear()
        self._pose = self._report = self._latency_ms = None
        if self._aligner is not None:
            self._aligner.clear()

    def _add_pose(self, pose: PoseEstimate) -> None:
        is_new_segment = self._pose is not None and pose.segment_id > self._pose.segment_id
        self._pose = pose
        self.scene.add_pose(pose)
        if self._aligner is None:
            return
        if is_new_segment:
            self._aligner.clear()
        line = self._aligner.add(pose)
        if line is not None:
            self.scene.add_truth(*line)

    def _note_latency(self, header: Header, received_ns: int) -> None:
        """From publishing to reception; means nothing between machines whose clocks differ, and is left out there."""
        latency_ms = (received_ns - header.publish_time_ns) * 1e-6
        if not 0.0 <= latency_ms <= MAX_PLAUSIBLE_LATENCY_MS:
            self._latency_ms = None
        elif self._latency_ms is None:
            self._latency_ms = latency_ms
        else:
            self._latency_ms += LATENCY_SHARE * (latency_ms - self._latency_ms)

    def _num_dropped(self) -> int:
        return 0 if self._report is None else self._report.num_dropped

    def _status_line(self) -> TextLine:
        pose = self._pose
        if pose is None:
            return TextLine("no pose yet", DIM_COLOR)
        parts = [pose.status.value.upper(), f"frame {pose.frame_index}"]
        parts += ["stationary"] * pose.is_stationary
        if pose.rejection is not None:
            parts.append(pose.rejection.value.replace("_", " "))
        return TextLine("    ".join(parts), STATUS_COLORS[pose.status])

    def _link_line(self, link: Link) -> TextLine:
        trouble = f"    {link.num_lost} lost" * bool(link.num_lost) + f"    {link.num_malformed} broken" * bool(
            link.num_malformed
        )
        if self.state is not None and self.state.is_final:
            return TextLine(f"the run has {self.state.value}{trouble}", WARNING_COLOR)
        if not link.is_heard or link.is_silent:
            silence = f"{link.endpoint} is silent" if link.is_heard else f"waiting for {link.endpoint}"
            return TextLine(f"{silence}{f': {link.problem}' * bool(link.problem)}{trouble}", WARNING_COLOR)
        return TextLine(f"{link.endpoint}{trouble}", DIM_COLOR)


def _trouble(report: StatusReport) -> str:
    """What is wrong with the camera, empty where nothing is."""
    if report.is_camera_away:
        return "the camera has gone; waiting for it"
    conditions = () if report.image_health is None else report.image_health.conditions
    words = ", ".join(condition.value.replace("_", " ") for condition in conditions)
    return f"image: {words}" if words else ""
