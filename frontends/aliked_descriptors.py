"""ALIKED's descriptor head (SDDH) over branches of low resolution in place of a full-resolution map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontends.aliked_folding import FoldedLinear, FoldedSelu, Kernels
from frontends.aliked_layout import Layout
from frontends.aliked_network import DescriptorHead, max_offset_px, patch_pixels
from frontends.aliked_sampling import as_table, weighted_rows, zero_padded_taps

CHUNK_SAMPLES = 8192  # samples handled at once on the CPU, so that their features stay in the cache


class PyramidSampler:
    """Rebuilds the aggregated features of single pixels of one image from its branches.

    The cells around a pixel and their weights are looked up by its row and by its column, for all coarse branches at
    once; the fine branch is evaluated at the pixels asked for only.
    """

    def __init__(
        self, block1: Tensor, coarse: Tensor, layout: Layout, fine_branch: nn.Module, selu: FoldedSelu
    ) -> None:
        """block1 (c1, H', W'), channels-last, and coarse (cells, D/4)."""
        self.block1, self.coarse, self.layout = as_table(block1.unsqueeze(0)), coarse, layout
        self.fine_branch, self.selu = fine_branch, selu
        self.padded_width = block1.shape[2]

    def _parts(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Fine (N, D/4) and coarse (N, 3 D/4) features, not normalised, at rows and columns that broadcast to N."""
        layout = self.layout
        left, top = layout.origin
        pixels = rows * self.padded_width + columns + (top * self.padded_width + left)
        fine = self.selu(self.fine_branch(self.block1.index_select(0, pixels.flatten())), is_shifted=False)
        cells = _look_up(layout.row_cells, rows) + _look_up(layout.column_cells, columns)
        weights = _look_up(layout.row_weights, rows) * _look_up(layout.column_weights, columns)
        coarse = weighted_rows(self.coarse, cells.view(-1, 4), weights.view(-1, 4))
        return fine, coarse.view(len(fine), -1)

    def pixels(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Features (N, D) of unit length at pixels."""
        return functional.normalize(torch.cat(self._parts(rows, columns), dim=1), dim=1)

    def interpolated(self, places: Tensor) -> Tensor:
        """Features (N, D) at places (2, N) px (x, y), between those of unit length at the pixels around them."""
        height, width = self.layout.size
        rows, columns = zero_padded_taps(places[1], height), zero_padded_taps(places[0], width)
        fine, coarse = self._parts(rows.indices.unsqueeze(1), columns.indices.unsqueeze(0))
        norm = torch.hypot(torch.linalg.vector_norm(fine, dim=1), torch.linalg.vector_norm(coarse, dim=1))
        weights = (rows.weights.unsqueeze(1) * columns.weights.unsqueeze(0)).view(4, -1).div_(norm.view(4, -1))
        weights = weights.t().contiguous()
        corners = torch.arange(len(norm), device=norm.device, dtype=torch.int32).view(4, -1).t().contiguous()
        return torch.cat((weighted_rows(fine, corners, weights), weighted_rows(coarse, corners, weights)), dim=1)


class KernelSampler:
    """The same by kernels of our own."""

    def __init__(
        self,
        block1: Tensor,
        coarse: Tensor,
        layout: Layout,
        fine_branch: FoldedLinear,
        selu: FoldedSelu,
        kernels: Kernels,
    ) -> None:
        self._inputs = block1, coarse, layout, fine_branch.weight
        self._is_native = selu.input_shift == 0.0
        self._kernels = kernels

    def pixels(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self._kernels.features(*self._inputs, torch.stack((columns, rows)), self._is_native)

    def interpolated(self, places: Tensor) -> Tensor:
        return self._kernels.features(*self._inputs, places, self._is_native)


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Rows (..., C) of table (R, C); unlike indexing, a plain copy of rows."""
    return table.index_select(0, indices.flatten()).view(*indices.shape, -1)


class FoldedDescriptorHead(nn.Module):
    """SDDH (section III-D of the paper) that reads a sampler."""

    aggregation: Tensor

    def __init__(self, head: DescriptorHead, selu: FoldedSelu) -> None:
        super().__init__()
        self.selu, self.num_samples = selu, head.num_samples
        patch_conv, offset_conv = (layer for layer in head.offset_conv if isinstance(layer, nn.Conv2d))
        self.patch = FoldedLinear(patch_conv.weight, patch_conv.bias, shift=selu.input_shift)
        self.offset = FoldedLinear(offset_conv.weight, offset_conv.bias, gain=selu.gain)
        self.feature = FoldedLinear(head.sf_conv.weight)
        # The gain is left out here: descriptors are normalised.
        self.register_buffer("aggregation", head.agg_weights.detach().flatten(0, 1))

    def forward(self, sampler: PyramidSampler | KernelSampler, keypoints: Tensor, height: int, width: int) -> Tensor:
        """Descriptors (K, D) at keypoints (K, 2) px of an image of height x width px."""
        chunk = CHUNK_SAMPLES // self.num_samples if keypoints.device.type == "cpu" else len(keypoints)
        starts = range(0, len(keypoints), chunk)
        parts = [self._describe(sampler, keypoints[first : first + chunk], height, width) for first in starts]
        return functional.normalize(torch.cat(parts), dim=1)

    def _describe(self, sampler: PyramidSampler | KernelSampler, keypoints: Tensor, height: int, width: int) -> Tensor:
        sampled = sampler.interpolated(self._sample_places(sampler, keypoints, height, width))
        features: Tensor = self.selu(self.feature(sampled), is_shifted=False)
        return torch.mm(features.view(len(keypoints), -1), self.aggregation)

    def _sample_places(
        self, sampler: PyramidSampler | KernelSampler, keypoints: Tensor, height: int, width: int
    ) -> Tensor:
        """Where the features are read, (2, K M) px (x, y)."""
        pixels = patch_pixels(keypoints, height, width).flatten()
        patches = sampler.pixels(pixels // width, pixels % width)
        hidden = self.selu(self.patch(patches.view(len(keypoints), -1)))
        limit = max_offset_px(height, width)
        offsets: Tensor = self.offset(hidden).clamp_(-limit, limit).view(len(keypoints), 2, self.num_samples)
        return (keypoints.unsqueeze(-1) + offsets).transpose(0, 1).flatten(1)
