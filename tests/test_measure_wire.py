"""The measurement of the wire runs, and what it counts is right; its times are another machine's matter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
TOOL = TOOLS / "measure_wire.py"
sys.path.insert(0, str(TOOLS))

import measure_stuck  # noqa: E402
import wire_floor  # noqa: E402
import wire_tables  # noqa: E402


def test_nothing_is_lost_by_those_that_keep_up_and_the_others_recover() -> None:
    command = [sys.executable, "-W", "error", str(TOOL), "--seconds", "3", "--rate", "60", "--tracks", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == "" and done.returncode in (0, 1)
    result = json.loads(done.stdout)
    assert result["published"] == {"pose": 300, "tracks": 300}, "180, and 120 for the one that comes back"
    assert result["keep_up"]["num_lost"] == result["keep_up"]["num_out_of_order"] == 0
    assert result["stopped"]["num_received"] == {"pose": 300, "tracks": 300}, "its queue holds what came meanwhile"
    assert result["stopped"]["num_lost"] == 0 and result["stopped"]["current_after_s"] is not None
    assert len(result["rejoin_s"]) == 1 and result["num_sessions"] == [2] * 5
    within = result["within_limits"]
    assert within["nothing_lost_or_out_of_order"] and within["restart_noticed"]
    assert set(result["publish_ms"]) == {"all_keep_up", "one_stopped", "p99_ratio"}
    # In a process that is starved a pose may be late, but no clock runs backwards.
    assert all(entry["p50"] > 0 for entry in result["keep_up"]["latency_ms"].values())
    assert set(result["floor_ms"]) == {"pose", "tracks"} and all(ms["p50"] > 0 for ms in result["floor_ms"].values())
    text = "\n".join(wire_tables.wire_lines([result], [], []))
    assert "as many bytes as `pose` by plain sockets" in text
    assert "0 of 1800 messages lost by consumers that keep up, 0 out of order" in text
    assert "With a stuck consumer: not measured yet." in text and "restart of the publisher is noticed by all" in text


def test_plain_sockets_bring_every_message_to_every_consumer() -> None:
    """In order and whole: an age that is not of this second would come of bytes that were taken for a time."""
    worked: list[int] = []
    sizes = {"small": 9, "large": 300_000}
    ages = wire_floor.measure_floor(0.25, 60, sizes, 2, lambda: worked.append(1))
    assert len(worked) == 15 and {name: len(values) for name, values in ages.items()} == {"small": 30, "large": 30}
    assert all(-1000 < age < 20_000 for values in ages.values() for age in values)
    assert wire_floor.percentiles([1.0, 2.0, 3.0]) == {"p50": 2.0, "p99": pytest.approx(2.98), "max": 3.0}


def test_stretches_change_places() -> None:
    plans = [measure_stuck.Plan(4, starts_stuck=starts) for starts in (True, False)]
    for index in range(24):
        assert plans[0].is_stuck(index) != plans[1].is_stuck(index)
    assert [plans[0].is_stuck(index) for index in range(9)] == [True] * 4 + [False] * 4 + [True]


def test_a_real_run_meets_every_frame_with_and_without_a_stuck_consumer(tmp_path: Path) -> None:
    result = tmp_path / "stuck.json"
    flags = ["demo", "--config", "orb", "--pairs", "1", "--stretch", "7", "--max-frames", "14", "--json", str(result)]
    assert measure_stuck.main(flags) == 0
    tree = json.loads(result.read_text())
    assert tree["num_frames"] == {"all_keep_up": 4, "one_stuck": 4}, "the first five of every stretch are left out"
    assert 0 < tree["num_stuck_consumers"] <= 2
    for figure in tree["figures"].values():
        assert figure["all_keep_up"]["p50"] > 0 and figure["p99_ratio"]["low"] <= figure["p99_ratio"]["high"]
    assert "4 and 4 frames" in "\n".join(wire_tables.wire_lines([], [tree], []))
