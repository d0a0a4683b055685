"""A differentiable average precision of score rows, and the loss that weighs it with the predicted reliability.

Revaud et al., "R2D2", NeurIPS 2019, section 3.3; the quantisation is that of He et al., "Local Descriptors Optimized
for Average Precision", CVPR 2018: every score is shared between the two nearest of B evenly spaced values.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12


def average_precision(
    scores: Tensor,
    is_match: Tensor,
    is_counted: Tensor | None = None,
    num_bins: int = 20,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Tensor:
    """Average precision (Q,) of rows (Q, N) ranked by score.

    is_match    (Q, N) bool, one or more per row; a row without any has precision 0.
    is_counted  (Q, N) bool: the others do not take part. None: all do.
    Scores outside [lowest, highest] count as the limit. It is exact where every score is one of the `num_bins` values;
    equal scores share a rank, the last of theirs.
    """
    if num_bins < 2 or not highest > lowest:
        raise ValueError(f"expected num_bins >= 2 and highest > lowest, got {num_bins}, {lowest}..{highest}")
    # Position on the scale of bins, from the best down, between the centres of two of them.
    positions = (highest - scores.clamp(lowest, highest)) * ((num_bins - 1) / (highest - lowest))
    upper = positions.detach().floor().clamp(max=num_bins - 2).long()
    counted = torch.ones_like(scores) if is_counted is None else is_counted.to(scores)
    num_all = _shared_out(positions, upper, counted, num_bins)
    num_matches = _shared_out(positions, upper, counted * is_match, num_bins)
    precision = num_matches.cumsum(dim=1) / num_all.cumsum(dim=1).clamp(min=_TINY)
    recall_gain = num_matches / num_matches.sum(dim=1, keepdim=True).clamp(min=_TINY)
    return (precision * recall_gain).sum(dim=1)


def _shared_out(positions: Tensor, upper: Tensor, weights: Tensor, num_bins: int) -> Tensor:
    """(Q, num_bins): the weights (Q, N), each shared between bin `upper` and the next by its position between them."""
    below = (positions - upper) * weights
    bins = positions.new_zeros((len(positions), num_bins))
    return bins.scatter_add(1, upper, weights - below).scatter_add(1, upper + 1, below)


def reliability_loss(precision: Tensor, reliability: Tensor, base: float = 0.5) -> Tensor:
    """Mean of 1 - [AP r + base (1 - r)] over rows: where AP stays below `base`, less reliability costs less.

    precision (Q,) from `average_precision`, reliability (Q,) as the network predicts it. 0 rows cost nothing.
    """
    if len(precision) == 0:
        return precision.sum()
    return (1 - precision * reliability - base * (1 - reliability)).mean()
