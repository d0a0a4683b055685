"""The configuration: one YAML file is one tree of frozen dataclasses, and every error names the path of its key."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class PublisherConfig:
    """Poses and tracks on a socket of this machine (docs/PROTOCOL.md).

    `endpoint` binds two ports: the one it names for messages, and the next one for snapshots. A queue of
    `send_hwm` messages holds what a consumer has not taken yet, each consumer its own; a full one drops what is new.
    """

    endpoint: str = setting("tcp://127.0.0.1:5570", help='where to publish, "tcp://127.0.0.1:PORT" or "off"')
    send_hwm: int = setting(2048, minimum=1, maximum=100_000, help="messages queued for a consumer that lags")
    linger_ms: int = setting(
        500, minimum=0, maximum=60_000, help="longest wait at the end for consumers to catch up, ms"
    )
    heartbeat_hz: float = setting(1.0, minimum=0.1, maximum=100.0, help="rate of the status topic, Hz")
    publish_tracks: bool = setting(True, help="publish the tracks of every frame too")
    max_snapshot_poses: int = setting(
        100_000, minimum=1, maximum=10_000_000, help="latest poses kept for late joiners, about 1 kB each"
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """Threads and the channels between them."""

    threaded: bool = setting(True, help="one thread per stage; false runs the same stages in one loop")
    policy: str = setting(
        "auto",
        choices=("auto", "lossless", "latest"),
        help="a full channel makes the capture wait (lossless) or drops its oldest one (latest); auto: latest if live",
    )
    channel_capacity: int = setting(2, minimum=1, maximum=8, help="items a channel between two stages holds")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set for a run."""

    two_view: TwoViewConfig = field(default_factory=TwoViewConfig)
    odometry: OdometryConfig = field(default_factory=OdometryConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
