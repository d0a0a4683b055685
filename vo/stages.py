"""The stages of a run, in one thread each with bounded channels between them, or one after the other in a loop.

capture -> extract -> match -> track -> publish. Both ways give the same trajectory: the thread "match" only does ahead
what the odometry would ask for in "track", and the loop leaves it out.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from frontends.base import Features
from vo.channel import Channel
from vo.match_ahead import MatchAhead
from vo.odometry_step import OdometryStep
from vo.run_meter import RunMeter
from vo.sources import Source
from vo.types import Frame, SourceError

Given = TypeVar("Given")
Made = TypeVar("Made")

# How long the stages may take to end once the run is to end, or one of them has failed. What takes longer, hanging in a
# driver or at work in a slow network, is left behind: whoever stops a run has its results within two seconds.
STOP_TIMEOUT_S = 1.2
# The last part of that time is for frames in hand only: those that still wait are given up.
_LAST_SHARE = 0.25
# So many times as long where the input alone is bad: everything works, and what is in hand is worth waiting for.
_INPUT_PATIENCE = 5
_POLL_S = 0.05
# How long the capture may take to notice a stop by itself before its source is closed under it.
_CLOSE_AFTER_S = 0.3
# Frames of a camera that are under way at once, from before the upload to the pose: one is being extracted while the
# one before is matched and posed. More would wait in front of the slowest stage and only grow old there.
_NUM_IN_FLIGHT = 2
# How long a thread keeps the interpreter while others wait for it. A stage that only has to start the next piece of
# work on a GPU, or to hand a frame on, must not wait as long as a whole pose takes for each of its few steps: Python's
# own turn is 5 ms.
_TURN_S = 0.0005
# The time of a live frame that is older, or lies ahead, is on another clock.
_MAX_AGE_NS = 10_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A frame and when it was there to be taken, on the monotonic clock, ns."""

    frame: Frame
    captured_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class Extracted:
    """A frame with its features."""

    captured: Captured
    features: Features


@dataclass(frozen=True, slots=True, eq=False)
class FrameResult:
    """What the sinks get: a frame, its features, and what the odometry made of them."""

    captured: Captured
    features: Features
    step: OdometryStep


Sink = Callable[[FrameResult], None]


@dataclass(frozen=True, slots=True)
class StageOptions:
    """How the stages are run.

    drops_oldest  a slow run loses the frames that waited longest (a camera) instead of making the source wait (a file):
                  a frame is given up for its successor before anything is done with it.
    channel_capacity  items that may wait between two stages of a run that loses none.
    is_paced      frames of a file come at their own timestamps.
    max_frames    the capture ends after so many; None: never.
    """

    is_threaded: bool = True
    drops_oldest: bool = False
    channel_capacity: int = 2
    is_paced: bool = False
    max_frames: int | None = None
    stop_timeout_s: float = STOP_TIMEOUT_S


class _StageThread(threading.Thread):
    """A stage in its own thread: closes its channels when it ends, and carries what it raised to the main thread."""

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        takes_from: Sequence[Channel[Any]] = (),
        gives_to: Sequence[Channel[Any]] = (),
    ) -> None:
        # Daemon: a stage that hangs in a driver must not keep the process from ending.
        super().__init__(name=name, daemon=True)
        self._work = work
        self.takes_from = takes_from
        self.gives_to = gives_to
        self.failure: BaseException | None = None
        self.failed_ns = 0

    def run(self) -> None:
        with ExitStack() as ending:
            ending.push(self._carry)
            for channel in self.gives_to:
                ending.callback(channel.close)
            for channel in self.takes_from:
                ending.callback(channel.discard)
            self._work()

    def _carry(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.failure, self.failed_ns = failure, time.monotonic_ns()
        return True


class Stages:
    """One run from a source to its sinks.

    `extract` and `track` are called for every frame in order, each always from the same thread; so are the sinks.
    `ahead`, if there is one, is what `track` asks for matches: it hears of every frame on a thread of its own.
    `stop` ends the run early: the capture ends, frames still waiting are given up, tracked ones reach the sinks. A
    stage that does not end in time is left behind, and `meter.left_behind` names it.
    """

    def __init__(
        self,
        source: Source,
        extract: Callable[[Frame], Features],
        track: Callable[[Frame, Features], OdometryStep],
        sinks: Iterable[Sink],
        meter: RunMeter,
        stop: threading.Event,
        ahead: MatchAhead | None = None,
    ) -> None:
        self._source = source
        self._extract = extract
        self._track = track
        self._sinks = tuple(sinks)
        self._meter = meter
        self._stop = stop
        self._ahead = ahead

    def run(self, options: StageOptions) -> None:
        """Runs to the end of the source, or to `stop`; raises what a stage raised once all stages have ended."""
        self._meter.start()
        try:
            if options.is_threaded:
                with _short_turns():
                    self._run_threads(options)
            else:
                self._run_loop(options)
        finally:
            self._meter.finish(self._source.skipped)
            self._source.close()

    def _run_loop(self, options: StageOptions) -> None:
        for captured in self._captured(options):
            self._deliver(self._tracked(self._extracted(captured)))

    def _run_threads(self, options: StageOptions) -> None:
        is_live, capacity = options.drops_oldest, options.channel_capacity
        # Of a camera's frames only the newest waits.
        frames: Channel[Captured] = Channel(1 if is_live else capacity, drops_oldest=is_live)
        features: Channel[Extracted] = Channel(capacity)
        matched: Channel[Extracted] = Channel(capacity) if self._ahead is not None else features
        results: Channel[FrameResult] = Channel(capacity)
        permits: Channel[None] = Channel(_NUM_IN_FLIGHT)
        taken: Iterable[Captured] = frames
        if is_live:
            for _ in range(_NUM_IN_FLIGHT):
                permits.put(None)
            taken = (captured for _, captured in zip(permits, frames, strict=False))

        def tracked(extracted: Extracted) -> FrameResult:
            result = self._tracked(extracted)
            self._meter.num_dropped = frames.num_dropped  # heartbeats tell of it while the run goes on
            if is_live:
                permits.put(None)
            return result

        threads = [
            _StageThread("capture", lambda: self._pass_on(self._captured(options), _same, frames), (), (frames,)),
            _StageThread(
                "extract", lambda: self._pass_on(taken, self._extracted, features), (frames, permits), (features,)
            ),
            _StageThread("track", lambda: self._pass_on(matched, tracked, results), (matched,), (results, permits)),
            _StageThread("publish", lambda: self._deliver_all(results), (results,)),
        ]
        if self._ahead is not None:
            ahead = self._ahead
            work = partial(self._match_all, ahead, features, matched)
            threads.insert(2, _StageThread("match", work, (features,), (matched,)))
        for thread in threads:
            thread.start()
        try:
            self._wait(threads, options.stop_timeout_s)
        except KeyboardInterrupt:
            self._stop.set()
            self._wait(threads, options.stop_timeout_s)
            raise
        finally:
            self._meter.num_dropped = frames.num_dropped

    def _pass_on(self, items: Iterable[Given], function: Callable[[Given], Made], output: Channel[Made]) -> None:
        for item in items:
            if self._stop.is_set() or not output.put(function(item)):
                return

    def _match_all(self, ahead: MatchAhead, features: Iterable[Extracted], matched: Channel[Extracted]) -> None:
        for extracted in features:
            if self._stop.is_set():
                return
            ahead.prepare(extracted.features)
            if not matched.put(extracted):
                return
            ahead.prepare_expected(extracted.features)

    def _deliver_all(self, results: Iterable[FrameResult]) -> None:
        for result in results:
            self._deliver(result)

    def _wait(self, threads: Sequence[_StageThread], stop_timeout_s: float) -> None:
        """Waits for all threads; once the run is to end, for a limited time. Raises what the first one raised.

        After a failure, frames that were captured before it come through as long as that time lasts; some times longer
        where nothing but the input is bad, since a slow network may have several seconds of them in hand.
        """
        ending_s, is_source_closed = None, False
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(_POLL_S / len(threads))
            if ending_s is None and (self._stop.is_set() or any(thread.failure for thread in threads)):
                ending_s = time.monotonic()
            if ending_s is None:
                continue
            waited_s = time.monotonic() - ending_s
            limit_s = stop_timeout_s * (_INPUT_PATIENCE if self._has_bad_input(threads) else 1)
            if waited_s > _CLOSE_AFTER_S and not is_source_closed:
                # A camera that delivers nothing would hold the capture for ever.
                self._source.close()
                is_source_closed = True
            if waited_s > (1 - _LAST_SHARE) * limit_s:
                self._give_up_waiting(threads, _LAST_SHARE * stop_timeout_s)
                break
        self._meter.left_behind = tuple(thread.name for thread in threads if thread.is_alive())
        failures = sorted((thread for thread in threads if thread.failure), key=lambda thread: thread.failed_ns)
        if failures and failures[0].failure is not None:
            raise failures[0].failure

    def _has_bad_input(self, threads: Sequence[_StageThread]) -> bool:
        """Whether all that failed is the input: a frame that cannot be used, at which the source ends early."""
        failed = [thread for thread in threads if thread.failure is not None]
        is_input = all(thread.name == "capture" and isinstance(thread.failure, SourceError) for thread in failed)
        return bool(failed) and is_input and not self._stop.is_set()

    @staticmethod
    def _give_up_waiting(threads: Sequence[_StageThread], limit_s: float) -> None:
        """Ends the threads that only wait for one that hangs, so that this one alone is left behind.

        Whoever has a frame in hand may finish that one, within the limit.
        """
        end_s = time.monotonic() + limit_s
        for thread in threads:
            for channel in (*thread.takes_from, *thread.gives_to):
                channel.discard()
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _captured(self, options: StageOptions) -> Iterator[Captured]:
        """Frames with the time of their capture, until the source or the run ends."""
        frames = self._source.frames()
        first_ns = None
        while not self._stop.is_set() and self._meter.num_read != options.max_frames:
            start_ns = time.monotonic_ns()
            frame = next(frames, None)
            if frame is None:
                return
            now_ns = time.monotonic_ns()
            self._meter.add_stage("capture", now_ns - start_ns)
            if options.is_paced:
                if first_ns is None:
                    first_ns = now_ns - frame.timestamp_ns
                due_ns = first_ns + frame.timestamp_ns
                if self._stop.wait(max(0, due_ns - now_ns) * 1e-9):
                    return
                now_ns = due_ns
            elif self._source.is_live and 0 <= now_ns - frame.timestamp_ns < _MAX_AGE_NS:
                now_ns = frame.timestamp_ns  # a camera's own time is on the monotonic clock
            self._meter.num_read += 1
            yield Captured(frame, now_ns)

    def _extracted(self, captured: Captured) -> Extracted:
        start_ns = time.monotonic_ns()
        features = self._extract(captured.frame)
        self._meter.add_stage("extract", time.monotonic_ns() - start_ns)
        return Extracted(captured, features)

    def _tracked(self, extracted: Extracted) -> FrameResult:
        start_ns = time.monotonic_ns()
        step = self._track(extracted.captured.frame, extracted.features)
        self._meter.add_track(time.monotonic_ns() - start_ns)
        return FrameResult(extracted.captured, extracted.features, step)

    def _deliver(self, result: FrameResult) -> None:
        start_ns = time.monotonic_ns()
        for sink in self._sinks:
            sink(result)
        end_ns = time.monotonic_ns()
        self._meter.add_stage("publish", end_ns - start_ns)
        self._meter.add_frame(result.step, end_ns - result.captured.captured_ns)


@contextmanager
def _short_turns() -> Iterator[None]:
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(min(before_s, _TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


def _same(captured: Captured) -> Captured:
    return captured
