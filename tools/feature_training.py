"""What the trainings of ALIKED and XFeat share: their recipe, its options, their pairs, and how one is carried out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor
from training_setup import (
    Data,
    Smoke,
    chosen_trainer,
    create_parser,
    create_trainer,
    load_data,
    smoke,
    write_weights,
)

from frontends.training.distillation import DistillationConfig
from frontends.training.pair_sources import LayeredSource, MixedSource
from frontends.training.pairs_layers import LayersConfig
from frontends.training.pairs_posed import read_megadepth, read_tum
from frontends.training.photometry import PhotometryConfig
from frontends.training.tasks_features import Checks, PairTaskConfig
from frontends.training.trainer import Place, Task, Trainer, TrainerConfig

Kind = Literal["distil", "pairs"]
Losses = TypeVar("Losses")
_VIDEO_SIZE = (320, 256)


@dataclass(frozen=True, slots=True)
class Recipe(Generic[Losses]):
    """Everything of a training but its data."""

    trainer: TrainerConfig
    pairs: PairTaskConfig
    losses: Losses
    layers: LayersConfig
    distillation: DistillationConfig
    photo_px: int = 480


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """What a training sees: photographs and real frames, pairs made of them, and what it is judged by.

    num_collections  posed collections among the pairs.
    """

    photographs: Data
    pairs: MixedSource
    checks: Checks
    num_collections: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished training is written as.

    file_name  of the weights, in the output directory.
    name       of the weights in the registry; `fits` is the architecture they fit.
    recipes    what the model card says of each kind of training.
    """

    file_name: str
    name: str
    fits: str
    recipes: Mapping[Kind, str]


def feature_parser(description: str, trainer: TrainerConfig, posed_share: float) -> argparse.ArgumentParser:
    """Arguments of a training of features; a tool adds its own."""
    parser = create_parser(description, trainer)
    parser.add_argument("--recipe", choices=("distil", "pairs"), help="default: distil; in the smoke test: pairs")
    parser.add_argument("--start", type=Path, metavar="FILE", help="weights to go on from, instead of random ones")
    parser.add_argument("--apart", type=float, metavar="SHARE", help="of `distil`: so long blocks learn on their own")
    parser.add_argument("--side", type=int, metavar="PX", help="of the views, a multiple of 32")
    help_text = "of batches, where the YAML names posed data"
    parser.add_argument("--posed-share", type=float, default=posed_share, metavar="SHARE", help=help_text)
    return parser


def chosen_recipe(options: argparse.Namespace, recipe: Recipe[Losses]) -> Recipe[Losses]:
    """A preset with what the user changed."""
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


def chosen_kind(options: argparse.Namespace) -> Kind:
    kind: Kind = options.recipe or ("pairs" if options.smoke else "distil")
    return kind


def read_training_data(options: argparse.Namespace, recipe: Recipe[Losses], device: torch.device) -> TrainingData:
    """Raises TrainingError in one line."""
    data = load_data(options, recipe.photo_px, device, _VIDEO_SIZE)
    collections = [*map(read_tum, data.folders.rgbd), *map(read_megadepth, data.folders.megadepth)]
    held_out = LayeredSource(data.held_out, recipe.layers, PhotometryConfig())
    layered = LayeredSource(data.bank, recipe.layers, PhotometryConfig())
    pairs = MixedSource(layered, collections, options.posed_share, unreadable=[])
    return TrainingData(
        data, pairs, Checks(held_out, () if options.smoke else data.videos, recipe.pairs), len(collections)
    )


def carry_out(
    options: argparse.Namespace,
    device: torch.device,
    place: Place,
    trainer_config: TrainerConfig,
    create_task: Callable[[], Task],
    *,
    smoke_rise: float,
) -> Trainer | int:
    """A training from start to end; an exit code where it was the smoke test, or was interrupted."""
    if options.smoke:
        return smoke(create_task, Smoke(trainer_config, "total", smoke_rise), options.output)
    trainer = create_trainer(options, create_task(), trainer_config, device, place)
    trainer.run()
    return 130 if trainer.was_interrupted else trainer


def write_outcome(
    options: argparse.Namespace, outcome: Outcome, trainer: Trainer, tensors: dict[str, Tensor], data: TrainingData
) -> None:
    """The weights with what their model card needs."""
    facts = {
        "name": outcome.name,
        "fits": outcome.fits,
        "recipe": outcome.recipes[chosen_kind(options)],
        "start": "random parameters" if options.start is None else options.start.name,
        "data": f"{data.photographs.bank.num_photos} photographs, {data.num_collections} posed collections",
    }
    write_weights(options.output / outcome.file_name, tensors, trainer, options, facts)
