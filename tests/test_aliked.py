"""ALIKED against the reference outputs of the public code, against kornia, and against its own plain formulation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from frontends.aliked import Aliked, AlikedConfig
from frontends.base import Features

WEIGHTS = os.environ.get("LIGHTVO_WEIGHTS")
needs_weights = pytest.mark.skipif(WEIGHTS is None, reason="LIGHTVO_WEIGHTS is not set")


def published(variant: str) -> dict[str, torch.Tensor]:
    state_dict: dict[str, torch.Tensor] = torch.load(Path(str(WEIGHTS)) / f"aliked-{variant}.pth", weights_only=True)
    return state_dict


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


@needs_weights
@pytest.mark.parametrize("variant", ["t16", "n16"])
@pytest.mark.parametrize("image", ["kitti", "photo"])
def test_reproduces_the_published_code(variant: str, image: str) -> None:
    reference = np.load(Path(str(WEIGHTS)) / "parity" / f"aliked-{variant}.npz")
    features = Aliked(AlikedConfig(variant=variant), published(variant)).extract(reference[f"{image}_image"])
    assert features.num_valid == len(reference[f"{image}_keypoints"])
    assert_equal_features(
        features,
        reference[f"{image}_keypoints"],
        reference[f"{image}_descriptors"],
        reference[f"{image}_scores"],
    )
