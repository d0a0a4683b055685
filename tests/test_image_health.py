"""What is wrong with images, made wrong on purpose from the bundled clip; and that nothing is said of sound ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vo.image_health import HealthLog, HealthMonitor
from vo.sources import open_source
from vo.sources.inspected import InspectedSource
from vo.types import ImageCondition, ImageHealth

Image = NDArray[np.uint8]
NUM_SOUND = 40


@cache
def clip() -> tuple[Image, ...]:
    source = open_source("demo")
    images = [frame.image for frame, _ in zip(source.frames(), range(120), strict=False)]
    source.close()
    return tuple(images)


def with_noise(image: NDArray[np.floating], sigma: float, seed: int) -> Image:
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def dark(image: Image, index: int) -> Image:
    """Lights off: a hundredth of the light, under the noise that a sensor adds at its highest gain."""
    return with_noise(image / 100.0 + 6, 4.0, index)


def covered(image: Image, index: int) -> Image:
    """A finger on the lens: a reddish glow without any edge."""
    glow = np.linspace(40, 60, image.shape[1])[None, :, None] * np.array([1.6, 0.5, 0.4])
    return with_noise(np.broadcast_to(glow, image.shape), 3.0, index)


def overexposed(image: Image, index: int) -> Image:
    return np.clip(image.astype(np.int32) * 4 + 230, 0, 255).astype(np.uint8)


def blurred(image: Image, index: int) -> Image:
    """Motion blur of 15 px along the rows."""
    return np.asarray(cv2.blur(image, (15, 1)), np.uint8)


def conditions_of(images: list[Image]) -> list[tuple[ImageCondition, ...]]:
    monitor = HealthMonitor()
    return [monitor.look(image).conditions for image in images]


def test_nothing_is_wrong_with_the_clip_but_its_blur() -> None:
    found = [condition for conditions in conditions_of(list(clip())) for condition in conditions]
    assert set(found) <= {ImageCondition.BLURRED}
    assert len(found) <= 3


def test_figures_of_known_images() -> None:
    """A step edge has a quarter of its energy within 2 of 8 px: the root of that is one half."""
    edges = np.zeros((480, 640), np.uint8)
    edges[:, ::2] = 0
    edges[:, 320:] = 200
    edges[240:, :] = 255 - edges[240:, :]
    health = HealthMonitor().look(edges)
    assert health.sharpness == pytest.approx(0.5, abs=0.01)
    white = HealthMonitor().look(np.full((60, 80, 3), 255, np.uint8))
    assert (white.brightness, white.contrast, white.clipped) == (1.0, 0.0, 1.0)
    half = np.zeros((480, 640, 3), np.uint8)
    half[:, 320:] = 255
    health = HealthMonitor().look(half)
    assert (health.brightness, health.contrast) == (pytest.approx(0.5, abs=0.01), pytest.approx(1.0, abs=0.01))


def test_a_ramp_is_as_smeared_as_it_can_be() -> None:
    ramp = np.tile((np.arange(640) // 3).astype(np.uint8), (480, 1))
    assert HealthMonitor().look(ramp).sharpness == pytest.approx(0.28, abs=0.04)


@pytest.mark.parametrize(
    ("spoil", "condition", "is_blind"),
    [
        (dark, ImageCondition.DARK, True),
        (covered, ImageCondition.COVERED, True),
        (overexposed, ImageCondition.OVEREXPOSED, True),
        (blurred, ImageCondition.BLURRED, False),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_what_is_wrong_is_named_from_the_first_frame_to_the_last(
    spoil: Callable[[Image, int], Image], condition: ImageCondition, is_blind: bool, channels: int
) -> None:
    images = [
        image if index < NUM_SOUND or index >= NUM_SOUND + 10 else spoil(image, index)
        for index, image in enumerate(clip()[: NUM_SOUND + 20])
    ]
    if channels == 1:
        images = [np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8) for image in images]
    found = conditions_of(images)
    assert all(condition in conditions for conditions in found[NUM_SOUND : NUM_SOUND + 10])
    assert not any(condition in conditions for conditions in found[:NUM_SOUND])
    assert not any(condition in conditions for conditions in found[NUM_SOUND + 10 :])
    health = ImageHealth(0, 0, 0, 0, found[NUM_SOUND])
    assert health.is_blind is is_blind


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_size_of_the_image_does_not_matter(scale: float) -> None:
    image = np.asarray(cv2.resize(clip()[0], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    health = HealthMonitor().look(image)
    assert health.conditions == ()
    assert health.brightness == pytest.approx(HealthMonitor().look(clip()[0]).brightness, abs=0.01)
    for spoil, condition in ((dark, ImageCondition.DARK), (covered, ImageCondition.COVERED)):
        assert HealthMonitor().look(spoil(image, 0)).conditions == (condition,)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 9), (16, 16, 3), (40, 4, 3)])
def test_no_image_is_too_small(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    monitor = HealthMonitor()
    for _ in range(10):
        health = monitor.look(rng.integers(0, 256, shape, np.uint8))
        assert all(np.isfinite(getattr(health, name)) for name in ("brightness", "contrast", "sharpness", "clipped"))


def test_an_exposure_that_jumps() -> None:
    images = [
        np.asarray(cv2.convertScaleAbs(image, alpha=1.0 if i % 40 < 20 else 0.6)) for i, image in enumerate(clip())
    ]
    found = [i for i, conditions in enumerate(conditions_of(images)) if ImageCondition.EXPOSURE_JUMP in conditions]
    assert found == [20, 40, 60, 80, 100]


@pytest.mark.parametrize(("period", "is_flicker"), [(3.0, True), (5.0, True), (30.0, False)])
def test_lamps_on_the_mains(period: float, is_flicker: bool) -> None:
    """A swing of 6 %: 100 Hz light at 30 frames/s comes back every 3 frames. Slow swings are what any camera sees."""
    images = [
        np.asarray(cv2.convertScaleAbs(image, alpha=0.9 + 0.06 * np.sin(2 * np.pi * index / period)))
        for index, image in enumerate(clip())
    ]
    found = [ImageCondition.FLICKER in conditions for conditions in conditions_of(images)]
    assert not any(found[:30])
    assert any(found[45:]) is is_flicker
    if is_flicker:
        assert np.mean(found[45:]) > 0.9


def test_the_same_image_again() -> None:
    image = clip()[3]
    found = conditions_of([clip()[0], image, image.copy(), image.copy(), clip()[4]])
    assert [ImageCondition.FROZEN in conditions for conditions in found] == [False, False, True, True, False]
    black = np.zeros_like(image)
    assert conditions_of([black, black])[1] == (ImageCondition.DARK,)


def test_what_is_said_is_said_once() -> None:
    """A condition that comes and goes from frame to frame is one; only after 30 frames without it, it is over."""
    said: list[str] = []
    log = HealthLog(said.append)
    sound = ImageHealth(0.5, 0.5, 0.5, 0.0)
    is_dark = dataclasses.replace(sound, conditions=(ImageCondition.DARK,))
    jumps = dataclasses.replace(sound, conditions=(ImageCondition.EXPOSURE_JUMP,))
    for index in range(200):
        log.note(index, is_dark if 50 <= index < 80 and index % 3 == 0 else jumps if index == 150 else sound)
    assert len(said) == 2
    assert said[0].startswith("image: dark (lights off") and said[0].endswith("from frame 51")
    assert said[1] == "image: no longer dark, after frame 78"
    assert log.counts == {ImageCondition.DARK: 10, ImageCondition.EXPOSURE_JUMP: 1}
    assert log.last == sound


def test_a_source_that_is_inspected_is_the_same_source() -> None:
    seen: list[int] = []
    source = InspectedSource(open_source("demo"), lambda index, health: seen.append(index))
    plain = open_source("demo")
    assert (source.name, source.is_live, source.num_frames) == (plain.name, plain.is_live, plain.num_frames)
    assert (source.camera.width, source.ground_truth, source.stereo) == (640, plain.ground_truth, None)
    frames = source.frames()
    first, second = next(frames), next(frames)
    assert first.health is not None and first.health.conditions == ()
    assert (seen, second.index, source.skipped) == ([0, 1], 1, ())
    source.close()
    assert list(frames) == []
