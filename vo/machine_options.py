"""Commands that get a machine ready, on the command line: calibrate, weights, doctor.

Only the standard library is imported here: what a command needs, it imports when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vo.option_types import positive
from vo.shared_options import DEFAULT_ENDPOINT, USER_ERROR, Commands, request

if TYPE_CHECKING:
    from frontends.weights import WeightsStatus

PRESET_WEIGHTS = ("aliked-t16", "lightglue-light-aliked-t16", "xfeat", "lightglue-light-xfeat")


def add_calibrate(commands: Commands) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="find the intrinsics of a camera with a printed board",
        description="Finds the intrinsics of a camera from views of a board and writes camera.yaml and a report. "
        "A calibration that is not good enough is written too, with a warning; with --strict the exit code is then 2. "
        "One that says nothing is an error and not written. How to print, hold and judge: docs/CALIBRATION.md.",
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="webcam:0, a video, or a directory of images")
    parser.add_argument(
        "--board",
        metavar="B",
        default="charuco:10x7",
        help="charuco:10x7 (squares; the default), "
        "charuco:10x7:5x5_100:0.7 (dictionary, marker side over square side), chessboard:9x6 (inner corners)",
    )
    parser.add_argument("--square-m", metavar="M", type=float, default=0.025, help="side of a square (default: 0.025)")
    parser.add_argument(
        "-o", "--output", metavar="F", type=Path, default=Path("camera.yaml"), help="default: %(default)s"
    )
    parser.add_argument(
        "--model",
        choices=("auto", "pinhole", "brown", "rational", "fisheye"),
        default="auto",
        help="default: the one that predicts unseen views best",
    )
    parser.add_argument(
        "--print-board", metavar="F.pdf", type=Path, help="write the board to print, PDF or PNG, and end"
    )
    parser.add_argument(
        "--paper", choices=("a4", "letter", "a3", "a2"), default="a4", help="of the board (default: a4)"
    )
    parser.add_argument(
        "--views",
        dest="num_views",
        metavar="N",
        type=positive,
        default=30,
        help="of a live camera (default: %(default)s)",
    )
    parser.add_argument("--save-images", metavar="DIR", type=Path, help="keep the images of live views")
    parser.add_argument("--picture", metavar="F.png", type=Path, help="draw corners, residuals and uncertainty")
    parser.add_argument("--headless", dest="is_headless", action="store_true", help="guidance in words, no window")
    parser.add_argument(
        "--strict", dest="is_strict", action="store_true", help="exit code 2 where it is not good enough"
    )
    parser.add_argument("--json", dest="is_json", action="store_true", help="the report as JSON")
    parser.add_argument("--quiet", dest="is_quiet", action="store_true", help="no progress and no report, errors only")
    parser.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vo.calibrate_command import CalibrateRequest, calibrate_command

    return calibrate_command(request(CalibrateRequest, options))


def add_weights(commands: Commands) -> None:
    parser = commands.add_parser("weights", help="list, fetch or verify the weights of the networks")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="what there is, where it lies, its licence and origin")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(command=_weights_list)
    fetching = actions.add_parser("fetch", help="download what is missing, and check it")
    fetching.add_argument("names", metavar="NAME", nargs="*", help="which ones; none: those of the presets")
    fetching.set_defaults(command=_weights_fetch)
    verifying = actions.add_parser("verify", help="check size and hash of what is here")
    verifying.add_argument("names", metavar="NAME", nargs="*", help="which ones; none: all that are here")
    verifying.set_defaults(command=_weights_verify)


def _weights_list(options: argparse.Namespace) -> int:
    from frontends.weights import list_weights

    statuses = list_weights()
    if options.json:
        print(json.dumps([_weights_row(status) for status in statuses], indent=2))
        return 0
    for status in statuses:
        entry = status.entry
        place = (
            f"{status.origin}: {status.path}"
            if status.path is not None
            else f"not here: {entry.source_url or entry.page}"
        )
        print(f"{entry.name:28} {entry.licence:13} {entry.architecture}\n{'':28} {place}")
    return 0


def _weights_row(status: WeightsStatus) -> dict[str, str | int | bool | None]:
    entry = status.entry
    return {
        "name": entry.name,
        "role": entry.role,
        "architecture": entry.architecture,
        "fits": ", ".join(entry.fits),
        "licence": entry.licence,
        "is_ours": entry.is_ours,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "source_url": entry.source_url or entry.page,
        "origin": str(status.origin) if status.origin is not None else None,
        "path": str(status.path) if status.path is not None else None,
    }


def _weights_fetch(options: argparse.Namespace) -> int:
    from frontends.weights import fetch

    for name in options.names or PRESET_WEIGHTS:
        file = fetch(name)
        print(f"{file.name}: {file.path} ({file.origin}, SHA-256 {file.sha256})", flush=True)
    return 0


def _weights_verify(options: argparse.Namespace) -> int:
    from frontends.base import WeightsError
    from frontends.weights import list_weights, verify

    names = options.names or [status.entry.name for status in list_weights() if status.path is not None]
    num_bad = 0
    for name in names:
        try:
            file = verify(name)
        except WeightsError as error:
            num_bad += 1
            print(f"bad  {name}: {error}")
        else:
            print(f"ok   {name}: {file.path} (SHA-256 {file.sha256})")
    if num_bad:
        raise WeightsError(f"{num_bad} of {len(names)} sets of weights cannot be used; see above")
    return 0


def add_doctor(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="what works on this machine, what is missing, and the remedy")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vo.doctor import State, examine

    checks = []
    for check in examine(DEFAULT_ENDPOINT):
        checks.append(check)
        if not options.json:
            is_optional = check.state is not State.WORKS and not check.is_required
            remedy = f" -> {check.remedy}" if check.remedy else ""
            print(f"{check.state.value:8} {check.name:32} {check.detail}{' (optional)' if is_optional else ''}{remedy}")
    if options.json:
        print(json.dumps([{**asdict(check), "state": check.state.value} for check in checks], indent=2))
    return 0 if all(check.state is State.WORKS or not check.is_required for check in checks) else USER_ERROR
