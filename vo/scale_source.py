"""Where a run gets its metres from: reads the scale at keyframes, and says by how much the map is to be rescaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
from vo.geometry import invert_pose
from vo.scale import (
    ExternalReadings,
    ScaleFilter,
    ScaleReading,
    depth_reading,
    depths_at,
    external_reading,
    ground_plane_reading,
    groundtruth_reading,
    stereo_reading,
)
from vo.stereo import StereoDepth
from vo.types import FloatArray, Frame, StereoRig

# A keyframe too close to the last one says nothing of the ground; the next ones are still compared with that one.
_MAX_SKIPPED_KEYFRAMES = 3

TruePosition = Callable[[Frame], FloatArray | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Keyframe:
    """The keyframe the next is compared with, and the length of the path since, map units."""

    frame: Frame
    T_world_camera: FloatArray


class ScaleSource:
    """One of the alternatives of `odometry.scale`, with what it has seen so far.

    rig            for `stereo`, the cameras of the frames.
    external       for `external`, what has been received; the frames' clock.
    true_position  for `groundtruth`, (3,) m of a frame or None.

    Raises ValueError where the alternative lacks what it needs.
    """

    def __init__(
        self,
        config: ScaleConfig,
        *,
        rig: StereoRig | None = None,
        external: ExternalReadings | None = None,
        true_position: TruePosition | None = None,
    ) -> None:
        self._config = config
        self._external = external
        self._true_position = true_position
        self._stereo = None
        if isinstance(config, StereoScaleConfig):
            if rig is None:
                raise ValueError("stereo: the source has no second camera")
            self._stereo = StereoDepth(rig, config)
        if isinstance(config, ExternalScaleConfig) and external is None:
            raise ValueError("external: no readings to take")
        if isinstance(config, GroundTruthScaleConfig) and true_position is None:
            raise ValueError("groundtruth: the source has none")
        self.reset()

    def reset(self) -> None:
        """Begins a new segment, whose unit is unknown again."""
        self._filter = None if isinstance(self._config, RelativeScaleConfig) else ScaleFilter(self._config)
        self._last: _Keyframe | None = None
        self._path_units = 0.0
        self._passed: FloatArray | None = None
        self._num_skipped = 0

    @property
    def name(self) -> str:
        """The unit of the map: "relative" until the first reading."""
        return self._config.name if self.is_metric else "relative"

    @property
    def is_metric(self) -> bool:
        return self._filter is not None and self._filter.is_metric

    @property
    def inverse_depth_sigma(self) -> float:
        """Of `inverse_depths`, 1/m; 0 where there are none for the window to use."""
        return self._config.inverse_sigma if isinstance(self._config, DepthScaleConfig) else 0.0

    def inverse_depths(self, frame: Frame, keypoints: NDArray[np.float32]) -> FloatArray | None:
        """Measured at keypoints (N, 2) px, 1/m, NaN where there is none; None where the source measures no depths."""
        if self.inverse_depth_sigma == 0.0 or frame.depth is None or not isinstance(self._config, DepthScaleConfig):
            return None
        return 1.0 / depths_at(frame.depth, keypoints, self._config)

    def passed(self, T_world_camera: FloatArray) -> None:
        """Notes a pose on the way, for the length of the path."""
        if self._passed is not None:
            self._path_units += float(np.linalg.norm(T_world_camera[:3, 3] - self._passed))
        self._passed = T_world_camera[:3, 3].copy()

    def factor(
        self, frame: Frame, T_world_camera: FloatArray, keypoints: NDArray[np.float32], z_map: FloatArray, unit: float
    ) -> float:
        """By how much to multiply all lengths, from one keyframe; 1 where there is nothing to say.

        keypoints (N, 2) px of landmarks and z_map (N,) their depths. `unit` multiplies all lengths of the map given
        here: factors that are decided and not applied yet.
        """
        if self._filter is None:
            return 1.0
        here = _Keyframe(frame, T_world_camera)
        reading = self._reading(here, keypoints, z_map * unit, unit)
        self._num_skipped += 1
        if reading is not None or self._last is None or self._num_skipped >= _MAX_SKIPPED_KEYFRAMES:
            self._last, self._path_units, self._num_skipped = here, 0.0, 0
        return self._filter.update(reading)

    def forget_path(self) -> None:
        """The map has changed its shape: what is measured from keyframe to keyframe begins anew."""
        self._last, self._path_units, self._num_skipped, self._passed = None, 0.0, 0, None

    def rescaled(self, center: FloatArray, factor: float) -> None:
        """The map has been rescaled about a point (3,)."""
        self._path_units *= factor
        if self._passed is not None:
            self._passed = center + factor * (self._passed - center)
        if self._last is not None:
            T = self._last.T_world_camera.copy()
            T[:3, 3] = center + factor * (T[:3, 3] - center)
            self._last = _Keyframe(self._last.frame, T)

    def _reading(
        self, here: _Keyframe, keypoints: NDArray[np.float32], z_map: FloatArray, unit: float
    ) -> ScaleReading | None:
        frame, config = here.frame, self._config
        if isinstance(config, DepthScaleConfig):
            return None if frame.depth is None else depth_reading(frame.depth, keypoints, z_map, config)
        if isinstance(config, StereoScaleConfig):
            if self._stereo is None or frame.right is None:
                return None
            return stereo_reading(self._stereo.depths(frame.image, frame.right, keypoints), z_map, config)
        return None if self._last is None else self._reading_between(self._last, here, unit)

    def _reading_between(self, last: _Keyframe, here: _Keyframe, unit: float) -> ScaleReading | None:
        """From what happened between two keyframes."""
        config = self._config
        if isinstance(config, GroundPlaneScaleConfig):
            T_last_here = invert_pose(last.T_world_camera) @ here.T_world_camera
            T_last_here[:3, 3] *= unit
            frame = here.frame
            return ground_plane_reading(last.frame.image, frame.image, T_last_here, frame.camera, config)
        if isinstance(config, ExternalScaleConfig) and self._external is not None:
            travelled = self._external.distance(last.frame.timestamp_ns, here.frame.timestamp_ns)
            if travelled is None:
                return None
            return external_reading(travelled[0], self._path_units * unit, travelled[1])
        if isinstance(config, GroundTruthScaleConfig) and self._true_position is not None:
            true0, true1 = self._true_position(last.frame), self._true_position(here.frame)
            if true0 is None or true1 is None:
                return None
            positions = np.stack([last.T_world_camera[:3, 3], here.T_world_camera[:3, 3]]) * unit
            return groundtruth_reading(np.stack([true0, true1]), positions, config)
        return None
