"""What is in tools/deploy and docs/DEPLOY.md works: the unit is sound, and every command in them exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from vo.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "tools" / "deploy"
UNIT = DEPLOY / "lightvo.service"


def settings() -> dict[str, str]:
    """The keys of the unit, each once, continued lines joined."""
    lines = UNIT.read_text().replace("\\\n", " ").splitlines()
    pairs = [line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#")]
    return dict(pairs)


def environment() -> dict[str, str]:
    lines = (DEPLOY / "lightvo.env").read_text().splitlines()
    return dict(line.partition("=")[::2] for line in lines if line and not line.startswith("#"))


def commands_of(text: str) -> list[list[str]]:
    """Every call of `vo` in a text: in code blocks, in CMD and ENTRYPOINT of a container."""
    joined = text.replace("\\\n", " ")
    calls = re.findall(r"(?:^|[\s/])(?:vo|lightvo(?= (?:run|doctor)))\s+([a-z][^#\n`)]*)", joined, re.MULTILINE)
    return [shlex.split(call) for call in calls if call != "vo"]  # a container copies a folder of that name


def test_the_unit_runs_a_command_that_exists() -> None:
    command = settings()["ExecStart"]
    for name, value in {**environment(), "STATE_DIRECTORY": "/var/lib/lightvo", "INVOCATION_ID": "0123"}.items():
        command = command.replace(f"${{{name}}}", value)
    assert "$" not in command
    program, *arguments = shlex.split(command)
    options = build_parser().parse_args(arguments)
    assert program == "/opt/lightvo/bin/vo"
    assert (options.source, options.config, options.watchdog_s) == ("webcam:/dev/video0", "webcam", 30.0)
    assert (ROOT / "configs" / f"{options.config}.yaml").is_file()


def test_the_unit_restarts_and_watches() -> None:
    unit = settings()
    assert unit["Type"] == "notify" and int(unit["WatchdogSec"]) > 30
    assert unit["Restart"] == "on-failure" and unit["SuccessExitStatus"] == "130"
    assert {"NoNewPrivileges", "ProtectSystem", "PrivateTmp", "SystemCallFilter"} <= unit.keys()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    """With a program that is there in the place of ours, which is not installed."""
    program = tmp_path / "vo"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/lightvo/bin/vo", str(program)))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("path", [DEPLOY / "Containerfile", ROOT / "docs" / "DEPLOY.md"], ids=lambda path: path.name)
def test_commands_in_container_and_documentation_exist(path: Path) -> None:
    commands = commands_of(path.read_text())
    assert commands
    for command in commands:
        if command[0] == "keys" and len(command) == 1:
            continue  # only named
        build_parser().parse_args(command)


def test_what_the_container_copies_is_there() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        if sources[0].startswith("--from="):
            continue  # made by another stage
        assert all((ROOT / source).exists() for source in sources), line
    assert 'ENTRYPOINT ["vo"]' in text and "USER lightvo" in text


def test_every_file_that_the_documentation_names_is_there() -> None:
    text = (ROOT / "docs" / "DEPLOY.md").read_text()
    for name in re.findall(r"tools/[\w./-]+", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / "docs" / name).resolve().is_file(), name
