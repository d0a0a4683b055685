"""What a frame costs the viewer with a large map: taking over messages, drawing chunks and panel. Prints JSON.

    python tools/measure_viewer.py --landmarks 100000 --poses 10000 --json benchmarks/viewer.json

Fills the scene, then plays frames as a run sends them: a pose, a thousand tracks and an image each, and with every
fifth a refined window of keyframes and landmarks, so that the scene goes on growing. Measured is all that the thread of
the window does for a frame, up to handing it to the GPU, against the 16.7 ms that 60 frames a second allow: more than
it has to do, for the panel is drawn in every frame here, and at most 25 times a second in the window. Processor time is
given too, which other programs hardly lengthen. The rendering itself is reported apart: it is the GPU's work, and takes
far longer where Mesa draws in software.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from vo.bench_machine import read_machine
from vo.message_stream import keyframe_updates, points_updates
from vo.message_types import CompressedImage, Header, Message, Topic
from vo.scene_live import Link, LiveScene
from vo.scene_panel import Picture, read_image
from vo.scene_view import ViewState
from vo.types import Camera, FloatArray, FrameTracks, MapUpdate, PoseEstimate, TrackingStatus, VoError
from vo.view_command import draws_in_software, load_viewer

SCHEMA = "lightvo-viewer/1"
USER_ERROR = 2
FRAME_BUDGET_MS = 1000 / 60
PERIOD_NS = 33_333_333
POSES_PER_KEYFRAME = 5
WINDOW_KEYFRAMES = 10
NUM_TRACKS = 1000
WIDTH, HEIGHT = 1280, 720
CAMERA = Camera(640, 480, np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]]))


Made = TypeVar("Made")


class MadeUpRun:
    """Messages of a camera that drives on, with landmarks along its way."""

    def __init__(self, landmarks_per_keyframe: int) -> None:
        self._per_keyframe = landmarks_per_keyframe
        self._random = np.random.default_rng(0)
        picture = self._random.integers(0, 255, (60, 80, 3)).astype(np.uint8)
        self._jpeg = cv2.imencode(".jpg", cv2.resize(picture, (640, 480)))[1].ravel()

    def pose(self, index: int) -> PoseEstimate:
        T = np.eye(4)
        T[:3, 3] = (3 * np.sin(index / 300), 0.0, 0.05 * index)
        return PoseEstimate(
            index,
            index * PERIOD_NS,
            T,
            TrackingStatus.TRACKING,
            num_matches=800,
            num_inliers=600,
            scale_source="made up",
        )

    def tracks(self, index: int) -> FrameTracks:
        ids = np.arange(NUM_TRACKS) + 40 * index
        keypoints = np.stack([(37 * ids + 3 * index) % 640, (91 * ids) % 480], 1).astype(np.float32)
        lengths = (1 + (NUM_TRACKS - np.arange(NUM_TRACKS)) // 40).astype(np.int32)
        return FrameTracks(index, index * PERIOD_NS, ids, keypoints, lengths, ids % 2 == 0)

    def image(self, index: int) -> CompressedImage:
        return CompressedImage(index, index * PERIOD_NS, 640, 480, self._jpeg)

    def window(self, index: int, num_keyframes: int) -> MapUpdate:
        """The last keyframes up to frame `index`, moved a little, with all their landmarks."""
        newest = index // POSES_PER_KEYFRAME
        keyframes = np.arange(max(0, newest - num_keyframes + 1), newest + 1) * POSES_PER_KEYFRAME
        poses = np.stack([self._noisy(self.pose(int(k))) for k in keyframes])
        ids = (keyframes[:, None] * self._per_keyframe + np.arange(self._per_keyframe)).ravel()
        centres = np.repeat(poses[:, :3, 3], self._per_keyframe, axis=0)
        points = centres + self._random.uniform([-5, -2, 2], [5, 2, 12], (len(ids), 3))
        colors = self._random.integers(60, 255, (len(ids), 3)).astype(np.uint8)
        times = keyframes * PERIOD_NS
        nothing = np.zeros(0, np.int64)
        return MapUpdate(index, index * PERIOD_NS, 0, "made up", keyframes, times, poses, ids, points, colors, nothing)

    def _noisy(self, pose: PoseEstimate) -> FloatArray:
        T: FloatArray = np.eye(4) if pose.T_world_camera is None else pose.T_world_camera.copy()
        T[:3, 3] += self._random.normal(size=3) * 0.01
        return T

    def messages(self, index: int, window_keyframes: int, *, with_picture: bool = True) -> list[Message]:
        """What comes with frame `index`."""
        found = [message_of(Topic.POSE, self.pose(index))]
        if index % POSES_PER_KEYFRAME == 0:
            update = self.window(index, window_keyframes)
            found += [message_of(Topic.KEYFRAME, body) for body in keyframe_updates(update)]
            found += [message_of(Topic.POINTS, body) for body in points_updates(update)]
        if with_picture:
            found += [message_of(Topic.TRACKS, self.tracks(index)), message_of(Topic.IMAGE, self.image(index))]
        return found


def message_of(topic: Topic, body: object) -> Message:
    frame_index = body.frame_index  # type: ignore[attr-defined]
    header = Header(
        topic, "measured", frame_index, time.time_ns(), TrackingStatus.TRACKING, frame_index, frame_index * PERIOD_NS
    )
    return Message(header, body)  # type: ignore[arg-type]


def timed_ms(work: Callable[[], object]) -> float:
    start_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start_ns) * 1e-6


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {
        name: round(float(np.percentile(values, rank)), 3) for name, rank in (("p50", 50), ("p95", 95), ("p99", 99))
    }


class Stages:
    """The stages of every frame: wall time and processor time of this thread, ms."""

    def __init__(self) -> None:
        self._wall: dict[str, list[float]] = {}
        self._processor: dict[str, list[float]] = {}

    def run(self, name: str, work: Callable[[], Made]) -> Made:
        start_ns, spent_ns = time.perf_counter_ns(), time.thread_time_ns()
        made = work()
        spent_ms, wall_ms = (time.thread_time_ns() - spent_ns) * 1e-6, (time.perf_counter_ns() - start_ns) * 1e-6
        self._wall.setdefault(name, []).append(wall_ms)
        self._processor.setdefault(name, []).append(spent_ms)
        return made

    def summary(self) -> dict[str, object]:
        """Percentiles of every stage and of the whole frame."""
        costs = {"wall_ms": self._wall, "processor_ms": self._processor}
        wholes = {key: np.sum(list(cost.values()), axis=0) for key, cost in costs.items()}
        tree: dict[str, object] = {
            key: {name: percentiles(values) for name, values in cost.items()} | {"frame": percentiles(wholes[key])}
            for key, cost in costs.items()
        }
        within = {key: round(float(np.mean(whole <= FRAME_BUDGET_MS)), 4) for key, whole in wholes.items()}
        return tree | {"share_of_frames_within_budget": within}


def measure(num_landmarks: int, num_poses: int, num_frames: int, num_renders: int) -> dict[str, object]:
    """The figures. Raises ViewerError where nothing can be drawn."""
    viewer, in_software = load_viewer(needs_display=False), draws_in_software()
    num_keyframes = -(-num_poses // POSES_PER_KEYFRAME)
    made_up = MadeUpRun(max(1, -(-num_landmarks // num_keyframes)))
    live, view, link = LiveScene(), ViewState(), Link("made up", is_heard=True)
    live.accept(camera_message(), time.time_ns())
    for index in range(num_poses):
        accept_all(live, made_up.messages(index, 1, with_picture=False))
    stages, num_chunks, renders = Stages(), [], []
    with viewer.OffscreenView(WIDTH, HEIGHT, is_smooth=not in_software) as screen:
        fill_ms = timed_ms(lambda: screen.update(live.scene, view, budget_s=np.inf))
        for index in range(num_poses, num_poses + num_frames):
            messages = made_up.messages(index, WINDOW_KEYFRAMES)
            pictures = [read_image(m.body) if isinstance(m.body, CompressedImage) else None for m in messages]
            stages.run("accept", lambda all_=messages, read=pictures: accept_all(live, all_, read))
            num_chunks.append(stages.run("chunks", lambda: screen.update(live.scene, view, budget_s=np.inf)))
            stages.run("aim", lambda: screen.aim(live.scene, view))
            stages.run("panel", lambda: screen.draw_panel(live.picture, live.lines(link), view))
            if index - num_poses < num_renders:
                process_s = time.process_time()
                wall_ms = timed_ms(screen.render)
                renders.append((wall_ms, (time.process_time() - process_s) * 1e3))
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python tools/measure_viewer.py --landmarks {num_landmarks} --poses {num_poses}"
        f" --frames {num_frames} --renders {num_renders}",
        "machine": asdict(read_machine()),
        "landmarks": live.scene.num_landmarks,
        "poses": live.scene.num_poses,
        "keyframes": live.scene.num_keyframes,
        "frames_measured": num_frames,
        "budget_ms": round(FRAME_BUDGET_MS, 2),
        **stages.summary(),
        "chunks_per_frame": {"median": float(np.median(num_chunks)), "max": int(np.max(num_chunks))},
        "fill_ms": round(fill_ms, 1),
        "draws_in_software": in_software,
        "size": [WIDTH, HEIGHT],
        "render_ms": round(float(np.median(renders, axis=0)[0]), 1) if renders else None,
        "render_processor_ms": round(float(np.median(renders, axis=0)[1]), 1) if renders else None,
    }


def accept_all(live: LiveScene, messages: list[Message], pictures: Sequence[Picture | None] = ()) -> None:
    """The messages as they come out of the mailbox: with the pictures that the thread which receives them has read."""
    for message, picture in itertools.zip_longest(messages, pictures):
        live.accept(message, time.time_ns(), picture)


def camera_message() -> Message:
    return Message(Header(Topic.CAMERA, "measured", 0, time.time_ns(), TrackingStatus.INITIALIZING), CAMERA)


def main() -> int:
    parser = argparse.ArgumentParser(description="What a frame costs the viewer with a large map, as JSON.")
    parser.add_argument("--landmarks", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--poses", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=300, help="frames measured (default: %(default)s)")
    parser.add_argument("--renders", type=int, default=5, help="of them drawn (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    if min(options.landmarks, options.poses, options.frames) < 1:
        parser.error("--landmarks, --poses and --frames must be positive")
    try:
        text = json.dumps(measure(options.landmarks, options.poses, options.frames, options.renders), indent=2)
    except VoError as error:
        print(f"measure_viewer: error: {error}", file=sys.stderr)
        return USER_ERROR
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
