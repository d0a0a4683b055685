"""The refined trajectory: every frame where its keyframe ended up, beside the online one that is never revised.

A frame keeps its pose relative to the newest keyframe of its time; the keyframe moves with every correction.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from vo.geometry import invert_pose
from vo.output import write_atomically
from vo.trajectory import tum_line
from vo.types import FloatArray, MapUpdate, PoseEstimate

REFINED_NAME = "trajectory_refined_tum.txt"


class RefinedTrajectory:
    """Collects poses and corrections of a run; about 150 bytes a frame."""

    def __init__(self) -> None:
        self._keyframes: dict[int, FloatArray] = {}
        self._newest_keyframe: int | None = None
        self._timestamps_ns = array("q")
        self._references = array("q")
        self._T_reference_frame = array("d")

    def __len__(self) -> int:
        return len(self._timestamps_ns)

    def correct(self, update: MapUpdate) -> None:
        """Takes in where keyframes are now."""
        for index, T in zip(update.keyframe_indices.tolist(), update.T_world_keyframes, strict=True):
            self._keyframes[index] = T

    def add(self, pose: PoseEstimate) -> None:
        """Takes in a frame, after the corrections that came out with it; one without a pose is left out."""
        if pose.T_world_camera is None:
            return
        if pose.is_keyframe or self._newest_keyframe is None:
            self._keyframes[pose.frame_index] = pose.T_world_camera
            self._newest_keyframe = pose.frame_index
        relative = invert_pose(self._keyframes[self._newest_keyframe]) @ pose.T_world_camera
        self._timestamps_ns.append(pose.timestamp_ns)
        self._references.append(self._newest_keyframe)
        self._T_reference_frame.extend(relative[:3].ravel().tolist())

    def poses(self) -> FloatArray:
        """(N, 4, 4) T_world_camera of the frames so far."""
        relative = np.tile(np.eye(4), (len(self), 1, 1))
        relative[:, :3] = np.array(self._T_reference_frame).reshape(-1, 3, 4)
        references = np.array([self._keyframes[index] for index in self._references]).reshape(-1, 4, 4)
        poses: FloatArray = references @ relative
        return poses

    def write(self, output_dir: Path) -> None:
        """trajectory_refined_tum.txt. Raises OutputError."""
        lines = [tum_line(time_ns, T) for time_ns, T in zip(self._timestamps_ns, self.poses(), strict=True)]
        write_atomically(output_dir / REFINED_NAME, "".join(lines))
