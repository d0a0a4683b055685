"""The networks of a run: which device they run on, which weights they use, and what takes their place without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from frontends.base import DeviceError, Extractor, Matcher
from frontends.device_faults import device_faults
from frontends.engine import Engine, create_engine
from frontends.frontend import create_extractor, create_matcher
from frontends.nearest import NearestConfig
from frontends.orb import OrbConfig
from vo.config import Config, FrontendConfig
from vo.summary import UsedWeights
from vo.types import Camera, ConfigError, WeightsError


@dataclass(frozen=True, slots=True, eq=False)
class Frontend:
    """An extractor and a matcher, ready to run.

    description  both by name.
    device_name  where they run.
    fallbacks    what was replaced by something else, one sentence each.
    engine       what runs the two; `warm_up` it before the first frame, and read there what it chose.
    """

    extractor: Extractor
    matcher: Matcher
    description: str
    device_name: str
    weights: tuple[UsedWeights, ...] = ()
    fallbacks: tuple[str, ...] = ()
    engine: Engine | None = None


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
    """Loads the networks. Raises WeightsError where their weights cannot be had or do not fit each other."""
    extractor = create_extractor(config.extractor, device)
    matcher = create_matcher(config.matcher, extractor.extractor.kind, device)
    files = [file for file in (extractor.weights, extractor.second, matcher.weights) if file is not None]
    engine = create_engine(config.engine, extractor.extractor, matcher.matcher, device)
    return Frontend(
        engine.extractor,
        engine.matcher,
        f"{extractor.extractor.kind} + {config.matcher.name}",
        device_name(device),
        tuple(UsedWeights(file.name, file.sha256) for file in files),
        () if extractor.remark is None else (f"{config.extractor.name}: {extractor.remark}",),
        engine,
    )


def on_device(
    name: str, load: Callable[[torch.device], tuple[Config, Frontend]], camera: Camera
) -> tuple[Config, Frontend]:
    """A frontend that is loaded and warmed up for a camera, and the configuration in use.

    Where the device is "auto" and the GPU cannot run it, the CPU does, and the fallbacks say so. Raises DeviceError
    where that was not allowed, ConfigError for a GPU that is missing, and what `load` raises.
    """
    device = select_device(name)
    try:
        with device_faults():
            config, frontend = load(device)
            return config, warmed_up(frontend, device, camera)
    except DeviceError as error:
        if name != "auto" or device.type == "cpu":
            raise
        reason = str(error).removeprefix("frontend.device: ")
    config, frontend = load(torch.device("cpu"))
    return config, replace(frontend, fallbacks=(*frontend.fallbacks, f"the CPU takes the place of the GPU: {reason}"))


def warmed_up(
    frontend: Frontend, device: torch.device, camera: Camera, images: Sequence[NDArray[np.uint8]] = ()
) -> Frontend:
    """The same once everything that a first frame would have to wait for has been prepared. Raises DeviceError.

    images  consecutive ones of the camera, where there are some: what is chosen by measurement is measured on them.
    """
    is_static = False
    if frontend.engine is not None:
        channels = 1 if images and images[0].ndim == 2 else 3
        frontend.engine.warm_up(camera.width, camera.height, channels, images)
        is_static = frontend.engine.is_static
        # What could not be captured may have been replaced.
        frontend = replace(
            frontend,
            extractor=frontend.engine.extractor,
            matcher=frontend.engine.matcher,
            fallbacks=(*frontend.fallbacks, *frontend.engine.fallbacks),
        )
    if device.type != "cpu" and not is_static:
        features = frontend.extractor.extract(np.zeros((camera.height, camera.width, 3), np.uint8))
        frontend.matcher.match(features, features)
    return frontend


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
