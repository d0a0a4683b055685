from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.stillness import RepeatedImages, is_still, quantile, regional_shifts
from vo.types import Camera

CAMERA = Camera(640, 480, np.diag([500.0, 500.0, 1.0]))


def everywhere(num, seed=0):
    return np.random.default_rng(seed).uniform([0, 0], [640, 480], (num, 2)).astype(np.float32)


def test_the_shift_of_a_region_is_the_length_of_its_median():
    rng = np.random.default_rng(0)
    before = everywhere(300)
    after = (before + rng.normal(0, 2, before.shape)).astype(np.float32)
    regions = [(column, row) for row in range(3) for column in range(4)]
    expected = []
    for column, row in regions:
        mine = (before[:, 0] // 160 == column) & (before[:, 1] // 160 == row)
        if mine.sum() >= 8:
            expected.append(np.linalg.norm(np.median((after - before)[mine].astype(np.float64), axis=0)))
    np.testing.assert_allclose(regional_shifts(before, after, CAMERA), expected, atol=1e-6)


def test_something_that_moves_before_a_standing_camera():
    before = everywhere(600)
    after = before.copy()
    after[(before[:, 0] < 160) & (before[:, 1] < 320)] += 30.0
    assert is_still(before, after, CAMERA, 0.5)
    after[before[:, 0] < 320] += 30.0
    assert not is_still(before, after, CAMERA, 0.5)


def test_forward_motion_is_none_in_the_middle_only():
    before = everywhere(600)
    after = (before - [320, 240]) * 1.01 + [320, 240]
    assert not is_still(before, after.astype(np.float32), CAMERA, 0.5)


def test_too_few_keypoints_say_nothing():
    few = everywhere(20)
    assert not is_still(few, few, CAMERA, 0.5)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_the_quantile_is_numpys(values, share):
    assert quantile(np.array(values), share) == pytest.approx(np.quantile(values, share))


def test_one_image_again_and_again_is_a_camera_that_hangs():
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64), np.uint8)
    repeated, said = RepeatedImages(), []
    for image in [images[0], images[0].copy(), images[0].copy(), images[0].copy(), images[1], images[1].copy()]:
        said.append(repeated.is_hanging(image))
        if not said[-1]:
            repeated.note(image)
    assert said == [False, False, True, True, False, False]
    nearly = images[1].copy()
    nearly[33, 5] += 1  # between the rows that are looked at first
    assert not repeated.is_hanging(nearly) and not repeated.is_hanging(images[0][:32])
    black = RepeatedImages()
    for _ in range(5):
        assert not black.is_hanging(np.zeros((64, 64), np.uint8))
        black.note(np.zeros((64, 64), np.uint8))
