"""Where frames come from: datasets, image directories, videos and cameras, all as an iterator of `Frame`."""

from __future__ import annotations

from vo.sources.base import SkippedFrame, Source
from vo.sources.opener import open_source

__all__ = ["SkippedFrame", "Source", "open_source"]
