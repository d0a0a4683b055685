"""Small datasets of every layout, written with OpenCV and plain text, for the tests of the sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 32, 24
CAMERA_YAML = "model: pinhole\nwidth: 32\nheight: 24\nfx: 30.0\nfy: 31.0\ncx: 15.5\ncy: 11.5\ndistortion: []\n"
SENSOR_YAML = """%YAML:1.0
# General sensor definitions.
sensor_type: camera
T_BS:
  cols: 4
  rows: 4
  data: [1.0, 0.0, 0.0, 0.1,
         0.0, 1.0, 0.0, 0.2]
rate_hz: 20
resolution: [32, 24]
camera_model: pinhole
intrinsics: [30.0, 31.0, 15.5, 11.5] #fu, fv, cu, cv
distortion_model: radial-tangential
distortion_coefficients: [-0.28, 0.07, 1e-4, 1.76187114e-05]
"""


def rgb_image(seed: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def gray_image(seed: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


def depth_image(seed: int) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 2**16, (HEIGHT, WIDTH), np.uint16)


def write_image(path: Path, image: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Write an RGB or gray image; colour goes through OpenCV's channel order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = image[..., ::-1] if image.ndim == 3 else image
    if not cv2.imwrite(str(path), np.ascontiguousarray(stored)):
        raise OSError(f"cannot write {path}")


def write_images(directory: Path, num_images: int) -> None:
    for index in range(num_images):
        write_image(directory / f"frame{index}.png", rgb_image(index))


def write_kitti(root: Path, num_frames: int = 5, folder: str = "image_0") -> Path:
    """sequences/07 with poses/07.txt; returns the sequence directory."""
    sequence = root / "sequences" / "07"
    for index in range(num_frames):
        image = gray_image(index) if folder == "image_0" else rgb_image(index)
        write_image(sequence / folder / f"{index:06d}.png", image)
    rows = [f"P{number}: {30 + number}.5 0 15 -{number} 0 31 11 0 0 0 1 0" for number in range(4)]
    (sequence / "calib.txt").write_text("\n".join(rows) + "\n")
    (sequence / "times.txt").write_text("".join(f"{index * 0.1037359:.6e}\n" for index in range(num_frames)))
    (root / "poses").mkdir()
    (root / "poses" / "07.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * num_frames)
    return sequence


def write_tum(root: Path, colour_times: Sequence[str], depth_times: Sequence[str], name: str = "desk") -> Path:
    """A TUM directory; depth images are named, and differ, by their place in `depth_times`."""
    sequence = root / name
    sequence.mkdir(parents=True)
    colour_lines, depth_lines = ["# color images", "# timestamp filename"], ["# depth maps"]
    for index, seconds in enumerate(colour_times):
        write_image(sequence / "rgb" / f"{index}.png", rgb_image(index))
        colour_lines.append(f"{seconds} rgb/{index}.png")
    for index, seconds in enumerate(depth_times):
        write_image(sequence / "depth" / f"{index}.png", depth_image(index))
        depth_lines.append(f"{seconds} depth/{index}.png")
    (sequence / "rgb.txt").write_text("\n".join(colour_lines) + "\n")
    if depth_times:
        (sequence / "depth.txt").write_text("\n".join(depth_lines) + "\n")
    (sequence / "camera.yaml").write_text(CAMERA_YAML)
    (sequence / "groundtruth.txt").write_text("# none\n")
    return sequence


def write_euroc(root: Path, times_ns: Sequence[int] = (10, 20, 30)) -> Path:
    camera = root / "V0" / "mav0" / "cam0"
    for index, time_ns in enumerate(times_ns):
        write_image(camera / "data" / f"{time_ns}.png", gray_image(index))
    lines = ["#timestamp [ns],filename"] + [f"{time_ns},{time_ns}.png" for time_ns in times_ns]
    (camera / "data.csv").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    (camera / "sensor.yaml").write_text(SENSOR_YAML)
    return root / "V0"


def write_video(path: Path, num_frames: int = 12, fps: float = 29.97, code: str = "mp4v") -> Path:
    """A video whose frame i is of the uniform gray level 20 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, (64, 48))
    if not writer.isOpened():
        raise OSError(f"cannot write {path}")
    for index in range(num_frames):
        writer.write(np.full((48, 64, 3), 20 * index, np.uint8))
    writer.release()
    return path


def cut_short(path: Path, kept: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
