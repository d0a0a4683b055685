"""LightGlue learned on the features of a frozen extractor: stage 1 the assignment, stage 2 the confidence heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from frontends.base import check_settings, setting
from frontends.lightglue_network import LightGlueNetwork, normalize_keypoints
from frontends.training.extraction import BatchExtractor, BatchFeatures
from frontends.training.labels import MatchLabels, match_labels, match_score
from frontends.training.lightglue_losses import (
    LightGlueInputs,
    confidence_loss,
    decisions,
    deep_supervision_loss,
    layer_assignments,
)
from frontends.training.pair_sources import Pairs, PairSource
from frontends.training.trainer import Draws
from frontends.training.validation import HeldOutPairs, VideoPairs, mutual_nearest


@dataclass(frozen=True, slots=True)
class MatchingTaskConfig:
    """Pairs of a batch, how many keypoints, how often the same images are used."""

    batch_size: int = setting(32, minimum=1, help="pairs of one batch")
    keypoints: int = setting(512, minimum=8, help="of each image of a step")
    spare: float = setting(1.5, minimum=1.0, help="times as many are extracted, so that subsets can be drawn")
    random_share: float = setting(0.3, minimum=0.0, maximum=1.0, help="of images with random instead of best ones")
    reuse: int = setting(4, minimum=1, help="steps in a row with the same images and other subsets of keypoints")
    num_checked: int = setting(48, minimum=1, help="held-out pairs")
    trains_confidence_only: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True, eq=False)
class _Extracted:
    """Features of one batch of pairs, kept for the steps that use it again."""

    key: tuple[int, int, int, int]
    features0: BatchFeatures
    features1: BatchFeatures
    pairs: Pairs


class LightGlueTask:
    """A LightGlue network on features of an extractor, for `Trainer`."""

    def __init__(
        self,
        network: LightGlueNetwork,
        extract: BatchExtractor,
        source: PairSource,
        held_out: PairSource,
        videos: Sequence[VideoPairs],
        config: MatchingTaskConfig,
    ) -> None:
        self.network: LightGlueNetwork = network
        self._extract, self._source, self._config, self._videos = extract, source, config, videos
        self._kept: _Extracted | None = None
        if config.trains_confidence_only:
            network.requires_grad_(False)
            network.token_confidence.requires_grad_(True)
        held = HeldOutPairs.make(held_out, config.num_checked)
        self._size = held.pairs.size
        self._checked = held.features(extract, config.keypoints)
        self._labels = held.labels(*self._checked)

    def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
        kept = self._pairs(draws)
        generator = draws.generator(self._source.device)
        return self._subset(kept, generator)

    def _pairs(self, draws: Draws) -> _Extracted:
        """The features of this step: those of the step before, or new ones every `reuse` steps."""
        config = self._config
        key = (draws.seed, draws.step // config.reuse, draws.part, draws.rank)
        if self._kept is None or self._kept.key != key:
            pairs = self._source(config.batch_size, draws.generator(self._source.device, every=config.reuse))
            count = round(config.spare * config.keypoints)
            features0, features1 = (self._extract(images, count) for images in (pairs.images0, pairs.images1))
            self._kept = _Extracted(key, features0, features1, pairs)
        return self._kept

    def _subset(self, kept: _Extracted, generator: torch.Generator) -> dict[str, Tensor]:
        """`keypoints` rows of either image, the best or random ones, in random order, with their labels."""
        rows0, rows1 = (self._chosen_rows(f.valid.shape, generator) for f in (kept.features0, kept.features1))
        one, two = kept.features0.rows(rows0), kept.features1.rows(rows1)
        batch = {
            "descriptors0": one.descriptors,
            "descriptors1": two.descriptors,
            "keypoints0": one.keypoints,
            "keypoints1": two.keypoints,
            "valid0": one.valid,
            "valid1": two.valid,
        }
        labels = match_labels(kept.pairs, one.keypoints, two.keypoints, one.valid, two.valid)
        return {**batch, "partner0": labels.partner0, "partner1": labels.partner1}

    def _chosen_rows(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        count, available = self._config.keypoints, shape[1]
        noise = torch.rand(shape, generator=generator, device=generator.device)
        is_random = torch.rand((shape[0], 1), generator=generator, device=generator.device) < self._config.random_share
        ranks = torch.arange(available, device=generator.device)
        # The best come first unless the image draws at random; then their order is shuffled.
        kept = torch.where(is_random, noise, (ranks >= count) + noise / 2).argsort(dim=1)[:, :count]
        return kept

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        inputs = self._inputs(batch)
        labels = MatchLabels(batch["partner0"], batch["partner1"])
        assignments, states = layer_assignments(self.network, inputs)
        with torch.autocast(inputs.mask0.device.type, enabled=False):
            confidence = confidence_loss(self.network, states, assignments, inputs)
            if self._config.trains_confidence_only:
                return {"total": confidence}
            assignment = deep_supervision_loss(assignments, labels)
        return {"total": assignment + confidence, "assignment": assignment, "confidence": confidence}

    def _inputs(self, batch: dict[str, Tensor]) -> LightGlueInputs:
        size = self._size
        return LightGlueInputs(
            batch["descriptors0"],
            batch["descriptors1"],
            normalize_keypoints(batch["keypoints0"], size),
            normalize_keypoints(batch["keypoints1"], size),
            batch["valid0"],
            batch["valid1"],
        )

    def nearest_figures(self) -> dict[str, float]:
        """What mutual nearest neighbours reach on the held-out pairs: what the network has to beat."""
        score = match_score(mutual_nearest(*self._checked), self._labels)
        return {"precision": score.precision, "recall": score.recall}

    def validate(self, network: nn.Module) -> dict[str, float]:
        matcher = cast(LightGlueNetwork, network)
        score = match_score(self._matched(matcher, self._size, *self._checked), self._labels)
        figures = {"precision": score.precision, "recall": score.recall}
        for video in self._videos:
            size = video.images0.shape[3], video.images0.shape[2]
            matching = partial(self._matched, matcher, size)
            figures.update(video.figures(self._extract, self._config.keypoints, matching))
        return figures

    @torch.no_grad()
    def _matched(
        self, network: LightGlueNetwork, size: tuple[int, int], one: BatchFeatures, two: BatchFeatures
    ) -> Tensor:
        """Partners (B, M) by all layers, a few pairs at a time."""
        found = []
        for start in range(0, len(one.valid), 8):
            part = slice(start, start + 8)
            assignment = network(
                one.descriptors[part],
                two.descriptors[part],
                normalize_keypoints(one.keypoints[part], size),
                normalize_keypoints(two.keypoints[part], size),
                one.valid[part],
                two.valid[part],
            )
            found.append(decisions(assignment)[0])
        return torch.cat(found)
