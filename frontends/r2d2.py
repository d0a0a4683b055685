"""R2D2: keypoints that are both repeatable and reliable, found at several scales, with a descriptor each.

Revaud et al., "R2D2: Repeatable and Reliable Detector and Descriptor", NeurIPS 2019, section 3.4. Keypoints are mapped
between scales by pixel centres, where the published code multiplies coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from frontends.base import Features, check_settings, resized_shape, setting, to_full_resolution
from frontends.r2d2_network import R2d2Maps, folded, load_network, normalised
from frontends.selection import CANDIDATES_PER_KEYPOINT, SPREAD_CELL_PX, spread_order

_NMS_SIZE_PX = 3
_MIN_SIDE_PX = 16


@dataclass(frozen=True, slots=True)
class R2d2Config:
    """R2D2: how many keypoints, how sure the network has to be of them, at which scales."""

    name: Literal["r2d2"] = "r2d2"
    max_keypoints: int = setting(1024, minimum=1, maximum=16384, help="keypoints per image at most")
    spread_cell_px: int | None = setting(
        SPREAD_CELL_PX, minimum=8, help="cells that share the keypoints evenly, px; none: the best anywhere"
    )
    subpixel: bool = setting(True, help="refines the published whole-pixel keypoints by the repeatability around them")
    min_reliability: float = setting(0.7, minimum=0.0, maximum=1.0, help="reliability a keypoint has to reach")
    min_repeatability: float = setting(0.7, minimum=0.0, maximum=1.0, help="repeatability a keypoint has to reach")
    max_side: int | None = setting(1024, minimum=64, help="the largest scale: longer side of the image at most, px")
    min_side: int = setting(256, minimum=32, help="the smallest scale: longer side of the image at least, px")
    scale_step: float = setting(2**0.25, minimum=1.05, maximum=64.0, help="size ratio of neighbouring scales")
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16"), help="of the backbone's arithmetic")
    weights: str | None = setting(None, help="checkpoint; none: our small one, the published ones are non-commercial")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Keypoints (N, 2) px of one scale, scores (N,), unit descriptors (N, D)."""

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor


class R2d2:
    """Extracts R2D2 features; holds the network on one device.

    Raises WeightsError when constructor and state dict are not those of an R2D2 network.
    """

    def __init__(
        self,
        config: R2d2Config,
        constructor: str | None,
        state_dict: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        network = load_network(constructor, state_dict)
        self._stride = 2 if network.architecture.is_fast else 1
        self._dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self._network = folded(network).to(self.device)
        self._network.ops.to(self._dtype)
        convert_conv2d_weight_memory_format(self._network, torch.channels_last)

    @property
    def kind(self) -> str:
        return "r2d2"

    @property
    def precision(self) -> str:
        """Precision of the backbone, for the summary of a run; both confidences are always computed in float32."""
        return str(self._dtype).removeprefix("torch.")

    @torch.inference_mode()
    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Features of one image (H, W, 3) RGB or (H, W) gray, uint8; rows beyond `num_valid` are zeros.

        Scores are reliability times repeatability. Raises ValueError when the image is not of such a shape and type,
        or smaller than 16 px.
        """
        full = _checked_size(image)
        largest = resized_shape(*full, self.config.max_side)
        if largest != full:
            image = np.asarray(cv2.resize(image, largest, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        found = [self._detect(scaled, full) for scaled in self._scales(rgb_batch(image, self.device))]
        return self._merged(found, full)

    def _scales(self, image: Tensor) -> Iterator[Tensor]:
        """The image (1, 3, H, W) in [0, 1], ever smaller down to the smallest scale; the first one always."""
        height, width = image.shape[2:]
        scale, longest = 1.0, max(height, width)
        yield image
        while True:
            scale /= self.config.scale_step
            size = (round(height * scale), round(width * scale))
            if longest * scale < self.config.min_side - 0.5 or min(size) < _MIN_SIDE_PX:
                return
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
            yield image

    def _detect(self, image: Tensor, full: tuple[int, int]) -> Detections:
        """Detections of one scale with keypoints in px of the full image."""
        maps = self.maps(image)
        found = detect(maps, self.config.min_reliability, self.config.min_repeatability)
        points = found.keypoints
        if self.config.subpixel:
            points = refined_peaks(maps.repeatability[0], points.long())
        keypoints = to_full_resolution(points, (image.shape[3], image.shape[2]), full)
        return Detections(keypoints, found.scores, found.descriptors)

    def maps(self, image: Tensor) -> R2d2Maps:
        """What the network says of an image (1, 3, H, W) in [0, 1], in float32."""
        height, width = image.shape[2:]
        padded = normalised(image).to(self._dtype)
        if self._stride > 1:
            padded = F.pad(padded, (0, -width % self._stride, 0, -height % self._stride), mode="replicate")
        features = self._network.features(padded.contiguous(memory_format=torch.channels_last))
        maps = self._network.heads(features.float())
        return R2d2Maps(
            maps.descriptors[:, :, :height, :width],
            maps.reliability[:, :height, :width],
            maps.repeatability[:, :height, :width],
        )

    def _merged(self, found: list[Detections], full: tuple[int, int]) -> Features:
        """The best of all scales, at the fixed capacity."""
        keypoints = torch.cat([part.keypoints for part in found])
        scores = torch.cat([part.scores for part in found])
        descriptors = torch.cat([part.descriptors for part in found])
        num_kept = self.config.max_keypoints * (1 if self.config.spread_cell_px is None else CANDIDATES_PER_KEYPOINT)
        order = scores.argsort(descending=True, stable=True)[:num_kept]
        if self.config.spread_cell_px is not None:
            order = order[spread_order(keypoints[order], self.config.spread_cell_px)[: self.config.max_keypoints]]
        padding = (0, 0, 0, self.config.max_keypoints - len(order))
        return Features(
            F.pad(keypoints[order], padding),
            F.pad(scores[order], padding[2:]),
            F.pad(descriptors[order], padding),
            len(order),
            full,
            self.kind,
        )


def detect(maps: R2d2Maps, min_reliability: float, min_repeatability: float) -> Detections:
    """Pixels of one image whose repeatability nothing within 3x3 px exceeds, above both thresholds, row by row."""
    repeatability, reliability = maps.repeatability, maps.reliability
    largest = F.max_pool2d(repeatability[:, None], _NMS_SIZE_PX, stride=1, padding=_NMS_SIZE_PX // 2)[:, 0]
    is_peak = (repeatability == largest) & (repeatability >= min_repeatability) & (reliability >= min_reliability)
    rows, columns = is_peak[0].nonzero(as_tuple=True)
    scores = repeatability[0, rows, columns] * reliability[0, rows, columns]
    return Detections(torch.stack((columns, rows), dim=1).float(), scores, maps.descriptors[0, :, rows, columns].T)


def refined_peaks(repeatability: Tensor, points: Tensor) -> Tensor:
    """Sub-pixel places (N, 2) px of whole-pixel peaks (N, 2) of a map (H, W): vertices of parabolas through neighbours.

    One along x and one along y, at most half a pixel away; peaks on the edge of the image stay where they are. Not part
    of the published method.
    """
    height, width = repeatability.shape
    inner = points.clamp(points.new_tensor([1, 1]), points.new_tensor([width - 2, height - 2]))
    columns, rows = inner.T
    centre = repeatability[rows, columns]
    offsets = []
    for before, after in (
        (repeatability[rows, columns - 1], repeatability[rows, columns + 1]),
        (repeatability[rows - 1, columns], repeatability[rows + 1, columns]),
    ):
        curvature = 2 * centre - before - after
        offsets.append(torch.where(curvature > 0, (after - before) / (2 * curvature.clamp(min=1e-12)), 0.0))
    is_inner = (inner == points).all(dim=1, keepdim=True)
    return points + torch.stack(offsets, dim=1).clamp(-0.5, 0.5) * is_inner


def rgb_batch(image: NDArray[np.uint8], device: torch.device | str) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1] of (H, W, 3) or (H, W) uint8."""
    # A copy: frames are read-only, and PyTorch warns of tensors over read-only memory.
    pixels = torch.from_numpy(np.array(image, order="C")).to(device)
    if pixels.ndim == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    return pixels.permute(2, 0, 1)[None].float() / 255


def _checked_size(image: NDArray[np.uint8]) -> tuple[int, int]:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image: expected (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    if min(height, width) < _MIN_SIDE_PX:
        raise ValueError(f"image: expected sides of at least {_MIN_SIDE_PX} px, got {width}x{height}")
    return width, height
