"""A source whose frames say what their images are good for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vo.image_health import HealthMonitor
from vo.sources.base import SkippedFrame, Source
from vo.types import Camera, Frame, ImageHealth, StereoRig


class InspectedSource:
    """Another source with `Frame.health` filled in; `on_frame` hears of every frame, in the thread that takes them."""

    def __init__(
        self, source: Source, on_frame: Callable[[int, ImageHealth], None] = lambda index, health: None
    ) -> None:
        self._source = source
        self._on_frame = on_frame

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def camera(self) -> Camera:
        return self._source.camera

    @property
    def is_live(self) -> bool:
        return self._source.is_live

    @property
    def num_frames(self) -> int | None:
        return self._source.num_frames

    @property
    def skipped(self) -> Sequence[SkippedFrame]:
        return self._source.skipped

    @property
    def ground_truth(self) -> Path | None:
        return self._source.ground_truth

    @property
    def stereo(self) -> StereoRig | None:
        return self._source.stereo

    def frames(self) -> Iterator[Frame]:
        monitor = HealthMonitor()
        for frame in self._source.frames():
            health = monitor.look(frame.image)
            self._on_frame(frame.index, health)
            yield replace(frame, health=health)

    def close(self) -> None:
        self._source.close()
