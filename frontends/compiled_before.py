"""What has been compiled on this machine: its code is in the compiler's cache on disk, so that it is loaded in seconds.

PyTorch keeps compiled code by itself; it does not say beforehand whether it has some. So every successful compilation
leaves a note beside that cache, named by everything the code depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from frontends.weights import cache_directory

_ENVIRONMENT = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code() -> Path:
    """Where compiled code is kept; a folder of the user's that outlives the system's temporary ones.

    To be called before the compiler is used for the first time. One that the environment names is respected.
    """
    return Path(os.environ.setdefault(_ENVIRONMENT, str(cache_directory() / "compiled")))


def was_compiled(*what: object) -> bool:
    """Whether `note_compiled` was called for the same in this or another process, and its notes are still there."""
    return _note(what).is_file()


def note_compiled(*what: object, took_s: float) -> None:
    """Remembers a compilation. A cache that cannot be written to costs the next start its time, and nothing else."""
    note = _note(what)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"what": _words(what), "took_s": round(took_s, 1)}) + "\n", encoding="utf-8")
    except OSError:
        return


def _note(what: tuple[object, ...]) -> Path:
    name = hashlib.sha256("\n".join(_words(what)).encode()).hexdigest()[:16]
    return keep_compiled_code() / "notes" / f"{name}.json"


def _words(what: tuple[object, ...]) -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return [torch.__version__, gpu, *(str(word) for word in what)]
