"""Which of many keypoints to keep when there is room for K: the strongest, or the strongest of every place."""

from __future__ import annotations

import torch
from torch import Tensor

# Candidates looked at for each keypoint kept: enough for weak corners of the image, few enough to cost nothing.
CANDIDATES_PER_KEYPOINT = 4
# Side of the cells in px. On KITTI 25 px halves the drift in scale that the strongest 1024 keypoints give.
SPREAD_CELL_PX = 25


def spread_order(keypoints: Tensor, cell_px: float, is_valid: Tensor | None = None) -> Tensor:
    """Order (..., M) that takes the best keypoint of every cell of the image first, then every cell's second best, ...

    keypoints (..., M, 2) px, strongest first; within a round the stronger comes first. Those that are not valid
    (..., M) stand behind all others in `keypoints`, and come last. A camera is posed by points in
    all directions and at all depths, while the strongest keypoints crowd on the best textured surface. Shapes depend
    on nothing but the input's, so that the order can be part of a CUDA graph.
    """
    cells = torch.floor(keypoints / cell_px).long()
    # One number per cell; a side of 2^20 cells is beyond any image.
    cell_ids = cells[..., 1] * (1 << 20) + cells[..., 0]
    sorted_ids, by_cell = torch.sort(cell_ids, dim=-1, stable=True)
    positions = torch.arange(cell_ids.shape[-1], device=keypoints.device).expand_as(cell_ids)
    begins = torch.ones_like(sorted_ids, dtype=torch.bool)
    begins[..., 1:] = sorted_ids[..., 1:] != sorted_ids[..., :-1]
    first = torch.where(begins, positions, 0).cummax(dim=-1).values
    ranks = torch.empty_like(cell_ids).scatter_(-1, by_cell, positions - first)
    if is_valid is not None:
        ranks = torch.where(is_valid, ranks, cell_ids.shape[-1])
    return torch.sort(ranks, dim=-1, stable=True).indices
