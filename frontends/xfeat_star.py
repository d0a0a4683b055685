"""XFeat*, semi-dense: matches thousands of cells of two images and refines every match to the pixel.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024, section 3.3. The scales are the
paper's; the published code has 0.6 for the smaller one. Coordinates follow the published code: a cell stands for its
top-left pixel, and sizes are multiplied without minding pixel centres.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from frontends.base import Features, Matches, WeightsError, check_settings, resized_shape, setting, to_full_resolution
from frontends.followed_points import FollowingConfig
from frontends.xfeat import check_image, gray_batch, keep_freed_memory, picked_precision, resized_to_stride
from frontends.xfeat_network import CELL_PX, DESCRIPTOR_DIM, checkpoint_tensor, fold_batch_norm, load_network

# Inverse temperature of the distribution over the pixels of a cell.
SHARPNESS = 3.0
# The published fine matcher's; ours was trained for minutes and spreads its probability over more pixels.
PUBLISHED_MIN_CONFIDENCE = 0.25
OUR_MIN_CONFIDENCE = 0.05
_COARSE_SHARE = 0.2
# Rows of the similarity matrix that are in memory at a time: 40 MB at 10000 cells.
_ROWS_AT_A_TIME = 1024
_HIDDEN = 512


@dataclass(frozen=True, slots=True)
class XFeatStarConfig:
    """XFeat*: how many cells, at which two scales, and how sure a refined match has to be."""

    name: Literal["xfeat-star"] = "xfeat-star"
    max_keypoints: int = setting(
        10_000, minimum=10, maximum=40_000, help="most reliable cells of an image, both scales"
    )
    small_scale: float = setting(0.65, minimum=0.1, maximum=1.0, help="size ratio that a fifth of the cells comes from")
    large_scale: float = setting(1.3, minimum=0.5, maximum=4.0, help="size ratio that the other cells come from")
    min_confidence: float | None = setting(
        None,
        minimum=0.0,
        maximum=1.0,
        help="probability of the best pixel, to exceed; none: what suits the fine matcher",
    )
    max_side: int | None = setting(None, minimum=64, help="larger images are shrunk to this longer side, px")
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16"), help="of the backbone's arithmetic")
    weights: str | None = setting(None, help="file of weights; none takes those of the registry")
    following: FollowingConfig = field(default_factory=FollowingConfig)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The most reliable cells of an image at both scales.

    keypoints (N, 2) px of the image, descriptors (N, 64) as the network gives them, pixel_sizes (N,): px of the image
    for one px of the scale a cell comes from.
    """

    keypoints: Tensor
    descriptors: Tensor
    pixel_sizes: Tensor


class XFeatStar:
    """Matches two images; holds the network and its fine matcher on one device.

    Raises WeightsError when the state dict is not one of XFeat, or lacks the fine matcher.
    """

    def __init__(
        self, config: XFeatStarConfig, state_dict: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._network = load_network(state_dict, self.device, picked_precision(config.precision))
        self._fine_matcher = load_fine_matcher(state_dict, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def kind(self) -> str:
        return self.config.name

    @property
    def precision(self) -> str:
        """Precision of the backbone, for the summary of a run."""
        return str(self._network.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def match_images(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> tuple[Features, Features, Matches]:
        """Matched keypoints of both images: row i of one belongs to row i of the other.

        Keypoints of image 0 are refined within their cells, those of image 1 are corners of cells. Scores are the
        probability of the best pixel. Images as for `XFeat.extract`, and ValueError as there.
        """
        cells0, cells1 = self.cells(image0), self.cells(image1)
        rows0, rows1 = mutual_nearest(cells0.descriptors, cells1.descriptors)
        descriptors0, descriptors1 = cells0.descriptors[rows0], cells1.descriptors[rows1]
        offsets, confidence = refine(self._fine_matcher(torch.cat((descriptors0, descriptors1), dim=1)))
        refined = cells0.keypoints[rows0] + offsets * cells0.pixel_sizes[rows0, None]
        limit = PUBLISHED_MIN_CONFIDENCE if self.config.min_confidence is None else self.config.min_confidence
        kept = (confidence > limit).nonzero()[:, 0]
        num_matches, scores = len(kept), confidence[kept]
        features0 = self._features(image0, refined[kept], descriptors0[kept], scores)
        features1 = self._features(image1, cells1.keypoints[rows1][kept], descriptors1[kept], scores)
        indices = np.repeat(np.arange(num_matches, dtype=np.int64)[:, None], 2, axis=1)
        matches = Matches(indices, scores.cpu().numpy(), 0, len(cells0.keypoints), len(cells1.keypoints))
        return features0, features1, matches

    @torch.inference_mode()
    def seeds(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The cells of the larger scale (N, 2) px, most reliable first."""
        cells = self.cells(image)
        is_large = cells.pixel_sizes == cells.pixel_sizes.min()
        keypoints: NDArray[np.float32] = cells.keypoints[is_large].cpu().numpy().astype(np.float32)
        return keypoints

    def cells(self, image: NDArray[np.uint8]) -> Cells:
        """The most reliable cells of an image, a fifth of them from the smaller scale."""
        full = check_image(image)
        resized = resized_shape(*full, self.config.max_side)
        if resized != full:
            image = np.asarray(cv2.resize(image, resized, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        gray = gray_batch(image, self.device)
        num_small = int(_COARSE_SHARE * self.config.max_keypoints)
        small = self._cells_at(gray, self.config.small_scale, num_small)
        large = self._cells_at(gray, self.config.large_scale, self.config.max_keypoints - num_small)
        keypoints = to_full_resolution(torch.cat((small.keypoints, large.keypoints)), resized, full)
        pixel_sizes = torch.cat((small.pixel_sizes, large.pixel_sizes)) * (full[0] / resized[0])
        return Cells(keypoints, torch.cat((small.descriptors, large.descriptors)), pixel_sizes)

    def _cells_at(self, gray: Tensor, scale: float, num_cells: int) -> Cells:
        scaled = F.interpolate(gray, scale_factor=scale, mode="bilinear", align_corners=False)
        network_input = resized_to_stride(scaled)
        maps = self._network(network_input)
        height, width = maps.reliability.shape[1:]
        best = maps.reliability.flatten().topk(min(num_cells, height * width)).indices
        corners = torch.stack((best % width, best // width), dim=1) * CELL_PX
        ratio = gray.new_tensor([a / b for a, b in zip(scaled.shape[:1:-1], network_input.shape[:1:-1], strict=True)])
        descriptors = maps.descriptors.reshape(-1, DESCRIPTOR_DIM)[best]
        return Cells(corners * ratio / scale, descriptors, torch.full_like(descriptors[:, 0], 1 / scale))

    def _features(self, image: NDArray[np.uint8], keypoints: Tensor, descriptors: Tensor, scores: Tensor) -> Features:
        padding = (0, 0, 0, self.config.max_keypoints - len(keypoints))
        return Features(
            F.pad(keypoints, padding),
            F.pad(scores, padding[2:]),
            F.pad(F.normalize(descriptors, dim=1), padding),
            len(keypoints),
            (image.shape[1], image.shape[0]),
            self.kind,
        )


def mutual_nearest(descriptors0: Tensor, descriptors1: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M,) and (M,) of (N0, D) and (N1, D) that have the largest product with each other, in order of the first.

    The matrix of products is never in memory as a whole. Of equal ones, the first counts.
    """
    best1 = torch.empty(len(descriptors0), dtype=torch.long, device=descriptors0.device)
    largest = descriptors1.new_full((len(descriptors1),), -torch.inf)
    best0 = torch.zeros(len(descriptors1), dtype=torch.long, device=descriptors0.device)
    for start in range(0, len(descriptors0), _ROWS_AT_A_TIME):
        products = descriptors0[start : start + _ROWS_AT_A_TIME] @ descriptors1.T
        best1[start : start + _ROWS_AT_A_TIME] = products.argmax(dim=1)
        of_columns = products.max(dim=0)
        is_larger = of_columns.values > largest
        largest = torch.where(is_larger, of_columns.values, largest)
        best0 = torch.where(is_larger, of_columns.indices + start, best0)
    rows0 = torch.arange(len(descriptors0), device=descriptors0.device)
    rows0 = rows0[best0[best1] == rows0]
    return rows0, best1[rows0]


def refine(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (N, 2) px within a cell and confidences (N,), of logits (N, 64) over its pixels, row by row.

    The offset is the mean of the distribution, counted from the pixel at (4, 4); the confidence its largest value.
    """
    probabilities = (SHARPNESS * logits).softmax(dim=1)
    steps = torch.arange(CELL_PX, device=logits.device, dtype=logits.dtype) - CELL_PX // 2
    grid = probabilities.view(-1, CELL_PX, CELL_PX)
    return torch.stack((grid.sum(dim=1) @ steps, grid.sum(dim=2) @ steps), dim=1), probabilities.amax(dim=1)


def has_fine_matcher(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these weights can refine: the published file can, the folded backbone alone cannot."""
    return "fine_matcher.0.weight" in state_dict


def load_fine_matcher(state_dict: Mapping[str, Tensor], device: torch.device) -> nn.Sequential:
    """The perceptron (N, 128) -> (N, 64) that refines a match, with BatchNorm folded. Raises WeightsError."""
    if not has_fine_matcher(state_dict):
        raise WeightsError(
            "these weights for XFeat lack the fine matcher that xfeat-star needs; give the published file, xfeat.pt "
            "(`vo weights fetch xfeat`, or its path in the setting `weights`), or train one: tools/train_xfeat_star.py"
        )
    sizes = (2 * DESCRIPTOR_DIM, *(_HIDDEN,) * 4, CELL_PX**2)
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        # Every layer but the last is followed by BatchNorm and ReLU.
        name, layer = f"fine_matcher.{3 * index}", nn.Linear(inputs, outputs)
        weight = checkpoint_tensor(state_dict, f"{name}.weight", (outputs, inputs))
        bias = checkpoint_tensor(state_dict, f"{name}.bias", (outputs,))
        is_last = outputs == CELL_PX**2
        if not is_last:
            weight, bias = fold_batch_norm(state_dict, f"fine_matcher.{3 * index + 1}", weight, bias)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer] if is_last else [layer, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers).eval().requires_grad_(False).to(device)
