"""The one command that measures on a GPU: on the CPU it runs the same processes, and its files make the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from frontends.aliked import AlikedConfig
from frontends.tuning import synthetic_images
from vo.cli import build_parser
from vo.config_loader import load_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import engine_tables  # noqa: E402
import engine_ways  # noqa: E402
import measure_gpu  # noqa: E402
import write_benchmarks  # noqa: E402

ORB = ("--config", "orb", "--set", "frontend.extractor.max_keypoints=300")
STREAM = (
    "--repeats",
    "4",
    "--frames",
    "5",
    "--stream",
    "lossless,latest",
    "--stream-frames",
    "20",
    "--stream-hz",
    "30",
)


def test_the_parts_are_commands_and_hold_every_figure() -> None:
    files = {f"gpu-{part.name}.json" for part in measure_gpu.PARTS}
    assert {file for _, _, file, _ in write_benchmarks.GPU_FIGURES} == files
    for part in measure_gpu.PARTS:
        if part.flags:
            options = build_parser().parse_args(["bench", *part.flags, "--device", "cuda", "--json"])
            load_config(options.config, options.set)
    assert sum(part.timeout_s for part in measure_gpu.PARTS) < 900
    assert (ROOT / write_benchmarks.GPU_COMMAND.split()[1]).is_file()


def test_bounds_stand_beside_what_was_measured() -> None:
    fast = {"mode": "latest", "fps": 60.0, "latency": {"median_ms": 3.9, "p99_ms": 7.2}}
    every = {"mode": "lossless", "fps": 401.0, "latency": {"median_ms": 9.0, "p99_ms": 9.0}}
    compared = {"stage": "match", "peer": "kornia", "ratio": {"median": 9.04}}
    result = {"extractor": "aliked-t16", "streams": [fast, every], "comparisons": [compared], "engine": ["this"]}
    result |= {"load_s": 0.5, "warm_up_s": 28.0, "peak_gpu_bytes": 2**20}
    text = "\n".join(engine_tables.bound_lines([result]))
    assert "| aliked-t16: capture to pose, p50 / p99 | 4 / 7 ms | 3.9 / 7.2 ms | no |" in text
    assert "| aliked-t16: every frame | 400 frames/s | 401 frames/s | yes |" in text
    assert "| aliked-t16: match, against kornia | 8x | 9.0x | yes |" in text
    assert "start 28 s, GPU memory 1 MiB" in text and "- this" in text
    assert engine_tables.bound_lines([result | {"extractor": "orb"}]) == []


def test_whole_runs_can_be_shortened() -> None:
    parts = {part.name: part for part in measure_gpu.PARTS}
    assert measure_gpu.with_frames(parts["aliked"], None) is parts["aliked"]
    for name in ("aliked", "xfeat", "long"):
        flags = measure_gpu.with_frames(parts[name], 77).flags
        assert build_parser().parse_args(["bench", *flags]).num_stream_frames == 77


def test_measured_figures_make_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (measure_gpu.Part("aliked", ("demo", *ORB, *STREAM), 300),)
    monkeypatch.setattr(measure_gpu, "PARTS", parts)
    results, page = tmp_path / "benchmarks", tmp_path / "PAGE.md"
    assert measure_gpu.main(["--device", "cpu", "--output", str(results)]) == 0
    figures = json.loads((results / "gpu-aliked.json").read_text())
    assert [run["num_frames"] for run in figures["streams"]] == [20, 20]
    # As if it had been one.
    figures["machine"]["gpu"] = "Some GPU"
    figures["streams"][0] |= {"gpu_growth_bytes": 2**20, "num_syncs": 3}
    (results / "gpu-aliked.json").write_text(json.dumps(figures))
    trajectory = {
        "schema": measure_gpu.TRAJECTORY_SCHEMA,
        **{key: figures[key] for key in ("date", "machine", "versions")},
        "command": "python tools/measure_gpu.py --only trajectory",
        "source": "demo",
        "num_poses": [150, 150],
        "path_length": 4.0,
        "rmse": 0.00123,
        "rmse_aligned": 0.001,
        "rotation_deg_per_frame": 0.002,
    }
    (results / "gpu-trajectory.json").write_text(json.dumps(trajectory))
    assert write_benchmarks.main(["--results", str(results), "--output", str(page)]) == 0
    text = page.read_text()
    assert "Some GPU" in text and "| lossless | 20 (0) |" in text and ", 1 | 3 |" in text
    assert "150 and 150 poses; RMSE 0.00123 of a path of 4 (0.001 aligned)" in text
    missing = text.partition("### Not yet measured")[2]
    assert "gpu-long.json" in missing and "gpu-xfeat.json" in missing
    assert "gpu-aliked.json" not in missing and "gpu-trajectory.json" not in missing


def test_a_part_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def running(arguments: list[str], timeout_s: float) -> str:
        if "long" in arguments:
            raise subprocess.TimeoutExpired(arguments, timeout_s)
        if "broken" in arguments:
            raise subprocess.CalledProcessError(2, arguments)
        return "{}\n"

    monkeypatch.setattr(measure_gpu, "_vo", running)
    names = ("broken", "long", "fine")
    monkeypatch.setattr(measure_gpu, "PARTS", tuple(measure_gpu.Part(name, (name,), 7) for name in names))
    assert measure_gpu.main(["--device", "cpu", "--output", str(tmp_path), "--only", ",".join(names)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-fine.json"]
    said = capsys.readouterr().err
    assert "broken: ended with 2" in said and "long: not done after 7 s" in said and "failed: broken, long" in said


class SmallScene:
    """A source of an artificial scene; its images are smaller than those of any camera."""

    def frames(self) -> Iterator[SimpleNamespace]:
        return iter([SimpleNamespace(image=image) for image in synthetic_images((64, 96, 3), 12)])

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set")
def test_every_way_is_timed_and_held_to_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, where the times mean nothing; the table then stands on the page."""
    monkeypatch.setattr(engine_ways, "open_source", lambda name: SmallScene())
    monkeypatch.setattr(engine_ways, "SIZES", ((96, 64),))
    monkeypatch.setattr(engine_ways, "EXTRACTORS", (lambda: AlikedConfig(max_keypoints=64),))
    monkeypatch.setattr(engine_ways, "DEPTH_CAPACITY", 64)
    assert engine_ways.main(["--device", "cpu", "--repeats", "1", "--capacities", "64", "--no-compile"]) == 0
    tree = json.loads(capsys.readouterr().out)
    ways = {row["way"]: row for row in tree["rows"] if row["network"] == "aliked-t16"}
    assert set(ways) == {"float32", "tf32", "float32, benchmarked", "float32, planar", "float32, planar, benchmarked"}
    assert ways["float32"]["keypoints"] is None and ways["float32, planar"]["keypoints"] > 0.99
    matching = [row for row in tree["rows"] if row["network"].startswith("lightglue")]
    assert {"float32", "bfloat16", "float32, one graph, wide pair, call"} <= {row["way"] for row in matching}
    assert all(row["ms"] > 0 for row in tree["rows"])
    (tmp_path / "gpu-engine.json").write_text(json.dumps(tree))
    failed = {"counts": {"passed": 20, "failed": 1}, "failed": ["tests/test_gpu.py::test_a"]}
    checked = {**{key: tree[key] for key in ("date", "machine", "versions", "command")}, **failed}
    (tmp_path / "gpu-checks.json").write_text(json.dumps({"schema": measure_gpu.CHECKS_SCHEMA, **checked}))
    assert write_benchmarks.main(["--results", str(tmp_path), "--output", str(tmp_path / "PAGE.md")]) == 0
    text = (tmp_path / "PAGE.md").read_text()
    assert "20 passed, 1 failed." in text and "- failed: `tests/test_gpu.py::test_a`" in text
    assert "| aliked-t16 | 96x64 | 64 | float32, planar |" in text


def test_the_checks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "..F\nFAILED tests/test_gpu.py::test_a - assert\n1 failed, 2 passed, 900 deselected in 5.00s\n"
    monkeypatch.setattr(measure_gpu, "_run", lambda *_, **__: subprocess.CompletedProcess([], 1, said))
    found = json.loads(measure_gpu.checks(measure_gpu.PARTS[0], "cpu"))
    assert found["counts"] == {"failed": 1, "passed": 2} and found["failed"] == ["tests/test_gpu.py::test_a"]
    monkeypatch.setattr(measure_gpu, "_run", lambda *_, **__: subprocess.CompletedProcess([], 4, "usage: ..."))
    with pytest.raises(subprocess.CalledProcessError):
        measure_gpu.checks(measure_gpu.PARTS[0], "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert measure_gpu.main(["--output", str(tmp_path)]) == 2
    assert measure_gpu.main(["--only", "air", "--output", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "measure_gpu: error: no GPU: torch.cuda.is_available() is false"
    assert second == "measure_gpu: error: 'air' is not a part"


def test_a_path_is_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of trajectories, on a path of a hundred poses in the place of the networks' ones."""
    lines = [f"{i / 10} {i * 0.1} {0.01 * (i % 7)} 0 0 0 0 1" for i in range(100)]

    def running(arguments: list[str], timeout_s: float) -> str:
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir()
        is_ours = output.name == "ours"
        moved = [line.replace(" 0 0 0 0 1", f" {0.001 * is_ours * (i % 2)} 0 0 0 1") for i, line in enumerate(lines)]
        (output / "trajectory_tum.txt").write_text("\n".join(moved) + "\n")
        (output / "summary.json").write_text(json.dumps({"engine": ["a choice"], "fallbacks": []}))
        return ""

    monkeypatch.setattr(measure_gpu, "_vo", running)
    found = json.loads(measure_gpu.trajectories(measure_gpu.PARTS[-1], "cpu"))
    assert found["num_poses"] == [100, 100] and found["engine"] == ["a choice"]
    assert found["path_length"] == pytest.approx(10.0, rel=0.1)
    assert found["rmse"] == pytest.approx(0.001 / 2**0.5, rel=0.01)
    assert found["largest_step_difference"] == pytest.approx(0.001)
    assert found["command"] == "python tools/measure_gpu.py --only trajectory"
