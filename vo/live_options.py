"""`vo run` and what listens to it, `vo view` and `vo listen`, on the command line; `vo keys`.

Only the standard library is imported here: what a command needs, it imports when it runs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vo.memory import limit_arenas
from vo.option_types import positive, rate, seconds, size, words
from vo.shared_options import (
    DEFAULT_ENDPOINT,
    INTERRUPTED,
    SOURCES,
    USER_ERROR,
    Commands,
    add_client_keys,
    add_configuration,
    add_endpoint,
    add_intrinsics,
    request,
)


def add_run(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="estimate the trajectory of a camera",
        description="Estimates the trajectory of a camera and publishes it while it goes on.",
        epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="where the frames come from, see below")
    add_configuration(parser)
    parser.add_argument("--output", metavar="DIR", type=Path, help="write trajectory, summary, config and plot there")
    parser.add_argument("--publish", metavar="ENDPOINT", help=f"where to publish, or off (default: {DEFAULT_ENDPOINT})")
    parser.add_argument("--keys", metavar="DIR", type=Path, help="let in only clients with keys (vo keys DIR)")
    parser.add_argument("--record", metavar="F.mcap", type=Path, help="record all messages, for replay and Foxglove")
    parser.add_argument(
        "--view", dest="views", action="store_true", help="show it in a window (also later, elsewhere: vo view)"
    )
    parser.add_argument(
        "--save-tracks", dest="saves_tracks", action="store_true", help="write the tracks of every frame to DIR/tracks"
    )
    parser.add_argument("--max-frames", metavar="N", type=positive, help="stop after so many frames")
    parser.add_argument(
        "--realtime",
        dest="is_realtime",
        action="store_true",
        help="replay a file at its own pace, dropping late frames",
    )
    add_intrinsics(parser)
    parser.add_argument(
        "--self-calibrate",
        dest="self_calibrates",
        action="store_true",
        help="find the focal length while the camera moves",
    )
    parser.add_argument("--fps", metavar="HZ", type=float, help="rate of images that carry no times")
    parser.add_argument("--watchdog-s", metavar="S", type=seconds, help="fail when no frame has come for so long")
    parser.add_argument("--quiet", dest="is_quiet", action="store_true", help="no progress and no report, errors only")
    parser.add_argument(
        "--fallback-orb", dest="falls_back_to_orb", action="store_true", help="run on ORB where weights cannot be had"
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    # Read when the libraries are loaded. Three stages already keep the cores busy: BLAS threads for matrices of a few
    # hundred rows, and OpenMP threads that spin while they wait, then cost up to ten times what they save.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    limit_arenas()
    from vo.run_command import RunRequest, run_command

    return run_command(request(RunRequest, options, overrides=tuple(options.set)))


def add_view(commands: Commands) -> None:
    parser = commands.add_parser("view", help="show what a run publishes, in a window or as picture and video")
    add_endpoint(parser)
    parser.add_argument("--truth", metavar="F", type=Path, help="true poses, aligned to the estimate as it grows")
    parser.add_argument("--overview", action="store_true", help="everything in view instead of following the camera")
    parser.add_argument("--hide", metavar="LAYERS", default="", help="trajectory,keyframes,landmarks,camera,truth")
    parser.add_argument(
        "--headless", dest="is_headless", action="store_true", help="draw into files, without a display, until the end"
    )
    parser.add_argument("--screenshot", metavar="F.png", type=Path, help="picture of the end")
    parser.add_argument("--video", metavar="F.mp4", type=Path, help="with --headless: video of the run")
    parser.add_argument("--video-fps", metavar="HZ", type=rate, default=15.0, help="default: %(default)s")
    parser.add_argument("--size", metavar="WxH", type=size, default=(1280, 720), help="px (default: 1280x720)")
    parser.add_argument("--after-s", metavar="S", type=float, help="end after so long")
    parser.add_argument("--until-finished", action="store_true", help="close the window with the run")
    add_client_keys(parser)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=_view)


def _view(options: argparse.Namespace) -> int:
    from vo.keys import load_client_keys
    from vo.scene_view import Eye
    from vo.view_command import ViewRequest, view_command

    return view_command(
        request(
            ViewRequest,
            options,
            eye=Eye.OVERVIEW if options.overview else Eye.FOLLOW,
            hidden=words(options.hide),
            keys=load_client_keys(options.key, options.server_key),
            width=options.size[0],
            height=options.size[1],
        )
    )


def add_listen(commands: Commands) -> None:
    parser = commands.add_parser("listen", help="print what a run publishes")
    add_endpoint(parser)
    parser.add_argument(
        "--topic",
        action="append",
        metavar="T",
        help="pose (default), tracks, keyframe, points, image, status or camera; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--max-messages", metavar="N", type=positive, help="end after so many")
    parser.add_argument(
        "--timeout-s", metavar="S", type=float, help="end after so long without one; code 2 if none came"
    )
    parser.add_argument("--until-finished", action="store_true", help="end with the run")
    add_client_keys(parser)
    parser.set_defaults(command=_listen)


def _listen(options: argparse.Namespace) -> int:
    from vo.keys import load_client_keys
    from vo.listen import listen

    counts = listen(
        options.endpoint,
        tuple(options.topic or ("pose",)),
        options.json,
        options.max_messages,
        options.timeout_s,
        options.until_finished,
        keys=load_client_keys(options.key, options.server_key),
    )
    if counts.is_interrupted:
        return INTERRUPTED
    # Whoever waits for a limited time wants to know whether anybody is there.
    return USER_ERROR if options.timeout_s is not None and counts.num_messages == 0 else 0


def add_keys(commands: Commands) -> None:
    parser = commands.add_parser(
        "keys",
        help="make keys for publishing beyond this machine",
        description="Makes the keys of a publisher and its clients in DIR; no file is ever overwritten.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where they go; the publisher runs with --keys DIR")
    parser.add_argument(
        "--client", metavar="NAME", action="append", default=[], help="make a client of that name; repeatable"
    )
    parser.set_defaults(command=_keys)


def _keys(options: argparse.Namespace) -> int:
    from vo.keys_command import keys_command

    return keys_command(options.directory, options.client)
