"""What XFeat*'s fine matcher learns: cells that show the same place, by brute force, and a few steps of training."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from frontends.base import WeightsError
from frontends.frontend import create_pair_matcher
from frontends.training.fine_offsets import cell_pairs, fine_matcher
from frontends.training.homographic_pairs import WarpConfig, homography_flow, random_homography
from frontends.weights import load_file
from frontends.xfeat_star import XFeatStarConfig, load_fine_matcher, refine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import train_xfeat_star  # noqa: E402
from packaged_weights import write_weights  # noqa: E402

needs_weights = pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set")


def test_pairs_of_cells_against_brute_force() -> None:
    H = random_homography(96, np.random.default_rng(4), WarpConfig())
    pairs = cell_pairs(torch.from_numpy(homography_flow(H, 96)))
    expected = []
    for row in range(12):
        for column in range(12):
            x, y = np.rint(cv2.perspectiveTransform(np.array([[[8.0 * column, 8.0 * row]]]), H)[0, 0])
            for v in range(12):
                for u in range(12):
                    dx, dy = x - 8 * u, y - 8 * v
                    if -4 <= dx <= 3 and -4 <= dy <= 3:
                        expected.append((12 * v + u, 12 * row + column, 8 * (dy + 4) + dx + 4))
    assert len(expected) > 60
    found = torch.stack((pairs.cells0, pairs.cells1, pairs.classes), dim=1).tolist()
    assert found == [list(map(int, triple)) for triple in expected]


def test_a_sure_class_is_refined_to_its_offset() -> None:
    """The classes of training are those that `refine` reads."""
    for dx, dy in ((-4, -4), (3, -1), (0, 0), (-2, 3)):
        logits = torch.zeros(1, 64)
        logits[0, 8 * (dy + 4) + dx + 4] = 30.0
        offset, confidence = refine(logits)
        assert offset[0].tolist() == pytest.approx([dx, dy], abs=1e-4) and float(confidence[0]) > 0.99


def test_the_trained_layers_are_those_that_are_loaded() -> None:
    torch.manual_seed(0)
    matcher = fine_matcher()
    with torch.no_grad():
        matcher(torch.randn(64, 128))  # so that the statistics are not neutral
    state_dict = {f"fine_matcher.{name}": tensor for name, tensor in matcher.state_dict().items()}
    loaded = load_fine_matcher(state_dict, torch.device("cpu"))
    rows = torch.randn(10, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(rows), matcher.eval()(rows), atol=1e-5, rtol=1e-5)


def test_packaged_weights_of_a_fine_matcher_refine_as_it_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    matcher = fine_matcher()
    with torch.no_grad():
        matcher(1e-3 * torch.randn(64, 128))  # variances that float16 would not resolve
    own = {f"fine_matcher.{name}": tensor for name, tensor in matcher.state_dict().items()}
    path = tmp_path / "mine.safetensors"
    write_weights(own, path, {"data": "none"})
    state_dict, file = load_file(path)
    assert file.name == "mine" and not any(name.endswith("num_batches_tracked") for name in state_dict)
    loaded = load_fine_matcher({name: tensor.float() for name, tensor in state_dict.items()}, torch.device("cpu"))
    rows = 1e-3 * torch.randn(10, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(rows), matcher.eval()(rows), atol=5e-3, rtol=5e-3)


@needs_weights
def test_the_command_writes_weights_that_match_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for number in range(4):
        coarse = generator.uniform(0, 255, (70, 80, 3)).astype(np.float32)
        cv2.imwrite(str(tmp_path / f"{number}.png"), cv2.resize(coarse, (320, 280), interpolation=cv2.INTER_CUBIC))
    path = tmp_path / "mine.pt"
    assert train_xfeat_star.main(["--photos", str(tmp_path), "--output", str(path), "--steps", "3"]) == 0
    assert "median error" in capsys.readouterr().out
    config = XFeatStarConfig(weights=str(path), max_keypoints=500, min_confidence=0.0)
    matcher = create_pair_matcher(config, torch.device("cpu")).matcher
    image = cv2.imread(str(tmp_path / "0.png"))
    features0, features1, matches = matcher.match_images(image, image)
    assert len(matches) > 100
    # An untrained refinement stays within the cell of the smaller scale.
    assert np.abs(features0.valid_keypoints() - features1.valid_keypoints()).max() <= 4 / 0.65 + 1e-3
    assert len(matcher.seeds(image)) > 100


@needs_weights
def test_weights_without_a_fine_matcher_are_one_line_with_the_remedy() -> None:
    packaged = Path(os.environ["LIGHTVO_WEIGHTS"]) / "xfeat.pth"
    if not packaged.is_file():
        pytest.skip("no folded weights of XFeat at hand")
    with pytest.raises(WeightsError) as error:
        create_pair_matcher(XFeatStarConfig(weights=str(packaged)), torch.device("cpu"))
    assert all(word in str(error.value) for word in ("fine matcher", "xfeat.pt", "tools/train_xfeat_star.py"))
    assert "\n" not in str(error.value)
