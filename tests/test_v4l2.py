"""Listing cameras against a kernel of the test's own, which answers as the interface of Video4Linux2 says."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from vo import doctor
from vo.sources import v4l2
from vo.sources.v4l2 import CameraDevice, Mode, choose_mode, find_cameras, read_camera_device

# As the C compiler evaluates the macros of linux/videodev2.h on x86-64 and arm64.
QUERYCAP, ENUM_FMT, ENUM_FRAMESIZES, ENUM_FRAMEINTERVALS = 0x80685600, 0xC0405602, 0xC02C564A, 0xC034564B
WEBCAM = {
    "YUYV": {(640, 480): [(1, 30), (1, 15)], (1280, 720): [(1, 10)]},
    "MJPG": {(640, 480): [(1, 30)], (1280, 720): [(1, 30), (1, 60)]},
}


class FakeKernel:
    """A UVC webcam; `is_range` makes it describe sizes and intervals as ranges, as some drivers do."""

    def __init__(self, formats=WEBCAM, capabilities=0x84A00001, device=0x04200001, is_range=False, broken=None) -> None:
        self.formats, self.capabilities, self.device = formats, capabilities, device
        self.is_range, self.broken, self.num_closed = is_range, broken, 0

    def close(self) -> None:
        self.num_closed += 1

    def ioctl(self, request: int, data: bytearray) -> None:
        if request == self.broken:
            raise OSError(errno.EIO, "broken")
        answer = {
            QUERYCAP: self.capability,
            ENUM_FMT: self.format,
            ENUM_FRAMESIZES: self.size,
            ENUM_FRAMEINTERVALS: self.interval,
        }[request](data)
        assert len(answer) == len(data), "an ioctl never changes the size of its argument"
        data[:] = answer

    def capability(self, data: bytes) -> bytes:
        names = struct.pack("16s32s32s", b"uvcvideo", b"HD Webcam", b"usb-0000:00:14.0-5")
        return names + struct.pack("=6I", 0x060100, self.capabilities, self.device, 0, 0, 0)

    def format(self, data: bytes) -> bytes:
        index, kind = struct.unpack_from("=II", data)
        assert kind == 1
        code = self.entry(list(self.formats), index).encode()
        return struct.pack("=III32s4s16x", index, 1, 0, b"described", code)

    def size(self, data: bytes) -> bytes:
        index, code = struct.unpack_from("=II", data)
        sizes = list(self.formats[code.to_bytes(4, "little").decode()])
        if self.is_range:
            smallest, largest = min(sizes), max(sizes)
            self.entry([0], index)
            return struct.pack("=9I8x", index, code, 3, smallest[0], largest[0], 2, smallest[1], largest[1], 2)
        return struct.pack("=5I24x", index, code, 1, *self.entry(sizes, index))

    def interval(self, data: bytes) -> bytes:
        index, code, width, height = struct.unpack_from("=4I", data)
        intervals = self.formats[code.to_bytes(4, "little").decode()][(width, height)]
        if self.is_range:
            self.entry([0], index)
            return struct.pack("=11I8x", index, code, width, height, 3, 1, 60, 1, 5, 1, 1000)
        return struct.pack("=7I24x", index, code, width, height, 1, *self.entry(intervals, index))

    @staticmethod
    def entry(entries, index):
        if index >= len(entries):
            raise OSError(errno.EINVAL, "no more")
        return entries[index]


def test_the_numbers_of_the_interface() -> None:
    ours = v4l2.QUERY_CAPABILITY, v4l2.ENUMERATE_FORMATS, v4l2.ENUMERATE_SIZES, v4l2.ENUMERATE_INTERVALS
    assert ours == (QUERYCAP, ENUM_FMT, ENUM_FRAMESIZES, ENUM_FRAMEINTERVALS)


def test_a_webcam_says_what_it_offers() -> None:
    kernel = FakeKernel()
    camera = read_camera_device(Path("/dev/video0"), lambda path: kernel)
    assert camera is not None
    assert (camera.name, camera.bus, kernel.num_closed) == ("HD Webcam", "usb-0000:00:14.0-5", 1)
    assert camera.modes == (
        Mode("YUYV", (640, 480), 30.0),
        Mode("YUYV", (640, 480), 15.0),
        Mode("YUYV", (1280, 720), 10.0),
        Mode("MJPG", (640, 480), 30.0),
        Mode("MJPG", (1280, 720), 30.0),
        Mode("MJPG", (1280, 720), 60.0),
    )
    assert camera.describe() == "video0: HD Webcam (YUYV 1280x720 at 10 fps, MJPG 1280x720 at 60 fps)"


def test_ranges_of_sizes_and_rates() -> None:
    camera = read_camera_device(Path("/dev/video0"), lambda path: FakeKernel(is_range=True))
    assert camera is not None
    assert {(mode.pixel_format, mode.size, mode.fps) for mode in camera.modes} == {
        (name, size, 60.0) for name in ("YUYV", "MJPG") for size in ((640, 480), (1280, 720))
    }


@pytest.mark.parametrize(
    "kernel",
    [
        FakeKernel(device=0x04A00000),  # the metadata device that every UVC webcam has beside it
        FakeKernel(capabilities=0x04000002),  # an output, of a driver without capabilities by device
        FakeKernel(broken=QUERYCAP),
        FakeKernel(broken=ENUM_FRAMESIZES),
    ],
    ids=["metadata", "output", "no capabilities", "broken half-way"],
)
def test_what_is_no_camera_is_left_out_and_closed(kernel: FakeKernel) -> None:
    assert read_camera_device(Path("/dev/video1"), lambda path: kernel) is None
    assert kernel.num_closed == 1


def test_a_driver_that_never_ends_is_cut_off() -> None:
    kernel = FakeKernel({"YUYV": {(640, 480): [(1, 30)] * 100_000}})
    camera = read_camera_device(Path("/dev/video0"), lambda path: kernel)
    assert camera is not None and len(camera.modes) == 256


def test_cameras_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0, 1):
        (tmp_path / f"video{number}").touch()

    def open_kernel(path: Path) -> FakeKernel:
        if path.name == "video2":
            raise PermissionError(errno.EACCES, "no permission")
        return FakeKernel(device=0x04A00000 if path.name == "video1" else 0x04200001)

    assert [camera.path.name for camera in find_cameras(tmp_path, open_kernel)] == ["video0", "video10"]


def test_no_device_is_no_camera(tmp_path: Path) -> None:
    (tmp_path / "video0").write_text("a file, not a device")
    assert find_cameras(tmp_path) == ()
    assert read_camera_device(tmp_path / "none") is None


MODES = read_camera_device(Path("/dev/video0"), lambda path: FakeKernel()).modes  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("size", "fps", "preference", "expected"),
    [
        ((640, 480), None, "auto", "YUYV"),  # as fast, and nothing has compressed it
        ((1280, 720), None, "auto", "MJPG"),  # six times the rate
        ((1280, 720), 10.0, "auto", "YUYV"),
        ((1280, 720), 30.0, "auto", "MJPG"),
        ((640, 480), None, "mjpeg", "MJPG"),
        ((1280, 720), None, "raw", "YUYV"),
        ((800, 600), None, "auto", None),
    ],
)
def test_compressed_frames_only_where_they_are_faster(size, fps, preference, expected) -> None:
    mode = choose_mode(MODES, size, fps, preference)
    assert (mode and mode.pixel_format) == expected


def test_a_preference_that_is_not_offered_gives_way() -> None:
    only_raw = tuple(mode for mode in MODES if mode.pixel_format == "YUYV")
    mode = choose_mode(only_raw, (640, 480), 30.0, "mjpeg")
    assert mode == Mode("YUYV", (640, 480), 30.0)
    assert choose_mode((Mode("H264", (640, 480), 60.0),), (640, 480), None) is None


def test_a_camera_that_names_no_format() -> None:
    assert CameraDevice(Path("/dev/video3"), "Odd", "", ()).describe() == "video3: Odd (says no format)"


# --- what vo doctor says of them ---


def test_the_doctor_lists_every_camera_with_its_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        (tmp_path / f"video{number}").touch()
    listed = find_cameras(tmp_path, lambda path: FakeKernel(device=0x04A00000 if path.name == "video1" else 0x04200001))
    monkeypatch.setattr(v4l2, "find_cameras", lambda directory: listed)
    (check,) = doctor._check_cameras(tmp_path)
    assert (check.name, check.state.value) == (f"camera webcam:{tmp_path}/video0", "works")
    assert check.detail == "video0: HD Webcam (YUYV 1280x720 at 10 fps, MJPG 1280x720 at 60 fps)"


def test_the_doctor_says_why_there_is_no_camera(tmp_path: Path) -> None:
    (check,) = doctor._check_cameras(tmp_path)
    assert (check.state.value, check.is_required) == ("missing", False)
    assert "connect a camera" in check.remedy
    (tmp_path / "video0").write_text("a file, not a device")
    (check,) = doctor._check_cameras(tmp_path)
    assert (check.state.value, check.detail) == ("missing", "video0: none captures video")


def test_the_doctor_knows_a_camera_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "video0").touch()
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    (check,) = doctor._check_cameras(tmp_path)
    assert (check.state.value, check.remedy) == ("broken", "add yourself to the group video and log in again")
