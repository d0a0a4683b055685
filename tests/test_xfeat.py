"""XFeat against the published code's outputs, against kornia, and against slow versions of its parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import Features, WeightsError
from frontends.weights import load_state_dict
from frontends.xfeat import (
    XFeat,
    XFeatConfig,
    detect,
    gray_batch,
    heatmap,
    peaks,
    refine_peaks,
    resized_to_stride,
    sample_descriptors,
)
from frontends.xfeat_network import XFeatMaps, load_network
from frontends.xfeat_star import XFeatStar, XFeatStarConfig, mutual_nearest, refine

kornia_xfeat: Any = pytest.importorskip("kornia.feature.xfeat")
needs_weights = pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set")
CPU = torch.device("cpu")


def published_config(**settings: Any) -> XFeatConfig:
    """The published method: the strongest keypoints wherever they are, at whole pixels."""
    return XFeatConfig(**{"spread_cell_px": None, "subpixel": False, **settings})


@pytest.fixture(autouse=True)
def at_most_two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def textured(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3): blobs of two sizes, in colours that differ."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), dtype=np.float32)
    for cell in (6, 24):
        noise = generator.uniform(0, 127, (height // cell + 1, width // cell + 1, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


def randomised_kornia(seed: int = 0) -> Any:
    """kornia's XFeat with random weights, and statistics in its BatchNorms that suit them: those of a few images."""
    torch.manual_seed(seed)
    model = kornia_xfeat.XFeat()
    images = torch.cat([as_tensor(textured(160, 224, 100 + index)) for index in range(4)])
    with torch.no_grad():
        for module in model.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                module.momentum = 1.0
        descriptors, _, _ = model.train().net(images)
        cells = descriptors.permute(0, 2, 3, 1).reshape(-1, 64)
        model.net.fine_matcher(torch.cat((cells, cells.flip(0)), dim=1))
        # Descriptors around zero and surer answers than random weights give by themselves.
        model.net.block_fusion[-1].bias -= cells.mean(dim=0)
        model.net.keypoint_head[-1].weight *= 20
        model.net.fine_matcher[-1].weight *= 20
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return randomised_kornia()


@pytest.fixture(scope="module")
def state_dict(model: Any) -> dict[str, Tensor]:
    return dict(model.net.state_dict())


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return load_state_dict("xfeat", allow_download=False)[0]


@pytest.fixture(scope="module")
def parity() -> dict[str, NDArray[Any]]:
    with np.load(Path(os.environ["LIGHTVO_WEIGHTS"]) / "parity" / "xfeat.npz") as archive:
        return dict(archive)


def as_tensor(image: NDArray[np.uint8]) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1], what kornia takes."""
    rgb = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    return torch.tensor(rgb).permute(2, 0, 1)[None].float() / 255


def check_same(features: Features, keypoints: Tensor, descriptors: Tensor, scores: Tensor, share: float) -> None:
    """At least `share` of the reference keypoints are found within 0.02 px, with descriptors and scores within 1e-3."""
    distances, nearest = (keypoints[:, None] - features.keypoints[None, : features.num_valid]).norm(dim=-1).min(dim=1)
    is_found = distances < 0.02
    nearest = nearest[is_found]
    assert is_found.float().mean() >= share
    assert (1 - (features.descriptors[nearest] * descriptors[is_found]).sum(dim=1)).max() < 1e-3
    assert (features.scores[nearest] - scores[is_found]).abs().max() < 1e-3


def check_contract(features: Features, capacity: int, size: tuple[int, int]) -> None:
    assert features.kind == "xfeat" and features.image_size == size
    assert features.keypoints.shape == (capacity, 2) and features.descriptors.shape == (capacity, 64)
    assert features.keypoints.dtype == features.scores.dtype == features.descriptors.dtype == torch.float32
    valid, padding = slice(features.num_valid), slice(features.num_valid, None)
    for values in (features.keypoints, features.scores, features.descriptors):
        assert not values[padding].any()
    assert (features.scores[valid].diff() <= 0).all()
    assert ((features.descriptors[valid].norm(dim=1) - 1).abs() < 1e-5).all()
    assert (features.keypoints[valid] >= 0).all() and (features.keypoints[valid] < torch.tensor(size)).all()


# ---------------------------------------------------------------- parity


@needs_weights
@pytest.mark.parametrize("tag", ["kitti", "photo"])
def test_parity_with_the_published_code(
    tag: str, published: dict[str, Tensor], parity: dict[str, NDArray[Any]]
) -> None:
    features = XFeat(published_config(), published).extract(parity[f"{tag}_image"])
    assert features.num_valid == 1024
    keypoints, descriptors, scores = (
        torch.from_numpy(parity[f"{tag}_{name}"]) for name in ("keypoints", "descriptors", "scores")
    )
    check_same(features, keypoints, descriptors, scores, share=1.0)


@needs_weights
@pytest.mark.parametrize("tag", ["kitti", "photo"])
def test_parity_with_kornia(tag: str, published: dict[str, Tensor], parity: dict[str, NDArray[Any]]) -> None:
    reference = kornia_xfeat.XFeat()
    missing = reference.net.load_state_dict(published, strict=False).missing_keys
    assert all(name.startswith("fine_matcher") for name in missing)
    image = parity[f"{tag}_image"]
    found = reference.eval().detectAndCompute(as_tensor(image), top_k=2000)[0]
    features = XFeat(published_config(max_keypoints=2000), published).extract(image)
    check_same(features, found["keypoints"], found["descriptors"], found["scores"], share=0.999)


@needs_weights
@pytest.mark.parametrize("tag", ["kitti", "photo"])
def test_bfloat16_keeps_keypoints_and_descriptors(
    tag: str, published: dict[str, Tensor], parity: dict[str, NDArray[Any]]
) -> None:
    extractor = XFeat(published_config(precision="bfloat16"), published)
    features = extractor.extract(parity[f"{tag}_image"])
    assert extractor.precision == "bfloat16"
    keypoints = torch.from_numpy(parity[f"{tag}_keypoints"])
    distances, nearest = (keypoints[:, None] - features.keypoints[None]).norm(dim=-1).min(dim=1)
    is_found = distances < 0.02
    expected = torch.from_numpy(parity[f"{tag}_descriptors"])[is_found]
    assert is_found.float().mean() > 0.99
    assert (1 - (features.descriptors[nearest[is_found]] * expected).sum(dim=1)).max() < 1e-3


@pytest.mark.parametrize("size", [(160, 224), (150, 201), (32, 32), (37, 333)])
def test_parity_with_kornia_for_random_weights_and_sizes(
    size: tuple[int, int], model: Any, state_dict: dict[str, Tensor]
) -> None:
    image = textured(*size)
    found = model.detectAndCompute(as_tensor(image), top_k=3000, detection_threshold=0.03)[0]
    features = XFeat(published_config(max_keypoints=3000, detection_threshold=0.03), state_dict).extract(image)
    check_contract(features, 3000, size[::-1])
    check_same(features, found["keypoints"], found["descriptors"], found["scores"], share=0.99)
    # kornia finds nothing within two pixels of the border; the published code does.
    inner = [side // 32 * 32 for side in size[::-1]]
    pixels = features.keypoints[: features.num_valid] * torch.tensor(inner) / torch.tensor(size[::-1])
    is_inside = ((pixels > 1.5) & (pixels < torch.tensor(inner) - 2.5)).all(dim=1)
    assert abs(int(is_inside.sum()) - len(found["keypoints"])) <= 0.01 * len(found["keypoints"])
    assert is_inside.sum() >= 5


# ---------------------------------------------------------------- invariants


def test_a_batch_of_two_agrees_with_each_alone(state_dict: dict[str, Tensor]) -> None:
    network = load_network(state_dict, CPU)
    batches = [gray_batch(textured(160, 224, seed), CPU) for seed in (1, 2)]
    with torch.inference_mode():
        together = detect(network(torch.cat(batches)), published_config(max_keypoints=200, detection_threshold=0.02))
        for batch, one in zip(batches, together, strict=True):
            alone = detect(network(batch), published_config(max_keypoints=200, detection_threshold=0.02))[0]
            assert one.num_valid == alone.num_valid > 20
            torch.testing.assert_close(one.keypoints, alone.keypoints, atol=1e-5, rtol=0)
            torch.testing.assert_close(one.scores, alone.scores, atol=1e-5, rtol=0)
            torch.testing.assert_close(one.descriptors, alone.descriptors, atol=1e-5, rtol=0)


def test_padding_changes_nothing(state_dict: dict[str, Tensor]) -> None:
    image = textured(160, 224)
    few, many = (
        XFeat(published_config(max_keypoints=k, detection_threshold=0.02), state_dict).extract(image)
        for k in (50, 5000)
    )
    check_contract(many, 5000, (224, 160))
    assert few.num_valid == 50 < many.num_valid < 5000
    for name in ("keypoints", "scores", "descriptors"):
        assert torch.equal(getattr(few, name), getattr(many, name)[:50])


def test_gray_and_colour_read_only_and_writable_images_agree(state_dict: dict[str, Tensor]) -> None:
    extractor = XFeat(published_config(max_keypoints=100, detection_threshold=0.02), state_dict)
    gray = textured(160, 224)[..., 0].copy()
    gray.setflags(write=False)
    features = extractor.extract(gray)
    for image in (np.repeat(gray[:, :, None], 3, axis=2), gray.copy(), np.asfortranarray(gray)):
        other = extractor.extract(image)
        assert torch.equal(features.keypoints, other.keypoints)
        torch.testing.assert_close(features.descriptors, other.descriptors, atol=1e-4, rtol=0)
    again = extractor.extract(gray)
    assert torch.equal(features.scores, again.scores) and torch.equal(features.descriptors, again.descriptors)


def test_neutral_batch_norm_gives_the_same_as_a_separate_one(state_dict: dict[str, Tensor]) -> None:
    folded = dict(state_dict)
    for name in [key for key in state_dict if key.endswith(".layer.0.weight")]:
        layer = name.removesuffix(".0.weight")
        scale = (state_dict[f"{layer}.1.running_var"] + 1e-5).rsqrt()
        folded[name] = state_dict[name] * scale[:, None, None, None]
        folded[f"{layer}.1.running_mean"] = state_dict[f"{layer}.1.running_mean"] * scale
        folded[f"{layer}.1.running_var"] = torch.full_like(scale, 1 - 1e-5)
    gray = gray_batch(textured(96, 128), CPU)
    with torch.inference_mode():
        one, other = (load_network(weights, CPU)(gray) for weights in (state_dict, folded))
    torch.testing.assert_close(one.descriptors, other.descriptors, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.keypoint_logits, other.keypoint_logits, atol=1e-4, rtol=1e-4)


def test_a_shrunk_image_has_its_keypoints_in_full_pixels(state_dict: dict[str, Tensor]) -> None:
    image = textured(320, 448)
    config = published_config(max_keypoints=100, detection_threshold=0.02, max_side=224)
    features = XFeat(config, state_dict).extract(image)
    shrunk = np.asarray(cv2.resize(image, (224, 160), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    plain = XFeat(config, state_dict).extract(shrunk)
    check_contract(features, 100, (448, 320))
    assert features.num_valid == plain.num_valid > 20
    expected = (plain.keypoints[: plain.num_valid] + 0.5) * 2 - 0.5
    torch.testing.assert_close(features.keypoints[: features.num_valid], expected)


def test_an_image_without_anything_has_no_features(state_dict: dict[str, Tensor]) -> None:
    features = XFeat(published_config(detection_threshold=1.0), state_dict).extract(np.zeros((64, 64), dtype=np.uint8))
    check_contract(features, 1024, (64, 64))
    assert features.num_valid == 0


@pytest.mark.parametrize("shape", [(240,), (240, 320, 4), (1, 240, 320, 3), (31, 320), (320, 31, 3)])
def test_other_images_are_refused(shape: tuple[int, ...], state_dict: dict[str, Tensor]) -> None:
    extractor = XFeat(published_config(), state_dict)
    with pytest.raises(ValueError, match="expected"):
        extractor.extract(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="float32"):
        extractor.extract(np.zeros((64, 64), dtype=np.float32))


def test_the_precision_in_use_is_told(state_dict: dict[str, Tensor]) -> None:
    assert XFeat(published_config(), state_dict).precision == "float32"
    assert XFeat(published_config(precision="bfloat16"), state_dict).precision == "bfloat16"


# ---------------------------------------------------------------- parts against slow versions


@given(seed=st.integers(0, 1000), height=st.integers(1, 40), width=st.integers(1, 40), threshold=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_peaks_are_what_max_pooling_finds(seed: int, height: int, width: int, threshold: float) -> None:
    # A few levels only, so that equal neighbours occur.
    heat = torch.randint(1, 12, (2, height, width), generator=torch.Generator().manual_seed(seed)) / 12
    expected = (heat == F.max_pool2d(heat, 5, stride=1, padding=2)) & (heat > threshold)
    assert torch.equal(peaks(heat, threshold), expected)


def test_the_heatmap_unfolds_cells_row_by_row() -> None:
    logits = torch.randn(2, 3, 5, 65, generator=torch.Generator().manual_seed(0))
    expected = F.pixel_shuffle(logits.permute(0, 3, 1, 2).softmax(dim=1)[:, :64], 8)[:, 0]
    torch.testing.assert_close(heatmap(logits), expected)


@given(seed=st.integers(0, 1000), height=st.integers(2, 12), width=st.integers(2, 12))
@settings(deadline=None, max_examples=20)
def test_descriptors_are_sampled_as_pytorch_samples(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randn(height, width, 64, generator=generator)
    places = torch.rand(50, 2, generator=generator) * 2.2 - 1.1
    places[:4] = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    unit = F.normalize(cells, dim=-1).permute(2, 0, 1)[None]
    sampled = F.grid_sample(unit, places[None, None], mode="bicubic", align_corners=False)[0, :, 0].T
    torch.testing.assert_close(sample_descriptors(cells, places), F.normalize(sampled, dim=-1), atol=1e-4, rtol=1e-4)


def test_the_last_row_and_column_hold_no_keypoints() -> None:
    logits = torch.full((1, 4, 4, 65), -4.0)
    logits[0, 1, 1, 10] = logits[0, 3, 3, 63] = logits[0, 3, 0, 58] = logits[0, 0, 0, 0] = 6.0
    maps = XFeatMaps(torch.randn(1, 4, 4, 64), torch.full((1, 4, 4), 0.5), logits)
    found = detect(maps, published_config(max_keypoints=10))[0]
    assert sorted(map(tuple, found.keypoints[: found.num_valid].tolist())) == [(0.0, 0.0), (10.0, 9.0)]


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (480, 640)), ((376, 1241), (352, 1216)), ((20, 63), (32, 32))]
)
def test_sides_become_the_next_lower_multiple_of_32(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_to_stride(torch.rand(1, 1, *size)).shape[2:] == expected


# ---------------------------------------------------------------- weights that do not fit


def test_weights_that_do_not_fit_are_named(state_dict: dict[str, Tensor]) -> None:
    def error_of(changed: dict[str, Tensor]) -> str:
        with pytest.raises(WeightsError) as error:
            XFeat(published_config(), changed)
        assert "\n" not in str(error.value)
        return str(error.value)

    for name in ("block3.1.layer.0.weight", "block5.3.layer.1.running_var", "skip1.1.bias", "keypoint_head.3.weight"):
        assert f"lack '{name}'" in error_of({key: value for key, value in state_dict.items() if key != name})
    message = error_of({**state_dict, "block2.0.layer.0.weight": torch.zeros(24, 23, 3, 3)})
    assert "block2.0.layer.0.weight is (24, 23, 3, 3), not (24, 24, 3, 3)" in message
    assert "'head.weight'" in error_of({**state_dict, "head.weight": torch.zeros(1)})
    assert "lack" in error_of({})


# ---------------------------------------------------------------- XFeat*


def matched(features0: Features, features1: Features) -> Tensor:
    pairs = torch.cat((features0.keypoints[: features0.num_valid], features1.keypoints[: features1.num_valid]), dim=1)
    return pairs


@pytest.mark.parametrize("size", [(160, 224), (150, 201)])
def test_semi_dense_parity_with_kornia(size: tuple[int, int], model: Any, state_dict: dict[str, Tensor]) -> None:
    image0, image1 = textured(*size, seed=3), textured(size[0], size[1] + 4, seed=3)[:, 4:].copy()
    expected = torch.cat(model.match_xfeat_star(as_tensor(image0), as_tensor(image1), top_k=800), dim=1)
    config = XFeatStarConfig(max_keypoints=800, small_scale=0.6)
    features0, features1, matches = XFeatStar(config, state_dict).match_images(image0, image1)
    assert len(matches) == features0.num_valid == features1.num_valid == len(expected) > 20
    assert (matches.indices == np.arange(len(matches))[:, None]).all()
    assert (matches.scores > 0.25).all() and (matches.scores <= 1).all()
    torch.testing.assert_close(matched(features0, features1), expected, atol=2e-3, rtol=0)
    assert features0.keypoints.shape == (800, 2) and not features0.keypoints[features0.num_valid :].any()
    assert features0.image_size == size[::-1] and features0.kind == "xfeat-star"


def test_semi_dense_keypoints_of_a_shrunk_image_are_in_full_pixels(state_dict: dict[str, Tensor]) -> None:
    plain_images = [textured(160, 224, seed=3), textured(160, 228, seed=3)[:, 4:].copy()]
    # Doubled pixels shrink to exactly these.
    images = [image.repeat(2, axis=0).repeat(2, axis=1) for image in plain_images]
    star = XFeatStar(XFeatStarConfig(max_keypoints=800, max_side=224), state_dict)
    found, plain = star.match_images(images[0], images[1]), star.match_images(plain_images[0], plain_images[1])
    assert len(found[2]) == len(plain[2]) > 20
    torch.testing.assert_close(matched(*found[:2]), (matched(*plain[:2]) + 0.5) * 2 - 0.5, atol=1e-3, rtol=0)


def test_the_published_scales_are_the_default() -> None:
    config = XFeatStarConfig()
    assert (config.small_scale, config.large_scale, config.max_keypoints) == (0.65, 1.3, 10_000)


def test_weights_without_the_fine_matcher_are_refused(state_dict: dict[str, Tensor]) -> None:
    backbone = {key: value for key, value in state_dict.items() if not key.startswith("fine_matcher.")}
    XFeat(published_config(), backbone)
    with pytest.raises(WeightsError, match=r"fine matcher.*xfeat\.pt.*vo weights fetch xfeat"):
        XFeatStar(XFeatStarConfig(), backbone)
    with pytest.raises(WeightsError, match=r"lack 'fine_matcher\.7\.running_mean'"):
        XFeatStar(XFeatStarConfig(), {k: v for k, v in state_dict.items() if k != "fine_matcher.7.running_mean"})


@given(seed=st.integers(0, 1000), num0=st.integers(1, 2500), num1=st.integers(1, 60))
@settings(deadline=None, max_examples=25)
def test_mutual_nearest_in_pieces_equals_the_whole_matrix(seed: int, num0: int, num1: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that products are equal often and exactly.
    descriptors0 = torch.randint(-2, 3, (num0, 4), generator=generator).float()
    descriptors1 = torch.randint(-2, 3, (num1, 4), generator=generator).float()
    products = (descriptors0 @ descriptors1.T).numpy()
    best1, best0 = products.argmax(axis=1), products.argmax(axis=0)
    expected = [(row, int(best1[row])) for row in range(num0) if best0[best1[row]] == row]
    rows0, rows1 = mutual_nearest(descriptors0, descriptors1)
    assert list(zip(rows0.tolist(), rows1.tolist(), strict=True)) == expected


def test_refinement_is_the_mean_of_the_distribution() -> None:
    logits = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    logits[0] = -20.0
    logits[0, 8 * 6 + 1] = 20.0
    offsets, confidence = refine(logits)
    torch.testing.assert_close(offsets[0], torch.tensor([1.0 - 4, 6.0 - 4]))
    assert confidence[0] == 1
    for row, offset, best in zip(logits.double(), offsets, confidence, strict=True):
        weights = torch.exp(3 * row) / torch.exp(3 * row).sum()
        mean = [
            sum(weights[8 * y + x] * (d - 4) for y in range(8) for x in range(8) for d in [(x, y)[axis]])
            for axis in (0, 1)
        ]
        torch.testing.assert_close(offset.double(), torch.stack([torch.as_tensor(m) for m in mean]), atol=1e-5, rtol=0)
        assert best == pytest.approx(float(weights.max()), abs=1e-6)


def test_subpixel_refinement_finds_the_centre_of_a_blob() -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform(10, 50, (6, 2))
    ys, xs = np.mgrid[:64, :64]
    for centre in centres:
        heat = np.exp(-((xs - centre[0]) ** 2 + (ys - centre[1]) ** 2) / (2 * 0.7**2))
        peak = torch.tensor(np.rint(centre)[None], dtype=torch.long)
        refined = refine_peaks(torch.from_numpy(heat).float(), peak)[0].numpy()
        assert np.linalg.norm(refined - centre) < 0.6 * np.linalg.norm(np.rint(centre) - centre) + 0.02


def test_subpixel_refinement_stays_within_a_pixel_at_the_border() -> None:
    heat = torch.rand(20, 30, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[0, 0], [29, 19], [29, 0], [5, 19]])
    refined = refine_peaks(heat, points)
    assert (refined - points).abs().max() <= 1.0
    assert (refined >= 0).all() and (refined <= torch.tensor([heat.shape[1] - 1, heat.shape[0] - 1])).all()


@needs_weights
def test_spreading_reaches_more_of_the_image(published: dict[str, Tensor], parity: Any) -> None:
    image = parity["kitti_image"]
    occupied = []
    for cell in (None, 25):
        features = XFeat(published_config(max_keypoints=512, spread_cell_px=cell), published).extract(image)
        assert features.num_valid == 512
        cells = np.unique(features.valid_keypoints() // 50, axis=0)
        occupied.append(len(cells))
    assert occupied[1] > 1.2 * occupied[0]
