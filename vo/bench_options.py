"""`vo bench` and `vo bench-matching` on the command line.

Only the standard library is imported here: what a command needs, it imports when it runs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vo.option_types import amount, positive, words
from vo.shared_options import SOURCES, Commands, add_configuration, add_intrinsics, request


def add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time every stage on real frames, also against other implementations",
        epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="where the frames come from (default: demo)")
    add_configuration(parser)
    parser.add_argument("--against", metavar="PEERS", default="", help="kornia, orb, opencv; several with commas")
    parser.add_argument(
        "--repeats",
        dest="num_repeats",
        metavar="N",
        type=positive,
        default=30,
        help="timed calls (default: %(default)s)",
    )
    parser.add_argument(
        "--frames", dest="num_frames", metavar="N", type=positive, default=20, help="frames used (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", dest="num_threads", metavar="N", type=positive, help="threads of every method (default: their own)"
    )
    parser.add_argument("--opencv-models", metavar="A[,L]", default="", help="ALIKED and LightGlue as ONNX, for opencv")
    add_intrinsics(parser)
    parser.add_argument(
        "--stream", metavar="MODES", default="", help="whole runs to a published pose: lossless, latest or both"
    )
    parser.add_argument(
        "--stream-frames",
        dest="num_stream_frames",
        metavar="N",
        type=positive,
        default=1000,
        help="frames of each (default: %(default)s)",
    )
    parser.add_argument("--stream-hz", metavar="HZ", type=float, help="pace of latest (default: that of the frames)")
    parser.add_argument("--json", dest="is_json", action="store_true", help="the figures as JSON")
    parser.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> int:
    # As for a run; OpenMP is left as PyTorch has it, because that is how other implementations are used.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vo.bench import BenchRequest, bench_command

    return bench_command(
        request(
            BenchRequest,
            options,
            overrides=tuple(options.set),
            against=words(options.against),
            model_files=words(options.opencv_models),
            stream_modes=words(options.stream),
        )
    )


def add_bench_matching(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench-matching",
        help="measure matches on pairs with a known homography or pose",
        description="Precision, recall, MMA and homography AUC on HPatches; pose AUC on MegaDepth-1500, ScanNet-1500.",
    )
    parser.add_argument(
        "pairs", metavar="PAIRS", type=Path, help="directory in HPatches' layout, or list of posed pairs"
    )
    parser.add_argument("--images", metavar="DIR", type=Path, help="what the names of a list lie under")
    add_configuration(parser)
    parser.add_argument("--max-pairs", metavar="N", type=positive, help="stop after so many")
    parser.add_argument(
        "--skip-large",
        dest="skips_large",
        action="store_true",
        help="without the 8 scenes of HPatches that D2-Net skips",
    )
    parser.add_argument(
        "--epipolar-threshold", metavar="D", type=amount, default=5e-4, help="of precision (default: 5e-4, ScanNet's)"
    )
    parser.add_argument("--output", metavar="F.json", type=Path, help="write all figures there")
    parser.add_argument("--json", dest="is_json", action="store_true", help="the figures as JSON")
    parser.set_defaults(command=_bench_matching)


def _bench_matching(options: argparse.Namespace) -> int:
    from vo.bench_matching import MatchingRequest, bench_matching_command

    return bench_matching_command(request(MatchingRequest, options, overrides=tuple(options.set)))
