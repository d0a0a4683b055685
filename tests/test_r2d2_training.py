"""The tool that trains R2D2: a few steps, a training that goes on; and the comparison with random weights."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from smooth_photos import photo

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import r2d2_inliers  # noqa: E402
import train_r2d2  # noqa: E402

# ---------------------------------------------------------------- the tool


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that a short training is the same on every machine; tiny networks are faster so, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_few_steps_lower_the_loss_and_are_reproducible() -> None:
    config = train_r2d2.TrainingConfig(
        mchan=1, dim=16, side_px=48, batch_size=2, steps=60, learning_rate=1e-2, patch_px=8, border=4, warm_up=0.5
    )
    photos = [photo(seed, side=96) for seed in range(6)]
    training, before, after = train_r2d2.train(config, photos)
    assert float(after.total) < 0.9 * float(before.total)
    _, same_before, same_after = train_r2d2.train(config, photos)
    assert float(same_before.total) == float(before.total)
    assert float(same_after.total) == pytest.approx(float(after.total), abs=1e-4)
    assert training.network.architecture.constructor == "Quad_L2Net_ConfCFS(dim=16, mchan=1)"


@pytest.mark.usefixtures("one_thread")
def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_r2d2.TrainingConfig(mchan=1, dim=16, side_px=48, batch_size=2, steps=6, patch_px=8, border=4)
    photos, file = [photo(seed, side=96) for seed in range(6)], tmp_path / "x.checkpoint"
    whole, _, _ = train_r2d2.train(config, photos)
    original = train_r2d2.batches
    with monkeypatch.context() as patch:
        patch.setattr(train_r2d2, "batches", lambda *given: itertools.islice(original(*given), 3))
        assert train_r2d2.train(config, photos, checkpoint_file=file)[0].step == 3
    again, _, _ = train_r2d2.train(config, photos, checkpoint_file=file, resumes=True)
    assert whole.step == again.step == 6
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    with pytest.raises(train_r2d2.TrainingError, match="made with batch_size 2, not 3"):
        train_r2d2.train(replace(config, batch_size=3), photos, checkpoint_file=file, resumes=True)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(train_r2d2.TrainingError, match="not a checkpoint of this training"):
        train_r2d2.train(config, photos, checkpoint_file=file, resumes=True)


def test_a_training_goes_on_from_weights(tmp_path):
    photos = [photo(seed) for seed in range(4)]
    config = train_r2d2.TrainingConfig(mchan=1, dim=16, side_px=48, batch_size=2, steps=4, patch_px=8, border=4)
    first, before, after = train_r2d2.train(config, photos)
    train_r2d2.write(first.network, tmp_path / "first.pt", config, len(photos), first.step)
    start = train_r2d2.start_network(tmp_path / "first.pt")
    second, again, _ = train_r2d2.train(config, photos, start=start)
    # The loss of random weights is another; batch statistics are those of the pairs, so it is the same number.
    assert float(again.total) == pytest.approx(float(after.total), rel=1e-5) and again.total != before.total
    assert second.step == 4 and second.network is not start
    train_r2d2.write(second.network, tmp_path / "second.safetensors", config, 4, 4, tmp_path / "first.pt")
    with safe_open(tmp_path / "second.safetensors", "pt") as file:
        assert file.metadata()["start"].startswith("goes on from first.pt, SHA-256 ")
    with pytest.raises(train_r2d2.TrainingError, match="give --mchan"):
        train_r2d2.train(replace(config, mchan=2), photos, start=start)


def test_a_signal_ends_a_training_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), photo(seed))
    original = train_r2d2.batches

    def batches(*given: Any) -> Iterator[train_r2d2.Batch]:
        for index, batch in enumerate(original(*given)):
            if index == 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(train_r2d2, "batches", batches)
    output = tmp_path / "out" / "small.pt"
    arguments = ["--photos", str(tmp_path), "--output", str(output), "--smoke", "--device", "cpu", "--batch-size", "2"]
    assert train_r2d2.main(arguments) == 130
    assert not output.exists()
    checkpoint = torch.load(output.with_name("small.pt.checkpoint"), weights_only=True)
    assert checkpoint["step"] == 2


def test_pairs_made_ahead_for_another_device_have_its_form() -> None:
    config = train_r2d2.TrainingConfig(side_px=48, batch_size=2)
    made = train_r2d2.batches([photo(seed) for seed in range(3)], config, 5, torch.device("meta"))
    first = [next(made) for _ in range(3)][-1]
    made.close()  # type: ignore[attr-defined]
    assert first.images0.shape == first.images1.shape == (2, 3, 48, 48) and first.flow.shape == (2, 48, 48, 2)
    assert first.flow.device.type == "meta"


def test_the_learning_rate_rises_to_its_highest_and_falls_to_nothing() -> None:
    config = train_r2d2.TrainingConfig(learning_rate=0.5, rise=0.25)
    rates = [train_r2d2.learning_rate(config, share) for share in np.linspace(0, 1, 101)]
    assert np.argmax(rates) == 25 and rates[25] == pytest.approx(0.5)
    assert 0 < rates[0] < 0.1 and rates[100] == pytest.approx(0.0, abs=1e-9)
    assert np.all(np.diff(rates[:26]) > 0) and np.all(np.diff(rates[25:]) < 0)
    flat = train_r2d2.TrainingConfig(learning_rate=0.5)
    assert train_r2d2.learning_rate(flat, 0.0) == pytest.approx(0.5)


def test_safetensors_keep_the_network_and_say_what_it_is(tmp_path: Path) -> None:
    from frontends.r2d2_network import R2d2Architecture, R2d2Network, load_network
    from frontends.weights import load_checkpoint

    torch.manual_seed(0)
    network = R2d2Network(R2d2Architecture(dim=16, mchan=1))
    images = torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        network(images)  # statistics that are not neutral
    path = tmp_path / "mine.safetensors"
    train_r2d2.write(network, path, train_r2d2.SMOKE, 100)
    loaded, _ = load_checkpoint("r2d2", path)
    assert loaded.constructor == "Quad_L2Net_ConfCFS(dim=16, mchan=1)"
    expected, found = network.eval()(images), load_network(loaded.constructor, loaded.state_dict)(images)
    torch.testing.assert_close(found.descriptors, expected.descriptors.detach(), atol=5e-3, rtol=0)
    torch.testing.assert_close(found.repeatability, expected.repeatability.detach(), atol=2e-3, rtol=0)


def test_the_command_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from frontends.r2d2_network import load_network
    from frontends.weights import load_checkpoint

    for seed in range(3):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), photo(seed))
    output = tmp_path / "out" / "small.pt"
    arguments = ["--photos", str(tmp_path), "--output", str(output), "--smoke", "--steps", "1"]
    assert train_r2d2.main(arguments) == 1  # one step halves no loss
    assert "held-out loss" in capsys.readouterr().out
    loaded, file = load_checkpoint("r2d2", output)
    assert load_network(loaded.constructor, loaded.state_dict).architecture.mchan == 1
    assert file.name == "small"


def test_a_directory_without_photographs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--photos", str(tmp_path), "--output", str(tmp_path / "x.pt"), "--smoke"]
    assert train_r2d2.main(arguments) == 2
    assert "0 photographs" in capsys.readouterr().err
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    assert train_r2d2.main(arguments) == 2
    error = capsys.readouterr().err
    assert "broken.jpg" in error and error.count("\n") == 1


# ---------------------------------------------------------------- the comparison with random weights


def test_the_ratio_is_that_to_the_median_seed_with_an_interval_around_it() -> None:
    counts = np.array([[60.0, 10.0, 1.0, 20.0], [40.0, 14.0, 3.0, 24.0]])  # means 50; 12, 2, 22
    ratio = r2d2_inliers.ratio_to_random(counts)
    assert ratio.value == pytest.approx(50 / 12)
    assert ratio.low == pytest.approx(40 / 14) and ratio.high == pytest.approx(60 / 10)
    none = r2d2_inliers.ratio_to_random(np.array([[60.0, 0.0], [40.0, 0.0]]))
    assert none.value == pytest.approx(50)  # less than one inlier counts as one


def test_random_networks_differ_by_seed_and_only_by_it() -> None:
    constructor = "Quad_L2Net_ConfCFS(dim=16, mchan=1)"
    first, again = (dict(r2d2_inliers.random_networks(constructor, 2)) for _ in range(2))
    assert set(first) == {0, 1}
    assert torch.equal(first[1]["ops.0.weight"], again[1]["ops.0.weight"])
    assert not torch.equal(first[0]["ops.0.weight"], first[1]["ops.0.weight"])


def test_both_networks_are_measured_on_the_same_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole comparison on the bundled clip: every network names as many keypoints without thresholds."""
    from frontends.r2d2_network import R2d2Architecture, R2d2Network, checkpoint

    torch.manual_seed(7)
    path = tmp_path / "untrained.pt"
    torch.save(checkpoint(R2d2Network(R2d2Architecture(dim=16, mchan=1)).eval()), path)
    arguments = ["--weights", str(path), "--source", "demo", "--frames", "6", "--every", "3", "--gaps", "1,2"]
    assert r2d2_inliers.main([*arguments, "--seeds", "2", "--one-scale", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if " free " in line or " config " in line]
    assert len(rows) == 2 * 2 + 2 * 2  # with and without thresholds, two random ones; two gaps
    assert all(row[-1] == "2" for row in rows)  # starts 0 and 3 at both gaps
    free, config = ([row[row.index(name) + 2] for row in rows if name in row] for name in ("free", "config"))
    assert set(free) == {"1024"} and set(config) == {"0"}
    assert sum(line.startswith("gap") and "median seed" in line for line in lines) == 4
