"""The networks over fixed shapes against the methods as they are, and on a GPU that is not there."""

from __future__ import annotations

import os
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from fake_cuda import CUDA, capturing, fake_cuda, move
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia_lightglue import kornia_network, learned, planted_pair
from test_aliked import random_network, smooth_image

from frontends.aliked import Aliked, AlikedConfig
from frontends.aliked_detection import suppress_non_maxima
from frontends.aliked_folding import FoldedConv2d
from frontends.aliked_static import AlikedStatic, suppress_by_pooling
from frontends.base import Features, Matches
from frontends.feature_pool import RowLayout
from frontends.graphs import EmulatedBackend
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_static import DTYPES, ExitRule, LightGlueStatic, create_static
from frontends.static_extractor import StaticExtractor
from frontends.static_form import AreaResize, ExtractorChoice, StaticForm, arithmetic
from frontends.static_matcher import MatcherChoice, StaticMatcher, fitting_bucket
from frontends.tuning import compile_steps
from frontends.weights import load_state_dict
from frontends.xfeat import XFeat, XFeatConfig
from frontends.xfeat_static import XFeatStatic

needs_weights = pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set")
CPU = torch.device("cpu")
CHOICES = (
    MatcherChoice(),
    MatcherChoice(depth="blocks"),
    MatcherChoice(depth="blocks", layers_per_block=1, has_buckets=True),
    MatcherChoice(depth="speculative", has_buckets=True),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def aliked(**changes: Any) -> Aliked:
    config = AlikedConfig(**{"max_keypoints": 96, **changes})
    return Aliked(config, random_network("t16").state_dict())


def assert_same_features(found: Features, expected: Features) -> None:
    """The same keypoints with the same scores and descriptors; equal scores may stand in any order."""
    assert found.num_valid == expected.num_valid and found.image_size == expected.image_size
    assert found.kind == expected.kind
    count = found.num_valid
    if count:
        distances = (expected.keypoints[:count, None] - found.keypoints[None, :count]).norm(dim=2)
        nearest = distances.argmin(dim=1)
        assert distances.amin(dim=1).max() < 1e-4
        torch.testing.assert_close(found.scores[nearest], expected.scores[:count], atol=1e-6, rtol=0)
        torch.testing.assert_close(found.descriptors[nearest], expected.descriptors[:count], atol=1e-5, rtol=0)
        np.testing.assert_array_equal(found.valid_keypoints(), found.keypoints[:count].numpy())
    assert not found.keypoints[count:].any() and not found.descriptors[count:].any()


def assert_same_matches(found: Matches, expected: Matches) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert (found.stop_layer, found.num_kept0, found.num_kept1) == (
        expected.stop_layer,
        expected.num_kept0,
        expected.num_kept1,
    )


def emulated(form: StaticForm) -> StaticExtractor:
    return StaticExtractor(form, EmulatedBackend(CPU))


# Extraction


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spread_cell_px": None},
        {"suppression_rounds": 1, "score_threshold": 0.6},
        {"max_keypoints": 4000},
        {"max_side": 64},
    ],
)
def test_aliked_with_fixed_shapes_finds_the_same(changes: dict[str, Any]):
    eager = aliked(**changes)
    extractor = emulated(AlikedStatic(eager))
    for image in (smooth_image(96, 128), smooth_image(96, 128, seed=1), smooth_image(70, 90)[:, :, 0]):
        assert_same_features(extractor.extract(image), eager.extract(image))


@needs_weights
@pytest.mark.parametrize(
    "changes",
    [{}, {"spread_cell_px": None, "subpixel": False}, {"detection_threshold": 0.3}, {"max_side": 100}],
)
def test_xfeat_with_fixed_shapes_finds_the_same(changes: dict[str, Any]):
    eager = XFeat(XFeatConfig(**{"max_keypoints": 96, **changes}), load_state_dict("xfeat", None)[0])
    extractor = emulated(XFeatStatic(eager))
    for image in (smooth_image(96, 128), smooth_image(96, 128, seed=1), smooth_image(70, 90)[:, :, 0]):
        assert_same_features(extractor.extract(image), eager.extract(image))


def test_maps_laid_out_otherwise_give_the_same():
    eager = aliked()
    extractor = emulated(AlikedStatic(eager))
    extractor.use(ExtractorChoice(convolutions="planar, benchmarked"))
    assert_same_features(extractor.extract(smooth_image(96, 128)), eager.extract(smooth_image(96, 128)))
    assert not any(module.is_planar for module in eager.network.modules() if isinstance(module, FoldedConv2d))


def test_an_image_without_a_keypoint_gives_none():
    extractor = emulated(AlikedStatic(aliked(score_threshold=1.0)))
    features = extractor.extract(np.zeros((64, 64, 3), np.uint8))
    assert features.num_valid == 0 and len(features.valid_keypoints()) == 0


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_pooling_suppresses_what_the_shifted_maxima_do(seed: int, num_rounds: int):
    generator = torch.Generator().manual_seed(seed)
    # Few different values: ties are what may go wrong.
    scores = torch.randint(0, 12, (1, 1, 17, 23), generator=generator) / 12
    torch.testing.assert_close(suppress_by_pooling(scores, num_rounds), suppress_non_maxima(scores, num_rounds))


@pytest.mark.parametrize(("full", "resized"), [((96, 64), (48, 32)), ((97, 61), (50, 31)), ((90, 60), (30, 20))])
def test_shrinking_on_the_device_is_that_of_opencv(full: tuple[int, int], resized: tuple[int, int]):
    image = np.random.default_rng(0).integers(0, 256, (full[1], full[0], 3), dtype=np.uint8)
    expected = cv2.resize(image, resized, interpolation=cv2.INTER_AREA)
    shrunk = AreaResize(full, resized, CPU)(torch.from_numpy(image)).numpy()
    assert np.abs(shrunk.astype(int) - expected).max() <= 1
    assert np.mean(shrunk == expected) > 0.999


# Matching


def lightglue(configuration: str = "128/2/6", **changes: Any) -> LightGlue:
    config = LightGlueConfig(precision="float32", **changes)
    return LightGlue(config, learned(kornia_network(configuration)))


def static_matcher(eager: LightGlue, capacity: int = 192, choice: MatcherChoice | None = None) -> StaticMatcher:
    matcher = StaticMatcher(eager, RowLayout(capacity, eager.architecture.input_dim), EmulatedBackend(CPU))
    matcher.use(choice or MatcherChoice())
    return matcher


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.depth}-{choice.layers_per_block}")
def test_lightglue_with_fixed_shapes_matches_the_same(choice: MatcherChoice):
    stop_layers, kept = set(), set()
    for depth, width in ((0.95, 0.99), (0.5, 0.95), (1.0, 0.9), (1.0, 1.0), (0.8, 1.0)):
        eager = lightglue(depth_confidence=depth, width_confidence=width)
        matcher = static_matcher(eager, choice=choice)
        for seed in (0, 1):
            pair = planted_pair(64, 180, 150, seed)
            found, expected = matcher.match(*pair), eager.match(*pair)
            assert_same_matches(found, expected)
            assert len(found) > 50
            stop_layers.add(found.stop_layer)
            kept.add(found.num_kept0)
    # The cases are not all of one kind.
    assert len(stop_layers) > 2 and len(kept) > 2


@pytest.mark.parametrize("configuration", ["256/4/9", "96/1/6"])
def test_other_networks_too(configuration: str):
    eager = lightglue(configuration, depth_confidence=0.9, width_confidence=0.95)
    pair = planted_pair(eager.architecture.input_dim, 100, 90)
    for choice in CHOICES[::3]:
        assert_same_matches(static_matcher(eager, 112, choice).match(*pair), eager.match(*pair))


@pytest.mark.parametrize("choice", CHOICES[:2], ids=lambda choice: choice.depth)
@pytest.mark.parametrize(("count0", "count1"), [(0, 50), (50, 0), (0, 0), (1, 1), (192, 192)])
def test_sides_without_points_and_full_ones(choice: MatcherChoice, count0: int, count1: int):
    eager = lightglue()
    features0, features1 = planted_pair(64, max(count0, 2), max(count1, 2))
    pair = tuple(
        Features(f.keypoints, f.scores, f.descriptors, min(count, f.num_valid), f.image_size, f.kind)
        for f, count in ((features0, count0), (features1, count1))
    )
    assert_same_matches(static_matcher(eager, choice=choice).match(*pair), eager.match(*pair))


def test_a_settled_pair_costs_one_block():
    eager = lightglue(depth_confidence=0.0)
    matcher = static_matcher(eager, choice=MatcherChoice(depth="blocks", layers_per_block=1))
    assert matcher.match(*planted_pair(64)).stop_layer == 1 and matcher.num_blocks_run == 1
    matcher.use(MatcherChoice(depth="speculative", layers_per_block=1))
    assert matcher.match(*planted_pair(64)).stop_layer == 1 and matcher.num_blocks_run == 2


@given(st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True), st.integers(0, 500), st.integers(0, 3))
def test_the_bucket_has_room_and_never_grows(sizes: list[int], num_points: int, current: int):
    sizes = sorted(sizes, reverse=True)
    current = min(current, len(sizes) - 1)
    num_points = min(num_points, sizes[current])
    bucket = fitting_bucket(sizes, num_points, current)
    assert bucket >= current and sizes[bucket] >= num_points
    assert bucket == len(sizes) - 1 or sizes[bucket + 1] < num_points


def test_the_compiler_sees_one_graph_for_all_layers(monkeypatch: pytest.MonkeyPatch):
    """As far as a compiler's code generation, which takes minutes here: no break, and nothing compiled twice."""
    graphs: list[str] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(type(module).__name__)
        return module.forward

    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_with(function, backend=backend, **options)
    )
    eager = lightglue(depth_confidence=0.9, width_confidence=0.95)
    matcher = StaticMatcher(eager, RowLayout(192, 64), EmulatedBackend(CPU, is_checked=False))
    network = create_static(eager, matcher.layout, "float32")
    compile_steps(network, 300.0)
    for depth in ("whole", "blocks"):
        matcher.use(MatcherChoice(depth=depth, is_compiled=True), network)
        pair = planted_pair(64, 180, 150)
        assert_same_matches(matcher.match(*pair), eager.match(*pair))
    assert len(graphs) == 2


def test_features_beyond_the_capacity_go_to_the_matcher_as_it_is():
    eager = lightglue()
    pair = planted_pair(64, 180, 150)
    assert_same_matches(static_matcher(eager, 100).match(*pair), eager.match(*pair))


def test_the_arithmetic_of_products_is_put_back():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for precision in ("float32", "tf32"):
        with arithmetic(precision), arithmetic("float32"):
            assert not any(switch.allow_tf32 for switch in switches)
        with pytest.raises(KeyError), arithmetic(precision):
            assert all(switch.allow_tf32 == (precision == "tf32") for switch in switches)
            raise KeyError
    assert [switch.allow_tf32 for switch in switches] == before


# On a GPU that is not there


def _on_fake_gpu(form: StaticForm, shape: tuple[int, ...], precision: str) -> None:
    program = form.program(shape, ExtractorChoice(precision, convolutions=form.convolutions[-1]))
    image = torch.empty(shape, dtype=torch.uint8, device=CUDA)
    with capturing(), arithmetic(precision):
        found = program(image)
    assert found.keypoints.shape == (form.capacity, 2) and found.count.shape == (1,)
    assert found.descriptors.shape == (form.capacity, form.descriptor_dim)
    assert found.descriptors.dtype == torch.float32 and found.keypoints.device == CUDA


@pytest.mark.parametrize("shape", [(480, 640, 3), (376, 1241)])
def test_aliked_could_be_captured_on_a_gpu(shape: tuple[int, ...]):
    extractor = Aliked(AlikedConfig(max_side=600), random_network("t16").state_dict(), "meta")
    with fake_cuda() as mode:
        extractor.device = extractor.network.device = CUDA
        move(extractor.network, mode)
        _on_fake_gpu(AlikedStatic(extractor), shape, "float32")


@needs_weights
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_xfeat_could_be_captured_on_a_gpu(precision: str, monkeypatch: pytest.MonkeyPatch):
    extractor = XFeat(XFeatConfig(), load_state_dict("xfeat", None)[0], "meta")
    network = extractor.network_in(DTYPES[precision])
    with fake_cuda() as mode:
        extractor.device = CUDA
        monkeypatch.setattr(extractor, "network_in", lambda dtype: move(network, mode))
        _on_fake_gpu(XFeatStatic(extractor), (480, 640, 3), precision)


@pytest.mark.parametrize("precision", DTYPES)
def test_lightglue_could_be_captured_on_a_gpu(precision: str):
    packed = lightglue().packed_in(DTYPES[precision])
    layout = RowLayout(512, 64)
    with fake_cuda() as mode:
        network = LightGlueStatic(move(packed, mode), ExitRule(0.95, 0.99, 6, -2.3), layout, CUDA)
        rows = torch.empty(2, layout.length, device=CUDA)
        with capturing():
            pair = network.run_layers(network.begin(rows), range(3))
            pair = network.run_layers(network.squeezed(pair, 384), range(3, 6))
            assert network.result(pair).shape == (4 + 2 * 512,)
