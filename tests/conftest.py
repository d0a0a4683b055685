"""What every test module shares.

The environment is set before any of them loads the libraries: what `vo run` sets for itself (see vo/cli.py).
"""

import os
import signal
import socket
from collections.abc import Iterator

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# FFmpeg reads it once, at the first video of the process, which may be one that a test writes.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# Whoever runs the tests in the background may have it ignored, and programs started here would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that is free, and so is the next one."""
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        yield port
        return
    pytest.skip("no two neighbouring ports are free")
