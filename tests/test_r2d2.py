"""R2D2: the network against a slow one written from the description, the checkpoint format, and extraction by hand."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from frontends.base import Extractor, WeightsError
from frontends.frontend import create_extractor
from frontends.r2d2 import R2d2, R2d2Config, detect, refined_peaks, rgb_batch
from frontends.r2d2_network import (
    R2d2Architecture,
    R2d2Maps,
    R2d2Network,
    checkpoint,
    folded,
    load_network,
    normalised,
    read_constructor,
)
from vo.cli import PRESET_WEIGHTS, main

CPU = torch.device("cpu")
SMALL = R2d2Architecture(dim=16, mchan=1)
Array = NDArray[np.float64]


def random_network(architecture: R2d2Architecture = SMALL, seed: int = 0) -> R2d2Network:
    """Random weights, and statistics of BatchNorm that are not neutral."""
    torch.manual_seed(seed)
    network = R2d2Network(architecture).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    # Confidences of a fresh network hardly differ over the image.
    network.clf.weight.data *= 200
    network.sal.weight.data *= 200
    return network.requires_grad_(False)


def picture(width: int = 96, height: int = 72, seed: int = 0) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    image = generator.uniform(0, 255, (height // 4, width // 4, 3)).astype(np.float32)
    return np.clip(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- the network, slowly


def slow_convolution(image: Array, weight: Array, bias: Array, dilation: int) -> Array:
    """(C, H, W) -> (O, H, W): every tap in turn on an image with zeros around it."""
    size = weight.shape[2]
    padding = (size - 1) * dilation // 2
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    height, width = (side - (size - 1) * dilation for side in padded.shape[1:])
    result = np.broadcast_to(bias[:, None, None], (len(bias), height, width)).copy()
    for row in range(size):
        for column in range(size):
            top, left = row * dilation, column * dilation
            window = padded[:, top : top + height, left : left + width]
            result += np.tensordot(weight[:, :, row, column], window, axes=1)
    return result


def slow_pooling(image: Array) -> Array:
    height, width = (side // 2 for side in image.shape[1:])
    blocks = image[:, : 2 * height, : 2 * width].reshape(len(image), height, 2, width, 2)
    return blocks.max(axis=(2, 4))


def slow_layers(state_dict: dict[str, torch.Tensor], is_fast: bool, image: Array) -> list[Array]:
    """What every layer gives, after the description: Quad-L2Net, dilated, BatchNorm without scale and shift."""
    # Kernel size, dilation, and whether BatchNorm and ReLU follow. L2-Net has strides in its third and fifth
    # convolution and an 8x8 one at the end, here three of 2x2; a stride is a dilation of all layers behind it.
    plan: list[tuple[int, int, bool, bool]] = [(3, 1, True, True)] * 3
    after_third = 1 if is_fast else 2
    plan += [(3, after_third, True, True)] * 2 + [(3, 2 * after_third, True, True)]
    plan += [(2, 2 * after_third, True, False), (2, 4 * after_third, True, False), (2, 8 * after_third, False, False)]
    tensors = {name: tensor.double().numpy() for name, tensor in state_dict.items()}
    outputs: list[Array] = []
    for number, (size, dilation, has_norm, has_relu) in enumerate(plan):
        name = f"ops.{len(outputs)}"
        weight = tensors[f"{name}.weight"]
        assert weight.shape[2:] == (size, size)
        image = slow_convolution(image, weight, tensors[f"{name}.bias"], dilation)
        outputs.append(image)
        if has_norm:
            name = f"ops.{len(outputs)}"
            mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
            image = (image - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
            outputs.append(image)
        if has_relu:
            image = np.maximum(image, 0)
            outputs.append(image)
        if is_fast and number == 2:
            image = slow_pooling(image)
            outputs.append(image)
    if is_fast:
        size = (2 * image.shape[2], 2 * image.shape[1])
        outputs.append(np.stack([cv2.resize(channel, size, interpolation=cv2.INTER_LINEAR) for channel in image]))
    return outputs


@pytest.mark.parametrize("is_fast", [False, True], ids=["quad", "fast"])
def test_every_layer_agrees_with_a_slow_implementation(is_fast: bool) -> None:
    network = random_network(R2d2Architecture(dim=16, mchan=1, is_fast=is_fast)).double()
    image = np.random.default_rng(1).normal(size=(3, 22, 26))
    expected = slow_layers(network.state_dict(), is_fast, image)
    assert len(expected) == len(network.ops)
    values = torch.from_numpy(image)[None]
    for index, layer in enumerate(network.ops):
        # Layers that work in place would change what was compared before.
        values = layer(values.clone())
        np.testing.assert_allclose(values[0].numpy(), expected[index], atol=1e-9, err_msg=f"ops.{index}")


@pytest.mark.parametrize("is_fast", [False, True], ids=["quad", "fast"])
def test_the_confidences_come_from_the_squared_features(is_fast: bool) -> None:
    network = random_network(R2d2Architecture(dim=16, mchan=1, is_fast=is_fast))
    image = np.random.default_rng(2).normal(size=(3, 20, 24)).astype(np.float32)
    features = slow_layers(network.state_dict(), is_fast, image.astype(np.float64))[-1]
    tensors = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}
    squared = np.moveaxis(features, 0, -1) ** 2
    two = squared @ tensors["clf.weight"][:, :, 0, 0].T + tensors["clf.bias"]
    reliability = np.exp(two[..., 1]) / np.exp(two).sum(axis=-1)
    x = np.log1p(np.exp(squared @ tensors["sal.weight"][0, :, 0, 0] + tensors["sal.bias"]))
    for candidate in (network, folded(network)):
        with torch.inference_mode():
            maps = candidate(torch.from_numpy(image)[None])
        np.testing.assert_allclose(maps.reliability[0], reliability, atol=1e-5)
        np.testing.assert_allclose(maps.repeatability[0], x / (1 + x), atol=1e-5)
        unit = features / np.linalg.norm(features, axis=0)
        np.testing.assert_allclose(maps.descriptors[0], unit, atol=1e-5)
    assert np.ptp(reliability) > 0.2 and np.ptp(x / (1 + x)) > 0.2


def test_the_published_network_has_its_published_size() -> None:
    widths = [(3, 32, 3), (32, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), *[(128, 128, 2)] * 3]
    expected = sum(i * o * k * k + o for i, o, k in widths) + 2 * 128 + 2 + 128 + 1
    assert sum(parameter.numel() for parameter in R2d2Network().parameters()) == expected == 484_387


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("text", "architecture"),
    [
        ("Quad_L2Net_ConfCFS()", R2d2Architecture()),
        (" Quad_L2Net_ConfCFS( mchan=6 ) ", R2d2Architecture(mchan=6)),
        ("Fast_Quad_L2Net_ConfCFS()", R2d2Architecture(is_fast=True)),
        ("Quad_L2Net_ConfCFS(dim=64, relu22=True)", R2d2Architecture(dim=64, relu22=True)),
    ],
)
def test_constructors_are_read(text: str, architecture: R2d2Architecture) -> None:
    assert read_constructor(text) == architecture
    assert read_constructor(architecture.constructor) == architecture


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Quad_L2Net_ConfCFS",
        "Quad_L2Net_ConfCFS(4)",
        "Quad_L2Net_ConfCFS(mchan='4')",
        "Quad_L2Net_ConfCFS(mchan=-1)",
        "Quad_L2Net_ConfCFS(mchan=0)",
        "Quad_L2Net_ConfCFS(mchan=10**9)",
        "Quad_L2Net_ConfCFS(dim=100000)",
        "Quad_L2Net_ConfCFS(bn=False)",
        "Quad_L2Net_ConfCFS(**{})",
        "L2_Net()",
        "Quad_L2Net_ConfCFS(mchan=open('found', 'w').write('x'))",
        "__import__('os').system('touch found')",
        "open('found', 'w')()",
        "(",
        "\0",
    ],
)
def test_other_constructors_are_refused_and_nothing_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="net: ") as error:
        read_constructor(text)
    assert "\n" not in str(error.value) and "tools/train_r2d2.py" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_checkpoints_go_through_a_file(tmp_path: Path) -> None:
    path, network = tmp_path / "mine.pt", random_network()
    tree = checkpoint(network)
    tree["state_dict"] = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(tree, path)
    loaded = create_extractor(R2d2Config(weights=str(path), min_reliability=0, min_repeatability=0), CPU)
    assert isinstance(loaded.extractor, Extractor) and loaded.weights is not None
    assert (loaded.weights.name, loaded.weights.is_verified) == ("mine", False)
    direct = R2d2(R2d2Config(min_reliability=0, min_repeatability=0), SMALL.constructor, network.state_dict())
    found, expected = (extractor.extract(picture()) for extractor in (loaded.extractor, direct))
    assert torch.equal(found.keypoints, expected.keypoints) and torch.equal(found.descriptors, expected.descriptors)


def test_files_of_something_else_are_refused_in_one_line(tmp_path: Path) -> None:
    good = checkpoint(random_network())
    tensors = dict(random_network().state_dict())
    cases = {
        "net: missing": tensors,
        "holds no flat state dict": {"net": "Quad_L2Net_ConfCFS()", "state_dict": {"a": 1}},
        "net: expected the text": {**good, "net": 4},
        "sal.bias is missing": {**good, "state_dict": {k: v for k, v in tensors.items() if k != "sal.bias"}},
        "as net says": {**good, "net": "Quad_L2Net_ConfCFS()"},
        "more is no tensor": {**good, "state_dict": {**tensors, "more": torch.zeros(1)}},
    }
    path = tmp_path / "file.pt"
    for reason, tree in cases.items():
        torch.save(tree, path)
        with pytest.raises(WeightsError) as error:
            create_extractor(R2d2Config(weights=str(path)), CPU)
        assert reason in str(error.value) and "\n" not in str(error.value)


def test_counters_that_old_files_lack_do_not_matter() -> None:
    network = random_network()
    tensors = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(tensors) < len(network.state_dict())
    load_network(SMALL.constructor, tensors)


def test_the_default_is_our_small_network_and_the_published_ones_are_given_by_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The licence of the published weights is non-commercial: nothing fetches them."""
    loaded = create_extractor(R2d2Config(), CPU)
    assert loaded.weights is not None and loaded.weights.name == "r2d2-small" and loaded.weights.licence == "Apache-2.0"
    assert loaded.remark is not None and all(word in loaded.remark for word in ("our own", "non-commercial", "weights"))
    path = tmp_path / "theirs.pt"
    torch.save(checkpoint(R2d2Network(R2d2Architecture(dim=16, mchan=1))), path)
    given = create_extractor(R2d2Config(weights=str(path)), CPU)
    assert given.weights is not None and given.weights.name == "theirs" and given.remark is None
    assert "r2d2" not in PRESET_WEIGHTS
    assert main(["weights", "list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("r2d2 "))
    assert "non-commercial" in line
    assert main(["weights", "fetch", "r2d2"]) == 2
    assert "non-commercial" in capsys.readouterr().err


# ---------------------------------------------------------------- extraction


def extractor_of(**settings: object) -> R2d2:
    network = random_network()
    return R2d2(R2d2Config(**settings), SMALL.constructor, network.state_dict())  # type: ignore[arg-type]


def test_detections_are_the_peaks_above_both_thresholds() -> None:
    generator = np.random.default_rng(0)
    repeatability, reliability = generator.uniform(0, 1, (2, 30, 40)).astype(np.float32)
    repeatability[10, 10] = repeatability[10, 11] = 1.0  # equal neighbours are both peaks
    descriptors = generator.normal(size=(8, 30, 40)).astype(np.float32)
    expected = []
    for row in range(30):
        for column in range(40):
            window = repeatability[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            is_peak = repeatability[row, column] == window.max()
            if is_peak and repeatability[row, column] >= 0.6 and reliability[row, column] >= 0.4:
                expected.append((column, row))
    maps = R2d2Maps(*(torch.from_numpy(array)[None] for array in (descriptors, reliability, repeatability)))
    found = detect(maps, 0.4, 0.6)
    assert found.keypoints.tolist() == [list(map(float, point)) for point in expected]
    assert 20 < len(expected) < 300
    columns, rows = np.array(expected).T
    np.testing.assert_allclose(found.scores, (repeatability * reliability)[rows, columns])
    np.testing.assert_array_equal(found.descriptors, descriptors[:, rows, columns].T)


def test_one_scale_gives_the_best_detections_of_the_network() -> None:
    image = picture()
    extractor = extractor_of(
        max_keypoints=50,
        spread_cell_px=None,
        subpixel=False,
        min_reliability=0.2,
        min_repeatability=0.2,
        min_side=96,
    )
    features = extractor.extract(image)
    with torch.inference_mode():
        maps = random_network()(normalised(rgb_batch(image, CPU)))
    found = detect(maps, 0.2, 0.2)
    order = found.scores.argsort(descending=True, stable=True)[:50]
    assert features.num_valid == 50 and features.image_size == (96, 72) and features.kind == "r2d2"
    np.testing.assert_allclose(features.scores, found.scores[order], atol=1e-5)
    np.testing.assert_array_equal(features.keypoints, found.keypoints[order])
    np.testing.assert_allclose(features.descriptors, found.descriptors[order], atol=1e-5)


def test_peaks_of_paraboloids_are_found_below_the_pixel() -> None:
    """Exactly where the map is one; on the edge of the image, and where it is flat, they stay."""
    generator = np.random.default_rng(0)
    tops = np.stack((generator.uniform(4.6, 5.4, 20), generator.uniform(3.6, 4.4, 20)), axis=1)
    columns, rows = np.meshgrid(np.arange(11), np.arange(9))
    for x, y in tops:
        heat = 0.9 - 0.02 * (columns - x) ** 2 - 0.03 * (rows - y) ** 2
        found = refined_peaks(torch.from_numpy(heat.astype(np.float32)), torch.tensor([[round(x), round(y)]]))
        np.testing.assert_allclose(found[0], [x, y], atol=1e-4)
    points = torch.tensor([[0, 4], [5, 8], [5, 4]])
    slope = torch.from_numpy(columns.astype(np.float32))
    assert torch.equal(refined_peaks(slope, points), points.float())


def test_scales_go_down_step_by_step_and_map_back_by_pixel_centres() -> None:
    image, seen = picture(128, 96), []
    extractor = extractor_of(min_side=64, scale_step=2**0.5, max_keypoints=4000, min_reliability=0, min_repeatability=0)
    original = extractor.maps

    def one_peak(scaled: torch.Tensor) -> R2d2Maps:
        """The same place of the image, in the middle of the last column's and row's half, at every scale."""
        maps = original(scaled)
        height, width = scaled.shape[2:]
        seen.append((width, height))
        repeatability = torch.zeros_like(maps.repeatability)
        repeatability[0, height // 2, width // 4] = 0.9
        return R2d2Maps(maps.descriptors, maps.reliability, repeatability)

    extractor.maps = one_peak  # type: ignore[method-assign]
    extractor.config = R2d2Config(min_side=64, scale_step=2**0.5, min_reliability=0, min_repeatability=0.5)
    features = extractor.extract(image)
    assert seen == [(128, 96), (91, 68), (64, 48)]
    expected = [((w // 4 + 0.5) * 128 / w - 0.5, (h // 2 + 0.5) * 96 / h - 0.5) for w, h in seen]
    np.testing.assert_allclose(sorted(features.valid_keypoints().tolist()), sorted(expected), atol=1e-4)


def test_large_images_are_shrunk_first() -> None:
    image = picture(256, 192)
    settings = {"min_reliability": 0.0, "min_repeatability": 0.0, "min_side": 128, "spread_cell_px": None}
    features = extractor_of(max_side=128, **settings).extract(image)
    small = extractor_of(**settings).extract(cv2.resize(image, (128, 96), interpolation=cv2.INTER_AREA))
    assert features.image_size == (256, 192) and features.num_valid == small.num_valid > 20
    np.testing.assert_allclose(features.valid_keypoints(), (small.valid_keypoints() + 0.5) * 2 - 0.5, atol=1e-4)


def test_shapes_are_static_and_padding_is_zero() -> None:
    extractor = extractor_of(max_keypoints=300, min_reliability=0.5, min_repeatability=0.5, min_side=96)
    for image in (picture(), picture(seed=1), np.full((72, 96, 3), 128, np.uint8)):
        features = extractor.extract(image)
        assert features.keypoints.shape == (300, 2) and features.descriptors.shape == (300, 16)
        assert not features.keypoints[features.num_valid :].any() and not features.scores[features.num_valid :].any()
        lengths = torch.linalg.vector_norm(features.descriptors[: features.num_valid], dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
    nothing = extractor_of(max_keypoints=300, min_reliability=1.0, min_repeatability=1.0).extract(picture())
    assert nothing.num_valid == 0 and nothing.keypoints.shape == (300, 2)


def test_gray_images_are_images_of_three_equal_channels() -> None:
    gray = picture()[..., 0]
    extractor = extractor_of(min_reliability=0.3, min_repeatability=0.3)
    one, three = extractor.extract(gray), extractor.extract(np.repeat(gray[..., None], 3, axis=2))
    assert one.num_valid > 10 and torch.equal(one.keypoints, three.keypoints)


def test_bfloat16_finds_nearly_the_same() -> None:
    settings: dict[str, object] = {"min_reliability": 0.0, "min_repeatability": 0.0, "min_side": 96}
    maps = [extractor_of(precision=p, **settings).maps(rgb_batch(picture(), CPU)) for p in ("float32", "bfloat16")]
    similarity = (maps[0].descriptors * maps[1].descriptors).sum(dim=1)
    assert float(similarity.quantile(0.01)) > 0.99


def test_odd_sizes_of_the_fast_variant_keep_their_size() -> None:
    architecture = R2d2Architecture(dim=16, mchan=1, is_fast=True)
    extractor = R2d2(R2d2Config(), architecture.constructor, random_network(architecture).state_dict())
    maps = extractor.maps(rgb_batch(picture(97, 73), CPU))
    assert maps.repeatability.shape == (1, 73, 97) and maps.descriptors.shape == (1, 16, 73, 97)


def test_images_of_other_shapes_are_refused() -> None:
    extractor = extractor_of()
    for image in (np.zeros((15, 40), np.uint8), np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40), np.float32)):
        with pytest.raises(ValueError, match="image: expected"):
            extractor.extract(image)  # type: ignore[arg-type]
