"""Writes a scene as COLMAP text or for nerfstudio; docs/RECORDING.md says what goes where.

COLMAP      poses are world to camera, quaternions with the scalar first, and (0.5, 0.5) is the centre of the top-left
            pixel. Ids are ours plus one: of images those of frames, of points those of tracks.
nerfstudio  poses are camera to world with OpenGL's camera axes (y up, z backwards), and the world is turned so that
            our -y is up, which `applied_transform` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vo.camera_models import HALF_PIXEL, colmap_camera, nerfstudio_camera
from vo.export_scene import ExportScene
from vo.geometry import invert_pose
from vo.messages import quat_xyzw_from_rotation
from vo.output import prepare_directory, write_atomically
from vo.types import FloatArray

IMAGES = "images"
COLMAP_MODEL = Path("sparse") / "0"
POINTS_NAME = "sparse_pc.ply"
GRAY = 128
# Our world has y down and z forward: right, forward, up.
APPLIED_TRANSFORM = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0]])
OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
_CAMERA_ID = 1
_PLY_DTYPE = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_PLY_HEADER = """ply
format binary_little_endian 1.0
element vertex {count}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
end_header
"""


def write_colmap(scene: ExportScene, names: Mapping[int, str], directory: Path) -> None:
    """cameras.txt, images.txt and points3D.txt in `directory`/sparse/0.

    `names` are the image files by frame index. Raises OutputError, and ConfigError for a camera without a model.
    """
    camera = colmap_camera(scene.camera)
    params = " ".join(repr(value) for value in camera.params)
    model = directory / COLMAP_MODEL
    prepare_directory(model)
    write_atomically(
        model / "cameras.txt",
        "# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]\n"
        f"{_CAMERA_ID} {camera.model} {camera.width} {camera.height} {params}\n",
    )
    write_atomically(model / "images.txt", _images_text(scene, names))
    write_atomically(model / "points3D.txt", _points_text(scene))


def write_nerfstudio(scene: ExportScene, names: Mapping[int, str], directory: Path) -> None:
    """transforms.json, and the points beside it. Raises OutputError, and ConfigError for a camera without a model."""
    frames = [
        {
            "file_path": f"{IMAGES}/{names[image.frame.frame_index]}",
            "transform_matrix": _nerfstudio_pose(image.frame.T_world_camera).tolist(),
        }
        for image in scene.images
    ]
    content: dict[str, object] = {
        **nerfstudio_camera(scene.camera),
        "applied_transform": APPLIED_TRANSFORM.tolist(),
        "ply_file_path": POINTS_NAME,
        "frames": frames,
    }
    prepare_directory(directory)
    write_atomically(directory / POINTS_NAME, _ply(scene))
    write_atomically(directory / "transforms.json", json.dumps(content, indent=2) + "\n")


def landmark_colors(scene: ExportScene) -> NDArray[np.uint8]:
    """(L, 3) RGB; gray where no colours are known."""
    if scene.landmarks.colors is not None:
        return scene.landmarks.colors
    return np.full((len(scene.landmarks.ids), 3), GRAY, np.uint8)


def _images_text(scene: ExportScene, names: Mapping[int, str]) -> str:
    lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME", "# POINTS2D[] as X Y POINT3D_ID"]
    for image in scene.images:
        T_camera_world = invert_pose(image.frame.T_world_camera)
        x, y, z, w = quat_xyzw_from_rotation(T_camera_world[:3, :3]).tolist()
        numbers = _numbers((w, x, y, z, *T_camera_world[:3, 3].tolist()))
        lines.append(f"{image.frame.frame_index + 1} {numbers} {_CAMERA_ID} {names[image.frame.frame_index]}")
        keypoints = (image.keypoints + HALF_PIXEL).tolist()
        points = zip(keypoints, image.landmark_ids.tolist(), strict=True)
        lines.append(" ".join(f"{px!r} {py!r} {landmark_id + 1}" for (px, py), landmark_id in points))
    return "\n".join(lines) + "\n"


def _points_text(scene: ExportScene) -> str:
    lines = ["# POINT3D_ID X Y Z R G B ERROR TRACK[] as IMAGE_ID POINT2D_IDX"]
    observations, errors = _observations(scene)
    rows = zip(scene.landmarks.ids.tolist(), scene.landmarks.points.tolist(), landmark_colors(scene), strict=True)
    for (landmark_id, point, (red, green, blue)), seen, error in zip(rows, observations, errors, strict=True):
        track = " ".join(f"{image_id} {index}" for image_id, index in seen)
        lines.append(f"{landmark_id + 1} {_numbers(point)} {red} {green} {blue} {error!r} {track}")
    return "\n".join(lines) + "\n"


def _observations(scene: ExportScene) -> tuple[list[list[tuple[int, int]]], list[float]]:
    """For every landmark: the images that see it, with the place in their lists, and the mean reprojection error."""
    observations: list[list[tuple[int, int]]] = [[] for _ in scene.landmarks.ids]
    sums = np.zeros(len(scene.landmarks.ids))
    for image in scene.images:
        rows = np.searchsorted(scene.landmarks.ids, image.landmark_ids)
        np.add.at(sums, rows, image.errors_px)
        for index, row in enumerate(rows.tolist()):
            observations[row].append((image.frame.frame_index + 1, index))
    return observations, [total / len(seen) for total, seen in zip(sums.tolist(), observations, strict=True)]


def _nerfstudio_pose(T_world_camera: FloatArray) -> FloatArray:
    turned = np.vstack([APPLIED_TRANSFORM, [0.0, 0.0, 0.0, 1.0]]) @ T_world_camera @ OPENGL_FROM_OPENCV
    return np.asarray(turned)


def _ply(scene: ExportScene) -> bytes:
    packed = np.zeros(len(scene.landmarks.ids), _PLY_DTYPE)
    packed["xyz"] = scene.landmarks.points @ APPLIED_TRANSFORM[:, :3].T
    packed["rgb"] = landmark_colors(scene)
    return _PLY_HEADER.format(count=len(packed)).encode() + packed.tobytes()


def _numbers(values: Sequence[float]) -> str:
    return " ".join(repr(float(value)) for value in values)
