"""A coloured mesh from the poses of a run and the depth images of its source: an example of a consumer that maps.

    vo run tum:DIR --set odometry.scale.name=depth      # in one terminal, and in another:
    python tools/map_rgbd.py tum:DIR -o mesh.ply
    python tools/map_rgbd.py tum:DIR -o mesh.ply --trajectory out/trajectory_tum.txt

Listens to poses and to corrections of keyframes. A frame is fused once its keyframe has left the window in which it
is still refined, at the place it has then; where a later correction moves it farther than `--max-shift-m`, the volume
is built anew from the images. Poses must be metric, like depth. The volume is a truncated signed distance function in
sparse blocks (Curless and Levoy 1996; Open3D's VoxelBlockGrid).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import open3d as o3d
from map_poses import PoseGraph, moved
from numpy.typing import NDArray

from vo.client import Client
from vo.endpoints import DEFAULT_ENDPOINT
from vo.geometry import invert_pose, make_pose
from vo.message_types import KeyframeUpdate, Topic
from vo.output import OutputError
from vo.sources import open_source
from vo.trajectory import Trajectory, read_trajectory
from vo.types import (
    Camera,
    CameraModel,
    ConfigError,
    FloatArray,
    Frame,
    PoseEstimate,
    SourceError,
    TrackingStatus,
    VoError,
)

USER_ERROR = 2
BLOCK_RESOLUTION = 16
NUM_BLOCKS = 20_000
MIN_WEIGHT = 2.0
MAX_TIME_DIFFERENCE_NS = 20_000_000
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class MappingOptions:
    """What is fused, and how finely.

    stride          every so many frames.
    max_depth_m     readings beyond it are left out.
    settled_after   keyframes that must come after that of a frame before it is fused.
    max_shift_m     correction of a fused frame, at 2 m depth, above which the volume is built anew.
    """

    voxel_m: float = 0.015
    max_depth_m: float = 4.0
    stride: int = 1
    max_frames: int | None = None
    settled_after: int = 12
    max_shift_m: float = 0.01


class DepthImages:
    """The frames of a source that have depth, in order, without distortion; each pass reads the files anew."""

    def __init__(self, spec: str, options: MappingOptions) -> None:
        """Raises SourceError where the source cannot be opened, ConfigError for a camera that cannot be mapped."""
        self._spec, self._options = spec, options
        source = open_source(spec)
        self.camera, self.ground_truth = source.camera, source.ground_truth
        source.close()
        if self.camera.model is CameraModel.FISHEYE:
            raise ConfigError(f"{spec}: fisheye images are not mapped; undistort them first")
        size = (self.camera.width, self.camera.height)
        K, distortion = self.camera.K, self.camera.distortion
        self._maps = (
            cv2.initUndistortRectifyMap(K, distortion, None, K, size, cv2.CV_32FC1) if distortion.any() else None
        )

    def frames(self) -> Iterator[Frame]:
        """Every `stride`-th frame that has depth."""
        source = open_source(self._spec)
        try:
            for frame in itertools.islice(source.frames(), self._options.max_frames):
                if frame.depth is not None and frame.index % self._options.stride == 0:
                    yield frame if self._maps is None else self._undistorted(frame, frame.depth)
        finally:
            source.close()

    def _undistorted(self, frame: Frame, depth: NDArray[np.float32]) -> Frame:
        image = cv2.remap(frame.image, *self._maps, cv2.INTER_LINEAR)
        straight = cv2.remap(depth, *self._maps, cv2.INTER_NEAREST)
        return replace(frame, image=image, depth=np.asarray(straight, np.float32))


class Volume:
    """The surface, as it follows from the frames fused so far."""

    def __init__(self, camera: Camera, options: MappingOptions) -> None:
        self._options = options
        self._K = o3d.core.Tensor(camera.K)
        float32 = o3d.core.float32
        self._grid = o3d.t.geometry.VoxelBlockGrid(
            ("tsdf", "weight", "color"),
            (float32, float32, float32),
            ((1), (1), (3)),
            options.voxel_m,
            BLOCK_RESOLUTION,
            NUM_BLOCKS,
        )
        self.num_fused = 0

    def fuse(self, frame: Frame, T_world_camera: FloatArray) -> None:
        """Adds the depth and the colours of one frame."""
        if frame.depth is None:
            raise ValueError(f"frame {frame.index} has no depth")
        image = frame.image if frame.image.ndim == 3 else np.repeat(frame.image[..., None], 3, axis=2)
        depth = o3d.t.geometry.Image(o3d.core.Tensor(np.ascontiguousarray(frame.depth)))
        color = o3d.t.geometry.Image(o3d.core.Tensor(image.astype(np.float32)))
        T_camera_world = o3d.core.Tensor(invert_pose(T_world_camera))
        blocks = self._grid.compute_unique_block_coordinates(
            depth, self._K, T_camera_world, 1.0, self._options.max_depth_m
        )
        self._grid.integrate(blocks, depth, color, self._K, self._K, T_camera_world, 1.0, self._options.max_depth_m)
        self.num_fused += 1

    def mesh(self) -> o3d.t.geometry.TriangleMesh:
        """The surface with colours in 0..1, where at least two frames have seen it."""
        mesh = self._grid.extract_triangle_mesh(MIN_WEIGHT)
        mesh.vertex.colors = (mesh.vertex.colors / 255.0).clip(0.0, 1.0)
        return mesh


class Mapper:
    """Fuses frames one after the other, each when its pose has settled; anew where poses have moved since.

    num_rebuilt  how often the volume was built anew.
    """

    def __init__(self, images: DepthImages, options: MappingOptions) -> None:
        self.graph = PoseGraph()
        self.num_rebuilt = 0
        self._images, self._options = images, options
        self._fused: dict[int, FloatArray] = {}
        self._last_heard = -1
        self._next: Frame | None = None
        self._begin()

    @property
    def num_fused(self) -> int:
        return self.volume.num_fused

    def accept(self, body: object) -> None:
        """Takes a pose or a correction. Raises ConfigError for poses without a metric scale."""
        segment_id = self.graph.segment_id
        if isinstance(body, PoseEstimate):
            self._last_heard = max(self._last_heard, body.frame_index)
            if body.T_world_camera is None or body.status is TrackingStatus.INITIALIZING:
                return  # such a pose is lost, or knows its rotation only
            if body.scale_source == "relative":
                raise ConfigError(
                    "the poses have no metric scale, and depth does: vo run ... --set odometry.scale.name=depth"
                )
            self.graph.add(body)
        elif isinstance(body, KeyframeUpdate):
            self.graph.correct(body)
        if self.graph.segment_id != segment_id:
            print("map_rgbd: a new segment, without a link to the last one: the map begins anew", file=sys.stderr)
            self._begin()

    def restart(self) -> None:
        """Forgets everything: another run begins."""
        self.graph.clear()
        self._last_heard = -1
        self._begin()

    def work(self, *, is_final: bool = False) -> bool:
        """Fuses the next frame, if it is its time; whether there was one. With `is_final`, no pose will change."""
        frame = self._next
        if frame is None:
            return False
        if not is_final and not self.graph.is_settled(frame.index, self._options.settled_after):
            is_lost = frame.index < self._last_heard and self.graph.pose(frame.index) is None
            if not is_lost:
                return False
        T = self.graph.pose(frame.index)
        if T is not None:
            self.volume.fuse(frame, T)
            self._fused[frame.index] = T
        self._next = next(self._frames, None)
        return True

    def largest_shift_m(self) -> float:
        """How far the corrections since have moved the surface that a fused frame has measured."""
        depth_m = self._options.max_depth_m / 2
        shifts = (
            moved(T, now, depth_m) for index, T in self._fused.items() if (now := self.graph.pose(index)) is not None
        )
        return max(shifts, default=0.0)

    def finish(self) -> o3d.t.geometry.TriangleMesh:
        """Fuses what is left, all of it anew where corrections ask for it, and returns the mesh.

        Raises SourceError where no frame with depth has got a pose.
        """
        while self.work(is_final=True):
            pass
        if self.largest_shift_m() > self._options.max_shift_m:
            self.num_rebuilt += 1
            self._begin()
            while self.work(is_final=True):
                pass
        if self.num_fused == 0:
            raise SourceError("no frame with depth has got a pose: there is nothing to map")
        return self.volume.mesh()

    def _begin(self) -> None:
        self.volume = Volume(self._images.camera, self._options)
        self._fused.clear()
        self._frames = self._images.frames()
        self._next = next(self._frames, None)


def map_live(mapper: Mapper, endpoint: str, timeout_s: float) -> None:
    """Follows a run until it is over, or nothing comes for `timeout_s`, or Ctrl-C."""
    with Client(endpoint, (Topic.POSE, Topic.KEYFRAME)) as client:
        session_id, heard_s = None, time.monotonic()
        try:
            while not client.inbox.is_complete and time.monotonic() - heard_s < timeout_s:
                message = client.receive(0.0 if mapper.work() else POLL_S)
                if message is None:
                    continue
                heard_s = time.monotonic()
                if session_id not in (None, message.header.session_id):
                    mapper.restart()
                session_id = message.header.session_id
                mapper.accept(message.body)
        except KeyboardInterrupt:
            print("map_rgbd: interrupted; the mesh of what has come is written", file=sys.stderr)


def map_trajectory(images: DepthImages, trajectory: Trajectory, options: MappingOptions) -> Volume:
    """Fuses every frame at the pose of its time. Raises SourceError where no frame has one."""
    volume = Volume(images.camera, options)
    for frame in images.frames():
        T = pose_at(trajectory, frame)
        if T is not None:
            volume.fuse(frame, T)
    if volume.num_fused == 0:
        raise SourceError(f"{trajectory.name}: no pose at the time of a frame with depth")
    return volume


def pose_at(trajectory: Trajectory, frame: Frame) -> FloatArray | None:
    """(4, 4) the pose nearest in time to a frame, at most 20 ms away; by frame index where there are no times."""
    times, key, limit = trajectory.timestamps_ns, frame.timestamp_ns, MAX_TIME_DIFFERENCE_NS
    if not trajectory.has_times:
        key, limit = frame.index, 0
    at = int(np.searchsorted(times, key))
    nearest = min((i for i in (at - 1, at) if 0 <= i < len(times)), key=lambda i: abs(int(times[i]) - key))
    return trajectory.T_world_camera[nearest] if abs(int(times[nearest]) - key) <= limit else None


@dataclass(frozen=True, slots=True)
class MeshDistance:
    """From the vertices of a mesh to the surface of another, m."""

    median_m: float
    p95_m: float
    num_vertices: int


def distance(mesh: o3d.t.geometry.TriangleMesh, true_mesh: o3d.t.geometry.TriangleMesh) -> MeshDistance:
    """Every vertex of `mesh` to the nearest point of the surface of `true_mesh`; both in one frame."""
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(true_mesh)
    distances = scene.compute_distance(mesh.vertex.positions).numpy()
    return MeshDistance(float(np.median(distances)), float(np.percentile(distances, 95)), len(distances))


def compare_with_truth(
    mapper: Mapper, mesh: o3d.t.geometry.TriangleMesh, images: DepthImages, truth: Trajectory, options: MappingOptions
) -> MeshDistance:
    """The mesh against that of the same depth images at their true poses, both worlds laid onto each other rigidly."""
    estimates, true_poses = [], []
    for frame in images.frames():
        T, T_true = mapper.graph.pose(frame.index), pose_at(truth, frame)
        if T is not None and T_true is not None:
            estimates.append(T)
            true_poses.append(T_true)
    if not estimates:
        raise SourceError(f"{truth.name}: no pose at the time of a frame")
    T_world_truth = between_worlds(np.array(estimates), np.array(true_poses))
    moved_truth = replace(truth, T_world_camera=T_world_truth @ truth.T_world_camera)
    return distance(mesh, map_trajectory(images, moved_truth, options).mesh())


def between_worlds(T_world_camera: FloatArray, T_truth_camera: FloatArray) -> FloatArray:
    """(4, 4) rigid T_world_truth from the poses (N, 4, 4) of the same frames in both worlds.

    The rotation is the mean over the orientations: what is seen is farther away than the path is long, and a rotation
    from positions would amplify their errors.
    """
    turns = np.einsum("nij,nkj->ik", T_world_camera[:, :3, :3], T_truth_camera[:, :3, :3])
    U, _, Vt = np.linalg.svd(turns)
    R = U @ np.diag([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
    return make_pose(R, (T_world_camera[:, :3, 3] - T_truth_camera[:, :3, 3] @ R.T).mean(axis=0))


def graph_of(trajectory: Trajectory, images: DepthImages, mapper: Mapper) -> None:
    """Takes the poses of a file over, each frame at the pose of its time."""
    for frame in images.frames():
        T = pose_at(trajectory, frame)
        if T is not None:
            mapper.accept(
                PoseEstimate(frame.index, frame.timestamp_ns, T, TrackingStatus.TRACKING, scale_source="file")
            )


def main() -> int:
    options = parsed()
    try:
        return run(options)
    except VoError as error:
        print(f"map_rgbd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR


def run(options: argparse.Namespace) -> int:
    mapping = MappingOptions(
        voxel_m=options.voxel_m,
        max_depth_m=options.max_depth_m,
        stride=options.stride,
        max_frames=options.max_frames,
        max_shift_m=options.max_shift_m,
        settled_after=options.settled_after,
    )
    images = DepthImages(options.source, mapping)
    mapper = Mapper(images, mapping)
    if options.trajectory is not None:
        graph_of(read_trajectory(options.trajectory), images, mapper)
    else:
        print(f"map_rgbd: waiting for {options.endpoint}", file=sys.stderr, flush=True)
        map_live(mapper, options.endpoint, options.timeout_s)
    mesh = mapper.finish()
    if not o3d.t.io.write_triangle_mesh(str(options.output), mesh):
        raise OutputError(f"{options.output}: cannot be written; end the name in .ply or .obj")
    report: dict[str, float] = {
        "frames_fused": mapper.num_fused,
        "vertices": len(mesh.vertex.positions),
        "triangles": len(mesh.triangle.indices),
        "rebuilt": mapper.num_rebuilt,
    }
    if options.truth is not None:
        found = compare_with_truth(mapper, mesh, images, read_trajectory(options.truth), mapping)
        report |= {"distance_median_m": round(found.median_m, 5), "distance_p95_m": round(found.p95_m, 5)}
    print(json.dumps(report))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A coloured mesh from poses and depth images.")
    parser.add_argument("source", metavar="SOURCE", help="tum:DIR, with depth.txt")
    parser.add_argument("-o", "--output", type=Path, required=True, help="mesh, .ply")
    parser.add_argument("--endpoint", default=DEFAULT_ENDPOINT, help="the run to follow (default: %(default)s)")
    parser.add_argument("--trajectory", type=Path, help="poses from a file instead: metric, as in trajectory_tum.txt")
    parser.add_argument("--truth", type=Path, help="compare with the mesh from true poses")
    parser.add_argument("--voxel-m", type=float, default=0.015, help="default: %(default)s")
    parser.add_argument("--max-depth-m", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--stride", type=int, default=1, help="fuse every so many frames")
    parser.add_argument("--max-frames", type=int, help="the first so many frames only")
    parser.add_argument("--max-shift-m", type=float, default=0.01, help="correction that builds the volume anew")
    parser.add_argument(
        "--settled-after", type=int, default=12, help="keyframes to wait for before a frame is fused (%(default)s)"
    )
    parser.add_argument("--timeout-s", type=float, default=60.0, help="end after so long without a message")
    options = parser.parse_args()
    if options.stride < 1 or options.voxel_m <= 0 or options.max_depth_m <= 0:
        parser.error("--stride, --voxel-m and --max-depth-m must be positive")
    return options


if __name__ == "__main__":
    sys.exit(main())
