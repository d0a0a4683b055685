"""Matching ahead gives what matching on demand gives, one call at a time, and forgets what nobody wants."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.base import Features, Matches
from vo.match_ahead import MatchAhead


def features(number: int) -> Features:
    return Features(torch.zeros(1, 2), torch.tensor([float(number)]), torch.zeros(1, 4), 1, (8, 6), "fake")


class Matcher:
    """Matches that name the pair; notices when it is called twice at once."""

    def __init__(self, duration_s: float = 0.0) -> None:
        self.pairs: list[tuple[int, int]] = []
        self.was_disturbed = False
        self._duration_s = duration_s
        self._busy = threading.Lock()

    def __call__(self, features0: Features, features1: Features) -> Matches:
        if not self._busy.acquire(blocking=False):
            self.was_disturbed = True
            raise AssertionError("two calls at once")
        try:
            time.sleep(self._duration_s)
            pair = int(features0.scores[0]), int(features1.scores[0])
            self.pairs.append(pair)
            return Matches(np.array([pair], np.int64), np.ones(1, np.float32))
        finally:
            self._busy.release()


class Counts:
    def __init__(self) -> None:
        self.took_ns: list[int] = []
        self.waited_ns: list[int] = []

    def __call__(self, took_ns: int, waited_ns: int) -> None:
        self.took_ns.append(took_ns)
        self.waited_ns.append(waited_ns)


def named(matches: Matches) -> tuple[int, int]:
    return int(matches.indices[0, 0]), int(matches.indices[0, 1])


def test_a_pair_made_ahead_is_not_made_again() -> None:
    matcher, counts = Matcher(0.2), Counts()
    ahead, frames = MatchAhead(matcher, counts), [features(i) for i in range(3)]
    for frame in frames:
        ahead.prepare(frame)
    assert matcher.pairs == [(0, 1), (1, 2)]
    assert named(ahead.match(frames[0], frames[1])) == (0, 1)
    assert named(ahead.match(frames[1], frames[2])) == (1, 2)
    assert len(matcher.pairs) == 2
    assert min(counts.took_ns) >= 200_000_000 > max(counts.waited_ns), "the matching counts, and nobody waited for it"


def test_any_other_pair_is_made_on_demand() -> None:
    """After a loss, or to a keyframe. Equal features that are not the same ones are another pair."""
    matcher, counts = Matcher(), Counts()
    ahead, frames = MatchAhead(matcher, counts), [features(i) for i in range(4)]
    for frame in frames:
        ahead.prepare(frame)
    assert named(ahead.match(frames[0], frames[3])) == (0, 3)
    assert named(ahead.match(features(2), frames[3])) == (2, 3)
    assert named(ahead.match(frames[2], frames[3])) == (2, 3)
    assert matcher.pairs == [(0, 1), (1, 2), (2, 3), (0, 3), (2, 3)]


def test_what_is_expected_is_matched_too_and_only_once() -> None:
    matcher, keyframe = Matcher(), features(100)
    frame0, frame1 = features(0), features(1)
    # The newest keyframes may be the frame itself and the one before, which it has been matched to.
    ahead = MatchAhead(matcher, Counts(), expected=lambda: [frame1, frame0, keyframe])
    ahead.prepare(frame0)
    ahead.prepare(frame1)
    ahead.prepare_expected(frame1)
    assert named(ahead.match(frame0, frame1)) == (0, 1)
    assert named(ahead.match(keyframe, frame1)) == (100, 1)
    assert matcher.pairs == [(0, 1), (100, 1)]


def test_a_pair_under_way_is_waited_for() -> None:
    matcher, counts = Matcher(0.1), Counts()
    ahead, frame0, frame1 = MatchAhead(matcher, counts), features(0), features(1)
    ahead.prepare(frame0)
    thread = threading.Thread(target=ahead.prepare, args=(frame1,))
    thread.start()
    while not matcher._busy.locked():
        time.sleep(0.001)
    assert named(ahead.match(frame0, frame1)) == (0, 1)
    thread.join()
    assert matcher.pairs == [(0, 1)]


def test_a_pair_already_made_does_not_wait_for_the_one_under_way() -> None:
    release = threading.Event()

    def blocking(features0: Features, features1: Features) -> Matches:
        if features1 is frames[2]:
            release.wait(20)
        return Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32))

    ahead, frames = MatchAhead(blocking, Counts()), [features(i) for i in range(3)]
    ahead.prepare(frames[0])
    ahead.prepare(frames[1])
    thread = threading.Thread(target=ahead.prepare, args=(frames[2],))
    thread.start()
    ahead.match(frames[0], frames[1])
    assert thread.is_alive()
    release.set()
    thread.join()


def test_what_nobody_asks_for_is_forgotten() -> None:
    matcher = Matcher()
    ahead = MatchAhead(matcher, Counts())
    for number in range(1000):
        ahead.prepare(features(number))
    assert len(ahead._made) <= 16


def test_a_failing_matcher_fails_whoever_called_it_and_nobody_else() -> None:
    def failing(features0: Features, features1: Features) -> Matches:
        raise RuntimeError("kernel failed")

    ahead, frame0, frame1 = MatchAhead(failing, Counts()), features(0), features(1)
    ahead.prepare(frame0)
    with pytest.raises(RuntimeError, match="kernel failed"):
        ahead.prepare(frame1)
    with pytest.raises(RuntimeError, match="kernel failed"):
        ahead.match(frame0, frame1)


@settings(deadline=None, max_examples=25)
@given(num_frames=st.integers(1, 30), seed=st.integers(0, 10_000), expects=st.booleans())
def test_two_threads_get_what_one_would(num_frames: int, seed: int, expects: bool) -> None:
    """Whatever pairs the odometry asks for, in step with the other thread or not."""
    randomness = random.Random(seed)
    frames = [features(i) for i in range(num_frames)]
    matcher = Matcher()
    ahead = MatchAhead(matcher, Counts(), (lambda: frames[:1]) if expects else None)
    ready = threading.Semaphore(0)

    def prepare() -> None:
        for frame in frames:
            ahead.prepare(frame)
            ready.release()
            ahead.prepare_expected(frame)

    thread = threading.Thread(target=prepare)
    thread.start()
    for index in range(num_frames):
        ready.acquire()
        for _ in range(randomness.randint(0, 3)):
            other = max(0, index - randomness.choice([1, 1, 1, 2, 5]))
            assert named(ahead.match(frames[other], frames[index])) == (other, index)
    thread.join()
    assert not matcher.was_disturbed
