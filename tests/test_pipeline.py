"""A whole run against a world of points with exact truth: the same with threads and in a loop, and what it counts."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from synthetic_world import CAMERA, driving_path, make_world, match_exactly, observe

from frontends.aliked import AlikedConfig
from frontends.base import Features, Matches, WeightsError
from frontends.lightglue import LightGlueConfig
from frontends.nearest import NearestConfig
from frontends.orb import OrbConfig
from vo.config import Config, FrontendConfig, PipelineConfig
from vo.evaluation import compare
from vo.frontend import Frontend, create_frontend, create_frontend_or_orb, select_device
from vo.interrupts import stop_on_signals
from vo.odometry_step import OdometryStep
from vo.pipeline import drops_oldest, run
from vo.run_meter import RunMeter
from vo.sources import SkippedFrame
from vo.stages import FrameResult
from vo.summary import UsedWeights, summary_json
from vo.trajectory import Trajectory
from vo.types import Camera, ConfigError, Frame

NUM_FRAMES = 25
WORLD = make_world(1500, (-15.0, -4.0, 3.0), (15.0, 4.0, 40.0), seed=3)
PATH = driving_path(NUM_FRAMES)
# A plain image would count as one of a covered lens.
TEXTURE = np.random.default_rng(5).integers(0, 256, (CAMERA.height, CAMERA.width), np.uint8)


class PointSource:
    """Frames of the drive; the first pixel of the image carries the index, as what the extractor sees."""

    name = "points"
    camera: Camera = CAMERA
    num_frames = NUM_FRAMES
    ground_truth: Path | None = None
    stereo = None

    def __init__(self, *, is_live: bool = False, skipped: Sequence[SkippedFrame] = ()) -> None:
        self.is_live = is_live
        self.skipped = skipped
        self.is_closed = False

    def frames(self) -> Iterator[Frame]:
        for index in range(NUM_FRAMES):
            image = TEXTURE.copy()
            image[0, 0] = index
            yield Frame(index, index * 100_000_000, image, CAMERA)

    def close(self) -> None:
        self.is_closed = True


class PointExtractor:
    kind = "points"

    def extract(self, image: NDArray[np.uint8]) -> Features:
        index = int(image[0, 0])
        return observe(WORLD, PATH[index], 0.3, np.random.default_rng(index))


class PointMatcher:
    """Exact matches, as if found in the second of six layers."""

    def match(self, features0: Features, features1: Features) -> Matches:
        found = match_exactly(features0, features1)
        return Matches(found.indices, found.scores, stop_layer=2)


def point_frontend() -> Frontend:
    return Frontend(
        PointExtractor(), PointMatcher(), "points + exact", "cpu", (UsedWeights("w", "00"),), ("a fallback",)
    )


def steps(threaded: bool, device_name: str = "cpu") -> list[OdometryStep]:
    collected: list[FrameResult] = []
    frontend = replace(point_frontend(), device_name=device_name)
    run(Config(), PointSource(), frontend, [collected.append], threaded=threaded)
    assert [result.captured.frame.index for result in collected] == list(range(NUM_FRAMES))
    return [result.step for result in collected]


@pytest.mark.parametrize("device_name", ["cpu", "some GPU"])
def test_threads_and_loop_give_the_same_trajectory(device_name: str) -> None:
    """To the last bit, tracks included; also where matching to keyframes is begun on suspicion, as on a GPU."""
    in_threads, in_loop = steps(True, device_name), steps(False)
    for one, other in zip(in_threads, in_loop, strict=True):
        assert one.pose.status is other.pose.status
        assert np.array_equal(one.pose.T_world_camera, other.pose.T_world_camera)
        assert np.array_equal(one.tracks.track_ids, other.tracks.track_ids)
    assert [step.pose.stop_layer for step in in_threads] == [0] + [2] * (NUM_FRAMES - 1)


def test_the_run_follows_the_drive() -> None:
    """The right odometry is behind the stages: the drive comes back up to scale.

    5 m; the positions of the first frames are held until there is parallax, which is most of the error.
    """
    poses = np.array([step.pose.T_world_camera for step in steps(True)])
    times_ns = np.arange(NUM_FRAMES) * 100_000_000
    figures = compare(Trajectory(times_ns, poses), Trajectory(times_ns, np.array(PATH))).evaluation
    assert figures.ate_rmse_m < 0.4
    assert figures.rpe_rot_deg < 0.05


def test_summary_of_a_run() -> None:
    skipped = (SkippedFrame(3, "3.png", "torn"), SkippedFrame(4, "4.png", "no depth", is_kept=True))
    source, meter = PointSource(skipped=skipped), RunMeter()
    summary = run(Config(), source, point_frontend(), threaded=True, meter=meter)
    assert source.is_closed
    assert (summary.source, summary.interrupted, summary.device) == ("points", False, "cpu")
    assert (summary.frames_read, summary.frames_processed, summary.frames_dropped) == (NUM_FRAMES, NUM_FRAMES, 0)
    assert summary.frames_skipped == 1, "a frame that only lost its depth was not skipped"
    assert (summary.poses, summary.lost_episodes) == (NUM_FRAMES, 0)
    assert summary.keyframes >= 2
    assert [stage.name for stage in summary.stages] == ["capture", "extract", "match", "track", "publish"]
    assert all(0 <= stage.p50_ms <= stage.p95_ms for stage in summary.stages)
    assert summary.latency_ms is not None
    assert 0 < summary.latency_ms.p50 <= summary.latency_ms.p95 <= summary.latency_ms.p99 <= summary.latency_ms.max
    assert summary.mean_stop_layer == 2.0
    assert summary.mean_matches is not None and summary.mean_matches > 100
    assert (summary.weights, summary.fallbacks) == ((UsedWeights("w", "00"),), ("a fallback",))
    assert summary.fps == pytest.approx(NUM_FRAMES / meter.duration_s)
    assert json.loads(summary_json(summary))["frames_read"] == NUM_FRAMES


def test_summary_of_nothing() -> None:
    """A run that ends before its first frame has no means and no percentiles."""
    stop = threading.Event()
    stop.set()
    summary = run(Config(), PointSource(), point_frontend(), stop=stop)
    assert summary.interrupted
    assert (summary.frames_processed, summary.fps, summary.latency_ms, summary.mean_matches) == (0, 0.0, None, None)
    assert json.loads(summary_json(summary))["stages_ms"] == {}


@pytest.mark.parametrize(
    ("policy", "is_live", "is_paced", "expected"),
    [
        ("auto", False, False, False),
        ("auto", True, False, True),
        ("auto", False, True, True),
        ("lossless", True, True, False),
        ("latest", False, False, True),
    ],
)
def test_policy(policy: str, is_live: bool, is_paced: bool, expected: bool) -> None:
    config = replace(Config(), pipeline=PipelineConfig(policy=policy))
    assert drops_oldest(config, PointSource(is_live=is_live), is_paced) is expected


def test_live_run_that_is_too_slow_counts_its_drops() -> None:
    """The odometry copes with the gaps, and the summary says how many frames were given up."""

    class SlowExtractor(PointExtractor):
        def extract(self, image: NDArray[np.uint8]) -> Features:
            time.sleep(0.03)
            return super().extract(image)

    frontend = replace(point_frontend(), extractor=SlowExtractor())
    config = replace(Config(), pipeline=PipelineConfig(channel_capacity=1))
    summary = run(config, PointSource(is_live=True), frontend)
    assert summary.frames_dropped > 0
    assert summary.frames_read == summary.frames_processed + summary.frames_dropped == NUM_FRAMES


def test_signals_set_the_event_and_then_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- devices and networks --------------------------------------------------------------------------------------------


def test_device_auto_and_cpu() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cuda_that_is_missing_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, reason in ((None, "built without CUDA"), ("13.0", "no NVIDIA GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(ConfigError, match=rf"^frontend\.device: cuda is not available; .*{reason}.*--device cpu$"):
            select_device("cuda")


def test_orb_needs_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTVO_WEIGHTS", str(tmp_path))
    frontend = create_frontend(FrontendConfig(OrbConfig(), NearestConfig()), torch.device("cpu"))
    assert (frontend.description, frontend.weights, frontend.fallbacks) == ("orb + nearest", (), ())


def test_orb_with_a_learned_matcher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^matcher: orb has binary descriptors"):
        FrontendConfig(OrbConfig(), LightGlueConfig())


def test_orb_takes_the_place_of_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "none.pth"
    config = replace(Config(), frontend=FrontendConfig(AlikedConfig(weights=str(missing))))
    with pytest.raises(WeightsError, match=r"none\.pth"):
        create_frontend(config.frontend, torch.device("cpu"))
    used, frontend = create_frontend_or_orb(config, torch.device("cpu"))
    assert isinstance(used.frontend.extractor, OrbConfig) and isinstance(used.frontend.matcher, NearestConfig)
    assert frontend.extractor.kind == "orb"
    assert len(frontend.fallbacks) == 1
    assert "ORB" in frontend.fallbacks[0] and "none.pth" in frontend.fallbacks[0]
    assert replace(used, frontend=config.frontend) == config, "only the frontend differs"


@pytest.mark.skipif(not os.environ.get("LIGHTVO_WEIGHTS"), reason="LIGHTVO_WEIGHTS is not set")
def test_default_networks_say_what_they_are() -> None:
    frontend = create_frontend(FrontendConfig(), torch.device("cpu"))
    assert frontend.description == "aliked-t16 + lightglue"
    assert [weights.name for weights in frontend.weights] == ["aliked-t16", "lightglue-light-aliked-t16"]
    assert all(len(weights.sha256) == 64 for weights in frontend.weights)
