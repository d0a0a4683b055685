"""Compare an R2D2 checkpoint with random weights of the same network: inliers between frames of a sequence.

    python tools/r2d2_inliers.py --weights r2d2.pt --source kitti:DIR --frames 40 --gaps 1,3,5

Mutual nearest neighbours, pose by RANSAC under the sequence's intrinsics; true inliers lie within 1.5 px of both
epipolar lines of the true motion. Measured twice: with the configuration's thresholds, below which random weights name
hardly any keypoint; and with the strongest of all pixels, so that both networks name as many.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matching_metrics import PairQuality, pair_quality
from matching_quality import TrueSequence, read_sequence

from frontends.base import VoError
from frontends.nearest import Nearest
from frontends.r2d2 import R2d2, R2d2Config
from frontends.r2d2_network import R2d2Network, checkpoint, read_constructor
from frontends.weights import load_checkpoint
from vo.config import TwoViewConfig
from vo.geometry import invert_pose


@dataclass(frozen=True, slots=True)
class Row:
    """Means per pair of frames."""

    keypoints: float
    matches: float
    inliers: float
    true_inliers: float
    posed: int
    pairs: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare an R2D2 checkpoint with random weights.")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--source", required=True, help="kitti:DIR, tum:DIR, euroc:DIR with ground truth")
    parser.add_argument("--frames", type=int, default=40, help="the first N frames (default: %(default)s)")
    parser.add_argument("--gaps", default="1,3,5", help="frames apart, with commas (default: %(default)s)")
    parser.add_argument("--step", type=int, default=1, help="take every STEP-th pair of a gap")
    parser.add_argument("--keypoints", type=int, default=1024, help="per frame at most (default: %(default)s)")
    parser.add_argument("--max-side", type=int, default=640, help="of the one scale used, px (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    options = parser.parse_args(arguments)
    try:
        compare(options)
    except VoError as error:
        print(f"r2d2_inliers: error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(options: argparse.Namespace) -> None:
    """Prints one line for every network, thresholds and gap."""
    sequence = read_sequence(options.source, options.frames)
    trained, file = load_checkpoint("r2d2", options.weights)
    torch.manual_seed(options.seed)
    random = checkpoint(R2d2Network(read_constructor(trained.constructor or "")).eval())
    print(f"{file.path.name}, {trained.constructor}; {sequence.name}, {len(sequence.frames)} frames")
    print("network  selection   gap  keypoints  matches  inliers  true inliers  posed")
    strongest = {"min_reliability": 0.0, "min_repeatability": 0.0, "spread_cell_px": None}
    for selection, changed in {"config": {}, "strongest": strongest}.items():
        side = options.max_side
        config = R2d2Config(max_keypoints=options.keypoints, max_side=side, min_side=side, **changed)
        for name, constructor, state_dict in (
            ("trained", trained.constructor, trained.state_dict),
            ("random", random["net"], random["state_dict"]),
        ):
            extractor = R2d2(config, constructor, state_dict)
            for gap, row in measure(sequence, extractor, options).items():
                print(
                    f"{name:8} {selection:10} {gap:4} {row.keypoints:10.0f} {row.matches:8.0f} {row.inliers:8.1f} "
                    f"{row.true_inliers:13.1f} {row.posed:3} of {row.pairs}",
                    flush=True,
                )


def measure(sequence: TrueSequence, extractor: R2d2, options: argparse.Namespace) -> dict[int, Row]:
    """By gap."""
    features = [extractor.extract(frame.image) for frame in sequence.frames]
    matcher, two_view, rows = Nearest(), TwoViewConfig(), {}
    for gap in (int(word) for word in options.gaps.split(",")):
        qualities: list[PairQuality] = []
        for start in range(0, len(features) - gap, options.step):
            pair = features[start], features[start + gap]
            begin_s = time.perf_counter()
            matches = matcher.match(*pair)
            match_ms = 1e3 * (time.perf_counter() - begin_s)
            T_true = invert_pose(sequence.T_world_camera[start]) @ sequence.T_world_camera[start + gap]
            qualities.append(pair_quality(*pair, matches, match_ms, T_true, sequence.camera, two_view))
        count = len(qualities)
        rows[gap] = Row(
            sum(f.num_valid for f in features) / len(features),
            sum(q.num_matches for q in qualities) / count,
            sum(q.num_inliers for q in qualities) / count,
            sum(q.num_true_inliers for q in qualities) / count,
            sum(q.is_posed for q in qualities),
            count,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
