"""The peers of `vo bench`: do they compute what ours does, and are the comparisons fair."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from synthetic_drive import write_drive

from frontends.aliked import AlikedConfig
from frontends.base import Features, Matches
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_network import LightGlueArchitecture, LightGlueNetwork
from frontends.nearest import Nearest, NearestConfig
from frontends.orb import Orb, OrbConfig
from frontends.xfeat import XFeatConfig
from vo.bench_compare import Conditions, compare, same_matches, same_places
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
from vo.config import FrontendConfig, TwoViewConfig
from vo.frontend import Frontend
from vo.sources import open_source
from vo.types import ConfigError, Frame

CPU = torch.device("cpu")
ORB_CONFIG = FrontendConfig(extractor=OrbConfig(max_keypoints=200), matcher=NearestConfig())
ORB_FRONTEND = Frontend(Orb(OrbConfig(max_keypoints=200)), Nearest(), "orb + nearest", "cpu")


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), 8)


@pytest.fixture(scope="module")
def frames(drive: Path) -> list[Frame]:
    return list(open_source(f"kitti:{drive}").frames())


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
