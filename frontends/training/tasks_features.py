"""ALIKED and XFeat learned from pairs alone, as their papers do, without a teacher of descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontends.aliked_detection import detect
from frontends.aliked_network import AlikedNetwork
from frontends.base import check_settings, setting
from frontends.training.aliked_losses import (
    AlikedLossConfig,
    peaky_loss,
    reliable_loss,
    reprojection_loss,
    sparse_nre_loss,
)
from frontends.training.aliked_trainable import described, training_maps
from frontends.training.extraction import extractor_of
from frontends.training.labels import match_labels
from frontends.training.pair_sources import Pairs, PairSource, as_tensors, from_tensors
from frontends.training.pairs_homography import pixel_grid, sampled
from frontends.training.trainer import Draws
from frontends.training.validation import HeldOutPairs, VideoPairs
from frontends.training.xfeat_losses import (
    dual_softmax_loss,
    fine_offset_loss,
    keypoint_classes,
    keypoint_loss,
    reliability_loss,
)
from frontends.training.xfeat_trainable import TrainableXFeat
from frontends.xfeat_network import CELL_PX


@dataclass(frozen=True, slots=True)
class PairTaskConfig:
    """What pairs are drawn, and what is measured on the held-out ones."""

    batch_size: int = setting(2, minimum=1, help="pairs of one batch")
    num_checked: int = setting(16, minimum=1, help="held-out pairs")
    checked_keypoints: int = setting(256, minimum=8, help="keypoints of each of their images")

    def __post_init__(self) -> None:
        check_settings(self)


class Checks:
    """The figures of an extractor on held-out pairs and on videos."""

    def __init__(self, held_out: PairSource, videos: Sequence[VideoPairs], config: PairTaskConfig) -> None:
        self._pairs = HeldOutPairs.make(held_out, config.num_checked)
        self._videos, self._count = videos, config.checked_keypoints

    def figures(self, network: nn.Module) -> dict[str, float]:
        extract = extractor_of(network)
        figures = self._pairs.figures(extract, self._count)
        for video in self._videos:
            figures.update(video.figures(extract, self._count))
        return figures


class AlikedTask:
    """ALIKED's four losses on pairs."""

    def __init__(
        self,
        network: AlikedNetwork,
        source: PairSource,
        checks: Checks,
        config: PairTaskConfig,
        weights: AlikedLossConfig | None = None,
    ) -> None:
        self.network: AlikedNetwork = network
        self._source, self._checks, self._config = source, checks, config
        self._weights = weights or AlikedLossConfig()

    def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
        generator = draws.generator(self._source.device)
        pairs = self._source(self._config.batch_size, generator)
        shape = (self._config.batch_size, self._weights.num_random, 2)
        size = torch.tensor(pairs.size, device=generator.device)
        return {
            **as_tensors(pairs),
            "places": 2 + torch.rand(shape, generator=generator, device=generator.device) * (size - 5),
        }

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        weights, pairs = self._weights, from_tensors(batch)
        count = len(pairs.images0)
        maps = training_maps(self.network, torch.cat((pairs.images0, pairs.images1)))
        with torch.autocast(pairs.images0.device.type, enabled=False):
            score_map = torch.sigmoid(maps.score_logits.float())
            found = detect(score_map, weights.num_detected, num_rounds=1)
        rows = torch.arange(weights.num_detected, device=score_map.device)
        valid = rows < found.num_valid[:, None]
        (keypoints0, keypoints1), (scores0, scores1), (valid0, valid1) = (
            values.chunk(2) for values in (found.keypoints, found.scores, valid)
        )
        labels = match_labels(
            pairs, keypoints0.detach(), keypoints1.detach(), valid0, valid1, match_px=weights.match_px
        )
        random_moved = pairs.transfer(0, batch["places"])
        is_random = random_moved.is_visible & random_moved.is_known
        there = torch.where(is_random[..., None], random_moved.points, batch["places"])
        places = torch.cat((torch.cat((keypoints0, batch["places"]), dim=1), torch.cat((keypoints1, there), dim=1)))
        descriptors = described(self.network, maps, places).float()
        numbers = weights.num_detected + torch.arange(weights.num_random, device=score_map.device)
        random_partner = torch.where(is_random, numbers, -1)
        partner0, partner1 = (
            torch.cat((partner, random_partner), dim=1) for partner in (labels.partner0, labels.partner1)
        )
        # The softmax divides similarities by a small temperature, and the rounding of bfloat16 with them.
        with torch.autocast(descriptors.device.type, enabled=False):
            similarity = descriptors[:count] @ descriptors[count:].mT
        moved0, moved1 = pairs.transfer(0, keypoints0).points, pairs.transfer(1, keypoints1).points
        reprojection, error, trust = [], [], []
        for b in range(count):
            own = (labels.partner0[b] >= 0).nonzero()[:, 0]
            other = labels.partner0[b][own]
            reprojection.append(
                reprojection_loss(keypoints0[b][own], keypoints1[b][other], moved0[b][own], moved1[b][other])
            )
            both = (similarity[b], similarity[b].mT), (partner0[b], partner1[b])
            for one, partner in zip(*both, strict=True):
                error.append(sparse_nre_loss(one, partner, weights.descriptor_temperature))
            detected = slice(0, weights.num_detected)
            square = similarity[b][detected, detected]
            temperature = weights.reliability_temperature
            trust.append(reliable_loss(square, labels.partner0[b], scores0[b], scores1[b], temperature))
            trust.append(reliable_loss(square.mT, labels.partner1[b], scores1[b], scores0[b], temperature))
        parts = {
            "reprojection": torch.stack(reprojection).mean(),
            "peaky": peaky_loss(score_map, found.keypoints, valid),
            "descriptors": torch.stack(error).mean(),
            "reliable": torch.stack(trust).mean(),
        }
        total = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
        return {"total": total, **parts}

    def validate(self, network: nn.Module) -> dict[str, float]:
        return self._checks.figures(network)


@dataclass(frozen=True, slots=True)
class XFeatLossConfig:
    """What counts how much in the training of XFeat."""

    descriptors: float = setting(1.0, minimum=0.0, help="weight of the dual softmax")
    reliability: float = setting(1.0, minimum=0.0, help="weight of the reliability")
    keypoints: float = setting(1.0, minimum=0.0, help="weight of the teacher's keypoints")
    fine: float = setting(1.0, minimum=0.0, help="weight of the offsets; 0 leaves the fine matcher alone")
    num_cells: int = setting(512, minimum=8, help="pairs of cells of one image pair at most")
    teacher_keypoints: int = setting(512, minimum=1, help="the teacher's best keypoints of an image")
    sharpness: float = setting(20.0, minimum=0.0, help="of the dual softmax, on descriptors of unit length")
    max_empty_ratio: float = setting(1.0, minimum=0.0, help="cells without a keypoint per cell with one")

    def __post_init__(self) -> None:
        check_settings(self)


class XFeatWithMatcher(nn.Module):
    """The backbone with the fine matcher of XFeat*; the state dict has the names of the published one."""

    def __init__(self, backbone: TrainableXFeat, matcher: nn.Sequential | None) -> None:
        super().__init__()
        self.backbone, self.matcher = backbone, matcher

    def published_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this module under the published names."""
        renamed = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        prefix = "matcher."
        return renamed | {f"fine_{key}": value for key, value in state.items() if key.startswith(prefix)}


class XFeatTask:
    """XFeat's losses on pairs; keypoints come from a teacher, any ALIKED."""

    def __init__(
        self,
        network: XFeatWithMatcher,
        teacher: AlikedNetwork,
        source: PairSource,
        checks: Checks,
        config: PairTaskConfig,
        weights: XFeatLossConfig | None = None,
    ) -> None:
        self.network: XFeatWithMatcher = network
        self._teacher = teacher.eval().requires_grad_(False)
        self._source, self._checks, self._config = source, checks, config
        self._weights = weights or XFeatLossConfig()

    def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
        generator = draws.generator(self._source.device)
        pairs = self._source(self._config.batch_size, generator)
        seed = torch.randint(2**31, (1,), generator=generator, device=generator.device)
        return {**as_tensors(pairs), "seed": seed}

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        weights, pairs = self._weights, from_tensors(batch)
        images = torch.cat((pairs.images0, pairs.images1))
        generator = torch.Generator(images.device).manual_seed(int(batch["seed"]))
        maps = self.network.backbone(images)
        descriptors, reliability = maps.descriptors.float(), maps.reliability.float()
        # Similarities are sharpened, and with them what bfloat16 rounds away.
        with torch.autocast(images.device.type, enabled=False):
            parts = _descriptor_losses(pairs, F.normalize(descriptors, dim=3), reliability, weights, generator)
            parts["keypoints"] = self._keypoint_loss(images, maps.keypoint_logits.float(), generator)
            if weights.fine > 0 and self.network.matcher is not None:
                parts["fine"] = _fine_loss(pairs, descriptors, self.network.matcher, weights, generator)
        total = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
        return {"total": total, **parts}

    def _keypoint_loss(self, images: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            found = detect(training_maps(self._teacher, images).score_map, self._weights.teacher_keypoints)
            valid = torch.arange(found.keypoints.shape[1], device=images.device) < found.num_valid[:, None]
            classes = keypoint_classes(found.keypoints, valid, (images.shape[3], images.shape[2]))
        return keypoint_loss(logits, classes, generator, self._weights.max_empty_ratio)

    def validate(self, network: nn.Module) -> dict[str, float]:
        return self._checks.figures(cast(XFeatWithMatcher, network).backbone)


def _descriptor_losses(
    pairs: Pairs, descriptors: Tensor, reliability: Tensor, weights: XFeatLossConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Dual softmax and reliability of cells of view 0 and the places that their centres move to; maps of 2 B images."""
    count = len(pairs.images0)
    height, width = reliability.shape[1:]
    centres = pixel_grid((width, height), reliability.device) * CELL_PX + (CELL_PX - 1) / 2
    moved = pairs.transfer(0, centres.expand(count, -1, -1))
    there = torch.where(moved.is_visible[..., None], moved.points, 0.0)
    cells = (there + 0.5) / CELL_PX - 0.5
    read1 = sampled(descriptors[count:].permute(0, 3, 1, 2), cells, padding="border").mT
    trust1 = sampled(reliability[count:, None], cells, padding="border")[:, 0]
    losses, trusts = [], []
    for b in range(count):
        chosen = (moved.is_visible & moved.is_known)[b].nonzero()[:, 0]
        order = torch.randperm(len(chosen), generator=generator, device=chosen.device)[: weights.num_cells]
        chosen = chosen[order]
        if len(chosen) < 2:
            continue
        one, two = descriptors[b].flatten(0, 1)[chosen], F.normalize(read1[b][chosen], dim=1)
        loss, confidence = dual_softmax_loss(one, two, weights.sharpness)
        losses.append(loss)
        trusts.append(reliability_loss(reliability[b].flatten()[chosen], trust1[b][chosen], confidence))
    if not losses:
        nothing = descriptors.sum() * 0.0 + reliability.sum() * 0.0
        return {"descriptors": nothing, "reliability": nothing}
    return {"descriptors": torch.stack(losses).mean(), "reliability": torch.stack(trusts).mean()}


def _fine_loss(
    pairs: Pairs,
    descriptors: Tensor,
    matcher: nn.Sequential,
    weights: XFeatLossConfig,
    generator: torch.Generator,
) -> Tensor:
    """Offsets of the corners of cells of view 1 within the cells of view 0 that show them, from -4 to 3 px."""
    count = len(pairs.images0)
    height, width = descriptors.shape[1:3]
    corners = pixel_grid((width, height), descriptors.device) * CELL_PX
    moved = pairs.transfer(1, corners.expand(count, -1, -1))
    points = torch.where(moved.is_visible[..., None], moved.points, -1.0).round().long()
    cells = torch.div(points + CELL_PX // 2, CELL_PX, rounding_mode="floor")
    offsets = points - CELL_PX * cells
    inside = ((cells >= 0) & (cells < points.new_tensor([width, height]))).all(dim=-1)
    images, numbers = (moved.is_visible & moved.is_known & inside).nonzero(as_tuple=True)
    order = torch.randperm(len(images), generator=generator, device=images.device)[: count * weights.num_cells]
    images, numbers = images[order], numbers[order]
    chosen, offset = cells[images, numbers], offsets[images, numbers]
    classes = (offset[:, 1] + CELL_PX // 2) * CELL_PX + offset[:, 0] + CELL_PX // 2
    one = descriptors[images, chosen[:, 1], chosen[:, 0]]
    two = descriptors[count:].flatten(1, 2)[images, numbers]
    if len(classes) < 2:
        return descriptors.sum() * 0.0
    return fine_offset_loss(matcher(torch.cat((one, two), dim=1)).float(), classes)
