"""Who looks after a run from outside: the watchdog, systemd, signals, and threads that hang at the end."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vo.interrupts import stop_on_signals
from vo.run_watch import RunWatch
from vo.service import ServiceManager


def wait_until(is_so, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_watchdog_fires_once_where_no_frame_comes() -> None:
    fired: list[float] = []
    with RunWatch(lambda: 7, limit_s=0.5, on_silence=lambda: fired.append(time.monotonic())) as watch:
        wait_until(lambda: fired)
        time.sleep(0.7)
    assert (len(fired), watch.has_fired) == (1, True)


def test_the_watchdog_is_quiet_while_frames_come() -> None:
    frames = iter(range(10_000))
    with RunWatch(lambda: next(frames), limit_s=0.3, on_silence=lambda: pytest.fail("it fired")) as watch:
        time.sleep(1.5)
    assert not watch.has_fired


def test_without_a_limit_nothing_fires() -> None:
    with RunWatch(lambda: 0) as watch:
        time.sleep(0.5)
    assert not watch.has_fired


def test_consumers_hear_that_the_camera_is_away() -> None:
    heard: list[bool] = []
    is_away = threading.Event()
    with RunWatch(lambda: 0, is_away=is_away.is_set, on_look=heard.append):
        wait_until(lambda: heard)
        is_away.set()
        wait_until(lambda: heard[-1])
        is_away.clear()
        wait_until(lambda: not heard[-1])


@pytest.fixture
def manager(tmp_path: Path):
    """A socket as systemd has one, and its address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20)
        yield listening, str(tmp_path / "notify")


def test_systemd_hears_of_readiness_life_and_the_end(manager) -> None:
    listening, address = manager
    frames = [0]
    with RunWatch(lambda: frames[0], manager=ServiceManager({"NOTIFY_SOCKET": address})):
        frames[0] = 1
        assert listening.recv(4096) == b"READY=1\nWATCHDOG=1\nSTATUS=1 frames"
        frames[0] = 20
        assert listening.recv(4096) == b"WATCHDOG=1\nSTATUS=20 frames"
    assert listening.recv(4096) == b"STOPPING=1"


def test_a_run_without_frames_is_not_alive_but_one_that_waits_for_its_camera_is(manager) -> None:
    listening, address = manager
    listening.settimeout(0.7)
    is_away = threading.Event()
    with RunWatch(lambda: 5, is_away=is_away.is_set, manager=ServiceManager({"NOTIFY_SOCKET": address})):
        with pytest.raises(TimeoutError):
            listening.recv(4096)
        is_away.set()
        listening.settimeout(20)
        assert b"STATUS=waiting for the camera" in listening.recv(4096)


def test_an_abstract_socket_and_a_manager_that_has_gone() -> None:
    name = f"lightvo-test-{os.getpid()}"
    manager = ServiceManager({"NOTIFY_SOCKET": f"@{name}"})
    manager.alive("nobody listens yet")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name)
        listening.settimeout(20)
        manager.alive("now")
        assert listening.recv(4096) == b"WATCHDOG=1\nSTATUS=now"
    assert not ServiceManager({}).is_there
    ServiceManager({}).alive("nobody asked")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_asks_to_end(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert signal.getsignal(number) == before


def test_who_was_started_with_nohup_goes_on_without_a_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_does_not_cut_the_results_short(tmp_path: Path) -> None:
    """The kernel sends SIGHUP as the terminal goes; what is printed afterwards must not be an error."""
    program = (
        "import sys, pathlib\nfrom vo.interrupts import stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        "    print('ready', flush=True)\n    stop.wait(60)\n"
        "    print('results', flush=True)\n    print('errors', file=sys.stderr, flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'written')!r}).write_text('whole')\n"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    child.send_signal(signal.SIGHUP)
    assert child.wait(60) == 0
    assert (tmp_path / "written").read_text() == "whole"


def test_a_thread_that_hangs_in_a_library_does_not_change_the_exit_code() -> None:
    """A daemon thread in the middle of C++ when the interpreter ends would take the process down with it."""
    program = (
        "import sys, threading, time\nimport vo.cli as cli\n"
        "def main():\n    threading.Thread(target=time.sleep, args=(600,), name='camera', daemon=True).start()\n"
        "    print('done')\n    return 130\n"
        "cli.main = main\ncli.program()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "done\n", "")
