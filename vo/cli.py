"""The `vo` command. Commands import what they need when they run, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from vo import __version__, bench_options, live_options, machine_options, results_options
from vo.machine_options import PRESET_WEIGHTS
from vo.shared_options import DEFAULT_ENDPOINT, INTERRUPTED, USER_ERROR, Parser

__all__ = ["DEFAULT_ENDPOINT", "INTERRUPTED", "PRESET_WEIGHTS", "USER_ERROR", "build_parser", "main", "program"]

# The thread that reads a camera, and the stages of a run.
_MAY_HANG = frozenset({"camera", "capture", "extract", "match", "track", "publish"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Exit codes: 0 done, 2 an error of the user or the environment, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return _without_tracebacks(command, options)
    except KeyboardInterrupt:
        print("vo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`vo listen | head`); the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER_ERROR


def program() -> NoReturn:
    """Runs the command line as a program. A thread that hangs in a driver or a library is not waited for.

    Python would end it where it is, in the middle of C++, and the process would die of that instead of our exit code.
    """
    code = main()
    hanging = [thread for thread in threading.enumerate() if thread.daemon and thread.name in _MAY_HANG]
    for thread in hanging:
        thread.join(1.0 / len(hanging))
    if any(thread.is_alive() for thread in hanging):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _without_tracebacks(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Runs a subcommand; an error of the environment becomes one line."""
    from frontends.base import VoError

    try:
        return command(options)
    except VoError as error:
        print(f"vo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR


def build_parser() -> argparse.ArgumentParser:
    """Every subcommand with its flags; `command` of the result runs it."""
    parser = Parser(prog="vo", description="Real-time visual odometry with learned features.")
    parser.add_argument("--version", action="version", version=f"lightvo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        live_options.add_run,
        live_options.add_view,
        live_options.add_listen,
        live_options.add_keys,
        results_options.add_replay,
        results_options.add_recording,
        results_options.add_export,
        results_options.add_eval,
        results_options.add_batch,
        bench_options.add_bench,
        bench_options.add_bench_matching,
        machine_options.add_weights,
        machine_options.add_calibrate,
        machine_options.add_doctor,
    ):
        add(commands)
    return parser
