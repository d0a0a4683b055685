"""What is left of a run: its summary and plot in the output directory, and a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vo.evaluation import Comparison, compare
from vo.frontend import Frontend
from vo.output import OutputError
from vo.pipeline import summarise
from vo.recorder import CONFIG_NAME, PLOT_NAME, SUMMARY_NAME, TUM_NAME, Recorder
from vo.run_files import write_run_camera
from vo.run_meter import RunMeter
from vo.self_calibration import FocalEstimate
from vo.sources import SkippedFrame, Source
from vo.sources.base import LiveReport
from vo.summary import RunSummary
from vo.trajectory import Trajectory, read_trajectory
from vo.types import FloatArray, PoseEstimate, VoError

_MAX_LISTED = 3
_TRY_NEXT = (
    "try next    vo run webcam:0 --fov-deg 70; vo run kitti:DIR --output out/k; vo listen in another terminal meanwhile"
)


class PoseLog:
    """The poses of a run, kept for its evaluation: only where there is a truth, so that what never ends never grows."""

    def __init__(self, *, is_wanted: bool = True) -> None:
        self._is_wanted = is_wanted
        self._timestamps_ns: list[int] = []
        self._posed: list[tuple[int, int, FloatArray]] = []
        self.scale_source = "relative"

    def add(self, pose: PoseEstimate) -> None:
        self.scale_source = pose.scale_source
        if not self._is_wanted:
            return
        self._timestamps_ns.append(pose.timestamp_ns)
        if pose.T_world_camera is not None:
            self._posed.append((pose.timestamp_ns, pose.frame_index, pose.T_world_camera))

    def compare(self, source: Source) -> Comparison | None:
        """The poses against the ground truth that came with the source; None without one, or without a pose.

        Aligned by a similarity where the scale is relative. Raises SourceError where the two do not fit together.
        """
        if source.ground_truth is None or not self._posed:
            return None
        timestamps_ns, frame_indices, poses = zip(*self._posed, strict=True)
        trajectory = Trajectory(
            np.array(timestamps_ns, np.int64), np.array(poses), source.name, np.array(frame_indices, np.int64)
        )
        return compare(
            trajectory,
            read_trajectory(source.ground_truth),
            "sim3" if self.scale_source == "relative" else "se3",
            frame_timestamps_ns=np.array(self._timestamps_ns, np.int64),
        )


def report(
    source: Source,
    frontend: Frontend,
    recorder: Recorder | None,
    poses: PoseLog,
    meter: RunMeter,
    *,
    is_interrupted: bool,
    is_quiet: bool,
) -> None:
    """Evaluates what was computed, writes summary and plot, prints the lines; does nothing without a frame.

    Raises OutputError, after the lines, where summary or plot cannot be written.
    """
    if meter.num_processed == 0:
        return
    summary = summarise(meter, source, frontend, is_interrupted=is_interrupted)
    comparison, reason = None, None
    try:
        comparison = poses.compare(source)
    except VoError as error:
        # The run itself is sound; that it cannot be evaluated is worth a line and no more.
        reason = str(error)
    if comparison is not None:
        summary = replace(summary, evaluation=comparison.evaluation)
    failure = None
    try:
        if recorder is not None:
            recorder.write_summary(summary)
            recorder.write_plot(comparison)
            if summary.self_calibration is not None and summary.self_calibration.is_found and meter.camera is not None:
                write_run_camera(recorder.output_dir, meter.camera, _calibration_line(summary.self_calibration))
    except OutputError as error:
        failure = error
    if not is_quiet:
        lines = report_lines(summary, frontend.description, meter.skipped, reason)
        if recorder is not None and failure is None:
            lines.append(f"results     {recorder.output_dir}/: {TUM_NAME}, {PLOT_NAME}, {SUMMARY_NAME}, {CONFIG_NAME}")
        if source.name == "demo":
            lines.append(_TRY_NEXT)
        print("\n".join(lines), flush=True)
    if failure is not None:
        raise failure


def report_lines(
    summary: RunSummary, frontend: str, skipped: Sequence[SkippedFrame], not_evaluated: str | None
) -> list[str]:
    """The run in a few lines."""
    s = summary
    lines = [
        f"frames      {s.frames_read} read, {s.poses} with a pose, {s.keyframes} keyframes; "
        f"{s.frames_dropped} dropped, {s.frames_skipped} skipped, lost {_times(s.lost_episodes)}{_stationary(s)}"
        f"{f' (interrupted after {s.frames_processed})' if s.interrupted else ''}",
        f"speed       {s.fps:.1f} fps with {frontend} on {s.device}{_latency(s)}",
        f"per frame   {_means(s)}median ms: {', '.join(f'{stage.name} {stage.p50_ms:.1f}' for stage in s.stages)}",
        *([_camera_line(s.live)] if s.live is not None else []),
        *([f"images      {_conditions(s)}"] if s.image_conditions else []),
        *(f"skipped     {frame.name}: {frame.reason}" for frame in skipped[:_MAX_LISTED]),
        *([f"skipped     and {num_more} more"] if (num_more := sum(s.count for s in skipped[_MAX_LISTED:])) else []),
        *(f"fallback    {fallback}" for fallback in s.fallbacks),
    ]
    if s.mode == "two_view":
        lines.append("odometry    two_view: a chain of relative poses without a map; errors add up along it")
    if s.self_calibration is not None:
        lines.append(f"calibration {_calibration_line(s.self_calibration)}")
    if s.evaluation is not None:
        e = s.evaluation
        lines.append(
            f"evaluation  ATE {e.ate_rmse_m:.3g} m over {e.path_length_m:.1f} m ({e.align}), rotation "
            f"{e.rpe_rot_deg:.3g} deg per frame, {e.num_poses} of {e.num_expected_poses} poses"
        )
    if not_evaluated is not None:
        lines.append(f"evaluation  none: {not_evaluated}")
    return lines


def _camera_line(live: LiveReport) -> str:
    gone = f"; gone {_times(live.reconnects)}, for {live.away_s:.1f} s" if live.reconnects else ""
    return f"camera      {live.negotiated}; measured {live.measured_fps:.2f} fps; times: {live.clock}{gone}"


def _conditions(summary: RunSummary) -> str:
    return ", ".join(f"{name.replace('_', ' ')} in {count}" for name, count in summary.image_conditions)


def _calibration_line(focal: FocalEstimate) -> str:
    if focal.is_found and focal.sigma_px is not None:
        return (
            f"focal length {focal.focal_px:.1f} px, 1 sigma {focal.sigma_px:.1f} px, found from the images "
            f"(began at {focal.initial_px:.1f} px)"
        )
    known = "no try yet" if focal.sigma_px is None else f"1 sigma {focal.sigma_px:.0f} px"
    return (
        f"these images do not show the focal length ({known}): the guess of {focal.initial_px:.1f} px was kept; "
        "move and turn the camera at the same time, longer"
    )


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")


def _stationary(summary: RunSummary) -> str:
    return f", standing still in {summary.stationary_frames}" if summary.stationary_frames else ""


def _latency(summary: RunSummary) -> str:
    if summary.latency_ms is None:
        return ""
    latency = summary.latency_ms
    return f"; latency p50 {latency.p50:.0f} ms, p95 {latency.p95:.0f} ms, p99 {latency.p99:.0f} ms"


def _means(summary: RunSummary) -> str:
    if summary.mean_matches is None or summary.mean_inliers is None:
        return ""
    layers = f", {summary.mean_stop_layer:.1f} layers" if summary.mean_stop_layer is not None else ""
    return f"{summary.mean_matches:.0f} matches, {summary.mean_inliers:.0f} inliers{layers}; "
