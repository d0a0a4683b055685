"""Layers of ALIKED for inference: batch norms, shifts and SELU constants folded into the weights of convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from frontends.aliked_network import ConvBlock, DeformableConv2d, ResidualBlock, max_offset_px
from frontends.aliked_sampling import as_table, cross_indices, cross_weights, weighted_rows, zero_padded_taps

SELU_ALPHA = 1.6732632423543772  # Klambauer et al. 2017, equation 2
SELU_LAMBDA = 1.0507009873554805
STRIP_VALUES = 131_072  # values that two passes over them keep in a second-level cache


@dataclass(frozen=True, slots=True)
class FoldedSelu:
    """SELU whose constants are partly moved into the weights around it, so that it takes few cheap passes.

    The convolution before it adds `input_shift` to its bias; the one after it multiplies its weights by `gain`.

    On the CPU the native operator costs as much as a convolution, because of its expm1. With z = x - alpha as its
    input, elu(x) = max(z, -alpha) + alpha e^alpha exp(min(z, -alpha)), which is four passes of vector instructions.
    Elsewhere the native operator is one kernel, and nothing is moved.
    """

    input_shift: float
    gain: float

    @staticmethod
    def for_device(device: torch.device) -> FoldedSelu:
        return FoldedSelu(-SELU_ALPHA, SELU_LAMBDA) if device.type == "cpu" else FoldedSelu(0.0, 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Overwrites x, contiguous or channels-last, and returns it."""
        if self.input_shift == 0.0:
            return functional.selu(x, inplace=True)
        dense = x if x.is_contiguous() else x.permute(0, 2, 3, 1)
        for strip in torch.split(dense.view(-1), STRIP_VALUES):
            exponential = strip.clamp(max=-SELU_ALPHA).exp_()
            strip.clamp_(min=-SELU_ALPHA).add_(exponential, alpha=SELU_ALPHA * math.exp(SELU_ALPHA))
        return x


class FoldedConv2d(nn.Module):
    """A convolution with its batch norm and the constants of the SELUs before and after it in its weights."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, *, gain: float, shift: float, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        fused = conv if norm is None else fuse_conv_bn_eval(conv, norm)
        bias = torch.zeros(fused.out_channels) if fused.bias is None else fused.bias.detach()
        self.padding = fused.kernel_size[0] // 2
        weight = (fused.weight.detach() * gain).contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias + shift)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last in, channels-last out."""
        out = functional.conv2d(x, self.weight, self.bias, padding=self.padding)
        return out.contiguous(memory_format=torch.channels_last)


class FoldedLinear(nn.Module):
    """A 1x1 convolution as a matrix product over a table of pixels (N, C) -> (N, D), constants folded likewise."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gain: float = 1.0, shift: float = 0.0) -> None:
        """weight (D, C, ...), with trailing axes of any size for kernels that take whole patches, pixels first."""
        super().__init__()
        matrix = weight.detach().flatten(2).permute(2, 1, 0).flatten(0, 1) if weight.ndim > 2 else weight.detach().t()
        self.register_buffer("weight", (matrix * gain).contiguous())
        self.register_buffer("bias", (torch.zeros(weight.shape[0]) if bias is None else bias.detach()) + shift)

    def forward(self, table: Tensor) -> Tensor:
        return torch.addmm(self.bias, table, self.weight)


class FoldedDeformableConv2d(nn.Module):
    """A deformable convolution with its batch norm: one gather of all taps, one matrix product."""

    def __init__(self, conv: DeformableConv2d, *, gain: float, shift: float, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.offset_conv = FoldedConv2d(conv.offset_conv, gain=gain, shift=0.0)
        fused = fuse_conv_bn_eval(conv.regular_conv, norm)
        self.product = FoldedLinear(fused.weight, fused.bias, gain=gain, shift=shift)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last in, channels-last out."""
        batch, channels, height, width = x.shape
        limit = max_offset_px(height, width)
        offsets = self.offset_conv(x).contiguous().clamp_(-limit, limit).view(batch, 9, 2, height, width)
        steps = torch.arange(-1.0, 2.0, device=x.device)
        y = torch.arange(height, device=x.device).view(-1, 1) + steps.repeat_interleave(3).view(-1, 1, 1)
        columns_x = torch.arange(width, device=x.device) + steps.repeat(3).view(-1, 1, 1)
        rows = zero_padded_taps(offsets[:, :, 0] + y, height)
        columns = zero_padded_taps(offsets[:, :, 1] + columns_x, width)
        first_row = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * height
        indices = cross_indices(rows.indices + first_row, columns.indices, width)
        weights = cross_weights(rows.weights, columns.weights)
        # (4 cells, B, 9 taps, H, W) -> a row of 4 cells for each tap of each pixel
        indices, weights = (cells.permute(1, 3, 4, 2, 0).reshape(-1, 4) for cells in (indices, weights))
        out: Tensor = self.product(weighted_rows(as_table(x), indices, weights).view(-1, 9 * channels))
        return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


class FoldedConvBlock(nn.Module):
    def __init__(self, block: ConvBlock, selu: FoldedSelu) -> None:
        super().__init__()
        self.selu = selu
        self.conv1 = FoldedConv2d(block.conv1, gain=1.0, shift=selu.input_shift, norm=block.bn1)
        self.conv2 = FoldedConv2d(block.conv2, gain=selu.gain, shift=selu.input_shift, norm=block.bn2)

    def forward(self, x: Tensor) -> Tensor:
        return self.selu(self.conv2(self.selu(self.conv1(x))))


class FoldedResidualBlock(nn.Module):
    def __init__(self, block: ResidualBlock, selu: FoldedSelu) -> None:
        super().__init__()
        self.selu = selu
        self.conv1 = fold(block.conv1, block.bn1, selu)
        self.conv2 = fold(block.conv2, block.bn2, selu)
        shortcut = block.downsample
        self.shortcut = FoldedLinear(shortcut.weight, shortcut.bias, gain=selu.gain)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.selu(self.conv1(x)))
        as_table(out).add_(self.shortcut.bias).addmm_(as_table(x), self.shortcut.weight)
        return self.selu(out)


def fold(conv: nn.Module, norm: nn.BatchNorm2d, selu: FoldedSelu) -> nn.Module:
    if isinstance(conv, DeformableConv2d):
        return FoldedDeformableConv2d(conv, gain=selu.gain, shift=selu.input_shift, norm=norm)
    if isinstance(conv, nn.Conv2d):
        return FoldedConv2d(conv, gain=selu.gain, shift=selu.input_shift, norm=norm)
    raise TypeError(f"conv: expected a convolution, got {type(conv).__name__}")
