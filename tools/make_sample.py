"""Render the bundled sample clip: a furnished room seen by a hand-held camera, with exact ground truth.

    python tools/make_sample.py [--output datasets/sample] [--frames 330]

Writes clip.mp4 (H.264), camera.yaml, times.txt and groundtruth.txt. Needs PyAV to encode (`pip install av`), which
nothing else in the project needs; a few minutes on one core. The same command gives the same frames.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sample_geometry import GAMMA, FloatArray
from sample_path import DURATION_S, camera_poses, exposure_gain
from sample_render import Scene, View, render
from sample_room import sample_scene
from sample_textures import Image
from scipy.spatial.transform import Rotation

from vo.sources.cameras import write_camera
from vo.types import Camera

SEED = 7
WIDTH, HEIGHT, FOCAL_PX, CENTRE_PX = 640, 480, 516.0, (321.7, 237.9)
FRAMES_PER_S = 30
NUM_FRAMES = round(DURATION_S * FRAMES_PER_S)
EXPOSURE_S = 0.0125
# Eight samples of a pixel are enough while its image moves less than this, px, with things at this distance.
MAX_BLUR_PX, NEAR_SCENE_M = 3.2, 2.0
# Sensor: brightness of the scene, electrons at saturation, read noise in electrons, darkening at the corners.
BRIGHTNESS, FULL_WELL, READ_NOISE, VIGNETTING = 1.15, 6000.0, 6.0, 0.22
CRF = 18


def sample_camera(scale: float = 1.0) -> Camera:
    """The camera of the clip, or the one whose images are its images resized by `scale`."""
    x, y = ((c + 0.5) * scale - 0.5 for c in CENTRE_PX)
    K = np.array([[FOCAL_PX * scale, 0.0, x], [0.0, FOCAL_PX * scale, y], [0.0, 0.0, 1.0]])
    return Camera(round(WIDTH * scale), round(HEIGHT * scale), K)


def frame_times(num_frames: int) -> FloatArray:
    """(N,) s, middle of the exposures."""
    return np.arange(num_frames) / FRAMES_PER_S


def sub_exposures(time_s: float) -> tuple[FloatArray, FloatArray]:
    """Poses (S, 4, 4) within the exposure around `time_s` and sub-pixel positions (S, 2) px of its samples.

    S is a multiple of eight, and larger where the image moves so far that single samples would show as ghosts. Times,
    x and y are each spread evenly, and no two of them are correlated over eight samples: blur shifts neither way.
    """
    first, last = camera_poses(time_s + EXPOSURE_S * np.array([-0.5, 0.5]), SEED)
    turn_rad = np.linalg.norm(last[:3, 2] - first[:3, 2])
    blur_px = FOCAL_PX * (turn_rad + np.linalg.norm(last[:3, 3] - first[:3, 3]) / NEAR_SCENE_M)
    rounds = int(np.clip(np.ceil(blur_px / MAX_BLUR_PX), 1, 4))
    offsets = (np.arange(8 * rounds) + 0.5) / (8 * rounds) - 0.5
    x, y = np.array([4, 1, 7, 2, 3, 6, 0, 5]), np.array([5, 0, 2, 7, 3, 6, 4, 1])
    jitter = (np.stack((x, y), axis=1) + 0.5) / 8.0 - 0.5
    return camera_poses(time_s + EXPOSURE_S * offsets, SEED), np.tile(jitter, (rounds, 1))


def photograph(scene: Scene, camera: Camera, index: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB: frame `index` of the clip as the sensor delivers it."""
    time_s = index / FRAMES_PER_S
    radiance = render(scene, View(camera, *sub_exposures(time_s)))
    return _develop(radiance, camera, exposure_gain(time_s), np.random.default_rng((SEED, 2, index)))


def _develop(radiance: Image, camera: Camera, gain: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Vignetting, exposure, shot and read noise, saturation, display coding."""
    x, y = np.meshgrid(np.arange(camera.width) - camera.K[0, 2], np.arange(camera.height) - camera.K[1, 2])
    corner = 0.25 * (camera.width**2 + camera.height**2)
    signal = radiance * (BRIGHTNESS * gain * (1.0 - VIGNETTING * (x**2 + y**2) / corner))[..., None]
    sigma = np.sqrt(signal / FULL_WELL + (READ_NOISE / FULL_WELL) ** 2)
    noisy = signal + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    image: NDArray[np.uint8] = np.round(255.0 * np.clip(noisy, 0.0, 1.0) ** (1.0 / GAMMA)).astype(np.uint8)
    return image


def write_clip(path: Path, frames: Iterable[NDArray[np.uint8]]) -> int:
    """Encode RGB frames as H.264 in an MP4 file that seeks twice a second; returns how many there were."""
    try:
        import av
    except ImportError:
        raise SystemExit("make_sample: encoding needs PyAV, which is not installed; run: pip install av") from None
    count = 0
    options = {"crf": str(CRF), "preset": "veryslow", "g": "30", "threads": "1"}
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_S, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = count
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode())
    return count


def write_ground_truth(path: Path, times_s: FloatArray, poses: FloatArray) -> None:
    """TUM format: `timestamp tx ty tz qx qy qz qw` of T_world_camera, seconds and metres."""
    quaternions = Rotation.from_matrix(poses[:, :3, :3]).as_quat(canonical=True)
    lines = ["# timestamp tx ty tz qx qy qz qw (T_world_camera: camera x right, y down, z forward; world z up; s, m)"]
    for time_s, position, quaternion in zip(times_s, poses[:, :3, 3], quaternions, strict=True):
        numbers = " ".join(f"{value:.9f}" for value in (*position, *quaternion))
        lines.append(f"{time_s:.9f} {numbers}")
    path.write_text("\n".join(lines) + "\n")


def make_sample(output: Path, num_frames: int) -> None:
    """Render and write the first `num_frames` frames and everything that goes with them."""
    output.mkdir(parents=True, exist_ok=True)
    camera, times_s, scene = sample_camera(), frame_times(num_frames), sample_scene(SEED)

    def frames() -> Iterable[NDArray[np.uint8]]:
        start = time.perf_counter()
        for index in range(num_frames):
            yield photograph(scene, camera, index)
            if index % 30 == 29 or index + 1 == num_frames:
                print(f"{index + 1} of {num_frames} frames, {time.perf_counter() - start:.0f} s", file=sys.stderr)

    write_clip(output / "clip.mp4", frames())
    write_camera(
        output / "camera.yaml", camera, comment="Of clip.mp4; pixel (0, 0) is the centre of the top-left pixel."
    )
    (output / "times.txt").write_text("".join(f"{time_s:.9f}\n" for time_s in times_s))
    write_ground_truth(output / "groundtruth.txt", times_s, camera_poses(times_s, SEED))
    print(f"{output}: {num_frames} frames, {(output / 'clip.mp4').stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the bundled sample clip with its ground truth.")
    parser.add_argument("--output", type=Path, default=Path("datasets/sample"), help="directory to write to")
    parser.add_argument("--frames", type=int, default=NUM_FRAMES, help=f"frames from the start (default {NUM_FRAMES})")
    arguments = parser.parse_args()
    if not 1 <= arguments.frames <= NUM_FRAMES:
        parser.error(f"--frames: expected 1..{NUM_FRAMES}, got {arguments.frames}")
    cv2.setNumThreads(1)
    make_sample(arguments.output, arguments.frames)


if __name__ == "__main__":
    main()
