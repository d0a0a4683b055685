"""Pairs of photographs with depth and poses: correspondence by warping depth, as MegaDepth trainings do.

A pixel of view 0 with depth z is the point z K0^-1 p; T_camera1_camera0 and K1 take it to view 1. It is seen there if
the depth of view 1 says the same within a share of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from frontends.training.pairs_homography import applied, inverted, is_inside, sampled
from frontends.training.pairs_layers import Transfer
from frontends.training.photos import TrainingError

_TUM_DEPTH_SCALE = 5000.0
_MAX_TIME_DIFFERENCE_S = 0.03
# A step in depth by more than this share between neighbouring pixels is an edge: between them no depth is known.
_MAX_STEP = 0.03


@dataclass(frozen=True, slots=True, eq=False)
class PosedPairs:
    """B pairs of views.

    images0, images1       (B, 3, H, W) in [0, 1].
    depths0, depths1       (B, H, W) m along the optical axis, 0 where unknown.
    K0, K1                 (B, 3, 3) px.
    T_camera1_camera0      (B, 4, 4).
    agreement              share of its depth by which a point may be off and still be the one that is seen.
    """

    images0: Tensor
    images1: Tensor
    depths0: Tensor
    depths1: Tensor
    K0: Tensor
    K1: Tensor
    T_camera1_camera0: Tensor
    agreement: float = 0.05

    @property
    def size(self) -> tuple[int, int]:
        return self.images0.shape[3], self.images0.shape[2]

    def transfer(self, side: int, points: Tensor) -> Transfer:
        """Where points (B, N, 2) px of view `side` lie in the other one."""
        T_other_this = self.T_camera1_camera0 if side == 0 else torch.linalg.inv(self.T_camera1_camera0)
        depths, depths_there = (self.depths0, self.depths1) if side == 0 else (self.depths1, self.depths0)
        K, K_there = (self.K0, self.K1) if side == 0 else (self.K1, self.K0)
        depth = smooth_depth(depths, points)
        rays = applied(inverted(K), points)
        moved = applied(T_other_this[:, :3, :3], rays * depth[..., None]) + T_other_this[:, None, :3, 3]
        z = moved[..., 2]
        is_ahead = (depth > 0) & (z > 1e-6)
        projected = applied(K_there, moved)
        there = torch.where(is_ahead[..., None], projected[..., :2] / z.clamp(min=1e-6)[..., None], torch.inf)
        inside = is_ahead & is_inside(there, self.size)
        expected = smooth_depth(depths_there, torch.where(inside[..., None], there, 0.0))
        error = (expected - z) / z.clamp(min=1e-6)
        visible = inside & (expected > 0) & (error.abs() <= self.agreement)
        hidden = inside & (expected > 0) & (error < -self.agreement)
        # Where the other view looks through the point, one of the two depths is wrong.
        known = (depth > 0) & (visible | hidden | ~inside)
        return Transfer(there, visible, known)


def smooth_depth(depths: Tensor, points: Tensor) -> Tensor:
    """Depth (B, N) m, bilinear at points (B, N, 2) px of (B, H, W); 0 where one of the four is unknown or an edge."""
    height, width = depths.shape[1:]
    x, y = points[..., 0].clamp(0, width - 1), points[..., 1].clamp(0, height - 1)
    left, top = x.floor().clamp(max=width - 2).long(), y.floor().clamp(max=height - 2).long()
    corners = [depths.flatten(1).gather(1, (top + i) * width + left + j) for i in (0, 1) for j in (0, 1)]
    values = torch.stack(corners)
    low, high = values.amin(dim=0), values.amax(dim=0)
    is_smooth = (low > 0) & (high <= low * (1 + _MAX_STEP))
    depth = sampled(depths[:, None], points, padding="border")[:, 0]
    return torch.where(is_smooth & is_inside(points, (width, height)), depth, 0.0)


@dataclass(frozen=True, slots=True)
class PosedView:
    """One photograph of a posed collection: files, K (3, 3) px and T_camera_world (4, 4)."""

    image: Path
    depth: Path
    K: NDArray[np.float64]
    T_camera_world: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PosedCollection:
    """Views, and which of them (P, 2) show the same things; depth files hold `depth_scale` units per metre."""

    views: tuple[PosedView, ...]
    pairs: NDArray[np.int64]
    depth_scale: float


def read_tum(directory: Path, gaps: tuple[int, ...] = (1, 5, 10, 20)) -> PosedCollection:
    """Pairs of a recording in the layout of the TUM RGB-D benchmark, with `camera.yaml`; frames need depth and a pose.

    Raises TrainingError naming the file that is missing or wrong.
    """
    K, scale = _read_camera(directory / "camera.yaml")
    images, depths = (_read_table(directory / name, str) for name in ("rgb.txt", "depth.txt"))
    truth = _read_table(directory / "groundtruth.txt", float)
    views = []
    for time_s, (name,) in images:
        depth, pose = _nearest(depths, time_s), _nearest(truth, time_s)
        if depth is None or pose is None or not (directory / depth[0]).is_file():
            continue
        T_camera_world = np.linalg.inv(_pose_matrix([float(value) for value in pose])).astype(np.float64)
        views.append(PosedView(directory / name, directory / depth[0], K, T_camera_world))
    pairs = [(i, i + gap) for gap in gaps for i in range(0, len(views) - gap)]
    if not pairs:
        raise TrainingError(f"{directory}: no two frames with depth and pose; give a recording that has them")
    return PosedCollection(tuple(views), np.array(pairs), scale)


def _read_camera(path: Path) -> tuple[NDArray[np.float64], float]:
    try:
        tree = yaml.safe_load(path.read_text())
        K = np.array([[tree["fx"], 0, tree["cx"]], [0, tree["fy"], tree["cy"]], [0, 0, 1]], dtype=np.float64)
        return K, float(tree.get("depth_scale", _TUM_DEPTH_SCALE))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise TrainingError(f"{path}: expected fx, fy, cx, cy in px: {reason}; add the camera's file") from error


def _read_table(path: Path, kind: type) -> list[tuple[float, list[str]]]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        rows = [(float(line[0]), line[1:]) for line in lines]
        if kind is float:
            for _, values in rows:
                if len(values) != 7:
                    raise ValueError(f"{len(values) + 1} values instead of 8")
                _ = [float(value) for value in values]
        return rows
    except (OSError, ValueError, IndexError) as error:
        raise TrainingError(f"{path}: cannot be read as a TUM table: {error}; correct the file") from error


def _nearest(rows: list[tuple[float, list[str]]], time_s: float) -> list[str] | None:
    if not rows:
        return None
    time, values = min(rows, key=lambda row: abs(row[0] - time_s))
    return values if abs(time - time_s) <= _MAX_TIME_DIFFERENCE_S else None


def _pose_matrix(values: list[float]) -> NDArray[np.float64]:
    """T_world_camera (4, 4) of tx ty tz qx qy qz qw."""
    x, y, z, w = np.array(values[3:]) / np.linalg.norm(values[3:])
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = values[:3]
    return pose


def read_megadepth(path: Path) -> PosedCollection:
    """Pairs of a `scene_info.npz`.

    image_paths, depth_paths (N,), intrinsics (N, 3, 3), poses (N, 4, 4) world to camera, pairs (P, 2). Paths are
    relative to the file, as arrays of text: files with pickled objects inside are refused. Raises
    TrainingError naming the entry that is missing or of another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {key: archive[key] for key in ("image_paths", "depth_paths", "intrinsics", "poses", "pairs")}
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{path}: {reason}; save image_paths, depth_paths (text), intrinsics, poses and pairs without objects"
        ) from error
    count = len(content["image_paths"])
    shapes = {"depth_paths": (count,), "intrinsics": (count, 3, 3), "poses": (count, 4, 4)}
    for key, shape in shapes.items():
        if content[key].shape != shape:
            raise TrainingError(f"{path}: {key}: expected {shape}, got {content[key].shape}; correct the file")
    pairs = np.asarray(content["pairs"], dtype=np.int64)
    if (
        pairs.ndim != 2
        or pairs.shape[1] < 2
        or len(pairs) == 0
        or pairs[:, :2].min() < 0
        or pairs[:, :2].max() >= count
    ):
        raise TrainingError(
            f"{path}: pairs: expected (P, 2) indices below {count}, got {pairs.shape}; correct the file"
        )
    views = tuple(
        PosedView(path.parent / str(image), path.parent / str(depth), K, T)
        for image, depth, K, T in zip(
            content["image_paths"], content["depth_paths"], content["intrinsics"], content["poses"], strict=True
        )
    )
    return PosedCollection(views, pairs[:, :2], 1.0)


def read_depth(path: Path, scale: float) -> NDArray[np.float32]:
    """(H, W) float32 m, 0 where unknown: 16-bit PNG, .npy, or MegaDepth's .h5 where h5py is installed."""
    if path.suffix == ".npy":
        depth = np.load(path, allow_pickle=False)
    elif path.suffix == ".h5":
        try:
            import h5py
        except ImportError as error:
            raise TrainingError(f"{path}: reading .h5 needs h5py; pip install h5py, or save depth as .npy") from error
        with h5py.File(path, "r") as file:
            depth = np.asarray(file["depth"])
    else:
        read = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if read is None or read.ndim != 2:
            raise TrainingError(f"{path}: not a depth image of one channel; remove it from the list")
        depth = read
    metres: NDArray[np.float32] = np.nan_to_num(np.asarray(depth, np.float32) / np.float32(scale))
    return np.maximum(metres, 0.0)


def load_posed_pairs(
    collection: PosedCollection, chosen: NDArray[np.int64], size: tuple[int, int], device: torch.device
) -> PosedPairs:
    """The pairs with the numbers `chosen` (B,), every view brought to (width, height) px.

    Depth is resized by its nearest pixel, so that nothing is mixed across edges. TrainingError for unreadable files.
    """
    loaded = [
        [_loaded_view(collection.views[view], collection.depth_scale, size) for view in collection.pairs[number]]
        for number in chosen
    ]

    def stacked(part: int, side: int) -> Tensor:
        return torch.from_numpy(np.stack([pair[side][part] for pair in loaded])).to(device)

    poses = [
        collection.views[second].T_camera_world @ np.linalg.inv(collection.views[first].T_camera_world)
        for first, second in collection.pairs[chosen]
    ]
    motion = torch.from_numpy(np.stack(poses)).float().to(device)
    images, depths, cameras = ((stacked(part, 0), stacked(part, 1)) for part in range(3))
    return PosedPairs(*images, *depths, *cameras, T_camera1_camera0=motion)


def _loaded_view(
    view: PosedView, scale: float, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    image = cv2.imread(str(view.image), cv2.IMREAD_COLOR)
    if image is None:
        raise TrainingError(f"{view.image}: cannot be read as an image; remove it from the list")
    height, width = image.shape[:2]
    resized = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))[..., ::-1]
    depth = np.asarray(cv2.resize(read_depth(view.depth, scale), size, interpolation=cv2.INTER_NEAREST))
    ratio = np.array([size[0] / width, size[1] / height])
    K = view.K.copy()
    K[:2, :2] *= ratio[:, None]
    K[:2, 2] = (K[:2, 2] + 0.5) * ratio - 0.5
    pixels = np.ascontiguousarray(resized.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
    return pixels, depth.astype(np.float32), K.astype(np.float32)
