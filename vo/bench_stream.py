"""Whole runs as a user has them: through all threads to a published pose, for as many frames as one likes.

A few frames are held in memory and played forwards and backwards, so that neither the disk nor a jump of the camera
has a part in it. `lossless` shows the throughput, `latest` at the pace of a camera shows how old a pose is when it is
published; thousands of frames show whether memory stays flat.
"""

from __future__ import annotations

import resource
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from vo.bench_statistics import Timing, timing
from vo.config import Config
from vo.frontend import Frontend
from vo.message_stream import MessageStream
from vo.pipeline import run
from vo.publisher import Publisher
from vo.run_meter import RunMeter
from vo.sources import SkippedFrame
from vo.stages import FrameResult
from vo.types import Camera, Frame

MODES = ("lossless", "latest")
NUM_MEMORY_MARKS = 20
# Share of a run after which everything that a run keeps has been made once.
_SETTLED = 0.2
_SYNCHRONIZING = "synchronizing CUDA operation"


@dataclass(frozen=True, slots=True)
class MemoryMark:
    """Memory after so many frames: resident of the process, and on the GPU, where there is one."""

    num_frames: int
    host_bytes: int
    gpu_bytes: int | None = None
    gpu_reserved_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StreamTiming:
    """One run through the threaded pipeline to a publisher.

    mode        "lossless": every frame, as fast as they can be taken; "latest": at `hz`, old frames are given up.
    latency     from the capture of a frame to the publication of its pose.
    stages      (name, times), see `vo.run_meter.STAGES`.
    memory      along the run; `host_growth_bytes` and `gpu_growth_bytes` from a fifth of the run to its end.
    num_syncs   times that a thread waited for the whole device, after a fifth of the run; None without a GPU.
    """

    mode: str
    hz: float | None
    num_frames: int
    num_processed: int
    num_dropped: int
    num_poses: int
    lost_episodes: int
    fps: float
    latency: Timing
    stages: tuple[tuple[str, Timing], ...]
    memory: tuple[MemoryMark, ...]
    host_growth_bytes: int
    gpu_growth_bytes: int | None
    num_syncs: int | None


class MemorySource:
    """Frames in memory, played forwards and backwards until there have been `num_frames`; see `vo.sources.Source`."""

    is_live = False
    ground_truth: Path | None = None
    stereo = None
    skipped: Sequence[SkippedFrame] = ()

    def __init__(self, frames: Sequence[Frame], camera: Camera, num_frames: int, hz: float) -> None:
        """Raises ValueError for fewer than two frames: one again and again is a camera that hangs."""
        if len(frames) < 2:
            raise ValueError(f"frames: expected 2 or more, got {len(frames)}")
        self.name, self.camera, self.num_frames = "memory", camera, num_frames
        self._frames = frames
        self._period_ns = round(1e9 / hz)
        self._is_closed = False

    def frames(self) -> Iterator[Frame]:
        there_and_back = [*self._frames, *self._frames[-2:0:-1]]
        for index in range(self.num_frames):
            if self._is_closed:
                return
            image = there_and_back[index % len(there_and_back)].image
            yield Frame(index, index * self._period_ns, image, self.camera)

    def close(self) -> None:
        self._is_closed = True


class SyncCounter:
    """Counts what PyTorch says about operations that hold the calling thread up until the device is done."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def watching(self, device: torch.device) -> Iterator[SyncCounter]:
        """Other warnings go where they always go. Without a GPU nothing is watched."""
        if device.type != "cuda":
            yield self
            return
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=f".*{_SYNCHRONIZING}")
            warnings.showwarning = self._counting(warnings.showwarning)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield self
            finally:
                torch.cuda.set_sync_debug_mode(mode)

    def _counting(self, show: Callable[..., None]) -> Callable[..., None]:
        def counting(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if _SYNCHRONIZING in str(message):
                self.count += 1
            else:
                show(message, category, filename, lineno, file, line)

        return counting


class _Watch:
    """A sink that publishes, and notes memory along the way."""

    def __init__(self, stream: MessageStream, num_frames: int, device: torch.device, syncs: SyncCounter) -> None:
        self._stream, self._device, self._syncs = stream, device, syncs
        self._every = max(1, num_frames // NUM_MEMORY_MARKS)
        self._settled_at = int(num_frames * _SETTLED)
        self.marks: list[MemoryMark] = []
        self.num_syncs_at_start: int | None = None

    def __call__(self, result: FrameResult) -> None:
        self._stream.publish_pose(result.step.pose)
        self._stream.publish_tracks(result.step.tracks)
        if result.step.map_update is not None:
            self._stream.publish_map(result.step.map_update)
        number = result.captured.frame.index + 1
        if number >= self._settled_at and self.num_syncs_at_start is None:
            self.num_syncs_at_start = self._syncs.count
        if number % self._every == 0 or not self.marks:
            self.mark(number)

    def mark(self, num_frames: int) -> None:
        host_bytes = _resident_bytes()
        if self._device.type != "cuda":
            self.marks.append(MemoryMark(num_frames, host_bytes))
            return
        used, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        self.marks.append(MemoryMark(num_frames, host_bytes, used, reserved))


def measure_stream(
    frames: Sequence[Frame],
    camera: Camera,
    config: Config,
    frontend: Frontend,
    device: torch.device,
    *,
    mode: str,
    num_frames: int,
    hz: float | None = None,
) -> StreamTiming:
    """Runs `num_frames` through the pipeline. Raises what the run raises, ValueError for a mode that is none.

    hz  pace of the camera in "latest"; that of the frames' own times by default.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is none of {', '.join(MODES)}")
    is_live = mode == "latest"
    pace_hz = hz or _own_hz(frames)
    source = MemorySource(frames, camera, num_frames, pace_hz)
    config = replace(config, pipeline=replace(config.pipeline, threaded=True, policy=mode))
    meter, syncs = RunMeter(), SyncCounter()
    with (
        MessageStream(camera, with_tracks=config.publisher.publish_tracks) as stream,
        Publisher(replace(config.publisher, endpoint="tcp://127.0.0.1:*", keys=""), stream),
        syncs.watching(device),
    ):
        watch = _Watch(stream, num_frames, device, syncs)
        summary = run(config, source, frontend, (watch,), is_paced=is_live, meter=meter)
        watch.mark(summary.frames_processed)
    settled = next((mark for mark in watch.marks if mark.num_frames >= _SETTLED * num_frames), watch.marks[-1])
    last = watch.marks[-1]
    return StreamTiming(
        mode=mode,
        hz=pace_hz if is_live else None,
        num_frames=summary.frames_read,
        num_processed=summary.frames_processed,
        num_dropped=summary.frames_dropped,
        num_poses=summary.poses,
        lost_episodes=summary.lost_episodes,
        fps=summary.fps,
        latency=timing(meter.latencies_ms),
        stages=tuple((name, timing(times)) for name, times in meter.stages_ms.items() if len(times)),
        memory=tuple(watch.marks),
        host_growth_bytes=last.host_bytes - settled.host_bytes,
        gpu_growth_bytes=_difference(last.gpu_reserved_bytes, settled.gpu_reserved_bytes),
        num_syncs=syncs.count - (watch.num_syncs_at_start or 0) if device.type == "cuda" else None,
    )


def _resident_bytes() -> int:
    """Memory of this process now, or at its largest where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _difference(last: int | None, first: int | None) -> int | None:
    return None if last is None or first is None else last - first


def _own_hz(frames: Sequence[Frame]) -> float:
    """The frames' own rate by their median period; 30 where they carry no times."""
    periods_ns = np.diff([frame.timestamp_ns for frame in frames])
    period_ns = float(np.median(periods_ns)) if len(periods_ns) else 0.0
    return 1e9 / period_ns if period_ns > 0 else 30.0
