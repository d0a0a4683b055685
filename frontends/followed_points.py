"""Tracks from a matcher of images: points are chosen in one image and followed through those after it.

A matcher that takes two images has no keypoints of one image alone, and finds others in every pair. Odometry needs
points that are the same in many frames. So one image, the anchor, holds the points, and every later image is matched
with it: a point lies where the matches around it have moved, and keeps its number. When too few of the anchor's points
are still in sight, the image at hand becomes the next anchor: it takes over the points that were found in it and gets
new ones where it has none. Matching two frames then means comparing numbers.

A match that begins within `snap_px` of a point carries it along unchanged. Where none does, the motion is a plane
fitted to the matches around the point; the points of an anchor do not drift within its reign, because each image is
matched with the anchor itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from frontends.base import Features, Matches, PairMatcher, check_settings, setting
from frontends.selection import SPREAD_CELL_PX, spread_order

Points = NDArray[np.float32]

_NUM_NEIGHBOURS = 8
_MIN_NEIGHBOURS = 4
# Rounds of fitting the plane; each gives matches that do not fit less weight in the next.
_NUM_ROUNDS = 3
_MIN_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True)
class FollowingConfig:
    """Which points a matcher of images has to follow, and how exactly."""

    max_keypoints: int = setting(2048, minimum=16, maximum=16384, help="points followed at most")
    spacing_px: float = setting(6.0, minimum=0.0, help="distance of new points from those that are followed, px")
    snap_px: float = setting(1.0, minimum=0.0, help="a match this near to a point carries it along, px")
    reach_px: float = setting(12.0, minimum=0.0, help="matches farther from a point say nothing about it, px")
    max_residual_px: float = setting(1.0, minimum=0.01, help="disagreement of the matches around a point, px")
    min_followed: float = setting(0.6, minimum=0.0, maximum=1.0, help="share of the points below which anchors change")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class FollowedConfig:
    """Matches of followed points: those with the same number; two images without any in common are matched anew."""

    name: Literal["followed"] = "followed"
    min_shared: int = setting(15, minimum=1, help="points in common below which the images themselves are matched")
    snap_px: float = setting(1.5, minimum=0.0, help="distance from a point that such a match may end at, px")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FollowedFeatures(Features):
    """Followed points of one image; they have no descriptors.

    point_ids  (num_valid,) int64, the same for the same point in every image.
    image      (H, W, 3) or (H, W) uint8, to match it with another one.
    matcher    the matcher of images that follows them.
    following  how it does.
    """

    point_ids: NDArray[np.int64]
    image: NDArray[np.uint8]
    matcher: PairMatcher
    following: FollowingConfig

    def __post_init__(self) -> None:
        Features.__post_init__(self)
        if self.point_ids.shape != (self.num_valid,):
            raise ValueError(f"point_ids: expected ({self.num_valid},), got {self.point_ids.shape}")


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """Points (N, 2) px of an image with their numbers (N,) and scores (N,)."""

    image: NDArray[np.uint8]
    points: Points
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


class PointFollower:
    """An extractor over a matcher of images. It has a memory: images come in the order of the sequence."""

    def __init__(self, matcher: PairMatcher, config: FollowingConfig) -> None:
        self.config = config
        self._matcher = matcher
        self._anchor: _Sight | None = None
        self._previous: _Sight | None = None
        self._num_points = 0

    @property
    def kind(self) -> str:
        return self._matcher.kind

    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Where the followed points are in the next image (H, W, 3) RGB or (H, W) gray, uint8, and new ones."""
        if self._anchor is None or self._previous is None:
            sight = self._anchor = self._with_new_points(_nothing(image))
        else:
            sight = self._follow(self._anchor, image)
            if len(sight) < self.config.min_followed * len(self._anchor):
                if len(sight) < 0.5 * len(self._previous) and self._previous is not self._anchor:
                    # The anchor has gone out of sight at once; what was seen in between may lead on.
                    sight = max(sight, self._follow(self._previous, image), key=len)
                sight = self._anchor = self._with_new_points(sight)
        self._previous = sight
        return self._features(sight)

    def _follow(self, source: _Sight, image: NDArray[np.uint8]) -> _Sight:
        """The points of another image that are found in this one."""
        moved, scores = _moved_by(self._matcher, source.image, image, source.points, source.scores, self.config)
        size = np.array([image.shape[1], image.shape[0]])
        with np.errstate(invalid="ignore"):
            found = ((moved >= 0) & (moved <= size - 1)).all(axis=1)
        return _Sight(image, moved[found], source.ids[found], scores[found])

    def _with_new_points(self, sight: _Sight) -> _Sight:
        """The points of an image with new ones between them, evenly over the image, up to the number wanted."""
        seeds = self._matcher.seeds(sight.image)
        if len(sight):
            distances, _ = cKDTree(sight.points).query(seeds)
            seeds = seeds[distances >= self.config.spacing_px]
        order = spread_order(torch.from_numpy(seeds), SPREAD_CELL_PX).numpy()
        seeds = seeds[order[: self.config.max_keypoints - len(sight)]]
        ids = np.arange(self._num_points, self._num_points + len(seeds), dtype=np.int64)
        self._num_points += len(seeds)
        return replace(
            sight,
            points=np.concatenate((sight.points, seeds)),
            ids=np.concatenate((sight.ids, ids)),
            scores=np.concatenate((sight.scores, np.ones(len(seeds), np.float32))),
        )

    def _features(self, sight: _Sight) -> FollowedFeatures:
        padding = (0, 0, 0, self.config.max_keypoints - len(sight))
        return FollowedFeatures(
            keypoints=F.pad(torch.from_numpy(sight.points), padding),
            scores=F.pad(torch.from_numpy(sight.scores), padding[2:]),
            descriptors=torch.zeros(self.config.max_keypoints, 0),
            num_valid=len(sight),
            image_size=(sight.image.shape[1], sight.image.shape[0]),
            kind=self.kind,
            point_ids=sight.ids,
            image=sight.image,
            matcher=self._matcher,
            following=self.config,
        )


class Followed:
    """Matches followed points by their numbers."""

    def __init__(self, config: FollowedConfig | None = None) -> None:
        self.config = config or FollowedConfig()

    def match(self, features0: Features, features1: Features) -> Matches:
        """Points with the same number. Raises ValueError for features that no `PointFollower` made.

        Frames that have hardly any in common, because the camera was lost between them, are matched anew: points of
        the first image are moved by the matches of the two images and snapped to those of the second.
        """
        if not isinstance(features0, FollowedFeatures) or not isinstance(features1, FollowedFeatures):
            raise ValueError(f"expected followed points, got {features0.kind} and {features1.kind} features")
        _, rows0, rows1 = np.intersect1d(
            features0.point_ids, features1.point_ids, assume_unique=True, return_indices=True
        )
        if len(rows0) < self.config.min_shared:
            rows0, rows1 = self._snapped(features0, features1)
        order = np.argsort(rows0)
        indices = np.stack((rows0[order], rows1[order]), axis=1).astype(np.int64)
        scores = np.minimum(features0.scores.numpy()[indices[:, 0]], features1.scores.numpy()[indices[:, 1]])
        return Matches(indices, scores, 0, features0.num_valid, features1.num_valid)

    def _snapped(
        self, features0: FollowedFeatures, features1: FollowedFeatures
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows (M,) and (M,) of points that the matches of the two images bring together."""
        points0, points1 = features0.valid_keypoints(), features1.valid_keypoints()
        nothing = np.zeros(0, np.intp)
        if len(points0) == 0 or len(points1) == 0:
            return nothing, nothing
        scores = np.ones(len(points0), np.float32)
        moved, _ = _moved_by(features0.matcher, features0.image, features1.image, points0, scores, features0.following)
        rows0 = np.flatnonzero(np.isfinite(moved).all(axis=1))
        if len(rows0) == 0:
            return nothing, nothing
        distances, nearest = cKDTree(points1).query(moved[rows0])
        _, back = cKDTree(moved[rows0]).query(points1)
        is_mutual = (distances <= self.config.snap_px) & (back[nearest] == np.arange(len(rows0)))
        return rows0[is_mutual], nearest[is_mutual]


def _nothing(image: NDArray[np.uint8]) -> _Sight:
    return _Sight(image, np.zeros((0, 2), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))


def _moved_by(
    matcher: PairMatcher,
    image0: NDArray[np.uint8],
    image1: NDArray[np.uint8],
    points: Points,
    scores: NDArray[np.float32],
    config: FollowingConfig,
) -> tuple[Points, NDArray[np.float32]]:
    """Where points (N, 2) px of image 0 are in image 1, NaN where that is not known, and their scores (N,)."""
    features0, features1, matches = matcher.match_images(image0, image1)
    starts = features0.valid_keypoints()[matches.indices[:, 0]]
    ends = features1.valid_keypoints()[matches.indices[:, 1]]
    moved, nearest = moved_points(points, starts, ends, config)
    return moved, np.minimum(scores, matches.scores[nearest]) if len(matches) else scores


def moved_points(
    points: Points, starts: Points, ends: Points, config: FollowingConfig
) -> tuple[Points, NDArray[np.intp]]:
    """Where points (N, 2) px go with matches from `starts` (M, 2) to `ends` (M, 2) px, and the nearest match (N,).

    NaN where fewer than four matches lie within reach, or where those disagree; 0 of no matches at all.
    """
    moved = np.full(points.shape, np.nan, np.float32)
    nearest = np.zeros(len(points), np.intp)
    if len(starts) == 0 or len(points) == 0:
        return moved, nearest
    distances, rows = cKDTree(starts).query(points, k=min(_NUM_NEIGHBOURS, len(starts)))
    distances, rows = distances.reshape(len(points), -1), rows.reshape(len(points), -1)
    nearest = rows[:, 0]
    is_snapped = distances[:, 0] <= config.snap_px
    moved[is_snapped] = (points + (ends - starts)[nearest])[is_snapped]
    is_near = distances <= config.reach_px
    fitted = np.flatnonzero(~is_snapped & (is_near.sum(axis=1) >= _MIN_NEIGHBOURS))
    moved[fitted] = _moved_by_planes(points[fitted], starts[rows[fitted]], ends[rows[fitted]], is_near[fitted], config)
    return moved, nearest


def _moved_by_planes(
    points: Points, starts: Points, ends: Points, is_near: NDArray[np.bool_], config: FollowingConfig
) -> Points:
    """Points (N, 2) moved by the plane fitted to the motion of their neighbours (N, k, 2); NaN where it fits badly."""
    offsets = (starts - points[:, None]).astype(np.float64)
    motion = (ends - starts).astype(np.float64)
    terms = np.concatenate((np.ones((*offsets.shape[:2], 1)), offsets), axis=2)
    # Halfway out of reach a match counts 0.6 as much as one on the point.
    by_distance = np.exp(-2 * (offsets**2).sum(axis=2) / max(config.reach_px, 1e-3) ** 2) * is_near
    weights = by_distance
    # Neighbours on a line say nothing about the slope across it; a slope of none is then assumed.
    ridge = np.diag([0.0, 1e-2, 1e-2])
    for _ in range(_NUM_ROUNDS):
        weighted = terms * weights[..., None]
        planes = np.linalg.solve(
            np.einsum("nki,nkj->nij", weighted, terms) + ridge + _MIN_WEIGHT * np.eye(3),
            np.einsum("nki,nkj->nij", weighted, motion),
        )
        residuals = np.linalg.norm(motion - np.einsum("nki,nij->nkj", terms, planes), axis=2)
        weights = by_distance / (1 + (residuals / config.max_residual_px) ** 2)
    spread = np.sqrt((weights * residuals**2).sum(axis=1) / np.maximum(weights.sum(axis=1), _MIN_WEIGHT))
    agreeing = (is_near & (residuals <= config.max_residual_px)).sum(axis=1)
    moved = (points + planes[:, 0]).astype(np.float32)
    moved[(spread > config.max_residual_px) | (agreeing < _MIN_NEIGHBOURS)] = np.nan
    return moved
