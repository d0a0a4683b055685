"""`vo run`: everything between the command line and the pipeline."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from vo.config import Config, ExternalScaleConfig, PublisherConfig, StereoScaleConfig
from vo.config_loader import dump_config, load_config
from vo.frontend import Frontend, create_frontend, create_frontend_or_orb, on_device
from vo.image_health import HealthLog
from vo.interrupts import stop_on_signals
from vo.message_stream import MessageStream
from vo.message_types import ScaleQuantity
from vo.messages import RunState, Topic
from vo.pipeline import run
from vo.preview import ImagePreview
from vo.progress import Advance, progress
from vo.publisher import Publisher
from vo.run_files import RunFiles, WantedFiles, tracks_directory, write_run_camera
from vo.run_meter import RunMeter
from vo.run_report import report
from vo.run_results import RunResults
from vo.run_watch import RunWatch
from vo.scale import ExternalReadings
from vo.service import ServiceManager
from vo.sources import Source, open_source
from vo.sources.webcam import LiveSource
from vo.stages import FrameResult, Sink
from vo.types import Camera, ConfigError, MapUpdate, SourceError, WeightsError
from vo.viewer_process import ViewerProcess, check_viewable

USER_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the user asked for; None where the configuration decides."""

    source: str
    config: str | None = None
    overrides: tuple[str, ...] = ()
    output: Path | None = None
    publish: str | None = None
    keys: Path | None = None
    device: str | None = None
    max_frames: int | None = None
    is_realtime: bool = False
    camera_file: Path | None = None
    fov_deg: float | None = None
    self_calibrates: bool = False
    fps: float | None = None
    is_quiet: bool = False
    falls_back_to_orb: bool = False
    record: Path | None = None
    saves_tracks: bool = False
    views: bool = False
    watchdog_s: float | None = None


def run_command(request: RunRequest) -> int:
    """Runs and reports; the exit code is 0, 130 where the run was interrupted, 2 where the disk refused something.

    What can be refused is refused before the first frame; what has been computed is written whatever happens later.
    Raises VoError in one line.
    """
    config = requested_config(request)
    if request.views:
        check_viewable(config.publisher)
    with ExitStack() as resources:
        scale = config.odometry.scale
        source = open_source(
            request.source,
            camera_file=request.camera_file,
            fov_deg=request.fov_deg,
            fps=request.fps,
            wants_stereo=isinstance(scale, StereoScaleConfig),
            webcam=config.webcam,
        )
        if request.fov_deg is not None:
            _note(_guessed(request.fov_deg, config))
        external = ExternalReadings(scale) if isinstance(scale, ExternalScaleConfig) else None
        if external is not None and config.publisher.endpoint == "off":
            raise ConfigError("odometry.scale: external needs the publisher, whose socket takes the readings")
        resources.callback(source.close)
        results = resources.enter_context(
            RunResults(
                request.output,
                outlives_disk=source.is_live,
                is_evaluated=source.ground_truth is not None,
                say=_note,
            )
        )
        recorder = results.recorder
        files = resources.enter_context(RunFiles(wanted_files(request, config), source.name, is_quiet=request.is_quiet))
        # Whoever records the stream is entered before it, so that the final state reaches it; sockets come last.
        stream = resources.enter_context(
            MessageStream(
                source.camera,
                heartbeat_hz=config.publisher.heartbeat_hz,
                with_tracks=config.publisher.publish_tracks,
            )
        )
        files.follow(stream)
        publisher = None
        if config.publisher.endpoint != "off":
            publisher = resources.enter_context(Publisher(config.publisher, stream, accepts_scale=external is not None))
        viewer = None
        if publisher is not None and request.views:
            viewer = resources.enter_context(ViewerProcess(publisher.endpoint, source.ground_truth, _note))
        config, frontend = load_frontend(config, source.camera, request)
        if recorder is not None:
            recorder.write_config(dump_config(config))
            write_run_camera(recorder.output_dir, source.camera)
        meter = RunMeter()
        if not request.is_quiet:
            meter.image_log = HealthLog(_note)
            if isinstance(source, LiveSource):
                source.say = _note

        def correct(update: MapUpdate) -> None:
            results.correct(update)
            stream.publish_map(update)

        if viewer is not None:
            viewer.wait_until_ready()
        # Around the report too: a Ctrl-C must not cut the writing short.
        with stop_on_signals() as stop, watch_run(request, source, meter, stream, stop) as watch:
            if publisher is not None:
                publisher.on_stop = stop.set
            try:
                with progress(num_frames(source, request.max_frames), is_quiet=request.is_quiet) as advance:
                    run(
                        config,
                        source,
                        frontend,
                        (
                            *sinks(stream, image_preview(config.publisher), results, meter, advance),
                            files.add,
                            lambda result: take_readings(publisher, external),
                            lambda result: None if viewer is None else viewer.check(),
                        ),
                        is_paced=request.is_realtime,
                        max_frames=request.max_frames,
                        stop=stop,
                        meter=meter,
                        on_last_map=correct,
                        external=external,
                    )
            finally:
                is_interrupted = stop.is_set()
                results.finish(
                    lambda: report(
                        source,
                        frontend,
                        recorder,
                        results.poses,
                        meter,
                        is_interrupted=is_interrupted,
                        is_quiet=request.is_quiet,
                    )
                )
        if watch.has_fired:
            raise SourceError(
                f"{source.name}: no frame for {request.watchdog_s:g} s (--watchdog-s); is the camera there?"
            )
        if is_interrupted:
            stream.finish(RunState.INTERRUPTED)
    # The disk has refused something, which was said when it did.
    return USER_ERROR if files.failure or results.failure else INTERRUPTED if is_interrupted else 0


def watch_run(
    request: RunRequest, source: Source, meter: RunMeter, stream: MessageStream, stop: threading.Event
) -> RunWatch:
    """Who looks after the run: --watchdog-s, systemd, and consumers that want to know whether the camera is there."""
    return RunWatch(
        lambda: meter.num_read,
        is_away=lambda: isinstance(source, LiveSource) and source.is_silent,
        limit_s=request.watchdog_s,
        on_silence=stop.set,
        on_look=lambda is_away: stream.note_camera(is_away=is_away),
        manager=ServiceManager(),
    )


def take_readings(publisher: Publisher | None, external: ExternalReadings | None) -> None:
    """Hands what consumers said of the scale to the odometry."""
    if publisher is None or external is None:
        return
    for reading in publisher.take_scale_readings():
        if reading.timestamp_ns is None:
            continue  # the publisher fills the time in as soon as a frame has been published
        if reading.quantity is ScaleQuantity.SPEED:
            external.add_speed(reading.timestamp_ns, reading.value)
        elif reading.start_timestamp_ns is not None and reading.start_timestamp_ns < reading.timestamp_ns:
            external.add_distance(reading.start_timestamp_ns, reading.timestamp_ns, reading.value)


def _guessed(fov_deg: float, config: Config) -> str:
    remedy = "found while the camera moves" if config.odometry.self_calibration.enabled else "add --self-calibrate"
    return (
        f"the focal length is a guess from --fov-deg {fov_deg:g}; a wrong one bends the path, distortion too: "
        f"{remedy}, or measure it with vo calibrate"
    )


def _note(text: str) -> None:
    print(f"vo: {text}", file=sys.stderr, flush=True)


def wanted_files(request: RunRequest, config: Config) -> WantedFiles:
    """What the run is to write besides its results. Raises ConfigError for tracks without a place to go."""
    return WantedFiles(
        record=request.record,
        tracks_directory=tracks_directory(request.output) if request.saves_tracks else None,
        keyframe_quality=config.record.keyframe_quality,
    )


def requested_config(request: RunRequest) -> Config:
    """The configuration of the file with the overrides, among them the flags that stand for one key."""
    overrides = list(request.overrides)
    if request.device is not None:
        overrides.append(f"frontend.device={request.device}")
    if request.publish is not None:
        overrides.append(f"publisher.endpoint={request.publish}")
    if request.keys is not None:
        overrides.append(f"publisher.keys={request.keys}")
    if request.self_calibrates:
        overrides.append("odometry.self_calibration.enabled=true")
    return load_config(request.config, overrides)


def load_frontend(config: Config, camera: Camera, request: RunRequest) -> tuple[Config, Frontend]:
    """The networks, ready for a camera, and the configuration in use; what took the place of what is said at once.

    Raises WeightsError, DeviceError, ConfigError.
    """

    def load(device: torch.device) -> tuple[Config, Frontend]:
        if request.falls_back_to_orb:
            return create_frontend_or_orb(config, device)
        try:
            return config, create_frontend(config.frontend, device)
        except WeightsError as error:
            raise WeightsError(f"{error}; or run without them: --fallback-orb") from error

    used, frontend = on_device(config.frontend.device, load, camera)
    for fallback in frontend.fallbacks:
        _note(fallback)
    return used, frontend


def num_frames(source: Source, max_frames: int | None) -> int | None:
    """How many frames the run will have at most, None where that is not known."""
    known = [count for count in (source.num_frames, max_frames) if count is not None]
    return min(known, default=None)


def image_preview(config: PublisherConfig) -> ImagePreview:
    return ImagePreview(config.image_hz, config.image_max_size_px, config.image_quality)


def sinks(
    stream: MessageStream,
    preview: ImagePreview,
    results: RunResults,
    meter: RunMeter,
    advance: Advance,
) -> tuple[Sink, ...]:
    """Where every result goes: out of the process first, to the disk, to the evaluation, to the terminal."""

    def publish(result: FrameResult) -> None:
        stream.publish_pose(result.step.pose)
        stream.publish_tracks(result.step.tracks)
        if result.step.map_update is not None:
            stream.publish_map(result.step.map_update)
        image = preview.take(result.captured.frame) if stream.is_wanted(Topic.IMAGE) else None
        if image is not None:
            stream.publish_image(image)
        stream.publish_status(
            fps=meter.fps,
            num_frames=meter.num_processed + 1,
            num_dropped=meter.num_dropped,
            image_health=meter.image_log.last,
        )

    def show(result: FrameResult) -> None:
        advance(f"{result.step.pose.status.value}, {meter.fps:.1f} fps")

    return publish, results.add, show
