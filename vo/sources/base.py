"""What a source of frames is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vo.types import Camera, Frame, StereoRig


@dataclass(frozen=True, slots=True)
class SkippedFrame:
    """What could not be read: the frame's index, the file, and why.

    is_kept  the frame itself was delivered; only its depth image, or its right one, was left out.
    """

    index: int
    name: str
    reason: str
    is_kept: bool = False


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
