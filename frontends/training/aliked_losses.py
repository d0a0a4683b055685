"""What ALIKED learns: where keypoints lie, how peaked they are, what descriptors say, and which points to trust.

Zhao et al., "ALIKED", IEEE TIM 2023, arXiv 2304.03608, section IV; the reprojection, peaky and reliable losses are
those of "ALIKE" (arXiv 2112.02906), section III-D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from frontends.aliked_detection import RADIUS, TEMPERATURE
from frontends.base import check_settings, setting


@dataclass(frozen=True, slots=True)
class AlikedLossConfig:
    """Weights, numbers of points and thresholds of the published training."""

    reprojection: float = setting(1.0, minimum=0.0, help="weight of the reprojection loss")
    peaky: float = setting(0.5, minimum=0.0, help="weight of the peaky loss")
    descriptors: float = setting(5.0, minimum=0.0, help="weight of the sparse neural reprojection error")
    reliable: float = setting(1.0, minimum=0.0, help="weight of the reliable loss")
    num_detected: int = setting(400, minimum=1, help="strongest keypoints of either image")
    num_random: int = setting(400, minimum=0, help="random places, whose descriptors are compared too")
    match_px: float = setting(5.0, minimum=0.0, help="a keypoint nearer than this to a moved one is the same, px")
    descriptor_temperature: float = setting(0.02, minimum=1e-4, help="of the softmax of the descriptor loss")
    reliability_temperature: float = setting(0.1, minimum=1e-4, help="of the softmax of the reliability")

    def __post_init__(self) -> None:
        check_settings(self)


def reprojection_loss(keypoints0: Tensor, keypoints1: Tensor, moved0: Tensor, moved1: Tensor) -> Tensor:
    """Half the sum of the mean two-way distances of P pairs of keypoints (P, 2) px and where they move (P, 2) px.

    moved0 lies in image 1, where keypoint 0 goes. No pair costs nothing.
    """
    if len(keypoints0) == 0:
        return keypoints0.sum() + keypoints1.sum()
    there = _lengths(moved0 - keypoints1)
    back = _lengths(moved1 - keypoints0)
    return (there.mean() + back.mean()) / 2


def _lengths(steps: Tensor) -> Tensor:
    """Lengths (...) of (..., 2), with a gradient of zero where a length is."""
    return (steps.square().sum(dim=-1) + 1e-12).sqrt()


def peaky_loss(score_map: Tensor, keypoints: Tensor, chosen: Tensor) -> Tensor:
    """Mean over keypoints of the distance to them, weighted by the softmax of the scores of their 5x5 window, px.

    score_map (B, 1, H, W), keypoints (B, K, 2) px, chosen (B, K) bool. The smaller, the sharper the peaks.
    """
    height, width = score_map.shape[2:]
    steps = torch.arange(-RADIUS, RADIUS + 1, device=score_map.device)
    centre_x = keypoints[..., 0].detach().round().long().clamp(RADIUS, width - 1 - RADIUS)
    centre_y = keypoints[..., 1].detach().round().long().clamp(RADIUS, height - 1 - RADIUS)
    columns, rows = centre_x[..., None] + steps, centre_y[..., None] + steps
    window = (rows[..., :, None] * width + columns[..., None, :]).flatten(2)
    scores = score_map.flatten(1).gather(1, window.flatten(1)).view(window.shape)
    places = torch.stack((window % width, torch.div(window, width, rounding_mode="floor")), dim=-1)
    distances = _lengths(places - keypoints[:, :, None])
    dispersity = (F.softmax(scores / TEMPERATURE, dim=-1) * distances).sum(dim=-1)
    return torch.where(chosen, dispersity, 0.0).sum() / chosen.sum().clamp(min=1)


def sparse_nre_loss(similarity: Tensor, partner: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the softmax of (similarity - 1) / temperature over the other image's points (M, N).

    partner (M,) int64: the true column of a row; negative where there is none, which costs nothing.
    """
    chosen = partner >= 0
    if not bool(chosen.any()):
        return similarity.sum() * 0.0
    return F.cross_entropy((similarity[chosen] - 1) / temperature, partner[chosen])


def reliable_loss(similarity: Tensor, partner: Tensor, scores0: Tensor, scores1: Tensor, temperature: float) -> Tensor:
    """Mean of one minus the reliability of matched keypoints, weighted by the product of both scores.

    Reliability is the probability that the softmax of the similarities gives the true match; it is not trained by this
    loss: what falls is the score of points whose descriptors do not match clearly. scores (M,), (N,).
    """
    chosen = partner >= 0
    if not bool(chosen.any()):
        return scores0.sum() * 0.0
    probability = F.softmax((similarity.detach() - 1) / temperature, dim=1)
    reliability = probability.gather(1, partner.clamp(min=0)[:, None])[:, 0]
    weights = torch.where(chosen, scores0 * scores1[partner.clamp(min=0)], 0.0)
    return ((1 - reliability) * weights).sum() / weights.sum().clamp(min=1e-6)
