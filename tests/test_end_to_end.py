"""Whole runs through the command line, judged by what they leave behind: on the bundled clip and on real sequences.

Bounds stand a margin above what was measured (BENCHMARKS.md), so that a change that costs accuracy fails here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vo.cli import main

WEIGHTS = os.environ.get("LIGHTVO_WEIGHTS")
DATA = os.environ.get("LIGHTVO_DATA")
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="LIGHTVO_WEIGHTS is not set: published weights are not at hand")
needs_data = pytest.mark.skipif(not (WEIGHTS and DATA), reason="LIGHTVO_DATA or LIGHTVO_WEIGHTS is not set")


def run(output: Path, *arguments: str) -> dict[str, Any]:
    """Runs `vo run` in this process and returns the summary it wrote."""
    assert main(["run", *arguments, "--publish", "off", "--quiet", "--output", str(output)]) == 0
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def positions(output: Path) -> np.ndarray:
    return np.loadtxt(output / "trajectory_tum.txt", ndmin=2)[:, 1:4]


@pytest.mark.slow
def test_bundled_clip_without_weights(tmp_path):
    """ORB needs nothing but the package: the floor that every machine reaches."""
    summary = run(tmp_path, "demo", "--config", "orb", "--max-frames", "100")
    assert summary["poses"] == 100
    assert summary["lost_episodes"] == 0
    assert summary["evaluation"]["ate_rmse_m"] < 0.03
    assert summary["evaluation"]["rpe_rot_deg"] < 0.12


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize(("preset", "ate_m", "rotation_deg"), [("demo", 0.025, 0.06), ("xfeat", 0.03, 0.12)])
def test_bundled_clip_with_learned_features(tmp_path, preset, ate_m, rotation_deg):
    summary = run(tmp_path, "demo", "--config", preset, "--max-frames", "80")
    assert summary["poses"] == 80
    assert summary["lost_episodes"] == 0
    assert summary["scale_source"] == "relative"
    assert summary["evaluation"]["coverage"] == 1.0
    assert summary["evaluation"]["ate_rmse_m"] < ate_m
    assert summary["evaluation"]["rpe_rot_deg"] < rotation_deg
    assert all(weights["sha256"] for weights in summary["weights"])


@pytest.mark.slow
@needs_data
def test_kitti_head_with_learned_features(tmp_path):
    """Through the straight and into the turn, where monocular scale is lost if anywhere."""
    summary = run(tmp_path, f"kitti:{DATA}/kitti/sequences/00", "--max-frames", "110")
    assert summary["poses"] == 110
    assert summary["evaluation"]["ate_rmse_m"] < 1.0
    assert summary["evaluation"]["rpe_rot_deg"] < 0.075


@pytest.mark.slow
@needs_data
def test_threads_and_loop_give_the_same_trajectory(tmp_path):
    arguments = (f"kitti:{DATA}/kitti/sequences/00", "--config", "xfeat", "--max-frames", "16")
    run(tmp_path / "threads", *arguments, "--set", "pipeline.threaded=true")
    run(tmp_path / "loop", *arguments, "--set", "pipeline.threaded=false")
    first, second = ((tmp_path / name / "trajectory_tum.txt").read_text() for name in ("threads", "loop"))
    assert first == second


@pytest.mark.slow
@needs_data
def test_a_standing_camera_does_not_move(tmp_path):
    summary = run(tmp_path, f"euroc:{DATA}/euroc/V1_01_head", "--config", "xfeat")
    assert summary["poses"] == summary["frames_processed"] == 45
    assert summary["stationary_frames"] >= 30
    path = positions(tmp_path)
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).sum() < 0.05


@pytest.mark.slow
@needs_data
def test_handheld_indoor_head_with_missing_depth(tmp_path):
    """Frames 280 to 320 of the real sequence, over the end of its depth images, from a list of its own."""
    source = Path(str(DATA)) / "tum" / "rgbd_7scenes_head"
    part = tmp_path / "part"
    part.mkdir()
    for name in ("rgb", "depth", "camera.yaml", "groundtruth.txt"):
        (part / name).symlink_to((source / name).resolve())
    for name, first, last in (("rgb.txt", 280, 320), ("depth.txt", 280, 300)):
        lines = [line for line in (source / name).read_text().splitlines() if not line.startswith("#")]
        (part / name).write_text("\n".join(lines[first:last]) + "\n")
    summary = run(tmp_path / "out", f"tum:{part}", "--config", "tum")
    assert summary["poses"] == 40
    assert summary["lost_episodes"] == 0
    assert summary["evaluation"]["ate_rmse_m"] < 0.03
