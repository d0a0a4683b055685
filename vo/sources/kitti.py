"""KITTI odometry sequences (Geiger, Lenz and Urtasun 2012): rectified images, one time per frame, calib.txt."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from vo.sources.cameras import CameraChoice, make_camera
from vo.sources.images import list_images, refuse_fps
from vo.sources.sequence import ImageEntry, ImageSequence, image_size, make_rig, refuse_replaced_cameras
from vo.sources.textfiles import data_lines, read_text
from vo.sources.timestamps import read_times
from vo.types import Camera, FloatArray, SourceError, StereoRig

_LAYOUT = "a KITTI odometry sequence holds image_0 (or image_2), calib.txt and times.txt; see datasets/README.md"


def open_kitti(
    name: str, directory: Path, choice: CameraChoice, fps: float | None = None, *, wants_stereo: bool = False
) -> ImageSequence:
    """A sequence directory such as `sequences/00`: left gray camera (image_0, P0), else left colour (image_2, P2).

    `wants_stereo` reads the right camera of the same pair too (image_1, P1, or image_3, P3).

    Frame i is the image numbered i and the i-th line of times.txt; a number without an image is skipped and counted.
    The ground truth is `../../poses/00.txt` if it is there: it is of the left gray camera. Raises SourceError.
    """
    refuse_fps(fps, "KITTI frames carry their own times (times.txt)")
    camera_number = _camera_number(directory)
    folder = directory / f"image_{camera_number}"
    right = directory / f"image_{camera_number + 1}" if wants_stereo else None
    entries = _entries(folder, directory / "times.txt", right)
    width, height = image_size(name, [entry.image for entry in entries])
    chosen = choice.resolve(width, height)
    calibration = directory / "calib.txt"
    camera = _read_calibration(calibration, f"P{camera_number}", width, height)[0] if chosen is None else chosen.camera
    sequence = directory.resolve()
    poses = sequence.parent.parent / "poses" / f"{sequence.name}.txt"
    ground_truth = poses if poses.is_file() else None
    if right is None:
        return ImageSequence(name, camera, entries, ground_truth=ground_truth)
    refuse_replaced_cameras(choice, name)
    rig = _read_rig(calibration, camera_number, (width, height))
    return ImageSequence(name, camera, entries, ground_truth=ground_truth, stereo=rig)


def _camera_number(directory: Path) -> int:
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; {_LAYOUT}")
    for number in (0, 2):
        if (directory / f"image_{number}").is_dir():
            return number
    raise SourceError(f"{directory}: neither image_0 nor image_2 is there; {_LAYOUT}")


def _entries(folder: Path, times_file: Path, right: Path | None) -> list[ImageEntry]:
    times_ns = read_times(times_file, _LAYOUT)
    images = {int(path.stem): path for path in list_images(folder) if path.stem.isdecimal()}
    if not images:
        raise SourceError(f"{folder}: holds no numbered images such as 000000.png; {_LAYOUT}")
    num_frames = max(images) + 1
    if num_frames > len(times_ns):
        raise SourceError(
            f"{times_file}: {len(times_ns)} times, but {folder.name} goes on to {images[num_frames - 1].name}; "
            "expected one line per frame"
        )
    left = [
        ImageEntry(times_ns[number], images.get(number, folder / f"{number:06d}.png")) for number in range(num_frames)
    ]
    if right is None:
        return left
    if not right.is_dir():
        raise SourceError(f"{right}: no such directory; stereo needs the images of the right camera there")
    return [replace(entry, right=right / entry.image.name) for entry in left]


def _read_rig(calibration: Path, camera_number: int, size: tuple[int, int]) -> StereoRig:
    """The pair of a left camera and the next one. Both projection matrices are K (I | -centre), in metres."""
    camera0, centre0 = _read_calibration(calibration, f"P{camera_number}", *size)
    camera1, centre1 = _read_calibration(calibration, f"P{camera_number + 1}", *size)
    T_camera0_camera1 = np.eye(4)
    T_camera0_camera1[:3, 3] = centre1 - centre0
    return make_rig(camera0, camera1, T_camera0_camera1, f"{calibration}: P{camera_number + 1}")


def _read_calibration(path: Path, row: str, width: int, height: int) -> tuple[Camera, FloatArray]:
    """The camera of one row of calib.txt, twelve numbers of a 3x4 projection matrix of a rectified camera, and its
    centre (3,) m in the frame of camera 0.
    """
    remedy = f"{_LAYOUT}; or pass --camera FILE"
    for number, line in data_lines(read_text(path, remedy)):
        key, _, values = line.partition(":")
        if key.strip() == row:
            return _camera_of_row(values, width, height, f"{path}:{number}: {row}")
    raise SourceError(f"{path}: {row}: missing; {remedy}")


def _camera_of_row(values: str, width: int, height: int, where: str) -> tuple[Camera, FloatArray]:
    try:
        P = [float(value) for value in values.split()]
    except ValueError:
        raise SourceError(f"{where}: expected 12 numbers, got {values.strip()!r}") from None
    if len(P) != 12 or not all(math.isfinite(value) for value in P):
        raise SourceError(f"{where}: expected 12 finite numbers, got {len(P)}")
    is_rectified = P[1] == P[4] == P[8] == P[9] == 0.0 and P[10] == 1.0
    if P[0] <= 0 or P[5] <= 0 or not is_rectified:
        raise SourceError(
            f"{where}: expected the projection matrix of a rectified camera (K | t), got {values.strip()}"
        )
    camera = make_camera((width, height), (P[0], P[5]), (P[2], P[6]))
    return camera, -np.linalg.solve(camera.K, np.array([P[3], P[7], P[11]]))
