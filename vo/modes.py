"""Which odometry a configuration asks for: with a map, or a chain of two views (`odometry.mode`)."""

from __future__ import annotations

from vo.config import Config
from vo.odometry import Odometry
from vo.posing import MatchFunction
from vo.scale_source import ScaleSource
from vo.two_view_odometry import TwoViewOdometry
from vo.types import Camera


def create_odometry(
    config: Config,
    camera: Camera,
    match: MatchFunction,
    *,
    waits_for_window: bool = True,
    scale: ScaleSource | None = None,
) -> Odometry | TwoViewOdometry:
    """The odometry of `config.odometry.mode`; `waits_for_window` and `scale` are for the one that has a map."""
    if config.odometry.mode == "two_view":
        return TwoViewOdometry(camera, config.odometry, config.two_view, match)
    return Odometry(camera, config.odometry, config.two_view, match, waits_for_window=waits_for_window, scale=scale)
