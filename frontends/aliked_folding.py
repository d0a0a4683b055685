"""Layers of ALIKED for inference: batch norms, shifts and SELU constants folded into the weights of convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from frontends.aliked_layout import Layout
from frontends.aliked_network import DeformableConv2d, max_offset_px
from frontends.aliked_sampling import as_map, as_table, weighted_rows

SELU_ALPHA = 1.6732632423543772  # Klambauer et al. 2017, equation 2
SELU_LAMBDA = 1.0507009873554805
_EXPONENTIAL_GAIN = SELU_ALPHA * math.exp(SELU_ALPHA)
CHUNK_VALUES = 262_144  # values that several passes over them keep in a second-level cache
CHUNK_PIXELS = 1024  # whose nine taps fit there too


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

    def __call__(self, x: Tensor, *, is_shifted: bool = True) -> Tensor:
        """Overwrites x, contiguous or channels-last, and returns it. `is_shifted` is False where it had no bias."""
        if self.input_shift == 0.0:
            return functional.selu(x, inplace=True)
        flat = _flat(x)
        for first in range(0, flat.numel(), CHUNK_VALUES):
            values = flat[first : first + CHUNK_VALUES]
            if not is_shifted:
                values.sub_(SELU_ALPHA)
            exponential = values.clamp(max=-SELU_ALPHA).exp_()
            values.clamp_(min=-SELU_ALPHA).add_(exponential, alpha=_EXPONENTIAL_GAIN)
        return x


def _flat(x: Tensor) -> Tensor:
    """All values of a contiguous or channels-last tensor as a view in the order of its memory."""
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).view(-1)


class FoldedConv2d(nn.Module):
    """A 3x3 convolution with its batch norm and the constants of the SELUs before and after it in its weights.

    With few output channels most lanes of the CPU's vectors would be idle. So `run` neighbouring pixels are computed
    as if they were channels, by a kernel wide enough for all of them that moves on by `run` px; the memory of such a
    channels-last output is that of the plain one.
    """

    weight: Tensor
    bias: Tensor
    is_planar = False

    def __init__(
        self, conv: nn.Conv2d, *, gain: float, shift: float, norm: nn.BatchNorm2d | None = None, run: int = 1
    ) -> None:
        super().__init__()
        fused = conv if norm is None else fuse_conv_bn_eval(conv, norm)
        bias = torch.zeros(fused.out_channels) if fused.bias is None else fused.bias.detach()
        weight = fused.weight.detach() * gain
        shifted = [functional.pad(weight, (pixel, run - 1 - pixel)) for pixel in range(run)]
        self.run = run
        self.register_buffer("weight", torch.cat(shifted).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", (bias + shift).repeat(run))

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last (B, C, H, W) -> channels-last (B, D, H, W), with W a multiple of `run`."""
        weight = self.weight
        if self.is_planar:
            x, weight = x.contiguous(), weight.contiguous()
        out = convolve(x, weight, self.bias, stride=(1, self.run)).contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        return out.permute(0, 2, 3, 1).view(batch, height, width, -1).permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
    """A convolution with padding 1, by oneDNN on the CPU where there is one.

    PyTorch's own choice on a single thread is a slower one, which unfolds the input.
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.mkldnn_convolution(x, weight, bias, (1, 1), stride, (1, 1), 1)
    return functional.conv2d(x, weight, bias, stride=stride, padding=1)


class FoldedLinear(nn.Module):
    """A convolution over a table of pixels or patches (N, C) -> (N, D), constants folded likewise."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gain: float = 1.0, shift: float = 0.0) -> None:
        """weight (D, C, h, w); patches are tables of their h w pixels in order, each with its C channels."""
        super().__init__()
        self.register_buffer("weight", (weight.detach().permute(2, 3, 1, 0).flatten(0, 2) * gain).contiguous())
        has_bias = bias is not None or shift != 0.0
        constant = torch.zeros(weight.shape[0]) if bias is None else bias.detach()
        self.register_buffer("bias", constant + shift if has_bias else None)

    def forward(self, table: Tensor) -> Tensor:
        # Adding the bias afterwards is faster than addmm, which first fills its output with it.
        out = torch.mm(table, self.weight)
        return out if self.bias is None else out.add_(self.bias)


class Kernels(Protocol):
    """Kernels of our own for single images, in the place of PyTorch's operations; see `aliked_kernels`."""

    def deformed_taps(self, x: Tensor, offsets: Tensor, limit: float) -> Tensor: ...

    def suppress(self, score_map: Tensor, num_rounds: int) -> Tensor: ...

    def features(
        self, block1: Tensor, coarse: Tensor, layout: Layout, fine_weight: Tensor, places: Tensor, is_native: bool
    ) -> Tensor: ...


class FoldedDeformableConv2d(nn.Module):
    """A deformable convolution with its batch norm: one gather of all taps, one matrix product."""

    kernels: Kernels | None = None

    def __init__(self, conv: DeformableConv2d, *, gain: float, shift: float, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.offset_conv = FoldedConv2d(conv.offset_conv, gain=gain, shift=0.0)
        fused = fuse_conv_bn_eval(conv.regular_conv, norm)
        self.product = FoldedLinear(fused.weight, fused.bias, gain=gain, shift=shift)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last (B, C, H, W) -> channels-last (B, D, H, W)."""
        batch, channels, height, width = x.shape
        limit = max_offset_px(height, width)
        offsets = as_table(self.offset_conv(x))
        if self.kernels is not None:
            return as_map(self.product(self.kernels.deformed_taps(x, offsets, limit)), x.shape)
        offsets = offsets.clamp_(-limit, limit).view(batch, height, width, 9, 2)
        steps = torch.arange(-1.0, 2.0, device=x.device)
        y = torch.arange(height, device=x.device).view(-1, 1, 1) + steps.repeat_interleave(3)
        columns = torch.arange(width, device=x.device).view(-1, 1) + steps.repeat(3)
        # A border of zeros stands for all that lies outside the map: one row before, two behind the last one.
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2, 1, 2))
        cells, weights = _padded_cells(
            (offsets[..., 0] + y).clamp_(-1, height), (offsets[..., 1] + columns).clamp_(-1, width), padded.shape[2]
        )
        if batch > 1:
            first_cell = torch.arange(batch, device=x.device, dtype=cells.dtype) * (padded.shape[1] * padded.shape[2])
            cells = cells + first_cell.view(-1, 1, 1, 1, 1)
        table, chunk = padded.flatten(0, 2), 9 * CHUNK_PIXELS if x.device.type == "cpu" else cells.numel()
        chunks = zip(torch.split(cells.view(-1, 4), chunk), torch.split(weights.view(-1, 4), chunk), strict=True)
        parts = [self.product(weighted_rows(table, *some).view(-1, 9 * channels)) for some in chunks]
        return as_map(torch.cat(parts), x.shape)


def _padded_cells(y: Tensor, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Flat indices and weights (..., 4) of the cells around places (y, x) px of a map with one row and column before.

    y and x are at least -1; `width` is that of the padded map.
    """
    top, left = y.floor(), x.floor()
    fraction_y, fraction_x = y.sub_(top), x.sub_(left)
    first = ((top + 1) * width + (left + 1)).int()
    cells = torch.stack((first, first + 1, first + width, first + (width + 1)), dim=-1)
    both = fraction_y * fraction_x
    only_y, only_x = fraction_y - both, fraction_x - both
    weights = torch.stack((1 - fraction_y - only_x, only_x, only_y, both), dim=-1)
    return cells, weights
