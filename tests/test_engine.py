"""The engine: what it promises to its users, on any device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from frontends.base import Features


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
