"""Our frontend against a peer: the same stage of both, called in turn on consecutive frames.

Both sides start from the same place, the image of a frame as the source delivers it or features in memory, and end
at the same one, in memory of the host where a matcher is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, pairwise

import numpy as np
import torch

from frontends.base import Extractor, Features, Matcher, Matches
from vo.bench_peers import Peer
from vo.bench_report import Comparison
from vo.bench_statistics import ratio, time_in_turn, timing
from vo.config import TwoViewConfig
from vo.frontend import Frontend
from vo.geometry import undistort
from vo.progress import Advance
from vo.relative_pose import estimate_relative_pose
from vo.types import Camera, Frame

WARM_UP_CALLS = 3
_SAME_PLACE_PX = 0.1

Calls = Iterator[tuple[Callable[[], object], Callable[[], object]]]


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What is the same for both sides: consecutive frames (three or more), the robust estimation, the device."""

    frames: Sequence[Frame]
    camera: Camera
    two_view: TwoViewConfig
    device: torch.device
    num_repeats: int


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """What both sides found, as means per call; see `Comparison`."""

    counted: str
    counts: tuple[float, float]
    agreement: float | None = None
    layers: tuple[float | None, float | None] = (None, None)


def compare(conditions: Conditions, frontend: Frontend, peer: Peer, advance: Advance) -> list[Comparison]:
    """The stages that the peer has: extract, match, and where it has both, frame."""
    compared = []
    if peer.extractor is not None:
        advance(f"extract against {peer.name}")
        compared.append(_compare_extract(conditions, peer, frontend.extractor, peer.extractor))
    if peer.matcher is not None:
        ours = [frontend.extractor.extract(frame.image) for frame in conditions.frames]
        theirs: list[Features] | None = ours
        if not peer.is_same_network:
            theirs = _extracted(conditions.frames, peer.extractor)
        if theirs is not None:
            advance(f"match against {peer.name}")
            compared.append(_compare_match(conditions, peer, (frontend.matcher, ours), (peer.matcher, theirs)))
    if peer.extractor is not None and peer.matcher is not None:
        advance(f"frame against {peer.name}")
        our_chain = _Chain(conditions, frontend.extractor, frontend.matcher)
        compared.append(_compare_frame(conditions, peer, our_chain, _Chain(conditions, peer.extractor, peer.matcher)))
    return compared


def _extracted(frames: Sequence[Frame], extractor: Extractor | None) -> list[Features] | None:
    return None if extractor is None else [extractor.extract(frame.image) for frame in frames]


def _compare_extract(conditions: Conditions, peer: Peer, ours: Extractor, theirs: Extractor) -> Comparison:
    def calls() -> Calls:
        for frame in cycle(conditions.frames):
            yield partial(ours.extract, frame.image), partial(theirs.extract, frame.image)

    found = [(ours.extract(frame.image), theirs.extract(frame.image)) for frame in conditions.frames]
    counts = _mean([f.num_valid for f, _ in found]), _mean([f.num_valid for _, f in found])
    agreement = _mean([same_places(*pair) for pair in found]) if peer.is_same_network else None
    return _timed(conditions, "extract", peer, calls(), _Outcome("keypoints", counts, agreement))


def _compare_match(
    conditions: Conditions, peer: Peer, ours: tuple[Matcher, list[Features]], theirs: tuple[Matcher, list[Features]]
) -> Comparison:
    """Every frame with the next; each side has its own features, which are the same ones for the same network."""
    sides = (ours, theirs)

    def calls() -> Calls:
        while True:
            # New objects in every lap: what a matcher keeps of the previous frame helps it as in a run, but nothing
            # that it kept in the previous lap may. The first pair of a lap is not timed, for it has no previous frame.
            laps = [[replace(features) for features in side[1]] for side in sides]
            for (matcher, _), lap in zip(sides, laps, strict=True):
                matcher.match(lap[0], lap[1])
            for index in range(1, len(conditions.frames) - 1):
                call0, call1 = (
                    partial(matcher.match, lap[index], lap[index + 1])
                    for (matcher, _), lap in zip(sides, laps, strict=True)
                )
                yield call0, call1

    found = [[matcher.match(f0, f1) for f0, f1 in pairwise(made)] for matcher, made in sides]
    outcome = _Outcome(
        "matches",
        (_mean([len(matches) for matches in found[0]]), _mean([len(matches) for matches in found[1]])),
        _mean([same_matches(*pair) for pair in zip(*found, strict=True)]) if peer.is_same_network else None,
        (_mean_layers(found[0]), _mean_layers(found[1])),
    )
    return _timed(conditions, "match", peer, calls(), outcome)


def _compare_frame(conditions: Conditions, peer: Peer, ours: _Chain, theirs: _Chain) -> Comparison:
    def calls() -> Calls:
        while True:
            for chain in (ours, theirs):
                chain.begin(conditions.frames[0])
            for frame in conditions.frames[1:]:
                yield partial(ours.advance, frame), partial(theirs.advance, frame)

    counts = []
    for chain in (ours, theirs):
        chain.begin(conditions.frames[0])
        counts.append(_mean([chain.advance(frame) for frame in conditions.frames[1:]]))
    return _timed(conditions, "frame", peer, calls(), _Outcome("matches", (counts[0], counts[1])))


class _Chain:
    """Features, matches to the previous frame, and the relative pose: what a frame costs without a map."""

    def __init__(self, conditions: Conditions, extractor: Extractor, matcher: Matcher) -> None:
        self._camera = conditions.camera
        self._two_view = conditions.two_view
        self._extractor = extractor
        self._matcher = matcher
        self._previous: Features | None = None

    def begin(self, frame: Frame) -> None:
        self._previous = self._extractor.extract(frame.image)

    def advance(self, frame: Frame) -> int:
        """The number of matches to the previous frame; whether they give a pose is not what is measured here."""
        features, previous = self._extractor.extract(frame.image), self._previous
        self._previous = features
        if previous is None:
            return 0
        matches = self._matcher.match(previous, features)
        rays0 = undistort(previous.valid_keypoints()[matches.indices[:, 0]], self._camera)
        rays1 = undistort(features.valid_keypoints()[matches.indices[:, 1]], self._camera)
        estimate_relative_pose(rays0, rays1, self._camera.focal_px, self._two_view)
        return len(matches)


def _timed(conditions: Conditions, stage: str, peer: Peer, calls: Calls, outcome: _Outcome) -> Comparison:
    time_in_turn(islice(calls, WARM_UP_CALLS), conditions.device)
    ours_ms, theirs_ms = time_in_turn(islice(calls, conditions.num_repeats), conditions.device)
    return Comparison(
        stage=stage,
        peer=peer.name,
        description=peer.description,
        ours=timing(ours_ms),
        theirs=timing(theirs_ms),
        ratio=ratio(ours_ms, theirs_ms),
        counted=outcome.counted,
        ours_count=outcome.counts[0],
        theirs_count=outcome.counts[1],
        agreement=outcome.agreement,
        ours_layers=outcome.layers[0],
        theirs_layers=outcome.layers[1],
    )


def same_places(ours: Features, theirs: Features) -> float:
    """Share of their keypoints that have one of ours within 0.1 px."""
    if theirs.num_valid == 0 or ours.num_valid == 0:
        return float(theirs.num_valid == 0)
    distances = torch.cdist(theirs.keypoints[: theirs.num_valid].double(), ours.keypoints[: ours.num_valid].double())
    return float((distances.amin(dim=1) < _SAME_PLACE_PX).double().mean())


def same_matches(ours: Matches, theirs: Matches) -> float:
    """Share of their matches that are ours too."""
    if len(theirs) == 0:
        return 1.0
    both = set(map(tuple, ours.indices.tolist())) & set(map(tuple, theirs.indices.tolist()))
    return len(both) / len(theirs)


def _mean_layers(found: Sequence[Matches]) -> float | None:
    """None for a matcher without layers."""
    layers = [matches.stop_layer for matches in found]
    return _mean(layers) if any(layers) else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
