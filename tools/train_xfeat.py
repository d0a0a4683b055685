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
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Read when torch is loaded. Threads that spin where they wait cost a training up to three quarters of its speed on a
# machine that has anything else to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from feature_training import (
    Outcome,
    Recipe,
    carry_out,
    chosen_kind,
    chosen_recipe,
    feature_parser,
    read_training_data,
    write_outcome,
)
from training_setup import run_tool

from frontends.aliked_network import load_network
from frontends.training.distillation import DistillationConfig, XFeatDistillation, initialise
from frontends.training.fine_offsets import fine_matcher
from frontends.training.pairs_layers import LayersConfig
from frontends.training.tasks_features import PairTaskConfig, XFeatLossConfig, XFeatTask, XFeatWithMatcher
from frontends.training.trainer import Place, Task, TrainerConfig
from frontends.training.xfeat_trainable import TrainableXFeat
from frontends.weights import load_file, load_state_dict

TRAINER = TrainerConfig(steps=100_000, learning_rate=3e-3, warm_up_steps=100, ema_decay=0.998)
OUTCOME = Outcome(
    "xfeat.safetensors",
    "own-xfeat",
    "xfeat",
    {
        "distil": "imitates the published XFeat on relit views of photographs",
        "pairs": "the losses of XFeat on layered pairs of photographs, keypoints of ALIKED-T16",
    },
)
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
    result = feature_parser("Train XFeat.", TRAINER, posed_share=0.6)
    result.add_argument("--teacher", type=Path, metavar="FILE", help="XFeat to imitate; default: that of the registry")
    result.add_argument("--keypoint-teacher", type=Path, metavar="FILE", help="ALIKED-T16 of the recipe `pairs`")
    result.add_argument("--fine", action="store_true", help="train the fine matcher of XFeat* along (recipe `pairs`)")
    return result


def train(options: argparse.Namespace, device: torch.device, place: Place) -> int:
    recipe = chosen_recipe(options, SMOKE if options.smoke else FULL)
    data = read_training_data(options, recipe, device)

    def create_task() -> Task:
        network = start_network(options.start, recipe.trainer.seed)
        if chosen_kind(options) == "pairs":
            keypoints = load_network("t16", load_state_dict("aliked-t16", options.keypoint_teacher)[0]).to(device)
            whole = XFeatWithMatcher(network, fine_matcher() if options.fine else None).to(device)
            return XFeatTask(whole, keypoints, data.pairs, data.checks, recipe.pairs, recipe.losses)
        teacher = TrainableXFeat()
        load_backbone(teacher, load_state_dict("xfeat", options.teacher)[0])
        bank, held_out = data.photographs.bank, data.photographs.held_out
        return XFeatDistillation(
            network.to(device), teacher.to(device), bank, held_out, recipe.distillation, data.checks
        )

    trainer = carry_out(options, device, place, recipe.trainer, create_task, smoke_rise=SMOKE_RISE)
    if isinstance(trainer, int):
        return trainer
    if place.is_first:
        network, tensors = trainer.task.network, trainer.averaged
        if isinstance(network, XFeatWithMatcher):
            tensors = network.published_state_dict(tensors)
        write_outcome(options, OUTCOME, trainer, tensors, data)
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
