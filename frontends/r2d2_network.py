"""The R2D2 network: descriptors, reliability and repeatability of every pixel.

Revaud et al., "R2D2: Repeatable and Reliable Detector and Descriptor", NeurIPS 2019, section 3.1. The backbone is
Quad-L2Net: nothing shrinks the image, every stride of the original L2-Net becomes a dilation of what follows, and its
last 8x8 convolution becomes three of 2x2. Names of tensors and the constructor text are those of the published
checkpoints; the text is parsed, never evaluated.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from frontends.base import WeightsError

_QUAD, _FAST = "Quad_L2Net_ConfCFS", "Fast_Quad_L2Net_ConfCFS"
# Mean and deviation of the colour channels of ImageNet, in [0, 1]: the input the published networks were trained on.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_REMEDY = "give a published R2D2 checkpoint, or one written by tools/train_r2d2.py"


@dataclass(frozen=True, slots=True)
class R2d2Architecture:
    """What a checkpoint's constructor text says of its network.

    dim      length of the descriptors.
    mchan    width of the backbone: 8, 16 and 32 times as many channels.
    relu22   whether the first two 2x2 convolutions are followed by ReLU.
    is_fast  the variant that works at half the resolution behind its third convolution.
    """

    dim: int = 128
    mchan: int = 4
    relu22: bool = False
    is_fast: bool = False

    @property
    def constructor(self) -> str:
        """The text that stands for it in a checkpoint: what differs from the defaults."""
        changed = [
            f"{item.name}={getattr(self, item.name)}"
            for item in fields(self)
            if item.name != "is_fast" and getattr(self, item.name) != item.default
        ]
        return f"{_FAST if self.is_fast else _QUAD}({', '.join(changed)})"


@dataclass(frozen=True, slots=True, eq=False)
class R2d2Maps:
    """What the network says about every pixel of B images.

    descriptors    (B, D, H, W) of unit length.
    reliability    (B, H, W) in (0, 1): how likely the descriptor finds its match.
    repeatability  (B, H, W) in (0, 1): how likely the pixel is found again in another image.
    """

    descriptors: Tensor
    reliability: Tensor
    repeatability: Tensor


class R2d2Network(nn.Module):
    """The network of one architecture, with fresh weights from PyTorch's generator."""

    def __init__(self, architecture: R2d2Architecture = R2d2Architecture()) -> None:
        super().__init__()
        self.architecture = architecture
        self.ops = nn.ModuleList(_backbone(architecture))
        self.clf = nn.Conv2d(architecture.dim, 2, kernel_size=1)
        self.sal = nn.Conv2d(architecture.dim, 1, kernel_size=1)

    def forward(self, images: Tensor) -> R2d2Maps:
        """`images` (B, 3, H, W) as `normalised` gives them; sides of the fast variant are even."""
        return self.heads(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """(B, D, H, W), not of unit length yet."""
        features = images
        for layer in self.ops:
            features = layer(features)
        return features

    def heads(self, features: Tensor) -> R2d2Maps:
        """The maps of the backbone's output (B, D, H, W)."""
        squared = features * features
        reliability = self.clf(squared).softmax(dim=1)[:, 1]
        positive = F.softplus(self.sal(squared))[:, 0]
        return R2d2Maps(F.normalize(features, dim=1), reliability, positive / (1 + positive))


def _backbone(architecture: R2d2Architecture) -> list[nn.Module]:
    """Convolution, BatchNorm without scale and shift, ReLU; and so on. A stride of L2-Net doubles the dilation."""
    width, relu22 = 8 * architecture.mchan, architecture.relu22
    layers: list[nn.Module] = []
    inputs, dilation = 3, 1

    def add(outputs: int, size: int = 3, stride: int = 1, *, has_norm: bool = True, has_relu: bool = True) -> None:
        nonlocal inputs, dilation
        padding = (size - 1) * dilation // 2
        layers.append(nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation))
        layers.extend([nn.BatchNorm2d(outputs, affine=False)] if has_norm else [])
        layers.extend([nn.ReLU(inplace=True)] if has_relu else [])
        inputs, dilation = outputs, dilation * stride

    add(width)
    add(width)
    if architecture.is_fast:
        add(2 * width)
        layers.append(nn.MaxPool2d(2))
    else:
        add(2 * width, stride=2)
    add(2 * width)
    add(4 * width, stride=2)
    add(4 * width)
    add(4 * width, size=2, stride=2, has_relu=relu22)
    add(4 * width, size=2, stride=2, has_relu=relu22)
    add(architecture.dim, size=2, stride=2, has_norm=False, has_relu=False)
    if architecture.is_fast:
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return layers


def normalised(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] as the network takes it."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(_MEAN).view(shape)) / images.new_tensor(_DEVIATION).view(shape)


def read_constructor(text: str) -> R2d2Architecture:
    """The architecture behind a constructor text like "Quad_L2Net_ConfCFS(mchan=6)". WeightsError for any other."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise WeightsError(f"R2D2 checkpoint: net: {text!r:.80} names no network; {_REMEDY}")
    if call.func.id not in (_QUAD, _FAST):
        raise WeightsError(f"R2D2 checkpoint: net: {call.func.id} is none of {_QUAD}, {_FAST}; {_REMEDY}")
    values: dict[str, object] = {}
    expected = {"dim": int, "mchan": int, "relu22": bool}
    for word in call.keywords:
        value = ast.literal_eval(word.value) if isinstance(word.value, ast.Constant) else None
        if word.arg not in expected or type(value) is not expected[word.arg]:
            raise WeightsError(f"R2D2 checkpoint: net: {word.arg} of {text!r:.80} is not understood; {_REMEDY}")
        values[word.arg] = value
    architecture = R2d2Architecture(**values, is_fast=call.func.id == _FAST)  # type: ignore[arg-type]
    if not (1 <= architecture.dim <= 1024 and 1 <= architecture.mchan <= 64):
        raise WeightsError(f"R2D2 checkpoint: net: {text!r:.80} has too few or too many channels; {_REMEDY}")
    return architecture


def load_network(constructor: str | None, state_dict: Mapping[str, Tensor]) -> R2d2Network:
    """The network of a checkpoint, ready for inference. WeightsError where its tensors are not the network's."""
    if constructor is None:
        raise WeightsError(f"R2D2 checkpoint: net: missing, so the network is not known; {_REMEDY}")
    network = R2d2Network(read_constructor(constructor))
    # Networks trained on several GPUs have the prefix.
    tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            # Files of older PyTorch lack the counter, which counts for nothing here.
            if name.endswith("num_batches_tracked"):
                tensors[name] = tensor
                continue
            raise WeightsError(f"R2D2 checkpoint: {name} is missing; {_REMEDY}")
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            raise WeightsError(f"R2D2 checkpoint: {name} is {shapes} as net says; {_REMEDY}")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise WeightsError(f"R2D2 checkpoint: {unknown[0]} is no tensor of {constructor}; {_REMEDY}")
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def folded(network: R2d2Network) -> R2d2Network:
    """The same function with every BatchNorm folded into the convolution before it; for inference only."""
    result = R2d2Network(network.architecture)
    result.load_state_dict(network.state_dict())
    result.eval()
    layers = list(result.ops)
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers[index - 1]
            if not isinstance(convolution, nn.Conv2d):
                raise ValueError(f"ops.{index}: a BatchNorm without a convolution before it")
            result.ops[index - 1] = fuse_conv_bn_eval(convolution, layer)
            result.ops[index] = nn.Identity()
    return result.requires_grad_(False)


def checkpoint(network: R2d2Network) -> dict[str, object]:
    """What the published files hold: `net`, the constructor text, and `state_dict`."""
    state_dict = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    return {"net": network.architecture.constructor, "state_dict": state_dict}
