"""Trajectories and their files: TUM, KITTI and EuRoC, recognised by content and read strictly.

TUM     `timestamp_s tx ty tz qx qy qz qw`, one pose per line.
KITTI   the upper 3x4 of the pose, row by row, one pose per line and no time. Times come from a `times.txt`; where not
        every frame has a pose, `NAME_frames.txt` beside `NAME.txt` holds the frame index of every line.
EuRoC   `timestamp_ns,px,py,pz,qw,qx,qy,qz[,...]`: poses of the BODY, which become poses of the camera with the T_BS
        of the camera's sensor.yaml where that file is known.

Numbers are written so that reading them gives the same float64; times never pass through a float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from vo.output import write_atomically
from vo.sources.textfiles import data_lines, numbers_field, read_text, read_yaml
from vo.sources.timestamps import NS_PER_S, nanoseconds, read_times, seconds_to_ns
from vo.types import FloatArray, SourceError

# Printed rotations are rounded, some to three digits; what is farther off is not a rotation but another format.
_MAX_ROTATION_ERROR = 0.05

_EUROC_HEADER = (
    "#timestamp [ns],p_RS_R_x [m],p_RS_R_y [m],p_RS_R_z [m],q_RS_w [],q_RS_x [],q_RS_y [],q_RS_z []"  # ASL layout
)


class TrajectoryFormat(Enum):
    """How a file writes poses."""

    TUM = "tum"
    KITTI = "kitti"
    EUROC = "euroc"


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """Poses in the order of time, at least one.

    timestamps_ns   (N,) int64, strictly rising; the frame index where `has_times` is False.
    T_world_camera  (N, 4, 4) float64, rigid.
    name            where it came from, for messages and legends.
    frame_indices   (N,) int64, strictly rising, where the frame of every pose is known; else None.
    has_times       False for a KITTI file without times.
    is_of_camera    False where the poses are those of a body that carries the camera and the mounting is unknown.

    Raises ValueError on anything else.
    """

    timestamps_ns: NDArray[np.int64]
    T_world_camera: FloatArray
    name: str = "trajectory"
    frame_indices: NDArray[np.int64] | None = None
    has_times: bool = True
    is_of_camera: bool = True

    def __post_init__(self) -> None:
        num_poses = len(self.timestamps_ns)
        _check_rising("timestamps_ns", self.timestamps_ns, num_poses)
        if self.T_world_camera.shape != (num_poses, 4, 4) or self.T_world_camera.dtype != np.float64:
            have = f"{self.T_world_camera.shape} {self.T_world_camera.dtype}"
            raise ValueError(f"T_world_camera: expected ({num_poses}, 4, 4) float64, got {have}")
        if not _is_rigid(self.T_world_camera):
            raise ValueError("T_world_camera: expected rigid transforms of finite numbers")
        self.T_world_camera.setflags(write=False)
        if self.frame_indices is not None:
            _check_rising("frame_indices", self.frame_indices, num_poses)

    def __len__(self) -> int:
        return len(self.timestamps_ns)

    @property
    def positions(self) -> FloatArray:
        """(N, 3) float64 in the world frame, in the trajectory's own unit."""
        positions: FloatArray = self.T_world_camera[:, :3, 3]
        return positions


def read_trajectory(path: Path, *, times: Path | None = None, sensor: Path | None = None) -> Trajectory:
    """The poses a TUM, KITTI or EuRoC file holds.

    times   for KITTI: one time in seconds per frame. Where it is not given, `times.txt` beside the file is taken, then
            `../sequences/NAME/times.txt` (the layout of the KITTI odometry data set), then the frame index.
    sensor  for EuRoC: sensor.yaml of the camera. Where it is not given, `../cam0/sensor.yaml` is taken for
            `state_groundtruth_estimate0/data.csv`; without one the trajectory says `is_of_camera=False`.

    Rotations are normalised. Raises SourceError with the file and the line for what cannot be read: another number of
    columns, anything but finite numbers, no rotation, times that do not rise, no pose at all.
    """
    lines = data_lines(read_text(path, "expected a trajectory in TUM, KITTI or EuRoC format"))
    if not lines:
        raise SourceError(f"{path}: holds no pose; expected a trajectory in TUM, KITTI or EuRoC format")
    match recognised_format(lines[0][1]):
        case TrajectoryFormat.TUM:
            return _read_tum(path, lines)
        case TrajectoryFormat.KITTI:
            return _read_kitti(path, lines, times)
        case TrajectoryFormat.EUROC:
            return _read_euroc(path, lines, sensor)
        case None:
            raise SourceError(
                f"{path}:{lines[0][0]}: not a pose; expected 8 numbers (TUM), 12 numbers (KITTI) or "
                "at least 8 numbers between commas, the first in nanoseconds (EuRoC)"
            )


def recognised_format(line: str) -> TrajectoryFormat | None:
    """The format that a line with a pose is in, by its columns; None where it is none of them."""
    columns = [column.strip() for column in line.split(",")]
    if len(columns) >= 8 and columns[0].isdecimal():
        return TrajectoryFormat.EUROC
    return {8: TrajectoryFormat.TUM, 12: TrajectoryFormat.KITTI}.get(len(line.split())) if len(columns) == 1 else None


def tum_line(timestamp_ns: int, T_world_camera: FloatArray) -> str:
    """One line of a TUM file for a pose (4, 4), newline included; the time has all its nine digits."""
    return _tum_line(timestamp_ns, T_world_camera[:3, 3], _quat_xyzw(T_world_camera[:3, :3]))


def kitti_line(T_world_camera: FloatArray) -> str:
    """One line of a KITTI file for a pose (4, 4), newline included."""
    return _numbers(T_world_camera[:3].ravel()) + "\n"


def write_tum(trajectory: Trajectory, path: Path) -> None:
    """Writes a TUM file. Raises ValueError without times, OutputError where the file cannot be written."""
    if not trajectory.has_times:
        raise ValueError(f"{trajectory.name}: a TUM file needs times, and this trajectory has frame indices only")
    quaternions = _quat_xyzw(trajectory.T_world_camera[:, :3, :3])
    poses = zip(trajectory.timestamps_ns.tolist(), trajectory.positions, quaternions, strict=True)
    write_atomically(path, "".join(_tum_line(*pose) for pose in poses))


def write_kitti(trajectory: Trajectory, path: Path) -> None:
    """Writes a KITTI file, and `NAME_frames.txt` beside it where the frame indices are known."""
    if trajectory.frame_indices is not None:
        write_atomically(frames_path(path), "".join(f"{index}\n" for index in trajectory.frame_indices.tolist()))
    write_atomically(path, "".join(kitti_line(T) for T in trajectory.T_world_camera))


def write_euroc(trajectory: Trajectory, path: Path, T_body_camera: FloatArray | None = None) -> None:
    """Writes the poses of the body as EuRoC does; `T_body_camera` (4, 4) is the T_BS of sensor.yaml, the identity
    where it is not given. Raises ValueError without times, OutputError where the file cannot be written."""
    if not trajectory.has_times:
        raise ValueError(f"{trajectory.name}: an EuRoC file needs times, and this trajectory has frame indices only")
    T_camera_body = np.eye(4) if T_body_camera is None else np.linalg.inv(T_body_camera)
    T_world_body = trajectory.T_world_camera @ T_camera_body
    quat_xyzw = _quat_xyzw(T_world_body[:, :3, :3])
    rows = np.column_stack([T_world_body[:, :3, 3], quat_xyzw[:, 3], quat_xyzw[:, :3]])
    poses = zip(trajectory.timestamps_ns.tolist(), rows, strict=True)
    lines = [f"{timestamp_ns},{_numbers(row, ',')}\n" for timestamp_ns, row in poses]
    write_atomically(path, _EUROC_HEADER + "\n" + "".join(lines))


def frames_path(kitti_path: Path) -> Path:
    """Where the frame indices of a KITTI file lie: `a/b.txt` -> `a/b_frames.txt`."""
    return kitti_path.with_name(f"{kitti_path.stem}_frames{kitti_path.suffix}")


def normalized_rotations(rotations: FloatArray) -> FloatArray:
    """The rotations (N, 3, 3) closest to the given matrices in the Frobenius norm (orthogonal Procrustes problem)."""
    U, _, Vt = np.linalg.svd(rotations)
    # A reflection is no rotation however close it is: its last singular direction is turned over.
    U[:, :, 2] *= np.linalg.det(U @ Vt)[:, None]
    nearest: FloatArray = U @ Vt
    return nearest


def _read_tum(path: Path, lines: Sequence[tuple[int, str]]) -> Trajectory:
    rows = [_columns(path, number, line.split(), 8) for number, line in lines]
    values = _values(path, lines, [row[1:] for row in rows])
    rotations = _rotations_from_quaternions(path, lines, values[:, 3:])
    timestamps_ns = _times(path, lines, [row[0] for row in rows], in_seconds=True)
    return Trajectory(timestamps_ns, _poses(rotations, values[:, :3]), str(path))


def _read_kitti(path: Path, lines: Sequence[tuple[int, str]], times: Path | None) -> Trajectory:
    values = _values(path, lines, [_columns(path, number, line.split(), 12) for number, line in lines])
    matrices = values.reshape(-1, 3, 4)
    rotations = normalized_rotations(matrices[:, :, :3])
    _refuse_far(path, lines, np.linalg.norm(rotations - matrices[:, :, :3], axis=(1, 2)))
    frame_indices = _read_frame_indices(path, len(lines))
    timestamps_ns = _read_frame_times(path, frame_indices, times)
    has_times = timestamps_ns is not None
    return Trajectory(
        frame_indices.copy() if timestamps_ns is None else timestamps_ns,
        _poses(rotations, matrices[:, :, 3]),
        str(path),
        frame_indices,
        has_times,
    )


def _read_euroc(path: Path, lines: Sequence[tuple[int, str]], sensor: Path | None) -> Trajectory:
    num_columns = len(lines[0][1].split(","))
    rows = [_columns(path, number, line.split(","), num_columns) for number, line in lines]
    values = _values(path, lines, [row[1:8] for row in rows])
    rotations = _rotations_from_quaternions(path, lines, np.roll(values[:, 3:], -1, axis=1))
    timestamps_ns = _times(path, lines, [row[0].strip() for row in rows], in_seconds=False)
    T_world_body = _poses(rotations, values[:, :3])
    if sensor is None and path.parent.name.startswith("state_groundtruth_estimate"):
        beside = path.parent.parent / "cam0" / "sensor.yaml"
        sensor = beside if beside.is_file() else None
    if sensor is None:
        return Trajectory(timestamps_ns, T_world_body, str(path), is_of_camera=False)
    return Trajectory(timestamps_ns, T_world_body @ read_body_camera(sensor), str(path))


def read_body_camera(sensor: Path) -> FloatArray:
    """T_body_camera (4, 4): the T_BS of an EuRoC sensor.yaml, with its rotation normalised."""
    field = read_yaml(sensor, "expected an EuRoC sensor.yaml").get("T_BS")
    if not isinstance(field, dict):
        raise SourceError(f"{sensor}: T_BS: missing; expected a 4x4 matrix with rows, cols and data")
    data = numbers_field(field, "data", f"{sensor}: T_BS")
    if len(data) != 16 or data[12:] != (0.0, 0.0, 0.0, 1.0):
        raise SourceError(f"{sensor}: T_BS: data: expected the 16 numbers of a rigid transform, row by row")
    matrix = np.array(data).reshape(4, 4)
    rotations = normalized_rotations(matrix[None, :3, :3])
    if np.linalg.norm(rotations[0] - matrix[:3, :3]) > _MAX_ROTATION_ERROR:
        raise SourceError(f"{sensor}: T_BS: data: the upper left 3x3 is not a rotation")
    T_body_camera: FloatArray = _poses(rotations, matrix[None, :3, 3])[0]
    return T_body_camera


def _read_frame_indices(path: Path, num_poses: int) -> NDArray[np.int64]:
    """Frame of every line: from NAME_frames.txt, or the line's own position."""
    source = frames_path(path)
    if not source.is_file():
        return np.arange(num_poses, dtype=np.int64)
    lines = data_lines(read_text(source, "expected one frame index per line"))
    # A recorder that is killed may have written the index of a pose that never came.
    if len(lines) not in (num_poses, num_poses + 1):
        raise SourceError(f"{source}: {len(lines)} frame indices for the {num_poses} poses of {path.name}")
    return _times(source, lines[:num_poses], [line for _, line in lines[:num_poses]], in_seconds=False)


def _read_frame_times(path: Path, frame_indices: NDArray[np.int64], times: Path | None) -> NDArray[np.int64] | None:
    """Time in ns of every pose of a KITTI file, or None where there is no file of times."""
    if times is None:
        places = (path.parent / "times.txt", path.parent.parent / "sequences" / path.stem / "times.txt")
        times = next((place for place in places if place.is_file()), None)
    if times is None:
        return None
    times_ns = read_times(times, "expected one time in seconds per frame")
    if frame_indices[-1] >= len(times_ns):
        raise SourceError(f"{times}: {len(times_ns)} times, but {path} has a pose for frame {frame_indices[-1]}")
    timestamps_ns = np.array(times_ns, dtype=np.int64)[frame_indices]
    falls = np.flatnonzero(np.diff(timestamps_ns) <= 0)
    if len(falls):
        raise SourceError(f"{times}: the time of frame {frame_indices[falls[0] + 1]} does not rise")
    return timestamps_ns


def _columns(path: Path, number: int, columns: list[str], num_columns: int) -> list[str]:
    if len(columns) != num_columns:
        raise SourceError(f"{path}:{number}: {len(columns)} columns; expected {num_columns} as in the first pose")
    return columns


def _values(path: Path, lines: Sequence[tuple[int, str]], rows: Sequence[Sequence[str]]) -> FloatArray:
    """The numbers of every line as float64; raises SourceError for what is no finite number."""
    return np.array([_line_values(path, number, row) for (number, _), row in zip(lines, rows, strict=True)])


def _line_values(path: Path, number: int, row: Sequence[str]) -> list[float]:
    values = []
    for text in row:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SourceError(f"{path}:{number}: {text.strip()!r} is not a finite number")
        values.append(value)
    return values


def _times(
    path: Path, lines: Sequence[tuple[int, str]], texts: Sequence[str], *, in_seconds: bool
) -> NDArray[np.int64]:
    """Strictly rising whole numbers, from decimals of seconds or as they are; raises SourceError with the line."""
    parse = seconds_to_ns if in_seconds else nanoseconds
    times: list[int] = []
    for (number, _), text in zip(lines, texts, strict=True):
        try:
            times.append(parse(text))
        except ValueError as error:
            unit = "seconds" if in_seconds else "whole numbers"
            raise SourceError(f"{path}:{number}: {error}; expected {unit} in the first column") from None
        if len(times) > 1 and times[-1] <= times[-2]:
            raise SourceError(f"{path}:{number}: {text} does not rise above the line before; sort, and drop doubles")
    return np.array(times, dtype=np.int64)


def _rotations_from_quaternions(path: Path, lines: Sequence[tuple[int, str]], quat_xyzw: FloatArray) -> FloatArray:
    """(N, 3, 3) of nearly unit quaternions (N, 4)."""
    _refuse_far(path, lines, np.abs(np.linalg.norm(quat_xyzw, axis=1) - 1.0))
    rotations: FloatArray = Rotation.from_quat(quat_xyzw).as_matrix()
    return rotations


def _refuse_far(path: Path, lines: Sequence[tuple[int, str]], errors: FloatArray) -> None:
    """Raise SourceError for the first line whose rotation is off by too much to be rounding."""
    far = np.flatnonzero(errors > _MAX_ROTATION_ERROR)
    if len(far):
        raise SourceError(
            f"{path}:{lines[far[0]][0]}: not a rotation: off by {errors[far[0]]:.3g} from the nearest one"
        )


def _poses(rotations: FloatArray, positions: FloatArray) -> FloatArray:
    """(N, 4, 4) from (N, 3, 3) and (N, 3)."""
    poses = np.tile(np.eye(4), (len(rotations), 1, 1))
    poses[:, :3, :3] = rotations
    poses[:, :3, 3] = positions
    return poses


def _tum_line(timestamp_ns: int, position: FloatArray, quat_xyzw: FloatArray) -> str:
    if timestamp_ns < 0:
        raise ValueError(f"timestamp_ns: expected zero or more, got {timestamp_ns}")
    seconds = f"{timestamp_ns // NS_PER_S}.{timestamp_ns % NS_PER_S:09d}"
    return f"{seconds} {_numbers(position)} {_numbers(quat_xyzw)}\n"


def _quat_xyzw(rotations: FloatArray) -> FloatArray:
    """Unit quaternions (..., 4), w >= 0, of rotations (..., 3, 3)."""
    quaternions: FloatArray = Rotation.from_matrix(rotations).as_quat(canonical=True)
    return quaternions


def _numbers(values: FloatArray, separator: str = " ") -> str:
    """Shortest decimals that read back as the same float64."""
    return separator.join(map(repr, values.tolist()))


def _check_rising(name: str, values: NDArray[np.int64], length: int) -> None:
    if values.shape != (length,) or values.dtype != np.int64 or length == 0:
        raise ValueError(f"{name}: expected ({length},) int64 with at least one entry, got {values.shape}")
    if np.any(values[1:] <= values[:-1]):
        raise ValueError(f"{name}: expected to rise strictly")
    values.setflags(write=False)


def _is_rigid(T: FloatArray) -> bool:
    """Whether all of (N, 4, 4) are rotations with a translation, up to rounding."""
    if not np.isfinite(T).all() or not np.array_equal(T[:, 3], np.tile([0.0, 0.0, 0.0, 1.0], (len(T), 1))):
        return False
    R = T[:, :3, :3]
    errors = np.abs(R @ np.swapaxes(R, 1, 2) - np.eye(3)).max()
    return bool(errors < 1e-6 and (np.linalg.det(R) > 0).all())
