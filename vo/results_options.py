"""Commands on what runs leave behind, on the command line: replay, recording, export, eval, batch.

Only the standard library is imported here: what a command needs, it imports when it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vo.option_types import amount, positive
from vo.shared_options import DEFAULT_ENDPOINT, Commands, request


def add_replay(commands: Commands) -> None:
    parser = commands.add_parser("replay", help="publish a recording again, in its own rhythm")
    parser.add_argument("path", metavar="F.mcap", type=Path, help="what vo run --record wrote")
    parser.add_argument(
        "--publish", dest="endpoint", metavar="ENDPOINT", default=DEFAULT_ENDPOINT, help="default: %(default)s"
    )
    parser.add_argument("--keys", metavar="DIR", default="", help="certificates for consumers on other machines")
    parser.add_argument("--rate", metavar="R", type=float, default=1.0, help="2 plays twice as fast (default: 1)")
    parser.add_argument(
        "--start", dest="start_s", metavar="S", type=float, default=0.0, help="begin so many seconds in"
    )
    parser.add_argument("--end", dest="end_s", metavar="S", type=float, help="end so many seconds in")
    parser.add_argument(
        "--delay", dest="delay_s", metavar="S", type=float, default=0.5, help="wait for consumers (default: 0.5 s)"
    )
    parser.add_argument(
        "--loop", dest="is_looped", action="store_true", help="begin again at the end, as another session"
    )
    parser.add_argument("--quiet", dest="is_quiet", action="store_true", help="errors only")
    parser.set_defaults(command=_replay)


def _replay(options: argparse.Namespace) -> int:
    from vo.replay_command import ReplayRequest, replay_command

    return replay_command(request(ReplayRequest, options))


def add_recording(commands: Commands) -> None:
    parser = commands.add_parser("recording", help="look into a recording, or repair one whose run was killed")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    info = actions.add_parser("info", help="what is in it")
    info.add_argument("recording", metavar="F.mcap", type=Path)
    info.set_defaults(command=_recording_info)
    repair = actions.add_parser("repair", help="give it the index that other programs ask for")
    repair.add_argument("recording", metavar="F.mcap", type=Path)
    repair.add_argument("--output", metavar="G.mcap", type=Path, help="write there (default: in its own place)")
    repair.set_defaults(command=_recording_repair)


def _recording_info(options: argparse.Namespace) -> int:
    from vo.replay_command import info_command

    return info_command(options.recording)


def _recording_repair(options: argparse.Namespace) -> int:
    from vo.replay_command import repair_command

    return repair_command(options.recording, options.output)


def add_export(commands: Commands) -> None:
    parser = commands.add_parser("export", help="hand a run to COLMAP, nerfstudio, or what reads their files")
    parser.add_argument("kind", choices=("colmap", "nerfstudio"), help="whose files to write")
    parser.add_argument("path", metavar="INPUT", type=Path, help="a recording, or a directory of vo run --output")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="where to write")
    parser.add_argument("--images", action="store_true", help="write the images too")
    parser.add_argument("--source", metavar="SOURCE", help="take the images from there, not from the recording")
    parser.add_argument(
        "--camera", dest="camera_file", metavar="FILE", type=Path, help="camera.yaml of a directory that has none"
    )
    parser.add_argument("--frames", choices=("keyframes", "all"), default="keyframes", help="of a recording")
    parser.add_argument("--every", metavar="N", type=positive, default=1, help="only every Nth of them")
    parser.add_argument(
        "--undistort", dest="undistorts", action="store_true", help="take the distortion out: a pinhole camera"
    )
    parser.add_argument("--max-error-px", metavar="E", type=float, default=4.0, help="of an observation (default: 4)")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from vo.export_command import ExportRequest, export_command

    writes_images = options.images or options.source is not None
    return export_command(request(ExportRequest, options, writes_images=writes_images))


def add_eval(commands: Commands) -> None:
    parser = commands.add_parser("eval", help="measure trajectories against the truth")
    parser.add_argument(
        "trajectories",
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
    parser.add_argument("--json", dest="is_json", action="store_true", help="the figures as JSON")
    parser.set_defaults(command=_eval)


def _eval(options: argparse.Namespace) -> int:
    from vo.eval_command import EvalRequest, eval_command

    return eval_command(request(EvalRequest, options))


def add_batch(commands: Commands) -> None:
    parser = commands.add_parser(
        "batch",
        help="run many sequences with many configurations into one table",
        description="Runs what a manifest lists and has not been run yet; the same command goes on where it stopped.",
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="YAML file, or kitti, tum, euroc, heads")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="results and table.md, .csv, .html")
    parser.add_argument("--data", metavar="DIR", help="what {data} stands for in it (default: LIGHTVO_DATA)")
    parser.add_argument(
        "--jobs", dest="num_jobs", metavar="N", type=positive, default=1, help="runs at a time (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: auto)")
    parser.add_argument("--max-frames", metavar="N", type=positive, help="stop every run after so many")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, local"
    )
    parser.add_argument("--ray-cpus", metavar="N", type=amount, default=1.0, help="processors for each run there")
    parser.add_argument("--ray-gpus", metavar="N", type=amount, default=0.0, help="GPUs, or shares of one, for each")
    parser.add_argument("--quiet", dest="is_quiet", action="store_true", help="no progress and no table, errors only")
    parser.set_defaults(command=_batch)


def _batch(options: argparse.Namespace) -> int:
    from vo.batch_command import BatchRequest, batch_command

    return batch_command(request(BatchRequest, options))
