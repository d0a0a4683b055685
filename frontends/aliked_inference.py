"""ALIKED for inference: the results of the plain network without its full-resolution feature map.

Two facts make that possible. Bilinear upsampling is linear over pixels and a 1x1 convolution over channels, so they
commute: the head of the score branch is applied to each branch at its own resolution, and only its 8 channels are
upsampled. And the descriptor head reads the map at a few places around every keypoint only; there it is rebuilt from
the branches, norm included (aliked_descriptors.py).

On the CPU memory is the limit, not arithmetic: what runs at high resolution runs strip by strip of rows that stay in
the cache, and what outlives a strip is written to memory that is kept from frame to frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontends.aliked_descriptors import FoldedDescriptorHead, PyramidSampler
from frontends.aliked_folding import (
    FoldedConv2d,
    FoldedDeformableConv2d,
    FoldedLinear,
    FoldedSelu,
    StreamedConv2d,
)
from frontends.aliked_network import AlikedArchitecture, AlikedNetwork, DeformableConv2d, ResidualBlock
from frontends.aliked_sampling import as_map, as_table, weighted_rows
from frontends.aliked_workspace import SCORE_LAG, RowMixing, Workspace, create_workspace, strips


class AlikedInference(nn.Module):
    """The network for inference, its weights folded for one device."""

    def __init__(self, network: AlikedNetwork, architecture: AlikedArchitecture, device: torch.device) -> None:
        super().__init__()
        selu = FoldedSelu.for_device(device)
        gain, shift = selu.gain, selu.input_shift
        self.architecture, self.device, self.selu = architecture, device, selu
        self.block1_conv1 = FoldedConv2d(network.block1.conv1, gain=1.0, shift=shift, norm=network.block1.bn1)
        self.block1_conv2 = FoldedConv2d(network.block1.conv2, gain=gain, shift=shift, norm=network.block1.bn2)
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
        score_convs = [FoldedConv2d(conv, gain=gain, shift=shift) for conv in middle]
        self.score_convs = nn.ModuleList([*score_convs, FoldedConv2d(last, gain=gain, shift=0.0)])
        self.head = FoldedDescriptorHead(network.desc_head, selu)
        self.to(device)

    def create_workspace(self, batch: int, height: int, width: int) -> Workspace:
        """Workspace for `batch` images of height x width px, at least STRIDE px each."""
        return create_workspace(self.architecture, batch, height, width, self.device)

    def forward(self, images: Tensor, workspace: Workspace) -> Tensor:
        """Score map (B, 1, H, W) in (0, 1) of images (B, 3, H, W) RGB, uint8 or float in [0, 1].

        The workspace, made for this size, then holds what `describe` needs; its next use overwrites both.
        """
        load_images(images, workspace)
        self._encode_block1(workspace)
        pooled2, logits2 = self._encode_block2(workspace)
        x3 = self.block3(pooled2)
        x4 = self.block4(functional.avg_pool2d(x3, 4))
        first_cell = workspace.coarse_sizes[0][0] * workspace.coarse_sizes[0][1]
        coarse_logits = [logits2]
        for x, branch, head in zip((x3, x4), self.coarse_branches[1:], self.coarse_logits[1:], strict=True):
            last_cell = first_cell + x.shape[2] * x.shape[3]
            table = branch(as_table(x)).view(len(images), last_cell - first_cell, -1)
            table = self.selu(table, out=workspace.coarse[:, first_cell:last_cell], is_shifted=False)
            coarse_logits.append(as_map(head(table.flatten(0, 1)), x.shape))
            first_cell = last_cell
        self._score(coarse_logits, workspace)
        (left, top), (height, width) = workspace.origin, workspace.size
        return workspace.scores[:, :, top : top + height, left : left + width]

    def _encode_block1(self, workspace: Workspace) -> None:
        conv1, conv2 = StreamedConv2d(self.block1_conv1, None), StreamedConv2d(self.block1_conv2, self.selu)
        height, done = workspace.images.shape[2], 0
        for start, end in strips(height, workspace.strip_rows, lag=2):
            x = conv1(workspace.images[:, :, start:end], is_last=end == height)
            x = conv2(x, is_last=end == height)
            stop = done + x.shape[2]
            x = self.selu(x, out=workspace.block1[:, :, done:stop])
            pool_by_two(x, out=workspace.pooled1[:, :, done // 2 : stop // 2])
            done = stop

    def _encode_block2(self, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """The pooled output (B, c2, H'/8, W'/8) of the block, and its logits (B, 8, H'/2, W'/2)."""
        conv1, conv2 = StreamedConv2d(self.block2.conv1, None), StreamedConv2d(self.block2.conv2, self.selu)
        branch, head = self.coarse_branches[0], self.coarse_logits[0]
        pooled1 = workspace.pooled1
        (batch, _, height, width), done = pooled1.shape, 0
        pooled2, logits = [], []
        for start, end in strips(height, workspace.strip_rows, lag=2):
            x = conv1(pooled1[:, :, start:end], is_last=end == height)
            x = conv2(x, is_last=end == height)
            stop = done + x.shape[2]
            x = self.selu(self.block2.add_shortcut(x, pooled1[:, :, done:stop]))
            pooled2.append(functional.avg_pool2d(x, 4))
            table = branch(as_table(x)).view(batch, (stop - done) * width, -1)
            table = self.selu(table, out=workspace.coarse[:, done * width : stop * width], is_shifted=False)
            logits.append(as_map(head(table.flatten(0, 1)), x.shape))
            done = stop
        return torch.cat(pooled2, dim=2), torch.cat(logits, dim=2)

    def _score(self, coarse_logits: list[Tensor], workspace: Workspace) -> None:
        convs = [StreamedConv2d(conv, self.selu) for conv in self.score_convs]
        block1 = workspace.block1
        height, done = block1.shape[2], 0
        pairs = zip(strips(height, workspace.strip_rows, SCORE_LAG), workspace.row_mixing, strict=True)
        for (start, end), mixing in pairs:
            rows = block1[:, :, start:end]
            logits = mix_rows(coarse_logits, mixing, block1.shape[3])
            logits += self.fine_logits(self.selu(self.fine_branch(as_table(rows)), is_shifted=False))
            x = as_map(logits, rows.shape)
            for conv in convs:
                x = conv(x, is_last=end == height)
            stop = done + x.shape[2]
            torch.sigmoid(x, out=workspace.scores[:, :, done:stop])
            done = stop

    def describe(self, workspace: Workspace, keypoints: Tensor) -> Tensor:
        """Descriptors (B, K, D) of unit length at keypoints (B, K, 2) px of the images last given to `forward`."""
        samplers = (PyramidSampler(workspace, image, self.fine_branch, self.selu) for image in range(len(keypoints)))
        pairs = zip(samplers, keypoints, strict=True)
        return torch.stack([self.head(sampler, points, *workspace.size) for sampler, points in pairs])


class FoldedResidualBlock(nn.Module):
    """A residual block; where it runs strip by strip, its parts are called one by one."""

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
        return self.selu(self.add_shortcut(self.conv2(self.selu(self.conv1(x))), x))

    def add_shortcut(self, out: Tensor, x: Tensor) -> Tensor:
        return out.add_(as_map(self.shortcut(as_table(x)), out.shape))


def fold(conv: nn.Module, norm: nn.BatchNorm2d, *, gain: float, shift: float) -> nn.Module:
    """A convolution, deformable or not, with its batch norm and constants."""
    if isinstance(conv, DeformableConv2d):
        return FoldedDeformableConv2d(conv, gain=gain, shift=shift, norm=norm)
    if isinstance(conv, nn.Conv2d):
        return FoldedConv2d(conv, gain=gain, shift=shift, norm=norm)
    raise TypeError(f"conv: expected a convolution, got {type(conv).__name__}")


def pool_by_two(x: Tensor, out: Tensor) -> None:
    """Sums over 2x2 px of x (B, C, H, W), channels-last, into out (B, C, H/2, W/2)."""
    rows = x[:, :, ::2] + x[:, :, 1::2]
    torch.add(rows[..., ::2], rows[..., 1::2], out=out)


def load_images(images: Tensor, workspace: Workspace) -> None:
    """Copy images (B, 3, H, W), uint8 or float in [0, 1], into the workspace and repeat their border pixels around."""
    padded, (left, top), (height, width) = workspace.images, workspace.origin, workspace.size
    if images.shape != (len(padded), 3, height, width):
        raise ValueError(f"images: expected {(len(padded), 3, height, width)}, got {tuple(images.shape)}")
    bottom, right = top + height, left + width
    inside = padded[:, :, top:bottom, left:right]
    inside.copy_(images)
    if images.dtype == torch.uint8:
        inside.div_(255)
    padded[:, :, top:bottom, :left] = padded[:, :, top:bottom, left : left + 1]
    padded[:, :, top:bottom, right:] = padded[:, :, top:bottom, right - 1 : right]
    padded[:, :, :top] = padded[:, :, top : top + 1]
    padded[:, :, bottom:] = padded[:, :, bottom - 1 : bottom]


def mix_rows(coarse_logits: list[Tensor], mixing: RowMixing, width: int) -> Tensor:
    """Sum of the upsampled coarse logits on the rows of a strip, (B R width, 8).

    Columns are upsampled branch by branch, on the rows needed; the rows then all at once, as weighted sums of rows.
    """
    rows = []
    for logits, (first, last) in zip(coarse_logits, mixing.windows, strict=True):
        window = logits[:, :, first:last]
        window = functional.interpolate(window, (last - first, width), mode="bilinear", align_corners=True)
        rows.append(window.permute(0, 2, 3, 1).flatten(2))
    mixed = weighted_rows(torch.cat(rows, dim=1).flatten(0, 1), mixing.indices, mixing.weights)
    return mixed.view(-1, coarse_logits[0].shape[1])
