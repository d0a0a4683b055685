"""`vo view`: shows what a run publishes, in a window or off-screen, and says in one line what is missing for it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vo.interrupts import stop_on_signals
from vo.keys import ClientKeys
from vo.output import OutputError
from vo.scene import Layer
from vo.scene_feed import SceneFeed
from vo.scene_live import LiveScene
from vo.scene_panel import PANEL_WIDTH, Picture, hidden_layers
from vo.scene_video import VideoWriter, write_picture
from vo.scene_view import Eye, ViewState
from vo.trajectory import read_trajectory
from vo.types import ConfigError, VoError

if TYPE_CHECKING:
    from vo.viewer import OffscreenView, WindowView

INTERRUPTED = 130
MAX_MESSAGES_PER_STEP = 400
MIN_HEIGHT = 240
POLL_S = 0.02
DEBIAN_PACKAGES = "libusb-1.0-0 libgl1 libegl1 libx11-6 libgomp1"
SYSTEM_LIBRARIES = ("libusb-1.0.so.0", "libGL.so.1", "libEGL.so.1", "libX11.so.6", "libgomp.so.1")
NOT_INSTALLED = "Open3D is not installed; pip install 'lightvo[viewer]'"
VULKAN_PACKAGES = "libvulkan1 mesa-vulkan-drivers"
_VULKAN_CPU = 4


class ViewerError(VoError):
    """Something that the viewer needs is not on this machine: names it and the remedy."""


@dataclass(frozen=True, slots=True)
class ViewRequest:
    """What the user asked for.

    screenshot         file for a picture: of the end, and in a window whenever S is pressed.
    after_s            ends after so long; None: never.
    until_finished     a window closes with the run; without a window that is always so.
    hidden             names of layers that are not shown at first.
    width, height      px.
    ready_fd           file descriptor to write a "1" to when the publisher is heard, and to close then.
    """

    endpoint: str
    is_headless: bool = False
    screenshot: Path | None = None
    video: Path | None = None
    video_fps: float = 15.0
    after_s: float | None = None
    until_finished: bool = False
    truth: Path | None = None
    eye: Eye = Eye.FOLLOW
    hidden: tuple[str, ...] = ()
    keys: ClientKeys | None = None
    width: int = 1280
    height: int = 720
    ready_fd: int | None = None


def view_command(request: ViewRequest) -> int:
    """Shows a run; the exit code is 0, or 130 where Ctrl-C ended it: pictures are written all the same.

    Raises ConfigError for what cannot be asked for, ViewerError for what is missing on this machine.
    """
    _check(request)
    hidden = _hidden(request.hidden)
    live = LiveScene(None if request.truth is None else read_trajectory(request.truth))
    viewer = load_viewer(needs_display=not request.is_headless)
    view = ViewState(eye=request.eye, hidden=hidden)
    with ExitStack() as resources:
        stop = resources.enter_context(stop_on_signals())
        feed = resources.enter_context(SceneFeed(request.endpoint, request.keys))
        if request.is_headless:
            size = request.width, request.height
            offscreen = resources.enter_context(viewer.OffscreenView(*size, is_smooth=not draws_in_software()))
            _run_headless(request, live, feed, offscreen, view, stop)
        else:
            window = viewer.WindowView(request.width, request.height, view, is_smooth=not draws_in_software())
            resources.callback(window.close)
            _run_window(request, live, feed, window, stop)
    return INTERRUPTED if stop.is_set() else 0


def load_viewer(*, needs_display: bool) -> ModuleType:
    """The module that draws. Raises ViewerError naming what is missing: the rendering engine would abort instead."""
    if needs_display:
        check_display()
    try:
        import vo.viewer as viewer
    except ModuleNotFoundError as error:
        if error.name != "open3d":
            raise
        raise ViewerError(NOT_INSTALLED) from error
    except (ImportError, OSError) as error:
        raise ViewerError(f"Open3D cannot be loaded ({error}); on Debian: apt-get install {DEBIAN_PACKAGES}") from error
    check_vulkan()
    return viewer


def _check(request: ViewRequest) -> None:
    if request.is_headless and request.screenshot is None and request.video is None:
        raise ConfigError("--headless draws for nobody: give --screenshot F.png, --video F.mp4 or both")
    if request.video is not None and not request.is_headless:
        raise ConfigError("--video needs --headless")
    if request.width < 2 * PANEL_WIDTH or request.height < MIN_HEIGHT:
        raise ConfigError(f"--size: expected at least {2 * PANEL_WIDTH}x{MIN_HEIGHT}")
    for path in (request.screenshot, request.video):
        if path is not None and not path.resolve().parent.is_dir():
            raise OutputError(f"{path}: no such directory; make it first")


def _hidden(names: tuple[str, ...]) -> set[Layer]:
    try:
        return hidden_layers(names)
    except ValueError as error:
        raise ConfigError(f"--hide: {error}") from error


def check_libraries() -> None:
    """Raises ViewerError without Open3D or a library that it loads, without the seconds that importing it takes."""
    if importlib.util.find_spec("open3d") is None:
        raise ViewerError(NOT_INSTALLED)
    for library in SYSTEM_LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise ViewerError(f"{library} is missing; on Debian: apt-get install {DEBIAN_PACKAGES}") from error


def check_display() -> None:
    """Raises ViewerError without a display that a window could be on."""
    if os.environ.get("WAYLAND_DISPLAY"):
        return
    name = os.environ.get("DISPLAY")
    remedy = "use --headless --screenshot F.png, or a virtual display: xvfb-run vo view"
    if not name:
        raise ViewerError(f"no display for a window; {remedy}")
    try:
        x11 = ctypes.CDLL("libX11.so.6")
    except OSError as error:
        raise ViewerError(f"libX11.so.6 is missing; on Debian: apt-get install {DEBIAN_PACKAGES}") from error
    x11.XOpenDisplay.restype = ctypes.c_void_p
    display = x11.XOpenDisplay(None)
    if display is None:
        raise ViewerError(f"display {name} cannot be opened; {remedy}")
    x11.XCloseDisplay(ctypes.c_void_p(display))


class _InstanceCreateInfo(ctypes.Structure):
    """VkInstanceCreateInfo of the Vulkan specification, all of it but the type left zero."""

    _fields_ = (
        ("sType", ctypes.c_uint32),
        ("pNext", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("pApplicationInfo", ctypes.c_void_p),
        ("enabledLayerCount", ctypes.c_uint32),
        ("ppEnabledLayerNames", ctypes.c_void_p),
        ("enabledExtensionCount", ctypes.c_uint32),
        ("ppEnabledExtensionNames", ctypes.c_void_p),
    )


def check_vulkan() -> None:
    """Raises ViewerError without a Vulkan driver, where the engine would abort. Mesa's, in software, is enough."""
    _vulkan_device_types()


def draws_in_software() -> bool:
    """Whether there is no GPU to draw with. Raises ViewerError without a Vulkan driver."""
    return all(kind == _VULKAN_CPU for kind in _vulkan_device_types())


def _vulkan_device_types() -> list[int]:
    """VkPhysicalDeviceType of every device, at least one."""
    remedy = f"on Debian: apt-get install {VULKAN_PACKAGES} (draws in software where there is no GPU)"
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError as error:
        raise ViewerError(f"libvulkan.so.1 is missing; {remedy}") from error
    info, instance, num_devices = _InstanceCreateInfo(sType=1), ctypes.c_void_p(), ctypes.c_uint32()
    if vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)) != 0:
        raise ViewerError(f"no Vulkan driver; {remedy}")
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(num_devices), None)
    devices = (ctypes.c_void_p * num_devices.value)()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(num_devices), devices)
    kinds = [_vulkan_device_type(vulkan, device) for device in devices[: num_devices.value] if device]
    vulkan.vkDestroyInstance(instance, None)
    if not kinds:
        raise ViewerError(f"no Vulkan device; {remedy}")
    return kinds


def _vulkan_device_type(vulkan: ctypes.CDLL, device: int) -> int:
    """The fifth number of VkPhysicalDeviceProperties, a structure of some 800 bytes."""
    properties = (ctypes.c_uint32 * 1024)()
    vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), properties)
    return properties[4]


class _Progress:
    """Takes what has come into the scene, and knows when to end."""

    def __init__(self, request: ViewRequest, live: LiveScene, feed: SceneFeed, *, ends_with_run: bool) -> None:
        self._live, self._feed, self._ends_with_run = live, feed, ends_with_run
        self._end_s = None if request.after_s is None else time.monotonic() + request.after_s
        self._ready_fd = request.ready_fd
        self._is_drained = False

    def take(self) -> None:
        """Looks into the mailbox."""
        if self._ready_fd is not None and self._feed.link().is_heard:
            _say_ready(self._ready_fd)
            self._ready_fd = None
        is_complete = self._feed.is_complete  # asked first: what made it complete is in the mailbox then
        received = self._feed.mailbox.take(MAX_MESSAGES_PER_STEP)
        for item in received:
            self._live.accept(item.message, item.received_ns, item.picture)
        self._is_drained = is_complete and not received
        self._live.realign(is_final=self._is_drained)

    @property
    def is_over(self) -> bool:
        if self._end_s is not None and time.monotonic() >= self._end_s:
            return True
        return self._ends_with_run and self._is_drained


def _run_window(
    request: ViewRequest, live: LiveScene, feed: SceneFeed, window: WindowView, stop: threading.Event
) -> None:
    progress = _Progress(request, live, feed, ends_with_run=request.until_finished)
    num_pictures = 0
    while not stop.is_set() and not progress.is_over:
        progress.take()
        link = feed.link()
        version = (live.version, link)
        if not window.step(live.scene, live.picture, lambda: live.lines(feed.link()), version):
            break
        if window.view.wants_picture:
            window.view.wants_picture = False
            num_pictures += 1
            path = request.screenshot or Path(f"lightvo-{num_pictures}.png")
            _say_written(write_picture(path, window.picture()))
    if request.screenshot is not None:
        _say_written(write_picture(request.screenshot, window.picture()))


def _run_headless(
    request: ViewRequest,
    live: LiveScene,
    feed: SceneFeed,
    offscreen: OffscreenView,
    view: ViewState,
    stop: threading.Event,
) -> None:
    """Takes pictures of the run at the rate of the video, as it would have been seen, until it ends."""

    def picture() -> Picture:
        return offscreen.draw(live.scene, live.picture, live.lines(feed.link()), view)

    progress = _Progress(request, live, feed, ends_with_run=True)
    print(f"vo view: waiting for {request.endpoint}", file=sys.stderr, flush=True)
    with ExitStack() as resources:
        video = None
        if request.video is not None:
            video = resources.enter_context(VideoWriter(request.video, request.video_fps))
        while not stop.is_set() and not progress.is_over:
            progress.take()
            feed.link()
            if video is not None and live.version > 0 and video.is_due():
                video.write(picture())
            else:
                stop.wait(POLL_S)
        last = picture()
        if video is not None:
            video.write(last)
    if request.video is not None:
        _say_written(request.video)
    if request.screenshot is not None:
        _say_written(write_picture(request.screenshot, last))


def _say_ready(ready_fd: int) -> None:
    """Tells the run that started us; then lets go of its terminal, for the window may stay longer than it."""
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


def _say_written(path: Path) -> None:
    print(f"vo view: wrote {path}", file=sys.stderr, flush=True)
