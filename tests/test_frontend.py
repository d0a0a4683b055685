"""The factory: every configuration gives its method with the weights it was made for, or one clear line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from frontends import frontend
from frontends.aliked import AlikedConfig
from frontends.base import Extractor, Matcher, PairMatcher, WeightsError
from frontends.frontend import create_extractor, create_matcher, create_pair_matcher, matcher_weights
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.nearest import NearestConfig
from frontends.orb import OrbConfig
from frontends.weights import PACKAGE_DATA, Origin
from frontends.weights_registry import REGISTRY
from frontends.xfeat import XFeatConfig
from frontends.xfeat_star import XFeatStarConfig

needs_weights = pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set")
CPU = torch.device("cpu")


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what the package holds, and no network."""
    monkeypatch.delenv("LIGHTVO_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("frontends.weights.download", offline)


def offline(known: Any) -> bytes:
    raise OSError("Network is unreachable")


def pair_of_images() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two overlapping parts of a picture, (24, -16) px apart."""
    noise = np.random.default_rng(0).uniform(0, 255, (70, 90)).astype(np.float32)
    image = np.clip(cv2.resize(noise, (540, 420), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    return image[16:400, :512].copy(), image[:384, 24:536].copy()


def one_line(error: pytest.ExceptionInfo[WeightsError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_orb_with_nearest_neighbours_needs_no_weights(no_weights: None) -> None:
    extractor, matcher = (
        create_extractor(OrbConfig(), CPU),
        create_matcher(NearestConfig(min_similarity=0.8), "orb", CPU),
    )
    assert extractor.weights is None and matcher.weights is None
    assert isinstance(extractor.extractor, Extractor) and isinstance(matcher.matcher, Matcher)
    features0, features1 = (extractor.extractor.extract(image) for image in pair_of_images())
    matches = matcher.matcher.match(features0, features1)
    shifts = features0.valid_keypoints()[matches.indices[:, 0]] - features1.valid_keypoints()[matches.indices[:, 1]]
    assert (np.linalg.norm(shifts - [24, -16], axis=1) < 2).sum() > 200


@pytest.mark.parametrize("kind", ["aliked-t16", "xfeat"])
def test_lightglue_takes_our_weights_for_the_extractor(kind: str, no_weights: None) -> None:
    loaded = create_matcher(LightGlueConfig(), kind, CPU)
    assert isinstance(loaded.matcher, LightGlue) and loaded.weights is not None
    assert loaded.weights.name == loaded.matcher.name == f"lightglue-light-{kind}"
    assert loaded.weights.origin is Origin.PACKAGE and loaded.matcher.fits == (kind,)


@pytest.mark.parametrize(("config", "kind"), [(AlikedConfig(), "aliked-t16"), (XFeatConfig(), "xfeat")])
def test_our_extractor_weights_stand_in_for_published_ones(config: Any, kind: str, no_weights: None) -> None:
    loaded = create_extractor(config, CPU)
    assert loaded.weights is not None and loaded.remark is not None and "\n" not in loaded.remark
    assert (loaded.weights.name, loaded.weights.origin) == (f"own-{kind}", Origin.PACKAGE)
    assert f"own-{kind}" in loaded.remark and f"vo weights fetch {kind}" in loaded.remark
    matcher = create_matcher(LightGlueConfig(), loaded.extractor.kind, CPU).matcher
    features0, features1 = (loaded.extractor.extract(image) for image in pair_of_images())
    matches = matcher.match(features0, features1)
    shifts = features0.valid_keypoints()[matches.indices[:, 0]] - features1.valid_keypoints()[matches.indices[:, 1]]
    is_right = np.linalg.norm(shifts - [24, -16], axis=1) < 2
    assert is_right.sum() > 200 and is_right.mean() > 0.9


def test_weights_are_chosen_by_name_and_then_nothing_stands_in(no_weights: None) -> None:
    chosen = create_extractor(AlikedConfig(weights="own-aliked-t16"), CPU)
    assert chosen.weights is not None and chosen.weights.name == "own-aliked-t16" and chosen.remark is None
    with pytest.raises(WeightsError, match="vo weights fetch aliked-t16"):
        create_extractor(AlikedConfig(weights="aliked-t16"), CPU)
    with pytest.raises(WeightsError, match="aliked-n16"):
        create_extractor(AlikedConfig(variant="n16"), CPU)
    with pytest.raises(WeightsError, match="no such file"):
        create_extractor(AlikedConfig(weights="own-xfeat"), CPU)


def test_damaged_weights_are_said_and_not_replaced(
    no_weights: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aliked-t16.pth").write_bytes(b"damaged")
    monkeypatch.setenv("LIGHTVO_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="7 bytes instead of") as error:
        create_extractor(AlikedConfig(), CPU)
    one_line(error, "aliked-t16")


@needs_weights
def test_published_weights_come_first_where_they_are_at_hand() -> None:
    for config, name in ((AlikedConfig(), "aliked-t16"), (XFeatConfig(), "xfeat")):
        loaded = create_extractor(config, CPU)
        assert loaded.weights is not None and loaded.weights.name == name and loaded.remark is None


def test_which_weights_match_which_features() -> None:
    assert matcher_weights("xfeat") == "lightglue-light-xfeat"
    assert matcher_weights("aliked-t16") == "lightglue-light-aliked-t16"
    assert matcher_weights("aliked-n16") == "lightglue-aliked"
    assert matcher_weights("superpoint") == "lightglue-superpoint"
    kinds = {kind for entry in REGISTRY if entry.role == "extractor" for kind in entry.fits}
    assert kinds == {"aliked-t16", "aliked-n16", "aliked-n16rot", "aliked-n32", "xfeat", "r2d2"}


def test_features_without_matching_weights_are_refused_with_both_names(no_weights: None) -> None:
    for config in (LightGlueConfig(), LightGlueConfig(weights=str(PACKAGE_DATA / "lightglue-light-xfeat.safetensors"))):
        with pytest.raises(WeightsError) as error:
            create_matcher(config, "orb", CPU)
        one_line(error, "lightglue", "orb", "nearest")
    with pytest.raises(WeightsError) as error:
        create_matcher(LightGlueConfig(), "aliked-n32", CPU)
    one_line(error, "lightglue", "aliked-n32", "aliked-t16", "nearest")


def test_a_given_file_is_refused_for_features_it_was_not_made_for() -> None:
    path = PACKAGE_DATA / "lightglue-light-xfeat.safetensors"
    assert create_matcher(LightGlueConfig(weights=str(path)), "xfeat", CPU).weights is not None
    with pytest.raises(WeightsError) as error:
        create_matcher(LightGlueConfig(weights=str(path)), "aliked-t16", CPU)
    one_line(error, "lightglue-light-xfeat", "aliked-t16")


def test_a_retrained_file_is_used_unverified(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(PACKAGE_DATA / "lightglue-light-xfeat.safetensors")
    tensors["input_proj.bias"] += 1
    save_file(tensors, tmp_path / "mine.safetensors")
    loaded = create_matcher(LightGlueConfig(weights=str(tmp_path / "mine.safetensors")), "aliked-t16", CPU)
    assert loaded.weights is not None and isinstance(loaded.matcher, LightGlue)
    assert (loaded.weights.name, loaded.weights.is_verified, loaded.matcher.fits) == ("mine", False, ())


@pytest.mark.parametrize(
    "config", [AlikedConfig(weights="aliked-t16"), XFeatConfig(weights="xfeat"), AlikedConfig(variant="n32")]
)
def test_missing_weights_are_one_line(config: AlikedConfig | XFeatConfig, no_weights: None) -> None:
    with pytest.raises(WeightsError) as error:
        create_extractor(config, CPU)
    one_line(error, config.name, "Network is unreachable", "vo weights fetch", "LIGHTVO_WEIGHTS")


@needs_weights
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (AlikedConfig(max_keypoints=300), "aliked-t16"),
        (AlikedConfig(variant="n16", max_keypoints=300), "aliked-n16"),
        (XFeatConfig(max_keypoints=300), "xfeat"),
    ],
)
def test_an_extractor_comes_with_its_file(config: AlikedConfig | XFeatConfig, kind: str) -> None:
    loaded = create_extractor(config, CPU)
    assert isinstance(loaded.extractor, Extractor) and loaded.extractor.kind == kind
    assert loaded.weights is not None and loaded.weights.name == kind and loaded.weights.is_verified
    assert loaded.extractor.extract(pair_of_images()[0]).num_valid > 50


@needs_weights
@pytest.mark.parametrize("config", [AlikedConfig(max_keypoints=512), XFeatConfig(max_keypoints=512)])
def test_features_and_weights_of_the_factory_match_a_shifted_image(config: AlikedConfig | XFeatConfig) -> None:
    extractor = create_extractor(config, CPU).extractor
    matcher = create_matcher(LightGlueConfig(), extractor.kind, CPU).matcher
    features0, features1 = (extractor.extract(image) for image in pair_of_images())
    matches = matcher.match(features0, features1)
    shifts = features0.valid_keypoints()[matches.indices[:, 0]] - features1.valid_keypoints()[matches.indices[:, 1]]
    is_right = np.linalg.norm(shifts - [24, -16], axis=1) < 2
    assert is_right.sum() > 100 and is_right.mean() > 0.8


@needs_weights
def test_the_pair_matcher_needs_the_published_file() -> None:
    path = Path(os.environ["LIGHTVO_WEIGHTS"]) / "xfeat.pth"
    with pytest.raises(WeightsError, match="fine matcher"):
        create_pair_matcher(XFeatStarConfig(weights=str(path)), CPU)


def test_the_pair_matcher_matches_images(tmp_path: Path) -> None:
    kornia_xfeat: Any = pytest.importorskip("kornia.feature.xfeat")
    torch.manual_seed(0)
    path = tmp_path / "xfeat.pt"
    torch.save(kornia_xfeat.XFeat().net.state_dict(), path)
    loaded = create_pair_matcher(XFeatStarConfig(max_keypoints=200, min_confidence=0.0, weights=str(path)), CPU)
    assert isinstance(loaded.matcher, PairMatcher) and loaded.weights is not None and not loaded.weights.is_verified
    features0, features1, matches = loaded.matcher.match_images(*pair_of_images())
    assert len(matches) == features0.num_valid == features1.num_valid >= 1


def test_every_configuration_is_known() -> None:
    names = {config().name for config in get_args(frontend.ImageExtractorConfig)}
    assert names == {"aliked", "xfeat", "r2d2", "orb"}
    assert {config().name for config in get_args(frontend.MatcherConfig)} == {"lightglue", "nearest", "followed"}
    assert {config().name for config in get_args(frontend.PairMatcherConfig)} == {"xfeat-star", "loftr"}
