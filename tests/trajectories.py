"""Generated trajectories for the tests of files, recorder and evaluation."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vo.trajectory import Trajectory
from vo.types import FloatArray

START_NS = 1_403_636_579_763_555_584
INTERVAL_NS = 103_735_912


def rigid(rotation: FloatArray, position: FloatArray) -> FloatArray:
    """(4, 4)."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = rotation, position
    return T


def drive(num_poses: int, seed: int = 0, step_m: float = 1.0) -> FloatArray:
    """(N, 4, 4): a curved path with bumps; every pose is the one before times a motion."""
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(rng.normal((0.0, 0.02, 0.0), 0.01, (num_poses, 3))).as_matrix()
    steps = rng.normal((0.0, 0.0, step_m), 0.02 * step_m, (num_poses, 3))
    poses = [np.eye(4)]
    for turn, step in zip(turns[1:], steps[1:], strict=True):
        poses.append(poses[-1] @ rigid(turn, step))
    return np.array(poses)


def disturbed(poses: FloatArray, seed: int = 1, rotation_rad: float = 0.003, position_m: float = 0.02) -> FloatArray:
    """The same poses with an independent error each, in the frame of the camera."""
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(rng.normal(0.0, rotation_rad, (len(poses), 3))).as_matrix()
    shifts = rng.normal(0.0, position_m, (len(poses), 3))
    return np.array([T @ rigid(R, t) for T, R, t in zip(poses, turns, shifts, strict=True)])


def similar(poses: FloatArray, rotation: FloatArray, position: FloatArray, scale: float) -> FloatArray:
    """The same poses in another world frame and another unit."""
    moved = poses.copy()
    moved[:, :3, :3] = rotation @ poses[:, :3, :3]
    moved[:, :3, 3] = scale * poses[:, :3, 3] @ rotation.T + position
    return moved


def timed(poses: FloatArray, name: str = "trajectory", start_ns: int = START_NS) -> Trajectory:
    """A trajectory at a constant rate."""
    return Trajectory(start_ns + INTERVAL_NS * np.arange(len(poses), dtype=np.int64), poses.copy(), name)
