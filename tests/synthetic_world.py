"""A world of points with known descriptors, seen by a camera on a known path: exact truth for the odometry's tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from frontends.base import Features, Matches
from vo.geometry import exp_se3, invert_pose, project, transform
from vo.types import Camera, Frame

CAMERA = Camera(640, 480, np.array([[500.0, 0.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]]))


@dataclass(frozen=True)
class World:
    """points (N, 3) in the world and their unit descriptors (N, 64)."""

    points: NDArray[np.float64]
    descriptors: NDArray[np.float32]


def make_world(num_points: int, low: tuple[float, ...], high: tuple[float, ...], seed: int = 0) -> World:
    rng = np.random.default_rng(seed)
    descriptors = rng.normal(size=(num_points, 64)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    return World(rng.uniform(low, high, (num_points, 3)), descriptors)


def driving_path(num_frames: int) -> list[NDArray[np.float64]]:
    """T_world_camera of a camera that drives forward and weaves, 0.2 units a frame."""
    poses = [np.eye(4)]
    for i in range(num_frames - 1):
        turn = 0.02 * np.sin(i / 5)
        poses.append(poses[-1] @ exp_se3(np.array([0.03 * np.sin(i / 3), 0.0, 0.2, 0.0, turn, 0.002])))
    return poses


def observe(
    world: World,
    T_world_camera: NDArray[np.float64],
    noise_px: float = 0.0,
    rng: np.random.Generator | None = None,
    camera: Camera = CAMERA,
) -> Features:
    """Features of all points inside the image."""
    pixels = project(transform(invert_pose(T_world_camera), world.points), camera)
    inside = (pixels > 0).all(axis=1) & (pixels < [camera.width - 1, camera.height - 1]).all(axis=1)
    pixels = pixels[inside]
    if rng is not None:
        pixels = pixels + rng.normal(0.0, noise_px, pixels.shape)
    return as_features(pixels, world.descriptors[inside], camera)


def as_features(pixels: NDArray[np.float64], descriptors: NDArray[np.float32], camera: Camera = CAMERA) -> Features:
    num_points = len(pixels)
    return Features(
        torch.from_numpy(pixels.astype(np.float32)),
        torch.ones(num_points),
        torch.from_numpy(descriptors.copy()),
        num_points,
        (camera.width, camera.height),
        "synthetic",
    )


def empty_features() -> Features:
    return as_features(np.zeros((0, 2)), np.zeros((0, 64), np.float32))


def match_exactly(features0: Features, features1: Features) -> Matches:
    """Matches equal descriptors."""
    if features0.num_valid == 0 or features1.num_valid == 0:
        return Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32))
    similarity = (features0.descriptors @ features1.descriptors.T).numpy()
    best = similarity.argmax(axis=1)
    rows = np.flatnonzero(similarity[np.arange(len(best)), best] > 0.999)
    indices = np.stack([rows, best[rows]], axis=1).astype(np.int64)
    return Matches(indices, np.ones(len(indices), np.float32))


def as_frame(index: int, camera: Camera = CAMERA) -> Frame:
    """A frame of the right size; the tests' features do not come from its image."""
    image = np.zeros((camera.height, camera.width), np.uint8)
    return Frame(index, index * 100_000_000, image, camera)
