"""The viewer as a program: pictures and videos without a display, the window under a virtual one, what is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from scene_messages import CAMERA, IMAGE_COLOR, LANDMARK_COLOR, publish_frames
from virtual_display import VirtualDisplay, virtual_display

from vo.cli import main
from vo.config import PublisherConfig
from vo.message_stream import MessageStream
from vo.message_types import RunState
from vo.publisher import Publisher
from vo.scene import CAMERA_COLOR, KEYFRAME_COLOR, STATUS_COLORS
from vo.scene_panel import PANEL_WIDTH, rgb
from vo.types import ConfigError, TrackingStatus
from vo.view_command import ViewerError, check_libraries, check_vulkan
from vo.viewer_process import check_viewable

REPOSITORY = Path(__file__).parents[1]
PATH_COLOR = rgb(STATUS_COLORS[TrackingStatus.TRACKING])
WIDTH, HEIGHT = 900, 600
PATIENCE_S = 60


def missing() -> str:
    """What the viewer lacks on this machine; empty where it can draw. Open3D is not imported: that takes seconds."""
    try:
        check_libraries()
        check_vulkan()
    except ViewerError as error:
        return f"the viewer needs what is missing here: {error}"
    return ""


def vo_process(*arguments: str, display: str | None = None, **environment: str) -> subprocess.Popen[str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    variables |= environment | ({} if display is None else {"DISPLAY": display})
    return subprocess.Popen(
        [sys.executable, "-m", "vo", *arguments],
        cwd=REPOSITORY,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def can_draw() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)


@contextmanager
def a_run(state: RunState | None = RunState.FINISHED) -> Iterator[tuple[MessageStream, str]]:
    """A stream with its publisher and the address; ended with `state` unless the test has done so."""
    stream = MessageStream(CAMERA, heartbeat_hz=20.0)
    with Publisher(PublisherConfig(endpoint="tcp://127.0.0.1:*", linger_ms=5000), stream) as publisher:
        yield stream, publisher.endpoint
        if state is not None:
            stream.finish(state)


def count(picture: np.ndarray, color: tuple[int, int, int], tolerance: int = 30) -> int:
    return int((np.abs(picture.astype(int) - color).max(axis=2) <= tolerance).sum())


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.1)


def read_rgb(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    assert picture is not None, f"{path} is no picture"
    return picture[..., ::-1]


def check_picture(picture: np.ndarray, *, has_path: bool = True) -> None:
    """Image on the left; on the right path, landmarks, keyframes and camera in their colours, each in its place."""
    panel, scene = picture[:, :PANEL_WIDTH], picture[:, PANEL_WIDTH:]
    image = panel[: PANEL_WIDTH * 3 // 4]
    assert count(image, IMAGE_COLOR) > 0.5 * image.shape[0] * image.shape[1]
    assert count(scene, LANDMARK_COLOR) > 100
    assert count(scene, rgb(KEYFRAME_COLOR)) > 30
    assert count(scene, rgb(CAMERA_COLOR)) > 100
    assert (count(scene, PATH_COLOR) > 100) == has_path
    if not has_path:
        assert count(scene, PATH_COLOR) < 5


# --- without a display ---


def headless(endpoint: str, *arguments: str) -> subprocess.Popen[str]:
    return vo_process("view", endpoint, "--headless", "--size", f"{WIDTH}x{HEIGHT}", *arguments)


def test_a_picture_and_a_video_without_a_display(can_draw, tmp_path):
    picture, video = tmp_path / "a.png", tmp_path / "a.mp4"
    with a_run() as (stream, endpoint):
        program = headless(endpoint, "--screenshot", str(picture), "--video", str(video), "--video-fps", "8")
        program.stderr.readline()
        start_s = time.monotonic()
        publish_frames(stream, 0, 40, period_s=0.08)
        took_s = time.monotonic() - start_s
        stream.finish()
        _, errors = program.communicate(timeout=PATIENCE_S)
        lived_s = time.monotonic() - start_s
    assert program.returncode == 0, errors
    check_picture(read_rgb(picture))
    frames, capture = [], cv2.VideoCapture(str(video))
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    assert frames and frames[0].shape == (HEIGHT, WIDTH, 3)
    # At its true pace: at least as long as the frames came, and no longer than the program lived.
    assert took_s - 2.5 < len(frames) / 8 < lived_s + 2.5
    landmarks = [count(frame[:, PANEL_WIDTH:], LANDMARK_COLOR, tolerance=60) for frame in frames]
    assert landmarks[-1] > 100 and landmarks[0] < landmarks[-1]


def test_a_layer_that_is_hidden_is_not_in_the_picture(can_draw, tmp_path):
    """Also the check of the checks: without the layer the same look at the pixels fails."""
    with a_run() as (stream, endpoint):
        publish_frames(stream, 0, 40)
        program = headless(endpoint, "--screenshot", str(tmp_path / "a.png"), "--hide", "trajectory", "--overview")
        program.stderr.readline()
        time.sleep(1.0)
        publish_frames(stream, 40, 42)
        stream.finish()
        _, errors = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 0, errors
    picture = read_rgb(tmp_path / "a.png")
    check_picture(picture, has_path=False)
    with pytest.raises(AssertionError):
        check_picture(picture)


def test_pictures_are_written_when_the_program_is_told_to_end(can_draw, tmp_path):
    with a_run() as (stream, endpoint):
        publish_frames(stream, 0, 10)
        program = headless(endpoint, "--screenshot", str(tmp_path / "a.png"))
        program.stderr.readline()
        time.sleep(1.0)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 130, errors
    assert read_rgb(tmp_path / "a.png").shape == (HEIGHT, WIDTH, 3)


# --- in a window ---


@pytest.fixture
def display() -> Iterator[VirtualDisplay]:
    with virtual_display(WIDTH, HEIGHT) as display:
        yield display


def shows(display: VirtualDisplay, color: tuple[int, int, int], minimum: int = 100) -> Callable[[], bool]:
    return lambda: count(display.picture()[:, PANEL_WIDTH:], color) > minimum


@pytest.mark.slow
def test_the_window_shows_a_run_and_obeys_keys(can_draw, display, tmp_path):
    picture = tmp_path / "a.png"
    with a_run() as (stream, endpoint):
        publish_frames(stream, 0, 40)
        arguments = ("view", endpoint, "--size", f"{WIDTH}x{HEIGHT}", "--screenshot", str(picture))
        program = vo_process(*arguments, display=display.name)
        wait_for(shows(display, LANDMARK_COLOR), "landmarks")
        publish_frames(stream, 40, 42)
        wait_for(lambda: count(display.picture()[:, :PANEL_WIDTH], IMAGE_COLOR) > 10_000, "the image")
        wait_for(shows(display, PATH_COLOR), "the path")
        check_picture(display.picture())
        display.press("t")
        wait_for(lambda: not shows(display, PATH_COLOR, 5)(), "the path to vanish")
        check_picture(display.picture(), has_path=False)
        display.press("t")
        wait_for(shows(display, PATH_COLOR), "the path again")
        display.press("q")
        _, errors = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 0, errors
    check_picture(read_rgb(picture))


@pytest.mark.slow
def test_the_window_goes_on_with_the_next_run(can_draw, display):
    port = None
    program = None
    for number in range(2):
        stream = MessageStream(CAMERA, heartbeat_hz=20.0)
        config = PublisherConfig(endpoint=port or "tcp://127.0.0.1:*", linger_ms=1000)
        with Publisher(config, stream) as publisher:
            port = publisher.endpoint
            if program is None:
                program = vo_process("view", port, "--size", f"{WIDTH}x{HEIGHT}", display=display.name)
                publish_frames(stream, 0, 30)
                wait_for(shows(display, LANDMARK_COLOR), "landmarks of the first run")
            else:
                wait_for(lambda: not shows(display, LANDMARK_COLOR, 5)(), "the first run to vanish")
                publish_frames(stream, 0, 30)
                wait_for(shows(display, LANDMARK_COLOR), "landmarks of the second run")
            stream.finish()
        assert number == 1 or program.poll() is None
    program.terminate()
    _, errors = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 130, errors


def head_of_7scenes() -> Path:
    root = os.environ.get("LIGHTVO_DATA")
    path = Path(root or "") / "tum" / "rgbd_7scenes_head"
    if root is None or not path.is_dir():
        pytest.skip("needs LIGHTVO_DATA with tum/rgbd_7scenes_head")
    return path


def run_arguments(source: str, num_frames: int) -> tuple[str, ...]:
    orb = ("--set", "frontend.extractor.name=orb", "--set", "frontend.matcher.name=nearest")
    return ("run", source, "--max-frames", str(num_frames), "--publish", "tcp://127.0.0.1:*", *orb)


@pytest.mark.slow
def test_a_real_run_is_shown_while_it_goes_on_and_afterwards(can_draw):
    source = head_of_7scenes()
    with virtual_display(1280, 720) as display:
        program = vo_process(*run_arguments(f"tum:{source}", 60), "--view", display=display.name)
        _, errors = program.communicate(timeout=150)
        assert program.returncode == 0, errors
        assert "viewer" not in errors
        wait_for(shows(display, PATH_COLOR, 40), "the path")
        wait_for(shows(display, rgb(CAMERA_COLOR)), "the camera")
        picture = display.picture()
        scene, image = picture[:, PANEL_WIDTH:], picture[: PANEL_WIDTH * 3 // 4, :PANEL_WIDTH]
        assert image.std(axis=(0, 1)).min() > 20  # a photograph, not an empty panel
        background = np.median(scene.reshape(-1, 3), axis=0)
        symbols = (PATH_COLOR, rgb(CAMERA_COLOR), rgb(KEYFRAME_COLOR), (242, 89, 242))
        is_other = np.abs(scene.astype(int) - background).max(axis=2) > 40
        num_symbols = sum(count(scene, color, tolerance=60) for color in symbols)
        assert is_other.sum() - num_symbols > 500, "no landmarks"
        display.press("t")
        wait_for(lambda: not shows(display, PATH_COLOR, 5)(), "the path to vanish")


@pytest.mark.slow
def test_a_viewer_that_is_killed_does_not_end_the_run(can_draw, display, tmp_path):
    program = vo_process(*run_arguments("demo", 40), "--view", "--output", str(tmp_path), display=display.name)
    wait_for(lambda: (tmp_path / "trajectory_tum.txt").exists() and viewer_of(program.pid) is not None, "the viewer")
    wait_for(lambda: len((tmp_path / "trajectory_tum.txt").read_text().splitlines()) > 3, "the first poses")
    os.kill(viewer_of(program.pid), signal.SIGKILL)
    _, errors = program.communicate(timeout=150)
    assert program.returncode == 0, errors
    assert errors.count("the viewer was ended by SIGKILL; the run goes on without it") == 1
    assert len((tmp_path / "trajectory_tum.txt").read_text().splitlines()) > 30


def viewer_of(parent: int) -> int | None:
    """The process that was started by `parent`."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[0]) if children else None


# --- what is missing, and what cannot be asked for ---


@pytest.fixture
def no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


def refused(capsys, *arguments: str) -> str:
    """The one line that the program says before it ends with exit code 2."""
    assert main(["view", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--headless",), "give --screenshot F.png, --video F.mp4 or both"),
        (("--video", "a.mp4"), "--video needs --headless"),
        (("--headless", "--screenshot", "nowhere/a.png"), "nowhere/a.png: no such directory"),
        (("--headless", "--screenshot", "a.png", "--size", "100x100"), "--size: expected at least"),
        (("--headless", "--screenshot", "a.png", "--hide", "sky"), "--hide: sky: no layer; valid: trajectory"),
        (("--truth", "nowhere.txt"), "nowhere.txt"),
        ((), "no display for a window; use --headless"),
    ],
)
def test_what_cannot_be_done_is_one_line(no_display, capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_display_that_is_not_there_is_named(no_display, capsys, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":4711")
    assert "display :4711 cannot be opened; use --headless" in refused(capsys)


def test_a_machine_without_a_vulkan_driver_is_told_the_packages(can_draw, monkeypatch):
    for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.setenv(name, "/nonexistent.json")
    with pytest.raises(ViewerError, match="on Debian: apt-get install libvulkan1 mesa-vulkan-drivers"):
        check_vulkan()


@pytest.mark.parametrize(
    ("code", "messages"),
    [
        ("raise ModuleNotFoundError(\"No module named 'open3d'\", name='open3d')", ("lightvo[viewer]",)),
        (
            "raise ImportError('libEGL.so.1: cannot open shared object file: No such file or directory')",
            ("libEGL.so.1", "apt-get install libusb-1.0-0 libgl1 libegl1 libx11-6 libgomp1"),
        ),
    ],
)
def test_a_machine_without_open3d_or_its_libraries_is_told_the_packages(
    no_display, capsys, monkeypatch, tmp_path, code, messages
):
    (tmp_path / "open3d.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "open3d" or name == "vo.viewer"]:
        monkeypatch.delitem(sys.modules, name)
    error = refused(capsys, "--headless", "--screenshot", str(tmp_path / "a.png"))
    assert all(message in error for message in messages)


def test_a_run_that_no_viewer_could_hear_is_refused(capsys):
    with pytest.raises(ConfigError, match="leave out --publish off"):
        check_viewable(PublisherConfig(endpoint="off"))
    with pytest.raises(ConfigError, match="vo view --key F --server-key F"):
        check_viewable(PublisherConfig(keys="somewhere"))
    assert main(["run", "demo", "--view", "--publish", "off"]) == 2
    assert "--view" in capsys.readouterr().err
