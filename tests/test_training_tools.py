"""The training tools: data folders, photographs that cannot be read, the smoke test's verdict, weights that run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from frontends.aliked import Aliked, AlikedConfig
from frontends.aliked_network import ARCHITECTURES, AlikedNetwork
from frontends.training.distillation import initialise
from frontends.training.pair_sources import LayeredSource, MixedSource, as_tensors, from_tensors
from frontends.training.pairs_layers import LayersConfig
from frontends.training.pairs_posed import PosedPairs, read_tum
from frontends.training.photometry import NO_CHANGE
from frontends.training.photos import TrainingError, load_photos, read_data_folders, square_cuts
from frontends.training.tasks_matching import LightGlueTask, MatchingTaskConfig
from frontends.training.trainer import Draws, Trainer, TrainerConfig
from frontends.training.validation import consensus, load_video_pairs
from frontends.training.xfeat_trainable import TrainableXFeat
from frontends.weights import load_file
from frontends.xfeat import XFeat, XFeatConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import train_aliked  # noqa: E402
import train_lightglue  # noqa: E402
import train_xfeat  # noqa: E402
from test_trainer import CONFIG, Line  # noqa: E402
from test_training_pairs import write_recording  # noqa: E402
from training_setup import Smoke, smoke  # noqa: E402

CPU = torch.device("cpu")


def write_photos(directory: Path, count: int = 30) -> Path:
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.uniform(0, 255, (12, 18, 3)).astype(np.float32)
        photo = cv2.resize(coarse, (144, 96), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(directory / f"{index:03}.jpg"), np.clip(photo, 0, 255).astype(np.uint8))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of photographs, two of them damaged."""
    directory = tmp_path_factory.mktemp("data")
    photos = write_photos(directory / "photos")
    (photos / "cut.jpg").write_bytes((photos / "000.jpg").read_bytes()[:40])
    (photos / "text.png").write_text("no image")
    (directory / "data.yaml").write_text("photos: [photos]\n")
    return directory / "data.yaml"


@pytest.fixture(scope="module")
def extractors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an ALIKED-T16 and of an XFeat that know nothing."""
    directory = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, network in (("aliked", AlikedNetwork(ARCHITECTURES["t16"])), ("xfeat", TrainableXFeat())):
        initialise(network)
        torch.save(network.state_dict(), directory / f"{name}.pt")
    return directory


# ---------------------------------------------------------------- data


def test_folders_are_relative_to_their_file_and_know_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    file = tmp_path / "data.yaml"
    file.write_text("photos: [a, $SOMEWHERE/a]\nvideo:\n")
    folders = read_data_folders(file)
    assert folders.photos == (tmp_path / "a", tmp_path / "a") and folders.video == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photo: [a]", "photo: unknown key; valid: photos"),
        ("photos: a", "photos: expected a list"),
        ("photos: [nowhere]", "nowhere: no such file"),
        ("photos: [$NOT_SET_AT_ALL/x]", "environment variable is not set"),
        ("- a", "expected the keys"),
        ("photos: [", "cannot be read as YAML"),
    ],
)
def test_wrong_data_files_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(TrainingError, match=message) as caught:
        read_data_folders(tmp_path / "data.yaml")
    assert "\n" not in str(caught.value)


def test_the_shipped_data_file_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("photos", "tum/rgbd_7scenes_head/rgb"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("LIGHTVO_DATA", str(tmp_path))
    assert read_data_folders(ROOT / "tools" / "training_data.yaml").photos


def test_damaged_photographs_are_skipped_and_counted_and_none_is_on_both_sides(data: Path) -> None:
    photos = data.parent / "photos"
    bank, held_out = load_photos([photos], 64, CPU)
    assert {*bank.skipped, *held_out.skipped} == {"cut.jpg", "text.png"}
    assert bank.num_photos + held_out.num_photos == 30 and bank.pixels.shape[1:] == (3, 64, 64)
    trained, kept = (one.pixels.flatten(1).tolist() for one in (bank, held_out))
    assert not {tuple(row) for row in trained} & {tuple(row) for row in kept}
    with pytest.raises(TrainingError, match="name folders with 30"):
        load_photos([photos], 64, CPU, max_photos=3)


def test_squares_cover_a_photograph() -> None:
    photo = np.arange(40 * 100, dtype=np.uint32).reshape(40, 100, 1).astype(np.uint8).repeat(3, axis=2)
    cuts = square_cuts(photo, 40)
    assert len(cuts) == 3 and all(cut.shape == (40, 40, 3) for cut in cuts)
    assert np.array_equal(cuts[0], photo[:, :40]) and np.array_equal(cuts[-1], photo[:, 60:])
    assert len(square_cuts(photo[:, :45], 20)) == 1 and len(square_cuts(photo.transpose(1, 0, 2), 20)) == 3


def test_pairs_survive_being_taken_apart_and_collections_get_their_share(data: Path, tmp_path: Path) -> None:
    write_recording(tmp_path)
    bank, _ = load_photos([data.parent / "photos"], 64, CPU)
    layered = LayeredSource(bank, LayersConfig(size=(64, 64)), NO_CHANGE)
    source = MixedSource(layered, [read_tum(tmp_path, gaps=(1,))], 0.5, unreadable=[])
    batches = [source(2, torch.Generator().manual_seed(seed)) for seed in range(30)]
    posed = [batch for batch in batches if isinstance(batch, PosedPairs)]
    assert 5 < len(posed) < 25
    points = torch.rand(2, 20, 2) * 60
    for pairs in (batches[0], posed[0], next(b for b in batches if not isinstance(b, PosedPairs))):
        again = from_tensors(as_tensors(pairs))
        assert torch.equal(again.transfer(0, points).points, pairs.transfer(0, points).points)
    (tmp_path / "rgb" / "1.png").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="8 pairs could not be read"):
        MixedSource(layered, source.collections, 1.0, unreadable=[])(2, torch.Generator().manual_seed(0))


def test_video_pairs_lie_their_gap_apart_and_agree_where_nothing_moves(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "frames", 8)
    pairs = load_video_pairs([photos], (1, 5), 2, (64, 64), CPU)
    assert [video.gap for video in pairs] == [1, 5] and pairs[0].images0.shape == (2, 3, 64, 64)
    whole = load_video_pairs([photos], (3,), 5, (64, 64), CPU)[0]
    assert torch.equal(whole.images0[3:], whole.images1[:2])
    with pytest.raises(TrainingError, match="8 frames; name a folder with more than 9"):
        load_video_pairs([photos], (9,), 2, (64, 64), CPU)
    points = np.random.default_rng(0).uniform(0, 100, (60, 2))
    moved = points + np.array([5.0, 1.0])
    moved[:20] = np.random.default_rng(1).uniform(0, 100, (20, 2))
    assert 38 <= consensus(points, moved) <= 48 and consensus(points[:5], moved[:5]) == 0


# ---------------------------------------------------------------- the smoke test


class Recalling(Line):
    """A task whose recall rises as its error falls; `forgets` makes it depend on more than the step."""

    runs = 0

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        Recalling.runs += 1
        self.offset = 1e-3 * Recalling.runs if forgets else 0.0

    def losses(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        losses = super().losses(batch, share)
        return {**losses, "total": losses["total"] + self.offset}

    def validate(self, network: nn.Module) -> dict[str, float]:
        return {"recall": 1 - super().validate(network)["error"] / 2}


SPEC = Smoke(TrainerConfig(**{**{n: getattr(CONFIG, n) for n in CONFIG.__slots__}, "steps": 80}), "total", 0.3)


def test_a_smoke_test_passes_where_all_comes_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke(Recalling, SPEC, tmp_path / "out") == 0
    assert capsys.readouterr().out.count("ok  ") == 3


@pytest.mark.parametrize("failing", ["loss", "recall", "resumed"])
def test_a_smoke_test_fails_for_each_of_its_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    trainer = SPEC.trainer
    if failing == "loss":
        trainer = TrainerConfig(**{**{n: getattr(trainer, n) for n in trainer.__slots__}, "learning_rate": 0.0})
    spec = Smoke(trainer, "total", 5.0 if failing == "recall" else -10.0)
    assert smoke(lambda: Recalling(forgets=failing == "resumed"), spec, tmp_path / "out") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and failing in failed[0]


SMALL = ("--device", "cpu", "--batch-size", "2", "--checked", "2")


@pytest.mark.parametrize(
    ("main", "extra"),
    [
        (train_lightglue.main, ("--extractor-weights", "aliked.pt", "--side", "64", "--keypoints", "24")),
        (train_aliked.main, ("--side", "64")),
        (train_xfeat.main, ("--side", "64", "--keypoint-teacher", "aliked.pt")),
    ],
)
def test_every_tool_goes_on_exactly_where_it_was(
    data: Path,
    extractors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    extra: tuple[str, ...],
) -> None:
    arguments = [str(extractors / word) if word.endswith(".pt") else word for word in extra]
    options = ["--smoke", "--steps", "7", "--data", str(data), "--output", str(tmp_path / "out")]
    assert main([*options, *SMALL, *arguments]) in (0, 1)
    captured = capsys.readouterr()
    assert "ok   resumed: 5 steps with the same losses" in captured.out
    assert "photographs cannot be read and are left out" in captured.err


def test_a_trained_aliked_runs_and_carries_what_was_behind_it(data: Path, extractors: Path, tmp_path: Path) -> None:
    options = ["--data", str(data), "--output", str(tmp_path), "--steps", "2", "--side", "64", *SMALL]
    assert train_aliked.main([*options, "--teacher", str(extractors / "aliked.pt")]) == 0
    path = tmp_path / "aliked-t16.safetensors"
    features = Aliked(AlikedConfig(max_keypoints=32), load_file(path)[0]).extract(np.zeros((64, 96), np.uint8))
    assert features.descriptors.shape == (32, 64)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["licence"] == "Apache-2.0" and metadata["fits"] == "aliked-t16" and metadata["steps"] == "2"
    assert "recall" in json.loads(metadata["metrics"]) and json.loads(metadata["trainer"])["steps"] == 2
    assert json.loads((tmp_path / "aliked-t16.json").read_text())["arguments"]["side"] == "64"


def test_a_trained_xfeat_runs(data: Path, extractors: Path, tmp_path: Path) -> None:
    options = ["--data", str(data), "--steps", "2", "--side", "64", *SMALL]
    teacher = ["--teacher", str(extractors / "xfeat.pt")]
    assert train_xfeat.main([*options, "--output", str(tmp_path / "d"), *teacher]) == 0
    pairs = ["--recipe", "pairs", "--fine", "--keypoint-teacher", str(extractors / "aliked.pt")]
    start = ["--start", str(tmp_path / "d" / "xfeat.safetensors")]
    assert train_xfeat.main([*options, "--output", str(tmp_path / "p"), *pairs, *start]) == 0
    tensors, _ = load_file(tmp_path / "p" / "xfeat.safetensors")
    assert any(name.startswith("fine_matcher.") for name in tensors)
    XFeat(XFeatConfig(), tensors).extract(np.zeros((64, 96), np.uint8))


def test_a_trained_lightglue_has_both_stages_and_resumes(data: Path, extractors: Path, tmp_path: Path) -> None:
    options = ["--data", str(data), "--output", str(tmp_path), "--side", "64", "--keypoints", "24", *SMALL]
    options += ["--extractor-weights", str(extractors / "aliked.pt"), "--confidence-steps", "2"]
    assert train_lightglue.main([*options, "--steps", "2"]) == 0
    first, _ = load_file(tmp_path / "lightglue-light-aliked-t16.safetensors")
    assert train_lightglue.main([*options, "--steps", "2", "--resume"]) == 0
    again, _ = load_file(tmp_path / "lightglue-light-aliked-t16.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    stages = [
        torch.load(tmp_path / part / "checkpoint.pt", weights_only=True)["averaged"] for part in ("", "confidence")
    ]
    changed = {key.split(".")[0] for key, value in stages[0].items() if not torch.equal(value, stages[1][key])}
    assert changed == {"token_confidence"}


def test_tools_say_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.yaml").write_text("photos: [missing]")
    assert train_aliked.main(["--data", str(tmp_path / "data.yaml"), "--output", str(tmp_path), *SMALL]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("train_aliked: error:") and "missing" in error[0]


def test_subsets_of_the_same_images_differ_and_their_labels_are_those_of_their_points(
    data: Path, extractors: Path
) -> None:
    bank, held_out = load_photos([data.parent / "photos"], 64, CPU)
    layers = LayersConfig(size=(64, 64), max_cutouts=1)
    source, held = (LayeredSource(one, layers, NO_CHANGE) for one in (bank, held_out))
    extract = train_lightglue.load_extractor("aliked-t16", extractors / "aliked.pt", CPU)
    config = MatchingTaskConfig(batch_size=3, keypoints=24, reuse=2, num_checked=2)
    network = train_lightglue.start_network(None, train_lightglue.SMOKE, CPU)
    task = LightGlueTask(network, extract, source, held, (), config)
    batches = [task.batch(Draws(0, step), 0.0) for step in range(3)]
    keypoints = [{tuple(row) for row in batch["keypoints0"][0].tolist()} for batch in batches]
    assert keypoints[0] & keypoints[1] and not keypoints[0] & keypoints[2]
    fresh = LightGlueTask(network, extract, source, held, (), config).batch(Draws(0, 1), 0.0)
    assert all(torch.equal(fresh[key], batches[1][key]) for key in fresh)
    matched = batches[0]["partner0"] >= 0
    back = batches[0]["partner1"].gather(1, batches[0]["partner0"].clamp(min=0))
    assert int(matched.sum()) > 0 and bool((back == torch.arange(24))[matched].all())


def test_interrupted_tools_leave_a_checkpoint_and_no_weights(
    data: Path, extractors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_once(self: Trainer, until_step: int | None = None) -> dict[str, float]:
        self._stop.set()
        self.save()
        return {}

    monkeypatch.setattr(Trainer, "run", stop_at_once)
    options = ["--data", str(data), "--output", str(tmp_path), "--side", "64", *SMALL]
    assert train_aliked.main([*options, "--teacher", str(extractors / "aliked.pt")]) == 130
    assert (tmp_path / "checkpoint.pt").is_file() and not list(tmp_path.glob("*.safetensors"))
