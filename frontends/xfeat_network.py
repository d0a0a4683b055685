"""The XFeat network for inference: BatchNorm folded into the convolutions, channels last in memory.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from frontends.base import WeightsError

DESCRIPTOR_DIM = 64
# The backbone halves the resolution five times; the maps that come out have one cell for 8x8 px.
STRIDE_PX = 32
CELL_PX = 8

# Convolutions of the published checkpoint that have a bias and no BatchNorm.
_PLAIN = ("skip1.1", "block_fusion.2", "heatmap_head.2", "keypoint_head.3")
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
    """A convolution that keeps the size (over the stride), and ReLU: (B, C, H, W), channels last in memory."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.layer = nn.Conv2d(inputs, outputs, size, stride, size // 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result.relu_()


class LinearReLU(nn.Module):
    """A 1x1 convolution as the matrix product that it is, and ReLU: (..., C)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result.relu_()


class XFeatNetwork(nn.Module):
    """Descriptors, reliability and keypoint logits of gray images.

    `dtype` is the precision of the wide part of the backbone, where the work is. The stem and the two heads stay in
    float32: they decide which pixels are keypoints and in which order.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        layer, linear = ConvolutionReLU, LinearReLU
        self.dtype = dtype
        # One input channel: a row of weights and a row of biases.
        self.skip1 = nn.Parameter(torch.empty(2, 24))
        self.block1 = nn.Sequential(layer(1, 4), layer(4, 8, stride=2), layer(8, 8), layer(8, 24, stride=2))
        self.block2 = nn.Sequential(layer(24, 24), layer(24, 24))
        self.block3 = nn.Sequential(layer(24, 64, stride=2), layer(64, 64), layer(64, 64, 1))
        self.block4 = nn.Sequential(layer(64, 64, stride=2), layer(64, 64), layer(64, 64))
        self.block5 = nn.Sequential(layer(64, 128, stride=2), layer(128, 128), layer(128, 128), layer(128, 64, 1))
        self.block_fusion = nn.Sequential(layer(64, 64), layer(64, 64))
        self.descriptor_layer = nn.Linear(64, DESCRIPTOR_DIM)
        self.heatmap_head = nn.Sequential(linear(64, 64), linear(64, 64))
        self.reliability_layer = nn.Linear(64, 1)
        self.keypoint_head = nn.Sequential(linear(CELL_PX**2, 64), linear(64, 64), linear(64, 64))
        self.logit_layer = nn.Linear(64, CELL_PX**2 + 1)

    def forward(self, gray: Tensor) -> XFeatMaps:
        """`gray` (B, 1, H, W) float32 in [0, 1], the mean of the colour channels; sides are multiples of 32."""
        gray = _instance_norm(gray)
        stem = self.block1(gray).contiguous(memory_format=torch.channels_last)
        pooled = F.pad(F.avg_pool2d(gray, 4).reshape(-1, 1), (0, 1), value=1.0)
        stem.permute(0, 2, 3, 1).view(-1, stem.shape[1]).addmm_(pooled, self.skip1)
        eighth = self.block3(self.block2(stem.to(self.dtype)))
        sixteenth = self.block4(eighth)
        pyramid = _enlarged(sixteenth, eighth).add_(_enlarged(self.block5(sixteenth), eighth)).add_(eighth)
        descriptors = self.descriptor_layer(self.block_fusion(pyramid).permute(0, 2, 3, 1)).float()
        reliability = torch.sigmoid(self.reliability_layer(self.heatmap_head(descriptors)))[..., 0]
        return XFeatMaps(descriptors, reliability, self.logit_layer(self.keypoint_head(_cells(gray))))


def _instance_norm(gray: Tensor) -> Tensor:
    """Zero mean and unit variance of every image on its own."""
    centred = gray - gray.mean(dim=(1, 2, 3), keepdim=True)
    variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
    return centred.mul_((variance + _INSTANCE_NORM_EPSILON).rsqrt())


def _enlarged(coarse: Tensor, fine: Tensor) -> Tensor:
    return F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)


def _cells(gray: Tensor) -> Tensor:
    """(B, h, w, 64): the pixels of every cell of (B, 1, H, W), row by row."""
    batch, _, height, width = gray.shape
    cells = gray.reshape(batch, height // CELL_PX, CELL_PX, width // CELL_PX, CELL_PX)
    return cells.transpose(2, 3).flatten(3)


def load_network(
    state_dict: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> XFeatNetwork:
    """The network with the weights of a published checkpoint, or of one whose BatchNorm is neutral already.

    Raises WeightsError naming the first tensor that is missing, of another shape, or of another network.
    """
    network, used = XFeatNetwork(dtype), set[str]()
    for name, module in network.named_modules():
        if isinstance(module, ConvolutionReLU | LinearReLU):
            used |= _load_folded(module.layer, state_dict, f"{name}.layer")
    network.skip1 = nn.Parameter(torch.stack([t.flatten() for t in _plain(state_dict, "skip1.1", 24, 1)]).float())
    for name, layer in (
        ("block_fusion.2", network.descriptor_layer),
        ("heatmap_head.2", network.reliability_layer),
        ("keypoint_head.3", network.logit_layer),
    ):
        weight, bias = _plain(state_dict, name, layer.out_features, layer.in_features)
        layer.load_state_dict({"weight": weight.flatten(1), "bias": bias})
    used |= {f"{name}.{key}" for name in _PLAIN for key in ("weight", "bias")}
    unknown = [name for name in state_dict if name not in used and not name.startswith("fine_matcher.")]
    if unknown:
        raise WeightsError(f"weights for XFeat hold {unknown[0]!r}, which XFeat has not; give those of xfeat")
    for part in (network.block2, network.block3, network.block4, network.block5, network.block_fusion):
        part.to(dtype)
    network.descriptor_layer.to(dtype)
    convert_conv2d_weight_memory_format(network, torch.channels_last)
    return network.eval().requires_grad_(False).to(device)


def _plain(state_dict: Mapping[str, Tensor], name: str, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs, 1, 1) and bias of a 1x1 convolution without BatchNorm."""
    weight = checkpoint_tensor(state_dict, f"{name}.weight", (outputs, inputs, 1, 1))
    return weight, checkpoint_tensor(state_dict, f"{name}.bias", (outputs,))


def _load_folded(layer: nn.Conv2d | nn.Linear, state_dict: Mapping[str, Tensor], name: str) -> set[str]:
    """Load a convolution with the BatchNorm behind it; the names of the tensors that this took."""
    shape = tuple(layer.weight.shape)
    weight = checkpoint_tensor(state_dict, f"{name}.0.weight", shape if len(shape) == 4 else (*shape, 1, 1))
    weight, bias = fold_batch_norm(state_dict, f"{name}.1", weight)
    layer.load_state_dict({"weight": weight.reshape(shape), "bias": bias})
    return {f"{name}.{key}" for key in ("0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked")}


def checkpoint_tensor(state_dict: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a checkpoint as float64. WeightsError if it is missing or of another shape."""
    if name not in state_dict:
        raise WeightsError(f"weights for XFeat lack {name!r}; give those of xfeat (`vo weights fetch xfeat`)")
    tensor = state_dict[name]
    if tensor.shape != shape:
        raise WeightsError(f"weights for XFeat: {name} is {tuple(tensor.shape)}, not {shape}; give those of xfeat")
    return tensor.double()


def fold_batch_norm(
    state_dict: Mapping[str, Tensor], name: str, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight (outputs, ...) and bias (outputs,) of a layer with the BatchNorm `name` behind it, which is not affine."""
    channels = (len(weight),)
    mean = checkpoint_tensor(state_dict, f"{name}.running_mean", channels)
    scale = (checkpoint_tensor(state_dict, f"{name}.running_var", channels) + _BATCH_NORM_EPSILON).rsqrt()
    shifted = -mean if bias is None else bias - mean
    return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), shifted * scale
