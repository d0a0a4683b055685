"""What works on this machine, what is missing, and the remedy."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from frontends.base import WeightsError

LIBRARIES = (
    ("torch", "torch"),
    ("cv2", "opencv-python"),
    ("numpy", "numpy"),
    ("scipy", "scipy"),
    ("zmq", "pyzmq"),
    ("msgpack", "msgpack"),
    ("yaml", "pyyaml"),
    ("safetensors", "safetensors"),
    ("evo", "evo"),
    ("matplotlib", "matplotlib"),
    ("rich", "rich"),
)
"""What lightvo imports, and the distribution that brings it."""
OPTIONAL_LIBRARIES = (("mcap", "mcap"), ("foxglove_schemas_protobuf", "foxglove-schemas-protobuf"))
"""What recordings need besides."""

# Without the published weights ours run in their place.
DEFAULT_WEIGHTS = ("own-aliked-t16", "lightglue-light-aliked-t16")
MIN_FREE_BYTES = 500_000_000


class State(Enum):
    """What a check found."""

    WORKS = "works"
    MISSING = "missing"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing a run may need; `remedy` says what to do where it does not work.

    is_required  `vo run` with the default configuration cannot do without.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""
    is_required: bool = True


def examine(endpoint: str) -> Iterator[Check]:
    """Checks everything, one after the other; `endpoint` is where poses would be published."""
    yield _check_python()
    for module, distribution in LIBRARIES:
        yield _check_library(module, distribution)
    for module, distribution in OPTIONAL_LIBRARIES:
        yield replace(_check_library(module, distribution), is_required=False)
    yield _check_device()
    yield _check_kernels()
    yield from _check_weights()
    yield _check_endpoint(endpoint)
    yield from _check_cameras()
    yield _check_viewer()
    yield _check_disk("disk, working directory", Path.cwd())
    yield _check_disk("disk, cache", _cache_directory())


def _check_python() -> Check:
    return Check("python", State.WORKS, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _check_library(module: str, distribution: str) -> Check:
    remedy = f"pip install {distribution}"
    try:
        importlib.import_module(module)
        return Check(distribution, State.WORKS, importlib.metadata.version(distribution))
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return Check(distribution, State.MISSING, "not installed", remedy)
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Check(distribution, State.BROKEN, f"cannot be imported: {reason}", f"install what it names, or {remedy}")


def _check_device() -> Check:
    """The accelerator that `--device auto` would take; without one everything runs on the CPU."""
    import torch

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Check("device", State.WORKS, f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.version.cuda is None:
        reason, remedy = "torch is built without CUDA", "install a CUDA build of torch to use an NVIDIA GPU"
    else:
        reason, remedy = "no NVIDIA GPU or driver", "check nvidia-smi"
    detail = f"cpu: {platform.processor() or platform.machine()}, {threads}; {reason}"
    return Check("device", State.WORKS, detail, remedy, is_required=False)


def _check_kernels() -> Check:
    """Whether the geometry is compiled; without that it is several times slower, and as right."""
    from vo.kernels import kernels, status

    if kernels() is not None:
        return Check("geometry", State.WORKS, "compiled", is_required=False)
    remedy = "install a C compiler (Debian: gcc), then lightvo again"
    return Check("geometry", State.MISSING, status(), remedy, is_required=False)


def _check_weights() -> Iterator[Check]:
    from frontends.weights import list_weights, verify

    for status in list_weights():
        entry = status.entry
        name, is_required = f"weights {entry.name}", entry.name in DEFAULT_WEIGHTS
        if status.path is None:
            yield Check(name, State.MISSING, "not at hand", entry.remedy, is_required)
            continue
        try:
            file = verify(entry.name)
        except WeightsError as error:
            yield Check(name, State.BROKEN, str(error), f"vo weights fetch {entry.name}", is_required)
        else:
            yield Check(name, State.WORKS, f"{file.path} ({file.licence}, SHA-256 verified)", "", is_required)


def _check_endpoint(endpoint: str) -> Check:
    """Whether the two ports of the publisher are free."""
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp" or parts.port is None:
        return Check("publisher", State.WORKS, f"{endpoint}: no port to check", is_required=False)
    host = parts.hostname or "127.0.0.1"
    for port in (parts.port, parts.port + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                remedy = "end the program that uses it, or give --publish another port, or --publish off"
                return Check("publisher", State.BROKEN, f"{host}:{port}: {error.strerror}", remedy)
    return Check("publisher", State.WORKS, f"{endpoint}: ports {parts.port} and {parts.port + 1} are free")


def _check_cameras(directory: Path = Path("/dev")) -> Iterator[Check]:
    """Every camera with what it offers, or why there is none."""
    from vo.sources.v4l2 import find_cameras

    devices = sorted(directory.glob("video*"))
    if not devices:
        detail = f"no {directory}/video*"
        yield Check("camera", State.MISSING, detail, "connect a camera to use webcam:0", is_required=False)
        return
    if not any(os.access(device, os.R_OK | os.W_OK) for device in devices):
        remedy = "add yourself to the group video and log in again"
        yield Check("camera", State.BROKEN, f"{devices[0]}: no permission", remedy, is_required=False)
        return
    cameras = find_cameras(directory)
    for camera in cameras:
        yield Check(f"camera webcam:{camera.path}", State.WORKS, camera.describe(), is_required=False)
    if not cameras:
        names = ", ".join(device.name for device in devices)
        remedy = "connect one, and look at what `dmesg` says of it"
        yield Check("camera", State.MISSING, f"{names}: none captures video", remedy, is_required=False)


def _check_viewer() -> Check:
    """Whether `vo view` can draw: off-screen anyway, in a window where there is a display."""
    from vo.view_command import ViewerError, check_display, check_libraries, check_vulkan

    try:
        check_libraries()
        check_vulkan()
    except ViewerError as error:
        detail, _, remedy = str(error).partition("; ")
        return Check("viewer, headless", State.BROKEN, detail, remedy, is_required=False)
    try:
        check_display()
    except ViewerError as error:
        detail, _, remedy = str(error).partition("; ")
        return Check("viewer, window", State.MISSING, detail, remedy, is_required=False)
    return Check("viewer", State.WORKS, "window and headless", is_required=False)


def _check_disk(name: str, directory: Path) -> Check:
    """Whether the directory, or the nearest one above it that exists, can be written and has room."""
    existing = next(path for path in (directory, *directory.parents) if path.is_dir())
    if not os.access(existing, os.W_OK):
        return Check(name, State.BROKEN, f"{existing}: cannot be written", "choose a directory of yours for --output")
    free_bytes = shutil.disk_usage(existing).free
    detail = f"{existing}: {free_bytes / 1e9:.1f} GB free"
    if free_bytes < MIN_FREE_BYTES:
        return Check(name, State.BROKEN, detail, "make room: weights and results take up to 500 MB")
    return Check(name, State.WORKS, detail)


def _cache_directory() -> Path:
    from frontends.weights import cache_directory

    return cache_directory()
