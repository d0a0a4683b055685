"""LightGlue against reference outputs on real images, and on neighbouring frames of a drive."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from kornia_lightglue import one_thread, packed_log_assignment, plain_log_assignment
from torch import Tensor

from frontends.aliked import Aliked, AlikedConfig
from frontends.base import Features
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_network import build_network
from frontends.lightglue_packed import pack

WEIGHTS = Path(os.environ.get("LIGHTVO_WEIGHTS", "missing"))
needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "parity" / "lightglue.npz").is_file(), reason="LIGHTVO_WEIGHTS has no parity/lightglue.npz"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Reference:
    """Published reference outputs for one feature and one pair of images."""

    def __init__(self, feature: str, pair: str) -> None:
        self.feature, self.prefix = feature, f"{feature}_{pair}_"
        self.arrays = np.load(WEIGHTS / "parity" / "lightglue.npz")

    def __getitem__(self, name: str) -> Any:
        return self.arrays[self.prefix + name]

    def features(self, index: int) -> Features:
        keypoints = torch.from_numpy(self[f"keypoints{index}"])
        descriptors = torch.from_numpy(self[f"descriptors{index}"])
        width, height = (int(side) for side in self["size_wh"])
        count = len(keypoints)
        return Features(keypoints, torch.ones(count), descriptors, count, (width, height), self.feature)

    def state_dict(self) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = torch.load(WEIGHTS / f"lightglue-light-{self.feature}.pth", weights_only=True)
        return loaded


@needs_weights
@pytest.mark.parametrize("pair", ["kitti", "photo"])
@pytest.mark.parametrize("feature", ["aliked-t16", "xfeat"])
@pytest.mark.parametrize("mode", ["full", "adaptive"])
def test_real_images_match_as_published(feature: str, pair: str, mode: str) -> None:
    reference = Reference(feature, pair)
    settings = (1.0, 1.0) if mode == "full" else (0.95, 0.99)
    config = LightGlueConfig(depth_confidence=settings[0], width_confidence=settings[1], precision="float32")
    matcher = LightGlue(config, reference.state_dict(), name=f"lightglue-light-{feature}", fits=(feature,))
    matches = matcher.match(reference.features(0), reference.features(1))
    np.testing.assert_array_equal(matches.indices, reference[f"{mode}_matches"])
    np.testing.assert_allclose(matches.scores, reference[f"{mode}_scores"], atol=1e-4)
    assert matches.stop_layer == int(reference[f"{mode}_stop"])
    for num_kept, layers in zip(
        (matches.num_kept0, matches.num_kept1), (reference[f"{mode}_prune0"], reference[f"{mode}_prune1"]), strict=True
    ):
        assert num_kept == int(np.sum(layers == layers.max()))


@needs_weights
@pytest.mark.parametrize("pair", ["kitti", "photo"])
@pytest.mark.parametrize("feature", ["aliked-t16", "xfeat"])
def test_log_assignment_of_real_images_is_as_published(feature: str, pair: str) -> None:
    reference = Reference(feature, pair)
    pair_features = reference.features(0), reference.features(1)
    with torch.inference_mode():
        plain = plain_log_assignment(reference.state_dict(), *pair_features)[0]
        packed = pack(build_network(reference.state_dict(), feature), torch.float32)
        inner = packed_log_assignment(packed, *pair_features)
    torch.testing.assert_close(inner, plain[:-1, :-1], atol=2e-4, rtol=0)
    rows, columns = reference["full_matches"].T
    for block in (plain[:-1, :-1].numpy(), inner.numpy()):
        np.testing.assert_allclose(block[rows, columns], reference["full_la_matched"], atol=1e-4)
        np.testing.assert_allclose(block.max(axis=1), reference["full_la_rowmax"], atol=1e-4)
        np.testing.assert_allclose(block.max(axis=0), reference["full_la_colmax"], atol=1e-4)
        stats = [block.mean(), block.std(), block.min(), block.max()]
        np.testing.assert_allclose(stats, reference["full_la_stats"], atol=1e-3, rtol=1e-5)
    np.testing.assert_allclose(plain[:-1, -1], reference["full_la_dust0"], atol=1e-4)
    np.testing.assert_allclose(plain[-1, :-1], reference["full_la_dust1"], atol=1e-4)


@needs_weights
@pytest.mark.parametrize("pair", ["kitti", "photo"])
@pytest.mark.parametrize("feature", ["aliked-t16", "xfeat"])
def test_bfloat16_keeps_99_percent_of_the_matches_of_real_images(feature: str, pair: str) -> None:
    reference = Reference(feature, pair)
    for mode, preset in (("full", "accurate"), ("adaptive", "real-time")):
        matcher = LightGlue(LightGlueConfig(preset=preset, precision="bfloat16"), reference.state_dict())
        matches = matcher.match(reference.features(0), reference.features(1))
        expected = set(map(tuple, reference[f"{mode}_matches"].tolist()))
        same = expected & set(map(tuple, matches.indices.tolist()))
        assert len(same) >= 0.99 * max(len(expected), len(matches))
        assert matches.stop_layer == int(reference[f"{mode}_stop"])


KITTI = Path(os.environ.get("LIGHTVO_DATA", "missing")) / "kitti" / "sequences" / "00"


@needs_weights
@pytest.mark.skipif(not KITTI.is_dir(), reason="LIGHTVO_DATA has no kitti/sequences/00")
def test_neighbouring_frames_lose_less_than_3_percent_of_the_inliers() -> None:
    """The default exits against all layers, over pairs spread along the sequence."""
    row = (KITTI / "calib.txt").read_text().splitlines()[0].split()[1:]
    camera_matrix = np.array(row, dtype=np.float64).reshape(3, 4)[:, :3].copy()
    load = functools.partial(torch.load, weights_only=True)
    extractor = Aliked(AlikedConfig(max_keypoints=512), load(WEIGHTS / "aliked-t16.pth"), "cpu")
    state_dict = load(WEIGHTS / "lightglue-light-aliked-t16.pth")
    matchers = {preset: LightGlue(LightGlueConfig(preset=preset), state_dict) for preset in ("accurate", "real-time")}
    num_inliers, num_layers = dict.fromkeys(matchers, 0), dict.fromkeys(matchers, 0)
    for index in range(0, 200, 40):
        images = [cv2.imread(str(KITTI / "image_0" / f"{i:06d}.png"), cv2.IMREAD_GRAYSCALE) for i in (index, index + 1)]
        features0, features1 = (extractor.extract(np.asarray(image, dtype=np.uint8)) for image in images)
        for preset, matcher in matchers.items():
            matches = matcher.match(features0, features1)
            points0 = features0.valid_keypoints()[matches.indices[:, 0]].astype(np.float64)
            points1 = features1.valid_keypoints()[matches.indices[:, 1]].astype(np.float64)
            cv2.setRNGSeed(0)
            _, mask = cv2.findEssentialMat(points0, points1, camera_matrix, cv2.USAC_MAGSAC, 0.999, 1.0)
            num_inliers[preset] += int(mask.sum())
            num_layers[preset] += matches.stop_layer
    assert num_inliers["accurate"] > 5 * 250
    assert num_inliers["real-time"] > 0.97 * num_inliers["accurate"]
    assert num_layers["real-time"] <= num_layers["accurate"] / 2
