"""Measure live input: a network camera of 30 fps before a run that manages a third of that.

    python tools/measure_live.py --minutes 10 --json benchmarks/live-http.json

A server on this machine plays the bundled clip as MJPEG over HTTP; ORB with an artificial load takes about 100 ms a
frame. The age of every frame when its pose is there is read from the image itself, in which the server has written when
it was sent: nothing that our own clocks miss is missed. Exit code 0: the median age stays under 2.5 periods of the run,
it does not grow from the first third to the last, and every frame that the server sent is accounted for.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from camera_server import CameraServer, age_ms, clip_images
from numpy.typing import NDArray

from frontends.base import Features
from vo.bench_machine import CpuWatch, read_machine
from vo.config_loader import load_config
from vo.frontend import Frontend, create_frontend
from vo.pipeline import run
from vo.sources import open_source
from vo.stages import FrameResult

SCHEMA = "lightvo-live/1"
MAX_PERIODS = 2.5
# Frames on their way at the end: in the server's socket, in FFmpeg, with the reader, in the stages.
MAX_UNDERWAY = 12
SETTINGS = ("frontend.extractor.max_keypoints=300", "frontend.extractor.max_side=320", "publisher.endpoint=off")


@dataclass(frozen=True, slots=True)
class LiveFigures:
    """What was measured; ages in ms from the server's sending to the pose, periods in ms of the run.

    num_unaccounted  frames that were sent and neither posed, nor dropped, nor skipped.
    """

    seconds: float
    num_sent: int
    num_processed: int
    num_dropped: int
    num_skipped: int
    num_unaccounted: int
    camera_fps: float
    period_ms: float
    age_p50_ms: float
    age_p95_ms: float
    age_max_ms: float
    first_third_p50_ms: float
    last_third_p50_ms: float
    own_latency_p50_ms: float

    @property
    def periods(self) -> float:
        """The median age in periods of the run."""
        return self.age_p50_ms / self.period_ms

    @property
    def is_good(self) -> bool:
        grows = self.last_third_p50_ms > self.first_third_p50_ms + 0.5 * self.period_ms
        return self.periods < MAX_PERIODS and not grows and 0 <= self.num_unaccounted <= MAX_UNDERWAY


class LoadedExtractor:
    """Another extractor, made to take `busy_s` for every image."""

    def __init__(self, extractor: object, busy_s: float) -> None:
        self._extractor, self._busy_s = extractor, busy_s
        self.kind = extractor.kind  # type: ignore[attr-defined]

    def extract(self, image: NDArray[np.uint8]) -> Features:
        start_s = time.monotonic()
        features: Features = self._extractor.extract(image)  # type: ignore[attr-defined]
        time.sleep(max(0.0, self._busy_s - (time.monotonic() - start_s)))
        return features


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the age of poses of a camera that is faster than the run.")
    parser.add_argument("--minutes", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--fps", type=float, default=30.0, help="of the camera (default: %(default)s)")
    parser.add_argument("--busy-ms", type=float, default=100.0, help="each frame takes so long (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    watch = CpuWatch()
    figures = measure(clip_images("demo"), options.minutes * 60, options.fps, options.busy_ms * 1e-3)
    tree = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python tools/measure_live.py --minutes {options.minutes:g}",
        "machine": asdict(read_machine(torch.get_num_threads())),
        "others_share": watch.others_share(),
        "max_periods": MAX_PERIODS,
        "periods": figures.periods,
        "is_good": figures.is_good,
        **asdict(figures),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(tree, indent=2))
    return 0 if figures.is_good else 1


def measure(images: list[NDArray[np.uint8]], duration_s: float, fps: float, busy_s: float) -> LiveFigures:
    """Runs for so long before a camera of its own."""
    config = load_config("orb", SETTINGS)
    frontend = create_frontend(config.frontend, torch.device("cpu"))
    loaded: Frontend = replace(frontend, extractor=LoadedExtractor(frontend.extractor, busy_s))
    ages_ms: list[float] = []
    arrivals_s: list[float] = []

    def note(result: FrameResult) -> None:
        ages_ms.append(age_ms(result.captured.frame.image, time.monotonic_ns()))
        arrivals_s.append(time.monotonic())

    with CameraServer(images, fps) as server:
        source = open_source(server.url, fov_deg=70.0)
        first_sent, stop = server.num_sent, threading.Event()
        threading.Timer(duration_s, stop.set).start()
        summary = run(config, source, loaded, [note], stop=stop)
        num_sent = server.num_sent - first_sent
    if summary.live is None or len(ages_ms) < 6:
        raise RuntimeError(f"only {len(ages_ms)} frames were posed in {duration_s:g} s")
    third = len(ages_ms) // 3
    num_accounted = summary.frames_processed + summary.frames_dropped + summary.frames_skipped
    return LiveFigures(
        seconds=duration_s,
        num_sent=num_sent,
        num_processed=summary.frames_processed,
        num_dropped=summary.frames_dropped,
        num_skipped=summary.frames_skipped,
        num_unaccounted=num_sent - num_accounted,
        camera_fps=summary.live.measured_fps,
        period_ms=1e3 * float(np.median(np.diff(arrivals_s))),
        age_p50_ms=float(np.median(ages_ms)),
        age_p95_ms=float(np.percentile(ages_ms, 95)),
        age_max_ms=max(ages_ms),
        first_third_p50_ms=float(np.median(ages_ms[:third])),
        last_third_p50_ms=float(np.median(ages_ms[-third:])),
        own_latency_p50_ms=summary.latency_ms.p50 if summary.latency_ms is not None else 0.0,
    )


if __name__ == "__main__":
    sys.exit(main())
