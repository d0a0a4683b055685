"""Where every frame is when keyframes are corrected later: each frame hangs on a keyframe and moves with it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.geometry import invert_pose, log_se3
from vo.message_types import KeyframeUpdate
from vo.types import FloatArray, PoseEstimate


@dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """A frame as it was seen: its keyframe, its pose in the frame of that keyframe (4, 4)."""

    keyframe_index: int
    T_keyframe_frame: FloatArray


class PoseGraph:
    """Poses of one segment as they are known now. A new segment begins with an empty graph.

    segment_id    the newest segment.
    scale_source  of its poses.
    """

    def __init__(self) -> None:
        self.segment_id = 0
        self.scale_source = "relative"
        self._keyframes: dict[int, FloatArray] = {}
        self._frames: dict[int, Attachment] = {}
        self._newest_keyframe: int | None = None

    def clear(self) -> None:
        """Forgets everything: another run begins."""
        self.segment_id = 0
        self._keyframes.clear()
        self._frames.clear()
        self._newest_keyframe = None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def newest_keyframe(self) -> int | None:
        return self._newest_keyframe

    def add(self, pose: PoseEstimate) -> None:
        """Hangs a frame on the newest keyframe; a lost frame has no place."""
        if pose.T_world_camera is None or pose.segment_id < self.segment_id:
            return
        self._enter(pose.segment_id)
        self.scale_source = pose.scale_source
        if pose.is_keyframe or self._newest_keyframe is None:
            self._keyframes.setdefault(pose.frame_index, pose.T_world_camera)
            self._newest_keyframe = pose.frame_index
        T_keyframe_world = invert_pose(self._keyframes[self._newest_keyframe])
        self._frames[pose.frame_index] = Attachment(self._newest_keyframe, T_keyframe_world @ pose.T_world_camera)

    def correct(self, update: KeyframeUpdate) -> None:
        """Moves keyframes, and with them the frames that hang on them."""
        if update.segment_id < self.segment_id:
            return
        self._enter(update.segment_id)
        for frame_index, T in zip(update.keyframe_indices.tolist(), update.T_world_keyframes, strict=True):
            self._keyframes[frame_index] = T
            # A joiner who comes late hears of keyframes whose poses it has seen without knowing what they were.
            attachment = self._frames.get(frame_index)
            if attachment is None or attachment.keyframe_index != frame_index:
                self._frames[frame_index] = Attachment(frame_index, np.eye(4))

    def pose(self, frame_index: int) -> FloatArray | None:
        """(4, 4) T_world_camera of a frame as it is known now; None for one without a pose."""
        attachment = self._frames.get(frame_index)
        if attachment is None:
            return None
        T: FloatArray = self._keyframes[attachment.keyframe_index] @ attachment.T_keyframe_frame
        return T

    def is_settled(self, frame_index: int, num_keyframes: int) -> bool:
        """Whether so many keyframes have come after that of the frame that corrections of it are over, as a rule."""
        attachment = self._frames.get(frame_index)
        if attachment is None:
            return False
        return sum(index > attachment.keyframe_index for index in self._keyframes) >= num_keyframes

    def frame_indices(self) -> NDArray[np.int64]:
        """(N,) frames with a pose, rising."""
        return np.array(sorted(self._frames), np.int64)

    def _enter(self, segment_id: int) -> None:
        if segment_id > self.segment_id:
            self.clear()
            self.segment_id = segment_id


def moved(T0: FloatArray, T1: FloatArray, depth: float) -> float:
    """How far a surface at `depth` moves when the camera that measured it turns out to be at T1 instead of T0."""
    xi = log_se3(invert_pose(T0) @ T1)
    return float(np.linalg.norm(xi[:3]) + depth * np.linalg.norm(xi[3:]))
