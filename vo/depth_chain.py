"""What a chain of relative poses hands on from link to link: depths of tracks, and with them the scale; covariances.

Pure functions. Depths are z along the rays of a frame, kept as inverse depths with their information, which is what a
baseline adds to (Civera, Davison and Montiel, "Inverse depth parametrization for monocular SLAM", T-RO 2008, section
II). A frame is rows of features; whatever is unknown of a feature has information 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vo.absolute_pose import median
from vo.geometry import homogeneous, invert_pose, skew, translation_votes
from vo.types import FloatArray

IntArray = NDArray[np.int64]

# Standard deviations by which an inverse depth may be off what the track had, or its past is given up.
_GATE_SIGMAS = 4.0
# Rounds of the line fit: each leaves a tenth of the error or less.
_NUM_FITS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Depths:
    """Inverse depths (N,) of the features of a frame, one over the unit of the chain, and their information (N,).

    from_here (N,): how much a unit of noise of the frame's own rays has moved them, of what it moves the next ones.
    """

    inverse: FloatArray
    information: FloatArray
    from_here: FloatArray

    @classmethod
    def unknown(cls, num_features: int) -> Depths:
        return cls(np.zeros(num_features), np.zeros(num_features), np.zeros(num_features))


@dataclass(frozen=True, slots=True)
class LinkScale:
    """The length of a translation, its standard deviation as a ratio, and how many depths spoke for it."""

    length: float
    sigma: float
    num_votes: int


def scale_of(
    depths: Depths, rows0: IntArray, T_0_1: FloatArray, rays0: FloatArray, rays1: FloatArray, noise: float
) -> LinkScale | None:
    """Length of a translation known up to scale, from depths in frame 0 at matches (M,); None without any.

    The translation of unit length measures inverse depths, which are those of the chain times the length: a straight
    line through the origin with errors on both sides. Weighing votes by depths that have errors themselves would
    shorten every link a little; so each point counts by what both say of its depth (York, "Least-squares fitting of a
    straight line", Canadian Journal of Physics 44, 1966), with a Geman-McClure kernel for those that are wrong.

    rows0   (M,) features of frame 0, whose rays are rays0 (M, 2); rays1 (M, 2) see the same points.
    noise   of rays, on the plane z = 1.
    """
    prior, information = depths.inverse[rows0], depths.information[rows0]
    measured, leverage = translation_votes(T_0_1, homogeneous(rays0), rays1)
    usable = np.flatnonzero((information > 0) & (prior > 0) & (leverage > 1e-12))
    if len(usable) == 0:
        return None
    prior, measured = prior[usable], measured[usable]
    prior_variance, variance = 1.0 / information[usable], noise * noise / leverage[usable]
    # Where a point was seen in frame 0 has gone into both: too far here is too near there.
    shared = -0.5 * depths.from_here[rows0[usable]] * np.sqrt(variance)
    length = median(measured / prior)
    width, total = 0.0, 0.0
    for _ in range(_NUM_FITS):
        spread = variance + length * (length * prior_variance - 2.0 * shared)
        off = measured - length * prior
        lot = off / np.sqrt(spread)
        width = max(1.4826 * median(np.abs(lot)), 1e-9)
        weights = 1.0 / (1.0 + (lot * (0.4 / width)) ** 2) ** 2 / spread
        best = prior + off * ((length * prior_variance - shared) / spread)
        weighted = weights * best
        total = float(weighted @ prior)
        if total <= 0:
            return None
        length = float(weighted @ measured) / total
    if length <= 0:
        return None
    return LinkScale(length, width / math.sqrt(total) / length, len(prior))


def carried(
    depths: Depths, rows0: IntArray, rows1: IntArray, rays0: FloatArray, T_0_1: FloatArray, num_features: int
) -> Depths:
    """Depths of frame 1, which has `num_features`, where those of frame 0 go with the motion, in the chain's unit.

    rows0, rows1   (M,) features of both frames; rays0 (M, 2) of frame 0.
    """
    inverse0, information0 = depths.inverse[rows0], depths.information[rows0]
    R, t = T_0_1[:3, :3], T_0_1[:3, 3]
    # Along the axis of camera 1: a point at inverse depth r of frame 0 is at (along - r offset) / r.
    along = rays0 @ R[:2, 2] + R[2, 2]
    left = along - inverse0 * float(t @ R[:, 2])
    is_before = (left > 1e-3) & (along > 0)
    left = np.where(is_before, left, 1.0)
    inverse, information = np.zeros(num_features), np.zeros(num_features)
    inverse[rows1] = np.where(is_before, inverse0 / left, 0.0)
    # The derivative of the inverse depth by the old one is along / left^2.
    information[rows1] = np.where(is_before, information0 * (left * left / np.where(is_before, along, 1.0)) ** 2, 0.0)
    return Depths(inverse, information, np.zeros(num_features))


def measured(depths: Depths, rows1: IntArray, new: FloatArray, new_information: FloatArray) -> Depths:
    """Depths of frame 1 with inverse depths (M,) and their information (M,) that a link measured at rows1 (M,).

    What contradicts a track's past takes its place; a point behind the camera tells nothing.
    """
    is_before = new > 0
    rows1, new, new_information = rows1[is_before], new[is_before], new_information[is_before]
    old, old_information = depths.inverse[rows1], depths.information[rows1]
    both = old_information * new_information
    off = old - new
    # off^2 over the sum of both variances.
    agrees = off * off * both < _GATE_SIGMAS**2 * (old_information + new_information)
    kept = np.where(agrees, old_information, 0.0)
    total = kept + new_information
    inverse, information = depths.inverse.copy(), depths.information.copy()
    inverse[rows1] = (kept * old + new_information * new) / np.maximum(total, 1e-300)
    information[rows1] = total
    from_here = np.zeros(len(inverse))
    from_here[rows1] = np.sqrt(new_information) / np.maximum(total, 1e-300)
    return Depths(inverse, information, from_here)


class ChainCovariance:
    """Of the pose at the end of a chain and of the logarithm of its scale: (7, 7), right perturbation first.

    An error of the scale goes into every translation that follows, which is why it is carried along. Errors of single
    links count as independent of one another, although neighbours share a frame's keypoints.
    """

    def __init__(self, matrix: FloatArray | None = None) -> None:
        self._matrix = np.zeros((7, 7)) if matrix is None else matrix

    @property
    def of_pose(self) -> FloatArray:
        """(6, 6)."""
        return self._matrix[:6, :6].copy()

    def linked(self, T_0_1: FloatArray, link: FloatArray, scale_sigma: float = 0.0) -> ChainCovariance:
        """After a link: its covariance (6, 6) and translation in the unit of the chain, its scale's error as a ratio.

        Sola et al., "A micro Lie theory", equations 31 (adjoint) and 54 (composition).
        """
        inverse = invert_pose(T_0_1)
        R = inverse[:3, :3]
        forward = np.zeros((7, 7))
        forward[:3, :3] = forward[3:6, 3:6] = R
        forward[:3, 3:6] = skew(inverse[:3, 3]) @ R
        forward[:3, 6] = R @ T_0_1[:3, 3]
        forward[6, 6] = 1.0
        own = np.zeros((7, 7))
        own[:6, :6] = link
        if scale_sigma > 0:
            # The error of this link's scale is in its own translation already.
            along = forward[:, 6]
            own += scale_sigma**2 * np.outer(along, along)
        return ChainCovariance(forward @ self._matrix @ forward.T + own)
