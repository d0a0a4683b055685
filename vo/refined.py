"""The refined trajectory: every frame where its keyframe ended up, beside the online one that is never revised.

A frame keeps its pose relative to the newest keyframe of its time; the keyframe moves with every correction.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

import numpy as np

from vo.geometry import invert_pose
from vo.output import write_atomically, writing
from vo.trajectory import tum_line
from vo.types import FloatArray, MapUpdate, PoseEstimate

REFINED_NAME = "trajectory_refined_tum.txt"
# Only the newest keyframes of a window move (at most 40); what is older than this never will.
_MAX_OPEN_KEYFRAMES = 512


class RefinedTrajectory:
    """Collects poses and corrections of a run; about 150 bytes a frame that is not settled yet."""

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

    def settle(self, num_open: int) -> str:
        """Gives up all but the newest `num_open` keyframes: the lines of their frames, which no correction reaches."""
        if len(self._keyframes) <= num_open:
            return ""
        gone = sorted(self._keyframes)[: len(self._keyframes) - num_open]
        end = bisect_left(self._references, gone[-1] + 1)
        lines = self._lines(end)
        del self._timestamps_ns[:end], self._references[:end], self._T_reference_frame[: 12 * end]
        for index in gone:
            del self._keyframes[index]
        return lines

    @property
    def num_open_keyframes(self) -> int:
        return len(self._keyframes)

    def lines(self) -> str:
        """The frames that are left, as lines of a TUM file."""
        return self._lines(len(self))

    def _lines(self, end: int) -> str:
        poses = zip(self._timestamps_ns[:end], self.poses()[:end], strict=True)
        return "".join(tum_line(time_ns, T) for time_ns, T in poses)

    def write(self, output_dir: Path) -> None:
        """trajectory_refined_tum.txt. Raises OutputError."""
        write_atomically(output_dir / REFINED_NAME, self.lines())


class RefinedFile:
    """Writes the refined trajectory of a run of any length: what can no longer change goes to the disk meanwhile.

    Until `finish` the lines are in a hidden file beside it; a result of an earlier run stays until then. It is open
    from the first pose on, so that a disk which refuses it does so at once and not after hours.
    """

    def __init__(self, output_dir: Path, max_open_keyframes: int = _MAX_OPEN_KEYFRAMES) -> None:
        self._path = output_dir / REFINED_NAME
        self._unfinished = output_dir / f".{REFINED_NAME}.unfinished"
        self._max_open = max_open_keyframes
        self._file: BufferedWriter | None = None
        self._has_frames = False
        self.trajectory = RefinedTrajectory()

    def correct(self, update: MapUpdate) -> None:
        self.trajectory.correct(update)

    def add(self, pose: PoseEstimate) -> None:
        """Takes in a frame, see `RefinedTrajectory.add`. Raises OutputError."""
        self.trajectory.add(pose)
        if not self._has_frames and len(self.trajectory) > 0:
            self._has_frames = True
            self._append("")
        if self.trajectory.num_open_keyframes > self._max_open:
            self._append(self.trajectory.settle(self._max_open // 2))

    def finish(self) -> None:
        """trajectory_refined_tum.txt, if there was a pose. Raises OutputError."""
        if not self._has_frames:
            return
        self._append(self.trajectory.lines())
        if self._file is not None:
            with writing(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._unfinished.replace(self._path)

    def close(self) -> None:
        """Leaves nothing unfinished behind; safe to call twice, and after `finish`."""
        if self._file is not None:
            with suppress(OSError):  # the disk that refuses may be why it is closed
                self._file.close()
                self._unfinished.unlink(missing_ok=True)

    def _append(self, lines: str) -> None:
        with writing(self._path):
            if self._file is None:
                self._file = self._unfinished.open("wb")
            self._file.write(lines.encode("ascii"))
