"""Whole runs of the bundled clip's first frames with R2D2, LoFTR and XFeat*: they end, and say what they ran on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from frontends.r2d2_network import R2d2Architecture, R2d2Network, checkpoint
from frontends.training.fine_offsets import fine_matcher
from frontends.weights import load_state_dict
from frontends.xfeat_star import has_fine_matcher
from vo.cli import main


def run(output: Path, preset: str, *overrides: str, num_frames: int = 4) -> dict[str, Any]:
    """Runs `vo run` in this process and returns the summary it wrote."""
    arguments = ["run", "demo", "--config", preset, "--publish", "off", "--quiet", "--max-frames", str(num_frames)]
    for override in overrides:
        arguments += ["--set", override]
    assert main([*arguments, "--output", str(output)]) == 0
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    assert summary["frames_processed"] == num_frames
    return summary


def test_r2d2_runs_with_a_checkpoint_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "small.pt"
    torch.save(checkpoint(R2d2Network(R2d2Architecture(dim=32, mchan=1)).eval()), path)
    extractor = "frontend.extractor"
    sizes = (f"{extractor}.max_side=320", f"{extractor}.min_side=320")
    thresholds = (f"{extractor}.min_reliability=0", f"{extractor}.min_repeatability=0")
    summary = run(tmp_path / "out", "r2d2", f"{extractor}.weights={path}", *sizes, *thresholds)
    assert [weights["name"] for weights in summary["weights"]] == ["small"]
    assert summary["mean_matches"] > 50 and summary["fallbacks"] == []


def test_loftr_runs_with_random_weights_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("kornia", reason="kornia is not installed")
    summary = run(
        tmp_path, "loftr", "frontend.extractor.weights=random", "frontend.extractor.max_side=96", num_frames=3
    )
    assert summary["weights"] == []
    assert len(summary["fallbacks"]) == 1 and "random weights" in summary["fallbacks"][0]


@pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set: XFeat's are not at hand")
def test_xfeat_star_follows_points_even_with_an_untrained_fine_matcher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state_dict, _ = load_state_dict("xfeat")
    backbone = {name: tensor for name, tensor in state_dict.items() if not name.startswith("fine_matcher.")}
    path = tmp_path / "mine.pt"
    own = {f"fine_matcher.{name}": tensor for name, tensor in fine_matcher().state_dict().items()}
    torch.save({**backbone, **own}, path)
    extractor = "frontend.extractor"
    summary = run(
        tmp_path / "out",
        "xfeat-star",
        f"{extractor}.weights={path}",
        f"{extractor}.min_confidence=0",
        f"{extractor}.max_keypoints=4000",
        f"{extractor}.following.max_residual_px=3",
    )
    assert summary["mean_matches"] > 100 and summary["poses"] == 4


def test_loftr_without_weights_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--config", "loftr", "--publish", "off", "--quiet", "--max-frames", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vo: error: ") and error.count("\n") == 1
    assert all(word in error for word in ("loftr", "huggingface.co/kornia/loftr", "weights"))


def test_r2d2_runs_without_any_download_on_our_small_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTVO_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    summary = run(tmp_path / "out", "r2d2", num_frames=6)
    assert [weights["name"] for weights in summary["weights"]] == ["r2d2-small"]
    assert len(summary["fallbacks"]) == 1 and "our own small network" in summary["fallbacks"][0]
    assert summary["mean_matches"] > 200 and summary["poses"] == 6


@pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set: XFeat's are not at hand")
def test_xfeat_star_refines_with_our_fine_matcher_where_the_weights_have_none(tmp_path: Path) -> None:
    state_dict, _ = load_state_dict("xfeat")
    if has_fine_matcher(state_dict):
        pytest.skip("the weights at hand are the published ones, which have a fine matcher")
    summary = run(tmp_path, "xfeat-star", "frontend.extractor.max_keypoints=4000", num_frames=6)
    assert len(summary["fallbacks"]) == 1 and "xfeat-star-fine" in summary["fallbacks"][0]
    assert [used["name"] for used in summary["weights"]] == ["xfeat", "xfeat-star-fine"]
    assert all(len(used["sha256"]) == 64 for used in summary["weights"])
    assert summary["mean_matches"] > 100 and summary["poses"] == 6
