"""Video files and streams."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vo.sources.base import SkipLog, SkippedFrame, Source
from vo.sources.cameras import CameraChoice, read_camera
from vo.sources.capture import Capture, open_file
from vo.sources.images import check_fps, refuse_fps
from vo.sources.sequence import check_size, nothing_readable
from vo.sources.timestamps import index_to_ns, read_times
from vo.types import Camera, Frame, SourceError

if TYPE_CHECKING:  # the configuration of the frontends imports torch
    from vo.config import WebcamConfig

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".mjpeg"})
_LIVE_SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "udp://", "rtp://", "srt://")
_NUM_PROBED = 3
# Times that go back by less than this are disorder, and such a frame is left out; by more, the clock was set.
_CLOCK_JUMP_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class _Grabbed:
    """One image of a video: None where it could not be decoded."""

    image: NDArray[np.uint8] | None
    position_ms: float


class _Reader:
    """Reads a capture ahead by as much as it takes to know whether its times can be trusted."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.probed: deque[_Grabbed] = deque()
        while len(self.probed) < _NUM_PROBED and (grabbed := self._grab()) is not None:
            self.probed.append(grabbed)
        self.has_sound_times = _are_rising([grabbed.position_ms for grabbed in self.probed])

    def next(self) -> _Grabbed | None:
        return self.probed.popleft() if self.probed else self._grab()

    def _grab(self) -> _Grabbed | None:
        if not self._capture.grab():
            return None
        position_ms = self._capture.position_ms()
        return _Grabbed(self._capture.retrieve(), position_ms)


class VideoSource:
    """A source over a video; see `vo.sources.base.Source` for the attributes.

    Times are `times_ns` where given; otherwise, with `fps`, of a constant rate; otherwise those of the container where
    its first ones rise, else of the rate it announces.
    """

    is_live = False
    stereo = None

    def __init__(
        self,
        name: str,
        capture: Capture,
        camera: Camera,
        *,
        times_ns: Sequence[int] | None = None,
        fps: float | None = None,
        ground_truth: Path | None = None,
    ) -> None:
        self.name = name
        self.camera = camera
        self.ground_truth = ground_truth
        self.num_frames: int | None = capture.num_frames or None
        self._capture = capture
        self._reader = _Reader(capture)
        self._times_ns = times_ns
        self._fps = self._constant_rate(fps)
        self._skip_log = SkipLog()
        self._lock = threading.Lock()
        self._is_closed = False
        if not any(grabbed.image is not None for grabbed in self._reader.probed):
            self.close()
            raise SourceError(f"{name}: opens as a video, but no image can be decoded; is the file whole?")

    @property
    def skipped(self) -> Sequence[SkippedFrame]:
        return self._skip_log.entries()

    def frames(self) -> Iterator[Frame]:
        """Yields every frame that can be decoded; raises SourceError on a change of size."""
        last_ns, index, shift_ns, period_ns = -1, 0, 0, 0
        while (grabbed := self._next()) is not None:
            timestamp_ns = self._timestamp_ns(index, grabbed.position_ms) + shift_ns
            if self._counts_container_time and last_ns - timestamp_ns > _CLOCK_JUMP_NS:
                # The clock was set, or its counter ran over: time goes on from here, one period after the last frame.
                jump_ns = last_ns - timestamp_ns
                self._skip(index, f"kept: the clock went back by {jump_ns * 1e-9:.1f} s and is taken on", is_kept=True)
                shift_ns += jump_ns + period_ns
                timestamp_ns = last_ns + period_ns
            if grabbed.image is None:
                self._skip(index, "cannot be decoded")
            elif timestamp_ns <= last_ns:
                self._skip(index, f"timestamp {timestamp_ns} ns does not rise above {last_ns} ns")
            else:
                check_size(grabbed.image.shape, self.camera, f"{self.name}: frame {index}")
                last_ns, period_ns = timestamp_ns, timestamp_ns - last_ns if last_ns >= 0 else period_ns
                yield Frame(index, timestamp_ns, grabbed.image, self.camera)
            index += 1
        if not self._is_closed:
            self._check_end(index, last_ns)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._capture.release()

    def _next(self) -> _Grabbed | None:
        with self._lock:
            return None if self._is_closed else self._reader.next()

    def _constant_rate(self, fps: float | None) -> float | None:
        """The rate to count time by, None where times or the container say it better."""
        if self._times_ns is not None:
            return None
        if fps is not None:
            return check_fps(fps)
        if self._reader.has_sound_times:
            return None
        if self._capture.fps <= 0:
            raise SourceError(f"{self.name}: the video carries no usable times and no rate; pass --fps")
        return self._capture.fps

    def _timestamp_ns(self, index: int, position_ms: float) -> int:
        if self._times_ns is not None:
            if index >= len(self._times_ns):
                raise SourceError(
                    f"{self.name}: the video goes on after {len(self._times_ns)} frames, for which it has times; "
                    "expected one line per frame in its times file"
                )
            return self._times_ns[index]
        if self._fps is not None:
            return index_to_ns(index, self._fps)
        return round(position_ms * 1e6) if math.isfinite(position_ms) else -1

    def _check_end(self, num_read: int, last_ns: int) -> None:
        if last_ns < 0:
            raise SourceError(nothing_readable(self.name, self.skipped))
        announced = len(self._times_ns) if self._times_ns is not None else self.num_frames or 0
        # A container's count may be an estimate (duration times rate), so one in a hundred is no loss.
        tolerated = 0 if self._times_ns is not None else 1 + announced // 100
        if announced - num_read > tolerated:
            self._skip(num_read, f"the video ends here, but {announced} frames are announced; is the file whole?")

    @property
    def _counts_container_time(self) -> bool:
        return self._times_ns is None and self._fps is None

    def _skip(self, index: int, reason: str, *, is_kept: bool = False) -> None:
        self._skip_log.add(SkippedFrame(index, f"frame {index}", reason, is_kept))


def open_video(name: str, path: Path, choice: CameraChoice, fps: float | None = None) -> VideoSource:
    """A video file.

    Beside `clip.mp4` may lie `clip.camera.yaml`, `clip.times.txt` (seconds, one line per frame) and
    `clip.groundtruth.txt`, or, where it is the only video of its directory, the same without `clip.`. Raises
    SourceError.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    times_file = _sidecar(path, "times.txt")
    times_ns = None
    if times_file is not None:
        refuse_fps(fps, f"{times_file} gives the times")
        times_ns = read_times(times_file)
    capture = open_file(str(path))
    if capture is None:
        raise SourceError(f"{path}: cannot be opened as a video; is it whole, and of a format that FFmpeg knows?")
    camera = _camera(name, capture, choice, _sidecar(path, "camera.yaml"))
    ground_truth = _sidecar(path, "groundtruth.txt")
    return VideoSource(name, capture, camera, times_ns=times_ns, fps=fps, ground_truth=ground_truth)


def open_video_url(
    url: str, choice: CameraChoice, fps: float | None = None, webcam: WebcamConfig | None = None
) -> Source:
    """A video behind a URL, or a live stream (RTSP and the like, or one without a known end). Raises SourceError."""
    from vo.sources.webcam import open_live_url

    is_live = url.lower().startswith(_LIVE_SCHEMES)
    if not is_live:
        capture = open_file(url)
        if capture is None:
            raise SourceError(f"{url}: cannot be opened; is the address right, and the server up?")
        if capture.num_frames > 0:
            return VideoSource(url, capture, _camera(url, capture, choice, None), fps=fps)
        capture.release()  # a stream is opened anew: without the frames that were read ahead of their time
    refuse_fps(fps, "a live stream is timed as its frames arrive")
    return open_live_url(url, choice, webcam)


def _camera(name: str, capture: Capture, choice: CameraChoice, own: Path | None) -> Camera:
    chosen = choice.resolve(*capture.size)
    if chosen is None and own is not None:
        chosen = read_camera(own)
    if chosen is None:
        chosen = choice.require(*capture.size, name)
    return chosen.camera


def _sidecar(path: Path, file_name: str) -> Path | None:
    """What belongs to a video and lies beside it: `clip.NAME`, or `NAME` where it cannot belong to another video."""
    named = path.with_name(f"{path.stem}.{file_name}")
    if named.is_file():
        return named
    shared = path.with_name(file_name)
    videos = [other for other in path.parent.iterdir() if other.suffix.lower() in VIDEO_SUFFIXES]
    return shared if shared.is_file() and len(videos) <= 1 else None


def _are_rising(times_ms: Sequence[float]) -> bool:
    """Whether the times that a container gives can be used: finite, not negative, and each above the one before."""
    is_finite = all(math.isfinite(time_ms) and time_ms >= 0 for time_ms in times_ms)
    return is_finite and all(earlier < later for earlier, later in pairwise(times_ms))
