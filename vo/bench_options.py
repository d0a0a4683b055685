"""`vo bench` on the command line; what it runs is imported when it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vo.option_types import positive, words


def add_bench(commands: argparse._SubParsersAction[Any], sources: str) -> None:
    """Adds the subcommand; `sources` says what SOURCE may be."""
    parser = commands.add_parser(
        "bench",
        help="time every stage on real frames, also against other implementations",
        epilog=sources,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="where the frames come from (default: demo)")
    parser.add_argument("--config", metavar="F", help="preset (kitti, tum, fast-cpu, ...) or YAML file")
    parser.add_argument("--set", metavar="A.B=V", action="append", default=[], help="change one key of it; repeatable")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: auto)")
    parser.add_argument("--against", metavar="PEERS", default="", help="kornia, orb, opencv; several with commas")
    parser.add_argument("--repeats", metavar="N", type=positive, default=30, help="timed calls (default: %(default)s)")
    parser.add_argument("--frames", metavar="N", type=positive, default=20, help="frames used (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=positive, help="threads of every method (default: their own)")
    parser.add_argument("--opencv-models", metavar="A[,L]", default="", help="ALIKED and LightGlue as ONNX, for opencv")
    parser.add_argument("--camera", metavar="FILE", type=Path, help="camera.yaml with the intrinsics")
    parser.add_argument("--fov-deg", metavar="DEG", type=float, help="guess the intrinsics from the horizontal view")
    parser.add_argument(
        "--stream", metavar="MODES", default="", help="whole runs to a published pose: lossless, latest or both"
    )
    parser.add_argument(
        "--stream-frames", metavar="N", type=positive, default=1000, help="frames of each (default: %(default)s)"
    )
    parser.add_argument("--stream-hz", metavar="HZ", type=float, help="pace of latest (default: that of the frames)")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> int:
    # As for a run; OpenMP is left as PyTorch has it, because that is how other implementations are used.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vo.bench import BenchRequest, bench_command

    return bench_command(
        BenchRequest(
            source=options.source,
            config=options.config,
            overrides=tuple(options.set),
            device=options.device,
            against=words(options.against),
            num_repeats=options.repeats,
            num_frames=options.frames,
            num_threads=options.threads,
            is_json=options.json,
            model_files=words(options.opencv_models),
            camera_file=options.camera,
            fov_deg=options.fov_deg,
            stream_modes=words(options.stream),
            num_stream_frames=options.stream_frames,
            stream_hz=options.stream_hz,
        )
    )
