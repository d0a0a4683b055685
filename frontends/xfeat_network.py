"""The XFeat network for inference: BatchNorm folded into the convolutions, channels last in memory.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontends.base import WeightsError

DESCRIPTOR_DIM = 64
# The backbone halves the resolution five times; the maps that come out have one cell for 8x8 px.
STRIDE_PX = 32
CELL_PX = 8

_BATCH_NORM_EPSILON = 1e-5
_INSTANCE_NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class XFeatMaps:
    """What the network says about B images of H x W px, one cell for 8x8 px: h = H / 8, w = W / 8.

    descriptors      (B, h, w, 64) float32, not normalised.
    reliability      (B, h, w) float32 in (0, 1).
    keypoint_logits  (B, h, w, 65) float32: the pixels of the cell row by row, then "no keypoint".
    """

    descriptors: Tensor
    reliability: Tensor
    keypoint_logits: Tensor


class ConvolutionReLU(nn.Module):
    """A convolution that keeps the size (over the stride), and ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.convolution(x)
        return result.relu_()


class XFeatNetwork(nn.Module):
    """Descriptors, reliability and keypoint logits of gray images; layers are named as in the published checkpoint.

    `dtype` is the precision of the wide part of the backbone, where the work is. The stem and the two heads stay in
    float32: they decide which pixels are keypoints and in which order.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        layer = ConvolutionReLU
        self.dtype = dtype
        self.skip1 = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 24, 1))
        self.block1 = nn.Sequential(layer(1, 4), layer(4, 8, stride=2), layer(8, 8), layer(8, 24, stride=2))
        self.block2 = nn.Sequential(layer(24, 24), layer(24, 24))
        self.block3 = nn.Sequential(layer(24, 64, stride=2), layer(64, 64), layer(64, 64, 1))
        self.block4 = nn.Sequential(layer(64, 64, stride=2), layer(64, 64), layer(64, 64))
        self.block5 = nn.Sequential(layer(64, 128, stride=2), layer(128, 128), layer(128, 128), layer(128, 64, 1))
        self.block_fusion = nn.Sequential(layer(64, 64), layer(64, 64), nn.Conv2d(64, DESCRIPTOR_DIM, 1))
        self.heatmap_head = nn.Sequential(layer(64, 64, 1), layer(64, 64, 1), nn.Conv2d(64, 1, 1))
        pointwise = (layer(CELL_PX**2, 64, 1), layer(64, 64, 1), layer(64, 64, 1))
        self.keypoint_head = nn.Sequential(*pointwise, nn.Conv2d(64, CELL_PX**2 + 1, 1))

    def forward(self, gray: Tensor) -> XFeatMaps:
        """`gray` (B, 1, H, W) float32 in [0, 1], the mean of the colour channels; sides are multiples of 32."""
        gray = _instance_norm(gray).contiguous(memory_format=torch.channels_last)
        quarter = self.block2((self.block1(gray) + self.skip1(gray)).to(self.dtype))
        eighth = self.block3(quarter)
        sixteenth = self.block4(eighth)
        pyramid = eighth + _enlarged(sixteenth, eighth) + _enlarged(self.block5(sixteenth), eighth)
        descriptors = self.block_fusion(pyramid).float()
        reliability = torch.sigmoid(self.heatmap_head(descriptors))
        # A cell's channel is 8 times the row in the cell plus the column.
        cells = F.pixel_unshuffle(gray, CELL_PX).contiguous(memory_format=torch.channels_last)
        logits = self.keypoint_head(cells)
        return XFeatMaps(descriptors.permute(0, 2, 3, 1), reliability[:, 0], logits.permute(0, 2, 3, 1))


def _instance_norm(gray: Tensor) -> Tensor:
    """Zero mean and unit variance of every image on its own."""
    variance, mean = torch.var_mean(gray, dim=(1, 2, 3), correction=0, keepdim=True)
    return (gray - mean) * (variance + _INSTANCE_NORM_EPSILON).rsqrt()


def _enlarged(coarse: Tensor, fine: Tensor) -> Tensor:
    return F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)


def load_network(
    state_dict: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> XFeatNetwork:
    """The network with the weights of a published checkpoint, or of one whose BatchNorm is neutral already.

    Raises WeightsError naming the first tensor that is missing, of another shape, or of another network.
    """
    network, used = XFeatNetwork(dtype), set[str]()
    for name, module in network.named_modules():
        if isinstance(module, ConvolutionReLU):
            weight, bias = _folded(state_dict, f"{name}.layer", module.convolution.weight.shape)
            module.convolution.load_state_dict({"weight": weight, "bias": bias})
            used.update(f"{name}.layer.{key}" for key in ("0.weight", "1.running_mean", "1.running_var"))
            used.add(f"{name}.layer.1.num_batches_tracked")
        elif isinstance(module, nn.Conv2d) and not name.endswith(".convolution"):
            own = {key: named_tensor(state_dict, f"{name}.{key}", t.shape) for key, t in module.state_dict().items()}
            module.load_state_dict(own)
            used.update(f"{name}.{key}" for key in own)
    unknown = [name for name in state_dict if name not in used and not name.startswith("fine_matcher.")]
    if unknown:
        raise WeightsError(f"weights for XFeat hold {unknown[0]!r}, which XFeat has not; give those of xfeat")
    for block in (network.block2, network.block3, network.block4, network.block5, network.block_fusion):
        block.to(dtype)
    return network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def named_tensor(state_dict: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """A tensor of a checkpoint, float64. WeightsError if it is missing or of another shape."""
    if name not in state_dict:
        raise WeightsError(f"weights for XFeat lack {name!r}; give those of xfeat (`vo weights fetch xfeat`)")
    tensor = state_dict[name]
    if tensor.shape != shape:
        raise WeightsError(
            f"weights for XFeat: {name} is {tuple(tensor.shape)} instead of {tuple(shape)}; give those of xfeat"
        )
    return tensor.double()


def _folded(state_dict: Mapping[str, Tensor], layer: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that include the (non-affine) BatchNorm behind it."""
    weight = named_tensor(state_dict, f"{layer}.0.weight", shape)
    return fold_batch_norm(state_dict, f"{layer}.1", weight, None)


def fold_batch_norm(
    state_dict: Mapping[str, Tensor], name: str, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`weight` (outputs, ...) and `bias` (outputs,) of a layer after the BatchNorm `name` without scale and shift."""
    channels = weight.shape[:1]
    mean = named_tensor(state_dict, f"{name}.running_mean", channels)
    scale = (named_tensor(state_dict, f"{name}.running_var", channels) + _BATCH_NORM_EPSILON).rsqrt()
    shifted = -mean if bias is None else bias - mean
    return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), shifted * scale
