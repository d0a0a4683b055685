"""Benchmarks: are the statistics right, are the calls fair, do the peers compute what ours does, is the page honest."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from scipy.stats import binom
from synthetic_drive import STEP_M, write_drive

import vo.bench_machine
import vo.sources.manifest
from frontends.aliked import AlikedConfig
from frontends.base import Features, Matches
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_network import LightGlueArchitecture, LightGlueNetwork
from frontends.nearest import Nearest, NearestConfig
from frontends.orb import Orb, OrbConfig
from frontends.xfeat import XFeatConfig
from vo.bench import BenchRequest, command_line, precision_of, read_frames
from vo.bench_compare import Conditions, compare, same_matches, same_places
from vo.bench_machine import CpuWatch, parse_cpu_times, parse_cpuinfo, parse_meminfo, portable_source, read_machine
from vo.bench_peers import (
    KorniaExtractor,
    KorniaLightGlue,
    KorniaNearest,
    NotComparable,
    OpenCvExtractor,
    OpenCvMatcher,
    Peer,
    create_peer,
)
from vo.bench_statistics import Ratio, bootstrap_interval, ratio, time_call, time_in_turn, timing
from vo.cli import build_parser, main
from vo.config import FrontendConfig, TwoViewConfig
from vo.config_loader import load_config
from vo.frontend import Frontend
from vo.sources import open_source
from vo.types import ConfigError, Frame, SourceError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import benchmark_tables  # noqa: E402
import matching_metrics  # noqa: E402
import matching_quality  # noqa: E402
import run_benchmarks  # noqa: E402
import write_benchmarks  # noqa: E402

CPU = torch.device("cpu")
ORB_CONFIG = FrontendConfig(extractor=OrbConfig(max_keypoints=200), matcher=NearestConfig())
ORB_FRONTEND = Frontend(Orb(OrbConfig(max_keypoints=200)), Nearest(), "orb + nearest", "cpu")


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), 8)


@pytest.fixture(scope="module")
def frames(drive: Path) -> list[Frame]:
    return list(open_source(f"kitti:{drive}").frames())


# --- statistics -----------------------------------------------------------------------------------------------------


def test_timing_gives_percentiles() -> None:
    found = timing([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (found.num_calls, found.median_ms, found.min_ms, found.max_ms) == (5, 3.0, 1.0, 100.0)
    assert found.p95_ms == pytest.approx(4 + 0.8 * 96)
    assert found.p99_ms == pytest.approx(4 + 0.96 * 96)


def test_ratio_is_taken_pair_by_pair() -> None:
    # The ratio of the medians would be 2; a disturbance that hits both calls of a pair must not count.
    found = ratio([1.0, 10.0, 3.0], [4.0, 20.0, 6.0])
    assert (found.num_pairs, found.median, found.min, found.max) == (3, 2.0, 2.0, 4.0)
    assert ratio([1.0], [3.0]) == Ratio(1, 3.0, 3.0, 3.0, 3.0, 3.0)


@pytest.mark.parametrize("times", [([], []), ([1.0], [1.0, 2.0])])
def test_ratio_wants_as_many_times_of_both(times: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="as many times"):
        ratio(*times)
    with pytest.raises(ValueError, match="at least one"):
        timing([])


def test_interval_is_the_bootstrap_distribution_of_the_median() -> None:
    """For an odd number of values that distribution is known: the median of a resample is at most the k-th value when
    more than half of the draws are."""
    values = np.array([1.3, 1.1, 1.9, 1.2, 1.7, 2.4, 1.5, 1.6, 3.0, 1.4, 1.45, 2.2, 1.05])
    num = len(values)
    cumulative = [1 - binom.cdf(num // 2, num, k / num) for k in range(1, num + 1)]
    exact = [float(np.sort(values)[np.searchsorted(cumulative, quantile)]) for quantile in (0.05, 0.95)]
    found = ratio([1.0] * num, values.tolist())
    assert [found.low, found.high] == exact


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_interval_holds_the_median_and_repeats(ours: list[float], seed: int) -> None:
    theirs = np.random.default_rng(seed).uniform(0.1, 10.0, len(ours)).tolist()
    found = ratio(ours, theirs)
    assert found.min <= found.low <= found.high <= found.max
    assert found.min <= found.median <= found.max
    assert found == ratio(ours, theirs)


def test_interval_takes_any_statistic_of_rows() -> None:
    pairs = np.array([[1.0, 2.0], [10.0, 20.0], [5.0, 10.0]])
    low, high = bootstrap_interval(pairs, lambda r: r.sum(axis=1)[:, 1] / r.sum(axis=1)[:, 0])
    assert low == high == 2.0


def test_calls_are_made_in_turn_and_nothing_else_is_timed() -> None:
    order: list[str] = []

    def calls() -> Iterator[tuple[Any, Any]]:
        for _ in range(3):
            time.sleep(0.02)
            order.append("draw")
            yield (lambda: order.append("ours")), (lambda: (time.sleep(0.01), order.append("theirs")))

    ours_ms, theirs_ms = time_in_turn(calls(), CPU)
    assert order == ["draw", "ours", "theirs"] * 3
    assert len(ours_ms) == len(theirs_ms) == 3
    assert min(theirs_ms) >= 10 and min(ours_ms) < 10


def test_cuda_calls_are_timed_by_events_between_synchronisations(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = "start" if "made start" not in order else "end"
            order.append(f"made {self.name}")

        def record(self, stream: object) -> None:
            order.append(f"{self.name} on {stream}")

        def synchronize(self) -> None:
            order.append(f"wait for {self.name}")

        def elapsed_time(self, end: FakeEvent) -> float:
            assert (self.name, end.name) == ("start", "end")
            return 4.5

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    assert time_call(lambda: order.append("call"), torch.device("cuda")) == 4.5
    expected = ["synchronize", "start on stream", "call", "synchronize", "end on stream", "wait for end"]
    assert order == ["made start", "made end", *expected]


# --- the machine ----------------------------------------------------------------------------------------------------


def test_machine_is_read_from_the_system() -> None:
    lines = ["processor : 0", "model name\t: Some CPU @ 2 GHz", "flags : fpu avx2 amx_bf16 sse", "model name : other"]
    assert parse_cpuinfo(lines) == ("Some CPU @ 2 GHz", ("avx2", "amx_bf16"))
    assert parse_cpuinfo([]) == ("", ())
    assert parse_meminfo(["MemFree: 1 kB", "MemTotal:       2048 kB"]) == 2048 * 1024
    assert parse_meminfo([]) is None
    machine = read_machine(num_threads=3)
    assert machine.cpu and machine.num_cores >= 1 and machine.num_threads == 3 and machine.gpu is None


def test_work_of_others_is_what_is_neither_idle_nor_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    line = f"cpu  {2 * ticks} 0 {ticks} {5 * ticks} {ticks} 0 {ticks} 0 9999 0"
    assert parse_cpu_times(["intr 1", line]) == (4.0, 10.0)
    assert parse_cpu_times([]) == (0.0, 0.0)
    readings = iter([(10.0, 100.0), (14.0, 110.0)])
    own = iter([7.0, 8.0])
    monkeypatch.setattr(vo.bench_machine, "parse_cpu_times", lambda lines: next(readings))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    # 4 s of 10 s were busy, 1 s of them by this process.
    assert CpuWatch().others_share() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kitti:/data/kitti/sequences/00", "kitti:sequences/00"),
        ("kitti:../shared/sequences/00/", "kitti:sequences/00"),
        ("/home/me/clips/a.mp4", "clips/a.mp4"),
        ("~/a.mp4", "a.mp4"),
        ("demo", "demo"),
        ("webcam:0", "webcam:0"),
        ("rtsp://camera/stream/1", "rtsp://camera/stream/1"),
        ("/odd:name/x/y", "x/y"),
    ],
)
def test_sources_lose_the_path_of_this_machine(name: str, expected: str) -> None:
    assert portable_source(name) == expected


# --- peers ----------------------------------------------------------------------------------------------------------


def random_features(seed: int, dim: int = 64, count: int = 80, capacity: int = 96) -> Features:
    generator = torch.Generator().manual_seed(seed)
    keypoints = torch.rand(capacity, 2, generator=generator) * torch.tensor([319.0, 239.0])
    descriptors = torch.nn.functional.normalize(torch.randn(capacity, dim, generator=generator), dim=1)
    return Features(keypoints, torch.ones(capacity), descriptors, count, (320, 240), "random")


def shifted(features: Features, noise: float) -> Features:
    """The same points a little elsewhere, in another order."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(features.num_valid, generator=generator)
    order = torch.cat((order, torch.arange(features.num_valid, len(features.keypoints))))
    noisy = features.descriptors + noise * torch.randn(features.descriptors.shape, generator=generator)
    descriptors = torch.nn.functional.normalize(noisy, dim=1)[order]
    return replace(features, keypoints=(features.keypoints + 0.5).clamp(max=230)[order], descriptors=descriptors)


def test_unknown_peer_is_refused() -> None:
    with pytest.raises(ConfigError, match="'hloc' is not known; choose from kornia, orb, opencv"):
        create_peer("hloc", ORB_CONFIG, ORB_FRONTEND, CPU)


def test_peer_that_is_not_installed_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.feature", None)
    with pytest.raises(NotComparable, match=r"^kornia: not installed .*pip install kornia$"):
        create_peer("kornia", FrontendConfig(), ORB_FRONTEND, CPU)


def test_peer_without_such_methods_is_a_line() -> None:
    with pytest.raises(NotComparable, match=r"kornia: has no ORB; kornia: its mutual nearest .* no binary descriptors"):
        create_peer("kornia", ORB_CONFIG, ORB_FRONTEND, CPU)
    aliked = FrontendConfig(extractor=AlikedConfig(), matcher=NearestConfig(max_ratio=0.8))
    with pytest.raises(NotComparable, match="no ratio test"):
        KorniaNearest(aliked.matcher, pytest.importorskip("kornia.feature"))  # type: ignore[arg-type]


def test_opencv_networks_need_files_that_it_can_read(tmp_path: Path) -> None:
    with pytest.raises(NotComparable, match="opencv: its networks come without weights; give --opencv-models"):
        create_peer("opencv", ORB_CONFIG, ORB_FRONTEND, CPU)
    bogus = tmp_path / "bogus.onnx"
    bogus.write_bytes(b"not a model")
    with pytest.raises(NotComparable, match=r"bogus\.onnx cannot be used: .*"):
        create_peer("opencv", ORB_CONFIG, ORB_FRONTEND, CPU, (str(bogus),))


def test_orb_peer_is_opencv_as_it_is(frames: list[Frame]) -> None:
    peer = create_peer("orb", ORB_CONFIG, ORB_FRONTEND, CPU)
    assert peer.extractor is not None and peer.matcher is not None and not peer.is_same_network
    found = [peer.extractor.extract(frame.image) for frame in frames[:2]]
    detector = cv2.ORB.create(nfeatures=200)
    references = [detector.detectAndCompute(frame.image, None) for frame in frames[:2]]
    for features, (corners, descriptors) in zip(found, references, strict=True):
        assert 100 < features.num_valid <= 200
        assert features.image_size == (frames[0].camera.width, frames[0].camera.height)
        if len(corners) <= 200:
            np.testing.assert_array_equal(features.valid_keypoints(), [corner.pt for corner in corners])
            np.testing.assert_array_equal(features.descriptors.numpy(), descriptors)
    matches = peer.matcher.match(*found)
    distances = np.array(
        [
            [cv2.norm(d0, d1, cv2.NORM_HAMMING) for d1 in found[1].descriptors.numpy()]
            for d0 in found[0].descriptors.numpy()
        ]
    )
    for row, column in matches.indices:
        assert distances[row, column] == distances[row].min() == distances[:, column].min()
    assert len(matches) > 50


@pytest.mark.parametrize("is_color", [False, True])
def test_any_feature2d_can_be_a_peer(frames: list[Frame], is_color: bool) -> None:
    """OpenCV's ALIKED has the interface of its other detectors; SIFT stands in, for which no model file is needed."""
    image = np.stack([frames[0].image] * 3, axis=2) if is_color else frames[0].image
    features = OpenCvExtractor("sift", cv2.SIFT.create(), 50, takes_color=True).extract(image)
    corners = cv2.SIFT.create().detect(cv2.cvtColor(frames[0].image, cv2.COLOR_GRAY2BGR), None)
    assert features.num_valid == 50 < len(corners)
    strongest = sorted((corner.response for corner in corners), reverse=True)[:50]
    np.testing.assert_allclose(features.scores.numpy(), strongest)
    empty = OpenCvExtractor("sift", cv2.SIFT.create(), 50, takes_color=False).extract(np.zeros((64, 64), np.uint8))
    assert empty.num_valid == 0 and empty.descriptors.shape == (0, 128)


def test_matcher_that_wants_keypoints_gets_them() -> None:
    given_: list[Any] = []

    class FakeMatcher:
        def setPairInfo(self, *arguments: Any) -> None:
            given_.extend(arguments)

        def match(self, descriptors0: NDArray[Any], descriptors1: NDArray[Any]) -> list[cv2.DMatch]:
            assert descriptors0.shape == descriptors1.shape == (80, 64)
            return [cv2.DMatch(3, 4, 1.0)]

    features = random_features(0)
    matches = OpenCvMatcher(FakeMatcher(), wants_keypoints=True).match(features, features)
    np.testing.assert_array_equal(given_[0], features.valid_keypoints())
    assert given_[2:] == [(320, 240), (320, 240)]
    assert matches.indices.tolist() == [[3, 4]] and matches.scores.tolist() == [0.5]


@pytest.mark.parametrize("max_layers", [None, 2])
@pytest.mark.parametrize("preset", ["real-time", "accurate"])
def test_kornia_lightglue_is_set_up_like_ours(preset: str, max_layers: int | None) -> None:
    kornia_feature = pytest.importorskip("kornia.feature")
    torch.manual_seed(0)
    state_dict = LightGlueNetwork(LightGlueArchitecture(64, 32, 2, 3)).state_dict()
    # Random weights find matches when similarity is all that counts.
    for name, value in state_dict.items():
        if name.endswith("final_proj.weight"):
            value.copy_(60 * torch.eye(32))
        if name.endswith("matchability.bias"):
            value.fill_(5.0)
    config = LightGlueConfig(
        preset=preset, max_layers=max_layers, precision="float32", filter_threshold=0.01, depth_confidence=None
    )
    theirs = KorniaLightGlue(config, state_dict, kornia_feature, CPU)
    ours = LightGlue(config, state_dict)
    features0 = random_features(0)
    features1 = shifted(features0, noise=0.02)
    found, expected = ours.match(features0, features1), theirs.match(features0, features1)
    assert len(expected) > 10
    assert same_matches(found, expected) == same_matches(expected, found) == 1.0
    assert found.stop_layer == expected.stop_layer <= (max_layers or 3)


def test_weights_of_another_network_are_not_compared() -> None:
    kornia_feature = pytest.importorskip("kornia.feature")
    state_dict = kornia_feature.ALIKED("aliked-t16").state_dict()
    with pytest.raises(NotComparable, match=r"kornia: ALIKED does not take these weights: .*"):
        KorniaExtractor(AlikedConfig(), {**state_dict, "extra.weight": torch.zeros(1)}, kornia_feature, CPU)
    del state_dict["conv1.weight"]
    with pytest.raises(NotComparable, match=r"conv1\.weight"):
        KorniaExtractor(AlikedConfig(), state_dict, kornia_feature, CPU)


@pytest.mark.parametrize("max_side", [None, 160])
@pytest.mark.parametrize("method", ["aliked", "xfeat"])
def test_kornia_extractors_start_from_the_same_pixels(frames: list[Frame], method: str, max_side: int | None) -> None:
    kornia_feature = pytest.importorskip("kornia.feature")
    torch.manual_seed(0)
    config: AlikedConfig | XFeatConfig
    if method == "aliked":
        config = AlikedConfig(max_keypoints=60, max_side=max_side)
        network = kornia_feature.ALIKED("aliked-t16", 60, -1.0).eval()
        state_dict = network.state_dict()
    else:
        config = XFeatConfig(max_keypoints=60, max_side=max_side, detection_threshold=0.0)
        network = kornia_feature.XFeat(60, 0.0).eval()
        state_dict = network.net.state_dict()
    image = frames[0].image
    features = KorniaExtractor(config, state_dict, kornia_feature, CPU).extract(image)
    small = image if max_side is None else cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
    batch = torch.from_numpy(small.copy())[None, None].float() / 255
    with torch.inference_mode():
        if method == "aliked":
            expected = network(batch)[0].keypoints
        else:
            expected = network.detectAndCompute(batch)[0]["keypoints"]
    full = expected if max_side is None else (expected + 0.5) * 2 - 0.5
    assert 10 < features.num_valid <= 60 and features.image_size == (320, 240)
    torch.testing.assert_close(features.keypoints, full.to(features.keypoints.dtype))


def test_kornia_nearest_agrees_with_ours() -> None:
    theirs = KorniaNearest(NearestConfig(), pytest.importorskip("kornia.feature"))
    features0 = random_features(0)
    features1 = shifted(features0, noise=0.1)
    expected, found = theirs.match(features0, features1), Nearest().match(features0, features1)
    assert len(found) > 20
    assert same_matches(found, expected) == same_matches(expected, found) == 1.0
    scores = dict(zip(map(tuple, expected.indices.tolist()), expected.scores.tolist(), strict=True))
    ours = dict(zip(map(tuple, found.indices.tolist()), found.scores.tolist(), strict=True))
    assert scores == pytest.approx(ours, abs=1e-5)


# --- fairness -------------------------------------------------------------------------------------------------------


class CountingExtractor:
    """Gives the same grid of points for every image, and notes the calls."""

    kind = "grid"

    def __init__(self, log: list[str], name: str) -> None:
        self._log = log
        self._name = name

    def extract(self, image: NDArray[np.uint8]) -> Features:
        self._log.append(f"{self._name} extract")
        return random_features(0)


class RememberingMatcher:
    """Notes which objects it is given, and keeps them, so that no two of them share an address."""

    def __init__(self) -> None:
        self.calls: list[tuple[Features, Features]] = []

    def match(self, features0: Features, features1: Features) -> Matches:
        self.calls.append((features0, features1))
        return Matches(np.array([[0, 0], [1, 1]]), np.ones(2, np.float32), 2, 80, 80)


@pytest.fixture
def conditions(frames: list[Frame]) -> Conditions:
    return Conditions(frames[:5], frames[0].camera, TwoViewConfig(), CPU, num_repeats=7)


def test_every_stage_of_a_peer_is_compared(conditions: Conditions) -> None:
    log: list[str] = []
    ours, theirs = RememberingMatcher(), RememberingMatcher()
    frontend = Frontend(CountingExtractor(log, "ours"), ours, "fake", "cpu")
    peer = Peer("peer", "peer 1.0", CountingExtractor(log, "theirs"), theirs, is_same_network=True)
    extract, match, frame = compare(conditions, frontend, peer, lambda text: None)
    assert [c.stage for c in (extract, match, frame)] == ["extract", "match", "frame"]
    assert all(c.ours.num_calls == c.theirs.num_calls == c.ratio.num_pairs == 7 for c in (extract, match, frame))
    assert (extract.counted, extract.ours_count, extract.agreement) == ("keypoints", 80.0, 1.0)
    assert (match.counted, match.theirs_count, match.agreement) == ("matches", 2.0, 1.0)
    assert (match.ours_layers, extract.ours_layers) == (2.0, None)
    # Two matches give no pose, which is an outcome like any other.
    assert (frame.counted, frame.ours_count, frame.agreement) == ("matches", 2.0, None)
    # 5 frames for the counts, 3 calls that are not timed, 7 that are: in turn, ours first.
    assert log[:30] == ["ours extract", "theirs extract"] * 15


def test_a_lap_of_matching_is_like_a_run_and_knows_nothing_of_the_last_one(conditions: Conditions) -> None:
    ours, theirs = RememberingMatcher(), RememberingMatcher()
    frontend = Frontend(CountingExtractor([], "ours"), ours, "fake", "cpu")
    compare(conditions, frontend, Peer("peer", "", None, theirs, is_same_network=True), lambda text: None)
    calls = ours.calls[4:]  # the first four found the counts
    assert len(calls) == 10 + 4  # 3 + 7 in laps of three, each begun by a pair that is not timed
    for lap in range(4):
        in_lap = calls[4 * lap : 4 * lap + 4]
        for (_, features1), (features0, _) in pairwise(in_lap):
            assert features0 is features1
        earlier = {id(features) for pair in ours.calls[: 4 + 4 * lap] for features in pair}
        assert not earlier & {id(features) for pair in in_lap for features in pair}


def test_peer_without_an_extractor_of_its_own_is_left_out_of_the_rest(conditions: Conditions) -> None:
    frontend = Frontend(CountingExtractor([], "ours"), RememberingMatcher(), "fake", "cpu")
    matcher_only = Peer("peer", "", None, RememberingMatcher(), is_same_network=False)
    assert compare(conditions, frontend, matcher_only, lambda text: None) == []
    extractor_only = Peer("peer", "", CountingExtractor([], "theirs"), None, is_same_network=False)
    (extract,) = compare(conditions, frontend, extractor_only, lambda text: None)
    assert (extract.stage, extract.agreement) == ("extract", None)


def test_agreement_counts_what_the_other_found() -> None:
    ours, theirs = random_features(0), random_features(0)
    moved = theirs.keypoints.clone()
    moved[:20, 0] += 0.2
    moved[20:40, 1] += 0.05
    assert same_places(ours, replace(theirs, keypoints=moved)) == pytest.approx(60 / 80)
    assert same_places(replace(ours, num_valid=0), theirs) == 0.0
    assert same_places(ours, replace(theirs, num_valid=0)) == 1.0
    none, one, two = (
        Matches(np.array(rows, np.int64).reshape(-1, 2), np.ones(len(rows), np.float32))
        for rows in ([], [[0, 1]], [[0, 1], [2, 3]])
    )
    assert (same_matches(one, two), same_matches(two, one), same_matches(one, none)) == (0.5, 1.0, 1.0)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench_tree(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `vo bench --json` prints for a frontend without weights."""
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "-m", "vo", "bench", f"kitti:{drive}", "--config", "orb", "--json"]
    command += ["--against", "orb,kornia,opencv", "--repeats", "4", "--frames", "5", "--threads", "1"]
    with output.open("w") as file:
        subprocess.run(command, check=True, stdout=file, cwd=ROOT)
    tree: dict[str, Any] = json.loads(output.read_text())
    return tree


def test_json_says_what_ran_where(bench_tree: dict[str, Any], drive: Path) -> None:
    assert bench_tree["schema"] == "lightvo-bench/1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", bench_tree["date"])
    assert bench_tree["command"] == (
        "vo bench kitti:sequences/05 --config orb --against orb,kornia,opencv --repeats 4 --frames 5 --threads 1"
    )
    assert (bench_tree["source"], bench_tree["num_frames"]) == ("kitti:sequences/05", 5)
    assert (bench_tree["width"], bench_tree["height"]) == (320, 240)
    assert bench_tree["machine"]["cpu"] and bench_tree["machine"]["num_threads"] == 1
    assert bench_tree["versions"]["torch"] == torch.__version__ and "opencv-python" in bench_tree["versions"]
    assert (bench_tree["preset"], bench_tree["settings"]) == ("orb", [])
    assert (bench_tree["extractor"], bench_tree["matcher"]) == ("orb", "nearest")
    assert bench_tree["extractor_precision"] == bench_tree["matcher_precision"] == "as written"
    assert str(drive.parent) not in json.dumps(bench_tree)
    assert bench_tree["others_share"] is None or 0 <= bench_tree["others_share"] <= 1


def test_json_holds_every_stage_and_comparison(bench_tree: dict[str, Any]) -> None:
    stages = bench_tree["odometry"]["stages"]
    assert list(stages) == ["extract", "match", "track", "frame"]
    # One lap of five frames: the first one has nothing to be matched with.
    assert [stages[name]["num_calls"] for name in stages] == [5, 4, 5, 5]
    assert all(0 < stage["min_ms"] <= stage["median_ms"] <= stage["max_ms"] for stage in stages.values())
    assert stages["frame"]["max_ms"] > stages["extract"]["min_ms"]
    comparisons = bench_tree["comparisons"]
    assert [(c["peer"], c["stage"]) for c in comparisons] == [("orb", "extract"), ("orb", "match"), ("orb", "frame")]
    assert all(c["ratio"]["num_pairs"] == 4 and c["ratio"]["median"] > 0 for c in comparisons)
    assert all(c["ours_count"] > 30 and c["theirs_count"] > 30 and c["agreement"] is None for c in comparisons)
    assert len(bench_tree["not_compared"]) == 2
    assert bench_tree["not_compared"][0].startswith("kornia: ")
    assert bench_tree["not_compared"][1].startswith("opencv: ")


def test_table_is_for_people(drive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "orb", "--against", "orb,opencv", "--repeats", "2", "--frames", "3"]
    assert main(["bench", f"kitti:{drive}", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("source     kitti:sequences/05, 3 frames of 320x240")
    assert any(line.startswith("stage, ms") and line.endswith("calls") for line in lines)
    assert any(line.startswith("against OpenCV ") for line in lines)
    assert sum(line.startswith("not compared: opencv: its networks") for line in lines) == 1
    row = next(line for line in lines if line.startswith("frame ") and "x " in line)
    assert re.search(r"\d+\.\d\dx +\d+\.\d\d\.\.\d+\.\d\d", row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", "2"), "2 frames, expected 3 or more"),
        (("--against", "hloc"), "'hloc' is not known; choose from kornia, orb, opencv"),
        (("--device", "cuda"), "cuda is not available"),
    ],
)
def test_mistakes_are_one_line(
    drive: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["bench", str(drive), "--config", "orb", "--repeats", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vo: error: ") and error.count("\n") == 1 and message in error


def test_missing_clip_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vo.sources.manifest, "datasets_directory", lambda: tmp_path)
    with pytest.raises(SourceError, match=r"clip\.mp4: not found.*or name a SOURCE of real frames"):
        read_frames(BenchRequest())


def test_command_repeats_the_measurement() -> None:
    request = BenchRequest(
        "kitti:/data/00", "/home/me/mine.yaml", ("a.b=c d",), "cpu", ("kornia", "orb"), 5, 6, 2, is_json=True
    )
    command = command_line(request, "kitti:/data/00")
    expected = "vo bench kitti:data/00 --config mine.yaml --set 'a.b=c d' --device cpu --against kornia,orb"
    assert command == f"{expected} --repeats 5 --frames 6 --threads 2"


def test_precision_is_what_a_method_says() -> None:
    state_dict = LightGlueNetwork(LightGlueArchitecture(64, 32, 2, 2)).state_dict()
    assert precision_of(LightGlue(LightGlueConfig(precision="bfloat16"), state_dict)) == "bfloat16"
    assert precision_of(Nearest()) == "as written"


# --- matching quality -----------------------------------------------------------------------------------------------


def test_line_distances_are_the_larger_of_both() -> None:
    rng = np.random.default_rng(0)
    rays0, rays1 = rng.normal(size=(2, 50, 2))
    E = rng.normal(size=(3, 3))
    found = matching_metrics.line_distances(E, rays0, rays1)
    for x0, x1, distance in zip(rays0, rays1, found, strict=True):
        h0, h1 = np.append(x0, 1), np.append(x1, 1)
        line0, line1 = E @ h1, E.T @ h0
        expected = max(abs(h0 @ line0) / np.hypot(*line0[:2]), abs(h1 @ line1) / np.hypot(*line1[:2]))
        assert distance == pytest.approx(expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 170.0), st.floats(0.0, 179.0))
def test_pose_errors_are_angles(seed: int, rotation_deg: float, direction_deg: float) -> None:
    rng = np.random.default_rng(seed)
    axis, across = np.linalg.qr(rng.normal(size=(3, 2)))[0].T
    T_true, T_found = np.eye(4), np.eye(4)
    T_true[:3, :3] = Rotation.random(rng=rng).as_matrix()
    T_found[:3, :3] = T_true[:3, :3] @ Rotation.from_rotvec(np.deg2rad(rotation_deg) * axis).as_matrix()
    T_true[:3, 3] = 3.7 * axis
    T_found[:3, 3] = np.cos(np.deg2rad(direction_deg)) * axis + np.sin(np.deg2rad(direction_deg)) * across
    assert matching_metrics.pose_errors_deg(T_found, T_true) == pytest.approx((rotation_deg, direction_deg), abs=1e-4)


def quality(inliers: int, error_deg: float | None, matches: int = 100, layers: int = 2) -> matching_metrics.PairQuality:
    return matching_metrics.PairQuality(matches, inliers, inliers // 2, error_deg, error_deg, layers, 0.5, 10.0)


def test_summary_counts_rejected_pairs_apart() -> None:
    pairs = [quality(60, 1.0), quality(80, 3.0), quality(70, 2.0), quality(0, None, matches=20, layers=6)]
    found = matching_metrics.summarise("e", "m", 3, pairs)
    assert (found.num_pairs, found.num_rejected, found.matches, found.inliers) == (4, 1, 80.0, 70.0)
    assert (found.true_inliers, found.precision) == (105 / 4, 105 / 320)
    assert (found.rotation_median_deg, found.rotation_mean_deg, found.direction_mean_deg) == (2.0, 2.0, 2.0)
    assert (found.stop_layer, found.kept_share, found.match_median_ms) == (3.0, 0.5, 10.0)
    none_posed = matching_metrics.summarise("e", "m", 3, pairs[3:])
    assert (none_posed.num_rejected, none_posed.inliers, none_posed.rotation_mean_deg) == (1, 0.0, None)


def test_cost_of_adaptive_settings_is_over_pairs_posed_by_both() -> None:
    full = [quality(100, 1.0), quality(200, 2.0), quality(50, None)]
    adaptive = [quality(98, 1.1), quality(190, 2.3), quality(50, 1.0)]
    cost = matching_metrics.adaptive_cost("e", 1, full, adaptive)
    assert cost is not None and cost.num_pairs == 2
    assert cost.inlier_loss_percent.value == pytest.approx(4.0)
    # With two pairs a resample is one of them twice, or both.
    assert (cost.inlier_loss_percent.low, cost.inlier_loss_percent.high) == pytest.approx((2.0, 5.0))
    assert cost.true_inlier_loss_percent.value == pytest.approx(100 * (1 - 144 / 150))
    assert cost.rotation_change_deg.value == pytest.approx(0.2)
    assert matching_metrics.adaptive_cost("e", 1, full[2:], adaptive[2:]) is None


def test_matches_of_a_true_sequence_fit_its_truth(drive: Path) -> None:
    sequence = matching_quality.read_sequence(f"kitti:{drive}", 5)
    assert len(sequence.frames) == len(sequence.T_world_camera) == 5
    assert sequence.T_world_camera[4, 0, 3] == pytest.approx(4 * STEP_M)
    features = [ORB_FRONTEND.extractor.extract(frame.image) for frame in sequence.frames]
    found = matching_quality.match_pair(sequence, features, (0, 4), Nearest(), TwoViewConfig())
    assert found.num_true_inliers > 0.6 * found.num_matches > 60
    assert found.is_posed and found.rotation_error_deg is not None and found.direction_error_deg is not None
    assert found.rotation_error_deg < 1.0 and found.direction_error_deg < 5.0
    assert found.match_ms > 0 and found.kept_share == 1.0


def test_source_without_truth_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequence = write_drive(tmp_path, 3)
    (tmp_path / "poses" / "05.txt").unlink()
    assert matching_quality.main(["--source", f"kitti:{sequence}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("matching_quality: error: kitti:") and "no ground truth" in error


@pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="needs the published weights (LIGHTVO_WEIGHTS)")
def test_tool_measures_every_method_at_every_gap(
    drive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "matching.json"
    arguments = ["--gaps", "1,2", "--frames", "5", "--step", "2", "--keypoints", "400", "--extractors", "xfeat"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert matching_quality.main(["--source", f"kitti:{drive}", *arguments, *threads, "--json", str(output)]) == 0
    tree = json.loads(output.read_text())
    methods = [(method["gap"], method["matcher"], method["num_pairs"]) for method in tree["methods"]]
    assert methods == [(gap, matcher, 2) for gap in (1, 2) for matcher in matching_quality.MATCHERS]
    assert {cost["gap"] for cost in tree["adaptive_costs"]} <= {1, 2}
    by_matcher = {method["matcher"]: method for method in tree["methods"]}
    assert by_matcher[matching_quality.FULL]["stop_layer"] == 6 >= by_matcher[matching_quality.ADAPTIVE]["stop_layer"]
    assert str(drive.parent) not in output.read_text()
    assert capsys.readouterr().out.count("| xfeat |") == 6 + len(tree["adaptive_costs"])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_child(drive: Path, tmp_path: Path) -> None:
    """In a process of its own: a child is charged with the peak of whoever starts it, and pytest is large."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import peak_memory; "
        "command = 'x = bytearray(%d) + bytearray(1); raise SystemExit(3)'; "
        "print(*[peak_memory.run_measured([sys.executable, '-c', command % n]) for n in (1, 100_000_000)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    (small_code, small), (large_code, large) = (map(int, pair) for pair in re.findall(r"\((\d+), (\d+)\)", printed))
    assert small_code == large_code == 3
    assert 1_000_000 < small < 60_000_000
    assert 95_000_000 < large - small < 230_000_000


def test_peak_memory_of_a_run_is_written(drive: Path, tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    command = [sys.executable, "tools/peak_memory.py", f"kitti:{drive}", "--max-frames", "4", "--json", str(output)]
    subprocess.run([*command, "--config", "orb"], check=True, cwd=ROOT)
    tree = json.loads(output.read_text())
    assert tree["schema"] == "lightvo-memory/1" and tree["num_frames"] == 4 and tree["weights"] == []
    assert 50_000_000 < tree["peak_bytes"] < tree["limit_bytes"] == 1_200_000_000
    assert tree["command"] == "vo run kitti:sequences/05 --max-frames 4 --device cpu --publish off --config orb"


# --- the page -------------------------------------------------------------------------------------------------------


def test_page_is_written_from_the_figures(bench_tree: dict[str, Any], tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "PAGE.md"
    results.mkdir()
    (results / "a.json").write_text(json.dumps(bench_tree))
    summary = {
        "source": "kitti:/somewhere/sequences/05",
        "frames_processed": 8,
        "poses": 7,
        "fps": 12.34,
        "stages_ms": {"extract": {"p50": 81.2, "p95": 99.9}, "track": {"p50": 3.4, "p95": 5.0}},
        "evaluation": {
            "ate_rmse_m": 0.1234,
            "rpe_rot_deg": 0.05,
            "align": "sim3",
            "path_length_m": 144.9,
            "trajectory_name": "kitti:/somewhere/x",
            "truth_name": "/somewhere/05.txt",
        },
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    flags = ["--results", str(results), "--output", str(page)]
    assert write_benchmarks.main([*flags, "--check"]) == 1
    assert write_benchmarks.main([*flags, "--add-run", f"drive-orb={tmp_path / 'out'}"]) == 0
    assert write_benchmarks.main([*flags, "--check"]) == 0
    text = page.read_text()
    assert "| drive-orb | kitti:sequences/05 | 8 | 7 | 12.3 | 81 / - / 3 | 0.123 | 0.050 | sim3 | 144.9 |" in text
    first = bench_tree["comparisons"][0]
    assert f"| {first['ours']['median_ms']:.1f} | {first['description']} | {first['theirs']['median_ms']:.1f} |" in text
    assert "| kitti:sequences/05 320x240, 1024 keypoints, preset orb | extract | orb, as written |" in text
    assert f"**{first['ratio']['median']:.2f}x**" in text
    assert f"`a.json`: `{bench_tree['command']}`" in text
    assert "/somewhere" not in "".join(path.read_text() for path in results.iterdir()) + text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_files_that_are_no_figures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.json").write_text('{"schema": "other/1"}')
    assert write_benchmarks.main(["--results", str(tmp_path), "--output", str(tmp_path / "PAGE.md")]) == 2
    (tmp_path / "odd.json").write_text("")
    assert write_benchmarks.main(["--results", str(tmp_path), "--output", str(tmp_path / "PAGE.md")]) == 2
    assert write_benchmarks.main(["--results", str(tmp_path), "--add-run", "a/b=c"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "odd.json: schema 'other/1' is none of lightvo-bench/1" in first
    assert "odd.json: not JSON" in second
    assert "expected NAME=DIR" in third


def test_columns_of_a_table_agree() -> None:
    lines = benchmark_tables.table(("a", "b", "c"), [("1", "2", "3")], num_left=2)
    assert lines == ["| a | b | c |", "| --- | --- | ---: |", "| 1 | 2 | 3 |"]


def test_matching_table_shows_what_it_costs() -> None:
    method = matching_metrics.summarise("xfeat", "nearest", 1, [quality(60, 1.0, layers=0)])
    cost = matching_metrics.adaptive_cost("xfeat", 1, [quality(100, 1.0)], [quality(97, 1.5)])
    unposed = matching_metrics.summarise("xfeat", "nearest", 5, [quality(0, None)])
    assert cost is not None
    tree = {
        "source": "kitti:sequences/00",
        "num_frames": 2,
        "max_keypoints": 512,
        "date": "2026-01-01",
        "depth_confidence": 0.95,
        "width_confidence": 0.99,
        "methods": [json.loads(json.dumps(matching_quality.asdict(m))) for m in (method, unposed)],
        "adaptive_costs": [json.loads(json.dumps(matching_quality.asdict(cost)))],
    }
    text = "\n".join(benchmark_tables.matching_lines(tree))
    assert "| 1 | xfeat | nearest | 1 (0) | 100 | 60 | 30 | 0.300 | 1.000 / 1.000 | 1.00 / 1.00 |  |  | 10.0 |" in text
    assert "| 5 | xfeat | nearest | 1 (1) | 100 | 0 | 0 | 0.000 |  |  | 2.0 | 50 % | 10.0 |" in text
    assert "| 3.0 % (3.0 % to 3.0 %) |" in text and "| +0.5000 (+0.5000 to +0.5000) |" in text


def test_committed_page_says_what_the_committed_figures_say() -> None:
    assert write_benchmarks.main(["--check"]) == 0
    for path in (ROOT / "benchmarks").glob("*.json"):
        assert not re.search(r'[" :](/home/|/root/|/work/|/tmp/|/Users/)', path.read_text()), path.name


def test_commands_of_the_page_are_commands() -> None:
    names = [case.name for case in run_benchmarks.CASES]
    assert len(set(names)) == len(names) and {case.group for case in run_benchmarks.CASES} == set(run_benchmarks.GROUPS)
    for case in run_benchmarks.CASES:
        if case.group in ("speed", "runs"):
            command = "bench" if case.group == "speed" else "run"
            options = build_parser().parse_args([command, case.source, *case.flags])
            load_config(options.config, options.set)


def test_commands_for_the_gpu_are_commands() -> None:
    for _, _, commands, _ in write_benchmarks.GPU_FIGURES:
        for command in commands.split(" && "):
            words = shlex.split(command.partition(" > ")[0])
            if words[0] == "vo":
                build_parser().parse_args(words[1:])
            else:
                assert words[:2] == ["python", "tools/matching_quality.py"]
                matching_quality.build_parser().parse_args(words[2:])
