"""What every test module shares.

The environment is set before any of them loads the libraries: what `vo run` sets for itself (see vo/cli.py).
"""

import itertools
import os
import signal
import socket
import tempfile

import pytest

# pytest-xdist, where `make test` uses it, sets these two before it loads this file.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if NUM_WORKERS > 1:
    # Workers share the cores; so do the programs that their tests start, which is why it is said in the environment.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for variable in ("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
        os.environ.setdefault(variable, str(max(1, num_cores // NUM_WORKERS)))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# FFmpeg reads it once, at the first video of the process, which may be one that a test writes.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# What tests compile is not the user's.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"lightvo-tests-{os.getuid()}"))
# Whoever runs the tests in the background may have it ignored, and programs started here would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Below those that Linux hands out by itself (from 32768 on): nobody takes one between a look at it and its use.
_PORTS_EACH = 1000
_FIRST_PORT = 20_000 + _PORTS_EACH * (WORKER % 12)
_ports = itertools.cycle(range(_FIRST_PORT, _FIRST_PORT + _PORTS_EACH, 2))
for _ in range(os.getpid() % (_PORTS_EACH // 2)):  # other sessions on this machine begin elsewhere
    next(_ports)


@pytest.fixture
def free_port() -> int:
    """A port that is free, and so is the next one."""
    for port in itertools.islice(_ports, 50):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        return port
    pytest.skip("no two neighbouring ports are free")


@pytest.fixture(scope="module", params=["compiled", "numpy"])
def either_geometry(request):
    """Runs a module's tests with the compiled geometry and with that in NumPy."""
    from vo.kernels import kernels, status

    if request.param == "compiled":
        if kernels() is None:
            pytest.skip(f"no compiled geometry: {status()}")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for user in ("vo.relative_pose", "vo.absolute_pose", "vo.bundle_equations"):
            patch.setattr(f"{user}.kernels", lambda: None)
        yield
