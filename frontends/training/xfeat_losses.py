"""What XFeat learns: descriptors by dual softmax, reliability, offsets within a cell, keypoints of a teacher.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from frontends.xfeat_network import CELL_PX

NO_KEYPOINT = CELL_PX**2


def dual_softmax_loss(descriptors0: Tensor, descriptors1: Tensor, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of M true pairs of descriptors (M, D), and how sure of each pair the descriptors are.

    Row i of one belongs to row i of the other. The confidence (M,) is the product of the largest probabilities that the
    softmax over rows and the one over columns give to the pair's points; it carries no gradient.
    """
    similarity = sharpness * descriptors0 @ descriptors1.mT
    log0, log1 = F.log_softmax(similarity, dim=1), F.log_softmax(similarity.mT, dim=1)
    loss = -(log0.diagonal().mean() + log1.diagonal().mean())
    with torch.no_grad():
        confidence = log0.exp().amax(dim=1) * log1.exp().amax(dim=1)
    return loss, confidence


def reliability_loss(reliability0: Tensor, reliability1: Tensor, confidence: Tensor) -> Tensor:
    """Mean absolute difference of the predicted reliabilities (M,) of both points from the confidence (M,)."""
    target = confidence.detach()
    return ((reliability0 - target).abs().mean() + (reliability1 - target).abs().mean()) / 2


def fine_offset_loss(logits: Tensor, classes: Tensor, sharpness: float = 1.0) -> Tensor:
    """Negative log-likelihood of the offset class (M,) among the 64 logits (M, 64); 0 without any pair."""
    if len(logits) == 0:
        return logits.sum()
    return F.cross_entropy(sharpness * logits, classes)


def keypoint_classes(keypoints: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w) int64: of every cell the pixel, row by row, of the first keypoint in it, or NO_KEYPOINT.

    keypoints (B, K, 2) px, best first; valid (B, K); size (width, height) px, multiples of 8.
    """
    width, height = size
    columns, rows = width // CELL_PX, height // CELL_PX
    pixels = keypoints.round().long()
    inside = valid & (pixels >= 0).all(dim=-1) & (pixels[..., 0] < width) & (pixels[..., 1] < height)
    cells = torch.div(pixels[..., 1], CELL_PX, rounding_mode="floor") * columns
    cells = (cells + torch.div(pixels[..., 0], CELL_PX, rounding_mode="floor")).where(inside, rows * columns)
    places = (pixels[..., 1] % CELL_PX) * CELL_PX + pixels[..., 0] % CELL_PX
    # The best keypoint of a cell has the lowest rank, whatever the order of writing.
    count = keypoints.shape[1]
    ranks = torch.arange(count, device=keypoints.device).expand_as(cells)
    best = torch.full((len(keypoints), rows * columns + 1), count, device=keypoints.device)
    best = best.scatter_reduce(1, cells, ranks, "amin")[:, :-1]
    padded = F.pad(places, (0, 1), value=NO_KEYPOINT)
    return padded.gather(1, best).view(-1, rows, columns)


def keypoint_loss(logits: Tensor, classes: Tensor, generator: torch.Generator, max_empty_ratio: float = 1.0) -> Tensor:
    """Negative log-likelihood of the class (B, h, w) of every cell among its 65 logits (B, h, w, 65).

    At most `max_empty_ratio` times as many cells without a keypoint count as there are cells with one, drawn at random:
    else "no keypoint" would be the answer to everything.
    """
    flat, wanted = logits.flatten(0, -2), classes.flatten()
    filled = (wanted != NO_KEYPOINT).nonzero()[:, 0]
    empty = (wanted == NO_KEYPOINT).nonzero()[:, 0]
    kept = min(len(empty), int(max_empty_ratio * len(filled)))
    order = torch.randperm(len(empty), generator=generator, device=empty.device)[:kept]
    chosen = torch.cat((filled, empty[order]))
    if len(chosen) == 0:
        return flat.sum() * 0.0
    return F.cross_entropy(flat[chosen], wanted[chosen])
