"""The `vo` command as the tests type it: in this process or in another, on a drive of few frames."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vo import cli

ROOT = Path(__file__).parents[1]
ORB = ("--config", "orb", "--publish", "off")
NUM_FRAMES = 20


def vo(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs `vo`, which must end with exit code 2 and one line on standard error, nothing on standard output."""
    code = vo(*arguments)
    out, err = capfd.readouterr()
    assert code == 2, f"exit code {code}: {err}"
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("vo: error: ")
    return err.removeprefix("vo: error: ").rstrip("\n")


def vo_process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "vo", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_lines(path: Path, num_lines: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= num_lines:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{path} did not grow to {num_lines} lines")


def leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights in any place, no caches, and a network that refuses every connection at once."""
    dropped = ("LIGHTVO_", "XDG_", "HTTP", "http", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
    for name in [name for name in os.environ if name.startswith(dropped)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
