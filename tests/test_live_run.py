"""Whole runs before a network camera on this machine: newer frames than the run can take, a camera that dies and comes
back, one that falls silent, images in which nothing can be seen.

Nothing here has to happen within a time: what is measured is counted in frames, or in periods of the run itself.
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vo import cli
from vo.config_loader import load_config
from vo.frontend import create_frontend
from vo.geometry import rotation_angle
from vo.pipeline import run
from vo.sources import open_source
from vo.stages import FrameResult
from vo.summary import RunSummary
from vo.trajectory import read_trajectory
from vo.types import Frame, PoseEstimate, Rejection, TrackingStatus

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from camera_server import CameraServer, age_ms, clip_images, stamp
from measure_live import MAX_PERIODS, measure

SETTINGS = ("frontend.extractor.max_keypoints=400", "frontend.extractor.max_side=320", "publisher.endpoint=off")
Image = NDArray[np.uint8]
Spoiler = Callable[[Image, np.random.Generator], Image]


@cache
def images(num: int = 60) -> list[Image]:
    """The beginning of the bundled clip: the camera goes along a bookcase."""
    return clip_images("demo", num, 320)


def run_before(
    server: CameraServer, on_result: Callable[[FrameResult, threading.Event], None], **webcam: float
) -> RunSummary:
    """Runs ORB before the server until `on_result` sets the event; it is given up after five minutes."""
    overrides = [f"webcam.{key}={value}" for key, value in webcam.items()]
    config = load_config("orb", (*SETTINGS, *overrides))
    frontend = create_frontend(config.frontend, torch.device("cpu"))
    source = open_source(server.url, fov_deg=62.0, webcam=config.webcam)
    stop = threading.Event()
    timer = threading.Timer(280, stop.set)
    timer.start()
    try:
        return run(config, source, frontend, [lambda result: on_result(result, stop)], stop=stop)
    finally:
        timer.cancel()


# --- the newest frame ---


def test_the_time_in_an_image_survives_compression() -> None:
    for now_ms in (0, 1, 5_592_405, 2**24 - 1):
        image = images()[0].copy()
        stamp(image, now_ms * 1_000_000)
        jpeg = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 60))[1]
        assert age_ms(np.asarray(cv2.imdecode(jpeg, 1), np.uint8), (now_ms + 7) * 1_000_000) == 7


def test_a_camera_that_is_faster_than_the_run_is_never_behind() -> None:
    """The short form of tools/measure_live.py: ages are read from the images, and counted in periods of the run."""
    figures = measure(images(), duration_s=12.0, fps=30.0, busy_s=0.15)
    assert figures.periods < MAX_PERIODS
    assert figures.last_third_p50_ms < figures.first_third_p50_ms + figures.period_ms
    assert figures.num_dropped > figures.num_processed
    assert 0 <= figures.num_unaccounted <= 12, "frames that nobody counted"


# --- a camera that dies ---


def test_a_camera_that_is_killed_twenty_times_comes_back_into_the_same_map(capfd: pytest.CaptureFixture[str]) -> None:
    """Killed at random moments, back after a random while; one process, one run, one map."""
    rng = random.Random(7)
    seen: list[PoseEstimate] = []
    after_gaps: list[PoseEstimate] = []
    num_kills = 0
    with CameraServer(images(), fps=15.0) as server:
        kill_at = 12  # the map has begun by then
        is_back = True

        def watch(result: FrameResult, stop: threading.Event) -> None:
            nonlocal num_kills, kill_at, is_back
            seen.append(result.step.pose)
            if result.captured.frame.follows_gap:
                after_gaps.append(result.step.pose)
                is_back, kill_at = True, len(seen) + rng.randint(0, 3)
            is_tracked = result.step.pose.status in (TrackingStatus.TRACKING, TrackingStatus.RELOCALIZED)
            if not is_back or not is_tracked or len(seen) < kill_at:
                return
            if num_kills == 20:
                stop.set()
                return
            num_kills, is_back = num_kills + 1, False
            server.kill()
            threading.Timer(rng.uniform(0.0, 0.2), server.start).start()

        summary = run_before(server, watch)
    assert num_kills == 20
    assert summary.live is not None and summary.live.reconnects == 20
    assert {pose.segment_id for pose in seen} == {seen[0].segment_id}, "every pose is in the map that was begun first"
    # The first frame that comes back is lost or found again, never simply tracked on.
    assert len(after_gaps) == 20
    assert {pose.status for pose in after_gaps} <= {TrackingStatus.LOST, TrackingStatus.RELOCALIZED}
    num_found = sum(pose.status is TrackingStatus.RELOCALIZED for pose in seen)
    assert num_found >= 20
    assert capfd.readouterr().err == "", "neither FFmpeg nor OpenCV has a word in it"


def number_of(image: Image, candidates: list[Image]) -> int:
    """Which of the images this is, after compression and below the time in it."""
    seen = image[8:].astype(np.int32)
    return int(np.argmin([np.abs(seen - candidate[8:]).mean() for candidate in candidates]))


def test_poses_after_a_reconnection_are_where_they_were_before() -> None:
    """The same images again, after the camera was away: their poses lie where they lay, as far as the map is good."""
    positions: dict[int, list[NDArray[np.float64]]] = {}
    still = images()[:30]

    with CameraServer(still, fps=15.0) as server:
        was_killed = False

        def watch(result: FrameResult, stop: threading.Event) -> None:
            nonlocal was_killed
            pose = result.step.pose
            if pose.T_world_camera is not None and pose.status is not TrackingStatus.INITIALIZING:
                differences = [
                    float(np.abs(result.captured.frame.image[8:].astype(int) - image[8:]).mean()) for image in still
                ]
                positions.setdefault(int(np.argmin(differences)), []).append(pose.T_world_camera[:3, 3])
            enough = sum(map(len, positions.values()))
            if enough > 40 and not was_killed:
                was_killed = True
                positions.clear()
                server.kill()
                threading.Timer(0.3, server.start).start()
            if was_killed and enough > 60:
                stop.set()

        summary = run_before(server, watch)
    assert summary.live is not None and summary.live.reconnects == 1
    truth = read_trajectory(open_source("demo").ground_truth).positions[sorted(positions)]  # type: ignore[arg-type]
    found = np.array([np.mean(positions[key], axis=0) for key in sorted(positions)])
    extent, true_extent = np.linalg.norm(np.ptp(found, axis=0)), np.linalg.norm(np.ptp(truth, axis=0))
    spread = max(float(np.ptp(np.array(values), axis=0).max()) for values in positions.values())
    assert len(found) > 10 and true_extent > 0.05
    assert spread < 0.5 * extent


def test_a_silent_camera_ends_a_watched_run_with_its_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It holds its connection and sends nothing; the run waits for it only as long as the watchdog lets it."""
    with CameraServer(images(), fps=15.0) as server:
        output = tmp_path / "out"

        def stall() -> None:
            deadline_s = time.monotonic() + 200
            trajectory = output / "trajectory_tum.txt"
            while time.monotonic() < deadline_s and not (
                trajectory.exists() and trajectory.read_text().count("\n") > 5
            ):
                time.sleep(0.05)
            server.stall()

        threading.Thread(target=stall, daemon=True).start()
        settings = [flag for setting in (*SETTINGS, "webcam.silence_s=60") for flag in ("--set", setting)]
        arguments = ["run", server.url, "--fov-deg", "62", "--config", "orb", "--output", str(output), *settings]
        code = cli.main([*arguments, "--watchdog-s", "3"])
    out, err = capfd.readouterr()
    assert code == 2
    assert re.search(
        r"^vo: error: http://127.* no frame for 3 s \(--watchdog-s\); is the camera there\?$", err, re.MULTILINE
    )
    assert re.search(r"^vo: http://.*: 320x240 px, MJPG", err, re.M), "what was negotiated is said"
    assert "times of frames: measured when the frame was handed over" in err
    summary = json.loads((output / "summary.json").read_text())
    assert summary["poses"] == len(read_trajectory(output / "trajectory_tum.txt")) > 5
    assert summary["live"]["clock"] == "measured when the frame was handed over"
    assert "camera      320x240 px, MJPG" in out


def test_no_server_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "http://127.0.0.1:9/", "--fov-deg", "62", "--publish", "off"]) == 2
    assert re.fullmatch(r"vo: error: http://127\.0\.0\.1:9/: cannot be opened; .*\n", capfd.readouterr().err)


# --- images in which nothing can be seen ---


def dark(image: Image, rng: np.random.Generator) -> Image:
    return np.clip(image / 100.0 + 6 + rng.normal(0, 4.0, image.shape), 0, 255).astype(np.uint8)


def covered(image: Image, rng: np.random.Generator) -> Image:
    return np.clip(np.full(image.shape, (90, 30, 25)) + rng.normal(0, 3.0, image.shape), 0, 255).astype(np.uint8)


def overexposed(image: Image, rng: np.random.Generator) -> Image:
    return np.clip(image.astype(int) * 4 + 230, 0, 255).astype(np.uint8)


def a_hand(image: Image, rng: np.random.Generator) -> Image:
    """A sharp thing with a texture of its own fills the image and moves against the camera."""
    texture = np.random.default_rng(3).integers(0, 256, (60, 80, 3), np.uint8)
    hand = np.asarray(
        cv2.resize(texture, (image.shape[1] + 200, image.shape[0]), interpolation=cv2.INTER_CUBIC), np.uint8
    )
    start = int(rng.integers(0, 200))
    return np.ascontiguousarray(hand[:, start : start + image.shape[1]])


def smeared(image: Image, rng: np.random.Generator) -> Image:
    return np.asarray(cv2.blur(image, (41, 5)), np.uint8)


def dimmed(image: Image, rng: np.random.Generator) -> Image:
    return np.asarray(cv2.convertScaleAbs(image, alpha=0.45), np.uint8)


FIRST_BAD, LAST_BAD, NUM_FRAMES = 40, 45, 58
# At 320 px ORB leaves a map of a few dozen landmarks, in which a pose found again is off without being wild.
SPOILT_SETTINGS = ("frontend.extractor.max_keypoints=400", "frontend.extractor.max_side=480", "publisher.endpoint=off")


def poses_of(spoil: Spoiler | None) -> list[PoseEstimate]:
    """The clip through ORB in a loop, some frames spoilt: the same frames give the same poses."""
    frontend = create_frontend(load_config("orb", SPOILT_SETTINGS).frontend, torch.device("cpu"))
    rng = np.random.default_rng(0)
    plain = open_source("demo")

    class Spoilt:
        name, camera, is_live, num_frames = "spoilt", plain.camera, False, None
        skipped, ground_truth, stereo = (), None, None

        def frames(self) -> Iterator[Frame]:
            for frame in plain.frames():
                is_bad = spoil is not None and FIRST_BAD <= frame.index <= LAST_BAD
                yield replace(frame, image=spoil(frame.image, rng)) if spoil is not None and is_bad else frame

        def close(self) -> None:
            plain.close()

    poses: list[PoseEstimate] = []
    run(
        load_config("orb", SPOILT_SETTINGS),
        Spoilt(),
        frontend,
        [lambda result: poses.append(result.step.pose)],
        threaded=False,
        max_frames=NUM_FRAMES,
    )
    return poses


@cache
def sound_poses() -> list[PoseEstimate]:
    return poses_of(None)


@pytest.mark.parametrize(
    ("spoil", "is_blind"),
    [(dark, True), (covered, True), (overexposed, True), (a_hand, False), (smeared, False), (dimmed, False)],
)
def test_no_wild_pose_comes_of_a_bad_image(spoil: Spoiler, is_blind: bool) -> None:
    """What has a pose is where it is without the fault; what shows nothing has none; tracking goes on afterwards."""
    poses, sound = poses_of(spoil), sound_poses()
    assert all(pose.T_world_camera is not None for pose in sound)
    if is_blind:
        bad = poses[FIRST_BAD : LAST_BAD + 1]
        assert all(pose.T_world_camera is None and pose.rejection is Rejection.DEGENERATE for pose in bad)
    assert poses[-1].status in (TrackingStatus.TRACKING, TrackingStatus.RELOCALIZED)
    assert {pose.segment_id for pose in poses} == {0}
    assert sum(pose.T_world_camera is not None for pose in poses[LAST_BAD + 1 :]) >= 10
    path = np.array([pose.T_world_camera[:3, 3] for pose in sound if pose.T_world_camera is not None])
    extent = float(np.linalg.norm(np.ptp(path, axis=0)))
    for pose, truth in zip(poses, sound, strict=True):
        if pose.T_world_camera is None or truth.T_world_camera is None:
            continue
        off = np.linalg.inv(truth.T_world_camera) @ pose.T_world_camera
        assert np.linalg.norm(off[:3, 3]) < 0.15 * extent, f"frame {pose.frame_index}"
        assert np.rad2deg(rotation_angle(off[:3, :3])) < 3.0, f"frame {pose.frame_index}"
