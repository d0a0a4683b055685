"""What is looked at during a training, always the same: pairs of held-out photographs, and real consecutive frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from frontends.training.extraction import BatchExtractor, BatchFeatures
from frontends.training.labels import MatchLabels, match_labels
from frontends.training.pair_sources import Pairs, PairSource
from frontends.training.photos import TrainingError

# Features of both sides -> the partner (B, M) of every keypoint of side 0, negative where there is none.
PairMatching = Callable[[BatchFeatures, BatchFeatures], Tensor]
_SUFFIXES = (".png", ".jpg", ".jpeg")


def mutual_nearest(features0: BatchFeatures, features1: BatchFeatures) -> Tensor:
    """The partner (B, M) int64 of every keypoint of side 0: its mutual nearest neighbour, or -1."""
    similarity = features0.descriptors @ features1.descriptors.mT
    invalid = ~(features0.valid[:, :, None] & features1.valid[:, None, :])
    similarity = similarity.masked_fill(invalid, -torch.inf)
    best0, best1 = similarity.max(dim=2), similarity.argmax(dim=1)
    rows = torch.arange(similarity.shape[1], device=similarity.device)
    is_mutual = (best1.gather(1, best0.indices) == rows) & torch.isfinite(best0.values)
    return torch.where(is_mutual, best0.indices, -1)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutPairs:
    """Pairs of held-out photographs with known correspondence."""

    pairs: Pairs

    @classmethod
    def make(cls, source: PairSource, count: int) -> HeldOutPairs:
        return cls(source(count, torch.Generator(source.device).manual_seed(1)))

    def features(self, extract: BatchExtractor, count: int) -> tuple[BatchFeatures, BatchFeatures]:
        return extract(self.pairs.images0, count), extract(self.pairs.images1, count)

    def labels(self, features0: BatchFeatures, features1: BatchFeatures) -> MatchLabels:
        return match_labels(self.pairs, features0.keypoints, features1.keypoints, features0.valid, features1.valid)

    def figures(self, extract: BatchExtractor, count: int, matching: PairMatching = mutual_nearest) -> dict[str, float]:
        """precision of the matches, and recall: right ones (3 px) per keypoint whose place the other view shows.

        So recall falls with keypoints that are not found again as well as with descriptors that do not tell them apart.
        """
        features0, features1 = self.features(extract, count)
        found = matching(features0, features1)
        moved = self.pairs.transfer(0, features0.keypoints)
        is_shown = moved.is_visible & moved.is_known & features0.valid
        there = features1.keypoints.gather(1, found.clamp(min=0)[..., None].expand(-1, -1, 2))
        distance = torch.linalg.vector_norm(torch.where(is_shown[..., None], moved.points, 0.0) - there, dim=-1)
        is_right = is_shown & (found >= 0) & (distance < 3.0)
        is_judged = (found >= 0) & moved.is_known
        return {
            "precision": float(is_right.sum()) / max(1.0, float(is_judged.sum())),
            "recall": float(is_right.sum()) / max(1.0, float(is_shown.sum())),
        }


@dataclass(frozen=True, slots=True, eq=False)
class VideoPairs:
    """Real frames that lie `gap` frames apart, (P, 3, H, W) in [0, 1] on both sides; nothing is trained on them."""

    images0: Tensor
    images1: Tensor
    gap: int

    def figures(self, extract: BatchExtractor, count: int, matching: PairMatching = mutual_nearest) -> dict[str, float]:
        """Mean number of matches that agree on one epipolar geometry (MAGSAC, 1 px), and their share."""
        features0, features1 = extract(self.images0, count), extract(self.images1, count)
        found = matching(features0, features1).cpu()
        inliers, shares = [], []
        for index in range(len(found)):
            rows = (found[index] >= 0).nonzero()[:, 0]
            points0 = features0.keypoints[index].cpu()[rows].double().numpy()
            points1 = features1.keypoints[index].cpu()[found[index][rows]].double().numpy()
            inliers.append(consensus(points0, points1))
            shares.append(inliers[-1] / max(1, len(rows)))
        prefix = f"gap{self.gap}"
        return {f"{prefix}_inliers": float(np.mean(inliers)), f"{prefix}_precision": float(np.mean(shares))}


def consensus(points0: np.ndarray, points1: np.ndarray) -> int:
    """How many of N correspondences (N, 2) px fit one fundamental matrix; 0 below 8."""
    if len(points0) < 8:
        return 0
    cv2.setRNGSeed(0)
    _, mask = cv2.findFundamentalMat(points0, points1, cv2.USAC_MAGSAC, 1.0, 0.999, 2000)
    return 0 if mask is None else int(np.count_nonzero(mask))


def load_video_pairs(
    folders: Sequence[Path], gaps: Sequence[int], num_pairs: int, size: tuple[int, int], device: torch.device
) -> list[VideoPairs]:
    """Pairs spread evenly over every folder of frames, in the order of their names, resized to (width, height) px.

    Raises TrainingError for a folder with fewer frames than the largest gap needs.
    """
    pairs = []
    for folder in folders:
        frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        if len(frames) <= max(gaps):
            raise TrainingError(f"{folder}: {len(frames)} frames; name a folder with more than {max(gaps)} images")
        for gap in gaps:
            starts = np.linspace(0, len(frames) - 1 - gap, num_pairs).round().astype(int)
            sides = [torch.stack([_frame(frames[start + step], size) for start in starts]) for step in (0, gap)]
            pairs.append(VideoPairs(sides[0].to(device), sides[1].to(device), gap))
    return pairs


def _frame(path: Path, size: tuple[int, int]) -> Tensor:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise TrainingError(f"{path}: cannot be read as an image; remove it from the folder")
    resized = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))).float() / 255
