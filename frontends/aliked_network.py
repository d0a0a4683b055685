"""ALIKED as published, in plain PyTorch: what training differentiates and what the fast formulation is tested against.

Zhao et al., "ALIKED: A Lighter Keypoint and Descriptor Extraction Network via Deformable Transformation",
IEEE TIM 2023, arXiv 2304.03608. Module names follow the keys of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontends.base import WeightsError

STRIDE = 32  # of the deepest block: the network wants sides that are multiples of it
BLOCK_STRIDES = (1, 2, 8, 32)


@dataclass(frozen=True, slots=True)
class AlikedArchitecture:
    """Widths of one published variant (section III, table II of the paper)."""

    channels: tuple[int, int, int, int]
    num_samples: int

    @property
    def descriptor_dim(self) -> int:
        return self.channels[3]


ARCHITECTURES: Mapping[str, AlikedArchitecture] = {
    "t16": AlikedArchitecture((8, 16, 32, 64), 16),
    "n16": AlikedArchitecture((16, 32, 64, 128), 16),
    "n16rot": AlikedArchitecture((16, 32, 64, 128), 16),
    "n32": AlikedArchitecture((16, 32, 64, 128), 32),
}


@dataclass(frozen=True, slots=True, eq=False)
class DenseMaps:
    """score_map (B, 1, H, W) in (0, 1); feature_map (B, D, H, W) of unit length over D."""

    score_map: Tensor
    feature_map: Tensor


def max_offset_px(height: int, width: int) -> float:
    """Largest deformation on a map of this size, in its pixels: both deformable parts clamp to a quarter side."""
    return max(height, width) / 4.0


def padding_to_stride(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) px that make both sides multiples of STRIDE; left and top get the smaller half."""
    pad_x, pad_y = -width % STRIDE, -height % STRIDE
    return pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2


def pad_to_stride(images: Tensor) -> Tensor:
    """(B, C, H, W) with its border pixels repeated until both sides are multiples of STRIDE."""
    padding = padding_to_stride(images.shape[2], images.shape[3])
    return functional.pad(images, padding, mode="replicate") if any(padding) else images


def tap_offsets(device: torch.device) -> Tensor:
    """(9, 2) float32, the (dy, dx) of the taps of a 3x3 kernel in row-major order."""
    steps = torch.arange(-1.0, 2.0, device=device)
    return torch.cartesian_prod(steps, steps)


def deformable_conv2d(features: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """3x3 deformable convolution with padding 1, stride 1, no modulation (Dai et al. 2017, equations 2 and 3).

    features (B, C, H, W); offsets (B, 18, H, W) px, (dy, dx) per tap in row-major order; weight (D, C, 3, 3).
    Returns (B, D, H, W). Samples outside the map are zero. Places are told in float32 at least: a map of 1000 px has
    more of them than bfloat16 has numbers.
    """
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    features = features.to(offsets.dtype)
    batch, channels, height, width = features.shape
    device = features.device
    rows = torch.arange(height, device=device, dtype=offsets.dtype).view(1, 1, height, 1)
    columns = torch.arange(width, device=device, dtype=offsets.dtype).view(1, 1, 1, width)
    taps = tap_offsets(device).to(offsets.dtype)
    y = offsets[:, 0::2] + rows + taps[:, 0].view(1, 9, 1, 1)
    x = offsets[:, 1::2] + columns + taps[:, 1].view(1, 9, 1, 1)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    sampled = functional.grid_sample(features, grid.view(batch, 9 * height, width, 2), align_corners=False)
    columns_by_tap = sampled.view(batch, channels, 9, height * width)
    out = torch.einsum("bckn,dck->bdn", columns_by_tap, weight.flatten(2))
    return out.view(batch, -1, height, width)


class DeformableConv2d(nn.Module):
    """A 3x3 deformable convolution that estimates its own offsets."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.offset_conv = nn.Conv2d(in_channels, 18, 3, padding=1)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        limit = max_offset_px(x.shape[2], x.shape[3])
        offsets = self.offset_conv(x).clamp(-limit, limit)
        return deformable_conv2d(x, offsets, self.regular_conv.weight)


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


class ConvBlock(nn.Module):
    """Twice: 3x3 convolution, batch norm, SELU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.selu(self.bn1(self.conv1(x)))
        return functional.selu(self.bn2(self.conv2(x)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, deformable or not, beside a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, deformable: bool) -> None:
        super().__init__()
        make_conv = DeformableConv2d if deformable else _conv3x3
        self.conv1: nn.Module = make_conv(in_channels, out_channels)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2: nn.Module = make_conv(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.selu(self.bn1(self.conv1(x)))
        return functional.selu(self.bn2(self.conv2(inner)) + self.downsample(x))


class DescriptorHead(nn.Module):
    """SDDH, the sparse deformable descriptor head (section III-D of the paper)."""

    def __init__(self, dim: int, num_samples: int) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.offset_conv = nn.Sequential(
            nn.Conv2d(dim, 2 * num_samples, 3), nn.SELU(), nn.Conv2d(2 * num_samples, 2 * num_samples, 1)
        )
        self.sf_conv = nn.Conv2d(dim, dim, 1, bias=False)
        self.agg_weights = nn.Parameter(torch.rand(num_samples, dim, dim))

    def forward(self, feature_map: Tensor, keypoints: Tensor) -> Tensor:
        """feature_map (B, D, H, W), keypoints (B, K, 2) px (x, y) -> descriptors (B, K, D) of unit length."""
        batch, dim, height, width = feature_map.shape
        num_keypoints = keypoints.shape[1]
        pixels = patch_pixels(keypoints, height, width)
        patches = feature_map.flatten(2).gather(2, pixels.flatten(1).unsqueeze(1).expand(-1, dim, -1))
        patches = patches.view(batch, dim, num_keypoints, 9).permute(0, 2, 1, 3).reshape(-1, dim, 3, 3)
        limit = max_offset_px(height, width)
        offsets = self.offset_conv(patches).clamp(-limit, limit).view(batch, num_keypoints, 2, self.num_samples)
        positions = keypoints.unsqueeze(2) + offsets.transpose(2, 3)
        grid = positions * positions.new_tensor([2 / (width - 1), 2 / (height - 1)]) - 1
        sampled = functional.grid_sample(feature_map, grid, align_corners=True)
        sampled = functional.selu(self.sf_conv(sampled))
        descriptors = torch.einsum("bckm,mcd->bkd", sampled, self.agg_weights)
        return functional.normalize(descriptors, dim=2)


def patch_pixels(keypoints: Tensor, height: int, width: int) -> Tensor:
    """Flat indices (B, K, 9) of the 3x3 pixels around the truncated keypoints (B, K, 2), row-major.

    The published network clamps the patch's corner to [0, side - 4], one short of the last place where the patch fits.
    """
    corner_x = (keypoints[..., 0].long() - 1).clamp(0, width - 4)
    corner_y = (keypoints[..., 1].long() - 1).clamp(0, height - 4)
    steps = torch.arange(3, device=keypoints.device)
    rows = corner_y.unsqueeze(-1) + steps
    columns = corner_x.unsqueeze(-1) + steps
    return (rows.unsqueeze(-1) * width + columns.unsqueeze(-2)).flatten(-2)


class AlikedNetwork(nn.Module):
    """The whole network with its batch norms; random weights until a state dict is loaded."""

    def __init__(self, architecture: AlikedArchitecture) -> None:
        super().__init__()
        c1, c2, c3, c4 = architecture.channels
        dim = architecture.descriptor_dim
        self.block1 = ConvBlock(3, c1)
        self.block2 = ResidualBlock(c1, c2, deformable=False)
        self.block3 = ResidualBlock(c2, c3, deformable=True)
        self.block4 = ResidualBlock(c3, c4, deformable=True)
        self.conv1 = nn.Conv2d(c1, dim // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(c2, dim // 4, 1, bias=False)
        self.conv3 = nn.Conv2d(c3, dim // 4, 1, bias=False)
        self.conv4 = nn.Conv2d(c4, dim // 4, 1, bias=False)
        self.score_head = nn.Sequential(
            nn.Conv2d(dim, 8, 1, bias=False),
            nn.SELU(),
            _conv3x3(8, 4),
            nn.SELU(),
            _conv3x3(4, 4),
            nn.SELU(),
            _conv3x3(4, 1),
        )
        self.desc_head = DescriptorHead(dim, architecture.num_samples)

    def forward(self, images: Tensor) -> DenseMaps:
        """images (B, 3, H, W) float RGB in [0, 1], any H and W of at least STRIDE px."""
        height, width = images.shape[2:]
        left, _, top, _ = padding_to_stride(height, width)
        aggregated = self.aggregate(pad_to_stride(images))
        score_map = torch.sigmoid(self.score_head(aggregated))
        feature_map = functional.normalize(aggregated, dim=1)
        inside = (..., slice(top, top + height), slice(left, left + width))
        return DenseMaps(score_map[inside], feature_map[inside])

    def aggregate(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of STRIDE -> the four branches at full resolution, (B, D, H, W)."""
        x1 = self.block1(images)
        x2 = self.block2(functional.avg_pool2d(x1, 2))
        x3 = self.block3(functional.avg_pool2d(x2, 4))
        x4 = self.block4(functional.avg_pool2d(x3, 4))
        branches = [
            functional.selu(conv(x))
            for conv, x in ((self.conv1, x1), (self.conv2, x2), (self.conv3, x3), (self.conv4, x4))
        ]
        size = images.shape[2:]
        coarse = [functional.interpolate(x, size, mode="bilinear", align_corners=True) for x in branches[1:]]
        return torch.cat([branches[0], *coarse], dim=1)

    def describe(self, feature_map: Tensor, keypoints: Tensor) -> Tensor:
        """Descriptors (B, K, D) of keypoints (B, K, 2) px on the map of `forward`."""
        descriptors: Tensor = self.desc_head(feature_map, keypoints)
        return descriptors


def load_network(variant: str, state_dict: Mapping[str, Tensor]) -> AlikedNetwork:
    """The network of a variant with published (or our) weights, in evaluation mode, on the CPU in float32.

    Raises WeightsError when keys or shapes are not those of the variant.
    """
    network = AlikedNetwork(ARCHITECTURES[variant])
    expected = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    remedy = f"fetch them again with `vo weights fetch aliked-{variant}` or choose the variant they were made for"
    for key, value in expected.items():
        if key not in state_dict:
            raise WeightsError(f"aliked-{variant} weights: {key} is missing; {remedy}")
        if state_dict[key].shape != value.shape:
            got, want = tuple(state_dict[key].shape), tuple(value.shape)
            raise WeightsError(f"aliked-{variant} weights: {key} is {got}, not {want}; {remedy}")
    network.load_state_dict({key: state_dict[key].float() for key in expected}, strict=False)
    return network.eval()
