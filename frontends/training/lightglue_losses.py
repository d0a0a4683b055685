"""What LightGlue learns: the true assignment at every layer, and when it may stop.

Lindenberger et al., "LightGlue", ICCV 2023, section 3.4, equations 10 and 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from frontends.lightglue_network import LightGlueNetwork
from frontends.training.labels import UNMATCHABLE, MatchLabels


@dataclass(frozen=True, slots=True, eq=False)
class LightGlueInputs:
    """B pairs: descriptors (B, M, D), (B, N, D), normalised coordinates (B, M, 2), (B, N, 2) and masks of validity."""

    descriptors0: Tensor
    descriptors1: Tensor
    coordinates0: Tensor
    coordinates1: Tensor
    mask0: Tensor
    mask1: Tensor


def layer_assignments(
    network: LightGlueNetwork, inputs: LightGlueInputs
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Log assignment (B, M + 1, N + 1) in float32 and states of every layer."""
    given = (inputs.descriptors0, inputs.descriptors1, inputs.coordinates0, inputs.coordinates1)
    states = list(network.states(*given, inputs.mask0, inputs.mask1))
    heads = zip(network.log_assignment, states, strict=True)
    with torch.autocast(states[0][0].device.type, enabled=False):
        assignments = [head(x0.float(), x1.float(), inputs.mask0, inputs.mask1) for head, (x0, x1) in heads]
    return assignments, states


def assignment_loss(log_assignment: Tensor, labels: MatchLabels) -> Tensor:
    """Equation 10 for one layer (B, M + 1, N + 1): positives and the unmatchable of both sides weigh the same.

    Mean over all matches of -log P, plus half of each side's mean of -log(1 - sigma) over unmatchable points. Ignored
    points cost nothing; a kind without any point costs nothing.
    """
    positive = labels.partner0 >= 0
    rows = log_assignment[:, :-1]
    at_partner = rows.gather(2, labels.partner0.clamp(min=0)[..., None])[..., 0]
    matched = -_mean(at_partner, positive)
    alone0 = -_mean(rows[..., -1], labels.partner0 == UNMATCHABLE)
    alone1 = -_mean(log_assignment[:, -1, :-1], labels.partner1 == UNMATCHABLE)
    return matched + (alone0 + alone1) / 2


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen ones, 0 where there are none; what is not chosen may be infinite."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)


def deep_supervision_loss(log_assignments: Sequence[Tensor], labels: MatchLabels) -> Tensor:
    """The mean of the losses of all layers."""
    return torch.stack([assignment_loss(assignment, labels) for assignment in log_assignments]).mean()


def decisions(log_assignment: Tensor, min_score: float = 0.1) -> tuple[Tensor, Tensor]:
    """The partner of every point of view 0 (B, M) and 1 (B, N): its mutual best above `min_score`, else -1."""
    inner = log_assignment[:, :-1, :-1]
    best0, best1 = inner.max(dim=2), inner.max(dim=1)
    rows = torch.arange(inner.shape[1], device=inner.device)
    columns = torch.arange(inner.shape[2], device=inner.device)
    mutual0 = best1.indices.gather(1, best0.indices) == rows
    mutual1 = best0.indices.gather(1, best1.indices) == columns
    found0 = torch.where(mutual0 & (best0.values.exp() > min_score), best0.indices, -1)
    found1 = torch.where(mutual1 & (best1.values.exp() > min_score), best1.indices, -1)
    return found0, found1


def confidence_loss(
    network: LightGlueNetwork,
    states: Sequence[tuple[Tensor, Tensor]],
    log_assignments: Sequence[Tensor],
    inputs: LightGlueInputs,
) -> Tensor:
    """Cross-entropy of the exit heads: does this layer already decide as the last one will? (equation 11)

    States are detached inside the heads, so nothing but the heads learns from it. 0 for networks without heads.
    """
    if len(network.token_confidence) == 0:
        return states[0][0].new_zeros(())
    with torch.no_grad():
        last0, last1 = decisions(log_assignments[-1])
    parts = []
    for head, (x0, x1), assignment in zip(network.token_confidence, states, log_assignments, strict=False):
        with torch.no_grad():
            now0, now1 = decisions(assignment)
        for x, now, last, mask in ((x0, now0, last0, inputs.mask0), (x1, now1, last1, inputs.mask1)):
            linear = cast(torch.nn.Linear, cast(torch.nn.Sequential, head.token)[0])
            logits = F.linear(x.detach().float(), linear.weight.float(), linear.bias.float())[..., 0]
            wrong = F.binary_cross_entropy_with_logits(logits, (now == last).float(), reduction="none")
            parts.append(_mean(wrong, mask))
    return torch.stack(parts).mean()
