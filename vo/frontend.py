"""The networks of a run: which device they run on, which weights they use, and what takes their place without any."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frontends.aliked import Aliked, AlikedConfig
from frontends.base import Extractor, Matcher
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.nearest import Nearest
from frontends.weights import load_state_dict, weights_entry
from vo.config import FrontendConfig
from vo.summary import UsedWeights
from vo.types import ConfigError


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


def create_frontend(config: FrontendConfig, device: torch.device, *, falls_back_to_orb: bool = False) -> Frontend:
    """Loads the networks. Raises WeightsError where their weights cannot be had."""
    weights = []
    assert isinstance(config.extractor, AlikedConfig)
    state_dict, file = load_state_dict(f"aliked-{config.extractor.variant}", config.extractor.weights)
    weights.append(UsedWeights(file.name, file.sha256))
    extractor = Aliked(config.extractor, state_dict, device)
    if isinstance(config.matcher, LightGlueConfig):
        name = f"lightglue-light-{extractor.kind}"
        state_dict, file = load_state_dict(name, config.matcher.weights)
        weights.append(UsedWeights(file.name, file.sha256))
        matcher = LightGlue(config.matcher, state_dict, device, name=name, fits=weights_entry(name).fits)
    else:
        matcher = Nearest(config.matcher)
    return Frontend(
        extractor, matcher, f"{extractor.kind} + {config.matcher.name}", device_name(device), tuple(weights)
    )
