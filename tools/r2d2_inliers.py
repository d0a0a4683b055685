"""Compare an R2D2 checkpoint with random weights of the same network: inliers between frames of a sequence.

    python tools/r2d2_inliers.py --weights r2d2.pt --source kitti:DIR

The protocol, so that no figure is picked by hand: the extractor's own defaults (all scales, spread keypoints, 1024 of
them); frames 0, 20, 40, ... of the first 200 against those 1, 3 and 5 later; mutual nearest neighbours; inliers of the
odometry's two-view pose, and true inliers within 1.5 px of both epipolar lines of the true motion. Random weights are
those of five seeds, of which the median counts; the interval is a bootstrap over the pairs.

What is fair: at the extractor's thresholds on reliability and repeatability random weights name no keypoint, which
says that the thresholds work and nothing of descriptors. So both networks are compared without thresholds, where both
name as many keypoints ("free"); the trained one is shown with them, too, as users run it ("config").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matching_metrics import Change, PairQuality, pair_quality
from matching_quality import TrueSequence, read_sequence
from torch import Tensor

from frontends.base import Features, VoError
from frontends.nearest import Nearest
from frontends.r2d2 import R2d2, R2d2Config
from frontends.r2d2_network import R2d2Network, checkpoint, read_constructor
from frontends.weights import load_checkpoint
from vo.bench_statistics import bootstrap_interval
from vo.config import TwoViewConfig
from vo.geometry import invert_pose
from vo.types import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One network: keypoints per frame, share of them above both thresholds, and the pairs (N,) of every gap."""

    keypoints: float
    passing: float
    pairs: Mapping[int, Sequence[PairQuality]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        compare(options)
    except VoError as error:
        print(f"r2d2_inliers: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare an R2D2 checkpoint with random weights.")
    parser.add_argument("--weights", type=Path, help="default: the packaged ones")
    parser.add_argument("--source", required=True, help="kitti:DIR, tum:DIR, euroc:DIR with ground truth")
    parser.add_argument("--frames", type=int, default=200, help="the first N frames (default: %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="frames between pairs (default: %(default)s)")
    parser.add_argument("--gaps", type=_numbers, default=(1, 3, 5), help="frames apart (default: 1,3,5)")
    parser.add_argument("--seeds", type=int, default=5, help="random networks (default: %(default)s)")
    parser.add_argument(
        "--one-scale", type=int, metavar="PX", help="longer side of the only scale (default: all scales)"
    )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def compare(options: argparse.Namespace) -> None:
    """Prints every network at every gap, then the ratios."""
    sequence = read_sequence(options.source, options.frames)
    trained, file = load_checkpoint("r2d2", options.weights)
    config = R2d2Config()
    if options.one_scale is not None:
        config = replace(config, max_side=options.one_scale, min_side=options.one_scale)
    free = replace(config, min_reliability=0.0, min_repeatability=0.0)
    print(f"{file.path.name}, {trained.constructor}; {sequence.name}, {len(sequence.frames)} frames")
    print("network    selection  gap  keypoints  passing  matches  inliers  true inliers  posed")
    for selected, name in ((config, "config"), (free, "free")):
        found = measure(sequence, R2d2(selected, trained.constructor, trained.state_dict), config, options)
        report("trained", name, found)
    random = []
    for seed, tensors in random_networks(trained.constructor or "", options.seeds):
        random.append(measure(sequence, R2d2(free, trained.constructor, tensors), config, options))
        report(f"random {seed}", "free", random[-1])
    for gap in options.gaps:
        # Whatever it is that is counted, a pair without a pose has none.
        for what in ("num_inliers", "num_true_inliers"):
            counts = np.array([[getattr(pair, what) for pair in each.pairs[gap]] for each in (found, *random)])
            ratio = ratio_to_random(counts.T.astype(np.float64))
            print(
                f"gap {gap}, {what[4:]}: {ratio.value:.1f}x the median seed (90 %: {ratio.low:.1f} to {ratio.high:.1f})"
            )


def random_networks(constructor: str, num_seeds: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Seeds and fresh weights of the same network."""
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        fresh = checkpoint(R2d2Network(read_constructor(constructor)).eval())
        yield seed, fresh["state_dict"]  # type: ignore[misc]


def measure(sequence: TrueSequence, extractor: R2d2, config: R2d2Config, options: argparse.Namespace) -> Measured:
    """Every gap; frames that belong to no pair are not looked at."""
    features: dict[int, Features] = {}
    matcher, two_view = Nearest(), TwoViewConfig()
    pairs: dict[int, list[PairQuality]] = {gap: [] for gap in options.gaps}
    for start in range(0, len(sequence.frames) - max(options.gaps), options.every):
        for gap in options.gaps:
            for index in (start, start + gap):
                if index not in features:
                    features[index] = extractor.extract(sequence.frames[index].image)
            pair = features[start], features[start + gap]
            T_true = invert_pose(sequence.T_world_camera[start]) @ sequence.T_world_camera[start + gap]
            quality = pair_quality(*pair, matcher.match(*pair), 0.0, T_true, sequence.camera, two_view)
            pairs[gap].append(quality)
    counts = np.array([each.num_valid for each in features.values()])
    # A product above that of the thresholds is necessary to pass both, so this is the most that can.
    limit = config.min_reliability * config.min_repeatability
    passing = sum(int((each.scores[: each.num_valid] >= limit).sum()) for each in features.values())
    return Measured(float(counts.mean()), passing / max(int(counts.sum()), 1), pairs)


def report(name: str, selection: str, found: Measured) -> None:
    for gap, pairs in found.pairs.items():
        matches, inliers, true = (
            np.mean([getattr(pair, what) for pair in pairs])
            for what in ("num_matches", "num_inliers", "num_true_inliers")
        )
        print(
            f"{name:10} {selection:9} {gap:4} {found.keypoints:10.0f} {found.passing:8.2f} {matches:8.0f} "
            f"{inliers:8.1f} {true:13.1f} {sum(pair.is_posed for pair in pairs):3} of {len(pairs)}",
            flush=True,
        )


def ratio_to_random(counts: FloatArray) -> Change:
    """Of counts (N, 1 + seeds), pair by pair, the trained network first: mean over that of the median seed."""

    def statistic(resampled: FloatArray) -> FloatArray:
        means = resampled.mean(axis=1)
        ratios: FloatArray = means[:, 0] / np.maximum(np.median(means[:, 1:], axis=1), 1.0)
        return ratios

    return Change(float(statistic(counts[None])[0]), *bootstrap_interval(counts, statistic))


if __name__ == "__main__":
    sys.exit(main())
