"""What the three training tools share: arguments, data, resuming, the smoke test, weights with their metadata."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from frontends.base import VoError
from frontends.training.photos import DataFolders, PhotoBank, load_photos, read_data_folders
from frontends.training.trainer import CHECKPOINT, Place, Task, Trainer, TrainerConfig, joined_processes, local_device
from frontends.training.validation import VideoPairs, load_video_pairs
from vo.output import write_atomically

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "training_data.yaml"
VIDEO_GAPS = (1, 5)
_NUM_VIDEO_PAIRS = 4
# Steps at the end of a smoke test that are done again from the checkpoint before them.
_REPEATED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Smoke:
    """What a smoke test has to show within its minutes on a CPU.

    loss      the logged loss that has to fall by half, from the mean of the first steps to that of the last.
    rise      by how much the recall on held-out pairs has to rise.
    """

    trainer: TrainerConfig
    loss: str
    rise: float


@dataclass(frozen=True, slots=True)
class Data:
    """Photographs to train on and held out, and real frames to look at."""

    bank: PhotoBank
    held_out: PhotoBank
    videos: tuple[VideoPairs, ...]
    folders: DataFolders


def create_parser(description: str, trainer: TrainerConfig) -> argparse.ArgumentParser:
    """Arguments that every training has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=DATA, metavar="YAML", help="folders; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="checkpoint, log and weights")
    parser.add_argument(
        "--smoke", action="store_true", help="a small training on the CPU that checks itself, 3 minutes"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output directory")
    parser.add_argument("--minutes", type=float, help="budget over all restarts; the schedule keeps to it")
    parser.add_argument("--steps", type=int, help=f"at most; default: {trainer.steps}")
    parser.add_argument("--learning-rate", type=float, help=f"default: {trainer.learning_rate}")
    parser.add_argument("--batch-size", type=int, help="of one process and one pass")
    parser.add_argument("--accumulation", type=int, help=f"passes of one step; default: {trainer.accumulation}")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU")
    parser.add_argument("--seed", type=int, help="of weights, pairs and their order")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--max-photos", type=int, help="use fewer")
    parser.add_argument("--photo-px", type=int, help="shorter side of the photographs in memory")
    parser.add_argument("--checkpoint-s", type=float, metavar="S", help=f"default: {trainer.checkpoint_s:.0f}")
    parser.add_argument("--validate-s", type=float, metavar="S", help=f"default: {trainer.validate_s:.0f}")
    parser.add_argument("--checked", type=int, metavar="PAIRS", help="held-out pairs that are looked at")
    parser.add_argument("--tensorboard", action="store_true", help="write its event files too")
    return parser


def chosen_trainer(options: argparse.Namespace, default: TrainerConfig) -> TrainerConfig:
    """The default settings with what the user changed."""
    names = ("minutes", "steps", "learning_rate", "accumulation", "precision", "seed", "checkpoint_s", "validate_s")
    changed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(default, **changed)


def load_data(options: argparse.Namespace, side_px: int, device: torch.device, video_size: tuple[int, int]) -> Data:
    """The data that the YAML file names. Raises TrainingError in one line."""
    folders = read_data_folders(options.data)
    bank, held_out = load_photos(folders.photos, options.photo_px or side_px, device, options.max_photos)
    for one in (bank, held_out):
        if one.skipped:
            shown = ", ".join(one.skipped[:3])
            print(f"{len(one.skipped)} photographs cannot be read and are left out: {shown}", file=sys.stderr)
    print(f"{bank.num_photos} photographs, {held_out.num_photos} held out", file=sys.stderr)
    videos = load_video_pairs(folders.video, VIDEO_GAPS, _NUM_VIDEO_PAIRS, video_size, device)
    return Data(bank, held_out, tuple(videos), folders)


def run_tool(
    options: argparse.Namespace,
    name: str,
    train: Callable[[argparse.Namespace, torch.device, Place], int],
) -> int:
    """Runs a training; what the user's environment did wrong is said in one line, exit code 2."""
    try:
        device = local_device("cpu" if options.smoke else options.device)
        torch.set_float32_matmul_precision("high")
        with joined_processes(device) as place:
            return train(options, device, place)
    except VoError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2


def create_trainer(
    options: argparse.Namespace, task: Task, config: TrainerConfig, device: torch.device, place: Place
) -> Trainer:
    """A trainer in the output directory, at its checkpoint if the user wants to resume and there is one."""
    trainer = Trainer(task, config, options.output, device, place, uses_tensorboard=options.tensorboard)
    if options.resume and (options.output / CHECKPOINT).is_file():
        trainer.resume()
    return trainer


def smoke(create_task: Callable[[], Task], spec: Smoke, directory: Path) -> int:
    """Trains, trains the last steps again from a checkpoint, and says whether all that was asked for came true."""
    started_s = time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    cpu, config = torch.device("cpu"), spec.trainer
    first = Trainer(create_task(), config, directory / "whole", cpu)
    first.run(until_step=config.steps - _REPEATED_STEPS)
    (directory / "again").mkdir()
    shutil.copy(directory / "whole" / CHECKPOINT, directory / "again" / CHECKPOINT)
    first.run()
    again = Trainer(create_task(), config, directory / "again", cpu)
    again.resume()
    again.run()
    return _verdict(_lines(directory / "whole"), _lines(directory / "again"), spec, time.monotonic() - started_s)


def _lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def _verdict(
    whole: Sequence[Mapping[str, float]], again: Sequence[Mapping[str, float]], spec: Smoke, seconds: float
) -> int:
    losses = [line[spec.loss] for line in whole if spec.loss in line]
    recalls = [line["validation/recall"] for line in whole if "validation/recall" in line]
    tail = {line["step"]: line["total"] for line in again if "total" in line}
    expected = {line["step"]: line["total"] for line in whole if "total" in line and line["step"] in tail}
    part = max(1, len(losses) // 10)
    start, end = sum(losses[:part]) / part, sum(losses[-part:]) / part
    results = {
        f"loss {start:.3f} -> {end:.3f}, falls by half": end <= start / 2,
        f"recall {recalls[0]:.3f} -> {recalls[-1]:.3f}, rises by {spec.rise}": recalls[-1] >= recalls[0] + spec.rise,
        f"resumed: {len(tail)} steps with the same losses": len(tail) > 0 and tail == expected,
    }
    for text, is_true in results.items():
        print(f"{'ok  ' if is_true else 'FAIL'} {text}")
    print(f"{seconds:.0f} s")
    return 0 if all(results.values()) else 1


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], trainer: Trainer, options: argparse.Namespace, facts: Mapping[str, str]
) -> None:
    """Weights as safetensors in float32 with all that was behind them, and the settings beside them."""
    content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {
        "licence": "Apache-2.0",
        "revision": revision(),
        "steps": str(trainer.step),
        "minutes": f"{trainer.elapsed_s / 60:.1f}",
        "metrics": json.dumps(trainer.metrics),
        "trainer": json.dumps(asdict(trainer.config)),
        **facts,
    }
    save_file(content, path, metadata=metadata)
    arguments = {key: str(value) for key, value in vars(options).items() if value is not None}
    settings = {"arguments": arguments, **metadata}
    write_atomically(path.with_suffix(".json"), json.dumps(settings, indent=2) + "\n")
    print(f"{path}: {json.dumps(trainer.metrics)}")


def revision() -> str:
    """The git commit of the code, with a mark where it was changed; "unknown" outside a checkout."""
    try:
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        head, status = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}{' with changes' if status else ''}"
