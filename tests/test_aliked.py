"""ALIKED against the reference outputs of the public code, against kornia, and against its own plain formulation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates, maximum_filter
from torch.utils._python_dispatch import TorchDispatchMode

from frontends.aliked import Aliked, AlikedConfig
from frontends.aliked_detection import (
    RADIUS,
    clear_border,
    detect,
    refine,
    sample_scores,
    strongest_peaks,
    suppress_non_maxima,
    window_maximum,
)
from frontends.aliked_inference import AlikedInference
from frontends.aliked_network import ARCHITECTURES, AlikedNetwork, deformable_conv2d
from frontends.base import Extractor, Features, WeightsError, to_full_resolution

WEIGHTS = os.environ.get("LIGHTVO_WEIGHTS")
VARIANTS = tuple(ARCHITECTURES)
CPU = torch.device("cpu")
needs_weights = pytest.mark.skipif(WEIGHTS is None, reason="LIGHTVO_WEIGHTS is not set")


def published(variant: str) -> dict[str, torch.Tensor]:
    state_dict: dict[str, torch.Tensor] = torch.load(Path(str(WEIGHTS)) / f"aliked-{variant}.pth", weights_only=True)
    return state_dict


def reference(variant: str) -> Mapping[str, NDArray[Any]]:
    arrays: Mapping[str, NDArray[Any]] = np.load(Path(str(WEIGHTS)) / "parity" / f"aliked-{variant}.npz")
    return arrays


def random_network(variant: str, seed: int = 0) -> AlikedNetwork:
    """Random weights whose batch norms and offsets are not the trivial ones of a new network."""
    torch.manual_seed(seed)
    network = AlikedNetwork(ARCHITECTURES[variant])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    for name, parameter in network.named_parameters():
        if "offset_conv" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 3.0)
    return network.eval()


def smooth_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 1.5) * 1.0, dtype=np.uint8)


def random_extractor(variant: str = "t16", **settings: Any) -> Aliked:
    config = AlikedConfig(**{"variant": variant, "spread_cell_px": None, **settings})
    return Aliked(config, random_network(variant).state_dict())


def assert_equal_features(
    features: Features, keypoints: NDArray[np.float32], descriptors: NDArray[np.float32], scores: NDArray[np.float32]
) -> None:
    """99 % of the reference keypoints are found within 0.02 px, with the reference's descriptors and scores."""
    distance = np.linalg.norm(keypoints[:, None] - features.valid_keypoints()[None], axis=2)
    nearest = distance.argmin(1)
    is_found = distance.min(1) < 0.02
    assert is_found.mean() >= 0.99
    cosine = (features.descriptors.numpy()[nearest] * descriptors).sum(1)[is_found]
    assert np.mean(1 - cosine < 1e-3) >= 0.99
    assert np.abs(features.scores.numpy()[nearest] - scores)[is_found].max() < 1e-3


# The published networks on real images


@needs_weights
@pytest.mark.parametrize("variant", ["t16", "n16"])
@pytest.mark.parametrize("image", ["kitti", "photo"])
def test_reproduces_the_published_code(variant: str, image: str) -> None:
    expected = reference(variant)
    features = Aliked(AlikedConfig(variant=variant, spread_cell_px=None), published(variant)).extract(
        expected[f"{image}_image"]
    )
    assert features.num_valid == len(expected[f"{image}_keypoints"])
    assert_equal_features(
        features, expected[f"{image}_keypoints"], expected[f"{image}_descriptors"], expected[f"{image}_scores"]
    )


@needs_weights
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("image", ["kitti", "photo"])
def test_agrees_with_kornia(variant: str, image: str) -> None:
    from kornia.feature import ALIKED

    state_dict, pixels = published(variant), reference("t16")[f"{image}_image"]
    peer = ALIKED(f"aliked-{variant}", max_num_keypoints=1024, detection_threshold=-1.0).eval()
    assert peer.load_state_dict(state_dict, strict=False).missing_keys == ["dkd.hw_grid"]
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
    with torch.inference_mode():
        expected = peer((torch.from_numpy(rgb).float() / 255).permute(2, 0, 1)[None])[0]
    # kornia keeps local maxima only, which is one round of suppression.
    features = Aliked(AlikedConfig(variant=variant, suppression_rounds=1, spread_cell_px=None), state_dict).extract(
        pixels
    )
    assert_equal_features(
        features, expected.keypoints.numpy(), expected.descriptors.numpy(), expected.keypoint_scores.numpy()
    )


@needs_weights
def test_reproduces_the_score_map_of_the_published_code() -> None:
    expected = reference("t16")
    network = AlikedNetwork(ARCHITECTURES["t16"]).eval()
    network.load_state_dict(published("t16"))
    image = torch.from_numpy(expected["photo_image"]).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        maps = network(image)
    np.testing.assert_allclose(maps.score_map[0, 0, ::8, ::8], expected["photo_score_map_s8"].squeeze(), atol=1e-5)
    feature_map = maps.feature_map[0, :, ::32, ::32].numpy()
    np.testing.assert_allclose(feature_map, expected["photo_feature_map_s32"].squeeze(), atol=1e-5)


# The inference formulation against the plain one


@settings(deadline=None, max_examples=15)
@given(
    variant=st.sampled_from(VARIANTS),
    height=st.integers(32, 150),
    width=st.integers(32, 150),
    batch=st.integers(1, 2),
)
def test_equals_the_plain_formulation(variant: str, height: int, width: int, batch: int) -> None:
    network = random_network(variant)
    images = torch.stack([torch.from_numpy(smooth_image(height, width, seed)) for seed in range(batch)])
    images = images.permute(0, 3, 1, 2).float() / 255
    keypoints = torch.rand(batch, 50, 2) * torch.tensor([width - 1.0, height - 1.0])
    with torch.inference_mode():
        fast = AlikedInference(network, CPU)
        pyramid = fast(images, fast.create_layout(height, width))
        descriptors = fast.describe(pyramid, keypoints)
        maps = network(images)
        expected = network.describe(maps.feature_map, keypoints)
    torch.testing.assert_close(pyramid.score_map, maps.score_map, atol=1e-4, rtol=0)
    torch.testing.assert_close(descriptors, expected, atol=1e-4, rtol=0)


def test_two_images_at_once_equal_one_at_a_time() -> None:
    fast = AlikedInference(random_network("t16"), CPU)
    images = torch.stack([torch.from_numpy(smooth_image(100, 130, seed)) for seed in range(2)]).permute(0, 3, 1, 2)
    keypoints, layout = torch.rand(2, 40, 2) * 99, fast.create_layout(100, 130)
    with torch.inference_mode():
        both = fast(images, layout)
        found, descriptors = detect(both.score_map, 40), fast.describe(both, keypoints)
        for index in range(2):
            one = fast(images[index : index + 1], layout)
            torch.testing.assert_close(one.score_map[0], both.score_map[index], atol=1e-6, rtol=0)
            own_keypoints = detect(one.score_map, 40).keypoints
            torch.testing.assert_close(own_keypoints[0], found.keypoints[index], atol=1e-4, rtol=0)
            own_descriptors = fast.describe(one, keypoints[index : index + 1])
            torch.testing.assert_close(own_descriptors[0], descriptors[index], atol=1e-5, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of values that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_never_builds_the_full_resolution_feature_map() -> None:
    image = smooth_image(480, 640)
    extractor = random_extractor()
    extractor.extract(image)
    with LargestTensor() as largest:
        extractor.extract(image)
    assert largest.numel <= 16 * 480 * 640  # the map would have 64 channels
    plain = random_network("t16")
    with LargestTensor() as largest, torch.inference_mode():
        plain(torch.zeros(1, 3, 480, 640))
    assert largest.numel >= 64 * 480 * 640


# Parts against independent references


@pytest.mark.parametrize("reach", [0.5, 3.0, 30.0])
def test_deformable_convolution_equals_bilinear_samples_times_weights(reach: float) -> None:
    torch.manual_seed(1)
    features, weight = torch.randn(1, 3, 9, 12), torch.randn(4, 3, 3, 3)
    offsets = torch.randn(1, 18, 9, 12) * reach
    expected = np.zeros((4, 9, 12))
    for tap in range(9):
        y = np.arange(9)[:, None] + tap // 3 - 1 + offsets[0, 2 * tap].numpy()
        x = np.arange(12)[None] + tap % 3 - 1 + offsets[0, 2 * tap + 1].numpy()
        for channel in range(3):
            # A ring of zeros makes SciPy fade to zero over one pixel, as the definition does.
            ringed = np.pad(features[0, channel].numpy().astype(np.float64), 1)
            sampled = map_coordinates(ringed, [y + 1, x + 1], order=1, mode="constant")
            expected += weight[:, channel, tap // 3, tap % 3].numpy()[:, None, None] * sampled
    actual = deformable_conv2d(features, offsets, weight)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(0, 2**16))
def test_window_maximum_equals_scipy(height: int, width: int, seed: int) -> None:
    maps = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    expected = maximum_filter(maps, 2 * RADIUS + 1, mode="constant", cval=-np.inf)
    np.testing.assert_array_equal(window_maximum(torch.from_numpy(maps)[None, None])[0, 0], expected)


def brute_force_suppression(scores: NDArray[np.float32], num_rounds: int) -> NDArray[np.bool_]:
    """Which pixels of (H, W) survive, pixel by pixel."""
    height, width = scores.shape
    kept = np.zeros((height, width), dtype=np.bool_)
    for _ in range(num_rounds):
        aside = maximum_filter(kept, 2 * RADIUS + 1, mode="constant", cval=False)
        new = kept.copy()
        for y, x in np.argwhere(~aside):
            window = slice(max(0, y - RADIUS), y + RADIUS + 1), slice(max(0, x - RADIUS), x + RADIUS + 1)
            new[y, x] |= scores[y, x] == np.where(aside[window], 0.0, scores[window]).max()
        kept = new
    return kept


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(6, 30),
    width=st.integers(6, 30),
    seed=st.integers(0, 2**16),
    num_rounds=st.integers(1, 3),
    max_keypoints=st.integers(1, 120),
    num_levels=st.sampled_from([7, 10**6]),
)
def test_suppression_and_the_strongest_peaks_equal_brute_force(
    height: int, width: int, seed: int, num_rounds: int, max_keypoints: int, num_levels: int
) -> None:
    scores = np.random.default_rng(seed).integers(1, num_levels, (height, width)).astype(np.float32) / num_levels
    scores = np.asarray(cv2.blur(scores, (3, 3)) if seed % 2 else scores)
    expected = scores * brute_force_suppression(scores, num_rounds)
    maps = torch.from_numpy(scores)[None, None]
    np.testing.assert_array_equal(suppress_non_maxima(maps, num_rounds)[0, 0], expected)
    inside = clear_border(torch.from_numpy(expected)[None, None]).numpy().ravel()
    values, indices = strongest_peaks(maps[0, 0], max_keypoints, 0.0, num_rounds)
    strongest = np.sort(inside)[::-1][:max_keypoints]
    np.testing.assert_array_equal(values.numpy(), np.pad(strongest, (0, max_keypoints - len(strongest))))
    is_peak = values.numpy() > 0
    np.testing.assert_array_equal(inside[indices.numpy()[is_peak]], values.numpy()[is_peak])
    assert len(np.unique(indices.numpy()[is_peak])) == is_peak.sum()


def test_refinement_is_the_expectation_under_a_softmax() -> None:
    score_map = torch.rand(1, 1, 20, 25, generator=torch.Generator().manual_seed(3))
    x, y = 7, 12
    window = score_map[0, 0, y - 2 : y + 3, x - 2 : x + 3].double().numpy()
    weights = np.exp(window / 0.1) / np.exp(window / 0.1).sum()
    expected = [x + (weights.sum(0) * np.arange(-2, 3)).sum(), y + (weights.sum(1) * np.arange(-2, 3)).sum()]
    actual = refine(score_map, torch.tensor([[y * 25 + x]]))
    np.testing.assert_allclose(actual[0, 0], expected, atol=1e-5)
    bilinear = map_coordinates(score_map[0, 0].double().numpy(), [[expected[1]], [expected[0]]], order=1)
    np.testing.assert_allclose(sample_scores(score_map, actual)[0], bilinear, atol=1e-5)


def test_the_detector_and_the_network_can_be_trained() -> None:
    network = random_network("t16").train()
    images = torch.from_numpy(smooth_image(64, 64)).permute(2, 0, 1)[None].float() / 255
    maps = network(images)
    found = detect(maps.score_map, 20)
    descriptors = network.describe(maps.feature_map, found.keypoints)
    (found.keypoints.sum() + found.scores.sum() + descriptors[..., :7].sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert network.score_head[0].weight.grad.abs().max() > 0
    assert network.block1.conv1.weight.grad.abs().max() > 0


# The extractor


def test_is_an_extractor_that_says_what_it_is() -> None:
    extractor = random_extractor("n32", max_keypoints=30)
    assert isinstance(extractor, Extractor)
    features = extractor.extract(smooth_image(70, 90))
    assert features.kind == extractor.kind == "aliked-n32"
    assert features.image_size == (90, 70)
    assert features.descriptors.shape == (30, 128)
    assert extractor.precision.startswith("float32")


def test_padding_changes_nothing_and_is_zero() -> None:
    image = smooth_image(60, 60)
    many, few = random_extractor(max_keypoints=2000).extract(image), random_extractor(max_keypoints=20).extract(image)
    assert few.num_valid == 20 < many.num_valid < 2000
    torch.testing.assert_close(many.keypoints[:20], few.keypoints, atol=1e-5, rtol=0)
    torch.testing.assert_close(many.descriptors[:20], few.descriptors, atol=1e-5, rtol=0)
    for rows in (many.keypoints, many.scores, many.descriptors):
        assert torch.count_nonzero(rows[many.num_valid :]) == 0
    norms = many.descriptors[: many.num_valid].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_more_rows_than_pixels_are_padding() -> None:
    features = random_extractor(max_keypoints=4096).extract(smooth_image(32, 32))
    assert features.keypoints.shape == (4096, 2)
    assert 0 < features.num_valid < 200


def test_a_threshold_drops_weak_peaks_only() -> None:
    image = smooth_image(80, 80)
    free = random_extractor(max_keypoints=100).extract(image)
    peaks = free.scores[: free.num_valid]
    threshold = float(peaks.median())
    kept = random_extractor(max_keypoints=100, score_threshold=threshold).extract(image)
    assert 0 < kept.num_valid < free.num_valid
    torch.testing.assert_close(kept.keypoints[: kept.num_valid], free.keypoints[: kept.num_valid])
    none = random_extractor(max_keypoints=100, score_threshold=1.0).extract(image)
    assert none.num_valid == 0


def test_depends_on_the_image_only() -> None:
    extractor, image = random_extractor(max_keypoints=50), smooth_image(64, 96)
    first = extractor.extract(image)
    extractor.extract(smooth_image(96, 64, seed=1))
    image.setflags(write=False)
    second = extractor.extract(image)
    assert torch.equal(first.keypoints, second.keypoints)
    assert torch.equal(first.descriptors, second.descriptors)


def test_a_gray_image_is_three_equal_channels() -> None:
    extractor, gray = random_extractor(max_keypoints=50), smooth_image(64, 96)[:, :, 0]
    one, three = extractor.extract(gray), extractor.extract(np.repeat(gray[:, :, None], 3, axis=2))
    assert torch.equal(one.keypoints, three.keypoints)


def test_keypoints_are_px_of_the_full_image() -> None:
    image = smooth_image(120, 200)
    small = np.asarray(cv2.resize(image, (100, 60), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    features = random_extractor(max_keypoints=50, max_side=100).extract(image)
    expected = random_extractor(max_keypoints=50).extract(small)
    assert features.image_size == (200, 120)
    mapped = to_full_resolution(expected.keypoints[: expected.num_valid], (100, 60), (200, 120))
    torch.testing.assert_close(features.keypoints[: features.num_valid], mapped)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), dtype=np.float32),
        np.zeros((64, 64, 4), dtype=np.uint8),
        np.zeros((64,), dtype=np.uint8),
        np.zeros((31, 64), dtype=np.uint8),
    ],
)
def test_refuses_what_is_not_an_image(image: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="image: expected"):
        random_extractor().extract(image)


def test_refuses_images_of_another_size_than_the_layout() -> None:
    fast = AlikedInference(random_network("t16"), CPU)
    with pytest.raises(ValueError, match="images: expected"):
        fast(torch.zeros(1, 3, 64, 65), fast.create_layout(64, 64))


def test_refuses_weights_of_another_network() -> None:
    state_dict = random_network("n16").state_dict()
    with pytest.raises(WeightsError, match=r"aliked-t16 weights: block1.conv1.weight is \(16, 3, 3, 3\)"):
        Aliked(AlikedConfig(variant="t16"), state_dict)
    del state_dict["desc_head.agg_weights"]
    with pytest.raises(WeightsError, match=r"desc_head.agg_weights is missing; fetch .*aliked-n16"):
        Aliked(AlikedConfig(variant="n16"), state_dict)


@pytest.mark.parametrize("field", [{"variant": "x16"}, {"max_keypoints": 0}, {"score_threshold": 1.5}])
def test_refuses_settings_outside_their_limits(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        AlikedConfig(**field)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_equals_the_cpu_on_a_gpu() -> None:
    image, state_dict = smooth_image(240, 320), random_network("t16").state_dict()
    config = AlikedConfig(max_keypoints=200)
    expected = Aliked(config, state_dict).extract(image)
    with torch.backends.cudnn.flags(allow_tf32=False):
        on_gpu = Aliked(config, state_dict, "cuda")
        features = on_gpu.extract(image)
        layout = on_gpu.network.create_layout(240, 320)
        pixels = torch.from_numpy(image).cuda().permute(2, 0, 1)[None]
        score_map = on_gpu.network(pixels, layout).score_map.cpu()
    assert features.device.type == "cuda"
    assert features.num_valid == expected.num_valid
    plain = Aliked(config, state_dict).network
    difference = plain(pixels.cpu(), plain.create_layout(240, 320)).score_map - score_map
    assert difference.abs().max() < 1e-5
    # The map of random weights is nearly flat around its peaks: rounding moves some of them by less than 0.1 px.
    distance = torch.cdist(features.keypoints.cpu(), expected.keypoints).amin(1)
    assert (distance < 0.02).float().mean() >= 0.9 and (distance < 0.15).float().mean() >= 0.99


def test_spread_detections_cover_the_map_and_keep_padding_last():
    generator = torch.Generator().manual_seed(0)
    score_map = torch.rand(2, 1, 60, 90, generator=generator) * 0.1
    score_map[:, :, 20:40, 20:50] += 0.8
    crowded, spread = detect(score_map, 30), detect(score_map, 30, spread_cell_px=15)
    cells = [len(torch.unique((found.keypoints[0] // 15), dim=0)) for found in (crowded, spread)]
    assert cells[1] == 24 and cells[0] < 15
    few = torch.zeros(1, 1, 60, 90)
    few[0, 0, 30, 40] = few[0, 0, 10, 70] = few[0, 0, 11, 60] = 0.5
    found = detect(few, 10, spread_cell_px=15)
    assert found.num_valid.tolist() == [3]
    assert (found.scores[0, :3] > 0).all() and not found.scores[0, 3:].any() and not found.keypoints[0, 3:].any()
