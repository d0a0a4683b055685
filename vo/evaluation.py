"""How far a trajectory is from the truth: absolute and relative pose errors and the KITTI odometry metric.

Alignment, absolute and relative errors are evo's (its core only: evo.tools would write settings into the home
directory). What the figures mean:

association   Poses pair up by time, each with the nearest of the other trajectory and only where that is mutual, at
              most `max_time_difference_s` apart; by frame index where both files know it and one has no times. All
              figures are over the associated poses, in the order of time.
alignment     of the trajectory to the truth, by least squares over the positions (Umeyama 1991): "sim3" rotation,
              translation and scale; "se3" rotation and translation; "scale" the scale alone; "none". The scale of
              "scale" is that of the similarity. Positions on a line or a point leave the rotation open; then it is
              the mean of the rotations between associated orientations, and a note says so.
ATE           distance of the aligned position to the true one (Sturm et al. 2012, section IV); RMSE, m.
RPE           the motion from each pose to the next against the true motion (Sturm et al. 2012, section IV):
              E = (Q_i^-1 Q_i+1)^-1 (P_i^-1 P_i+1) with the truth Q and the aligned estimate P. Its rotation angle, as
              the mean in deg, and its translation, as the RMSE in m; the latter depends on the scale of the alignment.
RPE by way    the same error over stretches of the true path: each ends at the first pose that is at least the distance
              away along it, and the next one begins there (evo_rpe with -u m --pairs_from_reference). The distance is
              the largest power of ten, in m, that the path holds ten times; translation as RMSE in m, rotation as mean
              in deg, over each stretch.
KITTI         relative errors over segments of the true path (Geiger et al. 2012, section 3.1): from every 10th pose on
              to the first one that is more than the length away along the path; translation in percent of the length
              and rotation in deg per 100 m, means over all segments of all lengths. Lengths are 100, 200, ... 800 m;
              where the path holds none of these they are 10, 20, ... 80 m, and so on by tens, down to 0.1 mm.
coverage      associated poses / frames that could have had one. These are the frames handed in that have a true pose,
              where the caller knows the frames; the poses of a truth that has one for each frame (KITTI files), else
              what fits into the time range of the truth at the rate of the trajectory, or the poses of the truth
              where they are fewer. The rate is that of the 10th percentile of the intervals, so that gaps count as
              gaps; a file that holds keyframes only is taken at the rate of its keyframes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from evo.core.metrics import APE, RPE, PoseRelation, StatisticsType, Unit
from evo.core.trajectory import PosePath3D
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from vo.trajectory import Trajectory
from vo.types import FloatArray, SourceError

Align = Literal["sim3", "se3", "scale", "none"]

DEFAULT_MAX_TIME_DIFFERENCE_S = 0.01

_KITTI_LENGTHS_M = tuple(100.0 * count for count in range(1, 9))
_KITTI_STEP = 10
_SHORTEST_POWER = 6  # the shortest segments are 0.1 mm
_LONGEST_DISTANCE_M = 100.0
_STRETCHES_OF_A_PATH = 10
_MIN_POSES = 3
_MIN_SECOND_DIRECTION = 1e-12
_MIN_COVARIANCE_M2 = 1e-15
# A truth that stays within this has nothing to take a scale from but its own noise.
_STANDING_STILL_M = 0.01

_JSON_KEYS = (
    "ate_rmse_m",
    "rpe_rot_deg",
    "rpe_trans_m",
    "rpe_distance_m",
    "rpe_distance_rot_deg",
    "rpe_distance_trans_m",
    "kitti_t_err_percent",
    "kitti_r_err_deg_per_100m",
    "coverage",
    "scale",
    "num_poses",
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one trajectory; the module's docstring defines them.

    kitti_*                None where the truth does not move far enough for any segment.
    scale                  factor on the trajectory's translations that the alignment applied; 1 without one.
    num_poses              associated poses.
    num_expected_poses     what coverage is relative to.
    path_length_m          of the truth over the associated poses.
    segment_lengths_m      of the KITTI metric, those that occurred, with `num_segments` segments in all.
    notes                  what a reader must know to read the figures right, one sentence each.
    rpe_distance_*         over stretches of `rpe_distance_m` of the true path; None where the truth does not move.
    """

    ate_rmse_m: float
    rpe_rot_deg: float
    rpe_trans_m: float
    kitti_t_err_percent: float | None
    kitti_r_err_deg_per_100m: float | None
    coverage: float
    scale: float
    num_poses: int
    align: Align
    num_expected_poses: int
    num_trajectory_poses: int
    num_truth_poses: int
    path_length_m: float
    segment_lengths_m: tuple[float, ...]
    num_segments: int
    trajectory_name: str
    truth_name: str
    notes: tuple[str, ...]
    rpe_distance_m: float | None = None
    rpe_distance_rot_deg: float | None = None
    rpe_distance_trans_m: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """p_truth = scale * rotation @ p_trajectory + translation.

    rotation (3, 3), translation (3,) m; `is_unique` is False where the positions left the rotation open.
    """

    rotation: FloatArray
    translation: FloatArray
    scale: float
    is_unique: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class SegmentErrors:
    """Errors over S segments of the true path.

    first_rows (S,) int64 row of the associated pose a segment starts at; lengths_m (S,);
    t_err_percent (S,) of the length; r_err_deg_per_100m (S,).
    """

    first_rows: NDArray[np.int64]
    lengths_m: FloatArray
    t_err_percent: FloatArray
    r_err_deg_per_100m: FloatArray

    def __len__(self) -> int:
        return len(self.lengths_m)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A trajectory beside the truth, pose by pose.

    rows, truth_rows   (N,) int64: the associated poses in `trajectory` and in `truth`, rising.
    position_errors_m  (N,) distance after alignment.
    rotation_errors_deg, translation_errors_m   (N - 1,) of the motion from each associated pose to the next.
    distances_m        (N,) way of the truth up to each associated pose.
    segments           of the KITTI metric.
    evaluation         the figures.
    """

    trajectory: Trajectory
    truth: Trajectory
    rows: NDArray[np.int64]
    truth_rows: NDArray[np.int64]
    alignment: Alignment
    position_errors_m: FloatArray
    rotation_errors_deg: FloatArray
    translation_errors_m: FloatArray
    distances_m: FloatArray
    segments: SegmentErrors
    evaluation: Evaluation


def evaluate(
    trajectory: Trajectory,
    truth: Trajectory,
    align: Align = "sim3",
    *,
    max_time_difference_s: float = DEFAULT_MAX_TIME_DIFFERENCE_S,
    frame_timestamps_ns: NDArray[np.int64] | None = None,
) -> Evaluation:
    """The figures alone; see `compare`."""
    return compare(
        trajectory, truth, align, max_time_difference_s=max_time_difference_s, frame_timestamps_ns=frame_timestamps_ns
    ).evaluation


def compare(
    trajectory: Trajectory,
    truth: Trajectory,
    align: Align = "sim3",
    *,
    max_time_difference_s: float = DEFAULT_MAX_TIME_DIFFERENCE_S,
    frame_timestamps_ns: NDArray[np.int64] | None = None,
    num_expected_poses: int | None = None,
) -> Comparison:
    """Associate, align and measure, as the module's docstring defines it.

    frame_timestamps_ns  (F,) int64, rising: every frame that was processed, for an exact coverage.
    num_expected_poses   that coverage is relative to, where the caller knows it already.

    Raises SourceError where the two share fewer than three poses or cannot be associated at all.
    """
    max_difference_ns = round(max_time_difference_s * 1e9)
    rows, truth_rows = associate(trajectory, truth, max_difference_ns)
    true_poses = PosePath3D(poses_se3=list(truth.T_world_camera[truth_rows]))
    poses, alignment = _aligned(trajectory.T_world_camera[rows], true_poses, align)
    absolute = _measured(APE(PoseRelation.translation_part), true_poses, poses)
    rotation = _measured(RPE(PoseRelation.rotation_angle_deg, 1, Unit.frames), true_poses, poses)
    translation = _measured(RPE(PoseRelation.translation_part, 1, Unit.frames), true_poses, poses)
    distance_m, distance_rot_deg, distance_trans_m = _errors_by_distance(true_poses, poses)
    segments = segment_errors(np.array(poses.poses_se3), np.array(true_poses.poses_se3))
    num_expected = num_expected_poses or _num_expected(trajectory, truth, frame_timestamps_ns, max_difference_ns)
    lengths_m = tuple(float(length) for length in np.unique(segments.lengths_m))
    evaluation = Evaluation(
        ate_rmse_m=float(absolute.get_statistic(StatisticsType.rmse)),
        rpe_rot_deg=float(rotation.get_statistic(StatisticsType.mean)),
        rpe_trans_m=float(translation.get_statistic(StatisticsType.rmse)),
        kitti_t_err_percent=float(segments.t_err_percent.mean()) if len(segments) else None,
        kitti_r_err_deg_per_100m=float(segments.r_err_deg_per_100m.mean()) if len(segments) else None,
        coverage=min(1.0, len(rows) / num_expected),
        scale=alignment.scale,
        num_poses=len(rows),
        align=align,
        num_expected_poses=num_expected,
        num_trajectory_poses=len(trajectory),
        num_truth_poses=len(truth),
        path_length_m=float(true_poses.path_length),
        segment_lengths_m=lengths_m,
        num_segments=len(segments),
        trajectory_name=trajectory.name,
        truth_name=truth.name,
        notes=_notes(trajectory, truth, align, alignment, true_poses.positions_xyz, lengths_m),
        rpe_distance_m=distance_m,
        rpe_distance_rot_deg=distance_rot_deg,
        rpe_distance_trans_m=distance_trans_m,
    )
    return Comparison(
        trajectory,
        truth,
        rows,
        truth_rows,
        alignment,
        absolute.error,
        rotation.error,
        translation.error,
        np.asarray(true_poses.distances, np.float64),
        segments,
        evaluation,
    )


def associate(
    trajectory: Trajectory, truth: Trajectory, max_difference_ns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows (N,) of the two trajectories that belong together, both rising; N is at least three.

    Raises SourceError where there are fewer, saying what the two files cover.
    """
    names = f"{trajectory.name} and {truth.name}"
    if trajectory.has_times and truth.has_times:
        rows = mutual_nearest(trajectory.timestamps_ns, truth.timestamps_ns, max_difference_ns)
        ranges = f"{_time_range(trajectory)} and {_time_range(truth)}"
        shared = f"at most {max_difference_ns / 1e9:g} s apart; they cover {ranges}"
    elif trajectory.frame_indices is not None and truth.frame_indices is not None:
        rows = mutual_nearest(trajectory.frame_indices, truth.frame_indices, 0)
        shared = "of the same frame"
    else:
        untimed = truth if trajectory.has_times else trajectory
        raise SourceError(f"{untimed.name}: has no times to associate the poses by; put a times.txt beside it")
    if len(rows[0]) < _MIN_POSES:
        raise SourceError(f"{names}: {len(rows[0])} poses {shared}; at least {_MIN_POSES} are needed")
    return rows


def mutual_nearest(
    times0: NDArray[np.int64], times1: NDArray[np.int64], max_difference: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of two rising sequences whose entries are each other's nearest; the earlier of two as near."""
    nearest1, nearest0 = _nearest(times0, times1), _nearest(times1, times0)
    rows0 = np.arange(len(times0), dtype=np.int64)
    is_pair = (nearest0[nearest1] == rows0) & (np.abs(times1[nearest1] - times0) <= max_difference)
    return rows0[is_pair], nearest1[is_pair]


def segment_errors(T_world_camera: FloatArray, truth_T_world_camera: FloatArray) -> SegmentErrors:
    """KITTI's relative errors of poses (N, 4, 4) that belong together row by row; none where the truth stands still."""
    steps_m = np.linalg.norm(np.diff(truth_T_world_camera[:, :3, 3], axis=0), axis=1)
    distances_m = np.concatenate([[0.0], np.cumsum(steps_m)])
    lengths_m = _segment_lengths(float(distances_m[-1]))
    first_rows, length_columns = np.meshgrid(np.arange(0, len(distances_m), _KITTI_STEP), lengths_m, indexing="ij")
    last_rows = np.searchsorted(distances_m, distances_m[first_rows] + length_columns, side="right")
    is_inside = last_rows < len(distances_m)
    first, last, lengths = first_rows[is_inside], last_rows[is_inside], length_columns[is_inside]
    errors = _relative(
        _relative(T_world_camera[first], T_world_camera[last]),
        _relative(truth_T_world_camera[first], truth_T_world_camera[last]),
    )
    angles_deg = np.rad2deg(Rotation.from_matrix(errors[:, :3, :3]).magnitude()) if len(errors) else np.zeros(0)
    return SegmentErrors(
        first.astype(np.int64),
        lengths,
        np.linalg.norm(errors[:, :3, 3], axis=1) / lengths * 100.0,
        angles_deg / lengths * 100.0,
    )


def evaluation_json(evaluation: Evaluation) -> str:
    """The figures alone, as `vo eval --json` prints them."""
    tree = {key: getattr(evaluation, key) for key in _JSON_KEYS}
    return json.dumps(tree, indent=2, allow_nan=False)


def format_evaluation(evaluation: Evaluation) -> str:
    """The figures for people, a few lines without a newline at the end."""
    e = evaluation
    lines = [
        f"trajectory    {e.trajectory_name}",
        f"ground truth  {e.truth_name}",
        f"alignment     {e.align}, scale {e.scale:.6g}",
        f"ATE           {e.ate_rmse_m:.4g} m RMSE over {e.num_poses} poses, path {e.path_length_m:.1f} m",
        f"RPE           {e.rpe_rot_deg:.4g} deg mean, {e.rpe_trans_m:.4g} m RMSE from pose to pose",
        f"RPE by way    {_format_distance(e)}",
        f"KITTI         {_format_kitti(e)}",
        f"coverage      {100 * e.coverage:.1f} %, {e.num_poses} of {e.num_expected_poses} poses",
    ]
    return "\n".join([*lines, *(f"note          {note}" for note in e.notes)])


def _measured(metric: APE | RPE, true_poses: PosePath3D, poses: PosePath3D) -> APE | RPE:
    metric.process_data((true_poses, poses))
    return metric


def distance_of_stretches(path_length_m: float) -> float | None:
    """The largest power of ten, in m and at most 100, that a path holds ten times; None for a path of no length."""
    longest_m = min(path_length_m / _STRETCHES_OF_A_PATH, _LONGEST_DISTANCE_M)
    if longest_m < 10.0**-_SHORTEST_POWER:
        return None
    power = math.floor(math.log10(longest_m) + 1e-9)
    return float(10.0**power)


def _errors_by_distance(
    true_poses: PosePath3D, poses: PosePath3D
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Distance, mean rotation in deg and RMSE of translation in m over stretches of the true path."""
    distance_m = distance_of_stretches(float(true_poses.path_length))
    if distance_m is None:
        return None, None, None

    def metric(relation: PoseRelation) -> RPE:
        return RPE(relation, distance_m, Unit.meters, pairs_from_reference=True)

    rotation = _measured(metric(PoseRelation.rotation_angle_deg), true_poses, poses)
    translation = _measured(metric(PoseRelation.translation_part), true_poses, poses)
    return (
        distance_m,
        float(rotation.get_statistic(StatisticsType.mean)),
        float(translation.get_statistic(StatisticsType.rmse)),
    )


def _aligned(T_world_camera: FloatArray, true_poses: PosePath3D, align: Align) -> tuple[PosePath3D, Alignment]:
    """The poses (N, 4, 4) after alignment, and the alignment."""
    poses = PosePath3D(poses_se3=list(T_world_camera))
    has_rotation, has_scale = align in ("sim3", "se3"), align in ("sim3", "scale")
    if not has_rotation and not has_scale:
        return poses, Alignment(np.eye(3), np.zeros(3), 1.0)
    if _is_determined(T_world_camera[:, :3, 3], true_poses.positions_xyz):
        found = poses.align(true_poses, correct_scale=has_scale, correct_only_scale=not has_rotation)
        alignment = Alignment(found[0], found[1], float(found[2]))
    else:
        alignment = _align_with_orientations(T_world_camera, np.array(true_poses.poses_se3), has_scale)
        poses.scale(alignment.scale)
        if has_rotation:
            poses.transform(_rigid(alignment))
    if not has_rotation:
        alignment = Alignment(np.eye(3), np.zeros(3), alignment.scale, alignment.is_unique)
    return poses, alignment


def _is_determined(positions: FloatArray, true_positions_m: FloatArray) -> bool:
    """Whether positions (N, 3) fix the rotation between them: their covariance has a rank of two or three.

    Rounding gives positions on a line a second direction, but one that is smaller by many orders than the first.
    """
    centred, centred_m = positions - positions.mean(axis=0), true_positions_m - true_positions_m.mean(axis=0)
    largest, second, _ = np.linalg.svd(centred_m.T @ centred / len(positions), compute_uv=False)
    return bool(second > max(_MIN_SECOND_DIRECTION * largest, _MIN_COVARIANCE_M2))


def _align_with_orientations(
    T_world_camera: FloatArray, truth_T_world_camera: FloatArray, has_scale: bool
) -> Alignment:
    """Alignment where positions alone do not determine it: rotation from the orientations, the rest by least squares.

    Where the positions do not determine the scale either, it is 1.
    """
    turns = truth_T_world_camera[:, :3, :3] @ np.swapaxes(T_world_camera[:, :3, :3], 1, 2)
    rotation: FloatArray = Rotation.from_matrix(turns).mean().as_matrix()
    rotated = T_world_camera[:, :3, 3] @ rotation.T
    positions_m = truth_T_world_camera[:, :3, 3]
    centred, centred_m = rotated - rotated.mean(axis=0), positions_m - positions_m.mean(axis=0)
    product, square = float((centred * centred_m).sum()), float((centred**2).sum())
    scale = product / square if has_scale and product > 0.0 else 1.0
    return Alignment(rotation, positions_m.mean(axis=0) - scale * rotated.mean(axis=0), scale, is_unique=False)


def _rigid(alignment: Alignment) -> FloatArray:
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = alignment.rotation, alignment.translation
    return T


def _segment_lengths(path_length_m: float) -> FloatArray:
    """KITTI's lengths, divided by ten until the path is longer than the first; empty for a path that has no length."""
    for power in range(_SHORTEST_POWER + 1):
        lengths_m = np.array(_KITTI_LENGTHS_M) / 10.0**power
        if path_length_m > lengths_m[0]:
            return lengths_m
    return np.zeros(0)


def _relative(T_world_a: FloatArray, T_world_b: FloatArray) -> FloatArray:
    """T_a_b of poses (S, 4, 4), row by row."""
    R_a_world = np.swapaxes(T_world_a[:, :3, :3], 1, 2)
    T_a_b = np.tile(np.eye(4), (len(T_world_a), 1, 1))
    T_a_b[:, :3, :3] = R_a_world @ T_world_b[:, :3, :3]
    T_a_b[:, :3, 3] = (R_a_world @ (T_world_b[:, :3, 3] - T_world_a[:, :3, 3])[:, :, None])[:, :, 0]
    return T_a_b


def _num_expected(
    trajectory: Trajectory, truth: Trajectory, frame_timestamps_ns: NDArray[np.int64] | None, max_difference_ns: int
) -> int:
    """Number of poses a trajectory without gaps would have had in common with the truth; at least one."""
    if frame_timestamps_ns is not None and len(frame_timestamps_ns) and truth.has_times:
        return max(1, len(mutual_nearest(frame_timestamps_ns, truth.timestamps_ns, max_difference_ns)[0]))
    if truth.frame_indices is not None:
        return len(truth)
    interval_ns = float(np.percentile(np.diff(trajectory.timestamps_ns), 10, method="lower"))
    duration_ns = float(truth.timestamps_ns[-1] - truth.timestamps_ns[0])
    # Half an interval of slack: the last frame of a jittering sensor counts.
    return max(1, min(len(truth), 1 + int(duration_ns / interval_ns + 0.5)))


def _nearest(times0: NDArray[np.int64], times1: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every entry of a rising sequence the row of the nearest in another one, the earlier of two as near."""
    after = np.clip(np.searchsorted(times1, times0), 1, max(1, len(times1) - 1))
    after = np.minimum(after, len(times1) - 1)
    before = np.maximum(after - 1, 0)
    nearest: NDArray[np.int64] = np.where(times0 - times1[before] <= times1[after] - times0, before, after)
    return nearest


def _time_range(trajectory: Trajectory) -> str:
    first, last = trajectory.timestamps_ns[[0, -1]] / 1e9
    return f"{first:.3f} to {last:.3f} s"


def _format_distance(evaluation: Evaluation) -> str:
    e = evaluation
    if e.rpe_distance_m is None:
        return "none: the truth does not move"
    return f"{e.rpe_distance_rot_deg:.4g} deg mean, {e.rpe_distance_trans_m:.4g} m RMSE per {e.rpe_distance_m:g} m"


def _format_kitti(evaluation: Evaluation) -> str:
    t_err, r_err = evaluation.kitti_t_err_percent, evaluation.kitti_r_err_deg_per_100m
    if t_err is None or r_err is None:
        return "none: the truth does not move"
    lengths = ", ".join(f"{length:g}" for length in evaluation.segment_lengths_m)
    return f"{t_err:.4g} %, {r_err:.4g} deg / 100 m over {evaluation.num_segments} segments of {lengths} m"


def _notes(
    trajectory: Trajectory,
    truth: Trajectory,
    align: Align,
    alignment: Alignment,
    true_positions_m: FloatArray,
    lengths_m: tuple[float, ...],
) -> tuple[str, ...]:
    """What must be said with the figures."""
    notes = [
        f"{each.name} holds poses of the body, not of the camera: no sensor.yaml was found beside it"
        for each in (trajectory, truth)
        if not each.is_of_camera
    ]
    if not alignment.is_unique:
        notes.append("the positions lie on a line or a point: the rotation was aligned by the orientations")
    spread_m = float(np.sqrt(true_positions_m.var(axis=0).sum()))
    if align in ("sim3", "scale") and spread_m < _STANDING_STILL_M:
        notes.append(f"the truth hardly moves ({spread_m * 1000:.2g} mm from its mean): its scale says little; try se3")
    if lengths_m and lengths_m[0] < _KITTI_LENGTHS_M[0]:
        notes.append(f"KITTI segments start at {lengths_m[0]:g} m instead of 100 m: the path is too short")
    return tuple(notes)
