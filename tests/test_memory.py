"""Pools of memory, in a process of its own whose C library tells how many it has made; and what is garbage."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref

import pytest

from vo.memory import NUM_ARENAS, loaded_objects_left_alone

PROGRAM = """
import ctypes, sys, tempfile, threading

from vo.memory import limit_arenas

was_set = sys.argv[1] == "limited" and limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.fopen.restype, libc.fopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
together = threading.Barrier(8)


def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()


threads = [threading.Thread(target=allocate) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
with tempfile.NamedTemporaryFile() as file:
    stream = libc.fopen(file.name.encode(), b"w")
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(was_set, file.read().count(b"<heap nr="))
"""

glibc_only = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)


def pools(mode: str, environment: dict[str, str] | None = None) -> tuple[bool, int]:
    """Whether pools were limited in a process of its own, and how many eight threads at once made it have."""
    without = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env=without | (environment or {}),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    was_set, count = result.stdout.split()
    return was_set == "True", int(count)


@glibc_only
def test_threads_share_a_few_pools() -> None:
    assert pools("free")[1] > NUM_ARENAS, "this machine makes no more pools in the first place"
    assert pools("limited") == (True, NUM_ARENAS)


@glibc_only
@pytest.mark.parametrize(
    "choice",
    [{"MALLOC_ARENA_MAX": "5"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=5"}],
    ids=lambda choice: next(iter(choice)),
)
def test_the_users_choice_is_kept(choice: dict[str, str]) -> None:
    was_set, count = pools("limited", choice)
    assert not was_set and NUM_ARENAS < count <= 5


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vo import memory

    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("the C library was asked"))
    assert not memory.limit_arenas()


def test_what_is_loaded_already_is_not_looked_through_for_garbage() -> None:
    before = gc.get_freeze_count()
    with loaded_objects_left_alone():
        assert gc.get_freeze_count() > 10_000
        kept = weakref.ref(Looped())
        gc.collect()
        assert kept() is None, "what is made meanwhile is looked through"
    assert gc.get_freeze_count() == before


def test_a_run_that_fails_looks_through_everything_again() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError, match="broken"), loaded_objects_left_alone():
        raise RuntimeError("broken")
    assert gc.get_freeze_count() == before


class Looped:
    """Something that only a search for garbage can free."""

    def __init__(self) -> None:
        self.itself = self
