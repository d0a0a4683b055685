"""Time every way in which the engine can run the networks, and hold each to the accuracy gate: a table as JSON.

    LIGHTVO_WEIGHTS=DIR python tools/engine_ways.py [--device cuda] [--repeats 100] > benchmarks/gpu-engine.json

The engine chooses among these ways by itself (`frontends.tuning`); this shows all of them, at several sizes. Times are
of the graph alone, replayed again and again, except where a row says "call": there they are of `match` as callers feel
it, waiting and reading included. On the CPU graphs are emulated: that tests this program and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice

import numpy as np
import torch

from frontends.accuracy_gate import Found, Image, agreement, find_in
from frontends.aliked import AlikedConfig
from frontends.base import Features
from frontends.engine import static_form
from frontends.frontend import create_extractor, create_matcher
from frontends.graphs import Backend, CudaBackend, EmulatedBackend
from frontends.lightglue import LightGlue, LightGlueConfig
from frontends.lightglue_static import create_static
from frontends.static_extractor import StaticExtractor
from frontends.static_form import ExtractorChoice
from frontends.static_matcher import MatcherChoice, StaticMatcher
from frontends.tuning import COMPILER_FAILURES, compile_steps, synthetic_images, typical_ms
from frontends.xfeat import XFeatConfig
from vo.bench_machine import read_machine
from vo.sources import open_source
from vo.summary import library_versions
from vo.types import VoError

SCHEMA = "lightvo-gpu-engine/1"
EXTRACTORS = (AlikedConfig, XFeatConfig)
SIZES = ((640, 480), (1241, 376))
CAPACITIES = (512, 1024, 2048)
DEPTH_CAPACITY = 1024  # the one at which depths are compared, and compiled layers


@dataclass(frozen=True, slots=True)
class Row:
    """One way at one size; the shares are of what float32 as written found, None for that one itself.

    ms  None where the way does not run here, `remark` says why.
    """

    network: str
    size: str
    num_keypoints: int
    way: str
    ms: float | None
    keypoints: float | None = None
    matches: float | None = None
    remark: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What is measured: the first images of one size are used where their size is asked for."""

    device: torch.device
    images: tuple[Image, ...]
    num_repeats: int
    compiles: bool
    capacities: tuple[int, ...]

    def backend(self) -> Backend:
        is_cuda = self.device.type == "cuda"
        return CudaBackend(self.device) if is_cuda else EmulatedBackend(self.device, is_checked=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the table was made; 2 where weights or frames are missing."""
    parser = argparse.ArgumentParser(description="Time every way in which the engine can run the networks.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to test this program")
    parser.add_argument("--source", default="demo", help="where the frames come from (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=100, help="replays per time (default: %(default)s)")
    parser.add_argument("--capacities", default=",".join(map(str, CAPACITIES)), help="keypoints of the matcher")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("engine_ways: error: no GPU: torch.cuda.is_available() is false", file=sys.stderr)
        return 2
    try:
        source = open_source(options.source)
        images = tuple(frame.image for frame in islice(source.frames(), 0, 24, 4))
        source.close()
        capacities = tuple(int(count) for count in options.capacities.split(","))
        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        request = Request(device, images, options.repeats, not options.no_compile, capacities)
        rows = [*extractor_rows(request), *matcher_rows(request)]
    except VoError as error:
        print(f"engine_ways: error: {error}", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    tree = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(
            ["python", "tools/engine_ways.py", *(arguments if arguments is not None else sys.argv[1:])]
        ),
        "machine": asdict(read_machine(torch.get_num_threads(), gpu)),
        "versions": dict(library_versions()),
        "source": options.source,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(tree, indent=2))
    return 0


def extractor_rows(request: Request) -> list[Row]:
    """Every single change of the way, against float32 as written."""
    rows = []
    for config in EXTRACTORS:
        form = static_form(create_extractor(config(), request.device).extractor)
        assert form is not None
        extractor = StaticExtractor(form, request.backend())
        start = ExtractorChoice()
        ways = [
            start,
            *(replace(start, precision=name) for name in form.precisions[1:]),
            *(replace(start, convolutions=name) for name in form.convolutions[1:]),
            *(replace(start, kernels=name) for name in form.kernels[1:]),
            *([replace(start, is_compiled=True)] if request.compiles else []),
        ]
        for width, height in SIZES:
            fitting = tuple(image for image in request.images if image.shape[:2] == (height, width))
            images = fitting or tuple(synthetic_images((height, width, 3)))
            reference: Found | None = None
            for way in ways if (width, height) == SIZES[0] else [way for way in ways if not way.is_compiled]:
                row, found = _extractor_row(extractor, way, images, reference, request)
                reference = reference or found
                rows.append(row)
    return rows


def _extractor_row(
    extractor: StaticExtractor, way: ExtractorChoice, images: Sequence[Image], reference: Found | None, request: Request
) -> tuple[Row, Found | None]:
    shape = images[0].shape
    row = Row(extractor.kind, f"{shape[1]}x{shape[0]}", extractor.form.capacity, _extractor_way(way), None)
    try:
        extractor.use(way)
        prepared = extractor.prepare(shape)
        ms = replay_ms(extractor, prepared.graph.replay, request)
        features = [extractor.extract(image) for image in images]
        found = Found(tuple(each.valid_keypoints() for each in features), ())
    except COMPILER_FAILURES as error:
        return replace(row, remark=_reason(error)), None
    share = None if reference is None else agreement(reference, found).keypoints
    return replace(row, ms=ms, keypoints=share), found


def matcher_rows(request: Request) -> list[Row]:
    """Precisions and compilation at every capacity; depths, which differ by the pair, at one."""
    rows = []
    for capacity in request.capacities:
        extractor = create_extractor(AlikedConfig(max_keypoints=capacity), request.device).extractor
        eager = create_matcher(LightGlueConfig(precision="float32"), extractor.kind, request.device).matcher
        form = static_form(extractor)
        assert form is not None and isinstance(eager, LightGlue)
        backend = request.backend()
        static = StaticExtractor(form, backend)
        matcher = StaticMatcher(eager, static.layout, backend)
        features = [static.extract(image) for image in request.images]
        reference = find_in(features, matcher.match)
        for precision in ("float32", "tf32", "bfloat16", "float16"):
            rows.append(_matcher_row(matcher, MatcherChoice(precision), features, reference, request))
        if request.compiles and capacity == DEPTH_CAPACITY:
            for precision in ("float32", "float16"):
                way = MatcherChoice(precision, is_compiled=True)
                rows.append(_matcher_row(matcher, way, features, reference, request))
        if capacity == DEPTH_CAPACITY:
            rows += _depth_rows(matcher, features, request)
    return rows


def _matcher_row(
    matcher: StaticMatcher, way: MatcherChoice, features: Sequence[Features], reference: Found, request: Request
) -> Row:
    name = way.precision + (", compiled" if way.is_compiled else "")
    row = Row(f"lightglue {matcher.eager.num_layers} layers", "", matcher.layout.capacity, name, None)
    start_s = time.perf_counter()
    try:
        network = create_static(matcher.eager, matcher.layout, way.precision)
        if way.is_compiled:
            compile_steps(network, 60.0)
        matcher.use(way, network)
        whole = matcher.prepare().whole
        assert whole is not None
        took_s = time.perf_counter() - start_s
        found = agreement(reference, find_in(features, matcher.match))
        remark = f"{took_s:.0f} s to compile and capture" if way.is_compiled else ""
        return replace(row, ms=replay_ms(matcher, whole.replay, request), matches=found.matches, remark=remark)
    except COMPILER_FAILURES as error:
        return replace(row, remark=_reason(error))


def _depth_rows(matcher: StaticMatcher, features: Sequence[Features], request: Request) -> list[Row]:
    rows = []
    ways = [MatcherChoice()]
    for layers in (1, 2, 3):
        ways += [MatcherChoice(depth="blocks", layers_per_block=layers)]
    ways += [MatcherChoice(depth="blocks", has_buckets=True), MatcherChoice(depth="speculative")]
    pairs = {"near": (features[0], features[1]), "wide": (features[0], features[-1])}
    for way in ways:
        matcher.use(way, create_static(matcher.eager, matcher.layout, way.precision))
        for distance, pair in pairs.items():
            stop_layer = matcher.match(*pair).stop_layer
            ms = typical_ms(lambda pair=pair: matcher.match(*pair), request.num_repeats)  # type: ignore[misc]
            name = f"{matcher.precision}, {distance} pair, call"
            remark = f"stops after {stop_layer} layers, {matcher.num_blocks_run} blocks"
            network = f"lightglue {matcher.eager.num_layers} layers"
            rows.append(Row(network, "", matcher.layout.capacity, name, ms, remark=remark))
    return rows


def replay_ms(owner: StaticExtractor | StaticMatcher, replay: Callable[[], None], request: Request) -> float:
    """Time of one replay among many that follow each other without a gap, ms; the smallest of three laps."""
    mark, laps = request.backend().mark(), []
    for _ in range(3):
        start_s = time.perf_counter()
        with owner.lane as lane:
            for _ in range(request.num_repeats):
                replay()
            lane.set(mark)
        mark.wait()
        laps.append(1000 * (time.perf_counter() - start_s) / request.num_repeats)
    return float(np.min(laps))


def _extractor_way(way: ExtractorChoice) -> str:
    parts = [way.precision, *([way.convolutions] if way.convolutions != "stored" else [])]
    parts += [way.kernels] if way.kernels != "torch" else []
    return ", ".join([*parts, *(["compiled"] if way.is_compiled else [])])


def _reason(error: BaseException) -> str:
    return f"does not run: {(str(error).splitlines() or [type(error).__name__])[0][:160]}"


if __name__ == "__main__":
    sys.exit(main())
