"""A source without an end, made of one with an end."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from synthetic_sources import write_images, write_kitti, write_video

from vo.sources import open_source
from vo.sources import webcam as webcam_module
from vo.types import SourceError


def test_time_and_index_rise_from_lap_to_lap(tmp_path: Path) -> None:
    source = open_source(f"loop:{write_video(tmp_path / 'clip.avi', 5, 10.0, 'MJPG')}", fov_deg=70.0)
    frames = list(itertools.islice(source.frames(), 13))
    assert [frame.index for frame in frames] == list(range(13))
    assert [frame.timestamp_ns for frame in frames] == [100_000_000 * index for index in range(13)]
    assert (frames[5].image == frames[0].image).all() and (frames[12].image == frames[2].image).all()
    assert (source.num_frames, source.is_live, source.ground_truth) == (None, False, None)
    source.close()


def test_a_clock_that_does_not_begin_with_zero(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 3, 10.0, "MJPG")
    (tmp_path / "times.txt").write_text("1000.0\n1000.5\n1000.7\n")
    frames = itertools.islice(open_source(f"loop:{path}", fov_deg=70.0).frames(), 7)
    assert [frame.timestamp_ns / 1e9 for frame in frames] == [1000.0, 1000.5, 1000.7, 1000.9, 1001.4, 1001.6, 1001.8]


def test_a_truth_of_one_lap_is_not_offered(tmp_path: Path) -> None:
    source = open_source(f"loop:kitti:{write_kitti(tmp_path)}")
    assert source.ground_truth is None
    assert len(list(itertools.islice(source.frames(), 12))) == 12


def test_what_cannot_be_read_is_counted_in_every_lap(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    (tmp_path / "frame2.png").write_bytes(b"torn")
    source = open_source(f"loop:{tmp_path}", fov_deg=70.0)
    frames = list(itertools.islice(source.frames(), 10))
    assert [frame.index for frame in frames] == [0, 1, 3, 4, 5, 7, 8, 9, 11, 12]
    assert sum(entry.count for entry in source.skipped) == 3


def test_closing_from_another_thread_ends_it(tmp_path: Path) -> None:
    source = open_source(f"loop:{write_video(tmp_path / 'clip.avi', 5, 10.0, 'MJPG')}", fov_deg=70.0)
    frames = source.frames()
    next(frames)
    threading.Timer(0.05, source.close).start()
    assert 0 < sum(1 for _ in frames) < 1_000_000
    source.close()


def test_a_file_that_vanishes_between_laps_is_one_line(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 3, 10.0, "MJPG")
    source = open_source(f"loop:{path}", fov_deg=70.0)
    frames = source.frames()
    assert [next(frames).index for _ in range(3)] == [0, 1, 2]
    path.unlink()
    with pytest.raises(SourceError, match="no such file"):
        next(frames)


def test_a_camera_needs_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Live:
        camera = stereo = None
        is_live = True
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    live = Live()
    monkeypatch.setattr(webcam_module, "open_webcam", lambda *arguments, **flags: live)
    with pytest.raises(SourceError, match="webcam:0 is live and never ends; drop loop:"):
        open_source("loop:webcam:0", fov_deg=70.0)
    assert live.is_closed
