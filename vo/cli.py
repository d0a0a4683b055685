"""The `vo` command. Only the standard library is imported here: what a subcommand needs, it imports when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vo import __version__
from vo.bench_options import add_bench
from vo.option_types import amount, positive, rate, seconds, size, words

if TYPE_CHECKING:
    from frontends.weights import WeightsStatus

USER_ERROR = 2
INTERRUPTED = 130
# The thread that reads a camera, and the stages of a run.
_MAY_HANG = frozenset({"camera", "capture", "extract", "match", "track", "publish"})
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5570"
PRESET_WEIGHTS = ("aliked-t16", "lightglue-light-aliked-t16", "xfeat", "lightglue-light-xfeat")

_SOURCES = """sources:
  demo                    the bundled clip
  webcam:0                a camera
  FILE or URL             a video
  DIR                     a directory of images, or a data set that is recognised by what lies there
  kitti:DIR tum:DIR euroc:DIR   a sequence of that data set (layouts: datasets/README.md)
  loop:SOURCE             a file or data set again and again, without an end
"""


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like every other error of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"vo: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Exit codes: 0 done, 2 an error of the user or the environment, 130 interrupted."""
    exit_code = _exit_code(arguments)
    if any(getattr(thread, "is_left_behind", False) and thread.is_alive() for thread in threading.enumerate()):
        # A thread in the middle of a library's code would crash the interpreter on its way out, or hold it up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def _exit_code(arguments: Sequence[str] | None) -> int:
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
    parser = _Parser(prog="vo", description="Real-time visual odometry with learned features.")
    parser.add_argument("--version", action="version", version=f"lightvo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_view(commands)
    _add_listen(commands)
    _add_keys(commands)
    _add_replay(commands)
    _add_recording(commands)
    _add_export(commands)
    _add_eval(commands)
    _add_batch(commands)
    add_bench(commands, _SOURCES)
    _add_bench_matching(commands)
    _add_weights(commands)
    _add_calibrate(commands)
    _add_doctor(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "run",
        help="estimate the trajectory of a camera",
        description="Estimates the trajectory of a camera and publishes it while it goes on.",
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="where the frames come from, see below")
    parser.add_argument("--config", metavar="F", help="preset (kitti, tum, fast-cpu, ...) or YAML file")
    parser.add_argument("--set", metavar="A.B=V", action="append", default=[], help="change one key of it; repeatable")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write trajectory, summary, config and plot there")
    parser.add_argument("--publish", metavar="ENDPOINT", help=f"where to publish, or off (default: {DEFAULT_ENDPOINT})")
    parser.add_argument("--keys", metavar="DIR", type=Path, help="let in only clients with keys (vo keys DIR)")
    parser.add_argument("--record", metavar="F.mcap", type=Path, help="record all messages, for replay and Foxglove")
    parser.add_argument("--view", action="store_true", help="show it in a window (also later, elsewhere: vo view)")
    parser.add_argument("--save-tracks", action="store_true", help="write the tracks of every frame to DIR/tracks")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: auto)")
    parser.add_argument("--max-frames", metavar="N", type=positive, help="stop after so many frames")
    parser.add_argument("--realtime", action="store_true", help="replay a file at its own pace, dropping late frames")
    parser.add_argument("--camera", metavar="FILE", type=Path, help="camera.yaml with the intrinsics")
    parser.add_argument("--fov-deg", metavar="DEG", type=float, help="guess the intrinsics from the horizontal view")
    parser.add_argument("--self-calibrate", action="store_true", help="find the focal length while the camera moves")
    parser.add_argument("--fps", metavar="HZ", type=float, help="rate of images that carry no times")
    parser.add_argument("--watchdog-s", metavar="S", type=seconds, help="fail when no frame has come for so long")
    parser.add_argument("--quiet", action="store_true", help="no progress and no report, errors only")
    parser.add_argument("--fallback-orb", action="store_true", help="run on ORB where weights cannot be had")
    parser.set_defaults(command=_run)


def _add_view(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("view", help="show what a run publishes, in a window or as picture and video")
    parser.add_argument(
        "endpoint", metavar="ENDPOINT", nargs="?", default=DEFAULT_ENDPOINT, help="default: %(default)s"
    )
    parser.add_argument("--truth", metavar="F", type=Path, help="true poses, aligned to the estimate as it grows")
    parser.add_argument("--overview", action="store_true", help="everything in view instead of following the camera")
    parser.add_argument("--hide", metavar="LAYERS", default="", help="trajectory,keyframes,landmarks,camera,truth")
    parser.add_argument("--headless", action="store_true", help="draw into files, without a display, until the end")
    parser.add_argument("--screenshot", metavar="F.png", type=Path, help="picture of the end")
    parser.add_argument("--video", metavar="F.mp4", type=Path, help="with --headless: video of the run")
    parser.add_argument("--video-fps", metavar="HZ", type=rate, default=15.0, help="default: %(default)s")
    parser.add_argument("--size", metavar="WxH", type=size, default=(1280, 720), help="px (default: 1280x720)")
    parser.add_argument("--after-s", metavar="S", type=float, help="end after so long")
    parser.add_argument("--until-finished", action="store_true", help="close the window with the run")
    _add_client_keys(parser)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=_view)


def _add_listen(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("listen", help="print what a run publishes")
    parser.add_argument(
        "endpoint", metavar="ENDPOINT", nargs="?", default=DEFAULT_ENDPOINT, help="default: %(default)s"
    )
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
    _add_client_keys(parser)
    parser.set_defaults(command=_listen)


def _add_client_keys(parser: argparse.ArgumentParser) -> None:
    """The flags of every consumer of a publisher that demands keys."""
    parser.add_argument("--key", metavar="F", type=Path, help="our secret, NAME.key_secret of vo keys")
    parser.add_argument("--server-key", metavar="F", type=Path, help="the publisher's server.key")


def _add_keys(commands: argparse._SubParsersAction[_Parser]) -> None:
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


def _add_replay(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("replay", help="publish a recording again, in its own rhythm")
    parser.add_argument("recording", metavar="F.mcap", type=Path, help="what vo run --record wrote")
    parser.add_argument("--publish", metavar="ENDPOINT", default=DEFAULT_ENDPOINT, help="default: %(default)s")
    parser.add_argument("--keys", metavar="DIR", default="", help="certificates for consumers on other machines")
    parser.add_argument("--rate", metavar="R", type=float, default=1.0, help="2 plays twice as fast (default: 1)")
    parser.add_argument("--start", metavar="S", type=float, default=0.0, help="begin so many seconds in")
    parser.add_argument("--end", metavar="S", type=float, help="end so many seconds in")
    parser.add_argument("--delay", metavar="S", type=float, default=0.5, help="wait for consumers (default: 0.5 s)")
    parser.add_argument("--loop", action="store_true", help="begin again at the end, as another session")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    parser.set_defaults(command=_replay)


def _add_recording(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("recording", help="look into a recording, or repair one whose run was killed")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    info = actions.add_parser("info", help="what is in it")
    info.add_argument("recording", metavar="F.mcap", type=Path)
    info.set_defaults(command=_recording_info)
    repair = actions.add_parser("repair", help="give it the index that other programs ask for")
    repair.add_argument("recording", metavar="F.mcap", type=Path)
    repair.add_argument("--output", metavar="G.mcap", type=Path, help="write there (default: in its own place)")
    repair.set_defaults(command=_recording_repair)


def _add_export(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("export", help="hand a run to COLMAP, nerfstudio, or what reads their files")
    parser.add_argument("kind", choices=("colmap", "nerfstudio"), help="whose files to write")
    parser.add_argument("input", metavar="INPUT", type=Path, help="a recording, or a directory of vo run --output")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="where to write")
    parser.add_argument("--images", action="store_true", help="write the images too")
    parser.add_argument("--source", metavar="SOURCE", help="take the images from there, not from the recording")
    parser.add_argument("--camera", metavar="FILE", type=Path, help="camera.yaml of a directory that has none")
    parser.add_argument("--frames", choices=("keyframes", "all"), default="keyframes", help="of a recording")
    parser.add_argument("--every", metavar="N", type=positive, default=1, help="only every Nth of them")
    parser.add_argument("--undistort", action="store_true", help="take the distortion out: a pinhole camera")
    parser.add_argument("--max-error-px", metavar="E", type=float, default=4.0, help="of an observation (default: 4)")
    parser.set_defaults(command=_export)


def _add_eval(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("eval", help="measure trajectories against the truth")
    parser.add_argument(
        "trajectory",
        metavar="TRAJECTORY",
        type=Path,
        nargs="+",
        help="TUM, KITTI or EuRoC file, of any system, or an output directory of vo run; several are runs of the same",
    )
    parser.add_argument("--truth", metavar="F", type=Path, required=True, help="file with the true poses")
    parser.add_argument("--truth-times", metavar="F", type=Path, help="times of a KITTI truth, s (default: beside it)")
    parser.add_argument("--truth-sensor", metavar="F", type=Path, help="sensor.yaml of the camera, for an EuRoC truth")
    parser.add_argument(
        "--align", choices=("sim3", "se3", "scale", "none"), default="sim3", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-time-difference-s",
        metavar="S",
        type=amount,
        default=0.01,
        help="of poses that pair up (default: 0.01)",
    )
    parser.add_argument("--report", metavar="DIR", type=Path, help="write report.html, figures and plots there")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.set_defaults(command=_eval)


def _add_batch(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "batch",
        help="run many sequences with many configurations into one table",
        description="Runs what a manifest lists and has not been run yet; the same command goes on where it stopped.",
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="YAML file, or kitti, tum, euroc, heads")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="results and table.md, .csv, .html")
    parser.add_argument("--data", metavar="DIR", help="what {data} stands for in it (default: LIGHTVO_DATA)")
    parser.add_argument("--jobs", metavar="N", type=positive, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: auto)")
    parser.add_argument("--max-frames", metavar="N", type=positive, help="stop every run after so many")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, local"
    )
    parser.add_argument("--ray-cpus", metavar="N", type=amount, default=1.0, help="processors for each run there")
    parser.add_argument("--ray-gpus", metavar="N", type=amount, default=0.0, help="GPUs, or shares of one, for each")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table, errors only")
    parser.set_defaults(command=_batch)


def _add_bench_matching(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "bench-matching",
        help="measure matches on pairs with a known homography or pose",
        description="Precision, recall, MMA and homography AUC on HPatches; pose AUC on MegaDepth-1500, ScanNet-1500.",
    )
    parser.add_argument(
        "pairs", metavar="PAIRS", type=Path, help="directory in HPatches' layout, or list of posed pairs"
    )
    parser.add_argument("--images", metavar="DIR", type=Path, help="what the names of a list lie under")
    parser.add_argument("--config", metavar="F", help="preset (xfeat, orb, ...) or YAML file")
    parser.add_argument("--set", metavar="A.B=V", action="append", default=[], help="change one key of it; repeatable")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: auto)")
    parser.add_argument("--max-pairs", metavar="N", type=positive, help="stop after so many")
    parser.add_argument("--skip-large", action="store_true", help="without the 8 scenes of HPatches that D2-Net skips")
    parser.add_argument(
        "--epipolar-threshold", metavar="D", type=amount, default=5e-4, help="of precision (default: 5e-4, ScanNet's)"
    )
    parser.add_argument("--output", metavar="F.json", type=Path, help="write all figures there")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.set_defaults(command=_bench_matching)


def _add_weights(commands: argparse._SubParsersAction[_Parser]) -> None:
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


def _add_calibrate(commands: argparse._SubParsersAction[_Parser]) -> None:
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
        "--views", metavar="N", type=positive, default=30, help="of a live camera (default: %(default)s)"
    )
    parser.add_argument("--save-images", metavar="DIR", type=Path, help="keep the images of live views")
    parser.add_argument("--picture", metavar="F.png", type=Path, help="draw corners, residuals and uncertainty")
    parser.add_argument("--headless", action="store_true", help="guidance in words, no window")
    parser.add_argument("--strict", action="store_true", help="exit code 2 where it is not good enough")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress and no report, errors only")
    parser.set_defaults(command=_calibrate)


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("doctor", help="what works on this machine, what is missing, and the remedy")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=_doctor)


def _run(options: argparse.Namespace) -> int:
    # Read when the libraries are loaded. Three stages already keep the cores busy: BLAS threads for matrices of a few
    # hundred rows, and OpenMP threads that spin while they wait, then cost up to ten times what they save.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vo.run_command import RunRequest, run_command

    return run_command(
        RunRequest(
            source=options.source,
            config=options.config,
            overrides=tuple(options.set),
            output=options.output,
            publish=options.publish,
            keys=options.keys,
            device=options.device,
            max_frames=options.max_frames,
            is_realtime=options.realtime,
            camera_file=options.camera,
            fov_deg=options.fov_deg,
            self_calibrates=options.self_calibrate,
            fps=options.fps,
            is_quiet=options.quiet,
            falls_back_to_orb=options.fallback_orb,
            record=options.record,
            saves_tracks=options.save_tracks,
            views=options.view,
            watchdog_s=options.watchdog_s,
        )
    )


def _keys(options: argparse.Namespace) -> int:
    from vo.keys_command import keys_command

    return keys_command(options.directory, options.client)


def _view(options: argparse.Namespace) -> int:
    from vo.keys import load_client_keys
    from vo.scene_view import Eye
    from vo.view_command import ViewRequest, view_command

    return view_command(
        ViewRequest(
            endpoint=options.endpoint,
            is_headless=options.headless,
            screenshot=options.screenshot,
            video=options.video,
            video_fps=options.video_fps,
            after_s=options.after_s,
            until_finished=options.until_finished,
            truth=options.truth,
            eye=Eye.OVERVIEW if options.overview else Eye.FOLLOW,
            hidden=words(options.hide),
            keys=load_client_keys(options.key, options.server_key),
            width=options.size[0],
            height=options.size[1],
            ready_fd=options.ready_fd,
        )
    )


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


def _replay(options: argparse.Namespace) -> int:
    from vo.replay_command import ReplayRequest, replay_command

    return replay_command(
        ReplayRequest(
            options.recording,
            options.publish,
            options.keys,
            options.rate,
            options.start,
            options.end,
            options.delay,
            options.loop,
            options.quiet,
        )
    )


def _recording_info(options: argparse.Namespace) -> int:
    from vo.replay_command import info_command

    return info_command(options.recording)


def _recording_repair(options: argparse.Namespace) -> int:
    from vo.replay_command import repair_command

    return repair_command(options.recording, options.output)


def _export(options: argparse.Namespace) -> int:
    from vo.export_command import ExportRequest, export_command

    return export_command(
        ExportRequest(
            kind=options.kind,
            path=options.input,
            output=options.output,
            writes_images=options.images or options.source is not None,
            source=options.source,
            camera_file=options.camera,
            frames=options.frames,
            every=options.every,
            undistorts=options.undistort,
            max_error_px=options.max_error_px,
        )
    )


def _eval(options: argparse.Namespace) -> int:
    from vo.eval_command import EvalRequest, eval_command

    return eval_command(
        EvalRequest(
            trajectories=tuple(options.trajectory),
            truth=options.truth,
            align=options.align,
            max_time_difference_s=options.max_time_difference_s,
            truth_times=options.truth_times,
            truth_sensor=options.truth_sensor,
            report=options.report,
            is_json=options.json,
        )
    )


def _batch(options: argparse.Namespace) -> int:
    from vo.batch_command import BatchRequest, batch_command

    return batch_command(
        BatchRequest(
            manifest=options.manifest,
            output=options.output,
            data=options.data,
            num_jobs=options.jobs,
            device=options.device,
            max_frames=options.max_frames,
            ray=options.ray,
            ray_cpus=options.ray_cpus,
            ray_gpus=options.ray_gpus,
            is_quiet=options.quiet,
        )
    )


def _bench_matching(options: argparse.Namespace) -> int:
    from vo.bench_matching import MatchingRequest, bench_matching_command

    return bench_matching_command(
        MatchingRequest(
            pairs=options.pairs,
            images=options.images,
            config=options.config,
            overrides=tuple(options.set),
            device=options.device,
            max_pairs=options.max_pairs,
            skips_large=options.skip_large,
            epipolar_threshold=options.epipolar_threshold,
            output=options.output,
            is_json=options.json,
        )
    )


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


def _calibrate(options: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vo.calibrate_command import CalibrateRequest, calibrate_command

    return calibrate_command(
        CalibrateRequest(
            source=options.source,
            board=options.board,
            square_m=options.square_m,
            output=options.output,
            model=options.model,
            print_board=options.print_board,
            paper=options.paper,
            num_views=options.views,
            save_images=options.save_images,
            picture=options.picture,
            is_headless=options.headless,
            is_strict=options.strict,
            is_json=options.json,
            is_quiet=options.quiet,
        )
    )


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
