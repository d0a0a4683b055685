"""The training loop on a small task: it learns, continues exactly, averages, stops at what is no number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from frontends.training.photos import TrainingError
from frontends.training.trainer import (
    CHECKPOINT,
    LOG,
    Draws,
    Place,
    Trainer,
    TrainerConfig,
    local_device,
    mixed_seed,
    read_checkpoint,
)

CPU = torch.device("cpu")
CONFIG = TrainerConfig(steps=30, learning_rate=0.05, warm_up_steps=3, log_steps=1, ema_decay=0.9, validate_s=1e9)


class Line:
    """Learns y = 2 x_0 - x_1 + 0.5 with a batch norm on the way; `spoils` makes the loss of a step no number."""

    def __init__(self, spoils: int | None = None) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.spoils, self.num_batches, self.stops_at = spoils, 0, -1

    def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
        generator = draws.generator(CPU)
        x = torch.rand((16, 2), generator=generator)
        self.num_batches += 1
        if draws.step == self.stops_at:
            signal.raise_signal(signal.SIGINT)
        return {"x": x, "y": 2 * x[:, :1] - x[:, 1:] + 0.5, "is_bad": torch.tensor(draws.step == self.spoils)}

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        error = (self.network(batch["x"]) - batch["y"]).square().mean()
        return {"total": error + torch.where(batch["is_bad"], torch.nan, 0.0), "square": error}

    def validate(self, network: nn.Module) -> dict[str, float]:
        assert not network.training
        x = torch.linspace(0, 1, 20)[:, None].expand(-1, 2)
        return {"error": float((network(x) - x[:, :1] - 0.5).square().mean())}


def log(directory: Path, key: str = "total") -> list[float]:
    lines = [json.loads(line) for line in (directory / LOG).read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_it_learns_and_logs_what_it_did(tmp_path: Path) -> None:
    trainer = Trainer(Line(), replace(CONFIG, steps=80), tmp_path, CPU)
    metrics = trainer.run()
    losses, errors, rates = log(tmp_path), log(tmp_path, "validation/error"), log(tmp_path, "learning_rate")
    assert len(losses) == 80 and losses[-1] < losses[0] / 5
    assert len(errors) == 2 and errors[1] < errors[0] / 5 and metrics["error"] == errors[1]
    assert rates[0] == pytest.approx(0.05 / 3, rel=0.01) and max(rates) <= 0.05 and rates[-1] < 0.01 * 0.05 * 3
    assert trainer.share == 1.0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path, accumulation: int) -> None:
    config = replace(CONFIG, accumulation=accumulation)
    whole = Trainer(Line(), config, tmp_path / "whole", CPU)
    whole.run()
    first = Trainer(Line(), config, tmp_path / "parts", CPU)
    first.run(until_step=13)
    # What came after the last checkpoint is lost and done again.
    with (tmp_path / "parts" / LOG).open("a") as file:
        file.write(json.dumps({"step": 14, "total": 99.0}) + "\n")
    second = Trainer(Line(), config, tmp_path / "parts", CPU)
    second.resume()
    assert second.step == 13
    second.run()
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    for key, value in whole.task.network.state_dict().items():
        assert torch.equal(value, second.task.network.state_dict()[key])
        assert torch.equal(whole.averaged[key], second.averaged[key])


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    task = Line()
    Trainer(task, replace(CONFIG, steps=4, accumulation=5), tmp_path, CPU).run()
    assert task.num_batches == 20

    class Plain(Line):
        """Without the batch norm, which looks at every batch on its own."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.network, self.size = nn.Sequential(nn.Linear(2, 1)), size

        def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
            batch = Line.batch(self, replace(draws, part=0), share)
            part = slice(draws.part * self.size, (draws.part + 1) * self.size)
            return {key: value[part] if value.ndim else value for key, value in batch.items()}

    results = []
    for size, accumulation in ((16, 1), (4, 4)):
        torch.manual_seed(1)
        trainer = Trainer(Plain(size), replace(CONFIG, steps=5, accumulation=accumulation), tmp_path / str(size), CPU)
        with torch.no_grad():
            trainer.task.network[0].weight.zero_()  # type: ignore[index]
            trainer.task.network[0].bias.zero_()  # type: ignore[index]
        trainer.run()
        results.append(torch.cat([p.flatten() for p in trainer.task.network.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_the_average_is_that_of_the_steps(tmp_path: Path) -> None:
    trainer = Trainer(Line(), replace(CONFIG, steps=6), tmp_path, CPU)
    expected = {key: value.clone().double() for key, value in trainer.task.network.state_dict().items()}
    for step in range(6):
        trainer.run(until_step=step + 1)
        decay = min(0.9, (step + 1) / (step + 10))
        for key, value in trainer.task.network.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value
    for key, value in trainer.averaged.items():
        torch.testing.assert_close(value.double(), expected[key].double(), atol=1e-6, rtol=1e-5)


def test_what_is_no_number_stops_with_its_step_and_batch(tmp_path: Path) -> None:
    trainer = Trainer(Line(spoils=7), CONFIG, tmp_path, CPU)
    trainer.save()
    with pytest.raises(TrainingError, match=r"step 7: the loss is not a number.*not-a-number-7-0\.pt"):
        trainer.run()
    saved = torch.load(tmp_path / "not-a-number-7-0.pt", weights_only=True)
    assert saved["step"] == 7 and torch.equal(saved["batch"]["x"], Line().batch(Draws(0, 7), 0.0)["x"])
    assert all(bool(torch.isfinite(value).all()) for value in saved["network"].values())


def test_gradients_that_are_no_number_stop_too(tmp_path: Path) -> None:
    class Steep(Line):
        def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
            loss = super().losses(batch, share)["total"]
            return {"total": (loss - loss.detach()).abs().sqrt()}

    with pytest.raises(TrainingError, match="step 0: the gradient is not a number"):
        Trainer(Steep(), CONFIG, tmp_path, CPU).run()


def test_a_signal_ends_the_run_after_its_step_with_everything_saved(tmp_path: Path) -> None:
    task = Line()
    task.stops_at = 4
    trainer = Trainer(task, CONFIG, tmp_path, CPU)
    trainer.run()
    assert trainer.was_interrupted and trainer.step == 5
    assert read_checkpoint(tmp_path / CHECKPOINT)["step"] == 5
    again = Trainer(Line(), CONFIG, tmp_path, CPU)
    again.resume()
    again.run()
    Trainer(Line(), CONFIG, tmp_path / "whole", CPU).run()
    assert log(tmp_path) == log(tmp_path / "whole")


def test_minutes_end_a_run_and_bend_its_schedule(tmp_path: Path) -> None:
    trainer = Trainer(Line(), replace(CONFIG, steps=10**9, minutes=0.005), tmp_path, CPU)
    trainer.run()
    rates = log(tmp_path, "learning_rate")
    assert 0 < trainer.step < 10**9 and trainer.share == 1.0 and rates[-1] < max(rates)
    again = Trainer(Line(), replace(CONFIG, steps=10**9, minutes=0.005), tmp_path, CPU)
    again.resume()
    again.run()
    assert again.step == trainer.step


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    Trainer(Line(), CONFIG, tmp_path, CPU).run(until_step=2)
    with pytest.raises(TrainingError, match="made with seed 0, not 5"):
        Trainer(Line(), replace(CONFIG, seed=5), tmp_path, CPU).resume()
    other = Line()
    other.network = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(TrainingError, match="of another network"):
        Trainer(other, CONFIG, tmp_path, CPU).resume()
    (tmp_path / CHECKPOINT).write_bytes(b"PK")
    with pytest.raises(TrainingError, match="not a checkpoint"):
        Trainer(Line(), CONFIG, tmp_path, CPU).resume()
    torch.save({"step": 1}, tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError, match="not a checkpoint of a training"):
        Trainer(Line(), CONFIG, tmp_path, CPU).resume()


def test_no_checkpoint_runs_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"step": Evil()}, tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError, match="not a checkpoint"):
        read_checkpoint(tmp_path / CHECKPOINT)
    assert not (tmp_path / "ran").exists()


def test_seeds_differ_for_every_batch() -> None:
    seeds = {mixed_seed(0, step, part, rank) for step in range(50) for part in range(3) for rank in range(4)}
    assert len(seeds) == 600 and all(0 <= seed < 2**63 for seed in seeds)
    draws = [Draws(0, step) for step in range(8)]
    first = [float(torch.rand(1, generator=d.generator(CPU, every=4))) for d in draws]
    assert first[0] == first[3] != first[4] == first[7]


def test_other_threads_train_without_touching_signals(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = Trainer(Line(), replace(CONFIG, steps=2), tmp_path, CPU)
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join(timeout=30)
    assert trainer.step == 2 and signal.getsignal(signal.SIGINT) is before


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device("auto") == CPU
    with pytest.raises(TrainingError, match="--device cuda"):
        local_device("cuda")


PARALLEL = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_trainer import CONFIG, CPU, Line
from frontends.training.trainer import Trainer, joined_processes

class Plain(Line):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

with joined_processes(CPU) as place:
    trainer = Trainer(Plain(), replace(CONFIG, steps=12, accumulation=2), Path({out!r}), CPU, place)
    trainer.run()
    weights = torch.cat([p.detach().flatten() for p in trainer.task.network.parameters()])
    torch.save(weights, Path({out!r}) / f"weights-{{place.rank}}.pt")
"""


def test_two_processes_learn_what_one_does_with_both_their_batches(tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    weights = [torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert read_checkpoint(tmp_path / CHECKPOINT)["step"] == 12

    class Both(Line):
        """What the two processes draw, one after the other."""

        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

        def batch(self, draws: Draws, share: float) -> dict[str, Tensor]:
            return Line.batch(self, replace(draws, part=draws.part // 2, rank=draws.part % 2), share)

    config = replace(CONFIG, steps=12, accumulation=4)
    alone = Trainer(Both(), config, tmp_path / "alone", CPU, Place())
    alone.run()
    expected = torch.cat([p.detach().flatten() for p in alone.task.network.parameters()])
    np.testing.assert_allclose(weights[0].numpy(), expected.numpy(), atol=1e-5)
