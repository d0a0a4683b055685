"""How the camera of the sample clip is carried through the room.

A cubic spline through a few stations is the intended path; steps and the tremor of hands are added as sums of sines,
so that the pose at any time is an exact function: sub-exposures and ground truth come from the same one.
"""

from __future__ import annotations

import numpy as np
from sample_geometry import FloatArray
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

DURATION_S = 11.0
# Time s; position x, y, z m; yaw (from north towards east), pitch (up) and roll deg; exposure.
STATIONS = np.array(
    [
        (0.0, 0.98, 0.82, 1.42, 15.0, -8.0, 0.5, 1.00),
        (1.4, 1.45, 0.78, 1.45, 7.0, -9.0, -1.0, 1.02),
        (3.0, 2.16, 0.95, 1.42, 3.0, -13.0, 0.5, 1.06),
        (4.2, 2.60, 1.32, 1.36, 8.0, -22.0, 2.0, 1.10),
        (5.0, 2.74, 1.49, 1.33, 15.0, -25.0, 1.5, 1.10),
        (5.8, 2.76, 1.52, 1.33, 18.0, -23.0, 1.0, 1.08),
        (6.8, 3.02, 1.30, 1.40, 66.0, -9.0, -2.0, 0.92),
        (7.5, 3.06, 1.22, 1.43, 82.0, -8.0, -0.5, 0.86),
        (8.6, 2.80, 1.34, 1.46, 70.0, -10.0, 1.0, 0.90),
        (10.0, 2.18, 1.12, 1.47, 38.0, -11.0, 0.0, 1.00),
        (11.0, 1.74, 0.98, 1.45, 17.0, -9.0, 0.5, 1.04),
    ]
)
START_RATES = (0.22, -0.04, 0.02, -2.0, 0.0, 0.0, 0.0)
END_RATES = (-0.35, -0.10, 0.0, -18.0, 1.0, 0.0, 0.0)
TREMOR_M, TREMOR_DEG = 0.0022, 0.16
STEP_HZ, STEP_M_PER_MPS = 1.85, 0.014


def camera_poses(times_s: FloatArray, seed: int = 7) -> FloatArray:
    """(N, 4, 4) T_world_camera at times (N,); camera x right, y down, z forward, world z up."""
    spline = _spline()
    stations = spline(times_s)
    tremor = _tremor(times_s, seed)
    position = stations[:, :3] + TREMOR_M * tremor[:, :3]
    speed = np.linalg.norm(spline(times_s, 1)[:, :3], axis=1)
    phase = 2.0 * np.pi * STEP_HZ * times_s
    position[:, 2] += STEP_M_PER_MPS * speed * np.sin(phase)
    position[:, 0] += 0.5 * STEP_M_PER_MPS * speed * np.sin(phase / 2.0 + 0.7)
    yaw, pitch, roll = np.deg2rad(stations[:, 3:6] + TREMOR_DEG * tremor[:, 3:]).T
    poses = np.tile(np.eye(4), (len(times_s), 1, 1))
    poses[:, :3, :3] = _orientation(yaw, pitch, roll)
    poses[:, :3, 3] = position
    return poses


def exposure_gain(time_s: float) -> float:
    """What an automatic exposure would multiply the image with: less in front of the window."""
    return float(_spline()(time_s)[6])


def _spline() -> CubicSpline:
    return CubicSpline(STATIONS[:, 0], STATIONS[:, 1:], bc_type=((1, START_RATES), (1, END_RATES)))


def _tremor(times_s: FloatArray, seed: int, num_sines: int = 9) -> FloatArray:
    """(N, 6) of unit root mean square: sines between 0.6 and 7 Hz, weaker the faster."""
    rng = np.random.default_rng((seed, 1))
    frequency = np.geomspace(0.6, 7.0, num_sines)[:, None] * rng.uniform(0.9, 1.1, (num_sines, 6))
    amplitude = frequency**-0.9 * rng.uniform(0.6, 1.4, (num_sines, 6))
    amplitude *= np.sqrt(2.0 / (amplitude**2).sum(axis=0))
    phase = rng.uniform(0.0, 2.0 * np.pi, (num_sines, 6))
    return np.asarray((amplitude * np.sin(2.0 * np.pi * frequency * times_s[:, None, None] + phase)).sum(axis=1))


def _orientation(yaw: FloatArray, pitch: FloatArray, roll: FloatArray) -> FloatArray:
    """(N, 3, 3) world from camera."""
    forward = np.stack((np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)), axis=1)
    right = np.stack((np.cos(yaw), -np.sin(yaw), np.zeros_like(yaw)), axis=1)
    upright = np.stack((right, np.cross(forward, right), forward), axis=2)
    return np.asarray(upright @ Rotation.from_rotvec(roll[:, None] * (0.0, 0.0, 1.0)).as_matrix())
