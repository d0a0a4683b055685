"""The accuracy gate: whether a faster way of computing still finds what float32 finds.

It lets a precision through where at least 99 % of the keypoints of float32 come again within 0.05 px, and at least
99 % of its matches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from frontends.base import Extractor, Features, Matcher, Matches

TOLERANCE_PX = 0.05
MIN_KEYPOINTS = 0.99
MIN_MATCHES = 0.99
_CANDIDATES = 8  # rows within a tenth of a pixel of another: a detector gives one

Image = NDArray[np.uint8]
Points = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Share of the reference's keypoints and matches that came again, over all images; 1 of none."""

    keypoints: float
    matches: float

    @property
    def passes(self) -> bool:
        return self.keypoints >= MIN_KEYPOINTS and self.matches >= MIN_MATCHES

    def __str__(self) -> str:
        return f"{self.keypoints:.2%} of the keypoints, {self.matches:.2%} of the matches"


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a frontend finds in a sequence: keypoints (N, 2) px per image, matches (M, 4) px from image to image."""

    keypoints: tuple[Points, ...]
    matches: tuple[Points, ...]


def find(extractor: Extractor, matcher: Matcher, images: Sequence[Image]) -> Found:
    """Runs a frontend over images, each matched to the one before."""
    return find_in([extractor.extract(image) for image in images], matcher.match)


def find_in(features: Sequence[Features], match: Callable[[Features, Features], Matches]) -> Found:
    """The same for features that are there already."""
    keypoints = tuple(each.valid_keypoints() for each in features)
    matches = []
    for number in range(1, len(features)):
        indices = match(features[number - 1], features[number]).indices
        matches.append(np.hstack((keypoints[number - 1][indices[:, 0]], keypoints[number][indices[:, 1]])))
    return Found(keypoints, tuple(matches))


def agreement(reference: Found, other: Found) -> Agreement:
    """How much of the reference the other has, within the tolerance."""
    return Agreement(_share(reference.keypoints, other.keypoints), _share(reference.matches, other.matches))


def _share(reference: Sequence[Points], other: Sequence[Points]) -> float:
    counts = [(len(mine), _num_found(mine, theirs)) for mine, theirs in zip(reference, other, strict=True)]
    total = sum(count for count, _ in counts)
    return sum(found for _, found in counts) / total if total else 1.0


def _num_found(reference: Points, other: Points) -> int:
    """How many rows (N, 2 or 4) px of the reference have one of the other in the tolerance, in every point of it."""
    if not len(reference) or not len(other):
        return 0
    # Rows of two points that are both near are near in four dimensions: only these few are looked at.
    radius = TOLERANCE_PX * math.sqrt(reference.shape[1] / 2) * (1 + 1e-6)
    _, rows = cKDTree(other).query(reference, k=min(_CANDIDATES, len(other)), distance_upper_bound=radius)
    rows = rows.reshape(len(reference), -1)
    padded = np.vstack((other, np.full_like(other[:1], np.inf)))  # the row of those that have none
    points = (padded[rows] - reference[:, None]).reshape(*rows.shape, -1, 2)
    is_near = np.sqrt(np.square(points).sum(axis=3)).max(axis=2) <= TOLERANCE_PX
    return int(is_near.any(axis=1).sum())
