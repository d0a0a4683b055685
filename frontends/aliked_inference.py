"""ALIKED for inference: the results of the plain network without its full-resolution feature map.

Two facts make that possible. Bilinear upsampling is linear over pixels and a 1x1 convolution over channels, so they
commute: the head of the score branch is applied to each branch at its own resolution, and only its 8 channels are
upsampled. And the descriptor head reads the map at a few places around every keypoint only; there it is rebuilt from
the branches, norm included (aliked_descriptors.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontends.aliked_descriptors import FoldedDescriptorHead, KernelSampler, PyramidSampler
from frontends.aliked_folding import (
    CHUNK_VALUES,
    FoldedConv2d,
    FoldedDeformableConv2d,
    FoldedLinear,
    FoldedSelu,
    Kernels,
)
from frontends.aliked_layout import Layout, create_layout
from frontends.aliked_network import BLOCK_STRIDES, AlikedNetwork, DeformableConv2d, ResidualBlock
from frontends.aliked_sampling import as_map, as_table, weighted_rows

_VECTOR_LANES = 16  # float32 values in a vector of the CPU
_HEAP_BYTES = 31 << 20  # just below the most that glibc's allocator adapts to


@dataclass(frozen=True, slots=True, eq=False)
class Pyramid:
    """What is known of images before aggregation: every branch at its own resolution.

    score_map   (B, 1, H, W) in (0, 1).
    block1      (B, c1, H', W'), channels-last; the finest branch is evaluated where it is read.
    coarse      (B, cells, D/4), the coarse tables of the layout.
    """

    score_map: Tensor
    block1: Tensor
    coarse: Tensor
    layout: Layout


class AlikedInference(nn.Module):
    """The network for inference, its weights folded for one device."""

    kernels: Kernels | None = None

    def __init__(self, network: AlikedNetwork, device: torch.device) -> None:
        super().__init__()
        selu = FoldedSelu.for_device(device)
        gain, shift = selu.gain, selu.input_shift
        self.device, self.selu = device, selu
        block1 = network.block1
        run = run_of(block1.conv1, device)
        self.block1_conv1 = FoldedConv2d(block1.conv1, gain=1.0, shift=shift, norm=block1.bn1, run=run)
        self.block1_conv2 = FoldedConv2d(block1.conv2, gain=gain, shift=shift, norm=block1.bn2, run=run)
        self.block2 = FoldedResidualBlock(network.block2, selu, input_gain=0.25)  # of sums over four pixels
        self.block3 = FoldedResidualBlock(network.block3, selu)
        self.block4 = FoldedResidualBlock(network.block4, selu)
        self.fine_branch = FoldedLinear(network.conv1.weight, gain=gain)
        convs = (network.conv2, network.conv3, network.conv4)
        self.coarse_branches = nn.ModuleList([FoldedLinear(conv.weight, gain=gain) for conv in convs])
        first, *middle, last = (layer for layer in network.score_head if isinstance(layer, nn.Conv2d))
        fine, *coarse = first.weight.chunk(4, dim=1)
        self.fine_logits = FoldedLinear(fine, gain=gain)
        # Upsampling keeps constants, so that the coarsest logits can carry the shift of the sum of all four.
        parts = zip(coarse, (0.0, 0.0, shift), strict=True)
        self.coarse_logits = nn.ModuleList([FoldedLinear(part, gain=gain, shift=own) for part, own in parts])
        score_convs = [FoldedConv2d(conv, gain=gain, shift=shift, run=run_of(conv, device)) for conv in middle]
        self.score_convs = nn.ModuleList(score_convs)
        self.score_last = FoldedConv2d(last, gain=gain, shift=0.0, run=run_of(last, device))
        self.head = FoldedDescriptorHead(network.desc_head, selu)
        self.to(device)
        if device.type == "cpu":
            keep_freed_memory()

    def create_layout(self, height: int, width: int) -> Layout:
        """Layout for images of height x width px, at least STRIDE px each."""
        return create_layout(height, width, self.device)

    def forward(self, images: Tensor, layout: Layout) -> Pyramid:
        """Pyramid of images (B, 3, H, W) RGB, uint8 or float in [0, 1], of the size that the layout was made for."""
        x1 = self.selu(self.block1_conv1(pad_images(images, layout)))
        x1 = self.selu(self.block1_conv2(x1))
        x2 = self.block2(sum_two_by_two(x1))
        x3 = self.block3(functional.avg_pool2d(x2, 4))
        x4 = self.block4(functional.avg_pool2d(x3, 4))
        tables = []
        for x, branch in zip((x2, x3, x4), self.coarse_branches, strict=True):
            table: Tensor = self.selu(branch(as_table(x)), is_shifted=False)
            tables.append(table.view(len(images), -1, table.shape[1]))
        scores = self._score(x1, tables, layout)
        (left, top), (height, width) = layout.origin, layout.size
        score_map = scores[:, :, top : top + height, left : left + width]
        return Pyramid(score_map, x1, torch.cat(tables, dim=1), layout)

    def _score(self, x1: Tensor, tables: list[Tensor], layout: Layout) -> Tensor:
        pixels, logits = as_table(x1), self._coarse_logits(tables, layout, x1.shape[3])
        chunk = CHUNK_VALUES // self.fine_branch.weight.shape[1] if x1.device.type == "cpu" else len(pixels)
        for first in range(0, len(pixels), chunk):
            fine = self.selu(self.fine_branch(pixels[first : first + chunk]), is_shifted=False)
            some_logits = logits[first : first + chunk]
            some_logits += self.fine_logits(fine)
            self.selu(some_logits)
        x = as_map(logits, x1.shape)
        for conv in self.score_convs:
            x = self.selu(conv(x))
        scores: Tensor = self.score_last(x)
        return scores.sigmoid_()

    def _coarse_logits(self, tables: list[Tensor], layout: Layout, width: int) -> Tensor:
        """Sum of the upsampled logits of the coarse branches, (B H' W', 8), with width = W'.

        Columns are upsampled branch by branch; all rows then at once, as weighted sums of rows.
        """
        rows = []
        for table, head, (coarse_height, coarse_width) in zip(
            tables, self.coarse_logits, layout.coarse_sizes, strict=True
        ):
            logits = head(table.flatten(0, 1)).view(len(table), coarse_height, coarse_width, -1).permute(0, 3, 1, 2)
            logits = functional.interpolate(logits, (coarse_height, width), mode="bilinear", align_corners=True)
            rows.append(logits.permute(0, 2, 3, 1).flatten(2))
        all_rows = torch.cat(rows, dim=1)
        batch, num_rows = all_rows.shape[:2]
        first_row = torch.arange(batch, device=all_rows.device).view(-1, 1, 1) * num_rows
        indices = (layout.mixing_rows + first_row).flatten(0, 1)
        mixed = weighted_rows(all_rows.flatten(0, 1), indices, layout.mixing_weights.repeat(batch, 1))
        return mixed.view(-1, mixed.shape[1] // width)

    def describe(self, pyramid: Pyramid, keypoints: Tensor) -> Tensor:
        """Descriptors (B, K, D) of unit length at keypoints (B, K, 2) px."""
        samplers = (
            self._sampler(block1, coarse, pyramid.layout)
            for block1, coarse in zip(pyramid.block1, pyramid.coarse, strict=True)
        )
        pairs = zip(samplers, keypoints, strict=True)
        return torch.stack([self.head(sampler, points, *pyramid.layout.size) for sampler, points in pairs])

    def _sampler(self, block1: Tensor, coarse: Tensor, layout: Layout) -> PyramidSampler | KernelSampler:
        if self.kernels is None:
            return PyramidSampler(block1, coarse, layout, self.fine_branch, self.selu)
        return KernelSampler(block1, coarse, layout, self.fine_branch, self.selu, self.kernels)

    @contextmanager
    def using(self, kernels: Kernels | None, *, is_planar: bool = False) -> Iterator[None]:
        """Inside, kernels of our own take the place of PyTorch's operations, unless they are None.

        is_planar  convolutions get their maps channel by channel, which costs copies and may still be faster.
        """
        users: list[Any] = [self, *(module for module in self.modules() if isinstance(module, FoldedDeformableConv2d))]
        convolutions = [module for module in self.modules() if isinstance(module, FoldedConv2d)]
        before = self.kernels
        _set(users, "kernels", kernels)
        _set(convolutions, "is_planar", is_planar)
        try:
            yield
        finally:
            _set(users, "kernels", before)
            _set(convolutions, "is_planar", False)


def _set(modules: Sequence[Any], name: str, value: object) -> None:
    for module in modules:
        setattr(module, name, value)


class FoldedResidualBlock(nn.Module):
    """Two 3x3 convolutions, deformable or not, beside a 1x1 shortcut."""

    def __init__(self, block: ResidualBlock, selu: FoldedSelu, input_gain: float = 1.0) -> None:
        """`input_gain` is what the input has to be multiplied with."""
        super().__init__()
        gain, shift = selu.gain, selu.input_shift
        self.selu = selu
        self.conv1 = fold(block.conv1, block.bn1, gain=gain * input_gain, shift=shift)
        self.conv2 = fold(block.conv2, block.bn2, gain=gain, shift=shift)
        shortcut = block.downsample
        self.shortcut = FoldedLinear(shortcut.weight, shortcut.bias, gain=gain * input_gain)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last in, channels-last out."""
        out: Tensor = self.conv2(self.selu(self.conv1(x)))
        return self.selu(out.add_(as_map(self.shortcut(as_table(x)), out.shape)))


def fold(conv: nn.Module, norm: nn.BatchNorm2d, *, gain: float, shift: float) -> nn.Module:
    """A convolution, deformable or not, with its batch norm and constants."""
    if isinstance(conv, DeformableConv2d):
        return FoldedDeformableConv2d(conv, gain=gain, shift=shift, norm=norm)
    if isinstance(conv, nn.Conv2d):
        return FoldedConv2d(conv, gain=gain, shift=shift, norm=norm)
    raise TypeError(f"conv: expected a convolution, got {type(conv).__name__}")


def run_of(conv: nn.Conv2d, device: torch.device) -> int:
    """Pixels that a full-resolution convolution on the device computes at a time; divides STRIDE."""
    return max(1, _VECTOR_LANES // conv.out_channels) if device.type == "cpu" else 1


def sum_two_by_two(x: Tensor) -> Tensor:
    """Sums over 2x2 px of x (B, C, H, W), channels-last: (B, C, H/2, W/2). Twice as fast as average pooling."""
    rows = x[:, :, ::2] + x[:, :, 1::2]
    return rows[..., ::2] + rows[..., 1::2]


def pad_images(images: Tensor, layout: Layout) -> Tensor:
    """Images (B, 3, H, W), uint8 or float in [0, 1], as float32, their border repeated: (B, 3, H', W'), channels-last.

    Raises ValueError when they have another size than the layout.
    """
    (left, top), (height, width) = layout.origin, layout.size
    if images.shape[1:] != (3, height, width):
        raise ValueError(f"images: expected (B, 3, {height}, {width}), got {tuple(images.shape)}")
    rows, columns = (BLOCK_STRIDES[1] * side for side in layout.coarse_sizes[0])
    padded = torch.empty((len(images), 3, rows, columns), device=images.device, memory_format=torch.channels_last)
    bottom, right = top + height, left + width
    inside = padded[:, :, top:bottom, left:right]
    inside.copy_(images)
    if images.dtype == torch.uint8:
        inside.div_(255)
    padded[:, :, top:bottom, :left] = padded[:, :, top:bottom, left : left + 1]
    padded[:, :, top:bottom, right:] = padded[:, :, top:bottom, right - 1 : right]
    padded[:, :, :top] = padded[:, :, top : top + 1]
    padded[:, :, bottom:] = padded[:, :, bottom - 1 : bottom]
    return padded


def keep_freed_memory() -> None:
    """Make the C allocator keep some tens of megabytes that are freed, where it is glibc's.

    It gives large blocks back to the system at once, until it sees one as large as this freed. Without that, the
    temporaries of every frame are mapped and zeroed anew: thousands of page faults, a fifth of the time of a frame.
    """
    block = torch.empty(_HEAP_BYTES, dtype=torch.uint8)
    del block
