"""Draws the picture of the README: a frame with its tracks, and the estimated path beside the true one.

python tools/draw_overview.py demo --frame 90 --output docs/overview.png
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded: its threads would compete with torch's

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vo.config_loader import load_config
from vo.evaluation import compare
from vo.frontend import create_frontend, select_device
from vo.odometry import Odometry
from vo.sources import open_source
from vo.trajectory import Trajectory, read_trajectory
from vo.types import Frame, FrameTracks

TAIL_FRAMES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as `vo run` takes it; has to come with ground truth")
    parser.add_argument("--config", default="demo", help="preset or file (default: %(default)s)")
    parser.add_argument("--frame", type=int, default=90, help="frame shown with its tracks (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/overview.png"))
    options = parser.parse_args()
    source = open_source(options.source)
    if source.ground_truth is None:
        parser.error(f"{options.source} has no ground truth to draw the path against")
    config = load_config(options.config, [])
    frontend = create_frontend(config.frontend, select_device("auto"))
    odometry = Odometry(source.camera, config.odometry, config.two_view, frontend.matcher.match)
    times, poses, picture = [], [], None
    for frame in source.frames():
        step = odometry.step(frame, frontend.extractor.extract(frame.image))
        if step.pose.T_world_camera is not None:
            times.append(frame.timestamp_ns)
            poses.append(step.pose.T_world_camera)
        if frame.index == options.frame:
            picture = tracks_picture(frame, step.tracks, odometry)
    if picture is None:
        parser.error(f"--frame {options.frame}: the source has no such frame")
    estimate = Trajectory(np.array(times, np.int64), np.array(poses), "lightvo")
    draw(picture, estimate, read_trajectory(source.ground_truth), options.output)


def tracks_picture(frame: Frame, tracks: FrameTracks, odometry: Odometry) -> NDArray[np.uint8]:
    """(H, W, 3) RGB: every track with its last places, from blue (young) to yellow (old)."""
    gray = frame.image if frame.image.ndim == 2 else cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
    picture = cv2.cvtColor((gray * 0.6 + 60).clip(0, 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    ages = np.clip(tracks.lengths / 25 * 255, 0, 255).astype(np.uint8)
    colours = cv2.applyColorMap(ages[:, None], cv2.COLORMAP_PLASMA)[:, 0]
    for track_id, length, colour in zip(tracks.track_ids.tolist(), tracks.lengths, colours.tolist(), strict=True):
        if length < 2:
            continue
        tail = odometry.tracks.track(track_id).keypoints[-TAIL_FRAMES:]
        points = np.rint(tail * 8).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(picture, [points], False, colour, 1, cv2.LINE_AA, 3)
        cv2.circle(picture, tuple(int(v) for v in points[-1, 0]), 16, colour, -1, cv2.LINE_AA, 3)
    return np.asarray(picture[..., ::-1], dtype=np.uint8)


def draw(picture: NDArray[np.uint8], estimate: Trajectory, truth: Trajectory, output: Path) -> None:
    comparison = compare(estimate, truth, "sim3")
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    left.imshow(picture)
    left.axis("off")
    true_xyz = comparison.truth.positions[comparison.truth_rows]
    alignment = comparison.alignment
    own_xyz = comparison.trajectory.positions[comparison.rows] @ alignment.rotation.T * alignment.scale
    own_xyz += alignment.translation
    right.plot(true_xyz[:, 0], true_xyz[:, 1], color="0.65", linewidth=4, label="ground truth")
    right.plot(own_xyz[:, 0], own_xyz[:, 1], color="#c2185b", linewidth=1.5, label="lightvo")
    right.set_aspect("equal", adjustable="datalim")
    right.set_xlabel("x (m)")
    right.set_ylabel("y (m)")
    right.set_title(
        f"ATE {comparison.evaluation.ate_rmse_m * 100:.1f} cm over {comparison.evaluation.path_length_m:.1f} m"
    )
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


if __name__ == "__main__":
    main()
