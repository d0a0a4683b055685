"""XFeat with fixed shapes, for CUDA graphs: the network of `frontends.xfeat`, and masks in place of index lists."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from frontends.aliked_detection import window_maximum
from frontends.base import per_axis, resized_shape, to_full_resolution
from frontends.selection import CANDIDATES_PER_KEYPOINT, spread_order
from frontends.static_form import AreaResize, ExtractorChoice, Program, StaticFeatures
from frontends.xfeat import (
    NMS_SIZE_PX,
    XFeat,
    XFeatConfig,
    check_size,
    gray_pixels,
    heatmap,
    refine_peaks,
    resized_to_stride,
    sample_descriptors,
    smallest_above,
)
from frontends.xfeat_network import DESCRIPTOR_DIM, XFeatMaps, XFeatNetwork


class XFeatStatic:
    """An `XFeat` as the engine wants it; shares its weights."""

    def __init__(self, extractor: XFeat) -> None:
        self._extractor = extractor

    @property
    def kind(self) -> str:
        return self._extractor.kind

    @property
    def capacity(self) -> int:
        return self._extractor.config.max_keypoints

    @property
    def descriptor_dim(self) -> int:
        return DESCRIPTOR_DIM

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("float32", "tf32", "bfloat16", "float16")

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("torch",)

    @property
    def convolutions(self) -> tuple[str, ...]:
        return ("stored", "benchmarked")

    def program(self, shape: tuple[int, ...], choice: ExtractorChoice) -> Program:
        full = check_size(shape)
        config, device = self._extractor.config, self._extractor.device
        resized = resized_shape(*full, config.max_side)
        shrink = None if resized == full else AreaResize(full, resized, device)
        network = self._network(choice.precision)

        def run(image: Tensor) -> StaticFeatures:
            pixels = image if shrink is None else shrink(image)
            gray = resized_to_stride(gray_pixels(pixels))
            ratio = per_axis(gray, resized[0] / gray.shape[3], resized[1] / gray.shape[2])
            found = detect_static(network(gray), config)
            is_valid = torch.arange(len(found.scores), device=device).unsqueeze(1) < found.count
            keypoints = to_full_resolution(found.keypoints * ratio, resized, full)
            return StaticFeatures(torch.where(is_valid, keypoints, 0.0), found.scores, found.descriptors, found.count)

        return run

    def _network(self, precision: str) -> XFeatNetwork:
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        return self._extractor.network_in(dtypes.get(precision, torch.float32))


def detect_static(maps: XFeatMaps, config: XFeatConfig) -> StaticFeatures:
    """The keypoints of one image that `frontends.xfeat.detect` finds, in px of the network's input."""
    heat = heatmap(maps.keypoint_logits)[0]
    height, width = heat.shape
    scores = _peak_scores(heat, maps.reliability[0], config.detection_threshold).flatten()
    capacity = config.max_keypoints
    num_candidates = capacity * (1 if config.spread_cell_px is None else CANDIDATES_PER_KEYPOINT)
    scores = functional.pad(scores, (0, max(0, num_candidates - len(scores))))
    best, indices = scores.topk(num_candidates)
    points = torch.stack((indices % width, torch.div(indices, width, rounding_mode="floor")), dim=1)
    if config.spread_cell_px is not None:
        order = spread_order(points.float(), config.spread_cell_px, best > 0)[:capacity]
        points, best = points[order], best[order]
    is_valid = best > 0
    points = torch.where(is_valid.unsqueeze(1), points, 1)
    places = points * per_axis(heat, 2 / (width - 1), 2 / (height - 1)) - 1
    found = torch.where(is_valid.unsqueeze(1), sample_descriptors(maps.descriptors[0], places), 0.0)
    refined = refine_peaks(heat, points) if config.subpixel else points.float()
    refined = torch.where(is_valid.unsqueeze(1), refined, 0.0)
    return StaticFeatures(refined, torch.where(is_valid, best, 0.0), found, is_valid.sum().reshape(1))


def _peak_scores(heat: Tensor, reliability: Tensor, threshold: float) -> Tensor:
    """(H, W): probability times reliability at peaks, 0 elsewhere."""
    height, width = heat.shape
    largest = _window_maximum(heat[None, None])[0, 0]
    is_peak = heat >= largest.clamp_(min=smallest_above(threshold))
    # The published code reads the heat map at the nearest pixel, which lies outside for the last row and column.
    is_peak[-1].zero_()
    is_peak[:, -1].zero_()
    columns = torch.arange(width, device=heat.device) * (2 / (width - 1)) - 1
    rows = torch.arange(height, device=heat.device) * (2 / (height - 1)) - 1
    places = torch.stack((columns.expand(height, -1), rows.unsqueeze(1).expand(-1, width)), dim=-1)
    reliabilities = functional.grid_sample(reliability[None, None], places[None], align_corners=False)[0, 0]
    return heat * reliabilities * is_peak


def _window_maximum(heat: Tensor) -> Tensor:
    """Over 5x5 px of (B, 1, H, W): pooling is one kernel on a GPU, and a hundred times slower than this on a CPU."""
    if heat.device.type == "cpu":
        return window_maximum(heat)
    return functional.max_pool2d(heat, NMS_SIZE_PX, stride=1, padding=NMS_SIZE_PX // 2)
