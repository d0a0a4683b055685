"""What keeps the memory of a process that runs for days where it is."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3); the number is part of glibc's interface.
_M_ARENA_MAX = -8
NUM_ARENAS = 1


def limit_arenas(num_arenas: int = NUM_ARENAS) -> bool:
    """Let the threads of this process share the C library's pools of memory; whether that is so now.

    glibc makes a pool for nearly every thread that asks for memory, eight to a core, and what lies free in one is of no
    use to another: a run kept 16 of them, and they went on growing for half an hour. One is as fast where one
    interpreter hands out the work, for small pieces wait in a cache of every thread. Must be called before the threads
    begin. Where the user has chosen (MALLOC_ARENA_MAX, GLIBC_TUNABLES) or the C library knows no such pools, nothing is
    done.
    """
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.getenv("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, num_arenas) == 1


@contextmanager
def loaded_objects_left_alone() -> Iterator[None]:
    """What is there already is not searched for garbage meanwhile.

    One look at all that torch and the other libraries have loaded stops every thread for a tenth of a second, which is
    a few frames of a camera; what a run makes itself is looked through in a millisecond.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
