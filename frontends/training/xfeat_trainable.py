"""XFeat with its batch norms apart, as training needs it; the tensors carry the names of the published checkpoint.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from frontends.xfeat_network import CELL_PX, DESCRIPTOR_DIM, XFeatMaps


@dataclass(frozen=True, slots=True, eq=False)
class XFeatTaps:
    """The maps of `XFeatMaps` and what they were made of, each (B, C, h, w), for a student to imitate."""

    maps: XFeatMaps
    stages: tuple[Tensor, ...]


class _Basic(nn.Module):
    """A convolution that keeps the size (over the stride), batch norm without affine part, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outputs, affine=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class TrainableXFeat(nn.Module):
    """Random weights until a state dict is loaded. Sides of the images are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        basic = _Basic
        self.skip1 = nn.Sequential(nn.AvgPool2d(4, stride=4), nn.Conv2d(1, 24, 1))
        self.block1 = nn.Sequential(basic(1, 4), basic(4, 8, stride=2), basic(8, 8), basic(8, 24, stride=2))
        self.block2 = nn.Sequential(basic(24, 24), basic(24, 24))
        self.block3 = nn.Sequential(basic(24, 64, stride=2), basic(64, 64), basic(64, 64, 1))
        self.block4 = nn.Sequential(basic(64, 64, stride=2), basic(64, 64), basic(64, 64))
        self.block5 = nn.Sequential(basic(64, 128, stride=2), basic(128, 128), basic(128, 128), basic(128, 64, 1))
        self.block_fusion = nn.Sequential(basic(64, 64), basic(64, 64), nn.Conv2d(64, DESCRIPTOR_DIM, 1))
        self.heatmap_head = nn.Sequential(basic(64, 64, 1), basic(64, 64, 1), nn.Conv2d(64, 1, 1), nn.Sigmoid())
        cells = CELL_PX**2
        self.keypoint_head = nn.Sequential(
            basic(cells, 64, 1), basic(64, 64, 1), basic(64, 64, 1), nn.Conv2d(64, cells + 1, 1)
        )

    def taps(self, images: Tensor, inputs: tuple[Tensor, ...] | None = None) -> XFeatTaps:
        """images (B, C, H, W) float in [0, 1], gray or colour: the channels are averaged.

        inputs  stages of another network, like `XFeatTaps.stages`: every block and head reads these instead of what
                was made before it, so that each learns on its own. None: the network as it is.
        """
        gray = _normalised(images.mean(dim=1, keepdim=True))
        stem = self.block1(gray) + self.skip1(gray)
        quarter = self.block2(stem if inputs is None else inputs[0])
        eighth = self.block3(quarter if inputs is None else inputs[1])
        sixteenth = self.block4(eighth if inputs is None else inputs[2])
        deepest = self.block5(sixteenth if inputs is None else inputs[3])
        levels = (eighth, sixteenth, deepest) if inputs is None else inputs[2:5]
        descriptors = self.block_fusion(_pyramid(*levels))
        reliability = self.heatmap_head(descriptors if inputs is None else inputs[5])
        logits = self.keypoint_head(F.pixel_unshuffle(gray, CELL_PX))
        maps = XFeatMaps(descriptors.permute(0, 2, 3, 1), reliability[:, 0], logits.permute(0, 2, 3, 1))
        return XFeatTaps(maps, (stem, quarter, eighth, sixteenth, deepest, descriptors))

    def forward(self, images: Tensor) -> XFeatMaps:
        """What `XFeatNetwork` says of images (B, C, H, W) in [0, 1]."""
        return self.taps(images).maps


def _normalised(gray: Tensor) -> Tensor:
    centred = gray - gray.mean(dim=(2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()


def _pyramid(eighth: Tensor, sixteenth: Tensor, deepest: Tensor) -> Tensor:
    size = eighth.shape[2:]
    coarse = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (sixteenth, deepest)]
    return coarse[0] + coarse[1] + eighth
