"""A network camera on this machine: a recorded clip as MJPEG over HTTP, at its own pace whoever watches.

    python tools/camera_server.py [CLIP] [--port 8090] [--fps 30]      then: vo run http://127.0.0.1:8090/ --fov-deg 70

The clip plays forth and back for ever, so that nothing jumps. Every image says in its top left corner when it was sent,
as 24 black and white blocks: the milliseconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import argparse
import http.server
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

NUM_BITS, BLOCK_PX = 24, 6
_BOUNDARY = b"frame"


def stamp(image: NDArray[np.uint8], time_ns: int) -> None:
    """Writes a time into an image (H, W, 3) or (H, W)."""
    bits = time_ns // 1_000_000 >> np.arange(NUM_BITS) & 1
    blocks = np.kron(bits * 255, np.ones((BLOCK_PX, BLOCK_PX))).astype(np.uint8)
    image[:BLOCK_PX, : NUM_BITS * BLOCK_PX] = blocks if image.ndim == 2 else blocks[:, :, None]


def age_ms(image: NDArray[np.uint8], now_ns: int) -> float:
    """How long ago the image was sent, ms, by what `stamp` wrote; modulo 2**24 ms, about four hours."""
    gray = image if image.ndim == 2 else image[:, :, 1]
    middle = BLOCK_PX // 2
    bits = gray[middle, middle : NUM_BITS * BLOCK_PX : BLOCK_PX] > 127
    sent_ms = int((bits.astype(np.int64) << np.arange(NUM_BITS)).sum())
    return (now_ns / 1e6 - sent_ms) % 2**NUM_BITS


class CameraServer:
    """Serves `images` (RGB or gray, uint8) at http://127.0.0.1:PORT/. A context manager.

    num_sent  frames that went out to somebody.
    """

    def __init__(self, images: Sequence[NDArray[np.uint8]], fps: float = 30.0, port: int = 0) -> None:
        self._images, self._period_s = list(images), 1.0 / fps
        self._start_s = time.monotonic()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_stalled = threading.Event()
        self._server: http.server.ThreadingHTTPServer | None = None
        self.num_sent = 0
        self.port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Listens (again), on the same port as before."""
        server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        server.daemon_threads = True
        self.port = server.server_port
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Ends at once, as a process that is killed: in the middle of an image."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):  # the other side may have gone first
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def stall(self, is_stalled: bool = True) -> None:
        """Keeps the connections and sends nothing, until told otherwise."""
        (self._is_stalled.set if is_stalled else self._is_stalled.clear)()

    def __enter__(self) -> CameraServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        camera = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with camera._lock:
                    camera._connections.add(self.connection)
                try:
                    self.send_response(200)
                    self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY.decode()}")
                    self.end_headers()
                    camera._send_frames(self)
                except (OSError, ValueError):
                    pass  # whoever watched has gone, or we were killed
                finally:
                    with camera._lock:
                        camera._connections.discard(self.connection)

            def log_message(self, *_: object) -> None: ...

        return Handler

    def _send_frames(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        number = -1
        while True:
            due = int((time.monotonic() - self._start_s) / self._period_s) + 1
            number = max(due, number + 1)
            time.sleep(max(0.0, self._start_s + number * self._period_s - time.monotonic()))
            if self._is_stalled.is_set():
                continue
            jpeg = self._jpeg(number)
            head = b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % (_BOUNDARY, len(jpeg))
            handler.wfile.write(head + jpeg + b"\r\n")
            self.num_sent += 1

    def _jpeg(self, number: int) -> bytes:
        """Frame `number` of the clip played forth and back, with the time in it."""
        last = len(self._images) - 1
        place = number % (2 * last) if last else 0
        image = self._images[place if place <= last else 2 * last - place].copy()
        stamp(image, time.monotonic_ns())
        stored = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        return bytes(cv2.imencode(".jpg", stored, (cv2.IMWRITE_JPEG_QUALITY, 90))[1].tobytes())


def clip_images(path: str, max_frames: int = 330, width: int = 640) -> list[NDArray[np.uint8]]:
    """The images of a clip, RGB, shrunk to a width in px."""
    from vo.sources import open_source

    source = open_source(path)
    images = []
    for frame, _ in zip(source.frames(), range(max_frames), strict=False):
        size = width, round(frame.image.shape[0] * width / frame.image.shape[1])
        images.append(np.asarray(cv2.resize(frame.image, size, interpolation=cv2.INTER_AREA), np.uint8))
    source.close()
    return images


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A network camera that plays a clip, for trying out live input.")
    parser.add_argument("clip", metavar="CLIP", nargs="?", default="demo", help="as for vo run (default: demo)")
    parser.add_argument("--port", type=int, default=8090, help="default: %(default)s")
    parser.add_argument("--fps", type=float, default=30.0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    with CameraServer(clip_images(options.clip), options.fps, options.port) as server:
        print(f"{server.url}: {Path(options.clip).name} at {options.fps:g} fps, until Ctrl-C", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
