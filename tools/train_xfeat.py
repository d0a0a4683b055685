"""Train XFeat: from a teacher on photographs (distil), or by the paper's own losses on pairs (pairs).

    python tools/train_xfeat.py --output out/xfeat --minutes 18
    python tools/train_xfeat.py --recipe pairs --fine --output out/xfeat-pairs --minutes 18
    torchrun --nproc-per-node 4 tools/train_xfeat.py --output out/xfeat --minutes 18
    python tools/train_xfeat.py --smoke --output out/smoke

By pairs, keypoints come from an ALIKED (published or ours); --fine trains the fine matcher of XFeat* along. The smoke
test trains by pairs, from random weights. docs/TRAINING.md tells more.
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

from frontends.aliked_network import load_network
from frontends.training.distillation import DistillationConfig, XFeatDistillation, initialise
from frontends.training.fine_offsets import fine_matcher
from frontends.training.pair_sources import LayeredSource, MixedSource
from frontends.training.pairs_layers import LayersConfig
from frontends.training.pairs_posed import read_megadepth, read_tum
from frontends.training.photometry import PhotometryConfig
from frontends.training.tasks_features import Checks, PairTaskConfig, XFeatLossConfig, XFeatTask, XFeatWithMatcher
from frontends.training.trainer import Place, Task, TrainerConfig
from frontends.training.xfeat_trainable import TrainableXFeat
from frontends.weights import load_file, load_state_dict

TRAINER = TrainerConfig(steps=100_000, learning_rate=3e-3, warm_up_steps=100, ema_decay=0.998)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything of a training but its data."""

    trainer: TrainerConfig
    pairs: PairTaskConfig
    losses: XFeatLossConfig
    layers: LayersConfig
    distillation: DistillationConfig
    photo_px: int = 480


FULL = Recipe(
    TRAINER,
    PairTaskConfig(batch_size=24),
    XFeatLossConfig(),
    LayersConfig(size=(512, 384)),
    DistillationConfig(side_px=416, batch_size=64),
)
SMOKE = Recipe(
    TrainerConfig(
        steps=150, learning_rate=4e-3, warm_up_steps=5, ema_decay=0.95, precision="float32", log_steps=1, validate_s=1e9
    ),
    PairTaskConfig(batch_size=4, num_checked=8, checked_keypoints=128),
    XFeatLossConfig(num_cells=128, teacher_keypoints=96, fine=0.0),
    LayersConfig(size=(160, 160), video_share=0.7),
    DistillationConfig(side_px=160, batch_size=4),
    photo_px=192,
)
SMOKE_RISE = 0.15


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_tool(options, "train_xfeat", train)


def parser() -> argparse.ArgumentParser:
    result = create_parser("Train XFeat.", TRAINER)
    result.add_argument("--recipe", choices=("distil", "pairs"), help="default: distil; in the smoke test: pairs")
    result.add_argument("--teacher", type=Path, metavar="FILE", help="XFeat to imitate; default: that of the registry")
    result.add_argument("--keypoint-teacher", type=Path, metavar="FILE", help="ALIKED-T16 of the recipe `pairs`")
    result.add_argument("--fine", action="store_true", help="train the fine matcher of XFeat* along (recipe `pairs`)")
    result.add_argument("--start", type=Path, metavar="FILE", help="weights to go on from, instead of random ones")
    result.add_argument("--apart", type=float, metavar="SHARE", help="of `distil`: so long blocks learn on their own")
    result.add_argument("--side", type=int, metavar="PX", help="of the views, a multiple of 32")
    result.add_argument("--posed-share", type=float, default=0.6, help="of batches, where the YAML names posed data")
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
        network = start_network(options.start, recipe.trainer.seed)
        if kind == "pairs":
            keypoints = load_network("t16", load_state_dict("aliked-t16", options.keypoint_teacher)[0]).to(device)
            whole = XFeatWithMatcher(network, fine_matcher() if options.fine else None).to(device)
            return XFeatTask(whole, keypoints, source, checks, recipe.pairs, recipe.losses)
        teacher = TrainableXFeat()
        load_backbone(teacher, load_state_dict("xfeat", options.teacher)[0])
        return XFeatDistillation(
            network.to(device), teacher.to(device), data.bank, data.held_out, recipe.distillation, checks
        )

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
            "name": "own-xfeat",
            "fits": "xfeat",
            "recipe": "imitates the published XFeat on relit views of photographs"
            if kind == "distil"
            else "the losses of XFeat on layered pairs of photographs, keypoints of ALIKED-T16",
            "start": start,
            "data": f"{data.bank.num_photos} photographs, {len(collections)} posed collections",
        }
        tensors = trainer.averaged
        if isinstance(task.network, XFeatWithMatcher):
            tensors = task.network.published_state_dict(tensors)
        write_weights(options.output / "xfeat.safetensors", tensors, trainer, options, facts)
    return 0


def start_network(path: Path | None, seed: int) -> TrainableXFeat:
    """A network with weights from a file, or random ones that depend on the seed alone."""
    torch.manual_seed(seed)
    network = TrainableXFeat()
    initialise(network)
    if path is not None:
        load_backbone(network, load_file(path)[0])
    return network


def load_backbone(network: TrainableXFeat, state_dict: dict[str, torch.Tensor]) -> None:
    """Weights under the published names, without those of the fine matcher; counters of batches may be missing."""
    known = network.state_dict()
    network.load_state_dict({**known, **{key: value for key, value in state_dict.items() if key in known}})


if __name__ == "__main__":
    sys.exit(main())
