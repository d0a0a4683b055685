"""Stages under faults: every thread ends, the first error comes out, what was computed is delivered."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from frontends.base import Features, Matches
from vo.match_ahead import MatchAhead
from vo.odometry_step import OdometryStep
from vo.run_meter import RunMeter
from vo.sources import SkippedFrame
from vo.stages import FrameResult, StageOptions, Stages
from vo.types import Camera, Frame, FrameTracks, PoseEstimate, SourceError, TrackingStatus

NO_MATCHES = Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32))
CAMERA = Camera(8, 6, np.array([[5.0, 0, 4], [0, 5.0, 3], [0, 0, 1]]))
THREADED, LOOP = StageOptions(), StageOptions(is_threaded=False)
BOTH = pytest.mark.parametrize("options", [THREADED, LOOP], ids=["threaded", "loop"])


class FakeSource:
    """Frames at 100 Hz; `before` is called with the index before each is handed out."""

    name = "fake"
    camera = CAMERA
    is_live = False
    ground_truth: Path | None = None

    def __init__(self, num_frames: int | None = 20, before: Callable[[int], object] = lambda index: None) -> None:
        self.num_frames = num_frames
        self.num_closed = 0
        self.skipped: Sequence[SkippedFrame] = ()
        self._before = before
        self.closed = threading.Event()

    def frames(self) -> Iterator[Frame]:
        index = 0
        while index != self.num_frames:
            self._before(index)
            if self.closed.is_set():
                return
            yield Frame(index, index * 10_000_000, np.full((6, 8), index % 256, np.uint8), CAMERA)
            index += 1

    def close(self) -> None:
        self.num_closed += 1
        self.closed.set()


def extract(frame: Frame) -> Features:
    """One keypoint whose score is the image's value, so that a mix-up of frames shows."""
    value = float(frame.image[0, 0])
    return Features(torch.zeros(1, 2), torch.tensor([value]), torch.zeros(1, 4), 1, (8, 6), "fake")


def track(frame: Frame, features: Features) -> OdometryStep:
    assert float(features.scores[0]) == frame.index % 256
    T = np.eye(4)
    T[0, 3] = frame.index
    empty = np.zeros(0, np.int64)
    tracks = FrameTracks(
        frame.index,
        frame.timestamp_ns,
        empty,
        np.zeros((0, 2), np.float32),
        np.zeros(0, np.int32),
        np.zeros(0, np.bool_),
    )
    return OdometryStep(PoseEstimate(frame.index, frame.timestamp_ns, T, TrackingStatus.TRACKING), tracks)


class Run:
    """A run of fakes that keeps what its sink got."""

    def __init__(
        self,
        source: FakeSource | None = None,
        extract_frame: Callable[[Frame], Features] = extract,
        track_frame: Callable[[Frame, Features], OdometryStep] = track,
        sink: Callable[[FrameResult], None] = lambda result: None,
        match: Callable[[Features, Features], Matches] = lambda features0, features1: NO_MATCHES,
    ) -> None:
        self.source = source or FakeSource()
        self.meter = RunMeter()
        self.stop = threading.Event()
        self.indices: list[int] = []
        self.ahead = MatchAhead(match, self.meter.count_match)
        sinks = (self._keep, sink)
        self.stages = Stages(self.source, extract_frame, track_frame, sinks, self.meter, self.stop, self.ahead)

    def _keep(self, result: FrameResult) -> None:
        self.indices.append(result.step.pose.frame_index)

    def run(self, options: StageOptions) -> None:
        before = set(threading.enumerate())
        try:
            self.stages.run(options)
        finally:
            assert set(threading.enumerate()) <= before, "a thread outlived the run"


def failing_at(index: int, error: Exception, made: Callable[[Frame], object] = extract) -> Callable[..., object]:
    def stage(frame: Frame, *rest: object) -> object:
        if frame.index == index:
            raise error
        return made(frame, *rest)

    return stage


@BOTH
def test_every_frame_arrives_in_order(options: StageOptions) -> None:
    run = Run()
    run.run(options)
    assert run.indices == list(range(20))
    assert (run.meter.num_read, run.meter.num_processed, run.meter.num_dropped) == (20, 20, 0)
    assert run.meter.num_poses == 20
    assert run.source.num_closed >= 1


@BOTH
def test_stages_take_short_turns_with_the_interpreter(options: StageOptions) -> None:
    """While the threads run, and only then; a turn that somebody made shorter still is kept."""
    before_s = sys.getswitchinterval()
    for given_s, expected_s in ((before_s, 0.0005 if options.is_threaded else before_s), (0.0001, 0.0001)):
        seen_s: list[float] = []
        run = Run(sink=lambda result, seen_s=seen_s: seen_s.append(sys.getswitchinterval()))  # type: ignore[misc]
        sys.setswitchinterval(given_s)
        try:
            run.run(options)
            assert sys.getswitchinterval() == pytest.approx(given_s, abs=5e-6)
        finally:
            sys.setswitchinterval(before_s)
        assert seen_s == pytest.approx([expected_s] * 20, abs=5e-6)


@BOTH
def test_max_frames(options: StageOptions) -> None:
    run = Run(FakeSource(None))
    run.run(StageOptions(is_threaded=options.is_threaded, max_frames=7))
    assert run.indices == list(range(7))
    assert run.meter.num_read == 7


@BOTH
def test_empty_source(options: StageOptions) -> None:
    run = Run(FakeSource(0))
    run.run(options)
    assert run.indices == []
    assert run.meter.fps == 0.0


@BOTH
@pytest.mark.parametrize("where", ["capture", "extract", "track", "publish"])
def test_a_stage_that_raises_ends_the_run(options: StageOptions, where: str) -> None:
    error = SourceError(f"{where} broke")

    def before(index: int) -> None:
        if where == "capture" and index == 10:
            raise error

    def sink(result: FrameResult) -> None:
        if where == "publish" and result.captured.frame.index == 10:
            raise error

    run = Run(
        FakeSource(None if where != "capture" else 30, before),
        failing_at(10, error) if where == "extract" else extract,  # type: ignore[arg-type]
        failing_at(10, error, track) if where == "track" else track,  # type: ignore[arg-type]
        sink,
    )
    with pytest.raises(SourceError) as caught:
        run.run(options)
    assert caught.value is error
    # The frames before the fault have all been delivered; the sink itself saw the one it broke on.
    assert run.indices == list(range(10 + (where == "publish")))
    assert run.source.num_closed >= 1


def test_the_first_of_two_failures_comes_out() -> None:
    def late(index: int) -> None:
        if index == 10:
            run.source.closed.wait(5)
            raise SourceError("second")

    run = Run(FakeSource(30, late), failing_at(3, ValueError("first")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first"):
        run.run(THREADED)


@BOTH
def test_stop_ends_the_run_and_keeps_what_was_tracked(options: StageOptions) -> None:
    def sink(result: FrameResult) -> None:
        if result.captured.frame.index == 5:
            run.stop.set()

    run = Run(FakeSource(None), sink=sink)
    run.run(options)
    assert run.indices == list(range(len(run.indices)))
    # At most what was tracked and waiting for the sink: one channel and the one in hand.
    assert 6 <= len(run.indices) <= 6 + options.channel_capacity + 1


def test_stop_frees_a_capture_that_waits_for_a_camera() -> None:
    """A source that delivers nothing more is closed, which is what wakes it up."""

    def before(index: int) -> None:
        if index == 3:
            run.stop.set()
            run.source.closed.wait(20)

    run = Run(FakeSource(None, before))
    start = time.monotonic()
    run.run(THREADED)
    assert time.monotonic() - start < 10
    assert run.indices == list(range(len(run.indices)))


def test_a_stage_that_hangs_is_left_behind_and_named() -> None:
    release = threading.Event()

    def hang(frame: Frame) -> Features:
        if frame.index == 2:
            run.stop.set()
            release.wait(20)
        return extract(frame)

    run = Run(extract_frame=hang)
    before = set(threading.enumerate())
    start = time.monotonic()
    run.stages.run(StageOptions(stop_timeout_s=0.2))
    assert time.monotonic() - start < 10
    assert run.meter.left_behind == ("extract",)
    assert run.indices == list(range(len(run.indices))), "what came before was delivered"
    release.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)


def test_the_failure_is_raised_though_another_stage_hangs() -> None:
    release, error = threading.Event(), RuntimeError("kernel failed")

    def hang(frame: Frame) -> Features:
        if frame.index == 3:
            release.wait(20)
        return extract(frame)

    def fail(frame: Frame, features: Features) -> OdometryStep:
        if frame.index == 2:
            raise error
        return track(frame, features)

    run = Run(extract_frame=hang, track_frame=fail)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="kernel failed"):
        run.stages.run(StageOptions(stop_timeout_s=0.2))
    assert run.meter.left_behind == ("extract",)
    assert run.indices == [0, 1]
    release.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)


def test_a_slow_network_finishes_what_came_before_a_bad_frame() -> None:
    """Everything works but the input: ten frames in hand take twice as long as a stage may take to end."""

    def slow(frame: Frame, features: Features) -> OdometryStep:
        time.sleep(0.2)
        return track(frame, features)

    def fail(index: int) -> None:
        if index == 10:
            raise SourceError("another size")

    run = Run(FakeSource(None, fail), track_frame=slow)
    with pytest.raises(SourceError, match="another size"):
        run.stages.run(StageOptions(channel_capacity=20, stop_timeout_s=1.0))
    assert run.indices == list(range(10)) and run.meter.left_behind == ()


def test_frames_that_drip_after_a_failure_do_not_hold_the_end_up() -> None:
    """What was captured before a failure comes through for a limited time, however steadily it comes."""

    def drip(result: FrameResult) -> None:
        if run.source.closed.is_set() or result.captured.frame.index > 3:
            time.sleep(0.1)

    def fail(index: int) -> None:
        if index == 300:
            raise SourceError("gone")

    run = Run(FakeSource(None, fail), sink=drip)
    before = set(threading.enumerate())
    start = time.monotonic()
    with pytest.raises(SourceError, match="gone"):
        run.stages.run(StageOptions(channel_capacity=400, stop_timeout_s=2.0))
    assert time.monotonic() - start < 20, "three hundred of them take half a minute"
    assert run.meter.left_behind == (), "what only has frames left to deliver ends when it is told to"
    assert run.indices == list(range(len(run.indices))) and len(run.indices) < 290
    for thread in set(threading.enumerate()) - before:
        thread.join(5)


def test_interrupt_in_the_main_thread_stops_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(FakeSource(None))
    waits = iter([None, KeyboardInterrupt(), None])
    join = threading.Thread.join

    def joining(self: threading.Thread, timeout: float | None = None) -> None:
        join(self, timeout)
        event = next(waits, None)
        if event is not None:
            raise event

    monkeypatch.setattr(threading.Thread, "join", joining)
    with pytest.raises(KeyboardInterrupt):
        run.run(THREADED)
    assert run.stop.is_set()
    assert run.indices == list(range(len(run.indices)))


def test_slow_stage_drops_the_oldest_frames_of_a_camera() -> None:
    def slow(frame: Frame) -> Features:
        time.sleep(0.02)
        return extract(frame)

    run = Run(FakeSource(60, lambda index: time.sleep(0.002)), slow)
    run.run(StageOptions(drops_oldest=True, channel_capacity=1))
    assert run.meter.num_dropped > 20
    assert run.meter.num_read == 60
    assert len(run.indices) + run.meter.num_dropped == 60
    assert run.indices == sorted(run.indices)
    assert run.indices[-1] == 59, "the newest frame is the one that is kept"
    assert max(run.meter.latencies_ms) < 500


def test_dropped_frames_are_counted_while_the_run_goes_on() -> None:
    """The heartbeat tells how many there are so far."""
    counts: list[int] = []

    def slow(frame: Frame) -> Features:
        time.sleep(0.02)
        return extract(frame)

    run = Run(
        FakeSource(60, lambda index: time.sleep(0.002)), slow, sink=lambda result: counts.append(run.meter.num_dropped)
    )
    run.run(StageOptions(drops_oldest=True, channel_capacity=1))
    assert counts == sorted(counts)
    assert 0 < counts[len(counts) // 2] <= run.meter.num_dropped


@pytest.mark.parametrize("slow", ["extract", "match", "track", "publish"])
def test_frames_of_a_camera_do_not_grow_old_between_the_stages(slow: str) -> None:
    """Whatever stage is slow, at most two frames are under way: what waits is the newest frame, nothing done to it."""
    begun: list[int] = []
    posed: list[int] = []
    under_way: list[int] = []

    def rest(stage: str) -> None:
        time.sleep(0.01 if stage == slow else 0)

    def extracting(frame: Frame) -> Features:
        begun.append(frame.index)
        under_way.append(len(begun) - len(posed))
        rest("extract")
        return extract(frame)

    def matching(features0: Features, features1: Features) -> Matches:
        rest("match")
        return NO_MATCHES

    def tracking(frame: Frame, features: Features) -> OdometryStep:
        rest("track")
        posed.append(frame.index)
        return track(frame, features)

    run = Run(
        FakeSource(80, lambda index: time.sleep(0.002)), extracting, tracking, lambda result: rest("publish"), matching
    )
    run.run(StageOptions(drops_oldest=True))
    assert max(under_way) <= 2
    assert run.indices == posed == begun and posed == sorted(posed)
    assert run.indices[-1] == 79
    assert run.meter.num_read == 80 == len(run.indices) + run.meter.num_dropped
    assert run.meter.num_dropped > 10


def test_a_failing_matcher_ends_the_run() -> None:
    """What the odometry would never have asked for fails the run too: a matcher that cannot match is no use."""
    error, num_calls = RuntimeError("kernel failed"), 0

    def failing(features0: Features, features1: Features) -> Matches:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 10:
            raise error
        return NO_MATCHES

    run = Run(match=failing)
    with pytest.raises(RuntimeError) as caught:
        run.run(THREADED)
    assert caught.value is error
    assert run.indices == list(range(10))


def test_slow_stage_makes_a_file_wait() -> None:
    seen = []

    def slow(frame: Frame) -> Features:
        seen.append(run.meter.num_read - frame.index)
        time.sleep(0.005)
        return extract(frame)

    run = Run(FakeSource(20), slow)
    run.run(StageOptions(channel_capacity=2))
    assert run.indices == list(range(20))
    assert max(seen) <= 4, "the capture ran ahead of the channel"


@BOTH
def test_paced_frames_come_at_their_timestamps(options: StageOptions) -> None:
    arrivals: list[float] = []
    run = Run(FakeSource(15), sink=lambda result: arrivals.append(time.monotonic()))
    run.run(StageOptions(is_threaded=options.is_threaded, is_paced=True))
    # 15 frames at 100 Hz: 140 ms from the first to the last.
    assert 0.12 < arrivals[-1] - arrivals[0] < 1.0
    assert run.meter.duration_s > 0.12


def test_pacing_can_be_stopped() -> None:
    run = Run(FakeSource(None))
    run.source.frames = lambda: iter(  # type: ignore[method-assign]
        [Frame(i, i * 100_000_000_000, np.zeros((6, 8), np.uint8), CAMERA) for i in range(2)]
    )
    threading.Timer(0.2, run.stop.set).start()
    start = time.monotonic()
    run.stages.run(StageOptions(is_paced=True))
    assert time.monotonic() - start < 10
    assert run.indices == [0]


@BOTH
def test_meter_separates_matching_from_tracking(options: StageOptions) -> None:
    """Matching counts as matching wherever it is done; what the odometry waits for it is not its own time."""

    def slow_match(features0: Features, features1: Features) -> Matches:
        time.sleep(0.03)
        return NO_MATCHES

    made: list[Features] = []

    def matching(frame: Frame, features: Features) -> OdometryStep:
        made.append(features)
        if frame.index > 0:
            run.ahead.match(made[-2], features)
        time.sleep(0.01)
        return track(frame, features)

    run = Run(track_frame=matching, match=slow_match)
    run.run(options)
    stages_ms = run.meter.stages_ms
    assert (len(stages_ms["match"]), len(stages_ms["track"])) == (19, 20)
    assert 30 <= np.median(stages_ms["match"]) < 60
    assert 10 <= np.median(stages_ms["track"]) < 30
    assert np.median(run.meter.latencies_ms) >= 40


def test_meter_counts_lost_episodes() -> None:
    lost = {3, 4, 5, 9, 19}

    def losing(frame: Frame, features: Features) -> OdometryStep:
        step = track(frame, features)
        if frame.index not in lost:
            return step
        return OdometryStep(PoseEstimate(frame.index, frame.timestamp_ns, None, TrackingStatus.LOST), step.tracks)

    run = Run(track_frame=losing)
    run.run(THREADED)
    assert (run.meter.num_lost_episodes, run.meter.num_poses) == (3, 15)
