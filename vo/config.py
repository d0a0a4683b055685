"""The configuration: one YAML file is one tree of frozen dataclasses, and every error names the path of its key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from frontends.aliked import AlikedConfig
from frontends.base import check_settings, setting
from frontends.engine import EngineConfig
from frontends.followed_points import FollowedConfig
from frontends.lightglue import LightGlueConfig
from frontends.loftr import LoftrConfig
from frontends.nearest import NearestConfig
from frontends.orb import OrbConfig
from frontends.r2d2 import R2d2Config
from frontends.xfeat import XFeatConfig
from frontends.xfeat_star import XFeatStarConfig


@dataclass(frozen=True, slots=True)
class TwoViewConfig:
    """Relative pose of two cameras from matches."""

    # What is found is refined with a kernel of its own: a slower estimator gives the same pose in the end.
    method: str = setting(
        "usac_fast", choices=("usac_fast", "usac_magsac", "usac_accurate", "ransac"), help="robust estimator"
    )
    threshold_px: float = setting(1.0, minimum=0.05, maximum=20.0, help="inlier distance to the epipolar line, px")
    confidence: float = setting(0.9999, minimum=0.5, maximum=0.999999, help="probability of an all-inlier sample")
    max_iterations: int = setting(2000, minimum=10, maximum=100_000, help="samples drawn at most")
    min_inliers: int = setting(20, minimum=6, help="fewer inliers are a rejection")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class RelativeScaleConfig:
    """No scale source: the unit is that of the first landmarks."""

    name: Literal["relative"] = "relative"

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class _MetricScaleConfig:
    """What every scale source has: how its readings, one per keyframe, are followed (vo.scale.ScaleFilter)."""

    name: str = "metric"
    drift_per_keyframe: float = setting(
        0.003, minimum=0.0, maximum=0.2, help="drift of the map's scale from keyframe to keyframe, ratio, 1 sigma"
    )
    max_step: float = setting(
        0.02, minimum=1e-4, maximum=0.5, help="largest change of the map's scale at one keyframe, ratio"
    )
    gate_sigmas: float = setting(
        3.5, minimum=1.0, maximum=20.0, help="readings that are further off are left out, standard deviations"
    )
    max_outliers: int = setting(
        6, minimum=1, maximum=1000, help="readings left out in a row that agree: the filter begins anew with them"
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class _RangeScaleConfig(_MetricScaleConfig):
    """Readings from metric depths at the landmarks of a keyframe."""

    min_depth_m: float = setting(0.2, minimum=0.0, maximum=1000.0, help="nearer depths are left out, m")
    max_depth_m: float = setting(8.0, minimum=0.1, maximum=1000.0, help="farther depths are left out, m")
    min_readings: int = setting(20, minimum=3, maximum=10_000, help="landmarks with a depth, for a reading")
    max_spread: float = setting(
        0.2, minimum=0.001, maximum=10.0, help="of the ratios of single landmarks, for a reading, 1 sigma"
    )
    systematic: float = setting(
        0.005, minimum=0.0, maximum=0.5, help="error that all depths of a frame share, ratio, 1 sigma"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.min_depth_m >= self.max_depth_m:
            raise ValueError(f"min_depth_m: {self.min_depth_m} is not below max_depth_m {self.max_depth_m}")


@dataclass(frozen=True, slots=True)
class DepthScaleConfig(_RangeScaleConfig):
    """The depth images of an RGB-D camera (TUM)."""

    name: Literal["depth"] = "depth"
    edge_ratio: float = setting(
        0.05, minimum=0.001, maximum=1.0, help="spread of depths around a keypoint that marks an edge, ratio"
    )
    # Off: depth images that nobody registered, which many sequences have, would bend the map.
    inverse_sigma: float = setting(
        0.0,
        minimum=0.0,
        maximum=1.0,
        help="of inverse depths at landmarks, as measurements of the window, 1/m, 1 sigma (registered Kinect depth: "
        "0.008); 0: depths set the unit and no more",
    )


@dataclass(frozen=True, slots=True)
class StereoScaleConfig(_RangeScaleConfig):
    """A second camera (KITTI image_1, EuRoC cam1), matched densely at keyframes."""

    name: Literal["stereo"] = "stereo"
    max_depth_m: float = setting(40.0, minimum=0.1, maximum=1000.0, help="farther depths are left out, m")
    max_disparity_px: int = setting(128, minimum=16, maximum=1024, help="largest disparity searched, px")
    block_px: int = setting(5, minimum=3, maximum=21, help="side of the blocks that are matched, odd, px")
    consistency_px: float = setting(1.0, minimum=0.1, maximum=10.0, help="left and right may differ by, px")
    min_disparity_px: float = setting(2.0, minimum=0.1, maximum=100.0, help="smaller disparities are left out, px")

    def __post_init__(self) -> None:
        _RangeScaleConfig.__post_init__(self)
        if self.block_px % 2 == 0:
            raise ValueError(f"block_px: {self.block_px} is even; the block needs a middle")


@dataclass(frozen=True, slots=True)
class GroundPlaneScaleConfig(_MetricScaleConfig):
    """The height of the camera above a flat ground that it looks along (KITTI: 1.65 m). Distances are in heights."""

    name: Literal["ground_plane"] = "ground_plane"
    camera_height_m: float = setting(
        0.0, minimum=0.0, maximum=1000.0, help="height of the camera above the ground, m; must be given"
    )
    pitch_deg: float = setting(0.0, minimum=-60.0, maximum=60.0, help="the camera looks below the horizon by, deg")
    tilt_sigma_deg: float = setting(0.2, minimum=0.01, maximum=20.0, help="how well that and level are known, deg")
    max_tilt_deg: float = setting(3.0, minimum=0.1, maximum=90.0, help="a plane further from level is no ground, deg")
    min_ahead: float = setting(3.0, minimum=0.0, maximum=1000.0, help="nearest ground used, camera heights")
    max_ahead: float = setting(8.0, minimum=0.1, maximum=1000.0, help="farthest ground used, camera heights")
    max_side: float = setting(1.0, minimum=0.1, maximum=100.0, help="farthest ground to the sides, camera heights")
    min_pixels: int = setting(
        1000, minimum=100, maximum=1_000_000, help="of the ground, every second by row and column"
    )
    min_flow_px: float = setting(3.0, minimum=0.1, maximum=1000.0, help="motion of the ground, at least, px")
    max_flow_px: float = setting(80.0, minimum=1.0, maximum=10_000.0, help="motion of the ground, at most, px")
    min_correlation: float = setting(0.6, minimum=-1.0, maximum=1.0, help="of the two images of the ground")
    max_disagreement: float = setting(
        0.15, minimum=0.001, maximum=10.0, help="of the distances of the near and the far half of the ground, ratio"
    )
    pixel_correlation: float = setting(
        20.0, minimum=1.0, maximum=10_000.0, help="neighbouring pixels that count as one measurement"
    )
    max_sigma: float = setting(0.05, minimum=0.001, maximum=1.0, help="of a reading that is used, ratio")
    systematic: float = setting(
        0.035, minimum=0.0, maximum=0.5, help="how flat the ground and how constant the height are, ratio, 1 sigma"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.camera_height_m <= 0:
            raise ValueError("camera_height_m: missing; give the height of the camera above the ground, m")
        if self.min_ahead >= self.max_ahead:
            raise ValueError(f"min_ahead: {self.min_ahead} is not below max_ahead {self.max_ahead}")
        if self.min_flow_px >= self.max_flow_px:
            raise ValueError(f"min_flow_px: {self.min_flow_px} is not below max_flow_px {self.max_flow_px}")


@dataclass(frozen=True, slots=True)
class ExternalScaleConfig(_MetricScaleConfig):
    """Speeds or distances that somebody sends over the wire while the run goes on (docs/PROTOCOL.md)."""

    name: Literal["external"] = "external"
    max_readings: int = setting(1000, minimum=2, maximum=1_000_000, help="latest readings kept")
    max_gap_s: float = setting(
        0.5, minimum=0.001, maximum=60.0, help="a speed holds for at most this long before and after its time, s"
    )
    min_distance_m: float = setting(0.1, minimum=0.001, maximum=1000.0, help="between keyframes, for a reading, m")
    speed_sigma_mps: float = setting(0.1, minimum=0.0, maximum=100.0, help="error of a speed, m/s, 1 sigma")


@dataclass(frozen=True, slots=True)
class GroundTruthScaleConfig(_MetricScaleConfig):
    """The true trajectory. For debugging only: such a run proves nothing, and every output names it."""

    name: Literal["groundtruth"] = "groundtruth"
    min_distance_m: float = setting(0.1, minimum=0.001, maximum=1000.0, help="between keyframes, for a reading, m")
    systematic: float = setting(0.01, minimum=0.0, maximum=0.5, help="error of the true distances, ratio, 1 sigma")


ScaleConfig = (
    RelativeScaleConfig
    | DepthScaleConfig
    | StereoScaleConfig
    | GroundPlaneScaleConfig
    | ExternalScaleConfig
    | GroundTruthScaleConfig
)


@dataclass(frozen=True, slots=True)
class SelfCalibrationConfig:
    """The focal length, and what radial distortion there is, from the first keyframes (vo.self_calibration)."""

    enabled: bool = setting(False, help="look for the focal length; its present value is where the search begins")
    focal_sigma: float = setting(0.3, minimum=0.001, maximum=1.0, help="how well it is known so far, ratio, 1 sigma")
    radial_sigma: float = setting(
        0.05, minimum=0.0, maximum=1.0, help="radial distortion the calibration may lack, 1 sigma; 0: none"
    )
    min_keyframes: int = setting(12, minimum=4, maximum=1000, help="keyframes at the first try")
    max_keyframes: int = setting(60, minimum=4, maximum=200, help="newest keyframes that are looked at")
    max_sigma: float = setting(
        0.03, minimum=0.0005, maximum=0.5, help="a focal length is believed from this precision on, ratio, 1 sigma"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.min_keyframes > self.max_keyframes:
            raise ValueError(f"min_keyframes: {self.min_keyframes} is above max_keyframes {self.max_keyframes}")


@dataclass(frozen=True, slots=True)
class OdometryConfig:
    """Tracking, landmarks and the window; the latter two are of the mode `map`."""

    mode: str = setting(
        "map",
        choices=("map", "two_view"),
        help="map: poses against landmarks, refined in a window; two_view: a chain of relative poses, for tracks and "
        "motions only, several pairs at once",
    )
    poses_in_flight: int = setting(
        2, minimum=1, maximum=16, help="pairs of frames posed at once, by a thread each (mode two_view)"
    )
    min_matches: int = setting(30, minimum=8, help="fewer matches to the previous frame and the frame is lost")
    min_inliers: int = setting(15, minimum=6, help="fewer landmarks that agree with a pose are a rejection")
    min_inlier_ratio: float = setting(0.4, minimum=0.0, maximum=1.0, help="of the landmarks in view, for a pose")
    prior_inlier_ratio: float = setting(
        0.6, minimum=0.0, maximum=1.0, help="of the landmarks in view, to trust the last motion without two views"
    )
    stationary_px: float = setting(0.5, minimum=0.0, help="image motion below which the pose is held, px")
    pose_threshold_px: float = setting(3.0, minimum=0.1, help="reprojection error of an inlier landmark, px")
    init_parallax_deg: float = setting(1.0, minimum=0.05, maximum=20.0, help="median parallax to start a map, deg")
    init_landmarks: int = setting(40, minimum=10, help="landmarks needed to start a map")
    triangulation_parallax_deg: float = setting(0.5, minimum=0.02, maximum=20.0, help="of a new landmark, deg")
    triangulation_error_px: float = setting(2.0, minimum=0.1, help="reprojection error of a new landmark, px")
    keyframe_parallax_px: float = setting(15.0, minimum=0.0, help="median parallax that makes a keyframe, px")
    keyframe_rotation_deg: float = setting(15.0, minimum=1.0, help="rotation that makes a keyframe, deg")
    keyframe_landmark_ratio: float = setting(0.35, minimum=0.0, maximum=1.0, help="share still seen that makes one")
    reconnect_keyframes: int = setting(
        1, minimum=0, maximum=10, help="keyframes, besides the previous frame, that a frame is matched to"
    )
    window_size: int = setting(8, minimum=2, maximum=40, help="newest keyframes, refined together")
    window_fixed: int = setting(
        12, minimum=1, maximum=40, help="older keyframes that see the same points and hold the window in place"
    )
    window_iterations: int = setting(6, minimum=1, maximum=50, help="steps of the bundle adjustment")
    window_kernel_px: float = setting(1.0, minimum=0.1, help="width of the Cauchy kernel, px")
    window_lag_frames: int = setting(
        1, minimum=1, maximum=100, help="frames of a replay after which a refinement is taken in"
    )
    radial_sigma: float = setting(
        0.005,
        minimum=0.0,
        maximum=1.0,
        help="radial distortion the calibration may have left over, 1 sigma, at most 3; 0: none",
    )
    map_keyframes: int = setting(100, minimum=0, maximum=10_000, help="older keyframes kept to come back to")
    revisit_landmarks: int = setting(
        50, minimum=10, help="landmarks of an older keyframe that must come into sight again to match it"
    )
    recovery_keyframes: int = setting(4, minimum=1, maximum=20, help="keyframes tried to find a lost camera again")
    max_lost_frames: int = setting(30, minimum=1, help="lost frames after which a new segment begins")
    scale: ScaleConfig = field(default_factory=RelativeScaleConfig)
    self_calibration: SelfCalibrationConfig = field(default_factory=SelfCalibrationConfig)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.self_calibration.enabled and isinstance(self.scale, StereoScaleConfig):
            raise ValueError("self_calibration: a stereo scale needs the true calibration of both cameras")
        if self.mode == "two_view" and not isinstance(self.scale, RelativeScaleConfig):
            raise ValueError(f"scale: {self.scale.name} needs a map to bring to its unit; set mode: map, or no scale")
        if self.mode == "two_view" and self.self_calibration.enabled:
            raise ValueError("self_calibration: needs a map to find the focal length from; set mode: map")


@dataclass(frozen=True, slots=True)
class PublisherConfig:
    """What a run says, and the sockets on which it says it (docs/PROTOCOL.md).

    `endpoint` binds two ports: the one it names for messages, and the next one for requests. A queue of `send_hwm`
    messages holds what a consumer has not taken yet, each consumer its own; a full one drops what is new. Other
    machines are let in only with `keys`. Tracks and images that are left out here are left out of recordings too.
    """

    endpoint: str = setting("tcp://127.0.0.1:5570", help='where to publish, "tcp://127.0.0.1:PORT" or "off"')
    keys: str = setting("", help="directory that `vo keys` made; with it only clients listed there get anything")
    send_hwm: int = setting(2048, minimum=1, maximum=100_000, help="messages queued for a consumer that lags")
    linger_ms: int = setting(
        500, minimum=0, maximum=60_000, help="longest wait at the end for consumers to catch up, ms"
    )
    heartbeat_hz: float = setting(1.0, minimum=0.1, maximum=100.0, help="rate of the status topic, Hz")
    publish_tracks: bool = setting(True, help="publish the tracks of every frame too")
    max_snapshot_poses: int = setting(
        100_000, minimum=1, maximum=10_000_000, help="latest poses kept for late joiners, about 1 kB each"
    )
    max_snapshot_keyframes: int = setting(
        20_000, minimum=1, maximum=1_000_000, help="latest keyframes kept for late joiners, about 150 bytes each"
    )
    max_snapshot_landmarks: int = setting(
        200_000, minimum=1, maximum=10_000_000, help="latest landmarks kept for late joiners, about 40 bytes each"
    )
    image_hz: float = setting(10.0, minimum=0.0, maximum=1000.0, help="images a second of the recording, 0: none, Hz")
    image_max_size_px: int = setting(640, minimum=16, maximum=8192, help="longest side of a published image, px")
    image_quality: int = setting(75, minimum=1, maximum=100, help="JPEG quality of a published image")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class RecordConfig:
    """What a recording (--record) holds besides the published messages (docs/RECORDING.md)."""

    keyframe_quality: int = setting(
        90, minimum=0, maximum=100, help="JPEG quality of the images of keyframes, which are kept in full; 0: none"
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """What turns images into features and matches, and where it runs."""

    extractor: AlikedConfig | XFeatConfig | R2d2Config | OrbConfig | XFeatStarConfig | LoftrConfig = field(
        default_factory=AlikedConfig
    )
    matcher: LightGlueConfig | NearestConfig | FollowedConfig = field(default_factory=LightGlueConfig)
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is one")
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.extractor, OrbConfig) and not isinstance(self.matcher, NearestConfig):
            raise ValueError("matcher: orb has binary descriptors and no learned matcher; set name: nearest")
        if isinstance(self.extractor, R2d2Config) and not isinstance(self.matcher, NearestConfig):
            raise ValueError("matcher: no learned matcher knows the descriptors of r2d2; set name: nearest")
        matches_images = isinstance(self.extractor, XFeatStarConfig | LoftrConfig)
        if matches_images and not isinstance(self.matcher, FollowedConfig):
            raise ValueError(f"matcher: {self.extractor.name} matches images and follows points; set name: followed")
        if isinstance(self.matcher, FollowedConfig) and not matches_images:
            raise ValueError(f"matcher: followed needs an extractor that matches images, not {self.extractor.name}")


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
class WebcamConfig:
    """What cameras (`webcam:0`) and live streams are asked for, and how long they are waited for.

    Exposure, gain, focus and white balance are in the camera's own units (`v4l2-ctl --list-ctrls`); null leaves them to
    it. Fixing the focus keeps the calibration valid, fixing a short exposure keeps images sharp.
    """

    width: int = setting(0, minimum=0, maximum=16384, help="px; 0: that of the camera file, else the driver's choice")
    height: int = setting(0, minimum=0, maximum=16384, help="px; 0: that of the camera file, else the driver's choice")
    fps: float = setting(0.0, minimum=0.0, maximum=1000.0, help="frames per second; 0: the highest at that size")
    pixel_format: str = setting(
        "auto", choices=("auto", "mjpeg", "raw"), help="auto: MJPEG where it is faster than raw pixels"
    )
    exposure: float | None = setting(None, help="fixed exposure; null: the camera's choice")
    gain: float | None = setting(None, help="fixed gain; null: the camera's choice")
    focus: float | None = setting(None, help="fixed focus; null: the camera's choice")
    white_balance: float | None = setting(None, help="fixed white balance, usually K; null: the camera's choice")
    silence_s: float = setting(5.0, minimum=0.5, maximum=600.0, help="without a frame for so long, it has gone, s")
    patience_s: float = setting(
        0.0, minimum=0.0, maximum=1e6, help="a camera that has gone is waited for so long, s; 0: for ever"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.width == 0) != (self.height == 0):
            raise ValueError(f"width, height: give both or none, got {self.width} and {self.height}")

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) px, None where nothing is asked for."""
        return (self.width, self.height) if self.width else None


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set for a run."""

    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    two_view: TwoViewConfig = field(default_factory=TwoViewConfig)
    odometry: OdometryConfig = field(default_factory=OdometryConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    publisher: PublisherConfig = field(default_factory=PublisherConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    webcam: WebcamConfig = field(default_factory=WebcamConfig)
