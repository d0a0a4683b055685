"""The tools that watch long runs and live input: what they look at, and what they conclude."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import endurance_tables
import measure_robustness
import soak
from measure_live import LiveFigures
from soak import Sample, judge, look, thinned, watch

FIGURES = LiveFigures(
    seconds=600.0,
    num_sent=18_000,
    num_processed=6000,
    num_dropped=11_990,
    num_skipped=3,
    num_unaccounted=7,
    camera_fps=29.97,
    period_ms=100.0,
    age_p50_ms=170.0,
    age_p95_ms=240.0,
    age_max_ms=400.0,
    first_third_p50_ms=171.0,
    last_third_p50_ms=169.0,
    own_latency_p50_ms=150.0,
)


def samples(resident_mb: list[float], num_files: int = 19) -> list[Sample]:
    return [Sample(60.0 * index, int(mb * 1e6), num_files, 13) for index, mb in enumerate(resident_mb)]


def test_what_is_flat_and_what_is_not() -> None:
    warm = [100.0, 300.0]
    flat = judge(samples([*warm, *[400.0, 405.0] * 20]), 120.0)
    assert flat.is_flat
    assert flat.spread_percent == flat.momentary_spread_percent == pytest.approx(1.25)
    moment = judge(samples([*[400.0] * 20, 430.0, *[400.0] * 20]), 0.0)
    assert moment.is_flat and moment.momentary_spread_percent == pytest.approx(7.5)
    assert not judge(samples([*[400.0] * 20, *[430.0] * 2, *[400.0] * 20]), 0.0).is_flat
    leak = judge(samples([*warm, *(400.0 + index for index in range(30))]), 120.0)
    assert not leak.is_flat and leak.growth_percent > 5
    assert judge(samples([*warm, *[400.0] * 5]), 0.0).spread_percent > 90, "the warm-up is judged where it is none"
    fewer = [replace(sample, num_files=19 - (index == 7)) for index, sample in enumerate(samples([400.0] * 40))]
    assert judge(fewer, 0.0).is_flat and judge(fewer, 0.0).num_files == (18, 19)
    files = [replace(sample, num_files=19 + index // 20) for index, sample in enumerate(samples([400.0] * 40))]
    assert not judge(files, 0.0).is_flat
    threads = [replace(sample, num_threads=13 + index // 39) for index, sample in enumerate(samples([400.0] * 40))]
    assert not judge(threads, 0.0).is_flat
    with pytest.raises(ValueError, match="no sample after the warm-up of 600 s"):
        judge(samples([400.0] * 3), 600.0)


def test_a_look_at_this_process_sees_its_files() -> None:
    before = look(os.getpid(), 0.0)
    with open(os.devnull) as _:
        after = look(os.getpid(), 1.0)
    assert after.num_files == before.num_files + 1
    assert soak.added_files([before, after]) == {"null": 1} and soak.added_files([after, before]) == {}
    assert before.resident_bytes > 10_000_000 and before.num_threads >= 1


def test_a_process_is_watched_until_it_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    seen = watch(child, 60.0, 0.2)
    assert child.returncode == 0
    assert 1 <= len(seen) <= 20
    assert [sample.second for sample in seen] == sorted(sample.second for sample in seen)


@pytest.mark.parametrize("count", [1, 59, 60, 61, 360])
def test_few_samples_are_kept_and_the_last_is_among_them(count: int) -> None:
    every = samples([400.0] * count)
    kept = thinned(every)
    assert len(kept) <= 60 and kept[-1] == every[-1]
    assert count > 60 or kept == every


def test_two_neighbouring_ports_are_free() -> None:
    assert soak.free_endpoint().startswith("tcp://127.0.0.1:")


def test_live_figures_are_judged() -> None:
    assert FIGURES.is_good and FIGURES.periods == pytest.approx(1.7)
    assert not replace(FIGURES, age_p50_ms=260.0).is_good
    assert not replace(FIGURES, last_third_p50_ms=230.0).is_good
    assert not replace(FIGURES, num_unaccounted=40).is_good
    assert not replace(FIGURES, num_unaccounted=-1).is_good


def test_the_tables_show_what_was_found() -> None:
    live = {**asdict(FIGURES), "periods": FIGURES.periods, "others_share": 0.04}
    verdict = judge(samples([400.0, 401.0, 402.0]), 0.0)
    a_soak = {
        "command": "vo run loop:demo",
        "minutes": 60.0,
        "num_frames": 12345,
        "num_lost_episodes": 2,
        "verdict": asdict(verdict) | {"is_flat": verdict.is_flat},
        "samples": [asdict(sample) for sample in samples([400.0, 402.0])],
    }
    text = "\n".join(endurance_tables.endurance_lines([live], [a_soak]))
    assert "| 18000 | 6000 | 11990 | 7 | 100 | 170, 240, 400 | 1.70 | 171, 169 | 4 % |" in text
    assert "| `vo run loop:demo` | 60 | 12345 | 2 | 402 | 0.25 % (0.50 %) |" in text
    assert "Not measured yet." in "\n".join(endurance_tables.endurance_lines([], []))


def test_the_table_of_camera_faults_compares_with_the_undamaged_run() -> None:
    case = {"frames": 200, "poses": 200, "frames_to_recover": 0, "segments": 1, "ate_m": 0.2, "rotation_deg": 0.047}
    hurt = case | {"name": "10 black from 60", "poses": 190, "frames_to_recover": None, "ate_m": 0.25}
    result = {"command": "run it", "date": "2026-11-28", "cases": [case | {"name": "undamaged"}, hurt]}
    text = "\n".join(endurance_tables.robustness_lines([result]))
    assert "| undamaged | 200 of 200 | 0 | 1 | 0.200 | 1.00 | 0.0470 |" in text
    assert "| 10 black from 60 | 190 of 200 | never | 1 | 0.250 | 1.25 | 0.0470 |" in text
    assert "Not measured yet." in "\n".join(endurance_tables.robustness_lines([]))


def test_every_fault_is_tried_on_the_bundled_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_robustness.torch, "set_num_threads", lambda _: None)  # the other tests' share, too
    file = tmp_path / "faults.json"
    flags = ["--config", "orb", "--start", "12", "--max-frames", "30"]
    assert measure_robustness.main(["demo", *flags, "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    cases = {case["name"]: case for case in result["cases"]}
    assert result["command"].endswith("demo --start 12 --config orb --max-frames 30")
    assert list(cases) == [
        "undamaged",
        "10 black from 12",
        "10 blurred from 12",
        "10 half exposure from 12",
        "10 missing from 12",
        "5 repeated from 12",
        "every 3. frame",
        "every 5. frame",
    ]
    counts = {name: (case["frames"], case["poses"]) for name, case in cases.items()}
    assert counts["undamaged"] == (30, 30) and counts["10 half exposure from 12"] == (30, 30)
    assert counts["10 black from 12"] == (30, 20), "no pose is made up"
    assert counts["10 missing from 12"] == (20, 20) and counts["every 3. frame"] == (10, 10)
    assert all(case["frames_to_recover"] == 0 and case["segments"] == 1 for case in cases.values())
    assert all(case["ate_m"] < 0.02 for case in cases.values())
