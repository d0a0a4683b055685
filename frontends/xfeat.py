"""XFeat, sparse: up to K whole-pixel keypoints with 64-dimensional descriptors.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024. The sampling convention is that
of the published weights: a keypoint p of an image of width W is read at p w / (W - 1) - 1/2 in a map of width w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import Features, check_settings, resized_shape, setting, to_full_resolution
from frontends.selection import CANDIDATES_PER_KEYPOINT, SPREAD_CELL_PX, spread_order
from frontends.xfeat_network import CELL_PX, STRIDE_PX, XFeatMaps, XFeatNetwork, load_network

# Free parameter of the cubic convolution kernel (Keys 1981), as PyTorch's bicubic sampling has it.
_CUBIC = -0.75
NMS_SIZE_PX = 5
# Shorter vectors are divided by this, as torch.nn.functional.normalize does.
_MIN_LENGTH = 1e-12
# Just below the 32 MB up to which glibc adapts; the block is never written to.
_KEPT_BYTES = 30_000_000


@dataclass(frozen=True, slots=True)
class XFeatConfig:
    """XFeat: how many keypoints, from which score on, at which resolution and precision."""

    name: Literal["xfeat"] = "xfeat"
    max_keypoints: int = setting(1024, minimum=1, maximum=16384, help="keypoints per image at most")
    spread_cell_px: int | None = setting(
        SPREAD_CELL_PX, minimum=8, help="cells that share the keypoints evenly, px; none: the strongest anywhere"
    )
    subpixel: bool = setting(True, help="refines the published whole-pixel keypoints by the heat around them")
    detection_threshold: float = setting(0.05, minimum=0.0, maximum=1.0, help="probability a keypoint has to exceed")
    max_side: int | None = setting(None, minimum=64, help="larger images are shrunk to this longer side, px")
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16"), help="of the backbone's arithmetic")
    weights: str | None = setting(None, help="file or name of weights; none: published, else ours")

    def __post_init__(self) -> None:
        check_settings(self)


class XFeat:
    """Extracts sparse XFeat features; holds the network on one device.

    Raises WeightsError when the state dict is not one of XFeat.
    """

    def __init__(
        self, config: XFeatConfig, state_dict: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._state_dict = state_dict
        self._network = load_network(state_dict, self.device, picked_precision(config.precision))
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def kind(self) -> str:
        return "xfeat"

    @property
    def precision(self) -> str:
        """Precision of the backbone, for the summary of a run; stem and heads always work in float32."""
        return str(self._network.dtype).removeprefix("torch.")

    def network_in(self, dtype: torch.dtype) -> XFeatNetwork:
        """The network with its backbone in a precision, which may be another than the configured one."""
        return self._network if dtype == self._network.dtype else load_network(self._state_dict, self.device, dtype)

    @torch.inference_mode()
    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Features of one image (H, W, 3) RGB or (H, W) gray, uint8, best first; rows beyond `num_valid` are zeros.

        Raises ValueError when the image is not of such a shape and type, or smaller than 32 px.
        """
        full = check_image(image)
        resized = resized_shape(*full, self.config.max_side)
        if resized != full:
            image = np.asarray(cv2.resize(image, resized, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        gray = resized_to_stride(gray_batch(image, self.device))
        found = detect(self._network(gray), self.config)[0]
        # The published code multiplies by the ratio of the sizes without minding pixel centres: at most 0.04 px off.
        ratio = gray.new_tensor([resized[0] / gray.shape[3], resized[1] / gray.shape[2]])
        keypoints = to_full_resolution(found.keypoints * ratio, resized, full)
        keypoints[found.num_valid :] = 0
        return Features(keypoints, found.scores, found.descriptors, found.num_valid, full, self.kind)


def keep_freed_memory() -> None:
    """Make the C library keep the memory of one image's maps for the next instead of asking the system again.

    glibc gives back what is free beyond twice the largest block it has ever seen freed (mallopt(3),
    M_MMAP_THRESHOLD). Without this, a thousand pages a frame are returned, and cleared again: a tenth of the time.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)


def check_image(image: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) px of an image that XFeat accepts; raises ValueError for others."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image: expected (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}")
    return check_size(image.shape)


def check_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) px of an image of shape (H, W, ...); raises ValueError where it is too small."""
    height, width = shape[:2]
    if min(height, width) < STRIDE_PX:
        raise ValueError(f"image: expected sides of at least {STRIDE_PX} px, got {width}x{height}")
    return width, height


def picked_precision(requested: str) -> torch.dtype:
    """Precision of the backbone: "auto" is float32 on every machine.

    bfloat16 is faster where the CPU multiplies matrices of it (AMX), but moves scores by up to 1e-2, beyond the 1e-3
    that this port promises; it has to be asked for.
    """
    return torch.bfloat16 if requested == "bfloat16" else torch.float32


def gray_batch(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(1, 1, H, W) float32 in [0, 1], the mean of the channels of (H, W, 3) or (H, W) uint8."""
    # Frames are read-only, and PyTorch warns of tensors over read-only memory: the copy is cheaper than the rest.
    return gray_pixels(torch.from_numpy(np.array(image, order="C")).to(device))


def gray_pixels(pixels: Tensor) -> Tensor:
    """The same of a tensor (H, W, 3) or (H, W) uint8."""
    if pixels.ndim == 2:
        return pixels.float().mul_(1 / 255)[None, None]
    return pixels[..., 0].float().add_(pixels[..., 1]).add_(pixels[..., 2]).mul_(1 / (3 * 255))[None, None]


def resized_to_stride(gray: Tensor) -> Tensor:
    """(B, 1, H, W) with sides brought to the next lower multiple of 32 px, at least 32 px."""
    size = [max(STRIDE_PX, side // STRIDE_PX * STRIDE_PX) for side in gray.shape[2:]]
    return gray if size == list(gray.shape[2:]) else F.interpolate(gray, size, mode="bilinear", align_corners=False)


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Keypoints (K, 2) px of the network's input, scores (K,), unit descriptors (K, 64); zeros from `num_valid` on."""

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor
    num_valid: int


def detect(maps: XFeatMaps, config: XFeatConfig) -> list[Detections]:
    """The keypoints with the best product of probability and reliability, for every image of the batch."""
    heat = heatmap(maps.keypoint_logits)
    is_peak = peaks(heat, config.detection_threshold)
    # The published code reads the heat map at the nearest pixel, which lies outside for the last row and column.
    is_peak[:, -1] = False
    is_peak[:, :, -1] = False
    return [
        _best(heat[index], is_peak[index], maps.reliability[index], maps.descriptors[index], config)
        for index in range(len(heat))
    ]


def _best(heat: Tensor, is_peak: Tensor, reliability: Tensor, descriptors: Tensor, config: XFeatConfig) -> Detections:
    height, width = heat.shape
    rows, columns = is_peak.nonzero(as_tuple=True)
    # Positions from -1 to 1 between the centres of the first and the last pixel.
    places = torch.stack((columns * (2 / (width - 1)) - 1, rows * (2 / (height - 1)) - 1), dim=1)
    reliabilities = F.grid_sample(reliability[None, None], places[None, None], align_corners=False)[0, 0, 0]
    num_candidates = config.max_keypoints * (1 if config.spread_cell_px is None else CANDIDATES_PER_KEYPOINT)
    scores, order = (heat[rows, columns] * reliabilities).topk(min(num_candidates, len(rows)))
    points = torch.stack((columns[order], rows[order]), dim=1)
    if config.spread_cell_px is not None:
        kept = spread_order(points.float(), config.spread_cell_px)[: config.max_keypoints]
        points, scores, order = points[kept], scores[kept], order[kept]
    padding = (0, 0, 0, config.max_keypoints - len(scores))
    found = F.pad(sample_descriptors(descriptors, places[order]), padding)
    refined = refine_peaks(heat, points) if config.subpixel else points.float()
    return Detections(F.pad(refined, padding), F.pad(scores, padding[2:]), found, len(scores))


def refine_peaks(heat: Tensor, points: Tensor) -> Tensor:
    """Sub-pixel places (N, 2) px of whole-pixel peaks (N, 2) of a heat map (H, W): its centre of mass over 3x3 px.

    Not part of the published method. On driving and indoor sequences it takes a quarter off the distance of matches to
    their epipolar lines. Outside the map there is no mass, so that no place lies outside.
    """
    padded = F.pad(heat, (1, 1, 1, 1))
    steps = torch.arange(-1, 2, device=heat.device)
    columns, rows = points[:, 0, None, None] + 1 + steps, points[:, 1, None, None] + 1 + steps[:, None]
    window = padded[rows, columns]
    window = window / window.sum(dim=(1, 2), keepdim=True)
    offsets = torch.stack(((window.sum(1) * steps).sum(1), (window.sum(2) * steps).sum(1)), dim=1)
    return points + offsets


def heatmap(keypoint_logits: Tensor) -> Tensor:
    """(B, H, W) probability of a keypoint at each pixel, of logits (B, h, w, 65)."""
    batch, height, width, _ = keypoint_logits.shape
    cells = keypoint_logits.softmax(dim=-1)[..., :-1].reshape(batch, height, width, CELL_PX, CELL_PX)
    return cells.transpose(2, 3).reshape(batch, height * CELL_PX, width * CELL_PX)


def peaks(heat: Tensor, threshold: float) -> Tensor:
    """(B, H, W) bool: above the threshold, and nothing within 5x5 px is larger."""
    if heat.device.type == "cpu":
        # A hundred times faster than max-pooling in PyTorch.
        largest, window = torch.empty_like(heat), np.ones((NMS_SIZE_PX, NMS_SIZE_PX), dtype=np.uint8)
        for image, destination in zip(heat, largest, strict=True):
            cv2.dilate(image.numpy(), window, destination.numpy())
    else:
        largest = F.max_pool2d(heat, NMS_SIZE_PX, stride=1, padding=NMS_SIZE_PX // 2)
    return heat >= largest.clamp_(min=smallest_above(threshold))


def smallest_above(threshold: float) -> float:
    """The smallest float32 above a threshold: one comparison instead of two over the whole image."""
    return float(np.nextafter(np.float32(threshold), np.float32(2.0)))


def sample_descriptors(descriptors: Tensor, places: Tensor) -> Tensor:
    """(N, 64) unit descriptors at `places` (N, 2) in [-1, 1], from a map (h, w, 64): bicubic, cells outside are zero.

    The descriptors of the cells are brought to unit length before they are interpolated.
    """
    height, width, channels = descriptors.shape
    columns, weights_x = _cubic_taps(((places[:, 0] + 1) * width - 1) / 2, width)
    rows, weights_y = _cubic_taps(((places[:, 1] + 1) * height - 1) / 2, height)
    indices = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    weights = (weights_y[:, :, None] * weights_x[:, None, :]).flatten(1)
    cells = descriptors.reshape(-1, channels)
    lengths = torch.linalg.vector_norm(cells, dim=-1).clamp_(min=_MIN_LENGTH)
    sampled = F.embedding_bag(indices, cells, per_sample_weights=weights / lengths[indices], mode="sum")
    return F.normalize(sampled, dim=-1)


def _cubic_taps(positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Indices (N, 4) and weights (N, 4) of cubic convolution at `positions` (N,) of a line; weight 0 outside."""
    first = positions.floor()
    near = torch.stack((positions - first, 1 - (positions - first)), dim=1)
    far = near + 1
    inner = ((_CUBIC + 2) * near - (_CUBIC + 3)) * near * near + 1
    outer = ((_CUBIC * far - 5 * _CUBIC) * far + 8 * _CUBIC) * far - 4 * _CUBIC
    weights = torch.cat((outer[:, :1], inner, outer[:, 1:]), dim=1)
    indices = first.long()[:, None] + torch.arange(-1, 3, device=positions.device)
    return indices.clamp(0, length - 1), weights * ((indices >= 0) & (indices < length))
