"""What a source of frames is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from vo.types import Camera, Frame, StereoRig


@dataclass(frozen=True, slots=True)
class SkippedFrame:
    """What could not be read: the frame's index, the file, and why.

    is_kept  the frame itself was delivered; only its depth image, or its right one, was left out.
    count    how many frames it stands for: a source that never ends lists the first ones, and counts the others.
    """

    index: int
    name: str
    reason: str
    is_kept: bool = False
    count: int = 1


class SkipLog:
    """What a source could not read, in bounded memory: the first `max_listed` one by one, then counted by reason."""

    def __init__(self, max_listed: int = 100) -> None:
        self._max_listed = max_listed
        self._listed: list[SkippedFrame] = []
        self._counted: dict[tuple[str, bool], SkippedFrame] = {}

    def add(self, skipped: SkippedFrame) -> None:
        """Notes one more."""
        if len(self._listed) < self._max_listed:
            self._listed.append(skipped)
            return
        key = (skipped.reason, skipped.is_kept)
        if key not in self._counted and len(self._counted) >= self._max_listed:
            skipped = replace(skipped, reason="other reasons")
            key = (skipped.reason, skipped.is_kept)
        known = self._counted.get(key)
        self._counted[key] = (
            replace(skipped, name="later frames") if known is None else replace(known, count=known.count + 1)
        )

    def entries(self) -> tuple[SkippedFrame, ...]:
        return (*self._listed, *self._counted.values())


@dataclass(frozen=True, slots=True)
class LiveReport:
    """What a camera has delivered.

    negotiated       size, pixel format and rate that it agreed to.
    clock            where the times of its frames come from.
    measured_fps     of the last 300 frames, by their times.
    frames_grabbed   taken from the driver; frames_dropped of them were given up for newer ones before the run saw them.
    reconnects       times that it had gone and came back; `away_s` in all.
    """

    negotiated: str
    clock: str
    measured_fps: float
    frames_grabbed: int
    frames_dropped: int
    reconnects: int
    away_s: float


class Source(Protocol):
    """Delivers frames once, in order of time.

    name          as the user would write it again, for example "kitti:sequences/00".
    camera        intrinsics of every frame.
    is_live       frames come at the sensor's pace and are lost when nobody takes them.
    num_frames    how many there will be, None where that cannot be known (live, some videos).
    skipped       what could not be read so far.
    ground_truth  trajectory file that came with the frames, for evaluation only.
    stereo        both cameras where frames come with a right image: the run asked for it and the source has one.
    """

    @property
    def name(self) -> str: ...
    @property
    def camera(self) -> Camera: ...
    @property
    def is_live(self) -> bool: ...
    @property
    def num_frames(self) -> int | None: ...
    @property
    def skipped(self) -> Sequence[SkippedFrame]: ...
    @property
    def ground_truth(self) -> Path | None: ...
    @property
    def stereo(self) -> StereoRig | None: ...

    def frames(self) -> Iterator[Frame]:
        """Yields every readable frame; raises SourceError where going on makes no sense."""
        ...

    def close(self) -> None:
        """Releases the device or file; safe to call twice and from another thread."""
        ...
