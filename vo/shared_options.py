"""What the commands of `vo` share: the parser, groups of flags, and how flags become a request."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

USER_ERROR = 2
INTERRUPTED = 130
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5570"

SOURCES = """sources:
  demo                    the bundled clip
  webcam:0                a camera
  FILE or URL             a video
  DIR                     a directory of images, or a data set that is recognised by what lies there
  kitti:DIR tum:DIR euroc:DIR   a sequence of that data set (layouts: datasets/README.md)
  loop:SOURCE             a file or data set again and again, without an end
"""

Request = TypeVar("Request")


class Parser(argparse.ArgumentParser):
    """Complains in one line, like every other error of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"vo: error: {message} (see {self.prog} --help)\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def request(kind: type[Request], options: argparse.Namespace, **given: Any) -> Request:
    """The request of a command, a dataclass: every field is given, or the flag of the same name (its `dest`).

    A field without either is an AttributeError: nothing falls back to a default that no flag can change.
    """
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = given[field.name] if field.name in given else getattr(options, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


# --- groups of flags ------------------------------------------------------------------------------------------------


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """What is run, and where."""
    parser.add_argument("--config", metavar="F", help="preset (kitti, tum, fast-cpu, xfeat, orb, ...) or YAML file")
    parser.add_argument("--set", metavar="A.B=V", action="append", default=[], help="change one key of it; repeatable")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: auto)")


def add_intrinsics(parser: argparse.ArgumentParser) -> None:
    """Where the intrinsics come from, instead of the source."""
    parser.add_argument(
        "--camera", dest="camera_file", metavar="FILE", type=Path, help="camera.yaml with the intrinsics (vo calibrate)"
    )
    parser.add_argument("--fov-deg", metavar="DEG", type=float, help="guess the intrinsics from the horizontal view")


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Which publisher to listen to."""
    parser.add_argument(
        "endpoint", metavar="ENDPOINT", nargs="?", default=DEFAULT_ENDPOINT, help="default: %(default)s"
    )


def add_client_keys(parser: argparse.ArgumentParser) -> None:
    """The flags of every consumer of a publisher that demands keys."""
    parser.add_argument("--key", metavar="F", type=Path, help="our secret, NAME.key_secret of vo keys")
    parser.add_argument("--server-key", metavar="F", type=Path, help="the publisher's server.key")
