"""`vo bench`: are the statistics right, are the calls timed in turn, does the command say what it measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from synthetic_drive import write_drive

import vo.bench
import vo.bench_machine
import vo.sources.manifest
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_network import LightGlueArchitecture, LightGlueNetwork
from frontends.nearest import Nearest
from vo.bench import BenchRequest, command_line, precision_of, read_frames
from vo.bench_machine import CpuWatch, parse_cpu_times, parse_cpuinfo, parse_meminfo, portable_source, read_machine
from vo.bench_statistics import Ratio, bootstrap_interval, ratio, time_call, time_in_turn, timing
from vo.cli import main
from vo.types import SourceError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), 8)


# --- statistics -----------------------------------------------------------------------------------------------------


def test_timing_gives_percentiles() -> None:
    found = timing([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (found.num_calls, found.median_ms, found.min_ms, found.max_ms) == (5, 3.0, 1.0, 100.0)
    assert found.p95_ms == pytest.approx(4 + 0.8 * 96)
    assert found.p99_ms == pytest.approx(4 + 0.96 * 96)


def test_ratio_is_taken_pair_by_pair() -> None:
    # The ratio of the medians would be 2; a disturbance that hits both calls of a pair must not count.
    found = ratio([1.0, 10.0, 3.0], [4.0, 20.0, 6.0])
    assert (found.num_pairs, found.median, found.min, found.max) == (3, 2.0, 2.0, 4.0)
    assert ratio([1.0], [3.0]) == Ratio(1, 3.0, 3.0, 3.0, 3.0, 3.0)


@pytest.mark.parametrize("times", [([], []), ([1.0], [1.0, 2.0])])
def test_ratio_wants_as_many_times_of_both(times: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="as many times"):
        ratio(*times)
    with pytest.raises(ValueError, match="at least one"):
        timing([])


def test_interval_is_the_bootstrap_distribution_of_the_median() -> None:
    """For an odd number of values that distribution is known: the median of a resample is at most the k-th value when
    more than half of the draws are."""
    values = np.array([1.3, 1.1, 1.9, 1.2, 1.7, 2.4, 1.5, 1.6, 3.0, 1.4, 1.45, 2.2, 1.05])
    num = len(values)
    cumulative = [1 - binom.cdf(num // 2, num, k / num) for k in range(1, num + 1)]
    exact = [float(np.sort(values)[np.searchsorted(cumulative, quantile)]) for quantile in (0.05, 0.95)]
    found = ratio([1.0] * num, values.tolist())
    assert [found.low, found.high] == exact


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_interval_holds_the_median_and_repeats(ours: list[float], seed: int) -> None:
    theirs = np.random.default_rng(seed).uniform(0.1, 10.0, len(ours)).tolist()
    found = ratio(ours, theirs)
    assert found.min <= found.low <= found.high <= found.max
    assert found.min <= found.median <= found.max
    assert found == ratio(ours, theirs)


def test_interval_takes_any_statistic_of_rows() -> None:
    pairs = np.array([[1.0, 2.0], [10.0, 20.0], [5.0, 10.0]])
    low, high = bootstrap_interval(pairs, lambda r: r.sum(axis=1)[:, 1] / r.sum(axis=1)[:, 0])
    assert low == high == 2.0


def test_calls_are_made_in_turn_and_nothing_else_is_timed() -> None:
    order: list[str] = []

    def calls() -> Iterator[tuple[Any, Any]]:
        for _ in range(3):
            time.sleep(0.02)
            order.append("draw")
            yield (lambda: order.append("ours")), (lambda: (time.sleep(0.01), order.append("theirs")))

    ours_ms, theirs_ms = time_in_turn(calls(), CPU)
    assert order == ["draw", "ours", "theirs"] * 3
    assert len(ours_ms) == len(theirs_ms) == 3
    assert min(theirs_ms) >= 10 and min(ours_ms) < 10


def test_cuda_calls_are_timed_by_events_between_synchronisations(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = "start" if "made start" not in order else "end"
            order.append(f"made {self.name}")

        def record(self, stream: object) -> None:
            order.append(f"{self.name} on {stream}")

        def synchronize(self) -> None:
            order.append(f"wait for {self.name}")

        def elapsed_time(self, end: FakeEvent) -> float:
            assert (self.name, end.name) == ("start", "end")
            return 4.5

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    assert time_call(lambda: order.append("call"), torch.device("cuda")) == 4.5
    expected = ["synchronize", "start on stream", "call", "synchronize", "end on stream", "wait for end"]
    assert order == ["made start", "made end", *expected]


# --- the machine ----------------------------------------------------------------------------------------------------


def test_machine_is_read_from_the_system() -> None:
    lines = ["processor : 0", "model name\t: Some CPU @ 2 GHz", "flags : fpu avx2 amx_bf16 sse", "model name : other"]
    assert parse_cpuinfo(lines) == ("Some CPU @ 2 GHz", ("avx2", "amx_bf16"))
    assert parse_cpuinfo([]) == ("", ())
    assert parse_meminfo(["MemFree: 1 kB", "MemTotal:       2048 kB"]) == 2048 * 1024
    assert parse_meminfo([]) is None
    machine = read_machine(num_threads=3)
    assert machine.cpu and machine.num_cores >= 1 and machine.num_threads == 3 and machine.gpu is None


def test_work_of_others_is_what_is_neither_idle_nor_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    line = f"cpu  {2 * ticks} 0 {ticks} {5 * ticks} {ticks} 0 {ticks} 0 9999 0"
    assert parse_cpu_times(["intr 1", line]) == (4.0, 10.0)
    assert parse_cpu_times([]) == (0.0, 0.0)
    readings = iter([(10.0, 100.0), (14.0, 110.0)])
    own = iter([7.0, 8.0])
    monkeypatch.setattr(vo.bench_machine, "parse_cpu_times", lambda lines: next(readings))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    # 4 s of 10 s were busy, 1 s of them by this process.
    assert CpuWatch().others_share() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kitti:/data/kitti/sequences/00", "kitti:sequences/00"),
        ("kitti:../shared/sequences/00/", "kitti:sequences/00"),
        ("/home/me/clips/a.mp4", "clips/a.mp4"),
        ("~/a.mp4", "a.mp4"),
        ("demo", "demo"),
        ("webcam:0", "webcam:0"),
        ("rtsp://camera/stream/1", "rtsp://camera/stream/1"),
        ("/odd:name/x/y", "x/y"),
    ],
)
def test_sources_lose_the_path_of_this_machine(name: str, expected: str) -> None:
    assert portable_source(name) == expected


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench_tree(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `vo bench --json` prints for a frontend without weights."""
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "-m", "vo", "bench", f"kitti:{drive}", "--config", "orb", "--json"]
    command += ["--against", "orb,kornia,opencv", "--repeats", "4", "--frames", "5", "--threads", "1"]
    with output.open("w") as file:
        subprocess.run(command, check=True, stdout=file, cwd=ROOT)
    tree: dict[str, Any] = json.loads(output.read_text())
    return tree


def test_json_says_what_ran_where(bench_tree: dict[str, Any], drive: Path) -> None:
    assert bench_tree["schema"] == "lightvo-bench/1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", bench_tree["date"])
    assert bench_tree["command"] == (
        "vo bench kitti:sequences/05 --config orb --against orb,kornia,opencv --repeats 4 --frames 5 --threads 1"
    )
    assert (bench_tree["source"], bench_tree["num_frames"]) == ("kitti:sequences/05", 5)
    assert (bench_tree["width"], bench_tree["height"]) == (320, 240)
    assert bench_tree["machine"]["cpu"] and bench_tree["machine"]["num_threads"] == 1
    assert bench_tree["versions"]["torch"] == torch.__version__ and "opencv-python" in bench_tree["versions"]
    assert (bench_tree["preset"], bench_tree["settings"]) == ("orb", [])
    assert (bench_tree["extractor"], bench_tree["matcher"]) == ("orb", "nearest")
    assert bench_tree["extractor_precision"] == bench_tree["matcher_precision"] == "as written"
    assert str(drive.parent) not in json.dumps(bench_tree)
    assert bench_tree["others_share"] is None or 0 <= bench_tree["others_share"] <= 1


def test_json_holds_every_stage_and_comparison(bench_tree: dict[str, Any]) -> None:
    stages = bench_tree["odometry"]["stages"]
    assert list(stages) == ["extract", "match", "track", "frame"]
    # One lap of five frames: the first one has nothing to be matched with.
    assert [stages[name]["num_calls"] for name in stages] == [5, 4, 5, 5]
    assert all(0 < stage["min_ms"] <= stage["median_ms"] <= stage["max_ms"] for stage in stages.values())
    assert stages["frame"]["max_ms"] > stages["extract"]["min_ms"]
    comparisons = bench_tree["comparisons"]
    assert [(c["peer"], c["stage"]) for c in comparisons] == [("orb", "extract"), ("orb", "match"), ("orb", "frame")]
    assert all(c["ratio"]["num_pairs"] == 4 and c["ratio"]["median"] > 0 for c in comparisons)
    assert all(c["ours_count"] > 30 and c["theirs_count"] > 30 and c["agreement"] is None for c in comparisons)
    assert len(bench_tree["not_compared"]) == 2
    assert bench_tree["not_compared"][0].startswith("kornia: ")
    assert bench_tree["not_compared"][1].startswith("opencv: ")


def test_a_peer_that_fails_costs_its_own_figures_only(
    drive: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("expected all tensors to be on one device\nmore")

    monkeypatch.setattr(vo.bench, "compare", fail)
    arguments = ["--config", "orb", "--against", "orb", "--repeats", "2", "--frames", "3", "--json"]
    assert main(["bench", f"kitti:{drive}", *arguments]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["odometry"]["stages"]["frame"]["median_ms"] > 0 and tree["comparisons"] == []
    assert tree["not_compared"] == ["orb: failed (RuntimeError: expected all tensors to be on one device)"]


def test_table_is_for_people(drive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "orb", "--against", "orb,opencv", "--repeats", "2", "--frames", "3"]
    assert main(["bench", f"kitti:{drive}", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("source     kitti:sequences/05, 3 frames of 320x240")
    assert any(line.startswith("stage, ms") and line.endswith("calls") for line in lines)
    assert any(line.startswith("against OpenCV ") for line in lines)
    assert sum(line.startswith("not compared: opencv: its networks") for line in lines) == 1
    row = next(line for line in lines if line.startswith("frame ") and "x " in line)
    assert re.search(r"\d+\.\d\dx +\d+\.\d\d\.\.\d+\.\d\d", row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", "2"), "2 frames, expected 3 or more"),
        (("--against", "hloc"), "'hloc' is not known; choose from kornia, orb, opencv"),
        (("--device", "cuda"), "cuda is not available"),
    ],
)
def test_mistakes_are_one_line(
    drive: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["bench", str(drive), "--config", "orb", "--repeats", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vo: error: ") and error.count("\n") == 1 and message in error


def test_missing_clip_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vo.sources.manifest, "datasets_directory", lambda: tmp_path)
    with pytest.raises(SourceError, match=r"clip\.mp4: not found.*or name a SOURCE of real frames"):
        read_frames(BenchRequest())


def test_command_repeats_the_measurement() -> None:
    request = BenchRequest(
        "kitti:/data/00", "/home/me/mine.yaml", ("a.b=c d",), "cpu", ("kornia", "orb"), 5, 6, 2, is_json=True
    )
    command = command_line(request, "kitti:/data/00")
    expected = "vo bench kitti:data/00 --config mine.yaml --set 'a.b=c d' --device cpu --against kornia,orb"
    assert command == f"{expected} --repeats 5 --frames 6 --threads 2"


def test_precision_is_what_a_method_says() -> None:
    state_dict = LightGlueNetwork(LightGlueArchitecture(64, 32, 2, 2)).state_dict()
    assert precision_of(LightGlue(LightGlueConfig(precision="bfloat16"), state_dict)) == "bfloat16"
    assert precision_of(Nearest()) == "as written"
