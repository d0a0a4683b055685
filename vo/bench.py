"""`vo bench`: how long every stage takes on real frames, and how that compares with other implementations."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import torch

from frontends.base import Extractor, Features, Matcher, Matches
from frontends.device_faults import device_faults
from vo.bench_compare import WARM_UP_CALLS, Conditions, compare
from vo.bench_machine import CpuWatch, Machine, portable_source, read_machine
from vo.bench_peers import NotComparable, create_peer
from vo.bench_report import BenchResult, Comparison, OdometryTiming, StageTiming, bench_json, bench_lines
from vo.bench_statistics import time_call, timing
from vo.bench_stream import MODES, StreamTiming, measure_stream
from vo.config import Config, FrontendConfig
from vo.config_loader import load_config
from vo.frontend import Frontend, create_frontend, device_name, select_device, warmed_up
from vo.kernels import status as kernels_status
from vo.modes import create_odometry
from vo.progress import Advance, progress
from vo.sources import open_source
from vo.summary import library_versions
from vo.types import Camera, ConfigError, Frame, SourceError

MIN_FRAMES = 3


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What the user asked for.

    source        None: the bundled clip.
    against       names of peers, see vo.bench_peers.PEERS.
    num_repeats   timed calls of either side in every comparison, and of every stage at least.
    num_frames    consecutive frames that the calls go through, at least 3.
    num_threads   of PyTorch and OpenCV; None: their own choice.
    model_files   for the peer "opencv": ALIKED and LightGlue as ONNX.
    stream_modes  whole runs to a published pose as well, of `num_stream_frames` each: "lossless", "latest".
    stream_hz     pace of the camera in "latest"; None: that of the frames.
    """

    source: str | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    device: str | None = None
    against: tuple[str, ...] = ()
    num_repeats: int = 30
    num_frames: int = 20
    num_threads: int | None = None
    is_json: bool = False
    model_files: tuple[str, ...] = ()
    camera_file: Path | None = None
    fov_deg: float | None = None
    stream_modes: tuple[str, ...] = ()
    num_stream_frames: int = 1000
    stream_hz: float | None = None


@runtime_checkable
class _HasFormulation(Protocol):
    @property
    def formulation(self) -> str: ...


@runtime_checkable
class _HasPrecision(Protocol):
    @property
    def precision(self) -> str: ...


def bench_command(request: BenchRequest) -> int:
    """Measures and prints; raises VoError in one line."""
    with progress(None, is_quiet=not sys.stderr.isatty()) as advance:
        result = run_bench(request, advance)
    print(
        bench_json(result) if request.is_json else "\n".join(bench_lines(result)), end="" if request.is_json else "\n"
    )
    return 0


def run_bench(request: BenchRequest, advance: Advance) -> BenchResult:
    """Everything that was asked for; `advance` hears what is being measured."""
    overrides = list(request.overrides)
    if request.device is not None:
        overrides.append(f"frontend.device={request.device}")
    config = load_config(request.config, overrides)
    if unknown := [mode for mode in request.stream_modes if mode not in MODES]:
        raise ConfigError(f"--stream: {unknown[0]!r} is none of {', '.join(MODES)}")
    device = select_device(config.frontend.device)
    config = config if device.type == "cpu" else _compiled(config)
    if request.num_threads is not None:
        torch.set_num_threads(request.num_threads)
        cv2.setNumThreads(request.num_threads)
    frames, camera, source_name = read_frames(request)
    machine, watch = _machine(device), CpuWatch()
    start_s = time.perf_counter()
    with device_faults():
        frontend = create_frontend(config.frontend, device)
        load_s = time.perf_counter() - start_s
        frontend = warmed_up(frontend, device, camera, [frame.image for frame in frames])
    warm_up_s = time.perf_counter() - start_s - load_s
    conditions = Conditions(frames, camera, config.two_view, device, request.num_repeats)
    odometry = measure(conditions, config, frontend, advance)
    streams = measure_streams(request, conditions, config, frontend, advance)
    comparisons, not_compared = compare_all(request, conditions, config.frontend, frontend, advance)
    return BenchResult(
        date=datetime.now(UTC).date().isoformat(),
        command=command_line(request, source_name),
        preset=Path(request.config).name if request.config is not None else None,
        settings=request.overrides,
        machine=machine,
        versions=library_versions(),
        source=portable_source(source_name),
        width=camera.width,
        height=camera.height,
        num_frames=len(frames),
        device=device_name(device),
        extractor=frontend.extractor.kind,
        extractor_precision=precision_of(frontend.extractor),
        matcher=config.frontend.matcher.name,
        matcher_precision=precision_of(frontend.matcher),
        max_keypoints=config.frontend.extractor.max_keypoints,
        weights=frontend.weights,
        load_s=load_s,
        warm_up_s=warm_up_s,
        engine=() if frontend.engine is None else frontend.engine.choices,
        fallbacks=frontend.fallbacks,
        odometry=odometry,
        peak_gpu_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        others_share=watch.others_share(),
        comparisons=comparisons,
        not_compared=not_compared,
        streams=streams,
        geometry=kernels_status(),
    )


def _compiled(config: Config) -> Config:
    """A start that nobody waits for: what is compiled here is found in the cache by every later one."""
    engine = config.frontend.engine
    if engine.compile != "auto":
        return config
    return replace(config, frontend=replace(config.frontend, engine=replace(engine, compile="matcher")))


def measure_streams(
    request: BenchRequest, conditions: Conditions, config: Config, frontend: Frontend, advance: Advance
) -> tuple[StreamTiming, ...]:
    """A whole run of every mode that was asked for."""
    found = []
    for mode in request.stream_modes:
        advance(f"{request.num_stream_frames} frames, {mode}")
        found.append(
            measure_stream(
                conditions.frames,
                conditions.camera,
                config,
                frontend,
                conditions.device,
                mode=mode,
                num_frames=request.num_stream_frames,
                hz=request.stream_hz,
            )
        )
    return tuple(found)


def compare_all(
    request: BenchRequest, conditions: Conditions, config: FrontendConfig, frontend: Frontend, advance: Advance
) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    """Every stage against every peer that was asked for, and why one is missing."""
    comparisons: list[Comparison] = []
    not_compared: list[str] = []
    for name in dict.fromkeys(request.against):
        try:
            peer = create_peer(name, config, frontend, conditions.device, request.model_files)
        except NotComparable as reason:
            not_compared.append(str(reason))
            continue
        not_compared += peer.reasons
        try:
            comparisons += compare(conditions, frontend, peer, advance)
        except Exception as error:  # noqa: BLE001
            # Somebody else's code may raise anything: what has been measured of ours must not be lost with it.
            cause = (str(error).splitlines() or [""])[0]
            not_compared.append(f"{name}: failed ({type(error).__name__}: {cause})")
    return tuple(comparisons), tuple(not_compared)


def read_frames(request: BenchRequest) -> tuple[list[Frame], Camera, str]:
    """The first frames of the source, its camera and its name. SourceError where there are fewer than three."""
    spec = request.source or "demo"
    try:
        source = open_source(spec, camera_file=request.camera_file, fov_deg=request.fov_deg)
    except SourceError as error:
        if request.source is None:
            raise SourceError(f"{error}; or name a SOURCE of real frames: vo bench kitti:DIR") from error
        raise
    try:
        frames = list(islice(source.frames(), request.num_frames))
    finally:
        source.close()
    if len(frames) < MIN_FRAMES:
        raise SourceError(
            f"{spec}: {len(frames)} frames, expected {MIN_FRAMES} or more; raise --frames or name another"
        )
    return frames, source.camera, source.name


def command_line(request: BenchRequest, source_name: str) -> str:
    """The command that repeats the measurement, with the part of the source that other machines share."""
    words = ["vo", "bench", portable_source(source_name)]
    words += ["--config", Path(request.config).name] if request.config is not None else []
    for override in request.overrides:
        words += ["--set", override]
    words += ["--device", request.device] if request.device is not None else []
    words += ["--against", ",".join(request.against)] if request.against else []
    words += ["--repeats", str(request.num_repeats), "--frames", str(request.num_frames)]
    words += ["--threads", str(request.num_threads)] if request.num_threads is not None else []
    if request.stream_modes:
        words += ["--stream", ",".join(request.stream_modes), "--stream-frames", str(request.num_stream_frames)]
        words += ["--stream-hz", f"{request.stream_hz:g}"] if request.stream_hz is not None else []
    return shlex.join(words)


def precision_of(method: Extractor | Matcher) -> str:
    """What a method says about its arithmetic; those that say nothing compute as they are written."""
    if isinstance(method, _HasFormulation):
        return method.formulation
    return method.precision if isinstance(method, _HasPrecision) else "as written"


def measure(conditions: Conditions, config: Config, frontend: Frontend, advance: Advance) -> OdometryTiming:
    """The stages of the odometry on consecutive frames, lap after lap until every stage has run often enough."""
    frames, camera, device = conditions.frames, conditions.camera, conditions.device
    first_frame_ms = time_call(lambda: frontend.extractor.extract(frames[0].image), device)
    _Lap(camera, config, frontend, device).run(frames[:WARM_UP_CALLS])
    laps = []
    for number in range(-(-conditions.num_repeats // (len(frames) - 1))):
        advance(f"stages, lap {number + 1}")
        lap = _Lap(camera, config, frontend, device)
        lap.run(frames)
        laps.append(lap)
    times = {name: [ms for lap in laps for ms in lap.times_ms[name]] for name in laps[0].times_ms}
    layers = [matches.stop_layer for lap in laps for matches in lap.matches if matches.stop_layer > 0]
    return OdometryTiming(
        first_frame_ms=first_frame_ms,
        stages=tuple(StageTiming(name, timing(values)) for name, values in times.items() if values),
        fps=1000 / float(np.mean(times["frame"])),
        mean_keypoints=_mean([count for lap in laps for count in lap.num_keypoints]),
        mean_matches=_mean([len(matches) for lap in laps for matches in lap.matches]),
        mean_stop_layer=_mean(layers) if layers else None,
    )


class _Lap:
    """One pass of an odometry over the frames, with the time of every stage."""

    def __init__(self, camera: Camera, config: Config, frontend: Frontend, device: torch.device) -> None:
        self._frontend = frontend
        self._device = device
        self._odometry = create_odometry(config, camera, self._timed_match)
        self._match_ms = 0.0
        self.times_ms: dict[str, list[float]] = {"extract": [], "match": [], "track": [], "frame": []}
        self.num_keypoints: list[int] = []
        self.matches: list[Matches] = []

    def run(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self._step(frame)

    def _step(self, frame: Frame) -> None:
        found: list[Features] = []
        extract_ms = time_call(lambda: found.append(self._frontend.extractor.extract(frame.image)), self._device)
        self._match_ms = 0.0
        step_ms = time_call(lambda: self._odometry.step(frame, found[0]), self._device)
        self.times_ms["extract"].append(extract_ms)
        if self._match_ms > 0:
            self.times_ms["match"].append(self._match_ms)
        self.times_ms["track"].append(step_ms - self._match_ms)
        self.times_ms["frame"].append(extract_ms + step_ms)
        self.num_keypoints.append(found[0].num_valid)

    def _timed_match(self, features0: Features, features1: Features) -> Matches:
        made: list[Matches] = []
        self._match_ms += time_call(
            lambda: made.append(self._frontend.matcher.match(features0, features1)), self._device
        )
        self.matches += made
        return made[0]


def _machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return read_machine(torch.get_num_threads())
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    return read_machine(torch.get_num_threads(), device_name(device), memory_bytes)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
