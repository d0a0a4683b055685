"""Train R2D2 on homographic pairs of photographs.

    python tools/train_r2d2.py --photos DIR --output r2d2.pt             a whole training
    python tools/train_r2d2.py --photos DIR --output small.pt --small    a small network, a quarter of an hour on a CPU
    python tools/train_r2d2.py --photos DIR --output tiny.pt --smoke     a tiny one in less than five minutes
    python tools/train_r2d2.py --photos DIR --output more.pt --smoke --start tiny.pt --minutes 60    go on from weights

Writes a checkpoint of the published form; where the name ends in .safetensors, one in float16 with its recipe. --smoke
fails (exit code 1) unless it halves the loss that random weights have on held-out pairs. From the checkpoint that is
written beside it every half minute, --resume goes on where a training was cut off.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# Read when torch is loaded. Threads that spin where they wait cost a training up to three quarters of its speed on a
# machine that has anything else to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from packaged_weights import write_weights
from torch import Tensor

from frontends.base import VoError, check_settings, setting
from frontends.r2d2_network import R2d2Architecture, R2d2Maps, R2d2Network, checkpoint, load_network, normalised
from frontends.training.average_precision import average_precision, reliability_loss
from frontends.training.homographic_pairs import TrainingPair, WarpConfig, homographic_pair
from frontends.training.photos import TrainingError
from frontends.training.repeatability import peakiness_loss, similarity_loss
from frontends.training.samplers import DenseMaps, near_far_rows
from frontends.training.trainer import calls_on_signals, local_device
from frontends.weights import load_checkpoint

_NUM_HELD_OUT = 16
_REPORT_S = 10.0
_SAVE_S = 30.0
# Threads that make pairs while a GPU works.
_NUM_MAKERS = 4
CPU = torch.device("cpu")


class PhotosError(VoError):
    """Photographs to train on that cannot be found or read."""


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How a network is trained: 8 pairs of 192 px, 16 px patches and weights of 1 are the paper's choice."""

    mchan: int = setting(4, minimum=1, maximum=16, help="width of the backbone, in units of 8, 16 and 32 channels")
    dim: int = setting(128, minimum=8, maximum=512, help="length of the descriptors")
    side_px: int = setting(192, minimum=48, help="of a view, px")
    batch_size: int = setting(8, minimum=1, maximum=256, help="pairs of one step")
    steps: int = setting(25_000, minimum=1, help="steps at most")
    minutes: float | None = setting(None, minimum=0.01, help="training at most, min")
    learning_rate: float = setting(1e-4, minimum=0.0, maximum=1.0, help="of Adam, at its highest")
    rise: float = setting(0.0, minimum=0.0, maximum=0.5, help="share of the time in which the learning rate rises")
    patch_px: int = setting(16, minimum=4, help="patches of the losses on repeatability, px")
    query_step: int = setting(8, minimum=1, help="distance of queries, px")
    border: int = setting(16, minimum=0, help="of an image, without queries, px")
    positive_px: float = setting(3.0, minimum=0.0, help="as far as this from its true place a match is right, px")
    negative_px: float = setting(5.0, minimum=0.1, help="from this distance on it is wrong, px")
    warm_up: float = setting(0.1, minimum=0.0, maximum=1.0, help="share of the time in which all are held reliable")
    precision: str = setting("float32", choices=("float32", "bfloat16"), help="of the network's arithmetic")
    warp: WarpConfig = field(default_factory=WarpConfig)
    seed: int = setting(0, minimum=0, help="of weights, pairs and their order")

    def __post_init__(self) -> None:
        check_settings(self)


# Float32: in bfloat16 narrow convolutions are four times slower on processors without instructions for it.
_GENTLE = WarpConfig(rotation_deg=10.0, scale=1.25, shear=0.1, perspective=0.15, gray=0.5)
SMOKE = TrainingConfig(
    mchan=1,
    dim=64,
    side_px=96,
    batch_size=2,
    steps=900,
    minutes=4.5,
    learning_rate=3e-3,
    rise=0.03,
    patch_px=8,
    border=8,
    positive_px=1.0,
    negative_px=3.0,
    warm_up=0.4,
    warp=_GENTLE,
)
SMALL = replace(SMOKE, mchan=2, steps=3000, minutes=None, learning_rate=2e-3)


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """The three terms of the loss, each between 0 and 1."""

    ranking: Tensor
    similarity: Tensor
    peakiness: Tensor

    @property
    def total(self) -> Tensor:
        return self.ranking + self.similarity + self.peakiness

    def __str__(self) -> str:
        terms = f"ranking {self.ranking:.3f}, similarity {self.similarity:.3f}, peakiness {self.peakiness:.3f}"
        return f"{self.total:.3f} ({terms})"


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Images (B, 3, S, S) as the network takes them and flow (B, S, S, 2) px."""

    images0: Tensor
    images1: Tensor
    flow: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.images0.to(device), self.images1.to(device), self.flow.to(device))


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    config = chosen_config(options)
    try:
        device = local_device(options.device)
        photos = find_photos(options.photos, config.side_px)
        checkpoint_file = options.output.with_name(f"{options.output.name}.checkpoint")
        start = None if options.start is None else start_network(options.start)
        training, before, after = train(config, photos, device, checkpoint_file, resumes=options.resume, start=start)
    except VoError as error:
        print(f"train_r2d2: error: {error}", file=sys.stderr)
        return 2
    if training.is_stopped:
        print(
            f"train_r2d2: stopped after {training.step} steps; --resume goes on from {checkpoint_file}", file=sys.stderr
        )
        return 130
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write(training.network, options.output, config, len(photos), training.step, options.start)
    print(f"held-out loss: {before} before, {after} after {training.step} steps; {options.output}")
    if options.smoke and options.start is None and after.total > before.total / 2:
        print("train_r2d2: the loss is not halved", file=sys.stderr)
        return 1
    return 0


def write(
    network: R2d2Network,
    path: Path,
    config: TrainingConfig,
    num_photos: int,
    num_steps: int | None = None,
    start: Path | None = None,
) -> None:
    """The checkpoint of a network; its recipe, and what it went on from, go with safetensors."""
    if path.suffix != ".safetensors":
        torch.save(checkpoint(network), path)
        return
    recipe = ", ".join(f"{item.name} {getattr(config, item.name)}" for item in fields(config))
    metadata = {
        "net": network.architecture.constructor,
        "architecture": f"R2D2, key names of naver/r2d2: {network.architecture.constructor}",
        "fits": "r2d2",
        "data": f"{num_photos} still photographs, homographic pairs made on the fly",
        "recipe": recipe,
        "steps": str(config.steps if num_steps is None else num_steps),
    }
    if start is not None:
        metadata["start"] = f"goes on from {start.name}, SHA-256 {hashlib.sha256(start.read_bytes()).hexdigest()}"
    write_weights(network.state_dict(), path, metadata)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train R2D2 on homographic pairs of photographs.")
    data = os.environ.get("LIGHTVO_DATA")
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path(data) / "photos" if data else None,
        required=not data,
        help="directory of photographs (default: photos in LIGHTVO_DATA)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where to write the checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, five minutes on a CPU")
    parser.add_argument("--small", action="store_true", help="a small network, a quarter of an hour on a CPU")
    parser.add_argument("--start", type=Path, metavar="FILE", help="checkpoint to go on from, not random weights")
    parser.add_argument("--steps", type=int, help="steps at most")
    parser.add_argument("--minutes", type=float, help="training at most")
    parser.add_argument("--learning-rate", type=float, help="of Adam")
    parser.add_argument("--batch-size", type=int, help="pairs of one step")
    parser.add_argument("--side-px", type=int, help="of a view")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside the output")
    parser.add_argument("--mchan", type=int, help="width of the backbone")
    parser.add_argument("--seed", type=int, help="of weights, pairs and their order")
    return parser


def chosen_config(options: argparse.Namespace) -> TrainingConfig:
    """The settings of the preset with what the user changed."""
    names = ("steps", "minutes", "learning_rate", "batch_size", "side_px", "mchan", "seed")
    changed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    preset = SMOKE if options.smoke else SMALL if options.small else TrainingConfig()
    return replace(preset, **changed)


def find_photos(directory: Path, side_px: int) -> list[NDArray[np.uint8]]:
    """All photographs of a directory that are large enough, RGB, in order of their names. PhotosError without 2."""
    files = sorted(path for path in directory.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = []
    for path in files:
        photo = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if photo is None:
            raise PhotosError(f"{path}: cannot be read as an image; remove it")
        if min(photo.shape[:2]) >= side_px:
            photos.append(np.asarray(photo[..., ::-1], np.uint8))
    if len(photos) < 2:
        raise PhotosError(
            f"{directory}: {len(photos)} photographs of {side_px} px or more; give --photos with 2 or more"
        )
    return photos


def start_network(path: Path) -> R2d2Network:
    """The network of a checkpoint. Raises WeightsError."""
    start, _ = load_checkpoint("r2d2", path)
    return load_network(start.constructor, start.state_dict)


@dataclass(slots=True, eq=False)
class Training:
    """A training between two steps."""

    network: R2d2Network
    optimiser: torch.optim.Optimizer
    step: int = 0
    elapsed_s: float = 0.0
    is_stopped: bool = False

    @classmethod
    def begin(cls, config: TrainingConfig, device: torch.device, start: R2d2Network | None = None) -> Training:
        """With random weights, or on those of `start`, which becomes the network. TrainingError where it is another."""
        torch.manual_seed(config.seed)
        network = R2d2Network(R2d2Architecture(dim=config.dim, mchan=config.mchan))
        if start is not None:
            if start.architecture != network.architecture:
                made_with = f"{start.architecture.constructor}, not {network.architecture.constructor}"
                raise TrainingError(f"weights to go on from are of {made_with}; give --mchan or another preset")
            network.load_state_dict(start.state_dict())
        network = network.to(device, memory_format=torch.channels_last)
        return cls(network, torch.optim.Adam(network.parameters(), lr=config.learning_rate, weight_decay=5e-4))

    def save(self, path: Path, config: TrainingConfig) -> None:
        """Everything that a continuation needs; a crash never leaves half a file."""
        content = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "config": asdict(config),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.part")
        torch.save(content, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path, config: TrainingConfig) -> None:
        """Goes on from a checkpoint. Lengths and the learning rate may differ; else TrainingError."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            made_with = content["config"]
            for key, value in asdict(config).items():
                if key not in ("steps", "minutes", "learning_rate") and made_with.get(key) != value:
                    raise TrainingError(f"{path}: made with {key} {made_with.get(key)!r}, not {value!r}; remove it")
            self.network.load_state_dict(content["network"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.step, self.elapsed_s = int(content["step"]), float(content["elapsed_s"])
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(f"{path}: not a checkpoint of this training: {reason}; remove it") from error

    def stop(self) -> None:
        """Ends the training after the step in progress."""
        self.is_stopped = True


def train(
    config: TrainingConfig,
    photos: Sequence[NDArray[np.uint8]],
    device: torch.device = CPU,
    checkpoint_file: Path | None = None,
    *,
    resumes: bool = False,
    start: R2d2Network | None = None,
) -> tuple[Training, Losses, Losses]:
    """A training that is over, and the losses on pairs it did not see, of the first weights and of its own.

    What a step sees depends on (seed, step) alone; with a checkpoint file, a training that was cut off can go on.
    """
    training = Training.begin(config, device, start)
    num_held_out = min(_NUM_HELD_OUT, len(photos) // 2)
    held_out, photos = photos[:num_held_out], photos[num_held_out:]
    # Batch statistics on both sides of the comparison: those that are learned would be none before.
    before = evaluate(training.network, config, held_out)
    if resumes and checkpoint_file is not None and checkpoint_file.is_file():
        training.resume(checkpoint_file, config)
    worked_s = time.process_time()
    with calls_on_signals(training.stop):
        _make_steps(training, config, photos, checkpoint_file)
    worked_s = time.process_time() - worked_s
    print(f"{training.step} steps, {worked_s:.0f} s of processor time", file=sys.stderr)
    if checkpoint_file is not None:
        training.save(checkpoint_file, config)
    training.network.eval()
    return training, before, evaluate(training.network, config, held_out)


def _make_steps(
    training: Training, config: TrainingConfig, photos: Sequence[NDArray[np.uint8]], checkpoint_file: Path | None
) -> None:
    network, optimiser = training.network, training.optimiser
    device = next(network.parameters()).device
    start_s = time.monotonic() - training.elapsed_s
    reported_s = saved_s = training.elapsed_s
    for batch in batches(photos, config, training.step, device):
        training.elapsed_s = time.monotonic() - start_s
        limit_s = np.inf if config.minutes is None else 60 * config.minutes
        share = max(training.step / config.steps, training.elapsed_s / limit_s)
        if share >= 1 or training.is_stopped:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, share)
        losses = pair_losses(network, batch, config, trusts_all=share < config.warm_up)
        optimiser.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        training.step += 1
        if training.elapsed_s - reported_s > _REPORT_S:
            reported_s = training.elapsed_s
            done = f"step {training.step} of {config.steps}, {reported_s:.0f} s"
            print(f"{done}: loss {losses}", file=sys.stderr, flush=True)
        if checkpoint_file is not None and training.elapsed_s - saved_s > _SAVE_S:
            saved_s = training.elapsed_s
            training.save(checkpoint_file, config)


def batches(
    photos: Sequence[NDArray[np.uint8]], config: TrainingConfig, first_step: int, device: torch.device
) -> Iterator[Batch]:
    """The batches of this and all later steps. For a GPU several are made at a time, while it works."""

    def made(step: int) -> Batch:
        generator = np.random.default_rng((config.seed, step))
        chosen = generator.integers(len(photos), size=config.batch_size)
        return make_batch([photos[index] for index in chosen], config, generator)

    steps = itertools.count(first_step)
    if device.type == "cpu":
        yield from map(made, steps)
        return
    with ThreadPoolExecutor(_NUM_MAKERS) as makers:
        waiting = deque(makers.submit(made, step) for step in itertools.islice(steps, 2 * _NUM_MAKERS))
        try:
            while True:
                waiting.append(makers.submit(made, next(steps)))
                yield waiting.popleft().result().to(device)
        finally:
            makers.shutdown(wait=True, cancel_futures=True)


def learning_rate(config: TrainingConfig, share: float) -> float:
    """At this share of the time: it rises in a straight line, then falls as half a cosine."""
    if share < config.rise:
        # From a tenth: a first step of size 0 would be a step wasted.
        return config.learning_rate * (0.1 + 0.9 * share / config.rise)
    return float(config.learning_rate * 0.5 * (1 + np.cos(np.pi * (share - config.rise) / (1 - config.rise))))


def make_batch(photos: Sequence[NDArray[np.uint8]], config: TrainingConfig, generator: np.random.Generator) -> Batch:
    """One pair of every photograph."""
    pairs: list[TrainingPair] = [homographic_pair(photo, config.side_px, generator, config.warp) for photo in photos]
    images0, images1 = (
        normalised(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255)
        for images in ([pair.image0 for pair in pairs], [pair.image1 for pair in pairs])
    )
    return Batch(images0, images1, torch.from_numpy(np.stack([pair.flow for pair in pairs])))


def pair_losses(network: R2d2Network, batch: Batch, config: TrainingConfig, *, trusts_all: bool = False) -> Losses:
    """The three losses of a batch.

    trusts_all  every descriptor is taken for reliable. A network that knows nothing yet would else find it cheapest to
                call everything unreliable, which leaves its descriptors without a gradient.
    """
    maps0, maps1 = (predicted(network, images, config.precision) for images in (batch.images0, batch.images1))
    rows = near_far_rows(
        DenseMaps(maps0.descriptors, maps0.reliability),
        DenseMaps(maps1.descriptors, maps1.reliability),
        batch.flow,
        query_step=config.query_step,
        border=config.border,
        positive_px=config.positive_px,
        negative_px=config.negative_px,
    )
    precision = average_precision(rows.scores, rows.is_match, rows.is_counted)
    peakiness = [peakiness_loss(maps.repeatability, config.patch_px) for maps in (maps0, maps1)]
    reliability = torch.ones_like(precision) if trusts_all else rows.reliability
    return Losses(
        reliability_loss(precision, reliability),
        similarity_loss(maps0.repeatability, maps1.repeatability, batch.flow, config.patch_px),
        (peakiness[0] + peakiness[1]) / 2,
    )


def predicted(network: R2d2Network, images: Tensor, precision: str) -> R2d2Maps:
    """The maps of a batch in float32, whatever the backbone works in."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        features = network.features(images)
    return network.heads(features.float())


@torch.no_grad()
def evaluate(network: R2d2Network, config: TrainingConfig, photos: Sequence[NDArray[np.uint8]]) -> Losses:
    """Losses of one pair of every photograph, always the same, by batch statistics; the network stays as it is."""
    generator = np.random.default_rng(config.seed + 1)
    device = next(network.parameters()).device
    copy = R2d2Network(network.architecture).to(device)
    copy.load_state_dict(network.state_dict())
    copy.train()
    parts = [
        pair_losses(copy, make_batch(photos[start : start + config.batch_size], config, generator).to(device), config)
        for start in range(0, len(photos), config.batch_size)
    ]
    terms = torch.stack([torch.stack((part.ranking, part.similarity, part.peakiness)) for part in parts])
    return Losses(*terms.mean(dim=0))


if __name__ == "__main__":
    sys.exit(main())
