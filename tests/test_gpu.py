"""What only a GPU shows. `python -m pytest -m gpu` runs these; elsewhere they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from frontends.accuracy_gate import agreement, find, find_in
from frontends.aliked import Aliked, AlikedConfig
from frontends.base import Extractor, Features
from frontends.engine import Engine, EngineConfig, create_engine
from frontends.graphs import EmulatedBackend
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_static import create_static
from frontends.static_extractor import StaticExtractor
from frontends.static_form import ExtractorChoice, arithmetic
from frontends.static_matcher import MatcherChoice, StaticMatcher
from frontends.tuning import compile_steps, synthetic_images
from frontends.weights import load_state_dict
from frontends.xfeat import XFeat, XFeatConfig
from vo.sources import open_source
from vo.types import SourceError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set"),
]
Image = NDArray[np.uint8]
METHODS = ("aliked-t16", "xfeat")


@pytest.fixture(scope="module")
def images() -> list[Image]:
    """Of the bundled clip; of an artificial scene where it is missing."""
    try:
        source = open_source("demo")
    except SourceError:
        return synthetic_images((480, 640, 3), 8)
    frames = [frame.image for frame in islice(source.frames(), 8)]
    source.close()
    return frames


def extractor_on(method: str, device: str, **changes: Any) -> Extractor:
    state_dict, _ = load_state_dict(method)
    if method == "xfeat":
        return XFeat(XFeatConfig(precision="float32", **changes), state_dict, device)
    return Aliked(AlikedConfig(**changes), state_dict, device)


def lightglue_on(method: str, device: str, **changes: Any) -> LightGlue:
    state_dict, _ = load_state_dict(f"lightglue-light-{method}")
    return LightGlue(LightGlueConfig(precision="float32", **changes), state_dict, device)


def engine(method: str, **settings: Any) -> Engine:
    """In float32 and as written, unless the settings say otherwise: what is compared is the way, not the rounding."""
    exact = {"extractor_precision": "float32", "matcher_precision": "float32", "compile": "off", "kernels": "torch"}
    config = EngineConfig(**{"graphs": "on", "depth": "whole", "width": "full", **exact, **settings})
    made = create_engine(config, extractor_on(method, "cuda"), lightglue_on(method, "cuda"), torch.device("cuda", 0))
    made.warm_up(640, 480)
    assert isinstance(made.extractor, StaticExtractor) and isinstance(made.matcher, StaticMatcher)
    return made


@pytest.fixture(scope="module", params=METHODS)
def running(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    yield request.param, engine(request.param)


def test_graphs_on_the_gpu_find_what_the_cpu_finds_in_float32(running: tuple[str, Engine], images: list[Image]):
    method, made = running
    reference = find(extractor_on(method, "cpu"), lightglue_on(method, "cpu"), images[:4])
    found = agreement(reference, find(made.extractor, made.matcher, images[:4]))
    assert found.passes, str(found)


def test_a_graph_finds_what_the_same_functions_find_one_by_one(running: tuple[str, Engine], images: list[Image]):
    _, made = running
    form = made.extractor.form  # type: ignore[attr-defined]
    eager = StaticExtractor(form, EmulatedBackend(torch.device("cuda", 0), is_checked=False))
    for image in images[:3]:
        with arithmetic("float32"):  # a graph has it in itself
            mine, theirs = made.extractor.extract(image), eager.extract(image)
        torch.cuda.synchronize()
        assert mine.num_valid == int(theirs.memory.slot.row[0])  # type: ignore[union-attr]
        torch.testing.assert_close(mine.keypoints, theirs.keypoints, atol=2e-3, rtol=0)
        torch.testing.assert_close(mine.descriptors, theirs.descriptors, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "choice",
    [
        MatcherChoice(depth="blocks"),
        MatcherChoice(depth="blocks", layers_per_block=1, has_buckets=True),
        MatcherChoice(depth="speculative", has_buckets=True),
    ],
    ids=lambda choice: f"{choice.depth}-{choice.has_buckets}",
)
def test_every_depth_gives_the_matches_of_the_matcher_as_it_is(choice: MatcherChoice, images: list[Image]):
    made = engine("aliked-t16")
    matcher, eager = made.matcher, lightglue_on("aliked-t16", "cuda")
    assert isinstance(matcher, StaticMatcher)
    features = [made.extractor.extract(image) for image in images]
    reference = find_in(features, eager.match)
    for way in (MatcherChoice(), choice):
        matcher.use(way)
        assert agreement(reference, find_in(features, matcher.match)).matches > 0.999
        for first, second in ((0, 1), (0, 7), (3, 5)):
            found, expected = (
                matcher.match(features[first], features[second]),
                eager.match(features[first], features[second]),
            )
            assert found.stop_layer == expected.stop_layer


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_lower_precisions_of_the_matcher(precision: str, images: list[Image]):
    made = engine("aliked-t16", matcher_precision=precision)
    features = [made.extractor.extract(image) for image in images]
    found = agreement(
        find_in(features, lightglue_on("aliked-t16", "cuda").match), find_in(features, made.matcher.match)
    )
    # What the gate would refuse is no fault of the engine; what is far below is.
    assert found.matches > 0.95, str(found)


def test_compiled_layers_inside_graphs(images: list[Image]):
    made = engine("aliked-t16")
    matcher = made.matcher
    assert isinstance(matcher, StaticMatcher)
    features = [made.extractor.extract(image) for image in images]
    reference = find_in(features, matcher.match)
    network = create_static(matcher.eager, matcher.layout, "float32")
    compile_steps(network, 120.0)
    matcher.use(MatcherChoice(is_compiled=True), network)
    assert agreement(reference, find_in(features, matcher.match)).matches > 0.999


def test_our_kernels_inside_graphs(images: list[Image]):
    pytest.importorskip("triton")
    made = engine("aliked-t16")
    extractor = made.extractor
    assert isinstance(extractor, StaticExtractor)
    reference = find(extractor, made.matcher, images[:4])
    extractor.use(ExtractorChoice(kernels="triton"))
    found = agreement(reference, find(extractor, made.matcher, images[:4]))
    assert found.keypoints > 0.995 and found.matches > 0.99, str(found)


def frames_through(made: Engine, images: list[Image], count: int) -> None:
    previous: Features | None = None
    for number in range(count):
        features = made.extractor.extract(images[number % len(images)])
        if previous is not None:
            made.matcher.match(previous, features)
        features.valid_keypoints()
        previous = features


def test_nothing_is_allocated_after_the_warm_up(running: tuple[str, Engine], images: list[Image]):
    _, made = running
    frames_through(made, images, 20)
    before = torch.cuda.memory_stats()
    frames_through(made, images, 200)
    after = torch.cuda.memory_stats()
    for counter in ("allocation.all.allocated", "num_device_alloc", "reserved_bytes.all.current"):
        assert after[counter] == before[counter], counter


def test_nothing_in_the_hot_path_synchronises(running: tuple[str, Engine], images: list[Image]):
    _, made = running
    frames_through(made, images, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        frames_through(made, images, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_extraction_does_not_wait(running: tuple[str, Engine], images: list[Image]):
    """Features are given away before the device has computed them."""
    _, made = running
    frames_through(made, images, 5)
    torch.cuda.synchronize()
    # About 20 ms of work on the stream of the networks, so that what comes behind it cannot be done yet.
    with made.extractor.lane:  # type: ignore[attr-defined]
        torch.cuda._sleep(40_000_000)
    features = made.extractor.extract(images[0])
    assert not features.memory.slot.ready.is_done()  # type: ignore[union-attr]
    assert features.num_valid > 0


def test_many_frames_leave_the_memory_as_it_is(images: list[Image]):
    made = engine("xfeat")
    frames_through(made, images, 100)
    before = torch.cuda.memory_reserved()
    frames_through(made, images, 2000)
    assert torch.cuda.memory_reserved() == before


def test_ways_can_be_dropped_and_taken_up_again(images: list[Image]):
    """The graphs of the old way go before those of the new one are captured: their pool has to outlive them."""
    made = engine("aliked-t16")
    extractor, matcher = made.extractor, made.matcher
    assert isinstance(extractor, StaticExtractor) and isinstance(matcher, StaticMatcher)
    reference = find(extractor, matcher, images[:3])
    for _ in range(3):
        extractor.use(ExtractorChoice("tf32"))
        extractor.extract(images[0])
        matcher.use(MatcherChoice(depth="blocks", has_buckets=True))
        matcher.prepare()
        extractor.use(ExtractorChoice())
        matcher.use(MatcherChoice())
        assert agreement(reference, find(extractor, matcher, images[:3])).passes


def test_everything_is_measured_and_said():
    made = create_engine(
        EngineConfig(), extractor_on("aliked-t16", "cuda"), lightglue_on("aliked-t16", "cuda"), torch.device("cuda", 0)
    )
    made.warm_up(640, 480)
    assert not made.fallbacks
    said = " | ".join(made.choices)
    assert all(what in said for what in ("precision", "convolutions", "kernels", "compilation", "depth")), said


def test_an_image_of_another_size_is_prepared_for_when_it_comes(images: list[Image]):
    made = engine("aliked-t16")
    gray = np.ascontiguousarray(images[0][:376, :620, 0])
    features = made.extractor.extract(gray)
    assert features.image_size == (620, 376) and features.num_valid > 100
    expected = extractor_on("aliked-t16", "cuda").extract(gray)
    assert abs(expected.num_valid - features.num_valid) <= 2
