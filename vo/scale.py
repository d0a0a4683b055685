"""What gives the map its metres: readings of its scale, one per keyframe and source, and the filter that follows them.

The odometry runs in the unit of its map. A reading says how many metres such a unit is; the filter turns readings
into the factor by which the map is rescaled about the current camera, so that poses already published never jump.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vo.config import (
    DepthScaleConfig,
    ExternalScaleConfig,
    GroundPlaneScaleConfig,
    GroundTruthScaleConfig,
    RelativeScaleConfig,
    ScaleConfig,
    StereoScaleConfig,
)
from vo.ground_plane import find_ground_plane
from vo.types import Camera, FloatArray

NS_PER_S = 1_000_000_000
_EDGE_RADIUS_PX = 2
_TRIM_SIGMAS = 2.5
# Of a normal distribution: its standard deviation over its median absolute deviation, and over its standard deviation
# after everything beyond _TRIM_SIGMAS is cut off.
_MAD_TO_SIGMA = 1.4826
_TRIM_TO_SIGMA = 1.0489


@dataclass(frozen=True, slots=True)
class ScaleReading:
    """log_ratio: natural logarithm of the metres in one unit of the map; sigma: its standard deviation."""

    log_ratio: float
    sigma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.log_ratio) and self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"expected a finite log_ratio and a positive sigma, got {self.log_ratio}, {self.sigma}")


def depth_reading(
    depth_m: NDArray[np.float32], keypoints: NDArray[np.floating], z_map: FloatArray, config: DepthScaleConfig
) -> ScaleReading | None:
    """The scale from a depth image; None where too few landmarks have a depth that can be trusted.

    depth_m    (H, W) m, 0 where there is no reading.
    keypoints  (N, 2) px of landmarks in the image of the depth's size.
    z_map      (N,) their depths (z in the camera's frame), map units.
    """
    return _range_reading(_flat_depths_at(depth_m, keypoints, config.edge_ratio), z_map, config)


def depths_at(depth_m: NDArray[np.float32], keypoints: NDArray[np.floating], config: DepthScaleConfig) -> FloatArray:
    """Depths (N,) m at keypoints (N, 2) px; NaN where there is none, at edges, and out of the range of the camera."""
    depths = _flat_depths_at(depth_m, keypoints, config.edge_ratio)
    with np.errstate(invalid="ignore"):
        is_usable = (depths >= config.min_depth_m) & (depths <= config.max_depth_m)
    return np.where(is_usable, depths, np.nan)


def stereo_reading(depths_m: FloatArray, z_map: FloatArray, config: StereoScaleConfig) -> ScaleReading | None:
    """The scale from metric depths (N,) at landmarks, NaN where there is none (vo.stereo), and z_map (N,)."""
    return _range_reading(depths_m, z_map, config)


def ground_plane_reading(
    earlier: NDArray[np.uint8],
    current: NDArray[np.uint8],
    T_earlier_current: FloatArray,
    camera: Camera,
    config: GroundPlaneScaleConfig,
) -> ScaleReading | None:
    """The scale from the height of the camera above the road (vo.ground_plane); None where no road is found.

    earlier, current   images of two keyframes, 1 to 3 m apart where the camera is at the height of a car's roof.
    T_earlier_current  (4, 4) pose of the current camera in the earlier one's frame, map units.
    """
    plane = find_ground_plane(earlier, current, T_earlier_current, camera, config)
    if plane is None or plane.correlation < config.min_correlation or plane.tilt_deg > config.max_tilt_deg:
        return None
    sigma = math.hypot(plane.sigma, config.systematic)
    if plane.sigma > config.max_sigma:
        return None
    return ScaleReading(math.log(config.camera_height_m / plane.distance), sigma)


def external_reading(distance_m: float, displacement_units: float, sigma_m: float) -> ScaleReading | None:
    """The scale from the distance travelled between two keyframes, in metres and in map units; None at standstill.

    An odometer measures along the path: `displacement_units` is the length of the path through the poses between.
    """
    if distance_m <= 0 or displacement_units <= 0:
        return None
    return ScaleReading(math.log(distance_m / displacement_units), max(sigma_m / distance_m, 1e-6))


def groundtruth_reading(
    positions_m: FloatArray, positions_units: FloatArray, config: GroundTruthScaleConfig
) -> ScaleReading | None:
    """The scale from true positions (2, 3) m of two keyframes and their positions (2, 3) in the map. Debugging only."""
    distance_m = float(np.linalg.norm(positions_m[1] - positions_m[0]))
    distance_units = float(np.linalg.norm(positions_units[1] - positions_units[0]))
    if distance_m < config.min_distance_m:
        return None
    return external_reading(distance_m, distance_units, config.systematic * distance_m)


def _flat_depths_at(depth_m: NDArray[np.float32], keypoints: NDArray[np.floating], edge_ratio: float) -> FloatArray:
    """Depths (N,) m at keypoints; NaN where there is none or where the depths around differ: an edge."""
    height, width = depth_m.shape
    centres = np.rint(keypoints).astype(np.int64)
    offsets = np.arange(-_EDGE_RADIUS_PX, _EDGE_RADIUS_PX + 1)
    xs = np.clip(centres[:, 0, None, None] + offsets[None, None, :], 0, width - 1)
    ys = np.clip(centres[:, 1, None, None] + offsets[None, :, None], 0, height - 1)
    patches = depth_m[ys, xs].astype(np.float64).reshape(len(centres), offsets.size**2)
    is_read = patches > 0
    nearest = np.where(is_read, patches, np.inf).min(axis=1, initial=np.inf)
    farthest = np.where(is_read, patches, -np.inf).max(axis=1, initial=-np.inf)
    depths = patches[:, offsets.size**2 // 2]
    inside = ((centres >= 0) & (centres < [width, height])).all(axis=1)
    is_flat = inside & (depths > 0) & (farthest - nearest <= edge_ratio * nearest)
    return np.where(is_flat, depths, np.nan)


def _range_reading(
    depths_m: FloatArray, z_map: FloatArray, config: DepthScaleConfig | StereoScaleConfig
) -> ScaleReading | None:
    """The scale from depths (N,) m and (N,) map units of the same landmarks."""
    if depths_m.shape != z_map.shape:
        raise ValueError(f"depths_m {depths_m.shape} and z_map {z_map.shape} are of different landmarks")
    with np.errstate(invalid="ignore"):
        is_usable = (depths_m >= config.min_depth_m) & (depths_m <= config.max_depth_m) & (z_map > 0)
    ratios = np.log(depths_m[is_usable] / z_map[is_usable])
    if len(ratios) < config.min_readings:
        return None
    centre, sigma, num_inliers = robust_mean(ratios)
    if num_inliers < config.min_readings or sigma * math.sqrt(num_inliers) > config.max_spread:
        return None
    return ScaleReading(centre, max(math.hypot(sigma, config.systematic), 1e-6))


def robust_mean(values: FloatArray) -> tuple[float, float, int]:
    """Mean of the values (N,) that agree, its standard deviation, and how many they are.

    Begins with the median and its absolute deviation and trims what is off until nothing changes: outliers on one
    side move the median by a good part of a standard deviation, the trimmed mean by little.
    """
    centre = float(np.median(values))
    spread = _MAD_TO_SIGMA * float(np.median(np.abs(values - centre)))
    kept = values
    for _ in range(20):
        chosen = values[np.abs(values - centre) <= _TRIM_SIGMAS * spread + 1e-12]
        if len(chosen) == len(kept) and np.array_equal(chosen, kept):
            break
        kept = chosen
        centre, spread = float(kept.mean()), _TRIM_TO_SIGMA * float(kept.std())
    return centre, spread / math.sqrt(len(kept)), len(kept)


class ExternalReadings:
    """The latest speeds and distances that somebody sent, in order of time; safe to fill from another thread.

    Bounded: the oldest reading makes room for a new one. Times are those of the frames (`Frame.timestamp_ns`).
    """

    def __init__(self, config: ExternalScaleConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._speeds: deque[tuple[int, float]] = deque(maxlen=config.max_readings)
        self._distances: deque[tuple[int, int, float]] = deque(maxlen=config.max_readings)

    def add_speed(self, timestamp_ns: int, speed_mps: float) -> None:
        """The speed at a time; raises ValueError unless it is finite and not negative."""
        _check_not_negative("speed_mps", speed_mps)
        with self._lock:
            self._speeds.append((timestamp_ns, speed_mps))

    def add_distance(self, start_ns: int, end_ns: int, distance_m: float) -> None:
        """The distance travelled along the path from one time to another; raises ValueError where that cannot be."""
        _check_not_negative("distance_m", distance_m)
        if end_ns <= start_ns:
            raise ValueError(f"end_ns: {end_ns} is not after start_ns {start_ns}")
        with self._lock:
            self._distances.append((start_ns, end_ns, distance_m))

    def distance(self, start_ns: int, end_ns: int) -> tuple[float, float] | None:
        """Metres travelled between two frame times and their standard deviation; None unless readings cover it all."""
        with self._lock:
            speeds, distances = sorted(self._speeds), sorted(self._distances)
        if end_ns <= start_ns:
            return None
        travelled_m = _sum_of_intervals(distances, start_ns, end_ns)
        if travelled_m is None:
            travelled_m = _integral_of_speeds(speeds, start_ns, end_ns, self._config.max_gap_s)
        if travelled_m is None or travelled_m < self._config.min_distance_m:
            return None
        # One error for the whole stretch: a wheel that is too large is too large all the time.
        return travelled_m, self._config.speed_sigma_mps * (end_ns - start_ns) / NS_PER_S


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number that is not negative, got {value}")


def _sum_of_intervals(distances: list[tuple[int, int, float]], start_ns: int, end_ns: int) -> float | None:
    """Metres between two times from (start, end, distance) in order, each at constant speed; None where one lacks."""
    covered_ns, total_m = start_ns, 0.0
    for begin_ns, finish_ns, distance_m in distances:
        if begin_ns > covered_ns or covered_ns >= end_ns:
            break
        until_ns = min(finish_ns, end_ns)
        if until_ns > covered_ns:
            total_m += distance_m * (until_ns - covered_ns) / (finish_ns - begin_ns)
            covered_ns = until_ns
    return total_m if covered_ns >= end_ns else None


def _integral_of_speeds(speeds: list[tuple[int, float]], start_ns: int, end_ns: int, max_gap_s: float) -> float | None:
    """Metres between two times from (time, m/s) in order, linear between them; None where a gap is too long."""
    if not speeds:
        return None
    # Seconds from start_ns: as float64 nanoseconds since 1970 would lose their last digits.
    times_s = np.array([(time_ns - start_ns) / NS_PER_S for time_ns, _ in speeds])
    values = np.array([speed for _, speed in speeds])
    duration_s = (end_ns - start_ns) / NS_PER_S
    around = np.concatenate([[-np.inf], times_s, [np.inf]])
    for low, high in pairwise(around):
        gap_s = min(high - max_gap_s, duration_s) - max(low + max_gap_s, 0.0)
        if high > 0 and low < duration_s and gap_s > 1e-9:
            return None
    inner = (times_s > 0) & (times_s < duration_s)
    knots = np.concatenate([[0.0], times_s[inner], [duration_s]])
    return float(np.trapezoid(np.interp(knots, times_s, values), knots))


class ScaleFilter:
    """Follows the scale of the map: a Kalman filter over ln(metres per unit of the present map).

    The first reading sets the unit at once. Later ones correct it by their weight, `max_step` per keyframe at most.
    What is far off is left out, until `max_outliers` readings in a row agree with each other: then the filter was
    wrong, and begins anew with them.
    """

    def __init__(self, config: ScaleConfig) -> None:
        """Raises ValueError for `relative`, which has nothing to follow."""
        if isinstance(config, RelativeScaleConfig):
            raise ValueError("the relative scale has no readings to filter")
        self._config = config
        self._log_ratio = 0.0
        self._variance = math.inf
        self._outliers: list[ScaleReading] = []

    @property
    def is_metric(self) -> bool:
        """Whether the map's unit has been set to the metre."""
        return math.isfinite(self._variance)

    @property
    def sigma(self) -> float:
        """Standard deviation of the map's scale as a ratio, what is not applied yet included; infinite at first."""
        return math.sqrt(self._variance + self._log_ratio**2)

    def update(self, reading: ScaleReading | None) -> float:
        """The factor by which to multiply all lengths of the map now; once per keyframe, None where nothing was read.

        Readings must be of the map as it is after all factors so far.
        """
        if not self.is_metric:
            return 1.0 if reading is None else self._begin(reading.log_ratio, reading.sigma**2)
        self._variance += self._config.drift_per_keyframe**2
        if reading is not None and not self._absorb(reading):
            self._outliers.append(reading)
            if len(self._outliers) >= self._config.max_outliers:
                begun = self._begin_anew()
                if begun is not None:
                    return begun
        limit = math.log1p(self._config.max_step)
        return self._apply(min(max(self._log_ratio, -limit), limit))

    def _absorb(self, reading: ScaleReading) -> bool:
        """Corrects the state by a reading that is not too far off; returns whether it was not."""
        innovation = reading.log_ratio - self._log_ratio
        variance = self._variance + reading.sigma**2
        if abs(innovation) > self._config.gate_sigmas * math.sqrt(variance):
            return False
        gain = self._variance / variance
        self._log_ratio += gain * innovation
        self._variance *= 1.0 - gain
        self._outliers.clear()
        return True

    def _begin_anew(self) -> float | None:
        """The factor that follows the outliers, where they agree with each other; None where they do not."""
        values = np.array([outlier.log_ratio for outlier in self._outliers])
        sigmas = np.array([outlier.sigma for outlier in self._outliers])
        weights = 1.0 / sigmas**2
        centre = float(weights @ values / weights.sum())
        if (np.abs(values - centre) > self._config.gate_sigmas * sigmas).any():
            del self._outliers[0]
            return None
        return self._begin(centre, float(1.0 / weights.sum()))

    def _begin(self, log_ratio: float, variance: float) -> float:
        self._outliers.clear()
        self._log_ratio, self._variance = log_ratio, variance
        return self._apply(log_ratio)

    def _apply(self, log_factor: float) -> float:
        """Takes the factor out of the state and of the outliers, which then speak of the rescaled map too."""
        self._log_ratio -= log_factor
        self._outliers = [ScaleReading(item.log_ratio - log_factor, item.sigma) for item in self._outliers]
        return math.exp(log_factor)
