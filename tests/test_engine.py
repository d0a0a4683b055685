"""The engine: what it promises to its users, on any device."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_aliked import random_network

from frontends.accuracy_gate import Agreement, Found, agreement, find_in
from frontends.aliked import Aliked, AlikedConfig
from frontends.aliked_static import AlikedStatic
from frontends.base import DeviceError, Extractor, Features, Matcher
from frontends.compiled_before import keep_compiled_code, note_compiled, was_compiled
from frontends.engine import Engine, EngineConfig, create_engine
from frontends.feature_pool import RowLayout
from frontends.graphs import EmulatedBackend, GraphError
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.nearest import Nearest
from frontends.orb import Orb, OrbConfig
from frontends.static_extractor import StaticExtractor
from frontends.static_matcher import MatcherChoice, StaticMatcher
from frontends.tuning import (
    MIN_KERNEL_GAIN,
    Trial,
    TuningOptions,
    fastest,
    synthetic_images,
    tune_extractor,
    tune_matcher,
)
from frontends.weights import load_state_dict
from vo.config_loader import load_config
from vo.frontend import create_frontend, warmed_up
from vo.pipeline import run
from vo.sources import open_source
from vo.stages import FrameResult
from vo.types import SourceError

CPU = torch.device("cpu")


class LentMemory:
    """Memory whose keypoints become known when they are first asked for."""

    def __init__(self, keypoints: NDArray[np.float32], count: int) -> None:
        self.keypoints, self.count, self.num_waits = keypoints, count, 0

    def num_valid(self) -> int:
        self.num_waits += 1
        return self.count

    def host_keypoints(self) -> NDArray[np.float32]:
        return self.keypoints.copy()


def pending_features(count: int = 3) -> tuple[Features, LentMemory]:
    keypoints = np.arange(10, dtype=np.float32).reshape(5, 2)
    memory = LentMemory(keypoints, count)
    tensors = torch.zeros(5, 2), torch.zeros(5), torch.zeros(5, 64)
    return Features.pending(*tensors, memory, (64, 48), "planted"), memory


def test_pending_features_wait_when_they_are_counted_and_only_once():
    features, memory = pending_features()
    assert features.descriptors.shape == (5, 64) and memory.num_waits == 0
    assert features.num_valid == 3 and features.num_valid == 3
    assert memory.num_waits == 1
    np.testing.assert_array_equal(features.valid_keypoints(), memory.keypoints[:3])


def test_a_copy_of_pending_features_holds_the_memory():
    features, memory = pending_features()
    copy = replace(features)
    assert copy.memory is memory and copy.num_valid == 3
    assert len(replace(features, num_valid=1).valid_keypoints()) == 1
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = features.colour  # type: ignore[attr-defined]


# An emulated engine


def small_aliked(**changes: Any) -> Aliked:
    config = AlikedConfig(**{"max_keypoints": 64, **changes})
    return Aliked(config, random_network("t16").state_dict())


def small_lightglue() -> LightGlue:
    state_dict, file = load_state_dict("lightglue-light-aliked-t16")
    return LightGlue(LightGlueConfig(precision="float32"), state_dict, name=file.name, fits=("aliked-t16",))


def engine_of(extractor: Extractor, matcher: Matcher, **settings: Any) -> Engine:
    config = EngineConfig(**{"graphs": "emulated", **settings})
    return create_engine(config, extractor, matcher, torch.device("cpu"))


def moving_images(count: int, size: tuple[int, int] = (64, 96)) -> list[NDArray[np.uint8]]:
    return synthetic_images((*size, 3), count)


def test_the_engine_finds_and_matches_what_the_methods_do():
    extractor, matcher = small_aliked(), small_lightglue()
    engine = engine_of(extractor, matcher)
    engine.warm_up(96, 64)
    assert engine.is_static and not engine.fallbacks
    previous = None
    for image in moving_images(3):
        found, expected = engine.extractor.extract(image), extractor.extract(image)
        assert found.num_valid == expected.num_valid
        if previous is not None:
            mine, plain = engine.matcher.match(previous[0], found), matcher.match(previous[1], expected)
            np.testing.assert_array_equal(mine.indices, plain.indices)
            assert mine.stop_layer == plain.stop_layer
        previous = found, expected


def test_features_keep_their_values_while_somebody_holds_them_and_no_longer():
    extractor = StaticExtractor(AlikedStatic(small_aliked()), EmulatedBackend(torch.device("cpu")))
    images = moving_images(3)
    held = extractor.extract(images[0])
    before = held.keypoints.clone(), held.descriptors.clone(), held.valid_keypoints()
    for number in range(extractor.pool.num_slots + 3):
        extractor.extract(images[number % 3])
    assert extractor.pool.num_slots == 16
    for now, then in zip((held.keypoints, held.descriptors, held.valid_keypoints()), before, strict=True):
        np.testing.assert_array_equal(now, then)
    kept = [extractor.extract(images[0]) for _ in range(20)]
    assert extractor.pool.num_slots == 32
    del kept, held
    gc.collect()
    assert len(extractor.pool._free) == 32


@pytest.mark.parametrize("broken", ["upload", "extract", "match"])
def test_a_lane_that_does_not_wait_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(small_aliked(), small_lightglue())
    extractor, matcher = engine.extractor, engine.matcher
    assert isinstance(extractor, StaticExtractor) and isinstance(matcher, StaticMatcher)
    lane = {"upload": extractor._upload_lane, "extract": extractor.lane, "match": matcher.lane}[broken]
    monkeypatch.setattr(lane, "after", lambda mark: None)
    images = moving_images(3)

    def run() -> None:
        features = None
        for number in range(20):
            following = extractor.extract(images[number % 3])
            if features is not None and broken != "upload":
                # Waiting for matches would also order the uploads.
                matcher.match(features, following)
            features = following

    with pytest.raises(GraphError, match=f"lane {broken}"):
        run()


def test_threads_may_match_while_another_extracts():
    extractor, matcher = small_aliked(), small_lightglue()
    engine = engine_of(extractor, matcher)
    images = moving_images(3)
    expected = matcher.match(*(extractor.extract(image) for image in images[:2])).indices
    pair = [engine.extractor.extract(image) for image in images[:2]]
    with ThreadPoolExecutor(3) as threads:
        matched = [threads.submit(engine.matcher.match, *pair) for _ in range(4)]
        extracted = [threads.submit(engine.extractor.extract, images[2]) for _ in range(2)]
        for found in matched:
            np.testing.assert_array_equal(found.result().indices, expected)
        assert len({each.result().num_valid for each in extracted}) == 1


def test_features_of_other_extractors_can_be_matched():
    extractor, matcher = small_aliked(), small_lightglue()
    engine = engine_of(extractor, matcher)
    first, second = moving_images(3)[:2]
    expected = matcher.match(extractor.extract(first), extractor.extract(second))
    mixed = engine.matcher.match(extractor.extract(first), engine.extractor.extract(second))
    np.testing.assert_array_equal(mixed.indices, expected.indices)
    emptied = replace(engine.extractor.extract(first), num_valid=0)
    assert len(engine.matcher.match(emptied, engine.extractor.extract(second))) == 0


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64), np.float32), np.zeros(5, np.uint8)]
)
def test_what_is_no_image_is_refused(image: NDArray[Any]):
    with pytest.raises(ValueError, match="image: expected"):
        engine_of(small_aliked(), small_lightglue()).extractor.extract(image)


def test_methods_without_a_static_form_run_as_they_are():
    orb, nearest = Orb(OrbConfig()), Nearest()
    engine = engine_of(orb, nearest)
    engine.warm_up(96, 64)
    assert engine.extractor is orb and engine.matcher is nearest and not engine.is_static
    assert create_engine(EngineConfig(), small_aliked(), nearest, torch.device("cpu")).is_static is False


class FailingBackend(EmulatedBackend):
    """A device on which no graph can be captured."""

    def capture(self, *arguments: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be")


@pytest.mark.parametrize("graphs", ["auto", "on"])
def test_graphs_that_cannot_be_captured(graphs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr("frontends.engine.create_backend", lambda graphs, device: FailingBackend(device))
    extractor, matcher = small_aliked(), small_lightglue()
    engine = engine_of(extractor, matcher, graphs=graphs)
    if graphs == "on":
        with pytest.raises(DeviceError, match=r"^frontend.engine.graphs: the networks could not be captured"):
            engine.warm_up(96, 64)
        return
    engine.warm_up(96, 64)
    assert engine.extractor is extractor and engine.matcher is matcher
    assert len(engine.fallbacks) == 1 and "not permitted when stream is capturing" in engine.fallbacks[0]
    assert engine.fallbacks[0] in caplog.text


@pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set")
def test_a_run_with_threads_takes_the_same_path_whatever_runs_the_networks():
    overrides = ["frontend.extractor.max_keypoints=192", "frontend.extractor.max_side=200", "publisher.endpoint=off"]
    paths = []
    for graphs in ("off", "emulated"):
        config = load_config(
            None, [*overrides, f"frontend.engine.graphs={graphs}", "frontend.matcher.precision=float32"]
        )
        source = open_source("demo")
        frontend = warmed_up(create_frontend(config.frontend, CPU), CPU, source.camera)
        assert frontend.engine is not None and frontend.engine.is_static == (graphs == "emulated")
        results: list[FrameResult] = []
        run(config, source, frontend, [results.append], threaded=True, max_frames=12)
        paths.append([(each.step.pose.status, each.step.pose.num_matches) for each in results])
    assert len(paths[0]) == 12 and paths[0] == paths[1]


# Choosing


class SteppingClock:
    """A clock that goes on by what the way in use is said to take, s."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self.now, self._seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self._seconds()
        return self.now


def tuned_matcher(options: TuningOptions, seconds: Callable[[StaticMatcher], float]) -> tuple[StaticMatcher, list[str]]:
    extractor, eager = small_aliked(), small_lightglue()
    matcher = StaticMatcher(eager, RowLayout(64, 64), EmulatedBackend(torch.device("cpu")))
    features = [extractor.extract(image) for image in moving_images(3)]
    return matcher, tune_matcher(matcher, features, options, SteppingClock(lambda: seconds(matcher)))


def test_the_fastest_depth_stays_and_is_said():
    times = {"whole": 3e-3, "blocks": 1e-3, "speculative": 2e-3}
    options = TuningOptions(("float32",), depths=tuple(times), widths=("full", "buckets"), num_repeats=1)
    matcher, sentences = tuned_matcher(options, lambda matcher: times[matcher.choice.depth])
    assert matcher.choice.depth == "blocks" and not matcher.choice.has_buckets
    assert sentences == [
        "lightglue depth: blocks (whole 3.00 ms; blocks 1.00 ms; blocks, buckets 1.00 ms; "
        "speculative 2.00 ms; speculative, buckets 2.00 ms)"
    ]


def test_a_precision_that_moves_matches_is_refused_however_fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("frontends.tuning.agreement", lambda reference, found: Agreement(1.0, 0.985))
    options = TuningOptions(("float32", "bfloat16"), num_repeats=1)
    matcher, sentences = tuned_matcher(options, lambda matcher: 1e-3 if matcher.choice.precision == "bfloat16" else 1.0)
    assert matcher.choice.precision == "float32"
    assert "bfloat16 1.00 ms, refused: 100.00% of the keypoints, 98.50% of the matches" in sentences[0]


def test_a_compiler_that_fails_is_done_without(compiled_code: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    options = TuningOptions(("float32",), compiles=True, num_repeats=1)
    matcher, sentences = tuned_matcher(options, lambda matcher: 1e-3)
    assert not matcher.choice.is_compiled
    assert sentences == [
        "lightglue compilation: failed (RuntimeError: InvalidCxxCompiler: no C++ compiler), runs as written"
    ]


def test_buffers_that_may_be_in_use_are_waited_for(monkeypatch: pytest.MonkeyPatch):
    """A block that was launched ahead writes into its buffers after the match has been given away."""
    engine = engine_of(small_aliked(), small_lightglue())
    extractor, matcher = engine.extractor, engine.matcher
    assert isinstance(extractor, StaticExtractor) and isinstance(matcher, StaticMatcher)
    features = [extractor.extract(image) for image in moving_images(2)]
    matcher.match(*features)
    waited: list[tuple[object, bool]] = []
    monkeypatch.setattr(
        "frontends.static_matcher.wait_for", lambda lane, _: waited.append((lane, matcher._captured is not None))
    )
    monkeypatch.setattr(
        "frontends.static_extractor.wait_for", lambda lane, _: waited.append((lane, bool(extractor._prepared)))
    )
    matcher.use(MatcherChoice(depth="speculative"))
    assert waited == [(matcher.lane, True)] and matcher._captured is None
    extractor.use(replace(extractor.choice, convolutions="planar"))
    assert waited[1:] == [(extractor._upload_lane, True), (extractor.lane, True)] and not extractor._prepared


@pytest.fixture
def compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_start_compiles_only_what_an_earlier_one_has_left_in_the_cache(
    compiled_code: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    here = TuningOptions(("float32",), compiles=True, only_from_cache=True, num_repeats=1)

    def seconds(matcher: StaticMatcher) -> float:
        return 0.1 if matcher.choice.is_compiled else 0.2

    matcher, sentences = tuned_matcher(here, seconds)
    assert not matcher.choice.is_compiled and "hold up this start" in sentences[0]
    tuned_matcher(replace(here, only_from_cache=False), seconds)
    matcher, sentences = tuned_matcher(here, seconds)
    assert matcher.choice.is_compiled and sentences[0].startswith("lightglue compilation: compiled")
    # Other layers, another device or PyTorch: other code.
    assert not was_compiled("something else")
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert not tuned_matcher(here, seconds)[0].choice.is_compiled


def test_compiled_code_outlives_the_folders_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled_code() == tmp_path / "lightvo" / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "lightvo" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "folder"))
    (tmp_path / "file").write_text("no folder")
    note_compiled("anything", took_s=1.0)
    assert not was_compiled("anything")


def test_compiled_layers_are_not_compiled_again_for_every_bucket(compiled_code: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    options = TuningOptions(("float32",), depths=("whole", "blocks"), widths=("full", "buckets"), num_repeats=1)
    _, sentences = tuned_matcher(
        replace(options, compiles=True), lambda matcher: 0.1 if matcher.choice.is_compiled else 0.2
    )
    assert "compilation: compiled" in sentences[0] and "buckets" not in sentences[1]


def test_what_is_compiled_stays_where_it_is_faster(compiled_code: Path, monkeypatch: pytest.MonkeyPatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__name__) or function)
    options = TuningOptions(("float32",), compiles=True, compile_budget_s=1.0, num_repeats=1)
    matcher, _ = tuned_matcher(options, lambda matcher: 0.1 if matcher.choice.is_compiled else 0.2)
    assert matcher.choice.is_compiled and compiled == ["advance", "assign"]
    compiled.clear()
    tuned_matcher(replace(options, compile_budget_s=0.0), lambda matcher: 0.1)
    assert compiled == ["advance"]


def test_extractors_are_tuned_too(monkeypatch: pytest.MonkeyPatch):
    extractor = StaticExtractor(AlikedStatic(small_aliked()), EmulatedBackend(torch.device("cpu")))
    clock = SteppingClock(lambda: 1e-3 if extractor.choice.precision == "tf32" else 2e-3)
    options = TuningOptions(("float32", "tf32"), num_repeats=1)
    sentences = tune_extractor(extractor, Nearest(), moving_images(3), options, clock)
    assert extractor.choice.precision == "tf32"
    assert sentences == ["aliked-t16 precision: tf32 (float32 2.00 ms; tf32 1.00 ms)"]


def test_an_extractor_that_cannot_be_compiled_runs_as_written(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Unsupported: a context manager\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    extractor = StaticExtractor(AlikedStatic(small_aliked()), EmulatedBackend(CPU))
    options = TuningOptions(("float32",), compiles=True, num_repeats=1)
    images = moving_images(3)
    sentences = tune_extractor(extractor, Nearest(), images, options, SteppingClock(lambda: 1e-3))
    assert sentences == [
        "aliked-t16 compilation: failed (RuntimeError: Unsupported: a context manager), runs as written"
    ]
    assert extractor.extract(images[0]).num_valid > 0


def test_the_images_at_hand_are_prepared_for():
    engine = engine_of(small_aliked(), small_lightglue())
    engine.warm_up(640, 480, 3, [image[:, :, 0] for image in moving_images(3)])
    assert isinstance(engine.extractor, StaticExtractor) and list(engine.extractor._prepared) == [(64, 96)]


def test_a_kernel_of_our_own_has_to_be_worth_it():
    plain, slightly, clearly = Trial("torch", 1.3), Trial("triton", 1.01), Trial("triton", 0.99)
    assert fastest([plain, slightly], MIN_KERNEL_GAIN) is plain
    assert fastest([plain, clearly], MIN_KERNEL_GAIN) is clearly


# The accuracy gate


def test_agreement_counts_what_comes_again_within_the_tolerance():
    points = np.arange(200, dtype=np.float32).reshape(100, 2) * 10
    moved = points.copy()
    moved[:3] += 0.06
    reference = Found((points,), (np.hstack((points, points)),))
    found = agreement(reference, Found((moved[::-1],), (np.hstack((points, moved)),)))
    assert found == Agreement(0.97, 0.97) and not found.passes
    assert agreement(reference, reference).passes
    nothing = Found((points[:0],), (np.zeros((0, 4), np.float32),))
    assert agreement(nothing, nothing).passes and not agreement(reference, nothing).passes


def test_lightglue_in_bfloat16_against_float32_on_the_clip():
    """It passes on real frames; descriptors of two bits do not."""
    images = clip_images(4)
    if images is None or "LIGHTVO_WEIGHTS" not in os.environ:
        pytest.skip("the clip or LIGHTVO_WEIGHTS is missing")
    aliked = Aliked(AlikedConfig(max_keypoints=256), load_state_dict("aliked-t16")[0])
    features = [aliked.extract(image) for image in images]
    state_dict, _ = load_state_dict("lightglue-light-aliked-t16")
    exact, rounded = (
        LightGlue(LightGlueConfig(precision=name, preset="accurate"), state_dict) for name in ("float32", "bfloat16")
    )
    reference = find_in(features, exact.match)
    found = agreement(reference, find_in(features, rounded.match))
    assert found.keypoints == 1.0 and found.passes
    coarse = [replace(each, descriptors=torch.sign(each.descriptors) / 8) for each in features]
    assert not agreement(reference, find_in(coarse, exact.match)).passes


def clip_images(count: int) -> list[NDArray[np.uint8]] | None:
    try:
        source = open_source("demo")
    except SourceError:
        return None
    try:
        return [frame.image for frame in islice(source.frames(), count)]
    finally:
        source.close()
