"""ORB: where its keypoints lie, how they are spread, what its descriptors are, against OpenCV itself."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from frontends.base import Features
from frontends.nearest import Nearest, NearestConfig
from frontends.orb import Orb, OrbConfig


def textured(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth random image full of corners."""
    noise = np.random.default_rng(seed).uniform(0, 255, (height // 4 + 1, width // 4 + 1)).astype(np.float32)
    enlarged = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(enlarged, 0, 255).astype(np.uint8)


def check_contract(features: Features, config: OrbConfig, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    assert features.kind == "orb" and features.image_size == (width, height)
    assert features.keypoints.shape == (config.max_keypoints, 2) and features.keypoints.dtype == torch.float32
    assert features.descriptors.shape == (config.max_keypoints, 32) and features.descriptors.dtype == torch.uint8
    valid, padding = slice(features.num_valid), slice(features.num_valid, None)
    for values in (features.keypoints, features.scores, features.descriptors, features.scales, features.orientations):
        assert values is not None and not values[padding].any()
    assert (features.scores[valid].diff() <= 0).all()
    assert (features.keypoints[valid] >= 0).all()
    assert (features.keypoints[valid] <= torch.tensor([width - 1, height - 1])).all()


@given(
    height=st.integers(32, 260),
    width=st.integers(32, 260),
    capacity=st.integers(1, 600),
    levels=st.integers(1, 16),
    factor=st.floats(1.01, 2.0),
    colour=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_any_image_and_pyramid_gives_features(
    height: int, width: int, capacity: int, levels: int, factor: float, colour: bool
) -> None:
    config = OrbConfig(max_keypoints=capacity, num_levels=levels, scale_factor=factor)
    image = textured(height, width)
    if colour:
        image = np.repeat(image[:, :, None], 3, axis=2)
    check_contract(Orb(config).extract(image), config, image)


def test_an_image_without_corners_has_no_features() -> None:
    features = Orb(OrbConfig()).extract(np.full((240, 320), 90, dtype=np.uint8))
    assert features.num_valid == 0 and len(features.valid_keypoints()) == 0


@pytest.mark.parametrize("shape", [(240,), (240, 320, 4), (240, 320, 1), (1, 240, 320, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Orb(OrbConfig()).extract(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="float32"):
        Orb(OrbConfig()).extract(np.zeros((240, 320), dtype=np.float32))


def test_the_thresholds_are_checked() -> None:
    with pytest.raises(ValueError, match="min_fast_threshold: 30"):
        OrbConfig(min_fast_threshold=30)
    with pytest.raises(ValueError, match="max_keypoints"):
        OrbConfig(max_keypoints=0)


def dots(width: int, height: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Bright Gaussian dots at known sub-pixel places: what a corner detector answers to on every level."""
    generator = np.random.default_rng(seed)
    steps, image, centres = np.arange(-30, 31), np.full((height, width), 60.0), []
    for row in range(80, height - 60, 64):
        for column in range(80, width - 60, 64):
            shift = generator.uniform(-0.5, 0.5, 2)
            profile_x, profile_y = (np.exp(-((steps - d) ** 2) / (2 * 3.0**2)) for d in shift)
            image[row - 30 : row + 31, column - 30 : column + 31] += 150 * np.outer(profile_y, profile_x)
            centres.append(np.array([column, row]) + shift)
    return image.round().astype(np.uint8), np.array(centres)


def offsets(points: NDArray[np.floating], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """From the nearest centre to each point that is near one."""
    distances = np.linalg.norm(points[:, None] - centres[None], axis=2)
    errors = points - centres[distances.argmin(axis=1)]
    return np.asarray(errors[distances.min(axis=1) < 6])


def test_keypoints_of_every_level_lie_on_the_dots_without_bias() -> None:
    width, height = 640, 480
    found, plain = [], []
    for seed in range(3):
        image, centres = dots(width, height, seed)
        features = Orb(OrbConfig(max_keypoints=4096, fast_threshold=10)).extract(image)
        assert features.scales is not None
        upper = (features.scales[: features.num_valid] > 31 * 1.2**3).numpy()
        found.append(offsets(features.valid_keypoints()[upper], centres))
        corners = cv2.ORB.create(nfeatures=16384, fastThreshold=10).detect(image)
        plain.append(offsets(np.array([c.pt for c in corners if c.octave > 3]), centres))
    mean, mean_of_opencv = (np.linalg.norm(np.concatenate(values).mean(axis=0)) for values in (found, plain))
    assert len(np.concatenate(found)) > 300
    assert mean < 0.15
    # The plain coordinates of OpenCV are what this corrects.
    assert mean_of_opencv > 0.5


def test_without_spreading_it_is_opencvs_strongest() -> None:
    image = textured(300, 400)
    config = OrbConfig(max_keypoints=200, spread_cell_px=None, num_levels=1, min_fast_threshold=20)
    features = Orb(config).extract(image)
    detector = cv2.ORB.create(nfeatures=10_000, nlevels=1)
    corners = sorted(detector.detect(image), key=lambda corner: -corner.response)[:200]
    described, descriptors = detector.compute(image, corners)
    expected = {corner.pt: row.tobytes() for corner, row in zip(described, descriptors, strict=True)}
    keypoints, rows = features.valid_keypoints(), features.descriptors.numpy()
    assert features.num_valid == 200
    for keypoint, row in zip(keypoints, rows, strict=True):
        assert expected[tuple(keypoint)] == row.tobytes()


def test_spreading_reaches_the_weak_half_of_the_image() -> None:
    image = textured(480, 640)
    image[:, :320] = 100 + image[:, :320] // 4
    shares = []
    for cell in (None, 40):
        keypoints = Orb(OrbConfig(max_keypoints=300, spread_cell_px=cell)).extract(image).valid_keypoints()
        shares.append((keypoints[:, 0] < 320).mean())
    assert shares[0] < 0.05 and shares[1] > 0.2


def test_the_lower_threshold_is_tried_where_corners_are_too_few() -> None:
    image = 120 + textured(300, 400) // 16
    few = Orb(OrbConfig(min_fast_threshold=20)).extract(image).num_valid
    assert Orb(OrbConfig()).extract(image).num_valid > 3 * max(few, 10)


def test_features_are_the_same_every_time() -> None:
    image, orb = textured(480, 640), Orb(OrbConfig())
    first, second, other = orb.extract(image), orb.extract(image), Orb(OrbConfig()).extract(image.copy())
    for features in (second, other):
        for name in ("keypoints", "scores", "descriptors", "scales", "orientations"):
            assert torch.equal(getattr(first, name), getattr(features, name))


def test_a_shrunk_image_has_its_keypoints_in_full_pixels() -> None:
    image, centres = dots(1280, 960, 0)
    features = Orb(OrbConfig(max_side=640, max_keypoints=2048, fast_threshold=10)).extract(image)
    error = offsets(features.valid_keypoints().astype(np.float64), centres)
    assert len(error) > 200 and np.linalg.norm(error.mean(axis=0)) < 0.4
    assert features.image_size == (1280, 960)


def test_matches_follow_a_rotation_and_the_orientation_turns_with_it() -> None:
    image = textured(480, 480)
    angle = 30.0
    turn = cv2.getRotationMatrix2D((239.5, 239.5), angle, 1.0)
    turned = cv2.warpAffine(image, turn, (480, 480), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    orb = Orb(OrbConfig(max_keypoints=1500))
    features0, features1 = orb.extract(image), orb.extract(np.asarray(turned, dtype=np.uint8))
    matches = Nearest(NearestConfig(min_similarity=0.85)).match(features0, features1)
    points0, points1 = features0.valid_keypoints(), features1.valid_keypoints()
    predicted = points0[matches.indices[:, 0]] @ turn[:, :2].T + turn[:, 2]
    is_right = np.linalg.norm(predicted - points1[matches.indices[:, 1]], axis=1) < 3
    assert is_right.sum() > 150 and is_right.mean() > 0.8
    assert features0.orientations is not None and features1.orientations is not None
    orientations0, orientations1 = features0.orientations.numpy(), features1.orientations.numpy()
    turns = orientations1[matches.indices[:, 1]] - orientations0[matches.indices[:, 0]]
    # Counter-clockwise on the screen, where y points down, makes angles smaller.
    errors = np.rad2deg(turns[is_right]) + angle
    assert np.median(np.abs((errors + 180) % 360 - 180)) < 5


@pytest.mark.skipif("LIGHTVO_DATA" not in os.environ, reason="LIGHTVO_DATA is not set")
def test_neighbouring_frames_of_a_drive_match() -> None:
    folder = Path(os.environ["LIGHTVO_DATA"]) / "kitti" / "sequences" / "00" / "image_0"
    images = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in sorted(folder.glob("*.png"))[:2]]
    features = [Orb(OrbConfig()).extract(np.asarray(image, dtype=np.uint8)) for image in images]
    assert all(f.num_valid == 1024 for f in features)
    matches = Nearest(NearestConfig(min_similarity=0.8)).match(*features)
    points0, points1 = (f.valid_keypoints()[matches.indices[:, i]] for i, f in enumerate(features))
    _, inliers = cv2.findFundamentalMat(points0, points1, cv2.USAC_MAGSAC, 1.0, 0.999, 5000)
    assert inliers.sum() > 200
