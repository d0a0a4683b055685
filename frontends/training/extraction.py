"""Features of whole batches on the device, for training and its validation; the same functions that a run evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from frontends.aliked_detection import detect as detect_aliked
from frontends.aliked_network import AlikedNetwork
from frontends.training.aliked_trainable import described, training_maps
from frontends.training.xfeat_trainable import TrainableXFeat
from frontends.xfeat import XFeatConfig
from frontends.xfeat import detect as detect_xfeat


@dataclass(frozen=True, slots=True, eq=False)
class BatchFeatures:
    """Of B images the K best keypoints (B, K, 2) px, descriptors (B, K, D) of unit length, and which rows hold one."""

    keypoints: Tensor
    descriptors: Tensor
    valid: Tensor

    def rows(self, index: Tensor) -> BatchFeatures:
        """The rows (B, N) of every image."""
        wide = index[..., None]
        return BatchFeatures(
            self.keypoints.gather(1, wide.expand(-1, -1, 2)),
            self.descriptors.gather(1, wide.expand(-1, -1, self.descriptors.shape[2])),
            self.valid.gather(1, index),
        )


class BatchExtractor(Protocol):
    """Images (B, 3, H, W) in [0, 1], sides multiples of 32 px -> the `count` best features of each."""

    def __call__(self, images: Tensor, count: int) -> BatchFeatures: ...


class AlikedExtractor:
    """Features by an ALIKED network, which is used as it is (in evaluation mode or not)."""

    def __init__(self, network: AlikedNetwork) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, images: Tensor, count: int) -> BatchFeatures:
        maps = training_maps(self.network, images)
        found = detect_aliked(maps.score_map.float(), count)
        descriptors = described(self.network, maps, found.keypoints).float()
        rows = torch.arange(count, device=images.device)
        return BatchFeatures(found.keypoints, descriptors, rows < found.num_valid[:, None])


class XFeatExtractor:
    """Features by an XFeat network, which is used as it is."""

    def __init__(self, network: TrainableXFeat) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, images: Tensor, count: int) -> BatchFeatures:
        found = detect_xfeat(self.network(images), XFeatConfig(max_keypoints=count, spread_cell_px=None))
        rows = torch.arange(count, device=images.device)
        return BatchFeatures(
            torch.stack([one.keypoints for one in found]),
            torch.stack([one.descriptors for one in found]),
            torch.stack([rows < one.num_valid for one in found]),
        )


def extractor_of(network: nn.Module) -> BatchExtractor:
    """The extractor that a network of either kind makes."""
    match network:
        case AlikedNetwork():
            return AlikedExtractor(network)
        case TrainableXFeat():
            return XFeatExtractor(network)
        case _:
            raise ValueError(f"no extractor is made of {type(network).__name__}")
