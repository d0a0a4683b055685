"""ALIKED for inference: the results of the plain network without its full-resolution feature map.

Two facts make that possible. Bilinear upsampling is linear over pixels and a 1x1 convolution over channels, so they
commute: the head of the score branch is applied to each branch at its own resolution, and only its 8 channels are
upsampled. And the descriptor head reads the map at a few places around every keypoint only; there it is rebuilt from
the branches, norm included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontends.aliked_folding import (
    STRIP_VALUES,
    FoldedConv2d,
    FoldedConvBlock,
    FoldedLinear,
    FoldedResidualBlock,
    FoldedSelu,
)
from frontends.aliked_network import (
    AlikedNetwork,
    DescriptorHead,
    max_offset_px,
    pad_to_stride,
    padding_to_stride,
    patch_pixels,
)
from frontends.aliked_sampling import (
    as_map,
    as_table,
    cross_weights,
    upsampling_taps,
    weighted_rows,
    zero_padded_taps,
)


@dataclass(frozen=True, slots=True, eq=False)
class Pyramid:
    """What is known of an image before aggregation: every branch at its own resolution.

    score_map    (B, 1, H, W) in (0, 1), without padding.
    block1       (B, c1, H', W'), padded to multiples of STRIDE; its branch is evaluated where it is read.
    branches     (B, D/4, H'/s, W'/s) for s = 2, 8, 32.
    padding      (left, top) px.
    """

    score_map: Tensor
    block1: Tensor
    branches: tuple[Tensor, ...]
    padding: tuple[int, int]


class AlikedInference(nn.Module):
    """The network of `network` for inference, its weights folded for `device`."""

    def __init__(self, network: AlikedNetwork, device: torch.device) -> None:
        super().__init__()
        selu = FoldedSelu.for_device(device)
        gain, shift = selu.gain, selu.input_shift
        self.selu = selu
        self.block1 = FoldedConvBlock(network.block1, selu)
        self.block2 = FoldedResidualBlock(network.block2, selu)
        self.block3 = FoldedResidualBlock(network.block3, selu)
        self.block4 = FoldedResidualBlock(network.block4, selu)
        self.fine_branch = FoldedLinear(network.conv1.weight, gain=gain, shift=shift)
        convs = (network.conv2, network.conv3, network.conv4)
        self.coarse_branches = nn.ModuleList([FoldedLinear(conv.weight, gain=gain, shift=shift) for conv in convs])
        first, *middle, last = (layer for layer in network.score_head if isinstance(layer, nn.Conv2d))
        fine, *coarse = first.weight.chunk(4, dim=1)
        self.fine_logits = FoldedLinear(fine, gain=gain)
        # Upsampling keeps constants, so that one of the coarse logits can carry the shift of the sum of all four.
        shifts = (shift, 0.0, 0.0)
        parts = zip(coarse, shifts, strict=True)
        self.coarse_logits = nn.ModuleList([FoldedLinear(part, gain=gain, shift=own) for part, own in parts])
        self.score_convs = nn.ModuleList([FoldedConv2d(conv, gain=gain, shift=shift) for conv in middle])
        self.score_last = FoldedConv2d(last, gain=gain, shift=0.0)
        self.head = FoldedDescriptorHead(network.desc_head, selu)
        self.to(device)

    def forward(self, images: Tensor) -> Pyramid:
        """images (B, 3, H, W) float RGB in [0, 1], any H and W of at least STRIDE px."""
        height, width = images.shape[2:]
        left, _, top, _ = padding_to_stride(height, width)
        padded = pad_to_stride(images).contiguous(memory_format=torch.channels_last)
        x1 = self.block1(padded)
        x2 = self.block2(functional.avg_pool2d(x1, 2))
        x3 = self.block3(functional.avg_pool2d(x2, 4))
        x4 = self.block4(functional.avg_pool2d(x3, 4))
        coarse = zip(self.coarse_branches, (x2, x3, x4), strict=True)
        branches = tuple(as_map(self.selu(branch(as_table(x))), x.shape) for branch, x in coarse)
        scores = self._score(x1, branches)
        return Pyramid(scores[..., top : top + height, left : left + width], x1, branches, (left, top))

    def _score(self, x1: Tensor, branches: tuple[Tensor, ...]) -> Tensor:
        logits = self._coarse_logits(branches, x1.shape[2], x1.shape[3])
        pixels = as_table(x1)
        strip = len(pixels) if x1.device.type != "cpu" else STRIP_VALUES // self.fine_logits.weight.shape[0]
        for some_pixels, some_logits in zip(torch.split(pixels, strip), torch.split(logits, strip), strict=True):
            some_logits.addmm_(self.selu(self.fine_branch(some_pixels)), self.fine_logits.weight)
            self.selu(some_logits)
        x = as_map(logits, x1.shape)
        for conv in self.score_convs:
            x = self.selu(conv(x))
        last: Tensor = self.score_last(x)
        return last.sigmoid_()

    def _coarse_logits(self, branches: tuple[Tensor, ...], height: int, width: int) -> Tensor:
        """Sum of the upsampled logits of the coarse branches, (B height width, 8).

        Columns are upsampled branch by branch; all rows then at once, as weighted sums of rows.
        """
        rows, indices, weights, first_row = [], [], [], 0
        for branch, head in zip(branches, self.coarse_logits, strict=True):
            logits = as_map(head(as_table(branch)), branch.shape)
            coarse_height = branch.shape[2]
            logits = functional.interpolate(logits, (coarse_height, width), mode="bilinear", align_corners=True)
            rows.append(logits.permute(0, 2, 3, 1).flatten(2))
            taps = upsampling_taps(coarse_height, height, branch.device)
            indices.append(taps.indices.t() + first_row)
            weights.append(taps.weights.t())
            first_row += coarse_height
        table = torch.cat(rows, dim=1)
        batch = table.shape[0]
        first_of_image = torch.arange(batch, device=table.device).view(-1, 1, 1) * first_row
        all_indices = (torch.cat(indices, dim=1) + first_of_image).flatten(0, 1)
        all_weights = torch.cat(weights, dim=1).repeat(batch, 1)
        logits = weighted_rows(table.flatten(0, 1), all_indices, all_weights)
        return logits.view(batch * height * width, -1)

    def describe(self, pyramid: Pyramid, keypoints: Tensor) -> Tensor:
        """Descriptors (B, K, D) of unit length at keypoints (B, K, 2) px."""
        height, width = pyramid.score_map.shape[2:]
        samplers = [PyramidSampler(pyramid, image, self.fine_branch, self.selu) for image in range(len(keypoints))]
        pairs = zip(samplers, keypoints, strict=True)
        return torch.stack([self.head(sampler, points, height, width) for sampler, points in pairs])


class PyramidSampler:
    """Rebuilds the aggregated features of single pixels of one image from its branches.

    The places and weights of the four cells around a pixel are looked up by its row and by its column, for all coarse
    branches at once; the fine branch is evaluated at the pixels asked for only.
    """

    def __init__(self, pyramid: Pyramid, image: int, fine_branch: nn.Module, selu: FoldedSelu) -> None:
        maps = [branch[image : image + 1] for branch in pyramid.branches]
        fine = pyramid.block1[image : image + 1]
        left, top = pyramid.padding
        height, width = pyramid.score_map.shape[2:]
        padded_height, padded_width = fine.shape[2:]
        self.fine_table, self.fine_branch, self.selu = as_table(fine), fine_branch, selu
        self.coarse_table = torch.cat([as_table(part) for part in maps])
        row_cells, row_weights, column_cells, column_weights = [], [], [], []
        first_cell = 0
        for part in maps:
            rows = upsampling_taps(part.shape[2], padded_height, part.device)
            columns = upsampling_taps(part.shape[3], padded_width, part.device)
            row_cells.append((rows.indices * part.shape[3] + first_cell).t().repeat_interleave(2, dim=1))
            row_weights.append(rows.weights.t().repeat_interleave(2, dim=1))
            column_cells.append(columns.indices.t().repeat(1, 2))
            column_weights.append(columns.weights.t().repeat(1, 2))
            first_cell += part.shape[2] * part.shape[3]
        inside_rows, inside_columns = slice(top, top + height), slice(left, left + width)
        self.row_cells = torch.cat(row_cells, dim=1)[inside_rows].int()
        self.row_weights = torch.cat(row_weights, dim=1)[inside_rows]
        self.column_cells = torch.cat(column_cells, dim=1)[inside_columns].int()
        self.column_weights = torch.cat(column_weights, dim=1)[inside_columns]
        self.fine_origin, self.fine_width = top * padded_width + left, padded_width

    def __call__(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Fine (N, D/4) and coarse (N, 3 D/4) features, not normalised, at rows and columns that broadcast to N."""
        places = rows * self.fine_width + columns + self.fine_origin
        fine = self.selu(self.fine_branch(self.fine_table.index_select(0, places.flatten())))
        cells = _look_up(self.row_cells, rows) + _look_up(self.column_cells, columns)
        weights = _look_up(self.row_weights, rows) * _look_up(self.column_weights, columns)
        coarse = weighted_rows(self.coarse_table, cells.view(-1, 4), weights.view(-1, 4))
        return fine, coarse.view(len(fine), -1)


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Rows (..., C) of table (R, C); unlike indexing, a plain copy of rows."""
    return table.index_select(0, indices.flatten()).view(*indices.shape, -1)


class FoldedDescriptorHead(nn.Module):
    """SDDH over a sampler in place of a map."""

    def __init__(self, head: DescriptorHead, selu: FoldedSelu) -> None:
        super().__init__()
        self.selu, self.num_samples = selu, head.num_samples
        patch_conv, offset_conv = (layer for layer in head.offset_conv if isinstance(layer, nn.Conv2d))
        self.patch = FoldedLinear(patch_conv.weight, patch_conv.bias, shift=selu.input_shift)
        self.offset = FoldedLinear(offset_conv.weight, offset_conv.bias, gain=selu.gain)
        self.feature = FoldedLinear(head.sf_conv.weight, shift=selu.input_shift)
        # The gain is left out: descriptors are normalised.
        self.register_buffer("aggregation", head.agg_weights.detach().flatten(0, 1))

    aggregation: Tensor

    def forward(self, sampler: PyramidSampler, keypoints: Tensor, height: int, width: int) -> Tensor:
        """Descriptors (K, D) at keypoints (K, 2) px of an image of height x width px."""
        num_keypoints = len(keypoints)
        pixels = patch_pixels(keypoints, height, width).flatten()
        patches = functional.normalize(torch.cat(sampler(pixels // width, pixels % width), dim=1), dim=1)
        hidden = self.selu(self.patch(patches.view(num_keypoints, -1)))
        limit = max_offset_px(height, width)
        offsets = self.offset(hidden).clamp_(-limit, limit).view(num_keypoints, 2, self.num_samples)
        places = (keypoints.unsqueeze(-1) + offsets).transpose(0, 1).flatten(1)
        rows, columns = zero_padded_taps(places[1], height), zero_padded_taps(places[0], width)
        fine, coarse = sampler(rows.indices.unsqueeze(1), columns.indices.unsqueeze(0))
        norm = (fine.square().sum(1) + coarse.square().sum(1)).sqrt_()
        weights = cross_weights(rows.weights, columns.weights).div_(norm.view(4, -1)).t().contiguous()
        corners = torch.arange(len(norm), device=norm.device).view(4, -1).t().contiguous()
        sampled = torch.cat((weighted_rows(fine, corners, weights), weighted_rows(coarse, corners, weights)), dim=1)
        features = self.selu(self.feature(sampled))
        return functional.normalize(features.view(num_keypoints, -1) @ self.aggregation, dim=1)
