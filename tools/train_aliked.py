"""Train ALIKED-T16: from a teacher on photographs (distil), or by the paper's own losses on pairs (pairs).

    python tools/train_aliked.py --output out/aliked --minutes 18
    python tools/train_aliked.py --recipe pairs --start out/aliked/aliked-t16.safetensors --output out/aliked-pairs
    torchrun --nproc-per-node 4 tools/train_aliked.py --output out/aliked --minutes 18
    python tools/train_aliked.py --smoke --output out/smoke

The smoke test trains by pairs, from random weights. docs/TRAINING.md tells more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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

from frontends.aliked_network import ARCHITECTURES, AlikedNetwork, load_network
from frontends.training.aliked_losses import AlikedLossConfig
from frontends.training.distillation import AlikedDistillation, DistillationConfig, initialise
from frontends.training.pair_sources import LayeredSource, MixedSource
from frontends.training.pairs_layers import LayersConfig
from frontends.training.pairs_posed import read_megadepth, read_tum
from frontends.training.photometry import PhotometryConfig
from frontends.training.tasks_features import AlikedTask, Checks, PairTaskConfig
from frontends.training.trainer import Place, Task, TrainerConfig
from frontends.weights import load_file, load_state_dict

TRAINER = TrainerConfig(steps=100_000, learning_rate=3e-3, warm_up_steps=100, ema_decay=0.998)
_VARIANT = "t16"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything of a training but its data."""

    trainer: TrainerConfig
    pairs: PairTaskConfig
    losses: AlikedLossConfig
    layers: LayersConfig
    distillation: DistillationConfig
    photo_px: int = 480


FULL = Recipe(
    TRAINER,
    PairTaskConfig(batch_size=8),
    AlikedLossConfig(),
    LayersConfig(size=(416, 416)),
    DistillationConfig(side_px=384, batch_size=24, keypoints=256, random_keypoints=64),
)
SMOKE = Recipe(
    TrainerConfig(
        steps=110, learning_rate=4e-3, warm_up_steps=5, ema_decay=0.95, precision="float32", log_steps=1, validate_s=1e9
    ),
    PairTaskConfig(batch_size=2, num_checked=8, checked_keypoints=128),
    AlikedLossConfig(num_detected=64, num_random=64),
    LayersConfig(size=(128, 128), video_share=0.7),
    DistillationConfig(side_px=128, batch_size=4, keypoints=48, random_keypoints=16),
    photo_px=160,
)
SMOKE_RISE = 0.15


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_tool(options, "train_aliked", train)


def parser() -> argparse.ArgumentParser:
    result = create_parser("Train ALIKED-T16.", TRAINER)
    result.add_argument("--recipe", choices=("distil", "pairs"), help="default: distil; in the smoke test: pairs")
    result.add_argument("--teacher", type=Path, metavar="FILE", help="weights; default: those of the registry")
    result.add_argument("--start", type=Path, metavar="FILE", help="weights to go on from, instead of random ones")
    result.add_argument("--apart", type=float, metavar="SHARE", help="of `distil`: so long blocks learn on their own")
    result.add_argument("--side", type=int, metavar="PX", help="of the views, a multiple of 32")
    result.add_argument("--posed-share", type=float, default=0.4, help="of batches, where the YAML names posed data")
    return result


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the preset with what the user changed."""
    recipe = SMOKE if options.smoke else FULL
    pairs, layers, distillation = recipe.pairs, recipe.layers, recipe.distillation
    if options.batch_size is not None:
        pairs = replace(pairs, batch_size=options.batch_size)
        distillation = replace(distillation, batch_size=options.batch_size)
    if options.checked is not None:
        pairs = replace(pairs, num_checked=options.checked)
    if options.side is not None:
        layers = replace(layers, size=(options.side, options.side))
        distillation = replace(distillation, side_px=options.side)
    if options.apart is not None:
        distillation = replace(distillation, apart=options.apart)
    trainer = chosen_trainer(options, recipe.trainer)
    return replace(recipe, trainer=trainer, pairs=pairs, layers=layers, distillation=distillation)


def train(options: argparse.Namespace, device: torch.device, place: Place) -> int:
    recipe = chosen_recipe(options)
    data = load_data(options, recipe.photo_px, device, (320, 256))
    collections = [*map(read_tum, data.folders.rgbd), *map(read_megadepth, data.folders.megadepth)]
    checks = Checks(
        LayeredSource(data.held_out, recipe.layers, PhotometryConfig()),
        () if options.smoke else data.videos,
        recipe.pairs,
    )
    layered = LayeredSource(data.bank, recipe.layers, PhotometryConfig())
    source = MixedSource(layered, collections, options.posed_share, unreadable=[])
    kind = options.recipe or ("pairs" if options.smoke else "distil")

    def create_task() -> Task:
        network = start_network(options.start, recipe.trainer.seed).to(device)
        if kind == "pairs":
            return AlikedTask(network, source, checks, recipe.pairs, recipe.losses)
        teacher = load_network(_VARIANT, load_state_dict(f"aliked-{_VARIANT}", options.teacher)[0]).to(device)
        return AlikedDistillation(network, teacher, data.bank, data.held_out, recipe.distillation, checks)

    if options.smoke:
        return smoke(create_task, Smoke(recipe.trainer, "total", SMOKE_RISE), options.output)
    task = create_task()
    trainer = create_trainer(options, task, recipe.trainer, device, place)
    trainer.run()
    if trainer.was_interrupted:
        return 130
    if place.is_first:
        start = "random parameters" if options.start is None else options.start.name
        facts = {
            "name": f"own-aliked-{_VARIANT}",
            "fits": f"aliked-{_VARIANT}",
            "recipe": "imitates the published ALIKED-T16 on relit views of photographs"
            if kind == "distil"
            else "the losses of ALIKED on layered pairs of photographs",
            "start": start,
            "data": f"{data.bank.num_photos} photographs, {len(collections)} posed collections",
        }
        write_weights(options.output / f"aliked-{_VARIANT}.safetensors", trainer.averaged, trainer, options, facts)
    return 0


def start_network(path: Path | None, seed: int) -> AlikedNetwork:
    """A network with weights from a file, or random ones that depend on the seed alone."""
    if path is not None:
        return load_network(_VARIANT, load_file(path)[0]).train()
    torch.manual_seed(seed)
    network = AlikedNetwork(ARCHITECTURES[_VARIANT])
    initialise(network)
    return network


if __name__ == "__main__":
    sys.exit(main())
