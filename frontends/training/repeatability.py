"""Losses on repeatability maps: the same in both images, and made of peaks.

Revaud et al., "R2D2", NeurIPS 2019, section 3.2, equations 1 to 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def warped(values: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, C, H, W) of image 1 read where the pixels of image 0 lie in it, and whether they do (B, H, W).

    flow (B, H, W, 2) px, pixel centres at integers; bilinear.
    """
    height, width = values.shape[2:]
    size = flow.new_tensor([width, height])
    is_inside = ((flow >= 0) & (flow <= size - 1)).all(dim=-1)
    places = torch.where(is_inside[..., None], (flow + 0.5) * (2 / size) - 1, 2.0)
    return F.grid_sample(values, places, mode="bilinear", align_corners=False), is_inside


def similarity_loss(repeatability0: Tensor, repeatability1: Tensor, flow: Tensor, patch_px: int) -> Tensor:
    """One minus the mean cosine similarity of the maps (B, H, W) over overlapping patches.

    Patches of image 0 that leave image 1 anywhere do not count; without any the loss is 0.
    """
    other, is_inside = warped(repeatability1[:, None], flow)
    stride = max(1, patch_px // 2)
    patches0, patches1, inside = (
        F.unfold(values, patch_px, stride=stride)
        for values in (repeatability0[:, None], other, is_inside[:, None].to(repeatability0))
    )
    is_counted = inside.amin(dim=1) > 0.5
    similarity = F.cosine_similarity(patches0, patches1, dim=1)
    return ((1 - similarity) * is_counted).sum() / is_counted.sum().clamp(min=1)


def peakiness_loss(repeatability: Tensor, patch_px: int) -> Tensor:
    """One minus the mean of (largest less average) over windows of maps (B, H, W), slightly smoothed.

    Windows are `patch_px` rounded up to an odd side; what lies outside the image belongs to none.
    """
    side = patch_px + 1 - patch_px % 2
    smooth = F.avg_pool2d(repeatability[:, None], 3, stride=1, padding=1, count_include_pad=False)
    largest = F.max_pool2d(smooth, side, stride=1, padding=side // 2)
    average = F.avg_pool2d(smooth, side, stride=1, padding=side // 2, count_include_pad=False)
    return 1 - (largest - average).mean()
