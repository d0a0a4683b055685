"""LoFTR: the wrapper against kornia called directly, coordinates under a homography, and what can be missing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from frontends.base import PairMatcher, VoError, WeightsError, resized_shape
from frontends.frontend import create_extractor, create_pair_matcher
from frontends.loftr import Loftr, LoftrConfig, PairNetwork, random_network
from vo.config import FrontendConfig
from vo.config_loader import load_config
from vo.frontend import create_frontend
from vo.types import ConfigError

CPU = torch.device("cpu")
# Every mutually best pair of cells: random weights are sure of none.
ANY = LoftrConfig(weights="random", min_confidence=0.0)


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    image = generator.uniform(0, 255, (height // 3 + 1, width // 3 + 1, 3)).astype(np.float32)
    return np.clip(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def views(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Parts of one picture, so that even random features of them are alike."""
    return [picture(400, 300)[:height, :width] for width, height in sizes]


@pytest.fixture(scope="module")
def network() -> PairNetwork:
    pytest.importorskip("kornia", reason="kornia is not installed")
    found = random_network(ANY, CPU)
    # Eight random layers of attention make all cells alike, and hardly two of them each other's best.
    for name, parameter in found.named_parameters():  # type: ignore[attr-defined]
        if name.startswith("loftr_coarse") and ".norm2." in name:
            parameter.data *= 0.05
    return found


@pytest.mark.parametrize(
    ("sizes", "max_side"),
    [(((96, 80), (96, 80)), None), (((101, 75), (90, 83)), None), (((203, 150), (203, 141)), 100)],
    ids=["multiples of 8", "other sizes", "shrunk"],
)
def test_matches_are_those_of_kornia_on_the_padded_images(
    network: PairNetwork, sizes: tuple[tuple[int, int], tuple[int, int]], max_side: int | None
) -> None:
    images = views(*sizes)
    config = LoftrConfig(weights="random", min_confidence=0.0, max_side=max_side)
    features0, features1, matches = Loftr(config, network).match_images(images[0], images[1])

    batches, used = [], []
    for image in images:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        width, height = resized_shape(gray.shape[1], gray.shape[0], max_side)
        if (width, height) != (gray.shape[1], gray.shape[0]):
            gray = cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA)
        padded = np.pad(gray, ((0, -height % 8), (0, -width % 8)), mode="edge")
        assert padded.shape[0] % 8 == padded.shape[1] % 8 == 0
        batches.append(torch.from_numpy(padded.astype(np.float32) / 255)[None, None])
        used.append((width, height))
    with torch.inference_mode():
        found = network({"image0": batches[0], "image1": batches[1]})
    # kornia's first pixel has its centre at (0.5, 0.5).
    points = [found[f"keypoints{side}"].numpy() - 0.5 for side in (0, 1)]
    inside = np.all(
        [np.all((p >= -0.5) & (p <= np.array(u) - 0.5), axis=1) for p, u in zip(points, used, strict=True)], axis=0
    )
    assert len(matches) == inside.sum() > 10
    for features, p, u, image in zip((features0, features1), points, used, images, strict=True):
        full = np.array([image.shape[1], image.shape[0]])
        expected = (p[inside] + 0.5) * full / np.array(u) - 0.5
        np.testing.assert_allclose(features.valid_keypoints(), expected, atol=1e-4)
        assert features.image_size == tuple(full) and features.kind == "loftr"
    np.testing.assert_allclose(matches.scores, found["confidence"].numpy()[inside], atol=1e-6)
    assert np.array_equal(matches.indices[:, 0], matches.indices[:, 1])


class ExactNetwork:
    """In the network's place: matches that obey a homography of its own coordinates, exactly."""

    def __init__(self, homography: NDArray[np.float64]) -> None:
        self.homography = homography
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, data: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        shapes = [tuple(data[name].shape[2:]) for name in ("image0", "image1")]
        self.shapes = [(int(height), int(width)) for height, width in shapes]
        columns, rows = np.meshgrid(np.arange(0, shapes[0][1], 8), np.arange(0, shapes[0][0], 8))
        points0 = np.stack((columns.ravel(), rows.ravel()), axis=1).astype(np.float64)
        points1 = cv2.perspectiveTransform(points0[:, None], self.homography)[:, 0]
        confidence = torch.full((len(points0),), 0.5)
        return {
            "keypoints0": torch.from_numpy(points0),
            "keypoints1": torch.from_numpy(points1),
            "confidence": confidence,
        }


def test_keypoints_under_a_homography_map_back_to_full_resolution() -> None:
    """Two images of different sizes, both shrunk, both padded: what fits the homography of the full images must."""
    sizes, max_side = ((1001, 613), (877, 590)), 333
    H_full = np.array([[0.82, 0.05, 21.0], [-0.04, 0.87, 17.0], [2e-5, -1e-5, 1.0]])
    used = [resized_shape(*size, max_side) for size in sizes]
    # An edge of a pixel is an edge in every resolution; LoFTR counts from the edge of the image, we from a centre.
    to_full = [np.diag([s[0] / u[0], s[1] / u[1], 1.0]) for s, u in zip(sizes, used, strict=True)]
    half = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    H_network = np.linalg.inv(to_full[1]) @ half @ H_full @ np.linalg.inv(half) @ to_full[0]
    network = ExactNetwork(H_network)
    loftr = Loftr(LoftrConfig(max_side=max_side), network)
    images = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
    features0, features1, matches = loftr.match_images(*images)
    assert network.shapes == [(208, 336), (224, 336)]  # 333 x 204 and 333 x 224, padded to multiples of 8
    assert len(matches) > 500
    points0, points1 = features0.valid_keypoints(), features1.valid_keypoints()
    expected = cv2.perspectiveTransform(points0[:, None].astype(np.float64), H_full)[:, 0]
    assert np.abs(points1 - expected).max() < 1e-3
    for points, size in ((points0, sizes[0]), (points1, sizes[1])):
        assert points.min() >= -0.5 and (points <= np.array(size) - 0.5).all()


def test_what_is_matched_in_the_padding_is_left_out() -> None:
    network = ExactNetwork(np.eye(3))
    features0, features1, _ = Loftr(LoftrConfig(), network).match_images(*[np.zeros((57, 66), np.uint8)] * 2)
    assert network.shapes == [(64, 72)] * 2
    # Cells begin at 0, 8, ..., 64 and 0, 8, ..., 56; all lie in the image, which ends at 66 and 57.
    assert features0.num_valid == features1.num_valid == 9 * 8
    features0, _, _ = Loftr(LoftrConfig(), network).match_images(
        np.zeros((57, 66), np.uint8), np.zeros((57, 60), np.uint8)
    )
    assert features0.num_valid == 8 * 8  # the last column of image 0 leads into the padding of image 1


def test_seeds_are_cells_clear_of_the_edge_with_texture_first() -> None:
    image = np.full((120, 160), 128, np.uint8)
    image[40:80, 80:120] = picture(40, 40)[..., 0]
    seeds = Loftr(LoftrConfig(), ExactNetwork(np.eye(3))).seeds(image)
    assert len(seeds) == len(range(16, 144, 8)) * len(range(16, 104, 8))
    np.testing.assert_allclose((seeds + 0.5) % 8, 0)
    assert seeds.min() >= 15 and ((seeds[:20] > [70, 30]) & (seeds[:20] < [130, 90])).all()
    halved = Loftr(LoftrConfig(max_side=80), ExactNetwork(np.eye(3))).seeds(image)
    np.testing.assert_allclose((halved + 0.5) % 16, 0)


def test_a_checkpoint_of_the_published_form_gives_the_same_network(network: PairNetwork, tmp_path: Path) -> None:
    path = tmp_path / "mine.ckpt"
    tensors = network.state_dict()  # type: ignore[attr-defined]
    torch.save({"state_dict": {f"matcher.{name}": tensor for name, tensor in tensors.items()}}, path)
    loaded = create_pair_matcher(LoftrConfig(weights=str(path), min_confidence=0.0), CPU)
    assert isinstance(loaded.matcher, PairMatcher) and loaded.weights is not None and loaded.remark is None
    images = views((80, 64), (80, 64))
    found, expected = (m.match_images(*images) for m in (loaded.matcher, Loftr(ANY, network)))
    assert len(found[2]) > 5 and torch.equal(found[1].keypoints, expected[1].keypoints)

    cases = {
        "lack 'backbone.conv1.weight'": {k: v for k, v in tensors.items() if k != "backbone.conv1.weight"},
        "backbone.conv1.weight is (1,), not": {**tensors, "backbone.conv1.weight": torch.zeros(1)},
        "hold 'more'": {**tensors, "more": torch.zeros(1)},
    }
    for reason, state_dict in cases.items():
        torch.save({"state_dict": state_dict}, path)
        with pytest.raises(WeightsError) as error:
            create_pair_matcher(LoftrConfig(weights=str(path)), CPU)
        assert reason in str(error.value) and "random" in str(error.value) and "\n" not in str(error.value)


def test_missing_weights_are_one_line_with_the_remedy(network: PairNetwork) -> None:
    with pytest.raises(WeightsError) as error:
        create_extractor(LoftrConfig(), CPU)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in ("loftr", "huggingface.co/kornia", "path", "weights"))
    with pytest.raises(WeightsError, match="no such file"):
        create_extractor(LoftrConfig(weights="Random"), CPU)  # a name that is not exactly `random` is a path


def test_random_weights_have_to_be_asked_for_and_are_reported(network: PairNetwork) -> None:
    config = load_config("loftr", ["frontend.extractor.weights=random"]).frontend
    frontend = create_frontend(config, CPU)
    assert frontend.weights == () and len(frontend.fallbacks) == 1
    assert "loftr" in frontend.fallbacks[0] and "random weights" in frontend.fallbacks[0]


def test_without_kornia_there_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.feature", None)
    with pytest.raises(VoError) as error:
        create_extractor(LoftrConfig(weights="random"), CPU)
    assert not isinstance(error.value, WeightsError)  # ORB must not take its place silently
    assert "pip install 'lightvo[loftr]'" in str(error.value) and "\n" not in str(error.value)


def test_images_of_other_shapes_are_refused() -> None:
    loftr = Loftr(LoftrConfig(max_side=100), ExactNetwork(np.eye(3)))
    good = np.zeros((64, 64), np.uint8)
    for bad in (np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64), np.float32), np.zeros((60, 200), np.uint8)):
        with pytest.raises(ValueError, match="image: expected"):
            loftr.match_images(good, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["frontend.extractor.name=loftr"], "loftr matches images and follows points; set name: followed"),
        (["frontend.extractor.name=xfeat-star"], "xfeat-star matches images and follows points; set name: followed"),
        (["frontend.matcher.name=followed"], "followed needs an extractor that matches images, not aliked"),
        (["frontend.extractor.name=r2d2"], "no learned matcher knows the descriptors of r2d2; set name: nearest"),
    ],
)
def test_pairings_that_cannot_work_are_refused_by_the_configuration(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match="matcher") as error:
        load_config(None, overrides)
    assert reason in str(error.value)


def test_every_preset_of_these_methods_is_a_pairing_that_works() -> None:
    found = {name: load_config(name).frontend for name in ("r2d2", "loftr", "xfeat-star")}
    assert {name: config.extractor.name for name, config in found.items()} == {name: name for name in found}
    assert all(isinstance(config, FrontendConfig) for config in found.values())
