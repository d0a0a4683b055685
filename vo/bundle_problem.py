"""What a bundle adjustment refines, what it starts from, and what came out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.types import FloatArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RadialPrior:
    """What is known of the leftover radial distortion kappa: a ray of length r truly is the ray times 1 - kappa r^2.

    mean; information in px^2: the weight of a squared deviation beside squared reprojection errors; limit: no larger
    kappa is believed, whatever noisy keypoints seem to say.
    """

    mean: float = 0.0
    information: float = 0.0
    limit: float = np.inf

    def corrected(self, rays: FloatArray) -> FloatArray:
        """Rays (N, 2) without the leftover distortion."""
        return corrected_rays(rays, self.mean)


def corrected_rays(rays: FloatArray, kappa: float) -> FloatArray:
    """Rays (N, 2) without a leftover radial distortion kappa, first order."""
    corrected: FloatArray = rays * (1.0 - kappa * (rays**2).sum(axis=1, keepdims=True))
    return corrected


@dataclass(frozen=True, slots=True, eq=False)
class FocalPrior:
    """What is known of the focal length: it truly is the calibration's times exp(log_ratio).

    information in px^2, as in RadialPrior; limit of the absolute log_ratio.
    """

    log_ratio: float = 0.0
    information: float = 0.0
    limit: float = np.inf


@dataclass(frozen=True, slots=True, eq=False)
class WindowProblem:
    """What to refine.

    T_world_camera  (P, 4, 4); the first `num_fixed` stay where they are and hold the gauge, scale included.
    points          (L, 3) landmarks in the world.
    pose_index      (O,) and point_index (O,): who sees whom; each pair at most once.
    rays            (O, 2) undistorted observations on the plane z = 1, before the leftover distortion is taken off.
    focal_px        turns distances on that plane into px.
    radial, focal   what is known of the leftover distortion and of the focal length.
    refines_radial, refines_focal  whether to refine them; they stay at the mean otherwise.
    inverse_depths  (O,) measured, one over the unit of the map, NaN where there is none; None: none at all.
    depth_gain_px   px of residual per unit of inverse depth: focal length times (virtual) baseline.
    """

    T_world_camera: FloatArray
    num_fixed: int
    points: FloatArray
    pose_index: IntArray
    point_index: IntArray
    rays: FloatArray
    focal_px: float
    radial: RadialPrior = RadialPrior()
    refines_radial: bool = False
    focal: FocalPrior = FocalPrior()
    refines_focal: bool = False
    inverse_depths: FloatArray | None = None
    depth_gain_px: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_fixed <= len(self.T_world_camera):
            raise ValueError(f"num_fixed: expected 1..{len(self.T_world_camera)}, got {self.num_fixed}")
        num_observations = len(self.rays)
        if self.pose_index.shape != (num_observations,) or self.point_index.shape != (num_observations,):
            raise ValueError(
                f"pose_index, point_index: expected ({num_observations},), "
                f"got {self.pose_index.shape}, {self.point_index.shape}"
            )
        for name, index, count in (
            ("pose_index", self.pose_index, len(self.T_world_camera)),
            ("point_index", self.point_index, len(self.points)),
        ):
            # Compiled loops look where they are told to.
            if num_observations and (index.min() < 0 or index.max() >= count):
                raise ValueError(f"{name}: expected 0..{count - 1}, got {index.min()}..{index.max()}")
        if self.inverse_depths is not None and self.inverse_depths.shape != (num_observations,):
            raise ValueError(f"inverse_depths: expected ({num_observations},), got {self.inverse_depths.shape}")

    @property
    def num_lens(self) -> int:
        """How many unknowns the lens has: kappa, then the focal length."""
        return int(self.refines_radial) + int(self.refines_focal)


@dataclass(frozen=True, slots=True, eq=False)
class WindowSolution:
    """Refined poses (P, 4, 4) and points (L, 3); errors_px (O,), infinite behind a camera; cost before and after.

    radial and focal carry what was refined and the information about each, the prior's included.
    """

    T_world_camera: FloatArray
    points: FloatArray
    errors_px: FloatArray
    initial_cost: float
    final_cost: float
    num_iterations: int
    radial: RadialPrior = RadialPrior()
    focal: FocalPrior = FocalPrior()


@dataclass(frozen=True, slots=True, eq=False)
class WindowState:
    """The unknowns: poses T (P, 4, 4), points (L, 3), leftover distortion, logarithm of the ratio of focal lengths."""

    T: FloatArray
    points: FloatArray
    kappa: float
    log_focal: float
