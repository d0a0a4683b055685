"""ALIKED's hot spots as Triton kernels: each does in one launch what takes PyTorch ten to forty small ones.

On a GPU the network is bound by the number of kernels and not by arithmetic, and these three places have most of them:
the samples of a deformable convolution, the suppression of non-maxima, and the features around keypoints. PyTorch's
operations compute the same (`aliked_folding`, `aliked_static`, `aliked_descriptors`); which runs is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frontends.aliked_detection import RADIUS
from frontends.aliked_folding import SELU_ALPHA, SELU_LAMBDA
from frontends.aliked_layout import Layout

_PIXELS = 256
_SAMPLES = 32
_TAPS = 64


class TritonKernels:
    """What `AlikedInference.using` takes: the same functions as PyTorch's operations, for one image."""

    def deformed_taps(self, x: Tensor, offsets: Tensor, limit: float) -> Tensor:
        """The nine taps of every pixel of a map, (H W, 9 C), moved by offsets (H W, 18) px (dy, dx) per tap.

        x (1, C, H, W), channels-last; `limit` px is what an offset is clamped to. What lies outside the map is zero.
        """
        batch, channels, height, width = x.shape
        if batch != 1:
            raise ValueError(f"x: expected one image, got {batch}")
        table, offsets = x.permute(0, 2, 3, 1).contiguous(), offsets.contiguous()
        taps = torch.empty((height * width, 9 * channels), device=x.device)
        num_taps = 9 * height * width
        grid = (triton.cdiv(num_taps, _TAPS),)
        deformed_taps_kernel[grid](table, offsets, taps, height, width, limit, num_taps, channels, _TAPS)
        return taps

    def suppress(self, score_map: Tensor, num_rounds: int) -> Tensor:
        """As `suppress_non_maxima`, (1, 1, H, W)."""
        scores = score_map.contiguous()
        height, width = scores.shape[2:]
        size = height * width
        grid = (triton.cdiv(size, _PIXELS),)
        is_maximum = torch.empty_like(scores, dtype=torch.uint8)
        local_maxima_kernel[grid](scores, is_maximum, height, width, RADIUS, _PIXELS)
        for _ in range(num_rounds - 1):
            # A new mask per round: a kernel must not write what its neighbours still read.
            remaining, grown = torch.empty_like(scores), torch.empty_like(is_maximum)
            set_aside_kernel[grid](scores, is_maximum, remaining, height, width, RADIUS, _PIXELS)
            further_maxima_kernel[grid](remaining, is_maximum, grown, height, width, RADIUS, _PIXELS)
            is_maximum = grown
        return scores * is_maximum

    def features(
        self, block1: Tensor, coarse: Tensor, layout: Layout, fine_weight: Tensor, places: Tensor, is_native: bool
    ) -> Tensor:
        """Features of unit length (N, D), interpolated between pixels, at places (2, N) px (x, y).

        block1 (c1, H', W'), channels-last; coarse (cells, D/4); fine_weight (c1, D/4). Whole numbers as places ask for
        single pixels. `is_native`: the weights expect the activation with its gain (`FoldedSelu`).
        """
        table = block1.permute(1, 2, 0).contiguous()
        count, quarter = places.shape[1], coarse.shape[1]
        out = torch.empty((count, 4 * quarter), device=block1.device)
        left, top = layout.origin
        height, width = layout.size
        grid = (triton.cdiv(count, _SAMPLES),)
        is_whole = not places.is_floating_point()
        features_kernel[grid](
            *(table, coarse.contiguous(), fine_weight, places.float().contiguous(), out),
            *(layout.row_cells, layout.row_weights, layout.column_cells, layout.column_weights),
            *(count, height, width, top, left, block1.shape[2], SELU_LAMBDA if is_native else 1.0, SELU_ALPHA),
            *(block1.shape[0], quarter, 1 if is_whole else 4, _SAMPLES),
        )
        return out


@triton.jit
def deformed_taps_kernel(
    table, offsets, taps, height, width, limit, num_taps, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of CHANNELS per (pixel, tap): a bilinear sample, four rows weighted."""
    items = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = items < num_taps
    pixel = items // 9
    tap = items - pixel * 9
    row = pixel // width
    column = pixel - row * width
    dy = tl.load(offsets + items * 2, mask=exists, other=0.0)
    dx = tl.load(offsets + items * 2 + 1, mask=exists, other=0.0)
    dy = tl.minimum(tl.maximum(dy, -limit), limit)
    dx = tl.minimum(tl.maximum(dx, -limit), limit)
    y = (row + tap // 3 - 1).to(tl.float32) + dy
    x = (column + tap % 3 - 1).to(tl.float32) + dx
    # Far outside is as empty as just outside, and fits into an integer.
    y = tl.minimum(tl.maximum(y, -1.0), height * 1.0)
    x = tl.minimum(tl.maximum(x, -1.0), width * 1.0)
    top = tl.floor(y)
    left = tl.floor(x)
    below = y - top
    right = x - left
    channels = tl.arange(0, CHANNELS)
    total = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for corner in tl.static_range(4):
        corner_y = top.to(tl.int32) + corner // 2
        corner_x = left.to(tl.int32) + corner % 2
        weight_y = below if corner // 2 == 1 else 1.0 - below
        weight_x = right if corner % 2 == 1 else 1.0 - right
        inside = exists & (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
        first = (corner_y * width + corner_x) * CHANNELS
        values = tl.load(table + first[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
        total += (weight_y * weight_x)[:, None] * values
    tl.store(taps + items[:, None] * CHANNELS + channels[None, :], total, mask=exists[:, None])


@triton.jit
def local_maxima_kernel(scores, is_maximum, height, width, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """1 where nothing in the window around a pixel is larger."""
    pixels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pixels < height * width
    row = pixels // width
    column = pixels - row * width
    mine = tl.load(scores + pixels, mask=exists, other=0.0)
    largest = mine
    for step in tl.static_range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        y = row + step // (2 * RADIUS + 1) - RADIUS
        x = column + step % (2 * RADIUS + 1) - RADIUS
        inside = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        largest = tl.maximum(largest, tl.load(scores + y * width + x, mask=inside, other=float("-inf")))
    tl.store(is_maximum + pixels, (mine == largest).to(tl.uint8), mask=exists)


@triton.jit
def set_aside_kernel(scores, is_maximum, remaining, height, width, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """The scores, those in the window of a maximum replaced by zero."""
    pixels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pixels < height * width
    row = pixels // width
    column = pixels - row * width
    near = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        y = row + step // (2 * RADIUS + 1) - RADIUS
        x = column + step % (2 * RADIUS + 1) - RADIUS
        inside = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        near |= tl.load(is_maximum + y * width + x, mask=inside, other=0).to(tl.int32)
    mine = tl.load(scores + pixels, mask=exists, other=0.0)
    tl.store(remaining + pixels, tl.where(near > 0, 0.0, mine), mask=exists)


@triton.jit
def further_maxima_kernel(remaining, is_maximum, grown, height, width, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """The maxima so far, and those of what was not set aside."""
    pixels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pixels < height * width
    row = pixels // width
    column = pixels - row * width
    mine = tl.load(remaining + pixels, mask=exists, other=0.0)
    largest = mine
    near = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        y = row + step // (2 * RADIUS + 1) - RADIUS
        x = column + step % (2 * RADIUS + 1) - RADIUS
        inside = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        largest = tl.maximum(largest, tl.load(remaining + y * width + x, mask=inside, other=float("-inf")))
        near |= tl.load(is_maximum + y * width + x, mask=inside, other=0).to(tl.int32)
    before = tl.load(is_maximum + pixels, mask=exists, other=0).to(tl.int32)
    found = ((mine == largest) & (near == 0)).to(tl.int32)
    tl.store(grown + pixels, (before | found).to(tl.uint8), mask=exists)


@triton.jit
def upsampled(coarse, cells, weights, first, QUARTER: tl.constexpr, BLOCK: tl.constexpr):
    """One coarse branch at pixels: the weighted sum of the four cells around each."""
    quarter = tl.arange(0, QUARTER)
    total = tl.zeros((BLOCK, QUARTER), tl.float32)
    for tap in range(4):
        cell = tl.load(cells[0] + first + tap) + tl.load(cells[1] + first + tap)
        weight = tl.load(weights[0] + first + tap) * tl.load(weights[1] + first + tap)
        total += weight[:, None] * tl.load(coarse + cell[:, None] * QUARTER + quarter[None, :])
    return total


@triton.jit
def features_kernel(
    table,
    coarse,
    fine_weight,
    places,
    out,
    row_cells,
    row_weights,
    column_cells,
    column_weights,
    count,
    height,
    width,
    top,
    left,
    padded_width,
    gain,
    alpha,
    CHANNELS: tl.constexpr,
    QUARTER: tl.constexpr,
    CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The aggregated features of the pixels around a place, of unit length each, weighted: 4 x QUARTER numbers."""
    items = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = items < count
    x = tl.load(places + items, mask=exists, other=0.0)
    y = tl.load(places + count + items, mask=exists, other=0.0)
    first_x = tl.floor(x)
    first_y = tl.floor(y)
    quarter = tl.arange(0, QUARTER)
    total0 = tl.zeros((BLOCK, QUARTER), tl.float32)
    total1 = tl.zeros((BLOCK, QUARTER), tl.float32)
    total2 = tl.zeros((BLOCK, QUARTER), tl.float32)
    total3 = tl.zeros((BLOCK, QUARTER), tl.float32)
    for corner in tl.static_range(CORNERS):
        corner_y = first_y + corner // 2
        corner_x = first_x + corner % 2
        weight_y = (y - first_y) if corner // 2 == 1 else 1.0 - (y - first_y)
        weight_x = (x - first_x) if corner % 2 == 1 else 1.0 - (x - first_x)
        inside = exists & (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
        row = tl.where(inside, corner_y, 0.0).to(tl.int32)
        column = tl.where(inside, corner_x, 0.0).to(tl.int32)
        pixel = (row + top) * padded_width + column + left
        fine = tl.zeros((BLOCK, QUARTER), tl.float32)
        for channel in range(CHANNELS):
            value = tl.load(table + pixel * CHANNELS + channel, mask=exists, other=0.0)
            fine += value[:, None] * tl.load(fine_weight + channel * QUARTER + quarter)[None, :]
        fine = gain * tl.where(fine > 0, fine, alpha * (tl.exp(tl.minimum(fine, 0.0)) - 1.0))
        cells = (row_cells + row * 12, column_cells + column * 12)
        weights = (row_weights + row * 12, column_weights + column * 12)
        branch1 = upsampled(coarse, cells, weights, 0, QUARTER, BLOCK)
        branch2 = upsampled(coarse, cells, weights, 4, QUARTER, BLOCK)
        branch3 = upsampled(coarse, cells, weights, 8, QUARTER, BLOCK)
        square = tl.sum(fine * fine + branch1 * branch1 + branch2 * branch2 + branch3 * branch3, axis=1)
        scale = tl.where(inside, weight_y * weight_x, 0.0) / tl.maximum(tl.sqrt(square), 1e-12)
        total0 += scale[:, None] * fine
        total1 += scale[:, None] * branch1
        total2 += scale[:, None] * branch2
        total3 += scale[:, None] * branch3
    row_out = out + items[:, None] * (4 * QUARTER) + quarter[None, :]
    tl.store(row_out, total0, mask=exists[:, None])
    tl.store(row_out + QUARTER, total1, mask=exists[:, None])
    tl.store(row_out + 2 * QUARTER, total2, mask=exists[:, None])
    tl.store(row_out + 3 * QUARTER, total3, mask=exists[:, None])
