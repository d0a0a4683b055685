"""One loop for every network: precision, schedule, accumulation, averaging, checkpoints, logs, several processes.

What a step sees depends on (seed, step, process) alone, so a run that was cut off goes on exactly as if it had not
been. The loop knows no network: a `Task` makes batches, turns them into losses and validates.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from frontends.base import check_settings, setting
from frontends.training.photos import TrainingError

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
_REPORT_S = 10.0
_MIX = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """How long and how fast to learn; a run ends with its steps or its minutes, whichever is first."""

    steps: int = setting(10_000, minimum=1, help="optimiser steps at most; the schedule spans them")
    minutes: float | None = setting(None, minimum=0.0, help="budget over all restarts; the schedule keeps to it too")
    learning_rate: float = setting(1e-3, minimum=0.0, help="after warm-up; falls along a cosine")
    final_share: float = setting(0.01, minimum=0.0, maximum=1.0, help="of the learning rate, at the end")
    warm_up_steps: int = setting(100, minimum=0, help="over which the learning rate rises")
    weight_decay: float = setting(1e-4, minimum=0.0, help="of AdamW, on weights with two or more dimensions")
    beta2: float = setting(0.99, minimum=0.0, maximum=1.0, help="of AdamW")
    max_gradient_norm: float = setting(1.0, minimum=0.0, help="longer gradients are shortened")
    accumulation: int = setting(1, minimum=1, help="batches of one optimiser step")
    ema_decay: float = setting(0.999, minimum=0.0, maximum=1.0, help="of the averaged weights, which are what is kept")
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU")
    seed: int = setting(0, minimum=0, help="of pairs and their order")
    checkpoint_s: float = setting(120.0, minimum=0.0, help="seconds between checkpoints")
    validate_s: float = setting(300.0, minimum=0.0, help="seconds between validations; the first and last always run")
    log_steps: int = setting(10, minimum=1, help="steps of one line in the log, which holds their means")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class Draws:
    """Which batch of a training this is: all that its random numbers depend on."""

    seed: int
    step: int = 0
    part: int = 0
    rank: int = 0

    def generator(self, device: torch.device, every: int = 1) -> torch.Generator:
        """Random numbers of this batch; with `every` above 1, the same ones for so many steps in a row."""
        seed = mixed_seed(self.seed, self.step // every, self.part, self.rank, every)
        return torch.Generator(device).manual_seed(seed)


class Task(Protocol):
    """What is learned: one network, its data and its losses."""

    @property
    def network(self) -> nn.Module:
        """What is trained, on the device; parameters that do not require gradients stay as they are."""

    def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
        """Inputs and labels, on the device, random by `draws` only; `share` of the training is over."""

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """Scalars; "total" is minimised, the others are logged."""

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Figures of a network like `network` in evaluation mode, always on the same data."""


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[Place]:
    """Joins the processes that torchrun has started; alone, there is nothing to join."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda": under torchrun every process gets a GPU of its own."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no GPU; use --device cpu, or install a CUDA build of torch")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


class _Step(nn.Module):
    """Wraps a task so that data parallelism sees one module with one forward."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.network = task.network
        self._task = task

    def forward(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        return self._task.losses(batch, share)


class Trainer:
    """Trains the network of a task; everything it writes goes into one directory.

    Raises TrainingError for a checkpoint of other settings, and when a loss is not a number.
    """

    def __init__(
        self,
        task: Task,
        config: TrainerConfig,
        directory: Path,
        device: torch.device,
        place: Place | None = None,
        *,
        uses_tensorboard: bool = False,
    ) -> None:
        self.task, self.config, self.directory, self.device = task, config, directory, device
        self.place = place or Place()
        self.step, self.elapsed_s = 0, 0.0
        self.metrics: dict[str, float] = {}
        trained = [parameter for parameter in task.network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2))
        self._trained = trained
        self.averaged = {key: value.detach().clone() for key, value in task.network.state_dict().items()}
        step = _Step(task)
        self._forward: nn.Module = step
        if self.place.count > 1:
            self._forward = DistributedDataParallel(step, find_unused_parameters=True)
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = _tensorboard(directory) if uses_tensorboard and self.place.is_first else None
        self._stop = threading.Event()

    @property
    def share(self) -> float:
        """How much of the training is over, from 0 to 1."""
        by_time = 0.0 if self.config.minutes is None else self.elapsed_s / max(60 * self.config.minutes, 1e-9)
        return min(1.0, max(self.step / self.config.steps, by_time))

    def run(self, until_step: int | None = None) -> dict[str, float]:
        """Trains to the end (or to a step), and returns the figures of the last validation.

        A SIGINT or SIGTERM ends the run after the step in progress, with everything saved.
        """
        started_s, before_s = time.monotonic(), self.elapsed_s
        saved_s = reported_s = started_s
        validated_s = started_s
        if self.step == 0:
            self._validate()
        window: list[dict[str, float]] = []
        with calls_on_signals(self._stop.set):
            while self._goes_on(until_step):
                share, rate = self.share, self._learning_rate()
                window.append(self._train_step(share, rate))
                self.step += 1
                now_s = time.monotonic()
                self.elapsed_s = before_s + now_s - started_s
                if self.step % self.config.log_steps == 0 or not self._goes_on(until_step):
                    means = {key: sum(row[key] for row in window) / len(window) for key in window[0]}
                    self._log({"share": share, "learning_rate": rate, **means}, is_shown=now_s - reported_s > _REPORT_S)
                    reported_s = now_s if now_s - reported_s > _REPORT_S else reported_s
                    window.clear()
                if now_s - validated_s > self.config.validate_s:
                    self._validate()
                    validated_s = time.monotonic()
                if now_s - saved_s > self.config.checkpoint_s:
                    self.save()
                    saved_s = time.monotonic()
        self._validate()
        self.save()
        return self.metrics

    @property
    def was_interrupted(self) -> bool:
        return self._stop.is_set()

    def _goes_on(self, until_step: int | None) -> bool:
        """The same answer in all processes: whoever is out of time ends it for all."""
        is_over = self.share >= 1.0 or self._stop.is_set() or (until_step is not None and self.step >= until_step)
        if self.place.count > 1:
            flags = torch.tensor([float(is_over), float(self._stop.is_set())], device=self.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            is_over, is_stopped = (flags > 0).tolist()
            if is_stopped:
                self._stop.set()
        return not is_over

    def _learning_rate(self) -> float:
        config = self.config
        warm_up = min(1.0, (self.step + 1) / max(1, config.warm_up_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * self.share))
        return config.learning_rate * warm_up * (config.final_share + (1 - config.final_share) * cosine)

    def _train_step(self, share: float, rate: float) -> dict[str, float]:
        config, network = self.config, self.task.network
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        rows: list[dict[str, float]] = []
        for part in range(config.accumulation):
            batch = self.task.batch(Draws(config.seed, self.step, part, self.place.rank), share)
            is_last = part == config.accumulation - 1
            network.train()
            with self._sync(is_last), self._precision():
                losses = self._forward(batch, share)
                (losses["total"] / config.accumulation).backward()
            # All at once, and after the backward pass has been launched: every look at a value waits for the device.
            values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
            rows.append(dict(zip(losses, values, strict=True)))
            if not math.isfinite(rows[-1]["total"]):
                raise self._not_a_number("loss", losses, batch)
        norm = float(nn.utils.clip_grad_norm_(self._trained, config.max_gradient_norm))
        if not math.isfinite(norm):
            raise self._not_a_number("gradient", losses, batch)
        self.optimiser.step()
        self._average()
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        return {**means, "gradient_norm": norm}

    def _sync(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._forward, DistributedDataParallel) and not is_last:
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _precision(self) -> torch.autocast:
        wanted = self.config.precision
        is_low = wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_low)

    @torch.no_grad()
    def _average(self) -> None:
        """Young averages follow quickly, so that a short run is not held back by its beginning."""
        decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
        current = self.task.network.state_dict()
        for key, value in self.averaged.items():
            if value.is_floating_point():
                value.lerp_(current[key], 1 - decay)
            else:
                value.copy_(current[key])

    def _not_a_number(self, what: str, losses: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> TrainingError:
        path = self.directory / f"not-a-number-{self.step}-{self.place.rank}.pt"
        content = {
            "step": self.step,
            "losses": {key: float(value.detach()) for key, value in losses.items()},
            "batch": dict(batch),
            "network": self.task.network.state_dict(),
        }
        torch.save(content, path)
        return TrainingError(
            f"step {self.step}: the {what} is not a number; batch and network are in {path}; "
            f"continue from {CHECKPOINT} with a smaller --learning-rate"
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """The averaged weights take the network's place for the time of the validation."""
        if not self.place.is_first:
            return
        network = self.task.network
        current = {key: value.clone() for key, value in network.state_dict().items()}
        network.load_state_dict(self.averaged)
        network.eval()
        try:
            self.metrics = self.task.validate(network)
        finally:
            network.load_state_dict(current)
            network.train()
        self._log({f"validation/{key}": value for key, value in self.metrics.items()}, is_shown=True)

    def _log(self, values: Mapping[str, float], *, is_shown: bool) -> None:
        if not self.place.is_first:
            return
        line = {"step": self.step, "elapsed_s": round(self.elapsed_s, 2), **values}
        with (self.directory / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, self.step)
        if is_shown:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "share")
            print(f"{100 * self.share:3.0f} %, step {self.step}, {self.elapsed_s:.0f} s: {shown}", file=sys.stderr)

    def save(self) -> None:
        """Writes everything that a continuation needs; a crash never leaves half a file."""
        if not self.place.is_first:
            return
        content = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "config": asdict(self.config),
            "network": self.task.network.state_dict(),
            "averaged": self.averaged,
            "optimiser": self.optimiser.state_dict(),
            "metrics": self.metrics,
        }
        temporary = self.directory / f"{CHECKPOINT}.part"
        torch.save(content, temporary)
        os.replace(temporary, self.directory / CHECKPOINT)

    def resume(self, path: Path | None = None) -> None:
        """Continues from a checkpoint: network, average, moments, step and time. TrainingError if it does not fit.

        Lengths, intervals and the learning rate may differ from those of the checkpoint.
        """
        path = path or self.directory / CHECKPOINT
        content = read_checkpoint(path)
        free = {"steps", "minutes", "learning_rate", "checkpoint_s", "validate_s", "log_steps"}
        for key, value in asdict(self.config).items():
            if key not in free and content["config"].get(key) != value:
                raise TrainingError(
                    f"{path}: made with {key} {content['config'].get(key)!r}, not {value!r}; give the same settings, "
                    "or another directory to start anew"
                )
        try:
            self.task.network.load_state_dict(content["network"])
            self.optimiser.load_state_dict(content["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{path}: of another network: {reason}; give another directory") from error
        self.averaged = {key: value.to(self.device) for key, value in content["averaged"].items()}
        self.step, self.elapsed_s = int(content["step"]), float(content["elapsed_s"])
        self.metrics = dict(content["metrics"])
        if self.place.is_first:
            _drop_lines_after(self.directory / LOG, self.step)


@contextlib.contextmanager
def calls_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` instead of breaking in; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def mixed_seed(*numbers: int) -> int:
    """A 63-bit seed that differs in about half its bits for any other numbers (the finaliser of SplitMix64)."""
    value = 0
    for number in numbers:
        value = (value + number + 1) * _MIX & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 27
    return value >> 1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, without running anything in it. TrainingError when it cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"{path}: not a checkpoint: {reason}; remove it to start anew") from error
    if not isinstance(content, dict) or not {"step", "network", "averaged", "optimiser", "config"} <= content.keys():
        raise TrainingError(f"{path}: not a checkpoint of a training; remove it to start anew")
    return content


def _drop_lines_after(path: Path, step: int) -> None:
    """A continued run writes again what came after the checkpoint."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("--tensorboard: TensorBoard is not installed; pip install 'lightvo[train]'") from error
    return SummaryWriter(str(directory))
