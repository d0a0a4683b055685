"""Live cameras and streams: the newest frame, the time at which it was taken, and the patience to wait for a camera."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vo.sources.base import LiveReport, SkipLog, SkippedFrame
from vo.sources.camera_reader import CameraReader, Grabbed
from vo.sources.cameras import CameraChoice, read_camera
from vo.sources.capture import Capture, Control, OpenCvCapture, open_device, open_stream
from vo.sources.images import check_fps
from vo.sources.v4l2 import choose_mode, find_cameras, read_camera_device
from vo.types import Camera, Frame, SourceError

if TYPE_CHECKING:
    from vo.config import WebcamConfig

_CLOSE_WAIT_S = 2.0
_WAIT_S = 0.2
_DEFAULT_SIZE = (640, 480)


class LiveSource:
    """A source over a live capture; see `vo.sources.base.Source` for the attributes.

    A thread of its own takes every frame from the driver as it comes and keeps the newest one: a run that is slow gets
    fresh frames, and what it never saw is counted. Times are of the monotonic clock. A camera that goes away is waited
    for and opened again; the first frame then says that it follows a gap. `frames()` ends when `close()` is called,
    from whatever thread, and raises SourceError when the camera is not waited for any longer.

    say  is told, in one line each, what was negotiated, and when the camera goes and comes; set it before `frames()`.
    """

    is_live = True
    stereo = None
    num_frames = None
    ground_truth = None

    def __init__(
        self,
        name: str,
        capture: Capture,
        camera: Camera,
        *,
        reopen: Callable[[], Capture | None] | None = None,
        silence_s: float = 5.0,
        patience_s: float | None = 0.0,
        notes: Sequence[str] = (),
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """reopen, silence_s, patience_s: see `CameraReader`. notes: what else `say` is told at first."""
        self.name = name
        self.camera = camera
        self.say: Callable[[str], None] = lambda text: None
        self._reader = CameraReader(
            name,
            capture,
            camera,
            reopen=reopen,
            silence_s=silence_s,
            patience_s=patience_s,
            clock_ns=clock_ns,
            say=lambda text: self.say(text),
        )
        self._notes = tuple(notes)
        self._skip_log = SkipLog()
        self._newest: Grabbed | None = None
        self._failure: BaseException | None = None
        self._num_dropped = 0
        self._changed = threading.Condition()
        self._is_ended = False
        self._thread: threading.Thread | None = None

    @property
    def skipped(self) -> Sequence[SkippedFrame]:
        return self._skip_log.entries()

    @property
    def is_silent(self) -> bool:
        """Whether the camera is away and being waited for."""
        return self._reader.is_away

    def live_report(self) -> LiveReport:
        """What the camera has delivered so far."""
        return self._reader.report(self._num_dropped)

    def frames(self) -> Iterator[Frame]:
        for note in (*self._notes, f"{self.name}: {self._reader.negotiated}"):
            self.say(note)
        self._thread = threading.Thread(target=self._read_all, name="camera", daemon=True)
        self._thread.start()
        while (grabbed := self._take()) is not None:
            yield Frame(
                grabbed.index, grabbed.timestamp_ns, grabbed.image, self.camera, follows_gap=grabbed.follows_gap
            )

    def close(self) -> None:
        """Ends `frames()` and releases the device; where a read hangs in the driver, the reader releases it later."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
        self._reader.stop(_CLOSE_WAIT_S)

    def _take(self) -> Grabbed | None:
        """The newest frame, as soon as there is one; None at the end. Raises what ended the reader."""
        with self._changed:
            while self._newest is None and not self._is_ended:
                self._changed.wait(_WAIT_S)
            grabbed, self._newest = self._newest, None
            if self._failure is not None and grabbed is None:
                raise self._failure
            return None if self._is_ended and self._failure is None else grabbed

    def _read_all(self) -> None:
        """The thread: offers frames until the camera is given up or the source is closed."""
        with ExitStack() as ending:
            ending.push(self._carry)
            for read in self._reader.frames():
                if isinstance(read, SkippedFrame):
                    self._skip_log.add(read)
                else:
                    self._offer(read)

    def _offer(self, grabbed: Grabbed) -> None:
        with self._changed:
            if self._newest is not None:
                self._num_dropped += 1
                # What was not seen is still a gap for whoever sees the next one.
                grabbed = grabbed.after(self._newest)
            self._newest = grabbed
            self._changed.notify_all()

    def _carry(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Hands what ended the thread to whoever takes the frames."""
        with self._changed:
            self._failure, self._is_ended = failure, True
            self._changed.notify_all()
        return True


def open_webcam(
    name: str, device: str, choice: CameraChoice, fps: float | None = None, config: WebcamConfig | None = None
) -> LiveSource:
    """The camera with this index (`0`) or device path (`/dev/video0`).

    It is asked for the size of the camera file, if one is given, and for `fps`. Raises SourceError where it cannot be
    opened, or delivers another size than the camera file is for.
    """
    from vo.config import WebcamConfig

    config = config or WebcamConfig()
    if not device.isdecimal() and not device.startswith("/"):
        raise SourceError(f"{name}: expected webcam:0 or webcam:/dev/video0; {_cameras_found()}")
    wanted = read_camera(choice.camera_file).camera if choice.camera_file is not None else None
    size = (wanted.width, wanted.height) if wanted is not None else config.size
    rate = check_fps(fps) if fps is not None else config.fps or None
    number = int(device) if device.isdecimal() else device
    notes: list[str] = []

    def open_it() -> OpenCvCapture | None:
        opened = open_device(number, size, rate, _pixel_format(device, size, rate, config.pixel_format))
        if opened is not None:
            notes[:] = fix_controls(name, opened, config)
        return opened

    capture = open_it()
    if capture is None:
        raise SourceError(
            f"{name}: the camera cannot be opened; {_cameras_found()}; is it plugged in, free, and yours to read "
            "(group `video`)?"
        )
    try:
        camera = negotiated_camera(name, capture.size, choice)
    except SourceError:
        capture.release()
        raise
    patience_s = config.patience_s or None
    return LiveSource(
        name, capture, camera, reopen=open_it, silence_s=config.silence_s, patience_s=patience_s, notes=notes
    )


def open_live_url(url: str, choice: CameraChoice, config: WebcamConfig | None = None) -> LiveSource:
    """A stream that never ends by itself, RTSP or MJPEG over HTTP. Raises SourceError."""
    from vo.config import WebcamConfig

    config = config or WebcamConfig()
    silence_s = config.silence_s
    capture = open_stream(url, silence_s)
    if capture is None:
        raise SourceError(f"{url}: cannot be opened; is the address right, and the server up?")
    try:
        camera = choice.require(*capture.size, url).camera
    except SourceError:
        capture.release()
        raise
    return LiveSource(
        url,
        capture,
        camera,
        reopen=lambda: open_stream(url, silence_s),
        silence_s=silence_s,
        patience_s=config.patience_s or None,
    )


def fix_controls(name: str, capture: Capture, config: WebcamConfig) -> list[str]:
    """Fixes what the configuration fixes; what came of it, and warnings of what changes by itself, one line each."""
    notes = []
    for control in Control:
        wanted = getattr(config, control.value)
        if wanted is not None:
            found = capture.fix(control, wanted)
            if found is None:
                notes.append(f"{name}: warning: the camera has no {control.value}; webcam.{control.value} does nothing")
            elif abs(found - wanted) > 1e-6:
                notes.append(f"{name}: warning: {control.value} is {found:g}; the camera did not take {wanted:g}")
            else:
                notes.append(f"{name}: {control.value} fixed at {found:g}")
        elif capture.is_automatic(control) and control in _HARM:
            notes.append(f"{name}: warning: {_HARM[control]}; fix it: --set webcam.{control.value}=VALUE")
    return notes


_HARM = {
    Control.FOCUS: "autofocus is on, and every change of focus changes the focal length that was calibrated",
    Control.EXPOSURE: "auto-exposure is on, and long exposures blur",
}


def negotiated_camera(name: str, size: tuple[int, int], choice: CameraChoice) -> Camera:
    """The intrinsics for a device that delivers `size` (px); raises SourceError where they are for another size."""
    camera = choice.require(*size, name).camera
    if (camera.width, camera.height) != size:
        raise SourceError(
            f"{name}: delivers {size[0]}x{size[1]} px, but {choice.camera_file} is for {camera.width}x{camera.height} "
            "px, which the camera does not offer; calibrate at a size that it offers"
        )
    return camera


def _pixel_format(device: str, size: tuple[int, int] | None, fps: float | None, preference: str) -> str | None:
    """What to ask for: MJPEG where that is faster than raw pixels; None where the kernel does not tell."""
    path = Path(f"/dev/video{device}") if device.isdecimal() else Path(device)
    found = read_camera_device(path)
    mode = None if found is None else choose_mode(found.modes, size or _DEFAULT_SIZE, fps, preference)
    if mode is not None:
        return mode.pixel_format
    return {"mjpeg": "MJPG", "raw": "YUYV"}.get(preference)


def _cameras_found() -> str:
    cameras = find_cameras()
    if cameras:
        return f"found {'; '.join(camera.describe() for camera in cameras)}"
    devices = sorted(str(path) for path in Path("/dev").glob("video*"))
    return f"found {', '.join(devices)}" if devices else "no /dev/video* is there"
