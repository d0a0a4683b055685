"""Writes a run into a directory while it goes on.

    config.yaml                  the resolved configuration
    trajectory_tum.txt           online T_world_camera, `timestamp_s tx ty tz qx qy qz qw`, a line per frame with a pose
    trajectory_kitti.txt         the same poses as 3x4 matrices
    trajectory_kitti_frames.txt  the frame index of every line of trajectory_kitti.txt
    summary.json                 see vo/summary.py
    trajectory.png               the path from above, with the aligned ground truth where there is one

The KITTI format has one line per frame and no way to leave one out. Nothing is made up for frames without a pose:
they have no line, and the third file says which frame each line is.

Every line reaches the operating system before the next frame is looked at, so a run that is killed keeps all but the
pose in hand. A line that cannot be written whole is taken back from all three files. Results of an earlier run in the
same directory stay until this one has its first frame; then the trajectories start anew, and a summary and a plot that
would describe another run are removed. No other file is touched.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vo.output import OutputError, prepare_directory, write_atomically, writing
from vo.path_sketch import PathSketch
from vo.plots import figure_png, path_figure
from vo.summary import RunSummary, summary_json
from vo.trajectory import Trajectory, frames_path, kitti_line, read_trajectory, tum_line
from vo.types import PoseEstimate

if TYPE_CHECKING:
    from vo.evaluation import Comparison

CONFIG_NAME = "config.yaml"
TUM_NAME = "trajectory_tum.txt"
KITTI_NAME = "trajectory_kitti.txt"
SUMMARY_NAME = "summary.json"
PLOT_NAME = "trajectory.png"


class Recorder:
    """The output directory of one run. Not thread-safe: one thread records.

    Every method raises OutputError, in one line with the path, where the disk is full, the directory has gone, or
    writing is not permitted; what was written until then stays valid.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._tum: _LineFile | None = None
        self._kitti: _LineFile | None = None
        self._frames: _LineFile | None = None
        self._last_ns: int | None = None
        self._num_poses = 0
        self._path = PathSketch()
        self._scale_source = "relative"
        prepare_directory(output_dir)

    @property
    def num_poses(self) -> int:
        return self._num_poses

    def write_config(self, text: str) -> None:
        """config.yaml, as it is handed in."""
        write_atomically(self.output_dir / CONFIG_NAME, text)

    def record(self, pose: PoseEstimate) -> None:
        """Append a frame. Raises ValueError where its time does not rise above that of the frame before."""
        if self._last_ns is not None and pose.timestamp_ns <= self._last_ns:
            raise ValueError(f"timestamp_ns: {pose.timestamp_ns} does not rise above {self._last_ns}")
        files = self._files()
        if pose.T_world_camera is not None:
            T = pose.T_world_camera
            # The index goes first: a kill in between leaves an index too many, which the reader knows how to take.
            lines = (f"{pose.frame_index}\n", kitti_line(T), tum_line(pose.timestamp_ns, T))
            _append_together(files, lines)
            self._num_poses += 1
            self._path.add(pose.timestamp_ns, T)
        else:
            self._path.interrupt()
        self._last_ns = pose.timestamp_ns
        self._scale_source = pose.scale_source

    def trajectory(self) -> Trajectory | None:
        """The poses written so far, read back from the disk, or None without one."""
        if self._num_poses == 0:
            return None
        tum = read_trajectory(self.output_dir / TUM_NAME)
        kitti = read_trajectory(self.output_dir / KITTI_NAME)
        return Trajectory(tum.timestamps_ns, tum.T_world_camera, tum.name, kitti.frame_indices)

    def write_summary(self, summary: RunSummary) -> None:
        """summary.json."""
        self._files()
        write_atomically(self.output_dir / SUMMARY_NAME, summary_json(summary))

    def write_plot(self, comparison: Comparison | None = None) -> None:
        """trajectory.png: what was recorded so far, over the ground truth of `comparison` if there is one."""
        self._files()
        unit = "relative units" if self._scale_source == "relative" else "m"
        figure = path_figure(self._path.trajectory(), comparison, breaks=self._path.breaks, unit=unit)
        write_atomically(self.output_dir / PLOT_NAME, figure_png(figure))

    def close(self) -> None:
        """Closes the files; safe to call twice."""
        for file in (self._frames, self._kitti, self._tum):
            if file is not None:
                file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _files(self) -> tuple[_LineFile, _LineFile, _LineFile]:
        """The open files of frame indices, KITTI and TUM lines; the first call replaces those of an earlier run."""
        if self._frames is None or self._kitti is None or self._tum is None:
            for name in (SUMMARY_NAME, PLOT_NAME):
                with writing(self.output_dir / name):
                    (self.output_dir / name).unlink(missing_ok=True)
            self._frames = _LineFile(frames_path(self.output_dir / KITTI_NAME))
            self._kitti = _LineFile(self.output_dir / KITTI_NAME)
            self._tum = _LineFile(self.output_dir / TUM_NAME)
        return self._frames, self._kitti, self._tum


class _LineFile:
    """A file that only ever holds whole lines, each handed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._file = path.open("wb", buffering=0)
        self._num_bytes = 0

    def append(self, line: str) -> None:
        data = memoryview(line.encode("ascii"))
        with writing(self.path):
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "the file was removed while the run went on")
            while data:  # a disk that fills up takes a part of a line before it refuses the rest
                data = data[self._file.write(data) :]

    def commit(self) -> None:
        """What was appended so far stays."""
        self._num_bytes = self._file.tell()

    def rollback(self) -> None:
        """Take back what was appended since the last commit."""
        with suppress(OSError):  # the error that led here is the one to report
            self._file.truncate(self._num_bytes)
            self._file.seek(self._num_bytes)

    def close(self) -> None:
        self._file.close()


def _append_together(files: tuple[_LineFile, ...], lines: tuple[str, ...]) -> None:
    """One line to each file, or none to any."""
    try:
        for file, line in zip(files, lines, strict=True):
            file.append(line)
    except OutputError:
        for file in files:
            file.rollback()
        raise
    for file in files:
        file.commit()
