"""DKD, ALIKED's differentiable keypoint detection: maxima of a score map, refined below the pixel.

Zhao et al., "ALIKE", IEEE TMM 2022, arXiv 2112.02906, section III-B; ALIKED (arXiv 2304.03608) uses it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from frontends.base import per_axis
from frontends.selection import CANDIDATES_PER_KEYPOINT, spread_order

RADIUS = 2  # px, of the suppression window, the soft-argmax window and the cleared border
TEMPERATURE = 0.1  # of the soft-argmax
ROUNDS = 3  # of suppression, in the published code


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """K places per image, best first; the rows from num_valid on are padding at (0, 0) with score 0.

    keypoints (B, K, 2) float32 px (x, y); scores (B, K) float32; num_valid (B,) int64.
    """

    keypoints: Tensor
    scores: Tensor
    num_valid: Tensor


def detect(
    score_map: Tensor,
    max_keypoints: int,
    score_threshold: float | None = None,
    num_rounds: int = ROUNDS,
    spread_cell_px: int | None = None,
    suppress: Callable[[Tensor, int], Tensor] | None = None,
) -> Detections:
    """The `max_keypoints` strongest peaks of each (B, 1, H, W) score map, those above the threshold if there is one.

    With `spread_cell_px` they are taken from the cells of the image in turn, among several times as many.
    `suppress`, a form of `suppress_non_maxima`, keeps all shapes fixed; without it the CPU looks at few pixels only.
    Differentiable with respect to the score map through the sub-pixel places and the scores read there.
    """
    score_map = score_map.contiguous()
    width = score_map.shape[3]
    minimum = score_threshold or 0.0
    num_candidates = max_keypoints * (1 if spread_cell_px is None else CANDIDATES_PER_KEYPOINT)
    detached = score_map.detach()
    if score_map.device.type == "cpu" and suppress is None:
        images = [strongest_peaks(image[0], num_candidates, minimum, num_rounds) for image in detached]
        peak_scores, indices = (torch.stack(parts) for parts in zip(*images, strict=True))
    else:
        peaks = clear_border((suppress or suppress_non_maxima)(detached, num_rounds)).flatten(1)
        peaks = functional.pad(peaks, (0, max(0, num_candidates - peaks.shape[1])))
        peak_scores, indices = peaks.topk(num_candidates)
    if spread_cell_px is not None:
        order = _spread(indices, peak_scores > minimum, width, spread_cell_px)[:, :max_keypoints]
        peak_scores, indices = peak_scores.gather(1, order), indices.gather(1, order)
    is_valid = peak_scores > minimum
    # Padding rows refine the first pixel that has a whole window, so that no row reads outside the map.
    indices = torch.where(is_valid, indices, RADIUS * width + RADIUS)
    keypoints = refine(score_map, indices)
    scores = sample_scores(score_map, keypoints)
    keypoints = torch.where(is_valid.unsqueeze(-1), keypoints, 0.0)
    return Detections(keypoints, torch.where(is_valid, scores, 0.0), is_valid.sum(1))


def _spread(indices: Tensor, is_valid: Tensor, width: int, cell_px: int) -> Tensor:
    """Order (B, M) of flat indices (B, M): cells take turns, and what is not valid comes last."""
    pixels = torch.stack((indices % width, torch.div(indices, width, rounding_mode="floor")), dim=-1)
    return spread_order(pixels.float(), cell_px, is_valid)


def suppress_non_maxima(score_map: Tensor, num_rounds: int = ROUNDS) -> Tensor:
    """(B, 1, H, W) scores with zeros everywhere but at maxima of their window.

    The first round keeps local maxima. Each further round sets their windows aside and keeps what is then largest in
    its own window: weaker peaks on the flank of a strong one survive.
    """
    is_maximum = score_map == window_maximum(score_map)
    for _ in range(num_rounds - 1):
        is_near = window_maximum(is_maximum.view(torch.uint8)).view(torch.bool)
        remaining = score_map.masked_fill(is_near, 0.0)
        is_maximum |= (remaining == window_maximum(remaining)) & ~is_near
    return score_map * is_maximum


def clear_border(score_map: Tensor) -> Tensor:
    """Zeros within RADIUS px of the border, where the soft-argmax window would leave the map."""
    inner = score_map[..., RADIUS:-RADIUS, RADIUS:-RADIUS]
    return functional.pad(inner, (RADIUS, RADIUS, RADIUS, RADIUS))


def strongest_peaks(
    scores: Tensor, max_keypoints: int, minimum: float, num_rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Scores (K,) and flat indices (K,) of the strongest peaks of one map (H, W), zeros where there are fewer.

    The same peaks as the `max_keypoints` largest of `suppress_non_maxima`, in less time: whether a pixel survives
    depends on larger scores only, and every local maximum survives. So the K-th largest local maximum bounds what can
    be among the K strongest, and the rounds after the first look at the few pixels above that bound.
    """
    is_maximum = scores == window_maximum(scores[None, None])[0, 0]
    values, indices = _largest(scores, is_maximum, max_keypoints)
    bound = max(minimum, float(values[-1])) if len(values) == max_keypoints else minimum
    is_maximum &= scores >= bound
    candidates = (scores >= bound).flatten().nonzero()[:, 0]
    for _ in range(num_rounds - 1):
        is_near = window_maximum(is_maximum.view(torch.uint8)[None, None])[0, 0].view(torch.bool)
        candidates = candidates[~is_near.flatten()[candidates]]
        is_largest = scores.flatten()[candidates] == _largest_neighbour(scores, is_near, candidates)
        is_maximum.view(-1)[candidates[is_largest]] = True
    if num_rounds > 1:
        values, indices = _largest(scores, is_maximum, max_keypoints)
    missing = (0, max_keypoints - len(values))
    return functional.pad(values, missing), functional.pad(indices, missing)


def _largest(scores: Tensor, mask: Tensor, max_keypoints: int) -> tuple[Tensor, Tensor]:
    """Scores and flat indices of the at most `max_keypoints` largest pixels of a mask (H, W) inside the border."""
    width = scores.shape[1]
    inner = mask[RADIUS:-RADIUS, RADIUS:-RADIUS].flatten().nonzero()[:, 0]
    rows = torch.div(inner, width - 2 * RADIUS, rounding_mode="floor")
    indices = inner + (rows * 2 * RADIUS + RADIUS * (width + 1))
    values, order = scores.flatten()[indices].topk(min(max_keypoints, len(indices)))
    return values, indices[order]


def _largest_neighbour(scores: Tensor, is_near: Tensor, pixels: Tensor) -> Tensor:
    """Largest score (N,) in the windows of flat pixels (N,) of a map (H, W), scores set aside counting as zero."""
    height, width = scores.shape
    steps = torch.arange(-RADIUS, RADIUS + 1, device=scores.device)
    rows = (torch.div(pixels, width, rounding_mode="floor").unsqueeze(1) + steps).clamp_(0, height - 1)
    columns = ((pixels % width).unsqueeze(1) + steps).clamp_(0, width - 1)
    window = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1)
    values = scores.flatten()[window].masked_fill_(is_near.flatten()[window], 0.0)
    return values.amax(1)


def window_maximum(maps: Tensor) -> Tensor:
    """Maximum over the 5x5 window around each pixel of (B, 1, H, W); nothing counts outside the map.

    Three comparisons with shifted copies per axis: on the CPU ten times faster than max pooling.
    """
    return _maximum_of_five(_maximum_of_five(maps, 3), 2)


def _maximum_of_five(maps: Tensor, dim: int) -> Tensor:
    size = maps.shape[dim]
    lowest = 0 if maps.dtype == torch.uint8 else -math.inf
    padding = (RADIUS, RADIUS) if dim == 3 else (0, 0, RADIUS, RADIUS)
    padded = functional.pad(maps, padding, value=lowest)
    pairs = torch.maximum(padded.narrow(dim, 0, size + 3), padded.narrow(dim, 1, size + 3))
    fours = torch.maximum(pairs.narrow(dim, 0, size), pairs.narrow(dim, 2, size))
    return torch.maximum(fours, padded.narrow(dim, 4, size))


def refine(score_map: Tensor, indices: Tensor) -> Tensor:
    """Sub-pixel places (B, K, 2) px by soft-argmax around the flat indices (B, K); ALIKE equation 5."""
    width = score_map.shape[3]
    steps = torch.arange(-RADIUS, RADIUS + 1, device=score_map.device)
    window = (steps.unsqueeze(1) * width + steps).flatten()
    values = score_map.flatten(1).gather(1, (indices.unsqueeze(-1) + window).flatten(1))
    weights = functional.softmax(values.view(*indices.shape, -1) / TEMPERATURE, dim=-1)
    steps_xy = torch.stack((steps.repeat(len(steps)), steps.repeat_interleave(len(steps))), dim=-1)
    pixels = torch.stack((indices % width, indices // width), dim=-1)
    return pixels + weights @ steps_xy.to(weights.dtype)


def sample_scores(score_map: Tensor, keypoints: Tensor) -> Tensor:
    """Scores (B, K), bilinear at keypoints (B, K, 2) px of (B, 1, H, W)."""
    height, width = score_map.shape[2:]
    grid = keypoints * per_axis(keypoints, 2 / (width - 1), 2 / (height - 1)) - 1
    return functional.grid_sample(score_map, grid.unsqueeze(1), align_corners=True)[:, 0, 0]
