"""ALIKED with fixed shapes, for CUDA graphs: the network of `frontends.aliked`, and masks in place of index lists."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

from frontends.aliked import Aliked, check_size
from frontends.aliked_detection import RADIUS, Detections, detect, suppress_non_maxima
from frontends.aliked_folding import Kernels
from frontends.base import resized_shape, to_full_resolution
from frontends.static_form import AreaResize, ExtractorChoice, Program, StaticFeatures


class AlikedStatic:
    """An `Aliked` as the engine wants it; shares its weights.

    It computes in float32 or TF32. Half precision is no faster on a GPU, whose time goes into many small kernels and
    not into arithmetic (measured on an H200: 1.28 ms in float32, 1.31 in float16), and moves keypoints.
    """

    def __init__(self, extractor: Aliked) -> None:
        self._extractor = extractor

    @property
    def kind(self) -> str:
        return self._extractor.kind

    @property
    def capacity(self) -> int:
        return self._extractor.config.max_keypoints

    @property
    def descriptor_dim(self) -> int:
        return self._extractor.descriptor_dim

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("float32", "tf32")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Triton's compile for NVIDIA GPUs; on the CPU only its interpreter runs them, for tests."""
        is_there = importlib.util.find_spec("triton") is not None
        return ("torch", "triton") if is_there and self._extractor.device.type == "cuda" else ("torch",)

    @property
    def convolutions(self) -> tuple[str, ...]:
        return ("stored", "benchmarked", "planar", "planar, benchmarked")

    def program(self, shape: tuple[int, ...], choice: ExtractorChoice) -> Program:
        full = check_size(shape)
        config, network = self._extractor.config, self._extractor.network
        resized = resized_shape(*full, config.max_side)
        check_size((resized[1], resized[0]))
        shrink = None if resized == full else AreaResize(full, resized, self._extractor.device)
        layout = network.create_layout(resized[1], resized[0])
        ours = _triton_kernels() if choice.kernels == "triton" else None
        # On a CPU pooling is the slowest way there is.
        suppress = suppress_non_maxima if self._extractor.device.type == "cpu" else suppress_by_pooling
        if ours is not None:
            suppress = ours.suppress

        def plain(image: Tensor) -> StaticFeatures:
            pixels = image if shrink is None else shrink(image)
            rgb = pixels if pixels.ndim == 3 else pixels.unsqueeze(-1).expand(-1, -1, 3)
            pyramid = network(rgb.permute(2, 0, 1).unsqueeze(0), layout)
            found = detect(
                pyramid.score_map,
                config.max_keypoints,
                config.score_threshold,
                config.suppression_rounds,
                config.spread_cell_px,
                suppress,
            )
            descriptors = network.describe(pyramid, found.keypoints)[0]
            return _features(found, descriptors, resized, full)

        def changed(image: Tensor) -> StaticFeatures:
            with network.using(ours, is_planar=choice.is_planar):
                return plain(image)

        # The compiler sees through the plain one more easily.
        return plain if ours is None and not choice.is_planar else changed


def _triton_kernels() -> Kernels:
    from frontends.aliked_kernels import TritonKernels  # Triton is there on few machines, and takes a second

    return TritonKernels()


def _features(
    found: Detections, descriptors: Tensor, resized: tuple[int, int], full: tuple[int, int]
) -> StaticFeatures:
    """Padding rows are zeros, in px of the full image."""
    is_valid = (torch.arange(len(descriptors), device=descriptors.device) < found.num_valid).unsqueeze(1)
    keypoints = found.keypoints[0]
    if resized != full:
        keypoints = torch.where(is_valid, to_full_resolution(keypoints, resized, full), 0.0)
    return StaticFeatures(keypoints, found.scores[0], torch.where(is_valid, descriptors, 0.0), found.num_valid)


def suppress_by_pooling(score_map: Tensor, num_rounds: int) -> Tensor:
    """`suppress_non_maxima` in the fewest kernels that PyTorch has: one pooling per window maximum."""

    def window_maximum(maps: Tensor) -> Tensor:
        return functional.max_pool2d(maps, 2 * RADIUS + 1, stride=1, padding=RADIUS)

    is_maximum = score_map == window_maximum(score_map)
    for _ in range(num_rounds - 1):
        is_near = window_maximum(is_maximum.to(score_map.dtype)) > 0
        remaining = score_map.masked_fill(is_near, 0.0)
        is_maximum = is_maximum | ((remaining == window_maximum(remaining)) & ~is_near)
    return score_map * is_maximum
