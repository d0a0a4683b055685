"""Reading a live capture, step by step with a clock of the test's own: times, flaws, silence, and coming back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from fake_capture import FakeCapture, image

from vo.sources.base import SkippedFrame
from vo.sources.camera_reader import CameraReader, Grabbed
from vo.sources.cameras import camera_from_fov
from vo.types import SourceError

CAMERA = camera_from_fov(64, 48, 70.0)
SECOND = 1_000_000_000


class Clock:
    """Goes on by `step_ns` whenever it is read."""

    def __init__(self, step_ns: int, start_ns: int = 0) -> None:
        self.now_ns, self.step_ns = start_ns, step_ns

    def __call__(self) -> int:
        self.now_ns += self.step_ns
        return self.now_ns


def reader_of(
    capture: FakeCapture, clock: Callable[[], int], said: list[str] | None = None, **settings
) -> CameraReader:
    return CameraReader(
        "webcam:0", capture, CAMERA, clock_ns=clock, say=(said if said is not None else []).append, **settings
    )


def take(frames: Iterator[Grabbed | SkippedFrame], count: int) -> list[Grabbed | SkippedFrame]:
    return [next(frames) for _ in range(count)]


def test_frames_are_timed_as_they_arrive() -> None:
    clock = iter([0, 100, 200, 200, 300, 400])
    capture = FakeCapture([image(1), image(2), image(3), None, image(4)])
    said: list[str] = []
    reader = reader_of(capture, lambda: next(clock), said)
    read = take(reader.frames(), 5)
    assert [(g.index, g.timestamp_ns) for g in read if isinstance(g, Grabbed)] == [(0, 100), (1, 200), (4, 400)]
    assert [(s.index, s.reason) for s in read if isinstance(s, SkippedFrame)] == [
        (2, "the clock did not advance"),
        (3, "cannot be decoded"),
    ]
    assert said == ["webcam:0: times of frames: measured when the frame was handed over"]


def test_the_driver_s_time_is_taken_where_it_is_on_the_monotonic_clock() -> None:
    """V4L2 says when the exposure ended: here 40 ms before the frame could be had."""
    clock = Clock(30_000_000, 50 * SECOND)
    taken_ms = [50_020.0 + 30.0 * index for index in range(4)]
    said: list[str] = []
    reader = reader_of(FakeCapture([image(1)] * 4, taken_ms), clock, said)
    read = take(reader.frames(), 4)
    assert [g.timestamp_ns for g in read if isinstance(g, Grabbed)] == [round(1e6 * ms) for ms in taken_ms]
    assert said == ["webcam:0: times of frames: driver, monotonic clock"]
    assert reader.report(2).measured_fps == pytest.approx(1000 / 30)
    assert reader.report(2).frames_grabbed == 4
    assert reader.report(2).frames_dropped == 2


@pytest.mark.parametrize(
    "driver_ms",
    [0.0, -1.0, float("nan"), float("inf"), 1.7e12, 50_500.0, 40_000.0],
    ids=["zero", "unknown", "nan", "infinite", "Unix time", "the future", "ten seconds ago"],
)
def test_a_driver_s_time_that_cannot_be_one_is_not_believed(driver_ms: float) -> None:
    reader = reader_of(FakeCapture([image(1)], [driver_ms]), Clock(10_000_000, 50 * SECOND))
    (read,) = take(reader.frames(), 1)
    assert isinstance(read, Grabbed) and read.timestamp_ns == 50 * SECOND + 20_000_000
    assert reader.clock == "measured when the frame was handed over"


@pytest.mark.parametrize("jump_ms", [3_600_000.0, -3_600_000.0])
def test_a_driver_s_clock_that_jumps_by_an_hour_is_left_for_good(jump_ms: float) -> None:
    """Times go on rising as the frames come; nothing is lost but one frame's worth of precision."""
    clock = Clock(30_000_000, 7200 * SECOND)
    taken_ms = [7_200_000 + 30.0 * (index + 1) + (jump_ms if 2 <= index < 4 else 0.0) for index in range(6)]
    said: list[str] = []
    read = take(reader_of(FakeCapture([image(1)] * 6, taken_ms), clock, said).frames(), 6)
    times_ns = [g.timestamp_ns for g in read if isinstance(g, Grabbed)]
    assert len(times_ns) == 6
    assert times_ns == sorted(set(times_ns))
    assert times_ns[-1] - times_ns[0] < SECOND
    assert len(said) == 2 and "the driver's clock has jumped" in said[1]


def test_a_missed_frame_is_no_gap() -> None:
    frames = reader_of(FakeCapture([image(1), False, False, image(2)]), Clock(1_000_000)).frames()
    read = take(frames, 2)
    assert [(g.index, g.follows_gap) for g in read if isinstance(g, Grabbed)] == [(0, False), (1, False)]


def test_a_silent_camera_that_nobody_can_open_again_is_an_error() -> None:
    reader = reader_of(FakeCapture([]), Clock(SECOND))
    with pytest.raises(SourceError, match=r"webcam:0: no frame for 6\.0 s; is the camera still plugged in\?"):
        next(reader.frames())


def test_an_image_of_another_size_is_skipped_and_said_to_be_wrong_when_it_lasts() -> None:
    wrong = image(1, width=32)
    frames = reader_of(FakeCapture([image(1), wrong, image(2), *[wrong] * 20]), Clock(SECOND)).frames()
    first, skipped, again = take(frames, 3)
    assert isinstance(first, Grabbed) and isinstance(again, Grabbed)
    assert isinstance(skipped, SkippedFrame) and skipped.reason == "32x48 px instead of 64x48"
    with pytest.raises(SourceError, match="32x48 px, but the camera is 64x48 px"):
        take(frames, 20)


class Plug:
    """A camera that is not there for a while: `captures` are what opening finds, None while it is away."""

    def __init__(self, captures: Sequence[FakeCapture | None]) -> None:
        self.captures = list(captures)
        self.num_attempts = 0

    def open(self) -> FakeCapture | None:
        self.num_attempts += 1
        return self.captures.pop(0) if self.captures else None


def test_a_camera_that_was_unplugged_is_the_same_session_again() -> None:
    first, second = FakeCapture([image(1), image(2), *[False] * 9]), FakeCapture([image(9), image(3), image(4)])
    plug = Plug([None, None, second])
    said: list[str] = []
    reader = reader_of(first, Clock(100_000_000), said, reopen=plug.open, patience_s=None)
    read = take(reader.frames(), 4)
    assert [(g.index, g.follows_gap) for g in read if isinstance(g, Grabbed)] == [
        (0, False),
        (1, False),
        (2, True),
        (3, False),
    ]
    times_ns = [g.timestamp_ns for g in read if isinstance(g, Grabbed)]
    assert times_ns == sorted(set(times_ns))
    assert (plug.num_attempts, first.num_releases, reader.is_away) == (3, 1, False)
    report = reader.report(0)
    assert report.reconnects == 1 and report.away_s > 0
    assert [line.split(";")[0].split(" after")[0] for line in said[1:]] == [
        "webcam:0: the camera has gone",
        "webcam:0: the camera is back",
    ]


def test_one_that_opens_and_delivers_nothing_is_not_back() -> None:
    dead = FakeCapture([False])
    plug = Plug([dead, FakeCapture([image(1), image(2)])])
    reader = reader_of(FakeCapture([image(1), *[False] * 9]), Clock(100_000_000), reopen=plug.open, patience_s=None)
    assert len(take(reader.frames(), 2)) == 2
    assert (plug.num_attempts, dead.num_releases) == (2, 1)


def test_patience_ends() -> None:
    reader = reader_of(FakeCapture([image(1)]), Clock(100_000_000), reopen=Plug([]).open, patience_s=1.0)
    frames = reader.frames()
    next(frames)
    with pytest.raises(SourceError, match="webcam:0: the camera has not come back within 1 s"):
        next(frames)


def test_stopping_ends_the_wait_for_a_camera() -> None:
    plug = Plug([])
    reader = reader_of(FakeCapture([image(1)]), Clock(100_000_000), reopen=plug.open, patience_s=None)
    frames = reader.frames()
    next(frames)
    open_once = plug.open

    def open_and_stop() -> FakeCapture | None:
        reader.stop(0.1)
        return open_once()

    reader._reopen = open_and_stop
    assert list(frames) == []
