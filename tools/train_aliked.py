"""Train ALIKED-T16: from a teacher on photographs (distil), or by the paper's own losses on pairs (pairs).

    python tools/train_aliked.py --output out/aliked --minutes 18
    python tools/train_aliked.py --recipe pairs --start out/aliked/aliked-t16.safetensors --output out/aliked-pairs
    torchrun --nproc-per-node 4 tools/train_aliked.py --output out/aliked --minutes 18
    python tools/train_aliked.py --smoke --output out/smoke

The smoke test trains by pairs, from random weights. docs/TRAINING.md tells more.
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

from frontends.aliked_network import ARCHITECTURES, AlikedNetwork, load_network
from frontends.training.aliked_losses import AlikedLossConfig
from frontends.training.distillation import AlikedDistillation, DistillationConfig, initialise
from frontends.training.pairs_layers import LayersConfig
from frontends.training.tasks_features import AlikedTask, PairTaskConfig
from frontends.training.trainer import Place, Task, TrainerConfig
from frontends.weights import load_file, load_state_dict

TRAINER = TrainerConfig(steps=100_000, learning_rate=3e-3, warm_up_steps=100, ema_decay=0.998)
_VARIANT = "t16"
OUTCOME = Outcome(
    f"aliked-{_VARIANT}.safetensors",
    f"own-aliked-{_VARIANT}",
    f"aliked-{_VARIANT}",
    {
        "distil": "imitates the published ALIKED-T16 on relit views of photographs",
        "pairs": "the losses of ALIKED on layered pairs of photographs",
    },
)
FULL = Recipe(
    TRAINER,
    PairTaskConfig(batch_size=8),
    AlikedLossConfig(),
    LayersConfig(size=(416, 416)),
    DistillationConfig(side_px=384, batch_size=24, keypoints=256, random_keypoints=64),
)
SMOKE = Recipe(
    TrainerConfig(
        steps=220, learning_rate=4e-3, warm_up_steps=5, ema_decay=0.95, precision="float32", log_steps=1, validate_s=1e9
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
    result = feature_parser("Train ALIKED-T16.", TRAINER, posed_share=0.4)
    result.add_argument("--teacher", type=Path, metavar="FILE", help="weights; default: those of the registry")
    return result


def train(options: argparse.Namespace, device: torch.device, place: Place) -> int:
    recipe = chosen_recipe(options, SMOKE if options.smoke else FULL)
    data = read_training_data(options, recipe, device)

    def create_task() -> Task:
        network = start_network(options.start, recipe.trainer.seed).to(device)
        if chosen_kind(options) == "pairs":
            return AlikedTask(network, data.pairs, data.checks, recipe.pairs, recipe.losses)
        teacher = load_network(_VARIANT, load_state_dict(f"aliked-{_VARIANT}", options.teacher)[0]).to(device)
        photographs = data.photographs
        return AlikedDistillation(
            network, teacher, photographs.bank, photographs.held_out, recipe.distillation, data.checks
        )

    trainer = carry_out(options, device, place, recipe.trainer, create_task, smoke_rise=SMOKE_RISE)
    if isinstance(trainer, int):
        return trainer
    if place.is_first:
        write_outcome(options, OUTCOME, trainer, trainer.averaged, data)
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
