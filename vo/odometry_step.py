"""What one frame gave, however it was posed: what `Odometry.step` and `TwoViewOdometry.step` return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frontends.base import Matches
from vo.types import FrameTracks, MapUpdate, PoseEstimate, Rejection, TrackingStatus

# Pose uncertainty of a frame of which the rotation alone is known, while there is no unit of length.
UNKNOWN_TRANSLATION = np.diag([1.0, 1.0, 1.0, 1e-4, 1e-4, 1e-4])
UNKNOWN_TRANSLATION.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class OdometryStep:
    """Everything one frame gave: its pose, its tracks, the matches to the previous good frame if any were made, and
    what the window corrected since the last frame.
    """

    pose: PoseEstimate
    tracks: FrameTracks
    matches: Matches | None = None
    map_update: MapUpdate | None = None


def step_without_pose(
    frame_index: int,
    timestamp_ns: int,
    rejection: Rejection,
    matches: Matches | None,
    *,
    segment_id: int,
    scale_source: str = "relative",
) -> OdometryStep:
    """A frame of which nothing is known but why; `matches` are those it was tried with, if any were made."""
    num_matches, stop_layer = counts(matches)
    pose = PoseEstimate(
        frame_index=frame_index,
        timestamp_ns=timestamp_ns,
        T_world_camera=None,
        status=TrackingStatus.LOST,
        rejection=rejection,
        num_matches=num_matches,
        stop_layer=stop_layer,
        segment_id=segment_id,
        scale_source=scale_source,
    )
    none = np.zeros(0, np.int64)
    no_tracks = FrameTracks(
        frame_index, timestamp_ns, none, np.zeros((0, 2), np.float32), np.zeros(0, np.int32), np.zeros(0, np.bool_)
    )
    return OdometryStep(pose, no_tracks, matches)


def counts(matches: Matches | None) -> tuple[int, int]:
    """How many matches there are, and after how many layers the matcher stopped; zeros where none were made."""
    return (0, 0) if matches is None else (len(matches), matches.stop_layer)
