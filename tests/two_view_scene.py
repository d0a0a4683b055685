"""A forward motion with a turn, seen by two cameras: exact truth for the tests of geometry; and motions at random."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vo.geometry import exp_se3, invert_pose, rotation_angle, transform

FOCAL_PX = 700.0
twists = arrays(np.float64, 6, elements=st.floats(-1.5, 1.5))


def scene(seed: int = 0, num_points: int = 500, noise_px: float = 0.0):
    """A forward motion with a turn: T_camera0_camera1, points in camera 0, rays in both cameras."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([-8, -3, 4], [8, 3, 30], (num_points, 3))
    T = exp_se3(np.array([0.15, -0.05, 1.0, 0.01, 0.04, -0.01]))
    moved = transform(invert_pose(T), points)
    rays0, rays1 = points[:, :2] / points[:, 2:], moved[:, :2] / moved[:, 2:]
    noise = rng.normal(0, noise_px / FOCAL_PX, (2, num_points, 2))
    return T, points, rays0 + noise[0], rays1 + noise[1]


def with_outliers(rays1, share: float = 0.25, seed: int = 2):
    """A copy of rays of which so many matches are wrong that only a search can be trusted, and which ones they are."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(rays1)) < share
    rays1 = rays1.copy()
    rays1[wrong] += rng.normal(0, 60 / FOCAL_PX, (wrong.sum(), 2))
    return rays1, wrong


def pose_error(estimate, truth):
    """Rotation error and angle between the translations, both in degrees."""
    rotation = np.rad2deg(rotation_angle(estimate[:3, :3].T @ truth[:3, :3]))
    a, b = estimate[:3, 3], truth[:3, 3]
    direction = np.arctan2(np.linalg.norm(np.cross(a, b)), a @ b)
    return rotation, np.rad2deg(direction)
