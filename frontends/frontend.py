"""From a configuration to an extractor or a matcher with its weights: the one place that knows every method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frontends.aliked import Aliked, AlikedConfig
from frontends.base import Extractor, Matcher, PairMatcher, WeightsError
from frontends.followed_points import Followed, FollowedConfig, PointFollower
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.loftr import Loftr, LoftrConfig, load_network, random_network
from frontends.nearest import Nearest, NearestConfig
from frontends.orb import Orb, OrbConfig
from frontends.r2d2 import R2d2, R2d2Config
from frontends.weights import WeightsFile, load_checkpoint, load_extractor_weights, load_file, load_state_dict
from frontends.weights_registry import REGISTRY
from frontends.xfeat import XFeat, XFeatConfig
from frontends.xfeat_star import OUR_MIN_CONFIDENCE, XFeatStar, XFeatStarConfig, has_fine_matcher

ImageExtractorConfig = AlikedConfig | XFeatConfig | R2d2Config | OrbConfig
PairMatcherConfig = XFeatStarConfig | LoftrConfig
# A matcher of images takes the extractor's place: its points are followed from image to image.
ExtractorConfig = ImageExtractorConfig | PairMatcherConfig
MatcherConfig = LightGlueConfig | NearestConfig | FollowedConfig

_OUR_R2D2 = (
    "runs on our own small network, r2d2-small; the published ones, for non-commercial use only, are given by their "
    "path in the setting `weights`"
)
_OUR_FINE_MATCHER = (
    "refines with our own small fine matcher, xfeat-star-fine, because the weights at hand come without; the published "
    "one is in xfeat.pt"
)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedExtractor:
    """An extractor and the file its weights came from; None for one without weights.

    remark  what the summary of a run has to say of it, None where there is nothing.
    second  the file of what the first one lacks, where it lacks something.
    """

    extractor: Extractor
    weights: WeightsFile | None
    remark: str | None = None
    second: WeightsFile | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedMatcher:
    """A matcher and the file its weights came from; None for one without weights."""

    matcher: Matcher
    weights: WeightsFile | None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPairMatcher:
    """A matcher of images and the file its weights came from; see `LoadedExtractor`."""

    matcher: PairMatcher
    weights: WeightsFile | None
    remark: str | None = None
    second: WeightsFile | None = None


def create_extractor(config: ExtractorConfig, device: torch.device) -> LoadedExtractor:
    """The extractor of a configuration, on the device; ORB stays on the CPU. Raises WeightsError."""
    match config:
        case AlikedConfig():
            state_dict, file, remark = load_extractor_weights(f"aliked-{config.variant}", config.weights)
            return LoadedExtractor(Aliked(config, state_dict, device), file, remark)
        case XFeatConfig():
            state_dict, file, remark = load_extractor_weights("xfeat", config.weights)
            return LoadedExtractor(XFeat(config, state_dict, device), file, remark)
        case R2d2Config():
            loaded, file = load_checkpoint("r2d2-small" if config.weights is None else "r2d2", config.weights)
            remark = _OUR_R2D2 if config.weights is None else None
            return LoadedExtractor(R2d2(config, loaded.constructor, loaded.state_dict, device), file, remark)
        case OrbConfig():
            return LoadedExtractor(Orb(config), None)
        case XFeatStarConfig() | LoftrConfig():
            pair = create_pair_matcher(config, device)
            return LoadedExtractor(
                PointFollower(pair.matcher, config.following), pair.weights, pair.remark, pair.second
            )


def create_matcher(config: MatcherConfig, extractor_kind: str, device: torch.device) -> LoadedMatcher:
    """The matcher of a configuration for features of one kind, on the device.

    Raises WeightsError, naming both, for features that the weights of the matcher were not made for.
    """
    match config:
        case NearestConfig():
            return LoadedMatcher(Nearest(config), None)
        case LightGlueConfig():
            return _lightglue(config, extractor_kind, device)
        case FollowedConfig():
            return LoadedMatcher(Followed(config), None)


def create_pair_matcher(config: PairMatcherConfig, device: torch.device) -> LoadedPairMatcher:
    """The matcher of images of a configuration, on the device. Raises WeightsError; VoError where kornia is missing."""
    match config:
        case XFeatStarConfig():
            state_dict, file = load_state_dict("xfeat", config.weights)
            if config.weights is not None or has_fine_matcher(state_dict):
                return LoadedPairMatcher(XFeatStar(config, state_dict, device), file)
            own, fine_file = load_state_dict("xfeat-star-fine")
            if config.min_confidence is None:
                config = replace(config, min_confidence=OUR_MIN_CONFIDENCE)
            matcher = XFeatStar(config, {**state_dict, **_widened(own)}, device)
            return LoadedPairMatcher(matcher, file, _OUR_FINE_MATCHER, fine_file)
        case LoftrConfig(weights="random"):
            remark = "random weights take the place of trained ones, as `weights: random` asks: matches mean nothing"
            return LoadedPairMatcher(Loftr(config, random_network(config, device), device), None, remark)
        case LoftrConfig():
            loaded, file = load_checkpoint("loftr", config.weights)
            return LoadedPairMatcher(Loftr(config, load_network(config, loaded.state_dict, device), device), file)


def _lightglue(config: LightGlueConfig, extractor_kind: str, device: torch.device) -> LoadedMatcher:
    if extractor_kind == OrbConfig().name:
        raise WeightsError(
            "lightglue cannot match orb features, whose descriptors are binary; set the matcher to nearest"
        )
    if config.weights is None:
        state_dict, file = load_state_dict(matcher_weights(extractor_kind))
    else:
        state_dict, file = load_file(config.weights)
    fits = next((entry.fits for entry in REGISTRY if entry.name == file.name and file.is_verified), ())
    matcher = LightGlue(config, state_dict, device, name=file.name, fits=fits)
    matcher.check_fit(extractor_kind)
    return LoadedMatcher(matcher, file)


def _widened(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packaged tensors, stored in float16, in float32."""
    return {name: tensor.float() for name, tensor in state_dict.items()}


def matcher_weights(extractor_kind: str) -> str:
    """Name of the weights for features of a kind, ours before others. WeightsError if there are none."""
    fitting = [entry for entry in REGISTRY if entry.role == "matcher" and extractor_kind in entry.fits]
    if not fitting:
        kinds = dict.fromkeys(kind for entry in REGISTRY if entry.role == "matcher" for kind in entry.fits)
        raise WeightsError(
            f"lightglue has no weights for {extractor_kind} features, only for {', '.join(kinds)}; "
            "set the matcher to nearest, or give it a file of weights"
        )
    return sorted(fitting, key=lambda entry: not entry.is_ours)[0].name
