"""The tracks of every frame on disk, for those who want the front-end only: numbered .npz files of at most 1000 frames.

Each file `tracks_NNNNNN.npz` can be read by itself, with NumPy alone:

    frame_indices  (F,) int64, rising, also from file to file
    timestamps_ns  (F,) int64
    offsets        (F + 1,) int64: the tracks of frame i lie at offsets[i]:offsets[i + 1] of the arrays below
    track_ids      (N,) int64, stable over frames and files
    keypoints      (N, 2) float32 px, (0, 0) is the centre of the top-left pixel
    lengths        (N,) int32, frames the track has been seen in so far
    has_landmark   (N,) bool, whether the track has a triangulated point
"""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from vo.channel import Channel
from vo.output import OutputError, prepare_directory, write_atomically, writing
from vo.types import FrameTracks, VoError

MAX_FRAMES = 1000
MAX_OBSERVATIONS = 2_000_000
_PATTERN = "tracks_*.npz"
_ARRAYS = ("frame_indices", "timestamps_ns", "offsets", "track_ids", "keypoints", "lengths", "has_landmark")


class TracksError(VoError):
    """Tracks that cannot be read: names the file and the remedy."""


class TracksArchive:
    """Writes the tracks of a run into a directory. Not thread-safe: one thread adds.

    Memory is bounded by two files' worth. Files are compressed and written in a thread of its own; where the disk
    does not keep up with one file in the time of the next, `add` waits. Files of an earlier run are removed with the
    first frame.
    """

    def __init__(self, directory: Path, max_frames: int = MAX_FRAMES, max_observations: int = MAX_OBSERVATIONS) -> None:
        """Makes the directory. Raises OutputError where that, or a file in it, is not possible."""
        prepare_directory(directory)
        self.directory = directory
        self._max_frames, self._max_observations = max_frames, max_observations
        self._frames: list[FrameTracks] = []
        self._num_observations = 0
        self._num_files = 0
        self._parts: Channel[tuple[Path, list[FrameTracks]]] = Channel(1)
        self._failure: OutputError | None = None
        self._thread: threading.Thread | None = None

    def add(self, tracks: FrameTracks) -> None:
        """The tracks of the next frame. Raises OutputError where an earlier file could not be written."""
        if self._thread is None:
            self._begin()
        if self._failure is not None:
            raise self._failure
        self._frames.append(tracks)
        self._num_observations += len(tracks.track_ids)
        if len(self._frames) >= self._max_frames or self._num_observations >= self._max_observations:
            self._hand_over()

    def close(self) -> None:
        """Writes what is left; safe to call twice. Raises OutputError where the disk refuses."""
        if self._thread is None:
            return
        if self._frames:
            self._hand_over()
        self._parts.close()
        self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> TracksArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OutputError:
            if error is None:  # otherwise the error that ends the run is the one to report
                raise

    def _begin(self) -> None:
        with writing(self.directory):
            for path in self.directory.glob(_PATTERN):
                path.unlink()
        self._thread = threading.Thread(target=self._write_parts, name="tracks archive", daemon=True)
        self._thread.start()

    def _hand_over(self) -> None:
        path = self.directory / f"tracks_{self._num_files:06d}.npz"
        self._parts.put((path, self._frames))
        self._num_files += 1
        self._frames, self._num_observations = [], 0

    def _write_parts(self) -> None:
        """The thread."""
        for path, frames in self._parts:
            try:
                write_atomically(path, _npz(frames))
            except OutputError as error:
                self._failure = error
                self._parts.discard()


def read_tracks(directory: Path) -> Iterator[FrameTracks]:
    """The tracks of every frame that a `TracksArchive` wrote. Raises TracksError."""
    paths = sorted(directory.glob(_PATTERN))
    if not paths:
        raise TracksError(f"{directory}: holds no {_PATTERN}; write them with vo run ... --output DIR --save-tracks")
    for path in paths:
        yield from _read_part(path)


def _npz(frames: list[FrameTracks]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        frame_indices=np.array([frame.frame_index for frame in frames], np.int64),
        timestamps_ns=np.array([frame.timestamp_ns for frame in frames], np.int64),
        offsets=np.cumsum([0, *(len(frame.track_ids) for frame in frames)], dtype=np.int64),
        track_ids=np.concatenate([frame.track_ids for frame in frames]),
        keypoints=np.concatenate([frame.keypoints for frame in frames]),
        lengths=np.concatenate([frame.lengths for frame in frames]),
        has_landmark=np.concatenate([frame.has_landmark for frame in frames]),
    )
    return buffer.getvalue()


def _read_part(path: Path) -> Iterator[FrameTracks]:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip file, or cut short")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
        offsets = arrays["offsets"]
        for i, (frame_index, timestamp_ns) in enumerate(
            zip(arrays["frame_indices"], arrays["timestamps_ns"], strict=True)
        ):
            part = slice(int(offsets[i]), int(offsets[i + 1]))
            yield FrameTracks(
                int(frame_index),
                int(timestamp_ns),
                arrays["track_ids"][part],
                arrays["keypoints"][part],
                arrays["lengths"][part],
                arrays["has_landmark"][part],
            )
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise TracksError(f"{path}: is no file of tracks ({error}); write it anew with --save-tracks") from error
