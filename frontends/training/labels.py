"""Which keypoints of two views are the same point, which have no partner, and which are better left out.

Lindenberger et al., "LightGlue", ICCV 2023, appendix on training: below 3 px a match, above 5 px to all unmatchable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from frontends.training.pairs_layers import Transfer

UNMATCHABLE = -1
IGNORED = -2


class PairGeometry(Protocol):
    """Pairs of views that know where a point of one lies in the other."""

    def transfer(self, side: int, points: Tensor) -> Transfer:
        """Where points (B, N, 2) px of view `side` lie in the other one."""


@dataclass(frozen=True, slots=True, eq=False)
class MatchLabels:
    """For every keypoint of view 0 (B, M) and of view 1 (B, N), int64: its partner, UNMATCHABLE, or IGNORED."""

    partner0: Tensor
    partner1: Tensor


def match_labels(
    pairs: PairGeometry,
    keypoints0: Tensor,
    keypoints1: Tensor,
    valid0: Tensor | None = None,
    valid1: Tensor | None = None,
    match_px: float = 3.0,
    unmatchable_px: float = 5.0,
) -> MatchLabels:
    """Labels of keypoints (B, M, 2) and (B, N, 2) px; rows that are not valid (B, M), (B, N) are ignored.

    The error of a pair is the larger of its two transfer errors. A match is the best of both rows, below `match_px`,
    visible and known both ways. A point is unmatchable where it is known to be hidden or outside, or where every
    keypoint of the other view is farther than `unmatchable_px` from the place it moves to.
    """
    valid0 = torch.ones_like(keypoints0[..., 0], dtype=torch.bool) if valid0 is None else valid0
    valid1 = torch.ones_like(keypoints1[..., 0], dtype=torch.bool) if valid1 is None else valid1
    moved0, moved1 = pairs.transfer(0, keypoints0), pairs.transfer(1, keypoints1)
    distance01 = _distances(moved0.points, keypoints1)
    distance10 = _distances(moved1.points, keypoints0).mT
    possible0 = moved0.is_visible & moved0.is_known & valid0
    possible1 = moved1.is_visible & moved1.is_known & valid1
    error = torch.maximum(distance01, distance10)
    error = error.masked_fill(~(possible0[:, :, None] & possible1[:, None, :]), torch.inf)
    best0, best1 = error.min(dim=2), error.min(dim=1)
    rows = torch.arange(error.shape[1], device=error.device)
    columns = torch.arange(error.shape[2], device=error.device)
    mutual0 = (best1.indices.gather(1, best0.indices) == rows) & (best0.values < match_px)
    mutual1 = (best0.indices.gather(1, best1.indices) == columns) & (best1.values < match_px)
    lonely0 = _is_lonely(moved0, valid0, distance01.masked_fill(~valid1[:, None, :], torch.inf), unmatchable_px)
    lonely1 = _is_lonely(moved1, valid1, distance10.mT.masked_fill(~valid0[:, None, :], torch.inf), unmatchable_px)
    return MatchLabels(_partners(best0.indices, mutual0, lonely0), _partners(best1.indices, mutual1, lonely1))


def _distances(places: Tensor, keypoints: Tensor) -> Tensor:
    """(B, M, N) px; infinite for places that are."""
    is_finite = torch.isfinite(places).all(dim=-1, keepdim=True)
    steps = torch.where(is_finite, places, 0.0)[:, :, None] - keypoints[:, None]
    # Not by the squares of the norms, whose difference is too coarse in float32.
    distances: Tensor = torch.linalg.vector_norm(steps, dim=-1).masked_fill(~is_finite, torch.inf)
    return distances


def _is_lonely(moved: Transfer, valid: Tensor, distances: Tensor, unmatchable_px: float) -> Tensor:
    is_far: Tensor = distances.amin(dim=2) > unmatchable_px
    is_lonely: Tensor = valid & moved.is_known & (~moved.is_visible | is_far)
    return is_lonely


def _partners(best: Tensor, is_match: Tensor, is_lonely: Tensor) -> Tensor:
    return torch.where(is_match, best, torch.where(is_lonely, UNMATCHABLE, IGNORED))


@dataclass(frozen=True, slots=True)
class MatchScore:
    """How good matches are, over all pairs: shares of matches that are right, and of true matches that are found."""

    precision: float
    recall: float


def match_score(found0: Tensor, labels: MatchLabels) -> MatchScore:
    """Score of found0 (B, M) int64, the partner of every keypoint of view 0 or a negative number.

    Matches of ignored points, or to ignored points, do not count.
    """
    is_found = found0 >= 0
    other = labels.partner1.gather(1, found0.clamp(min=0))
    is_right = is_found & (found0 == labels.partner0)
    is_wrong = is_found & ~is_right & (labels.partner0 != IGNORED) & (other != IGNORED)
    num_right, num_wrong = float(is_right.sum()), float(is_wrong.sum())
    num_true = float((labels.partner0 >= 0).sum())
    return MatchScore(num_right / max(1.0, num_right + num_wrong), num_right / max(1.0, num_true))
