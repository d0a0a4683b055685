"""ALIKED's forward pass for training without its full-resolution feature map: a third of the time and of the memory.

The same function of the same parameters as `AlikedNetwork`, by the two facts that `frontends.aliked_inference` rests
on: upsampling and a 1x1 convolution commute, and the descriptor head reads the map at few places. Everything here is
differentiable, batch norms included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontends.aliked_layout import Layout, create_layout
from frontends.aliked_network import STRIDE, AlikedNetwork, max_offset_px, patch_pixels
from frontends.aliked_sampling import as_table, weighted_rows, zero_padded_taps


@dataclass(frozen=True, slots=True, eq=False)
class TrainingMaps:
    """What is known of B images of H x W px.

    score_logits  (B, 1, H, W), before the sigmoid.
    stages        outputs of the four blocks, (B, c, h, w) each.
    fine          (B H W, D/4), the finest branch by pixel.
    coarse        (B cells, 3 D/4): the other three by cell, each in its own rows and columns.
    """

    score_logits: Tensor
    stages: tuple[Tensor, ...]
    fine: Tensor
    coarse: tuple[Tensor, ...]
    layout: Layout

    @property
    def score_map(self) -> Tensor:
        return torch.sigmoid(self.score_logits)


def training_maps(network: AlikedNetwork, images: Tensor, inputs: tuple[Tensor, ...] | None = None) -> TrainingMaps:
    """Maps of images (B, 3, H, W) float RGB in [0, 1]; ValueError unless the sides are multiples of STRIDE.

    inputs  block outputs of another network, like `TrainingMaps.stages`: every block and the heads read these instead
            of what the block before made, so that each learns on its own. None: the network as it is.
    """
    height, width = images.shape[2:]
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"images: expected sides that are multiples of {STRIDE} px, got {width}x{height}")
    blocks, pools = (network.block2, network.block3, network.block4), (2, 4, 4)
    stages = [network.block1(images)]
    for index, (block, pool) in enumerate(zip(blocks, pools, strict=True)):
        read = stages[index] if inputs is None else inputs[index]
        stages.append(block(functional.avg_pool2d(read, pool)))
    convs = (network.conv1, network.conv2, network.conv3, network.conv4)
    seen = stages if inputs is None else inputs
    branches = [functional.selu(conv(x)) for conv, x in zip(convs, seen, strict=True)]
    first = cast(nn.Conv2d, network.score_head[0])
    mixed = torch.zeros((), device=images.device)
    for branch, weight in zip(branches, first.weight.chunk(4, dim=1), strict=True):
        part = functional.conv2d(branch, weight)
        if part.shape[2:] != images.shape[2:]:
            part = functional.interpolate(part, (height, width), mode="bilinear", align_corners=True)
        mixed = mixed + part
    logits = network.score_head[1:](mixed)
    # In float32 whatever the convolutions work in: many gradients are added up in few cells.
    tables = [as_table(branch).float() for branch in branches]
    layout = create_layout(height, width, images.device)
    return TrainingMaps(logits, tuple(stages), tables[0], tuple(tables[1:]), layout)


def described(network: AlikedNetwork, maps: TrainingMaps, keypoints: Tensor) -> Tensor:
    """Descriptors (B, K, D) of unit length at keypoints (B, K, 2) px; gradients reach network, maps and keypoints."""
    head, (height, width) = network.desc_head, maps.layout.size
    batch, count, _ = keypoints.shape
    pixels = patch_pixels(keypoints, height, width)
    images = torch.arange(batch, device=keypoints.device).view(-1, 1, 1)
    features = pixel_features(maps, images.expand_as(pixels).flatten(), pixels.flatten())
    patches = features.view(batch * count, 9, -1).transpose(1, 2).reshape(batch * count, -1, 3, 3)
    limit = max_offset_px(height, width)
    offsets = head.offset_conv(patches).clamp(-limit, limit).view(batch, count, 2, head.num_samples)
    places = (keypoints.unsqueeze(-1) + offsets).transpose(2, 3).reshape(-1, 2)
    owners = images.expand(batch, count, head.num_samples).flatten()
    sampled = interpolated(maps, owners, places)
    sampled = functional.selu(functional.linear(sampled, head.sf_conv.weight.flatten(1)))
    sampled = sampled.view(batch, count, head.num_samples, -1)
    descriptors = torch.einsum("bkmc,mcd->bkd", sampled, head.agg_weights)
    return functional.normalize(descriptors, dim=2)


def interpolated(maps: TrainingMaps, images: Tensor, places: Tensor) -> Tensor:
    """The normalised feature map (N, D) between its pixels: at places (N, 2) px of images (N,); zero outside."""
    height, width = maps.layout.size
    rows, columns = zero_padded_taps(places[:, 1], height), zero_padded_taps(places[:, 0], width)
    result = torch.zeros((), device=places.device)
    for i in (0, 1):
        for j in (0, 1):
            corner = pixel_features(maps, images, rows.indices[i] * width + columns.indices[j])
            result = result + corner * (rows.weights[i] * columns.weights[j]).unsqueeze(1)
    return result


def pixel_features(maps: TrainingMaps, images: Tensor, pixels: Tensor) -> Tensor:
    """The normalised feature map (N, D) at flat pixels (N,) of images (N,)."""
    layout = maps.layout
    height, width = layout.size
    rows, columns = torch.div(pixels, width, rounding_mode="floor"), pixels % width
    parts = [maps.fine.index_select(0, images * (height * width) + pixels)]
    # The layout's tables stack the three coarse branches of one image: four taps each, counted through all of them.
    cells = layout.row_cells.index_select(0, rows) + layout.column_cells.index_select(0, columns)
    weights = layout.row_weights.index_select(0, rows) * layout.column_weights.index_select(0, columns)
    first = 0
    for branch, (coarse_height, coarse_width) in enumerate(layout.coarse_sizes):
        taps = slice(4 * branch, 4 * branch + 4)
        size = coarse_height * coarse_width
        indices = cells[:, taps].long() - first + (images * size).unsqueeze(1)
        parts.append(weighted_rows(maps.coarse[branch], indices, weights[:, taps].to(maps.coarse[branch].dtype)))
        first += size
    return functional.normalize(torch.cat(parts, dim=1).float(), dim=1)
