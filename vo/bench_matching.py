"""`vo bench-matching`: how good the matches of a front-end are on pairs with a known homography or pose."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from frontends.base import Features, Matches
from frontends.frontend import create_pair_matcher
from frontends.loftr import LoftrConfig
from frontends.xfeat_star import XFeatStarConfig
from vo.bench_machine import portable_source, read_machine
from vo.config import Config
from vo.config_loader import load_config
from vo.frontend import create_frontend, select_device
from vo.matching_pairs import LARGE_SCENES, HomographyPair, ImagePair, PosedPair, read_pairs
from vo.matching_scores import (
    CORNER_AUC_PX,
    MMA_PX,
    POSE_AUC_DEG,
    GroupScore,
    PairScore,
    score_homography,
    score_posed,
    summarise,
)
from vo.output import write_atomically
from vo.progress import Advance, progress
from vo.summary import library_versions
from vo.types import SourceError

SCHEMA = "lightvo-bench-matching/1"
ALL = "all"
Image = NDArray[np.uint8]
MatchPair = Callable[[Image, Image, str], tuple[Features, Features, Matches]]


@dataclass(frozen=True, slots=True)
class MatchingRequest:
    """What the user asked for.

    pairs    a directory in HPatches' layout, or a list of posed pairs.
    images   what the names of a list lie under; None: beside the list.
    output   a file for all figures as JSON.
    """

    pairs: Path
    images: Path | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    device: str | None = None
    max_pairs: int | None = None
    skips_large: bool = False
    epipolar_threshold: float = 5e-4
    output: Path | None = None
    is_json: bool = False


def bench_matching_command(request: MatchingRequest) -> int:
    """Measures and prints; raises VoError in one line."""
    overrides = list(request.overrides)
    if request.device is not None:
        overrides.append(f"frontend.device={request.device}")
    config = load_config(request.config, overrides)
    pairs = read_pairs(request.pairs, request.images, LARGE_SCENES if request.skips_large else ())
    pairs = pairs[: request.max_pairs]
    match_pair, description = create_match(config)
    with progress(len(pairs), is_quiet=not sys.stderr.isatty()) as advance:
        scores = score_pairs(pairs, match_pair, config, request.epipolar_threshold, advance)
    groups = group_scores(pairs, scores)
    tree = result_tree(request, description, groups, scores)
    text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    if request.output is not None:
        write_atomically(request.output, text)
    print(text if request.is_json else "\n".join(score_lines(description, groups)), end="" if request.is_json else "\n")
    return 0


def create_match(config: Config) -> tuple[MatchPair, str]:
    """What matches two images, and its name. Raises WeightsError."""
    frontend, device = config.frontend, select_device(config.frontend.device)
    if isinstance(frontend.extractor, XFeatStarConfig | LoftrConfig):
        pair_matcher = create_pair_matcher(frontend.extractor, device).matcher
        return lambda image0, image1, _name: pair_matcher.match_images(image0, image1), pair_matcher.kind
    made = create_frontend(frontend, device)
    return _CachedMatch(made.extractor.extract, made.matcher.match), made.description


class _CachedMatch:
    """Extracts each image of a pair once; the first of a pair is kept, since many lists go on with it."""

    def __init__(self, extract: Callable[[Image], Features], match: Callable[[Features, Features], Matches]) -> None:
        self._extract, self._match = extract, match
        self._kept: tuple[str, Features] | None = None

    @torch.inference_mode()
    def __call__(self, image0: Image, image1: Image, name0: str) -> tuple[Features, Features, Matches]:
        if self._kept is None or self._kept[0] != name0:
            self._kept = name0, self._extract(image0)
        features0, features1 = self._kept[1], self._extract(image1)
        return features0, features1, self._match(features0, features1)


def score_pairs(
    pairs: Sequence[ImagePair], match_pair: MatchPair, config: Config, epipolar_threshold: float, advance: Advance
) -> list[PairScore]:
    """Every pair in turn. Raises SourceError for an image that cannot be read."""
    scores = []
    for pair in pairs:
        image0, image1 = read_image(pair.image0), read_image(pair.image1)
        features0, features1, matches = match_pair(image0, image1, str(pair.image0))
        keypoints0, keypoints1 = (np.asarray(f.valid_keypoints(), np.float64) for f in (features0, features1))
        match pair:
            case HomographyPair():
                size = (image0.shape[1], image0.shape[0])
                scores.append(score_homography(pair, keypoints0, keypoints1, matches.indices, size))
            case PosedPair():
                posed = score_posed(pair, keypoints0, keypoints1, matches.indices, config.two_view, epipolar_threshold)
                scores.append(posed)
        advance(pair.name)
    return scores


def read_image(path: Path) -> Image:
    """(H, W, 3) RGB. Raises SourceError."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise SourceError(f"{path}: not an image that OpenCV can read")
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


def group_scores(pairs: Sequence[ImagePair], scores: Sequence[PairScore]) -> list[GroupScore]:
    """Every group, and all of them together where there are several."""
    thresholds = CORNER_AUC_PX if isinstance(pairs[0], HomographyPair) else POSE_AUC_DEG
    names = list(dict.fromkeys(score.group for score in scores))
    groups = [summarise(name, [score for score in scores if score.group == name], thresholds) for name in names]
    return [*groups, summarise(ALL, scores, thresholds)] if len(names) > 1 else groups


def score_lines(description: str, groups: Sequence[GroupScore]) -> list[str]:
    """The figures for people."""
    lines = [f"method      {description}"]
    for group in groups:
        areas = ", ".join(f"@{threshold:g} {100 * area:.1f}" for threshold, area in group.auc)
        recall = "" if group.recall is None else f", recall {group.recall:.3f}"
        lines += [
            f"{group.group:<12}{group.num_pairs} pairs, {group.num_failed} without an estimate; "
            f"{group.mean_keypoints:.0f} keypoints, {group.mean_matches:.0f} matches",
            f"            precision {group.precision:.3f}{recall}, matching score {group.matching_score:.3f}",
            f"            AUC {areas} ({'corners, px' if group.mma else 'pose, deg'})",
        ]
        if group.mma:
            means = ", ".join(f"@{limit} {value:.3f}" for limit, value in zip(MMA_PX, group.mma, strict=True))
            lines.append(f"            MMA {means}")
    return lines


def result_tree(
    request: MatchingRequest, description: str, groups: Sequence[GroupScore], scores: Sequence[PairScore]
) -> dict[str, object]:
    """All figures for JSON; an infinite error is none."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(request),
        "machine": asdict(read_machine(torch.get_num_threads())),
        "versions": dict(library_versions()),
        "source": portable_source(str(request.pairs)),
        "method": description,
        "settings": list(request.overrides),
        "mma_px": list(MMA_PX),
        "groups": [asdict(group) for group in groups],
        "pairs": [{**asdict(s), "error": s.error if math.isfinite(s.error) else None} for s in scores],
    }


def command_line(request: MatchingRequest) -> str:
    """The command that repeats the measurement, without where this machine keeps the images."""
    words = ["vo", "bench-matching", portable_source(str(request.pairs))]
    words += ["--config", Path(request.config).name] if request.config is not None else []
    for override in request.overrides:
        words += ["--set", override]
    words += ["--max-pairs", str(request.max_pairs)] if request.max_pairs is not None else []
    words += ["--skip-large"] if request.skips_large else []
    return shlex.join(words)
