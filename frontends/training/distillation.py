"""Students that imitate the published networks on photographs: same architecture, random start, own parameters.

What is matched is what comes out of the blocks and of the heads, never a parameter or the inside of a block; so the
student finds parameters of its own (the channels within a block are not even in the same order).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontends.aliked_detection import detect
from frontends.aliked_network import AlikedNetwork, DeformableConv2d
from frontends.base import check_settings, setting
from frontends.training.aliked_trainable import TrainingMaps, described, training_maps
from frontends.training.pairs_homography import MotionConfig, random_views
from frontends.training.photometry import PhotometryConfig, relit
from frontends.training.photos import PhotoBank, TrainingError
from frontends.training.tasks_features import Checks
from frontends.training.trainer import Draws
from frontends.training.xfeat_trainable import TrainableXFeat, XFeatTaps

GENTLE = PhotometryConfig(1.3, 0.1, 1.3, 1.1, 0.15, 0.02, 0.8, 5.0, 0.05, 0.2, 0.4)
VIEWS = MotionConfig(rotation_deg=15.0, spin=0.0, scale=1.5, shear=0.1, perspective=0.2, shift=0.05)


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """Views of one step and what counts how much."""

    side_px: int = setting(256, minimum=64, help="side of the views, a multiple of 32 px")
    batch_size: int = setting(4, minimum=1, help="views of one batch")
    keypoints: int = setting(96, minimum=1, help="the teacher's best, per view, whose descriptors are imitated")
    random_keypoints: int = setting(32, minimum=0, help="places anywhere, per view, likewise")
    stages: float = setting(1.0, minimum=0.0, help="weight of the block outputs")
    scores: float = setting(1.0, minimum=0.0, help="weight of the score map, or of keypoint logits")
    descriptors: float = setting(5.0, minimum=0.0, help="weight of the descriptors")
    apart: float = setting(0.35, minimum=0.0, maximum=1.0, help="share in which every block learns from true inputs")
    frozen_norms: float = setting(0.6, minimum=0.0, maximum=1.0, help="share after which batch norms hold still")

    def __post_init__(self) -> None:
        check_settings(self)


def drawn_views(bank: PhotoBank, config: DistillationConfig, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S): views of random photographs, relit."""
    photos = bank.draw(config.batch_size, generator)
    return relit(random_views(photos, config.side_px, generator, VIEWS), generator, GENTLE)


def stage_losses(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over the stages (B, C, h, w) of the squared error, every channel in units of the teacher's variance."""
    parts = []
    for mine, theirs in zip(student, teacher, strict=True):
        variance = theirs.float().var(dim=(0, 2, 3), keepdim=True)
        parts.append(((mine.float() - theirs.float()).square() / (variance + 1e-3 * variance.mean())).mean())
    return torch.stack(parts).mean()


def initialise(module: nn.Module) -> None:
    """Random parameters that let gradients through from the first step; deformations start at none."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        if isinstance(part, DeformableConv2d):
            nn.init.zeros_(part.offset_conv.weight)
    if isinstance(module, AlikedNetwork):
        weights = module.desc_head.agg_weights
        nn.init.normal_(weights, std=(weights.shape[0] * weights.shape[1]) ** -0.5)


def hold_norms(network: nn.Module) -> None:
    """Batch norms use what they have seen so far, as they will at inference, and no longer change."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def aliked_losses(
    student: AlikedNetwork,
    teacher: AlikedNetwork,
    images: Tensor,
    random_places: Tensor,
    config: DistillationConfig,
    *,
    is_apart: bool = False,
) -> dict[str, Tensor]:
    """How far the student is from the teacher on images (B, 3, S, S).

    random_places  (B, R, 2) px: where descriptors are compared besides the teacher's keypoints.
    is_apart       every block of the student reads what the teacher's block before it made.
    """
    # In float32 whatever the student works in: what it imitates is not to be rounded, nor are the places of keypoints.
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        theirs = training_maps(teacher, images)
        found = detect(theirs.score_map, config.keypoints)
        places = torch.cat((found.keypoints.clamp(2, images.shape[3] - 3), random_places), dim=1)
        their_descriptors = described(teacher, theirs, places)
    mine = training_maps(student, images, theirs.stages if is_apart else None)
    similarity = (described(student, mine, places).float() * their_descriptors).sum(dim=2)
    stages = stage_losses(mine.stages, theirs.stages)
    scores = score_loss(mine, theirs)
    descriptors = (1 - similarity).mean()
    total = config.stages * stages + config.scores * scores + config.descriptors * descriptors
    return {"total": total, "stages": stages, "scores": scores, "descriptors": descriptors}


def score_loss(student: TrainingMaps, teacher: TrainingMaps) -> Tensor:
    """Error of the score logits, in the teacher's deviations; where the teacher sees a keypoint it counts more."""
    theirs = teacher.score_logits.float()
    deviation = theirs.std().clamp(min=1e-3)
    weights = 1 + 20 * torch.sigmoid(theirs)
    error = F.smooth_l1_loss(student.score_logits.float() / deviation, theirs / deviation, reduction="none", beta=0.3)
    return (weights * error).sum() / weights.sum()


def xfeat_losses(student: XFeatTaps, teacher: XFeatTaps, config: DistillationConfig) -> dict[str, Tensor]:
    """How far the student's maps are from the teacher's."""
    mine, theirs = student.maps, teacher.maps
    stages = stage_losses(student.stages, teacher.stages)
    # The reliability head reads the lengths of the descriptors too.
    similarity = F.cosine_similarity(mine.descriptors.float(), theirs.descriptors.float(), dim=3)
    descriptors = (1 - similarity).mean()
    wanted = theirs.keypoint_logits.float().softmax(dim=3)
    divergence = F.kl_div(mine.keypoint_logits.float().log_softmax(dim=3), wanted, reduction="none").sum(dim=3)
    weights = 0.1 + (1 - wanted[..., -1])
    keypoints = (weights * divergence).sum() / weights.sum()
    reliability = (mine.reliability.float() - theirs.reliability.float()).abs().mean()
    total = config.stages * stages + config.scores * (keypoints + reliability) + config.descriptors * descriptors
    return {
        "total": total,
        "stages": stages,
        "keypoints": keypoints,
        "reliability": reliability,
        "descriptors": 1 - similarity.mean(),
    }


class AlikedDistillation:
    """The task of a student ALIKED, for `Trainer`."""

    def __init__(
        self,
        student: AlikedNetwork,
        teacher: AlikedNetwork,
        bank: PhotoBank,
        held_out: PhotoBank,
        config: DistillationConfig,
        checks: Checks,
    ) -> None:
        self.network: AlikedNetwork = student
        self._checks = checks
        self._teacher = teacher.eval().requires_grad_(False)
        self._bank, self._config = bank, config
        self._check = _fixed_views(held_out, config)

    def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
        generator = draws.generator(self._bank.pixels.device)
        images = drawn_views(self._bank, self._config, generator)
        return {"images": images, "places": _places(self._config, len(images), generator, images.device)}

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        if share > self._config.frozen_norms:
            hold_norms(self.network)
        config, is_apart = self._config, share < self._config.apart
        return aliked_losses(self.network, self._teacher, batch["images"], batch["places"], config, is_apart=is_apart)

    def validate(self, network: nn.Module) -> dict[str, float]:
        assert isinstance(network, AlikedNetwork)
        images = self._check
        generator = torch.Generator(images.device).manual_seed(1)
        places = _places(self._config, len(images), generator, images.device)
        losses = aliked_losses(network, self._teacher, images, places, self._config)
        theirs, mine = (detect(training_maps(n, images).score_map, 256) for n in (self._teacher, network))
        distances = torch.cdist(theirs.keypoints, mine.keypoints).amin(dim=2)
        return {
            "total": float(losses["total"]),
            "similarity": 1 - float(losses["descriptors"]),
            "same_keypoints": float((distances < 1.0).float().mean()),
            **self._checks.figures(network),
        }


class XFeatDistillation:
    """The task of a student XFeat, for `Trainer`."""

    def __init__(
        self,
        student: TrainableXFeat,
        teacher: TrainableXFeat,
        bank: PhotoBank,
        held_out: PhotoBank,
        config: DistillationConfig,
        checks: Checks,
    ) -> None:
        self.network: TrainableXFeat = student
        self._checks = checks
        self._teacher = teacher.eval().requires_grad_(False)
        self._bank, self._config = bank, config
        self._check = _fixed_views(held_out, config)

    def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
        generator = draws.generator(self._bank.pixels.device)
        return {"images": drawn_views(self._bank, self._config, generator)}

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        if share > self._config.frozen_norms:
            hold_norms(self.network)
        with torch.no_grad(), torch.autocast(batch["images"].device.type, enabled=False):
            theirs = self._teacher.taps(batch["images"])
        inputs = theirs.stages if share < self._config.apart else None
        return xfeat_losses(self.network.taps(batch["images"], inputs), theirs, self._config)

    def validate(self, network: nn.Module) -> dict[str, float]:
        assert isinstance(network, TrainableXFeat)
        mine, theirs = (n.taps(self._check) for n in (network, self._teacher))
        losses = xfeat_losses(mine, theirs, self._config)
        return {
            "total": float(losses["total"]),
            "similarity": 1 - float(losses["descriptors"]),
            "keypoints": float(losses["keypoints"]),
            "reliability": float(losses["reliability"]),
            **self._checks.figures(network),
        }


def _places(config: DistillationConfig, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    shape = (count, config.random_keypoints, 2)
    return 2 + torch.rand(shape, generator=generator, device=device) * (config.side_px - 5)


def _fixed_views(held_out: PhotoBank, config: DistillationConfig) -> Tensor:
    """Plain cut-outs of held-out photographs, always the same."""
    photos = held_out.first(24)
    if photos.shape[3] < config.side_px:
        raise TrainingError(
            f"photographs of {photos.shape[3]} px hold no views of {config.side_px} px; "
            "give a larger --photo-px or a smaller --side"
        )
    start = (photos.shape[3] - config.side_px) // 2
    return photos[:, :, start : start + config.side_px, start : start + config.side_px].contiguous()
