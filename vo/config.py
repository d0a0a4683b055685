"""The configuration: one YAML file is one tree of frozen dataclasses, and every error names the path of its key."""

from __future__ import annotations

from dataclasses import dataclass

from frontends.base import check_settings, setting


@dataclass(frozen=True, slots=True)
class TwoViewConfig:
    """Relative pose of two cameras from matches."""

    method: str = setting("usac_magsac", choices=("usac_magsac", "usac_accurate", "ransac"), help="robust estimator")
    threshold_px: float = setting(1.0, minimum=0.05, maximum=20.0, help="inlier distance to the epipolar line, px")
    confidence: float = setting(0.999, minimum=0.5, maximum=0.999999, help="probability of an all-inlier sample")
    max_iterations: int = setting(2000, minimum=10, maximum=100_000, help="samples drawn at most")
    min_inliers: int = setting(20, minimum=6, help="fewer inliers are a rejection")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class OdometryConfig:
    """Tracking, landmarks and the window."""

    min_matches: int = setting(25, minimum=8, help="fewer matches to the previous frame are a rejection")

    def __post_init__(self) -> None:
        check_settings(self)
