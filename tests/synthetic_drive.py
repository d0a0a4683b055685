"""A KITTI sequence with real parallax, drawn in a moment: a camera slides past textured boards at several depths."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from synthetic_sources import write_image

WIDTH, HEIGHT, FOCAL_PX = 320, 240, 250.0
STEP_M = 0.1
# Depth in m and the rows each board covers: every shift between frames is a whole number of pixels.
_BOARDS = ((12.5, 0, 240), (6.25, 20, 90), (5.0, 110, 160), (2.5, 180, 235))


def write_drive(root: Path, num_frames: int = 20, name: str = "05") -> Path:
    """sequences/NAME and poses/NAME.txt at 10 Hz; returns the sequence directory."""
    rng = np.random.default_rng(7)
    length = WIDTH + num_frames * round(FOCAL_PX * STEP_M / 2.5)
    textures = [_texture(rng, length, bottom - top) for _, top, bottom in _BOARDS]
    sequence = root / "sequences" / name
    for index in range(num_frames):
        image = np.zeros((HEIGHT, WIDTH), np.uint8)
        for (depth_m, top, bottom), texture in zip(_BOARDS, textures, strict=True):
            shift_px = round(index * STEP_M * FOCAL_PX / depth_m)
            image[top:bottom] = texture[:, shift_px : shift_px + WIDTH]
        write_image(sequence / "image_0" / f"{index:06d}.png", image)
    centre = f"{FOCAL_PX} 0 {(WIDTH - 1) / 2} 0 0 {FOCAL_PX} {(HEIGHT - 1) / 2} 0 0 0 1 0"
    (sequence / "calib.txt").write_text(f"P0: {centre}\n")
    (sequence / "times.txt").write_text("".join(f"{index * 0.1:.6e}\n" for index in range(num_frames)))
    poses = [f"1 0 0 {index * STEP_M:.6f} 0 1 0 0 0 0 1 0\n" for index in range(num_frames)]
    (root / "poses").mkdir(exist_ok=True)
    (root / "poses" / f"{name}.txt").write_text("".join(poses))
    return sequence


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Blobs of a few pixels with strong edges: corners that ORB finds again."""
    coarse = rng.integers(0, 256, (height // 4 + 2, width // 4 + 2), np.uint8)
    large = cv2.resize(coarse, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    return np.ascontiguousarray(cv2.GaussianBlur(large, (3, 3), 0.8)[:height, :width])
