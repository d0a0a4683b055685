"""What a training would do wrong on a GPU, shown on the CPU: tensors on no device, places in too few digits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from frontends.aliked_network import ARCHITECTURES, AlikedNetwork
from frontends.training import distillation
from frontends.training.aliked_losses import AlikedLossConfig
from frontends.training.distillation import (
    AlikedDistillation,
    DistillationConfig,
    XFeatDistillation,
    initialise,
)
from frontends.training.fine_offsets import cell_pairs, fine_matcher
from frontends.training.pair_sources import LayeredSource
from frontends.training.pairs_homography import applied, composed, inverted
from frontends.training.pairs_layers import LayersConfig, layered_pairs
from frontends.training.pairs_posed import PosedPairs
from frontends.training.photometry import NO_CHANGE, PhotometryConfig
from frontends.training.photos import PhotoBank, TrainingError
from frontends.training.tasks_features import (
    AlikedTask,
    Checks,
    PairTaskConfig,
    XFeatLossConfig,
    XFeatTask,
    XFeatWithMatcher,
)
from frontends.training.trainer import Draws, Task
from frontends.training.xfeat_trainable import TrainableXFeat

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import train_r2d2

CPU = torch.device("cpu")
PAIRS = PairTaskConfig(batch_size=2, num_checked=2, checked_keypoints=16)
VIEWS = DistillationConfig(side_px=64, batch_size=2, keypoints=16, random_keypoints=8)


def photo(seed: int, side: int = 96) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).uniform(0, 255, (side // 8, side // 8, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def bank() -> PhotoBank:
    return PhotoBank(torch.from_numpy(np.stack([photo(seed) for seed in range(4)])).permute(0, 3, 1, 2).contiguous(), 4)


def aliked() -> AlikedNetwork:
    torch.manual_seed(0)
    network = AlikedNetwork(ARCHITECTURES["t16"])
    initialise(network)
    return network


def xfeat() -> TrainableXFeat:
    torch.manual_seed(0)
    network = TrainableXFeat()
    initialise(network)
    return network


def tasks(bank: PhotoBank) -> dict[str, Task]:
    source = LayeredSource(bank, LayersConfig(size=(64, 64)), PhotometryConfig())
    checks = Checks(source, (), PAIRS)
    losses = XFeatLossConfig(num_cells=16, teacher_keypoints=16)
    return {
        "aliked, distil": AlikedDistillation(aliked(), aliked(), bank, bank, VIEWS, checks),
        "aliked, pairs": AlikedTask(aliked(), source, checks, PAIRS, AlikedLossConfig(num_detected=16, num_random=8)),
        "xfeat, distil": XFeatDistillation(xfeat(), xfeat(), bank, bank, VIEWS, checks),
        "xfeat, pairs": XFeatTask(XFeatWithMatcher(xfeat(), fine_matcher()), aliked(), source, checks, PAIRS, losses),
    }


# ---------------------------------------------------------------- devices


class _NamesDevices(TorchFunctionMode):
    """Refuses new tensors that are on the CPU because nobody said where; plain numbers may stay there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and func is not torch.as_tensor and kwargs.get("device") is None:
            raise AssertionError(f"{func.__name__} without a device")
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["aliked, distil", "aliked, pairs", "xfeat, distil", "xfeat, pairs"])
def test_every_tensor_of_a_step_is_made_on_the_device(bank: PhotoBank, name: str) -> None:
    task = tasks(bank)[name]
    with _NamesDevices():
        batch = task.batch(Draws(0), 0.0)
        for share in (0.0, 0.9):
            task.network.train()
            task.losses(batch, share)["total"].backward()  # type: ignore[no-untyped-call]
        task.network.eval()
        with torch.no_grad():
            assert task.validate(task.network)


def test_every_tensor_of_a_step_of_r2d2_is_made_on_the_device() -> None:
    config = train_r2d2.TrainingConfig(mchan=1, dim=16, side_px=64, batch_size=2, patch_px=8, border=4)
    training = train_r2d2.Training.begin(config, CPU)
    batch = next(train_r2d2.batches([photo(0), photo(1)], config, 0, CPU))
    with _NamesDevices():
        train_r2d2.pair_losses(training.network, batch, config).total.backward()
        cell_pairs(batch.flow[0])


def test_the_refusal_is_noticed() -> None:
    with _NamesDevices(), pytest.raises(AssertionError, match="arange without a device"):
        torch.arange(3)


# ---------------------------------------------------------------- digits


def posed_pairs() -> PosedPairs:
    K = torch.tensor([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]]).expand(2, 3, 3)
    T = torch.eye(4).repeat(2, 1, 1)
    T[:, :3, 3] = torch.tensor([0.2, -0.1, 0.05])
    images, depths = torch.rand(2, 3, 240, 320), torch.full((2, 240, 320), 3.0)
    return PosedPairs(images, images, depths, depths, K, K, T)


class _Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["layers", "posed"])
def test_places_have_all_their_digits_whatever_the_networks_work_in(bank: PhotoBank, kind: str, side: int) -> None:
    """Autocast and TensorFloat-32 act on matrix products: places are told without any."""
    with _Operations() as operations:
        if kind == "layers":
            pairs: Any = layered_pairs(bank, 2, torch.Generator().manual_seed(0), LayersConfig((320, 256)), NO_CHANGE)
        else:
            pairs = posed_pairs()
        points = torch.rand(2, 50, 2) * 250
        expected = pairs.transfer(side, points)
    assert operations.names and not operations.names & {"mm", "bmm", "addmm", "baddbmm", "matmul"}
    with torch.autocast("cpu", torch.bfloat16):
        found = pairs.transfer(side, points)
    assert found.points.dtype == torch.float32
    torch.testing.assert_close(found.points, expected.points, atol=0, rtol=0)
    assert torch.equal(found.is_visible, expected.is_visible)


def test_small_matrices_are_multiplied_and_inverted_as_by_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.eye(3) + 0.4 * torch.rand(2, 4, 5, 3, 3, generator=generator)
    vectors = torch.rand(4, 5, 7, 3, generator=generator)
    left, right = one.double().numpy(), two.double().numpy()
    np.testing.assert_allclose(composed(one, two, one).numpy(), left @ right @ left, rtol=1e-5)
    np.testing.assert_allclose(inverted(one).numpy(), np.linalg.inv(left), atol=1e-5)
    expected = vectors.double().numpy() @ np.swapaxes(left, -1, -2)
    np.testing.assert_allclose(applied(one, vectors).numpy(), expected, rtol=1e-5)
    flat = np.concatenate((vectors.double().numpy()[..., :2], np.ones((4, 5, 7, 1))), axis=-1)
    expected = flat @ np.swapaxes(left, -1, -2)
    np.testing.assert_allclose(applied(one, vectors[..., :2]).numpy(), expected, rtol=1e-5)


def test_a_teacher_speaks_in_float32(bank: PhotoBank, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    original = distillation.detect

    def watched(score_map: Tensor, count: int) -> Any:
        seen.append((score_map.dtype, torch.is_autocast_enabled("cpu")))
        found = original(score_map, count)
        assert found.keypoints.dtype == torch.float32
        return found

    monkeypatch.setattr(distillation, "detect", watched)
    task = tasks(bank)["aliked, distil"]
    with torch.autocast("cpu", torch.bfloat16):
        losses = task.losses(task.batch(Draws(0), 0.0), 0.9)
    assert seen == [(torch.float32, False)]
    assert all(torch.isfinite(value) for value in losses.values())


def test_photographs_smaller_than_the_views_are_refused(bank: PhotoBank) -> None:
    large = DistillationConfig(side_px=128, batch_size=2)
    checks = Checks(LayeredSource(bank, LayersConfig(size=(64, 64)), NO_CHANGE), (), PAIRS)
    with pytest.raises(TrainingError, match="photographs of 96 px hold no views of 128 px; give a larger --photo-px"):
        XFeatDistillation(xfeat(), xfeat(), bank, bank, large, checks)
