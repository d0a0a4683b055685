"""What a run is measured by: counts, times of every stage, and the latency from capture to publication."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence

from frontends.base import Features, Matches
from vo.odometry import OdometryStep
from vo.sources import SkippedFrame
from vo.types import TrackingStatus

STAGES = ("capture", "extract", "match", "track", "publish")


class RunMeter:
    """Collects while the stages run, each value from one thread only.

    Times are in ms. "track" is the odometry without the matching that it asks for.
    """

    def __init__(self) -> None:
        self.num_read = 0
        self.num_dropped = 0
        self.skipped: tuple[SkippedFrame, ...] = ()
        self.num_processed = 0
        self.num_poses = 0
        self.num_keyframes = 0
        self.num_lost_episodes = 0
        self.stages_ms = {stage: array("d") for stage in STAGES}
        self.latencies_ms = array("d")
        self.num_matches = array("d")
        self.num_inliers = array("d")
        self.stop_layers = array("d")
        self._was_lost = False
        self._match_ns = 0
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

    def timed_match(self, match: Callable[[Features, Features], Matches]) -> Callable[[Features, Features], Matches]:
        """`match` with its time counted as a stage of its own."""

        def timed(features0: Features, features1: Features) -> Matches:
            start_ns = time.monotonic_ns()
            matches = match(features0, features1)
            self._match_ns += time.monotonic_ns() - start_ns
            return matches

        return timed

    def add_stage(self, stage: str, elapsed_ns: int) -> None:
        self.stages_ms[stage].append(elapsed_ns * 1e-6)

    def add_track(self, elapsed_ns: int) -> None:
        """Counts one step of the odometry, its matching apart."""
        if self._match_ns:
            self.add_stage("match", self._match_ns)
        self.add_stage("track", elapsed_ns - self._match_ns)
        self._match_ns = 0

    def add_frame(self, step: OdometryStep, latency_ns: int) -> None:
        """Counts a frame that has reached every sink."""
        pose, is_lost = step.pose, step.pose.status is TrackingStatus.LOST
        self._last_ns = time.monotonic_ns()
        self.num_processed += 1
        self.num_poses += pose.T_world_camera is not None
        self.num_keyframes += pose.is_keyframe
        self.num_lost_episodes += is_lost and not self._was_lost
        self._was_lost = is_lost
        self.latencies_ms.append(latency_ns * 1e-6)
        if step.matches is not None:
            self.num_matches.append(len(step.matches))
            self.num_inliers.append(pose.num_inliers)
            self.stop_layers.append(step.matches.stop_layer)
