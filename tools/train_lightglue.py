"""Train a LightGlue for the features of ALIKED or XFeat on pairs made of photographs.

    python tools/train_lightglue.py --extractor aliked-t16 --output out/lightglue --minutes 18
    torchrun --nproc-per-node 4 tools/train_lightglue.py --extractor xfeat --output out/lightglue --minutes 18
    python tools/train_lightglue.py --smoke --output out/smoke

Stage 1 learns the assignment at every layer; stage 2 freezes it and goes on with the heads that say when to stop. The
data folders are named in tools/training_data.yaml (--data). docs/TRAINING.md tells more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Read when torch is loaded. Threads that spin where they wait cost a training up to three quarters of its speed on a
# machine that has anything else to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from training_setup import (
    Smoke,
    chosen_trainer,
    create_parser,
    create_trainer,
    load_data,
    run_tool,
    smoke,
    write_weights,
)

from frontends.aliked_network import load_network
from frontends.lightglue_network import LightGlueArchitecture, LightGlueNetwork, build_network
from frontends.training.extraction import BatchExtractor, extractor_of
from frontends.training.pair_sources import LayeredSource, MixedSource
from frontends.training.pairs_layers import LayersConfig
from frontends.training.pairs_posed import read_megadepth, read_tum
from frontends.training.photometry import PhotometryConfig
from frontends.training.tasks_matching import LightGlueTask, MatchingTaskConfig
from frontends.training.trainer import Place, Trainer, TrainerConfig
from frontends.training.xfeat_trainable import TrainableXFeat
from frontends.weights import load_file, load_state_dict

EXTRACTORS = ("aliked-t16", "xfeat")
TRAINER = TrainerConfig(steps=100_000, learning_rate=7e-4, warm_up_steps=300)
LIGHT = LightGlueArchitecture(input_dim=64, width=128, num_heads=2, num_layers=6)
_PHOTO_PX = 480


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything of a training but its data and its extractor."""

    trainer: TrainerConfig
    task: MatchingTaskConfig
    architecture: LightGlueArchitecture
    layers: LayersConfig
    photo_px: int = _PHOTO_PX


FULL = Recipe(TRAINER, MatchingTaskConfig(batch_size=96), LIGHT, LayersConfig(size=(640, 480)))
SMOKE = Recipe(
    TrainerConfig(
        steps=260,
        learning_rate=2e-3,
        warm_up_steps=10,
        ema_decay=0.97,
        precision="float32",
        log_steps=1,
        validate_s=1e9,
    ),
    MatchingTaskConfig(batch_size=8, keypoints=64, reuse=10, num_checked=24),
    LightGlueArchitecture(input_dim=64, width=64, num_heads=1, num_layers=3),
    LayersConfig(size=(192, 192), video_share=0.6),
    photo_px=224,
)
SMOKE_RISE = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_tool(options, "train_lightglue", train)


def parser() -> argparse.ArgumentParser:
    result = create_parser("Train a LightGlue matcher.", TRAINER)
    result.add_argument("--extractor", choices=EXTRACTORS, default="aliked-t16")
    result.add_argument(
        "--extractor-weights", type=Path, help="of the frozen extractor; default: those of the registry"
    )
    result.add_argument("--start", type=Path, metavar="FILE", help="weights to go on from, instead of random ones")
    result.add_argument("--keypoints", type=int, help="of each image of a step")
    result.add_argument("--side", type=int, metavar="PX", help="of square views, a multiple of 32; default: 640x480")
    result.add_argument("--confidence-steps", type=int, default=400, help="of stage 2; 0 leaves it out")
    result.add_argument("--posed-share", type=float, default=0.5, help="of batches, where the YAML names posed data")
    return result


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the preset with what the user changed."""
    recipe = SMOKE if options.smoke else FULL
    names = {"batch_size": options.batch_size, "keypoints": options.keypoints, "num_checked": options.checked}
    layers = recipe.layers if options.side is None else replace(recipe.layers, size=(options.side, options.side))
    task = replace(recipe.task, **{key: value for key, value in names.items() if value is not None})
    return replace(recipe, trainer=chosen_trainer(options, recipe.trainer), task=task, layers=layers)


def train(options: argparse.Namespace, device: torch.device, place: Place) -> int:
    recipe = chosen_recipe(options)
    extract = load_extractor(options.extractor, options.extractor_weights, device)
    data = load_data(options, recipe.photo_px, device, (320, 256))
    collections = [*map(read_tum, data.folders.rgbd), *map(read_megadepth, data.folders.megadepth)]
    held_out = LayeredSource(data.held_out, recipe.layers, PhotometryConfig())
    layered = LayeredSource(data.bank, recipe.layers, PhotometryConfig())
    source = MixedSource(layered, collections, options.posed_share, unreadable=[])

    def create_task(task: MatchingTaskConfig, network: LightGlueNetwork) -> LightGlueTask:
        videos = () if options.smoke else data.videos
        return LightGlueTask(network, extract, source, held_out, videos, task)

    def new_network() -> LightGlueNetwork:
        return start_network(options.start, recipe, device)

    if options.smoke:
        return smoke(
            lambda: create_task(recipe.task, new_network()),
            Smoke(recipe.trainer, "assignment", SMOKE_RISE),
            options.output,
        )
    task = create_task(recipe.task, new_network())
    print(f"mutual nearest neighbours: {task.nearest_figures()}", file=sys.stderr)
    trainer = create_trainer(options, task, recipe.trainer, device, place)
    trainer.run()
    if trainer.was_interrupted:
        return 130
    if options.confidence_steps > 0:
        trainer = _confidence_stage(options, recipe, create_task, trainer, device, place)
    if place.is_first:
        facts = {
            "name": f"lightglue-light-{options.extractor}",
            "fits": options.extractor,
            "recipe": "frozen extractor; layered pairs of photographs; deep supervision, then confidence heads",
            "data": f"{data.bank.num_photos} photographs, {len(collections)} posed collections",
        }
        tensors = {key: value.half() for key, value in trainer.averaged.items()}
        write_weights(options.output / f"{facts['name']}.safetensors", tensors, trainer, options, facts)
        if source.unreadable:
            print(f"{len(source.unreadable)} posed pairs could not be read: {source.unreadable[0]}", file=sys.stderr)
    return 0


def _confidence_stage(
    options: argparse.Namespace,
    recipe: Recipe,
    create_task: object,
    first: Trainer,
    device: torch.device,
    place: Place,
) -> Trainer:
    """Stage 2, counted in steps: nothing but the confidence heads learns, from the averaged weights of stage 1."""
    assert callable(create_task)
    network = LightGlueNetwork(recipe.architecture).to(device)
    network.load_state_dict(first.averaged)
    config = replace(recipe.trainer, steps=options.confidence_steps, minutes=None, warm_up_steps=20, ema_decay=0.97)
    task = create_task(replace(recipe.task, trains_confidence_only=True), network)
    changed = argparse.Namespace(**{**vars(options), "output": options.output / "confidence"})
    trainer = create_trainer(changed, task, config, device, place)
    trainer.run()
    return trainer


def load_extractor(name: str, path: Path | None, device: torch.device) -> BatchExtractor:
    """The frozen extractor. Raises WeightsError."""
    state_dict, _ = load_state_dict(name, path)
    network: torch.nn.Module
    if name == "xfeat":
        network = TrainableXFeat()
        network.load_state_dict(
            {k: v for k, v in state_dict.items() if not k.startswith("fine_matcher.")}, strict=False
        )
    else:
        network = load_network(name.removeprefix("aliked-"), state_dict)
    return extractor_of(network.eval().requires_grad_(False).to(device))


def start_network(path: Path | None, recipe: Recipe, device: torch.device) -> LightGlueNetwork:
    """A network with weights from a file, or random ones that depend on the seed alone."""
    if path is not None:
        state_dict, _ = load_file(path)
        return build_network(state_dict, path.name).train().requires_grad_(True).to(device)
    torch.manual_seed(recipe.trainer.seed)
    return LightGlueNetwork(recipe.architecture).to(device)


if __name__ == "__main__":
    sys.exit(main())
