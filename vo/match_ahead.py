"""Matches between neighbouring frames, made on a thread of their own before the odometry asks for them.

The pose of frame t is the odometry's business and runs on the CPU; meanwhile the matcher may already compare t with
t + 1. A matcher gives the same matches whenever and wherever it is asked, so the poses are the same with and without.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from frontends.base import Features, Matches

MatchFunction = Callable[[Features, Features], Matches]
BeginFunction = Callable[[Features, Features, Matches], None]
CountFunction = Callable[[int, int], None]

# Pairs kept for the odometry; more than there can be frames between the two threads.
_MAX_KEPT = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """The matches of two sets of features, and how long they took."""

    features0: Features
    features1: Features
    matches: Matches
    took_ns: int


class MatchAhead:
    """A matcher for two threads: one gives it the frames as they come, the other asks for pairs.

    match     the matcher; called by one thread at a time, because matchers keep what they know of previous frames.
    count     is told, for every pair that is asked for, how long matching took and how long the asking thread waited,
              both in ns.
    expected  gives features that a frame may be matched to besides those of the previous one, most likely first. A
              guess that is wrong costs time and nothing else.
    begin     hears of every pair of neighbours as soon as it has been matched, on the thread that prepares them.
    """

    def __init__(
        self,
        match: MatchFunction,
        count: CountFunction,
        expected: Callable[[], Sequence[Features]] | None = None,
        begin: BeginFunction | None = None,
    ) -> None:
        self._match = match
        self._count = count
        self._expected = expected
        self._begin = begin
        # `_turn` is held while the matcher works, `_shelf` only to look at what it has made.
        self._turn, self._shelf = threading.Lock(), threading.Lock()
        self._previous: Features | None = None
        self._before: Features | None = None
        self._made: deque[_Made] = deque(maxlen=_MAX_KEPT)

    def prepare(self, features: Features) -> None:
        """Matches the frame before to this one, the next of the sequence."""
        self._before, self._previous = self._previous, features
        if self._before is not None:
            matches = self._make(self._before, features)
            if self._begin is not None:
                self._begin(self._before, features, matches)

    def prepare_expected(self, features: Features) -> None:
        """Matches this frame also to what else is expected; to be called while the odometry has begun with it."""
        others = self._expected() if self._expected is not None else ()
        other = next((other for other in others if other is not features and other is not self._before), None)
        if other is not None:
            self._make(other, features)

    def match(self, features0: Features, features1: Features) -> Matches:
        """The matches of a pair, made ahead if the pair is one of those, else here and now."""
        start_ns = time.monotonic_ns()
        made = self._take(features0, features1)
        if made is None:
            with self._turn:
                # The pair may have been the one that the other thread was at.
                made = self._take(features0, features1) or self._made_now(features0, features1)
        self._count(made.took_ns, time.monotonic_ns() - start_ns)
        return made.matches

    def _make(self, features0: Features, features1: Features) -> Matches:
        with self._turn:
            made = self._made_now(features0, features1)
            with self._shelf:
                self._made.append(made)
        return made.matches

    def _made_now(self, features0: Features, features1: Features) -> _Made:
        start_ns = time.monotonic_ns()
        matches = self._match(features0, features1)
        return _Made(features0, features1, matches, time.monotonic_ns() - start_ns)

    def _take(self, features0: Features, features1: Features) -> _Made | None:
        """A pair made ahead. What was made for earlier frames and never asked for goes with it."""
        with self._shelf:
            for made in self._made:
                if made.features0 is features0 and made.features1 is features1:
                    while self._made[0].features1 is not features1:
                        self._made.popleft()
                    self._made.remove(made)
                    return made
        return None
