"""A whole run: a source through a frontend and the odometry to the sinks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from frontends.base import Features, Matches
from frontends.device_faults import device_faults
from vo.config import Config, GroundTruthScaleConfig
from vo.frontend import Frontend
from vo.match_ahead import MatchAhead
from vo.memory import loaded_objects_left_alone
from vo.modes import create_odometry
from vo.run_meter import RunMeter
from vo.scale import ExternalReadings
from vo.scale_source import ScaleSource, TruePosition
from vo.sources import Source
from vo.sources.inspected import InspectedSource
from vo.sources.webcam import LiveSource
from vo.stages import Sink, StageOptions, Stages
from vo.summary import RunSummary
from vo.trajectory import read_trajectory
from vo.two_view_odometry import TwoViewOdometry
from vo.types import ConfigError, FloatArray, Frame, MapUpdate

# A true position this far from the time of a frame is not the frame's.
_MAX_TRUTH_DELAY_NS = 20_000_000


def run(
    config: Config,
    source: Source,
    frontend: Frontend,
    sinks: Sequence[Sink] = (),
    *,
    threaded: bool | None = None,
    is_paced: bool = False,
    max_frames: int | None = None,
    stop: threading.Event | None = None,
    meter: RunMeter | None = None,
    on_last_map: Callable[[MapUpdate], None] | None = None,
    external: ExternalReadings | None = None,
) -> RunSummary:
    """Runs every frame of the source, in order, and closes it.

    sinks       are called one after the other with every result, always from the same thread.
    threaded    overrides `config.pipeline.threaded`; the trajectory is the same either way.
    is_paced    replays a file at its own timestamps, and drops frames like a camera where the run cannot keep up;
                a live source has its own pace.
    max_frames  ends the run early.
    stop        ends the run when it is set: what has been computed still reaches the sinks.
    meter       counts the run; a caller's own can be read when the run fails.
    on_last_map is called with what the window still corrected after the last frame.
    external    what somebody tells of the distance travelled, for the scale source of that name.

    Raises what a stage raised, after all of them have ended; DeviceError where a GPU failed.
    """
    meter, stop = meter or RunMeter(), stop or threading.Event()
    meter.mode = config.odometry.mode
    is_threaded = config.pipeline.threaded if threaded is None else threaded
    is_lossy = drops_oldest(config, source, is_paced)
    # A frame is matched to a keyframe as well. On a GPU that can begin while its pose does; on the CPU, whose cores the
    # stages share, it would only slow the others down.
    has_map = config.odometry.mode == "map"
    is_expecting = has_map and frontend.device_name != "cpu" and config.odometry.reconnect_keyframes > 0

    def begin_pair(features0: Features, features1: Features, matches: Matches) -> None:
        if isinstance(odometry, TwoViewOdometry):
            odometry.begin_pair(features0, features1, matches)

    ahead = MatchAhead(
        frontend.matcher.match,
        meter.count_match,
        (lambda: [view.features for view in odometry.keyframes[::-1]]) if is_expecting else None,
        None if has_map else begin_pair,
    )
    scale = ScaleSource(
        config.odometry.scale, rig=source.stereo, external=external, true_position=_true_position(config, source)
    )
    odometry = create_odometry(config, source.camera, ahead.match, waits_for_window=not is_lossy, scale=scale)
    stages = Stages(
        InspectedSource(source, meter.image_log.note),
        lambda frame: frontend.extractor.extract(frame.image),
        odometry.step,
        sinks,
        meter,
        stop,
        ahead,
    )
    options = StageOptions(
        is_threaded=is_threaded,
        drops_oldest=is_lossy,
        channel_capacity=config.pipeline.channel_capacity,
        is_paced=is_paced and not source.is_live,
        max_frames=max_frames,
    )
    try:
        with device_faults(), loaded_objects_left_alone():
            stages.run(options)
    finally:
        meter.radial_distortion = odometry.radial_distortion
        # Where its stage had to be left behind, the odometry is still in the middle of a step.
        if "track" not in meter.left_behind:
            last_update = odometry.finish()
            odometry.close()
            meter.focal, meter.camera = odometry.focal_estimate, odometry.camera
            if last_update is not None and on_last_map is not None:
                on_last_map(last_update)
    return summarise(meter, source, frontend, is_interrupted=stop.is_set())


def _true_position(config: Config, source: Source) -> TruePosition | None:
    """Where the camera truly was at a frame; only for the scale source that is named after the ground truth."""
    if not isinstance(config.odometry.scale, GroundTruthScaleConfig):
        return None
    if source.ground_truth is None:
        raise ConfigError(f"odometry.scale: {source.name} has no ground truth; choose another scale source")
    truth = read_trajectory(source.ground_truth)

    def position(frame: Frame) -> FloatArray | None:
        keys = truth.timestamps_ns if truth.has_times else np.arange(len(truth.timestamps_ns))
        wanted = frame.timestamp_ns if truth.has_times else frame.index
        row = int(np.argmin(np.abs(keys - wanted)))
        near = abs(int(keys[row]) - wanted) <= (_MAX_TRUTH_DELAY_NS if truth.has_times else 0)
        return truth.T_world_camera[row, :3, 3] if near else None

    return position


def drops_oldest(config: Config, source: Source, is_paced: bool) -> bool:
    """Whether a slow run loses frames instead of making the source wait."""
    policy = config.pipeline.policy
    return policy == "latest" or (policy == "auto" and (source.is_live or is_paced))


def summarise(meter: RunMeter, source: Source, frontend: Frontend, *, is_interrupted: bool) -> RunSummary:
    """The summary of what has been run so far."""
    left_behind = tuple(f"stage {name} was left behind: it did not end with the run" for name in meter.left_behind)
    summary = meter.summary(
        source.name,
        is_interrupted=is_interrupted,
        device=frontend.device_name,
        weights=frontend.weights,
        fallbacks=frontend.fallbacks + left_behind,
        engine=() if frontend.engine is None else frontend.engine.choices,
    )
    if not isinstance(source, LiveSource):
        return summary
    live = source.live_report()
    return replace(summary, live=live, frames_dropped=summary.frames_dropped + live.frames_dropped)
