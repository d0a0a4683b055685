"""The networks of a run: which device they run on, which weights they use, and what takes their place without any."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from frontends.aliked import Aliked, AlikedConfig
from frontends.base import Extractor, Matcher
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.nearest import Nearest, NearestConfig
from frontends.orb import Orb, OrbConfig
from frontends.weights import load_state_dict, weights_entry
from frontends.xfeat import XFeat, XFeatConfig
from vo.config import Config, FrontendConfig
from vo.summary import UsedWeights
from vo.types import ConfigError, WeightsError


@dataclass(frozen=True, slots=True, eq=False)
class Frontend:
    """An extractor and a matcher, ready to run.

    description  both by name.
    device_name  where they run.
    fallbacks    what was replaced by something else, one sentence each.
    """

    extractor: Extractor
    matcher: Matcher
    description: str
    device_name: str
    weights: tuple[UsedWeights, ...] = ()
    fallbacks: tuple[str, ...] = ()


def select_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises ConfigError in one line where a GPU is asked for and missing."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA: install a CUDA build"
    else:
        reason = "torch finds no NVIDIA GPU: check nvidia-smi"
    raise ConfigError(f"frontend.device: cuda is not available; {reason}, or use --device cpu")


def device_name(device: torch.device) -> str:
    """ "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def create_frontend(config: FrontendConfig, device: torch.device) -> Frontend:
    """Loads the networks. Raises WeightsError where their weights cannot be had."""
    weights: list[UsedWeights] = []
    match config.extractor:
        case AlikedConfig():
            state_dict, file = load_state_dict(f"aliked-{config.extractor.variant}", config.extractor.weights)
            weights.append(UsedWeights(file.name, file.sha256))
            extractor: Extractor = Aliked(config.extractor, state_dict, device)
        case XFeatConfig():
            state_dict, file = load_state_dict("xfeat", config.extractor.weights)
            weights.append(UsedWeights(file.name, file.sha256))
            extractor = XFeat(config.extractor, state_dict, device)
        case OrbConfig():
            extractor = Orb(config.extractor)
    match config.matcher:
        case LightGlueConfig():
            name = f"lightglue-light-{extractor.kind}"
            state_dict, file = load_state_dict(name, config.matcher.weights)
            weights.append(UsedWeights(file.name, file.sha256))
            matcher: Matcher = LightGlue(config.matcher, state_dict, device, name=name, fits=weights_entry(name).fits)
        case NearestConfig():
            matcher = Nearest(config.matcher)
    description = f"{extractor.kind} + {config.matcher.name}"
    return Frontend(extractor, matcher, description, device_name(device), tuple(weights))


def create_frontend_or_orb(config: Config, device: torch.device) -> tuple[Config, Frontend]:
    """Like `create_frontend`; where weights cannot be had, ORB takes the place of the networks.

    Returns the configuration in use.
    """
    try:
        return config, create_frontend(config.frontend, device)
    except WeightsError as error:
        without = replace(config.frontend, extractor=OrbConfig(), matcher=NearestConfig())
        frontend = create_frontend(without, device)
        fallback = f"ORB takes the place of {config.frontend.extractor.name} + {config.frontend.matcher.name}: {error}"
        return replace(config, frontend=without), replace(frontend, fallbacks=(fallback,))
