"""Whole runs of `vo bench`: every frame is accounted for, memory is noted along, synchronisations are counted."""

from __future__ import annotations

import json
import threading
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from synthetic_drive import write_drive
from synthetic_world import CAMERA
from test_pipeline import PointExtractor, PointSource, point_frontend

from frontends.base import Features
from vo.bench_stream import MemorySource, SyncCounter, measure_stream
from vo.cli import main
from vo.config import Config
from vo.types import Frame

CPU = torch.device("cpu")


def some_frames(count: int = 12) -> list[Frame]:
    return [frame for frame, _ in zip(PointSource().frames(), range(count), strict=False)]


def test_frames_go_forwards_and_backwards_without_a_jump() -> None:
    source = MemorySource(some_frames(4), CAMERA, 15, 20.0)
    frames = list(source.frames())
    assert [int(frame.image[0, 0]) for frame in frames] == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert [frame.index for frame in frames] == list(range(15))
    assert {b.timestamp_ns - a.timestamp_ns for a, b in pairwise(frames)} == {50_000_000}
    source.close()
    assert list(source.frames()) == []
    with pytest.raises(ValueError, match="2 or more"):
        MemorySource(some_frames(1), CAMERA, 3, 20.0)


def test_a_lossless_run_delivers_every_frame() -> None:
    found = measure_stream(some_frames(), CAMERA, Config(), point_frontend(), CPU, mode="lossless", num_frames=60)
    assert (found.num_frames, found.num_processed, found.num_dropped, found.hz) == (60, 60, 0, None)
    assert found.num_poses == 60 and found.lost_episodes == 0
    assert found.latency.num_calls == 60
    assert 0 < found.latency.min_ms <= found.latency.median_ms <= found.latency.p99_ms <= found.latency.max_ms
    assert [name for name, _ in found.stages] == ["capture", "extract", "match", "track", "publish"]
    assert dict(found.stages)["extract"].num_calls == 60 and dict(found.stages)["match"].num_calls == 59
    assert found.fps > 0
    marked = [mark.num_frames for mark in found.memory]
    assert marked == sorted(marked) and marked[0] == 1 and marked[-1] == 60 and len(marked) >= 20
    assert all(mark.host_bytes > 10_000_000 and mark.gpu_bytes is None for mark in found.memory)
    settled = next(mark for mark in found.memory if mark.num_frames >= 12)
    assert found.host_growth_bytes == found.memory[-1].host_bytes - settled.host_bytes
    assert (found.gpu_growth_bytes, found.num_syncs) == (None, None)


def test_a_run_at_the_pace_of_a_camera_drops_what_it_cannot_keep_up_with() -> None:
    class SlowExtractor(PointExtractor):
        def extract(self, image: NDArray[np.uint8]) -> Features:
            time.sleep(0.04)
            return super().extract(image)

    frontend = replace(point_frontend(), extractor=SlowExtractor())
    found = measure_stream(some_frames(), CAMERA, Config(), frontend, CPU, mode="latest", num_frames=50, hz=100.0)
    assert found.hz == 100.0
    assert found.num_dropped > 0
    assert found.num_frames == 50 == found.num_processed + found.num_dropped
    assert found.latency.min_ms >= 40


def test_the_pace_is_that_of_the_frames_by_default() -> None:
    found = measure_stream(some_frames(), CAMERA, Config(), point_frontend(), CPU, mode="latest", num_frames=5)
    assert found.hz == pytest.approx(10.0)


def test_an_unknown_mode_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fast' is none of lossless, latest"):
        measure_stream(some_frames(), CAMERA, Config(), point_frontend(), CPU, mode="fast", num_frames=5)
    assert main(["bench", "demo", "--config", "orb", "--stream", "lossless,fast"]) == 2
    assert capsys.readouterr().err == "vo: error: --stream: 'fast' is none of lossless, latest\n"


def test_synchronisations_are_counted_from_every_thread_and_other_warnings_stay(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    modes: list[object] = ["as before"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def synchronise() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", UserWarning, stacklevel=1)

    counter = SyncCounter()
    with counter.watching(torch.device("cuda")):
        assert modes[-1] == "warn"
        thread = threading.Thread(target=synchronise)
        thread.start()
        thread.join()
        for _ in range(4):
            synchronise()
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert counter.count == 5
    assert modes[-1] == "as before"
    assert [str(warning.message) for warning in recwarn] == ["something else"]
    with SyncCounter().watching(CPU) as unwatched:
        assert unwatched.count == 0 and len(modes) == 3


def test_bench_reports_whole_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drive = write_drive(tmp_path, 6)
    command = ["bench", f"kitti:{drive}", "--config", "orb", "--device", "cpu", "--repeats", "5", "--frames", "5"]
    stream = ["--stream", "lossless,latest", "--stream-frames", "12", "--stream-hz", "50"]
    assert main([*command, *stream, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["mode"] for run in found["streams"]] == ["lossless", "latest"]
    for run in found["streams"]:
        assert run["num_frames"] == 12 == run["num_processed"] + run["num_dropped"]
        assert {"median_ms", "p95_ms", "p99_ms", "max_ms"} <= run["latency"].keys()
        assert {"extract", "track", "publish"} <= run["stages"].keys()
        assert run["memory"][-1]["host_bytes"] > 0
    assert "--stream lossless,latest --stream-frames 12 --stream-hz 50" in found["command"]
    assert found["warm_up_s"] >= 0
    assert main([*command, *stream]) == 0
    printed = capsys.readouterr().out
    assert "lossless: 12 frames, 0 dropped" in printed and "latest at 50.0 Hz: 12 frames" in printed
