"""ALIKED keypoints and descriptors (Zhao et al., IEEE TIM 2023, arXiv 2304.03608) as an extractor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frontends.aliked_detection import ROUNDS, detect
from frontends.aliked_inference import AlikedInference
from frontends.aliked_layout import Layout
from frontends.aliked_network import ARCHITECTURES, STRIDE, load_network
from frontends.base import Features, check_settings, resized_shape, setting, to_full_resolution
from frontends.selection import SPREAD_CELL_PX


@dataclass(frozen=True, slots=True)
class AlikedConfig:
    """ALIKED: which variant, how many keypoints, at which resolution."""

    name: Literal["aliked"] = "aliked"
    variant: str = setting("t16", choices=tuple(ARCHITECTURES), help="t16 is the fastest, n32 the richest")
    max_keypoints: int = setting(1024, minimum=1, maximum=16384, help="keypoints per image at most")
    spread_cell_px: int | None = setting(
        SPREAD_CELL_PX, minimum=8, help="cells that share the keypoints evenly, px; none: the strongest anywhere"
    )
    score_threshold: float | None = setting(
        None, minimum=0.0, maximum=1.0, help="scores below are dropped; none keeps the strongest whatever they score"
    )
    suppression_rounds: int = setting(
        ROUNDS, minimum=1, maximum=ROUNDS, help="1 keeps local maxima only; more add weaker peaks beside strong ones"
    )
    max_side: int | None = setting(None, minimum=64, help="larger images are shrunk to this longer side, px")
    weights: str | None = setting(None, help="file or name of weights; none: published, else ours")

    def __post_init__(self) -> None:
        check_settings(self)


class Aliked:
    """Extracts ALIKED features; holds the network of one variant on one device.

    Raises WeightsError when the state dict is not one of the configured variant.
    """

    def __init__(
        self, config: AlikedConfig, state_dict: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        network = load_network(config.variant, state_dict)
        self.network = AlikedInference(network, self.device)
        self._layout: Layout | None = None

    @property
    def kind(self) -> str:
        return f"aliked-{self.config.variant}"

    @property
    def descriptor_dim(self) -> int:
        return ARCHITECTURES[self.config.variant].descriptor_dim

    @property
    def precision(self) -> str:
        """How the network is evaluated, for the summary of a run.

        float32 on every machine: with bfloat16 in the convolutions 1 to 2 % of the keypoints move by more than
        0.05 px, and what it saves on a CPU with AMX is a tenth.
        """
        return "float32, no full-resolution map"

    @torch.inference_mode()
    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Features of one image (H, W, 3) RGB or (H, W) gray, uint8, the strongest peaks first, cell by cell if spread.

        Keypoints are px of `image`; rows beyond `num_valid` are zeros.
        Raises ValueError when the image is not of such a shape and type, or too small.
        """
        full = check_image(image)
        resized = resized_shape(*full, self.config.max_side)
        if resized != full:
            image = np.asarray(cv2.resize(image, resized, interpolation=cv2.INTER_AREA), dtype=np.uint8)
            check_image(image)
        config = self.config
        pyramid = self.network(as_batch(image, self.device), self._layout_for(resized))
        found = detect(
            pyramid.score_map,
            config.max_keypoints,
            config.score_threshold,
            config.suppression_rounds,
            config.spread_cell_px,
        )
        descriptors = self.network.describe(pyramid, found.keypoints)[0]
        num_valid = int(found.num_valid[0])
        is_valid = (torch.arange(len(descriptors), device=self.device) < num_valid).unsqueeze(1)
        keypoints = found.keypoints[0]
        if resized != full:
            keypoints = torch.where(is_valid, to_full_resolution(keypoints, resized, full), 0.0)
        return Features(
            keypoints=keypoints,
            scores=found.scores[0],
            descriptors=torch.where(is_valid, descriptors, 0.0),
            num_valid=num_valid,
            image_size=full,
            kind=self.kind,
        )

    def _layout_for(self, size: tuple[int, int]) -> Layout:
        """The layout of the last image if it had the same (width, height) px, else a new one."""
        width, height = size
        if self._layout is None or self._layout.size != (height, width):
            self._layout = self.network.create_layout(height, width)
        return self._layout


def check_image(image: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) px of an image an extractor accepts; raises ValueError for others."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image: expected (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}")
    return check_size(image.shape)


def check_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) px of an image of shape (H, W, ...); raises ValueError where it is too small."""
    height, width = shape[:2]
    if min(height, width) < STRIDE:
        raise ValueError(f"image: expected sides of at least {STRIDE} px, got {width}x{height}")
    return width, height


def as_batch(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(H, W, 3) or (H, W) uint8 -> (1, 3, H, W) uint8 on the device."""
    # PyTorch takes no array that may not be written to.
    writable = np.require(image, requirements=("C", "W"))
    pixels = torch.from_numpy(writable).to(device)
    rgb = pixels if pixels.ndim == 3 else pixels.unsqueeze(-1).expand(-1, -1, 3)
    return rgb.permute(2, 0, 1).unsqueeze(0)
