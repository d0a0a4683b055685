"""What a run is measured by: counts, times of every stage, and the latency from capture to publication."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vo.image_health import HealthLog
from vo.kernels import status as kernels_status
from vo.odometry_step import OdometryStep
from vo.samples import Samples
from vo.self_calibration import FocalEstimate
from vo.sources import SkippedFrame
from vo.summary import RunSummary, UsedWeights, latency_percentiles, library_versions, stage_times
from vo.types import Camera, TrackingStatus

STAGES = ("capture", "extract", "match", "track", "publish")


class RunMeter:
    """Collects while the stages run, each value from one thread only, in bounded memory however long the run is.

    Times are in ms. "match" is all that the matcher did for a frame, on whichever thread; "track" is the odometry
    without the time in which it waited for that. `left_behind` names the stages that did not end with the run.
    `summary` may be asked for at any time: what it says is what has been delivered so far.
    """

    def __init__(self) -> None:
        self.num_read = 0
        self.num_dropped = 0
        self.skipped: tuple[SkippedFrame, ...] = ()
        self.num_processed = 0
        self.num_poses = 0
        self.num_keyframes = 0
        self.num_lost_episodes = 0
        self.num_stationary = 0
        self.scale_source = "relative"
        self.mode = "map"
        self.stages_ms = {stage: Samples() for stage in STAGES}
        self.latencies_ms = Samples()
        self.num_matches = Samples()
        self.num_inliers = Samples()
        self.stop_layers = Samples()
        self.radial_distortion = 0.0
        self.focal: FocalEstimate | None = None
        self.camera: Camera | None = None
        self.left_behind: tuple[str, ...] = ()
        self.image_log = HealthLog()
        self._was_lost = False
        self._match_ns = 0
        self._waited_ns = 0
        self._start_ns = 0
        self._last_ns = 0

    @property
    def duration_s(self) -> float:
        """From the start of the run to its last frame."""
        return max(0, self._last_ns - self._start_ns) * 1e-9

    @property
    def fps(self) -> float:
        """Frames per second over the whole run, 0 before the first."""
        return self.num_processed / self.duration_s if self.duration_s > 0 else 0.0

    def start(self) -> None:
        self._start_ns = self._last_ns = time.monotonic_ns()

    def finish(self, skipped: Sequence[SkippedFrame]) -> None:
        """Notes what the source could not read."""
        self.skipped = tuple(skipped)

    def count_match(self, took_ns: int, waited_ns: int) -> None:
        """Counts one pair that the odometry asked for: what matching it took, and how long the odometry waited."""
        self._match_ns += took_ns
        self._waited_ns += waited_ns

    def add_stage(self, stage: str, elapsed_ns: int) -> None:
        self.stages_ms[stage].append(elapsed_ns * 1e-6)

    def add_track(self, elapsed_ns: int) -> None:
        """Counts one step of the odometry, its matching apart."""
        if self._match_ns:
            self.add_stage("match", self._match_ns)
        self.add_stage("track", elapsed_ns - self._waited_ns)
        self._match_ns = self._waited_ns = 0

    def add_frame(self, step: OdometryStep, latency_ns: int) -> None:
        """Counts a frame that has reached every sink."""
        pose, is_lost = step.pose, step.pose.status is TrackingStatus.LOST
        self._last_ns = time.monotonic_ns()
        self.num_processed += 1
        self.num_poses += pose.T_world_camera is not None
        self.num_keyframes += pose.is_keyframe
        self.num_stationary += pose.is_stationary
        self.num_lost_episodes += is_lost and not self._was_lost
        self._was_lost = is_lost
        self.scale_source = pose.scale_source
        self.latencies_ms.append(latency_ns * 1e-6)
        self.num_matches.append(pose.num_matches)
        self.num_inliers.append(pose.num_inliers)
        if step.matches is not None and step.matches.stop_layer > 0:
            self.stop_layers.append(step.matches.stop_layer)

    def summary(
        self,
        source_name: str,
        *,
        is_interrupted: bool,
        device: str,
        weights: tuple[UsedWeights, ...],
        fallbacks: tuple[str, ...],
        engine: tuple[str, ...] = (),
    ) -> RunSummary:
        """Everything counted so far; frames that were only left without their depth do not count as skipped."""
        return RunSummary(
            source=source_name,
            interrupted=is_interrupted,
            frames_read=self.num_read,
            frames_processed=self.num_processed,
            frames_dropped=self.num_dropped,
            frames_skipped=sum(skipped.count for skipped in self.skipped if not skipped.is_kept),
            poses=self.num_poses,
            keyframes=self.num_keyframes,
            lost_episodes=self.num_lost_episodes,
            stationary_frames=self.num_stationary,
            fps=self.fps,
            latency_ms=latency_percentiles(self.latencies_ms, self.latencies_ms.maximum),
            stages=stage_times(self.stages_ms),
            mean_matches=self.num_matches.mean,
            mean_inliers=self.num_inliers.mean,
            mean_stop_layer=self.stop_layers.mean,
            image_conditions=tuple((found.value, count) for found, count in self.image_log.counts.most_common()),
            scale_source=self.scale_source,
            mode=self.mode,
            radial_distortion=self.radial_distortion,
            self_calibration=self.focal,
            device=device,
            versions=library_versions(),
            weights=weights,
            fallbacks=fallbacks,
            geometry=kernels_status(),
            engine=engine,
        )
