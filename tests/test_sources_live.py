"""Videos and cameras, with real files where OpenCV can write them and a stand-in for the device otherwise."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_capture import FakeCapture, image
from synthetic_sources import CAMERA_YAML, cut_short, write_video

from vo.sources import open_source
from vo.sources.cameras import camera_from_fov
from vo.sources.video import VideoSource
from vo.types import SourceError

CAMERA = camera_from_fov(64, 48, 70.0)


def times_ns(source: VideoSource) -> list[int]:
    return [frame.timestamp_ns for frame in source.frames()]


@pytest.mark.parametrize(("name", "code", "fps"), [("clip.mp4", "mp4v", 29.97), ("clip.avi", "MJPG", 25.0)])
def test_a_video_file(tmp_path: Path, name: str, code: str, fps: float) -> None:
    source = open_source(str(write_video(tmp_path / name, 12, fps, code)), fov_deg=70.0)
    frames = list(source.frames())
    assert [frame.index for frame in frames] == list(range(12))
    assert source.num_frames == 12
    for index, frame in enumerate(frames):
        assert abs(frame.timestamp_ns - index * 1e9 / fps) < 1e5
        assert frame.image.shape == (48, 64, 3)
        assert abs(float(frame.image.mean()) - 20 * index) < 4
    assert (source.skipped, source.ground_truth, source.is_live) == ((), None, False)
    source.close()
    source.close()


def test_a_video_comes_back_as_rgb(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 255), np.uint8))  # OpenCV's red
    writer.release()
    red, green, blue = next(open_source(str(tmp_path / "clip.avi"), fov_deg=70.0).frames()).image.mean(axis=(0, 1))
    assert red > 240
    assert max(green, blue) < 15


def test_what_lies_beside_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 3)
    with pytest.raises(SourceError, match="no intrinsics; pass --camera FILE"):
        open_source(str(path))
    (tmp_path / "camera.yaml").write_text(CAMERA_YAML.replace("32", "64").replace("24", "48"))
    (tmp_path / "times.txt").write_text("1.5\n1.75\n2.0000000010\n")
    (tmp_path / "groundtruth.txt").write_text("# none\n")
    for spec in (str(path), str(tmp_path)):
        source = open_source(spec)
        assert source.camera.K[0, 0] == 30.0
        assert source.ground_truth == tmp_path / "groundtruth.txt"
        assert [frame.timestamp_ns for frame in source.frames()] == [1500000000, 1750000000, 2000000001]
        assert (source.name, source.skipped) == (spec, ())
    with pytest.raises(SourceError, match="drop --fps"):
        open_source(str(path), fps=30.0)


def test_with_two_videos_only_what_bears_the_name_belongs(tmp_path: Path) -> None:
    first, second = write_video(tmp_path / "a.mp4", 2, 10.0), write_video(tmp_path / "b.mp4", 2, 10.0)
    (tmp_path / "times.txt").write_text("5\n6\n")
    (tmp_path / "a.times.txt").write_text("7\n8\n")
    assert [frame.timestamp_ns for frame in open_source(str(first), fov_deg=70.0).frames()] == [7 * 10**9, 8 * 10**9]
    assert [frame.timestamp_ns for frame in open_source(str(second), fov_deg=70.0).frames()] == [0, 10**8]


def test_a_rate_given_overrides_the_container(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 4, 25.0)
    source = open_source(str(path), fov_deg=70.0, fps=50.0)
    assert [frame.timestamp_ns for frame in source.frames()] == [0, 20_000_000, 40_000_000, 60_000_000]
    with pytest.raises(SourceError, match="--fps"):
        open_source(str(path), fov_deg=70.0, fps=0.0)


def test_a_times_file_of_another_length(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 4)
    (tmp_path / "times.txt").write_text("1\n2\n3\n")
    with pytest.raises(SourceError, match="goes on after 3 frames"):
        list(open_source(str(path), fov_deg=70.0).frames())
    (tmp_path / "times.txt").write_text("1\n2\n3\n4\n5\n")
    source = open_source(str(path), fov_deg=70.0)
    assert len(list(source.frames())) == 4
    assert [(skipped.index, skipped.reason.partition(",")[0]) for skipped in source.skipped] == [
        (4, "the video ends here")
    ]


def test_container_times_of_a_variable_rate() -> None:
    capture = FakeCapture([image(level) for level in range(5)], [0.0, 33.3667, 100.5, 101.0, 500.25], fps=30.0)
    assert times_ns(VideoSource("clip", capture, CAMERA)) == [0, 33366700, 100500000, 101000000, 500250000]


@pytest.mark.parametrize("positions_ms", [[0.0] * 4, [5.0, 4.0, 3.0, 2.0], [float("nan")] * 4, [-1.0, 0.0, 1.0, 2.0]])
def test_the_rate_where_container_times_are_unsound(positions_ms: list[float]) -> None:
    capture = FakeCapture([image(1)] * 4, positions_ms, fps=29.97)
    assert times_ns(VideoSource("clip", capture, CAMERA)) == [round(index * 1e9 / 29.97) for index in range(4)]


def test_neither_times_nor_rate() -> None:
    with pytest.raises(SourceError, match="no usable times and no rate; pass --fps"):
        VideoSource("clip", FakeCapture([image(1)] * 4), CAMERA)
    assert times_ns(VideoSource("clip", FakeCapture([image(1)] * 4), CAMERA, fps=10.0))[-1] == 300_000_000


def test_container_times_that_stop_rising_are_skipped() -> None:
    capture = FakeCapture([image(1)] * 6, [0.0, 10.0, 20.0, 20.0, 15.0, 30.0])
    source = VideoSource("clip", capture, CAMERA)
    assert [frame.index for frame in source.frames()] == [0, 1, 2, 5]
    assert [skipped.index for skipped in source.skipped] == [3, 4]


@pytest.mark.parametrize("later_ms", [0.0, 1000.0], ids=["a counter that ran over", "a clock that was set back"])
def test_a_clock_that_was_set_back_is_taken_on(later_ms: float) -> None:
    """Hours back, as where the 33-bit counter of a transport stream runs over: no frame is lost."""
    hours_ms = 26.5 * 3_600_000
    positions_ms = [hours_ms, hours_ms + 40, hours_ms + 80, later_ms, later_ms + 40, later_ms + 80]
    source = VideoSource("clip", FakeCapture([image(1)] * 6, positions_ms), CAMERA)
    assert np.diff(times_ns(source)).tolist() == [40_000_000] * 5
    (noted,) = source.skipped
    assert (noted.index, noted.is_kept) == (3, True)
    assert re.match(r"kept: the clock went back by \d+\.\d s", noted.reason)


def test_video_frames_that_cannot_be_decoded_are_skipped() -> None:
    source = VideoSource("clip", FakeCapture([None, image(1), None, image(2)], fps=10.0), CAMERA)
    assert [(frame.index, frame.timestamp_ns) for frame in source.frames()] == [(1, 10**8), (3, 3 * 10**8)]
    assert [(skipped.index, skipped.reason) for skipped in source.skipped] == [
        (0, "cannot be decoded"),
        (2, "cannot be decoded"),
    ]


def test_a_video_that_changes_its_size() -> None:
    source = VideoSource("clip", FakeCapture([image(1)] * 5 + [image(1, width=32)], fps=10.0), CAMERA)
    with pytest.raises(SourceError, match=r"clip: frame 5: 32x48 px, but the camera is 64x48 px"):
        list(source.frames())


def test_a_video_that_ends_before_its_time() -> None:
    source = VideoSource("clip", FakeCapture([image(1)] * 50, fps=10.0, num_frames=60), CAMERA)
    assert len(list(source.frames())) == 50
    assert [(skipped.index, "60 frames are announced" in skipped.reason) for skipped in source.skipped] == [(50, True)]
    estimated = VideoSource("clip", FakeCapture([image(1)] * 50, fps=10.0, num_frames=51), CAMERA)
    assert len(list(estimated.frames())) == 50
    assert estimated.skipped == ()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_a_video_that_cannot_be_decoded_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("not a video")
    with pytest.raises(SourceError, match="cannot be opened as a video") as raised:
        open_source(str(path), fov_deg=70.0)
    assert "\n" not in str(raised.value)
    write_video(path, code="mp4v" if name.endswith("mp4") else "MJPG")
    cut_short(path, 0.3)
    with pytest.raises(SourceError, match="cannot be"):
        open_source(str(path), fov_deg=70.0)
    path.write_bytes(b"")
    with pytest.raises(SourceError, match="cannot be opened as a video"):
        open_source(str(path), fov_deg=70.0)


def test_nothing_but_the_error_is_written(tmp_path: Path) -> None:
    """In a process of its own: FFmpeg reads its log level once, and other tests may have been first."""
    specs = [tmp_path / "clip.mp4", tmp_path / "clip.avi", "http://127.0.0.1:9/clip.mp4", "webcam:77"]
    cut_short(write_video(tmp_path / "clip.mp4"), 0.3)
    cut_short(write_video(tmp_path / "clip.avi", code="MJPG"), 0.3)
    program = (
        "import sys\nfrom vo.sources import open_source\nfrom vo.types import SourceError\n"
        "for spec in sys.argv[1:]:\n"
        "    try:\n        open_source(spec, fov_deg=70.0)\n"
        "    except SourceError as error:\n        print(error)\n"
    )
    arguments = [sys.executable, "-c", program, *map(str, specs)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == len(specs)


def test_a_video_without_images() -> None:
    for images in ([], [None, None, None, image(1)]):
        capture = FakeCapture(images, fps=10.0)
        with pytest.raises(SourceError, match="no image can be decoded"):
            VideoSource("clip", capture, CAMERA)
        assert capture.num_releases == 1


def test_closing_a_video_ends_its_frames() -> None:
    source = VideoSource("clip", FakeCapture([image(1)] * 9, fps=10.0, num_frames=9), CAMERA)
    frames = source.frames()
    next(frames)
    threading.Thread(target=source.close).start()
    assert len(list(frames)) < 9
    source.close()
    assert source.skipped == ()


def test_a_url_that_does_not_answer() -> None:
    with pytest.raises(SourceError, match=r"http://127\.0\.0\.1:9/clip\.mp4: cannot be opened"):
        open_source("http://127.0.0.1:9/clip.mp4", fov_deg=70.0)


def test_a_file_url_is_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 3, 10.0)
    source = open_source(f"file://{path}", fov_deg=70.0)
    assert [frame.timestamp_ns for frame in source.frames()] == [0, 10**8, 2 * 10**8]
    assert not source.is_live
