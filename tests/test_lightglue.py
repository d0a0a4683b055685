"""LightGlue against kornia's implementation with random weights."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kornia_lightglue import (
    CONFIGURATIONS,
    IMAGE_SIZE,
    coordinates,
    kornia_network,
    learned,
    one_thread,
    packed_log_assignment,
    plain_log_assignment,
    planted_pair,
    run_kornia,
)
from torch import Tensor

from frontends.base import Features, Matcher, WeightsError
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_network import build_network, normalize_keypoints, published_names
from frontends.lightglue_packed import log_sum_exp, pack


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def matcher_like(network: Any, depth: float = 0.95, width: float = 0.99, precision: str = "float32") -> LightGlue:
    config = LightGlueConfig(depth_confidence=depth, width_confidence=width, precision=precision)
    return LightGlue(config, learned(network))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_log_assignment_equals_kornia(configuration: str) -> None:
    network = kornia_network(configuration)
    pair = planted_pair(network.conf.input_dim)
    expected = run_kornia(network, *pair, 1.0, 1.0)["log_assignment"]
    assert expected[0, :-1, :-1].exp().amax(1).gt(0.1).sum() > 50
    plain = plain_log_assignment(learned(network), *pair)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=0)
    packed = pack(build_network(learned(network), "test"), torch.float32)
    torch.testing.assert_close(packed_log_assignment(packed, *pair), expected[0, :-1, :-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("depth", "width"), [(1.0, 1.0), (0.95, 0.99), (0.8, 0.8), (1.0, 0.9)])
def test_matches_equal_kornia(configuration: str, depth: float, width: float) -> None:
    network = kornia_network(configuration)
    pair = planted_pair(network.conf.input_dim)
    expected = run_kornia(network, *pair, depth, width)
    matches = matcher_like(network, depth, width).match(*pair)
    assert len(matches) > 20
    np.testing.assert_array_equal(matches.indices, expected["matches"][0].numpy())
    np.testing.assert_allclose(matches.scores, expected["scores"][0].numpy(), atol=1e-4)
    assert matches.stop_layer == expected["stop"]
    assert (1 < matches.stop_layer < network.conf.n_layers) == (depth < 1)
    if width < 1:
        # kornia counts for every point the layers it took part in.
        for num_kept, layers in ((matches.num_kept0, expected["prune0"]), (matches.num_kept1, expected["prune1"])):
            assert num_kept == int((layers == layers.max()).sum())
    if width <= 0.9:
        assert matches.num_kept0 < pair[0].num_valid


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_padded_rows_take_no_part(configuration: str) -> None:
    """Reduced precision pads every image to a multiple of 64 rows: in float32 that must change nothing."""
    network = kornia_network(configuration)
    pair = planted_pair(network.conf.input_dim)
    expected = run_kornia(network, *pair, 0.8, 0.8)
    matcher = matcher_like(network, 0.8, 0.8)
    matcher._packed = dataclasses.replace(matcher._packed, granularity=64)
    matches = matcher.match(*pair)
    np.testing.assert_array_equal(matches.indices, expected["matches"][0].numpy())
    np.testing.assert_allclose(matches.scores, expected["scores"][0].numpy(), atol=1e-4)
    assert matches.stop_layer == expected["stop"]
    assert matches.num_kept0 == int((expected["prune0"] == expected["prune0"].max()).sum()) < pair[0].num_valid


def test_scale_and_orientation_equal_kornia() -> None:
    network = kornia_network("256/4/9", add_scale_ori=True)
    plain0, plain1 = planted_pair(128)
    generator = torch.Generator().manual_seed(3)

    def oriented(features: Features) -> Features:
        count = features.num_valid
        scales, turns = torch.rand(2, count, generator=generator)
        return Features(
            features.keypoints, features.scores, features.descriptors, count, IMAGE_SIZE, "sift", scales, 6 * turns
        )

    pair = oriented(plain0), oriented(plain1)
    expected = run_kornia(network, *pair)
    matcher = matcher_like(network)
    matches = matcher.match(*pair)
    assert len(matches) > 20
    np.testing.assert_array_equal(matches.indices, expected["matches"][0].numpy())
    with pytest.raises(ValueError, match="scales and orientations"):
        matcher.match(plain0, plain1)


def test_edge_preset_is_a_network_of_five_layers() -> None:
    network = kornia_network("128/2/6")
    short = kornia_network("128/2/6", n_layers=5)
    short.load_state_dict(learned(network), strict=False)
    pair = planted_pair(64)
    expected = run_kornia(short, *pair, 0.90, 0.95)
    matches = LightGlue(LightGlueConfig(preset="edge", precision="float32"), learned(network)).match(*pair)
    np.testing.assert_array_equal(matches.indices, expected["matches"][0].numpy())
    assert matches.stop_layer == expected["stop"]


def test_presets_fill_what_is_not_set() -> None:
    assert LightGlueConfig().limits() == (0.95, 0.99, None)
    assert LightGlueConfig(preset="accurate").limits() == (1.0, 1.0, None)
    assert LightGlueConfig(preset="edge", width_confidence=1.0).limits() == (0.90, 1.0, 5)
    with pytest.raises(ValueError, match="preset"):
        LightGlueConfig(preset="fastest")
    with pytest.raises(ValueError, match="depth_confidence"):
        LightGlueConfig(depth_confidence=-1)


def test_everything_pruned_gives_no_matches() -> None:
    state_dict = learned(kornia_network("128/2/6"))
    for key, value in state_dict.items():
        if key.startswith("log_assignment") and "matchability" in key:
            state_dict[key] = torch.full_like(value, -9.0 if key.endswith("bias") else 0.0)
    config = LightGlueConfig(depth_confidence=1.0, width_confidence=0.95)
    matches = LightGlue(config, state_dict).match(*planted_pair(64))
    assert (len(matches), matches.stop_layer, matches.num_kept0, matches.num_kept1) == (0, 1, 0, 0)


@pytest.mark.parametrize("names", ["old", "nested", "float16"])
def test_every_release_loads(names: str) -> None:
    network = kornia_network("96/1/6")
    current = learned(network)
    changed = {}
    for key, value in network.state_dict().items():
        parts = key.split(".")
        old = ".".join((parts[2], parts[1], *parts[3:])) if parts[0] == "transformers" else key
        renamed = {"old": old, "nested": f"matcher.{old}", "float16": key}[names]
        changed[renamed] = value.half() if names == "float16" else value
    if names == "nested":
        changed["extractor.block1.weight"] = torch.zeros(3)
    loaded = published_names(changed)
    assert loaded.keys() == current.keys()
    for key, value in loaded.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, current[key], rtol=1e-3 if names == "float16" else 0, atol=1e-6)
    architecture = build_network(changed, "test").architecture
    assert (architecture.width, architecture.num_heads, architecture.num_layers) == (96, 1, 6)
    assert (architecture.input_dim, architecture.num_coordinates) == (64, 2)


def test_input_of_the_network_s_width_needs_no_projection() -> None:
    network = kornia_network("128/2/6", input_dim=128)
    pair = planted_pair(128)
    matches = matcher_like(network).match(*pair)
    np.testing.assert_array_equal(matches.indices, run_kornia(network, *pair)["matches"][0].numpy())


def test_incomplete_checkpoints_are_refused() -> None:
    complete = learned(kornia_network("128/2/6"))

    def without(*keys: str) -> dict[str, Tensor]:
        return {key: value for key, value in complete.items() if not key.startswith(keys)}

    with pytest.raises(WeightsError, match=r"my\.pth: not a LightGlue checkpoint, it has no log_assignment"):
        build_network({"block1.weight": torch.zeros(3, 3)}, "my.pth")
    with pytest.raises(WeightsError, match=r"my\.pth: parameter transformers\.2\.self_attn\.Wqkv\.bias: .*nothing"):
        build_network(without("transformers.2.self_attn.Wqkv.bias"), "my.pth")
    with pytest.raises(WeightsError, match=r"parameter extra: expected nothing"):
        build_network({**complete, "extra": torch.zeros(1)}, "my.pth")
    no_exits = without("token_confidence")
    with pytest.raises(WeightsError, match="no confidence heads"):
        LightGlue(LightGlueConfig(), no_exits)
    all_layers = LightGlue(LightGlueConfig(depth_confidence=1.0, precision="float32"), no_exits)
    assert all_layers.match(*planted_pair(64)).stop_layer == 6


def test_weights_for_other_features_are_refused() -> None:
    state_dict = learned(kornia_network("128/2/6"))
    matcher = LightGlue(LightGlueConfig(), state_dict, name="lightglue-light-aliked-t16", fits=("aliked-t16",))
    with pytest.raises(WeightsError, match="lightglue-light-aliked-t16: made for aliked-t16, not for planted"):
        matcher.match(*planted_pair(64))
    any_kind = LightGlue(LightGlueConfig(), state_dict, name="mine.pth")
    with pytest.raises(WeightsError, match=r"mine\.pth: made for .* of length 64, planted has .* length 32"):
        any_kind.match(*planted_pair(32))
    any_kind.check_fit("aliked-t16", 64)
    matcher.check_fit("aliked-t16")


@pytest.mark.parametrize("configuration", ["128/2/6", "96/1/6"])
def test_padding_changes_nothing(configuration: str) -> None:
    state_dict = learned(kornia_network(configuration))
    input_dim = CONFIGURATIONS[configuration][3]
    pair = planted_pair(input_dim)
    generator = torch.Generator().manual_seed(9)

    def padded(features: Features, capacity: int) -> Features:
        extra = capacity - features.num_valid
        return Features(
            torch.cat((features.keypoints, 640 * torch.rand(extra, 2, generator=generator))),
            torch.ones(capacity),
            torch.cat((features.descriptors, torch.randn(extra, input_dim, generator=generator))),
            features.num_valid,
            features.image_size,
            features.kind,
        )

    wide = padded(pair[0], 200), padded(pair[1], 200)
    config = LightGlueConfig(precision="float32")
    expected, matches = (LightGlue(config, state_dict).match(*features) for features in (pair, wide))
    np.testing.assert_array_equal(matches.indices, expected.indices)
    np.testing.assert_allclose(matches.scores, expected.scores, atol=1e-5)

    network = build_network(state_dict, "test")
    masks = [torch.arange(200)[None] < f.num_valid for f in wide]
    with torch.inference_mode():
        static = network(
            *(f.descriptors[None] for f in wide),
            *(normalize_keypoints(f.keypoints, f.image_size)[None] for f in wide),
            *masks,
        )
    plain = plain_log_assignment(state_dict, *pair)[0, :-1, :-1]
    count0, count1 = plain.shape
    torch.testing.assert_close(static[0, :count0, :count1].exp(), plain.exp(), atol=1e-5, rtol=0)
    torch.testing.assert_close(static[0, :count0, :count1], plain, atol=1e-4, rtol=1e-5)
    assert torch.all(torch.isneginf(static[0, count0:-1, :-1])) and torch.all(torch.isneginf(static[0, :-1, count1:-1]))


def test_batch_equals_single_pairs() -> None:
    network = build_network(learned(kornia_network("128/2/6")), "test")
    pairs = [planted_pair(64, 100, 90, seed=1), planted_pair(64, 100, 90, seed=2)]
    masks0 = torch.arange(100)[None] < torch.tensor([[100], [70]])
    masks1 = torch.arange(90)[None] < torch.tensor([[60], [90]])

    def inputs(chosen: slice) -> list[Tensor]:
        sides = list(zip(*pairs[chosen], strict=True))
        descriptors = [torch.stack([f.descriptors for f in side]) for side in sides]
        return [*descriptors, *(torch.stack([coordinates(f) for f in side]) for side in sides)]

    with torch.inference_mode():
        both = network(*inputs(slice(0, 2)), masks0, masks1)
        for index in range(2):
            chosen = slice(index, index + 1)
            alone = network(*inputs(chosen), masks0[chosen], masks1[chosen])
            torch.testing.assert_close(both[chosen], alone, atol=1e-4, rtol=1e-5)


def test_an_image_without_points_stays_finite_in_a_batch() -> None:
    network = build_network(learned(kornia_network("128/2/6")), "test")
    features0, features1 = planted_pair(64, 40, 40)
    empty, full = torch.zeros(1, 40, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool)
    descriptors = features0.descriptors[None], features1.descriptors[None]
    positions = coordinates(features0)[None], coordinates(features1)[None]
    for mask0, mask1 in ((empty, full), (full, empty), (empty, empty)):
        log_assignment = network(*descriptors, *positions, mask0, mask1)
        assert not torch.isnan(log_assignment).any()
        assert torch.all(torch.isneginf(log_assignment[0, :-1, :-1]))


def test_gradients_reach_every_parameter_but_the_detached() -> None:
    network = build_network(learned(kornia_network("128/2/6")), "test").requires_grad_(True)
    features0, features1 = planted_pair(64, 30, 30)
    states = list(
        network.states(
            features0.descriptors[None],
            features1.descriptors[None],
            coordinates(features0)[None],
            coordinates(features1)[None],
        )
    )
    assignments = [head(*state, None, None) for head, state in zip(network.log_assignment, states, strict=True)]
    torch.stack([a.exp().sum() for a in assignments]).sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith("token_confidence")


def test_too_few_points() -> None:
    matcher = LightGlue(LightGlueConfig(precision="float32"), learned(kornia_network("128/2/6")))
    features0, features1 = planted_pair(64)

    def first(features: Features, count: int) -> Features:
        return Features(
            features.keypoints, features.scores, features.descriptors, count, features.image_size, features.kind
        )

    for count0, count1 in ((0, 0), (0, 5), (5, 0)):
        matches = matcher.match(first(features0, count0), first(features1, count1))
        assert (len(matches), matches.stop_layer) == (0, 0)
    for count0, count1 in ((1, 1), (1, 7), (7, 1)):
        assert len(matcher.match(first(features0, count0), first(features1, count1))) <= 1


def test_every_point_is_matched_once_even_among_twins() -> None:
    matcher = LightGlue(
        LightGlueConfig(preset="accurate", filter_threshold=0.0, precision="float32"),
        learned(kornia_network("128/2/6")),
    )
    features0, features1 = planted_pair(64, 40, 40)
    twins = torch.arange(40) // 2
    pair = [
        Features(f.keypoints[twins], f.scores, f.descriptors[twins], 40, f.image_size, f.kind)
        for f in (features0, features1)
    ]
    indices = matcher.match(*pair).indices
    assert len(indices) > 5
    assert len(np.unique(indices[:, 0])) == len(indices) == len(np.unique(indices[:, 1]))


def test_exchanging_the_images_exchanges_the_columns() -> None:
    matcher = LightGlue(LightGlueConfig(precision="float32"), learned(kornia_network("128/2/6")))
    features0, features1 = planted_pair(64)
    forth, back = matcher.match(features0, features1), matcher.match(features1, features0)
    order = np.argsort(back.indices[:, 1])
    np.testing.assert_array_equal(forth.indices, back.indices[order][:, ::-1])
    np.testing.assert_allclose(forth.scores, back.scores[order], atol=1e-5)
    assert (forth.stop_layer, forth.num_kept0, forth.num_kept1) == (back.stop_layer, back.num_kept1, back.num_kept0)


def test_what_is_remembered_of_a_frame_changes_nothing_and_keeps_nothing_alive() -> None:
    state_dict = learned(kornia_network("128/2/6"))
    config = LightGlueConfig(precision="float32")
    matcher = LightGlue(config, state_dict)
    frames = [planted_pair(64, seed=seed)[0] for seed in range(9)]
    for frame0, frame1 in itertools.pairwise(frames):
        matches, expected = matcher.match(frame0, frame1), LightGlue(config, state_dict).match(frame0, frame1)
        np.testing.assert_array_equal(matches.indices, expected.indices)
        np.testing.assert_array_equal(matches.scores, expected.scores)
    assert 2 <= len(matcher._recent) <= 4
    del frames[:], frame0, frame1
    gc.collect()
    assert all(reference() is None for reference, _ in matcher._recent)


def test_a_keyframe_in_use_stays_remembered() -> None:
    matcher = LightGlue(LightGlueConfig(precision="float32"), learned(kornia_network("128/2/6")))
    keyframe, *frames = (planted_pair(64, seed=seed)[0] for seed in range(7))
    matcher.match(keyframe, frames[0])
    remembered = next(encoded for reference, encoded in matcher._recent if reference() is keyframe)
    for frame0, frame1 in itertools.pairwise(frames):
        matcher.match(frame0, frame1)
        matcher.match(keyframe, frame1)
    assert any(encoded is remembered for _, encoded in matcher._recent)


def test_precision_is_named_and_bfloat16_keeps_the_matches() -> None:
    network = kornia_network("128/2/6")
    pair = planted_pair(64)
    exact = LightGlue(LightGlueConfig(precision="float32"), learned(network))
    assert exact.precision == "float32"
    assert LightGlue(LightGlueConfig(), learned(network)).precision in ("float32", "bfloat16")
    for confidence in (1.0, 0.8):
        reduced = matcher_like(network, confidence, confidence, "bfloat16")
        assert reduced.precision == "bfloat16"
        expected, matches = matcher_like(network, confidence, confidence).match(*pair), reduced.match(*pair)
        same = set(map(tuple, matches.indices)) & set(map(tuple, expected.indices))
        assert len(same) >= 0.97 * max(len(expected), len(matches)) > 20
        assert matches.stop_layer == expected.stop_layer


def test_loading_leaves_the_random_numbers_and_the_checkpoint_alone() -> None:
    state_dict = learned(kornia_network("96/1/6"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = build_network(state_dict, "test")
    assert torch.equal(torch.get_rng_state(), before)
    weight = network.input_proj.weight
    assert isinstance(weight, Tensor)
    weight.zero_()
    assert state_dict["input_proj.weight"].abs().sum() > 0


def test_is_a_matcher() -> None:
    assert isinstance(LightGlue(LightGlueConfig(), learned(kornia_network("96/1/6"))), Matcher)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_log_sum_exp_equals_torch(scale: float) -> None:
    x = scale * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for dim in (0, 1):
        torch.testing.assert_close(log_sum_exp(x, dim), torch.logsumexp(x, dim, keepdim=True), rtol=1e-6, atol=1e-5)
