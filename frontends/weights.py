"""Which weights exist, where they are, and whether they are what they claim to be.

A name is resolved in this order: an explicit path, the directory in LIGHTVO_WEIGHTS, the package's own data, the user
cache, and last a download from the pinned official address into that cache. Bytes are hashed before anything parses
them, on every load.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import pickle
import struct
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from frontends.base import WeightsError
from frontends.weights_registry import REGISTRY, KnownFile, WeightsEntry

if TYPE_CHECKING:  # Listing and fetching weights need no PyTorch, which takes a second to import.
    from torch import Tensor

ENVIRONMENT_VARIABLE = "LIGHTVO_WEIGHTS"
PACKAGE_DATA = Path(__file__).parent / "data"

# A file of unknown size is cut off here, so that a wrong address cannot fill the memory.
_MAX_DOWNLOAD_BYTES = 200_000_000

# What the readers of safetensors and PyTorch raise on a damaged archive or pickle: no common class.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


class MissingWeightsError(WeightsError):
    """Weights that are nowhere to be had; those that are damaged are another matter."""


class Origin(StrEnum):
    """Where a file of weights was found."""

    EXPLICIT = "explicit path"
    ENVIRONMENT = ENVIRONMENT_VARIABLE
    PACKAGE = "package data"
    CACHE = "user cache"
    DOWNLOAD = "download"


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file that was read and hashed. `is_verified` is False only for an explicit path with a hash nobody recorded."""

    name: str
    path: Path
    sha256: str
    licence: str
    origin: Origin
    is_verified: bool = True


@dataclass(frozen=True, slots=True)
class WeightsStatus:
    """Where the file of an entry lies, not yet hashed; both None where only a download would bring it."""

    entry: WeightsEntry
    path: Path | None
    origin: Origin | None


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A state dict and, where the file says so under "net", the text of the constructor of its network.

    Safetensors say it in their metadata.
    """

    state_dict: dict[str, Tensor]
    constructor: str | None


def cache_directory() -> Path:
    """Where downloads go: $XDG_CACHE_HOME/lightvo, or ~/.cache/lightvo."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lightvo"


def weights_entry(name: str) -> WeightsEntry:
    """The entry of that name. WeightsError names the known ones."""
    for entry in REGISTRY:
        if entry.name == name:
            return entry
    raise WeightsError(f"no weights are called {name!r}; known: {', '.join(entry.name for entry in REGISTRY)}")


def list_weights() -> tuple[WeightsStatus, ...]:
    """Every entry of the registry with the place its file lies in, without hashing anything."""
    statuses = []
    for entry in REGISTRY:
        found = _find(entry)
        statuses.append(WeightsStatus(entry, found[0] if found else None, found[1] if found else None))
    return tuple(statuses)


def verify(name: str) -> WeightsFile:
    """Hash the file that would be loaded. WeightsError if it is missing or damaged; never downloads."""
    return _content(weights_entry(name), None, allow_download=False)[1]


def fetch(name: str) -> WeightsFile:
    """Make sure that an intact file is at hand: download it unless one is, and replace a damaged one in the cache."""
    entry = weights_entry(name)
    found = _find(entry)
    if found is None or (found[1] is Origin.CACHE and _mismatch(found[2], _read(found[0]))):
        return _downloaded(entry)[1]
    return verify(name)


def load_state_dict(
    name: str, path: str | Path | None = None, allow_download: bool = True
) -> tuple[dict[str, Tensor], WeightsFile]:
    """The tensors of a set of weights, on the CPU, and the file they came from.

    `path` takes the place of every other location; a hash that is not in the registry is then recorded, not refused.
    Raises WeightsError, in one line, when nothing is found, nothing can be downloaded, or a file is damaged.
    """
    content, file = _content(weights_entry(name), path, allow_download)
    return _parse(content, file), file


def load_extractor_weights(
    name: str, chosen: str | None = None, allow_download: bool = True
) -> tuple[dict[str, Tensor], WeightsFile, str | None]:
    """Like `load_state_dict`, with ours in the place of published weights that cannot be had; then one line says so.

    chosen  None: the published ones, else ours. The name of either: those and no others. Else the path of a file.
    Raises WeightsError; damaged weights are an error, not a reason to take others.
    """
    own = next((entry.name for entry in REGISTRY if entry.stands_in_for == name), None)
    if chosen is not None:
        is_name = chosen in (name, own)
        tensors, file = load_state_dict(chosen, None, allow_download) if is_name else load_state_dict(name, chosen)
        return tensors, file, None
    try:
        return (*load_state_dict(name, None, allow_download), None)
    except MissingWeightsError:
        if own is None:
            raise
        tensors, file = load_state_dict(own, None, allow_download=False)
        remark = f"{own}, trained by lightvo and weaker, takes the place of the published {name}, which is not at hand"
        return tensors, file, f"{remark}; get it with `vo weights fetch {name}`"


def load_checkpoint(
    name: str, path: str | Path | None = None, allow_download: bool = True
) -> tuple[Checkpoint, WeightsFile]:
    """Like `load_state_dict`, for files that hold the state dict beside other things, under the key "state_dict"."""
    content, file = _content(weights_entry(name), path, allow_download)
    return _parse_checkpoint(content, file), file


def load_file(path: str | Path) -> tuple[dict[str, Tensor], WeightsFile]:
    """The tensors of one file, on the CPU. It goes by its name in the registry if its hash is there, else by its own.

    Raises WeightsError when there is no such file or it holds no state dict.
    """
    content, file = _explicit(Path(path).expanduser(), REGISTRY)
    return _parse(content, file), file


def _content(entry: WeightsEntry, path: str | Path | None, allow_download: bool) -> tuple[bytes, WeightsFile]:
    """The checked bytes of an entry. Reading once means that what was hashed is what gets parsed."""
    if path is not None:
        return _explicit(Path(path).expanduser(), (entry,))
    found = _find(entry)
    if found is None:
        if not allow_download:
            raise MissingWeightsError(_missing(entry, "downloading is off"))
        return _downloaded(entry)
    file_path, origin, known = found
    content = _read(file_path)
    problem = _mismatch(known, content)
    if problem:
        raise WeightsError(f"{file_path}: {problem}, so it is not {entry.name!r}; {_remedy_damaged(entry, origin)}")
    return content, WeightsFile(entry.name, file_path, known.sha256, entry.licence, origin)


def _explicit(path: Path, entries: tuple[WeightsEntry, ...]) -> tuple[bytes, WeightsFile]:
    """The bytes behind a path, called by the entry that knows their hash."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights; correct the path, or drop it to use the registry's")
    content = _read(path)
    sha256 = hashlib.sha256(content).hexdigest()
    for entry in entries:
        if any(known.sha256 == sha256 for known in entry.files):
            return content, WeightsFile(entry.name, path, sha256, entry.licence, Origin.EXPLICIT)
    return content, WeightsFile(path.stem, path, sha256, "unknown", Origin.EXPLICIT, is_verified=False)


def _find(entry: WeightsEntry) -> tuple[Path, Origin, KnownFile] | None:
    for directory, origin in _places():
        for known in entry.files:
            path = directory / known.file_name
            if path.is_file():
                return path, origin, known
    return None


def _places() -> list[tuple[Path, Origin]]:
    """Directories to look in, first one first. WeightsError if LIGHTVO_WEIGHTS names none."""
    places = [(PACKAGE_DATA, Origin.PACKAGE), (cache_directory(), Origin.CACHE)]
    variable = os.environ.get(ENVIRONMENT_VARIABLE)
    if not variable:
        return places
    directory = Path(variable).expanduser()
    if not directory.is_dir():
        raise WeightsError(f"{ENVIRONMENT_VARIABLE}: no such directory: {directory}; correct or unset the variable")
    return [(directory, Origin.ENVIRONMENT), *places]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _mismatch(known: KnownFile, content: bytes) -> str | None:
    """How the content differs from what is known of the file, or None."""
    if known.size_bytes is not None and len(content) != known.size_bytes:
        return f"{len(content)} bytes instead of {known.size_bytes}"
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != known.sha256:
        return f"SHA-256 {sha256} instead of {known.sha256}"
    if known.git_blob is not None:
        # Git hashes the length with the content; SHA-1 is what names blobs, the check that counts is the one above.
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if blob != known.git_blob:
            return f"git blob {blob} instead of {known.git_blob}"
    return None


def _remedy_damaged(entry: WeightsEntry, origin: Origin) -> str:
    match origin:
        case Origin.CACHE:
            return f"replace it with `vo weights fetch {entry.name}`"
        case Origin.PACKAGE:
            return "reinstall lightvo"
        case _:
            return "remove or replace it; weights of your own are given by an explicit path"


def _missing(entry: WeightsEntry, reason: str) -> str:
    if not entry.files:
        return f"weights {entry.name!r} are not looked for, their hash is not recorded; {entry.remedy}"
    looked = ", ".join(f"{origin} ({directory})" for directory, origin in _places())
    if not os.environ.get(ENVIRONMENT_VARIABLE):
        looked = f"{ENVIRONMENT_VARIABLE} (not set), {looked}"
    if entry.source_url is None:
        remedy = "reinstall lightvo"
    else:
        remedy = f"run `vo weights fetch {entry.name}` with a network, or put {entry.file_name} into a directory and "
        remedy += f"set {ENVIRONMENT_VARIABLE} to it"
    return f"weights {entry.name!r} ({entry.file_name}) not found in {looked}; {reason}; {remedy}"


def _downloaded(entry: WeightsEntry) -> tuple[bytes, WeightsFile]:
    if not entry.files:
        raise MissingWeightsError(_missing(entry, ""))
    known = entry.files[0]
    if known.source_url is None:
        raise MissingWeightsError(_missing(entry, "it is not offered for download"))
    try:
        content = download(known)
    except (OSError, http.client.HTTPException) as error:
        raise MissingWeightsError(
            _missing(entry, f"downloading {known.source_url} failed: {_reason(error)}")
        ) from error
    problem = _mismatch(known, content)
    if problem:
        raise MissingWeightsError(_missing(entry, f"{known.source_url} delivered {problem}"))
    path = cache_directory() / known.file_name
    _store(content, path)
    return content, WeightsFile(entry.name, path, known.sha256, entry.licence, Origin.DOWNLOAD)


def download(known: KnownFile, timeout_s: float = 20.0, limit_s: float = 900.0) -> bytes:
    """The bytes behind `known.source_url`, unchecked, with a progress bar on a terminal.

    timeout_s  longest silence of the server; limit_s: longest time for the whole file.
    Raises OSError or http.client.HTTPException, ValueError for a file without an address.
    """
    if known.source_url is None:
        raise ValueError(f"{known.file_name} has no address to download from")
    deadline = time.monotonic() + limit_s
    limit_bytes = known.size_bytes or _MAX_DOWNLOAD_BYTES
    content = bytearray()
    with _opened(known.source_url, timeout_s) as response:
        announced = response.headers.get("Content-Length", "")
        num_bytes = int(announced) if announced.isdigit() else None
        with _progress(known, num_bytes or known.size_bytes) as advance:
            while piece := response.read1(1 << 16):
                content += piece
                advance(len(piece))
                if len(content) > limit_bytes:
                    raise ConnectionError(f"more than the expected {limit_bytes} bytes arrive")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {limit_s:g} s")
    if num_bytes is not None and len(content) != num_bytes:
        raise ConnectionError(f"the connection ended after {len(content)} of {num_bytes} bytes")
    return bytes(content)


def _opened(url: str, timeout_s: float) -> http.client.HTTPResponse:
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(url, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()  # The exception holds the connection open.
        raise
    return response


def _reason(error: Exception) -> str:
    match error:
        case urllib.error.HTTPError():
            return f"HTTP {error.code} {error.reason}"
        case urllib.error.URLError():
            return str(error.reason)
        case _:
            return str(error) or type(error).__name__


@contextmanager
def _progress(known: KnownFile, num_bytes: int | None) -> Iterator[Callable[[int], None]]:
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"downloading {known.source_url}", highlight=False, soft_wrap=True)
        yield lambda _num_bytes: None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
    )
    with bars.Progress(*columns, console=console) as progress:
        task = progress.add_task(known.file_name, total=num_bytes)
        yield lambda num_new_bytes: progress.advance(task, num_new_bytes)


def _store(content: bytes, path: Path) -> None:
    """Write to a temporary file and rename: a reader, or a crash, never sees half a file."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        remedy = (
            f"set XDG_CACHE_HOME to a directory that can be written, or {ENVIRONMENT_VARIABLE} to one with the file"
        )
        raise WeightsError(f"{path}: cannot be written: {error.strerror}; {remedy}") from error


def _parse(content: bytes, file: WeightsFile) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file can run code."""
    return _checked_tensors(_unpacked(content, file), file)


def _parse_checkpoint(content: bytes, file: WeightsFile) -> Checkpoint:
    """Tensors by name and the constructor; nothing in the file can run code."""
    tree = _unpacked(content, file)
    if file.path.suffix == ".safetensors":
        return Checkpoint(_checked_tensors(tree, file), _metadata(content).get("net"))
    if not isinstance(tree, dict) or not isinstance(tree.get("state_dict"), dict):
        return Checkpoint(_checked_tensors(tree, file), None)
    constructor = tree.get("net")
    if constructor is not None and not isinstance(constructor, str):
        raise WeightsError(f"{file.path}: net: expected the text of a constructor, got {type(constructor).__name__}")
    return Checkpoint(_checked_tensors(tree["state_dict"], file), constructor)


def _metadata(content: bytes) -> dict[str, str]:
    """The texts in the header of safetensors that were parsed before: its length in 8 bytes, then JSON."""
    length = int.from_bytes(content[:8], "little")
    texts: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return texts


def _unpacked(content: bytes, file: WeightsFile) -> object:
    """Whatever the file holds: tensors and plain values."""
    import safetensors.torch
    import torch

    try:
        if file.path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        with warnings.catch_warnings():
            # It warns of the pickle protocol of files that it then refuses.
            warnings.simplefilter("ignore", UserWarning)
            tree: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return tree
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{file.path}: not a file of weights: {reason}; give a state dict or safetensors") from error


def _checked_tensors(state_dict: object, file: WeightsFile) -> dict[str, Tensor]:
    import torch

    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()
    ):
        raise WeightsError(f"{file.path}: holds no flat state dict (tensors by name); export the state dict itself")
    return dict(state_dict)
