"""Live sources as a run sees them: the newest frame in a thread of its own, closing, opening, what is fixed."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_capture import EndlessCapture, FakeCapture, image
from synthetic_sources import CAMERA_YAML

from vo.config import WebcamConfig
from vo.config_loader import load_config
from vo.sources import open_source
from vo.sources import webcam as webcam_module
from vo.sources.cameras import CameraChoice, camera_from_fov
from vo.sources.capture import Control
from vo.sources.webcam import LiveSource, fix_controls, negotiated_camera
from vo.types import ConfigError, SourceError

CAMERA = camera_from_fov(64, 48, 70.0)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_what_a_live_source_is() -> None:
    source = LiveSource("webcam:0", EndlessCapture(), CAMERA)
    assert (source.is_live, source.num_frames, source.ground_truth, source.stereo) == (True, None, None, None)
    said: list[str] = []
    source.say = said.append
    frames = source.frames()
    assert next(frames).image.shape == (48, 64, 3)
    assert said[0] == "webcam:0: 64x48 px, MJPG, a rate it does not say"
    source.close()
    assert list(frames) == []


def test_a_slow_run_gets_the_newest_frame_and_the_others_are_counted() -> None:
    """The camera counts on meanwhile: what is handed out is what came last, however long nobody asked."""
    capture = EndlessCapture()
    source = LiveSource("webcam:0", capture, CAMERA)
    frames = source.frames()
    taken = []
    for _ in range(5):
        taken.append(next(frames))
        # One more than is asked for below: a frame is counted a moment before it is there to be taken.
        target = taken[-1].index + 11
        wait_until(lambda target=target: source.live_report().frames_grabbed > target)
    last = next(frames)
    source.close()
    indices = [frame.index for frame in (*taken, last)]
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(indices))
    report = source.live_report()
    # Everything that came was handed out, dropped, or is the one that still waited when the source was closed.
    assert report.frames_grabbed - report.frames_dropped - len(indices) in (0, 1, 2)


@pytest.mark.parametrize("is_silent", [False, True])
def test_closing_from_another_thread_ends_a_live_source(is_silent: bool) -> None:
    capture = EndlessCapture(is_silent=is_silent)
    source = LiveSource("webcam:0", capture, CAMERA)
    timestamps: list[int] = []
    reader = threading.Thread(target=lambda: timestamps.extend(frame.timestamp_ns for frame in source.frames()))
    reader.start()
    time.sleep(0.1)
    assert reader.is_alive()
    source.close()
    reader.join(2.0)
    assert not reader.is_alive()
    assert capture.num_releases >= 1
    assert bool(timestamps) is not is_silent
    assert timestamps == sorted(set(timestamps))


def test_closing_does_not_wait_for_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webcam_module, "_CLOSE_WAIT_S", 0.05)
    capture = EndlessCapture()
    capture.hang = threading.Event()
    source = LiveSource("webcam:0", capture, CAMERA)
    run = threading.Thread(target=lambda: list(source.frames()))
    run.start()
    wait_until(lambda: capture.is_reading)
    source.close()
    run.join(2.0)
    assert not run.is_alive()
    assert capture.num_releases == 0  # not while the driver is in it
    capture.hang.set()
    assert source._thread is not None
    source._thread.join(2.0)
    assert capture.num_releases == 1


def test_what_ends_the_reader_reaches_the_run() -> None:
    source = LiveSource("webcam:0", FakeCapture([image(1)]), CAMERA, silence_s=0.1)
    frames = source.frames()
    next(frames)
    with pytest.raises(SourceError, match="is the camera still plugged in"):
        next(frames)


def test_a_camera_that_comes_back_says_so_once() -> None:
    """Frames that were dropped meanwhile do not hide the gap from the one that is handed out."""
    captures: list[FakeCapture] = []

    def reopen() -> FakeCapture:
        captures.append(EndlessCapture())
        return captures[-1]

    source = LiveSource("webcam:0", FakeCapture([image(1)]), CAMERA, reopen=reopen, silence_s=0.1, patience_s=None)
    frames = source.frames()
    assert not next(frames).follows_gap
    wait_until(lambda: source.live_report().reconnects > 0 and source.live_report().frames_grabbed >= 12)
    assert next(frames).follows_gap
    assert not next(frames).follows_gap
    source.close()
    assert len(captures) == 1 and captures[0].num_releases >= 1


@pytest.mark.parametrize("spec", ["webcam:77", "webcam:/dev/video77"])
def test_a_camera_that_cannot_be_opened_is_one_line(capfd: pytest.CaptureFixture[str], spec: str) -> None:
    with pytest.raises(SourceError, match=rf"{spec}: the camera cannot be opened; .*/dev/video") as raised:
        open_source(spec, fov_deg=70.0)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("spec", ["webcam:", "webcam:front", "webcam:-1"])
def test_what_names_no_camera(spec: str) -> None:
    with pytest.raises(SourceError, match="expected webcam:0 or webcam:/dev/video0"):
        open_source(spec, fov_deg=70.0)


def test_an_opened_camera(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def open_device(device, size, fps, pixel_format):
        asked.append((device, size, fps, pixel_format))
        return FakeCapture([image(1)])

    monkeypatch.setattr(webcam_module, "open_device", open_device)
    camera_file = tmp_path / "camera.yaml"
    camera_file.write_text(CAMERA_YAML.replace("32", "64").replace("24", "48"))
    assert open_source("webcam:2", camera_file=camera_file, fps=15.0).camera.width == 64
    config = WebcamConfig(width=64, height=48, fps=20.0, pixel_format="mjpeg")
    guessed = open_source("webcam:/dev/video1", fov_deg=70.0, webcam=config)
    assert guessed.name == "webcam:/dev/video1"
    assert next(guessed.frames()).image.shape == (48, 64, 3)
    guessed.close()
    assert asked == [(2, (64, 48), 15.0, None), ("/dev/video1", (64, 48), 20.0, "MJPG")]
    with pytest.raises(SourceError, match="no intrinsics"):
        open_source("webcam:0")
    camera_file.write_text(CAMERA_YAML)
    with pytest.raises(SourceError, match=r"delivers 64x48 px, but .* is for 32x24 px"):
        open_source("webcam:0", camera_file=camera_file)


def test_negotiated_intrinsics_fit_what_the_device_delivers() -> None:
    camera = negotiated_camera("webcam:0", (640, 480), CameraChoice(fov_deg=70.0))
    assert (camera.width, camera.height) == (640, 480)


def test_controls_are_fixed_and_automatisms_warned_about() -> None:
    capture = FakeCapture([])
    capture.controls = {Control.EXPOSURE: 100.0, Control.FOCUS: 0.0, Control.GAIN: 1.0}
    capture.automatic = {Control.EXPOSURE: True, Control.FOCUS: True, Control.WHITE_BALANCE: True}
    assert fix_controls("webcam:0", capture, WebcamConfig()) == [
        "webcam:0: warning: auto-exposure is on, and long exposures blur; fix it: --set webcam.exposure=VALUE",
        "webcam:0: warning: autofocus is on, and every change of focus changes the focal length that was calibrated; "
        "fix it: --set webcam.focus=VALUE",
    ]
    config = WebcamConfig(exposure=80.0, focus=300.0, gain=2.0, white_balance=4600.0)
    assert fix_controls("webcam:0", capture, config) == [
        "webcam:0: exposure fixed at 80",
        "webcam:0: gain fixed at 2",
        "webcam:0: warning: focus is 255; the camera did not take 300",
        "webcam:0: warning: the camera has no white_balance; webcam.white_balance does nothing",
    ]
    assert capture.automatic == {
        Control.EXPOSURE: False,
        Control.GAIN: False,
        Control.FOCUS: False,
        Control.WHITE_BALANCE: True,
    }


def test_controls_are_fixed_again_when_the_camera_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeCapture] = []

    def open_device(*_):
        capture = FakeCapture([image(1)] if not opened else [image(1)] * 3)
        capture.controls = {Control.FOCUS: 7.0}
        opened.append(capture)
        return capture

    monkeypatch.setattr(webcam_module, "open_device", open_device)
    source = open_source("webcam:0", fov_deg=70.0, webcam=WebcamConfig(focus=30.0, silence_s=0.5))
    frames = source.frames()
    assert [next(frames).follows_gap, next(frames).follows_gap] == [False, True]
    source.close()
    assert [capture.controls[Control.FOCUS] for capture in opened[:2]] == [30.0, 30.0]


def test_the_configuration_of_cameras() -> None:
    config = load_config(None, ["webcam.width=1280", "webcam.height=720", "webcam.exposure=null", "webcam.focus=30"])
    assert (config.webcam.size, config.webcam.exposure, config.webcam.focus) == ((1280, 720), None, 30.0)
    assert WebcamConfig().size is None
    with pytest.raises(ConfigError, match="width, height: give both or none"):
        load_config(None, ["webcam.width=1280"])
    assert {field.name for field in dataclasses.fields(WebcamConfig)} >= {control.value for control in Control}
