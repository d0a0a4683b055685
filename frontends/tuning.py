"""Which way of running the networks is the fastest on this device: measured at the start, and said.

Nothing here knows a GPU: ways are tried, timed by the clock on the wall as their callers will feel it, held to the
accuracy gate where they compute otherwise, and the fastest stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from frontends.accuracy_gate import Agreement, Found, Image, agreement, find_in
from frontends.base import Features, Matcher
from frontends.compiled_before import keep_compiled_code, note_compiled, was_compiled
from frontends.device_faults import device_faults
from frontends.lightglue_static import LightGlueStatic, advance, assign, create_static
from frontends.static_extractor import StaticExtractor
from frontends.static_form import ExtractorChoice
from frontends.static_matcher import MatcherChoice, StaticMatcher

MIN_KERNEL_GAIN = 1.3
"""Own kernels are more to maintain than PyTorch's: they have to be that much faster."""
MIN_GAIN = 1.02
"""What is faster by less than that is as fast: the simpler way stays."""

NOT_COMPILED = (
    "left out, as it would hold up this start by half a minute; `vo bench` or frontend.engine.compile=matcher does it "
    "once, and later starts take it from the cache"
)

# A compiler fails in many ways (no C++ compiler, no Triton, a bug), and is never needed.
COMPILER_FAILURES = (RuntimeError, ImportError, OSError, AttributeError, TypeError, ValueError, AssertionError)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """What is tried; a tuple of one name leaves nothing to try. `num_repeats` calls are timed per way, after three.

    only_from_cache  compiles only what an earlier start has compiled, which takes a fraction of the time.
    """

    precisions: tuple[str, ...]
    kernels: tuple[str, ...] = ("torch",)
    convolutions: tuple[str, ...] = ("stored",)
    depths: tuple[str, ...] = ("whole",)
    widths: tuple[str, ...] = ("full",)
    compiles: bool = False
    compile_budget_s: float = 20.0
    only_from_cache: bool = False
    layers_per_block: int = 2
    num_repeats: int = 30


@dataclass(frozen=True, slots=True)
class Trial:
    """One way, its time, and its agreement with float32 where it computes otherwise."""

    name: str
    ms: float
    agreement: Agreement | None = None

    @property
    def passes(self) -> bool:
        return self.agreement is None or self.agreement.passes

    def __str__(self) -> str:
        verdict = "" if self.agreement is None or self.agreement.passes else f", refused: {self.agreement}"
        return f"{self.name} {self.ms:.2f} ms{verdict}"


def synthetic_images(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> list[Image]:
    """Images of a textured plane that moves by a few px from one to the next, where nobody has real ones."""
    generator = np.random.default_rng(seed)
    margin, (height, width) = 8 * count, shape[:2]
    plane = np.zeros((height + margin, width + margin), np.float32)
    for cell in (4, 12, 40):
        noise = generator.uniform(0, 85, (plane.shape[0] // cell + 2, plane.shape[1] // cell + 2)).astype(np.float32)
        plane += _enlarged(noise, cell)[: plane.shape[0], : plane.shape[1]]
    images = []
    for number in range(count):
        view = plane[3 * number : 3 * number + height, 7 * number : 7 * number + width]
        gray = np.clip(view + generator.normal(0, 2, view.shape), 0, 255).astype(np.uint8)
        images.append(gray if len(shape) == 2 else np.repeat(gray[:, :, None], shape[2], axis=2))
    return images


def _enlarged(noise: NDArray[np.float32], cell: int) -> NDArray[np.float32]:
    """Linear interpolation to `cell` times the size: edges in all directions, corners at the cells."""
    rows = np.arange(cell * (noise.shape[0] - 1)) / cell
    columns = np.arange(cell * (noise.shape[1] - 1)) / cell
    top, left = rows.astype(int), columns.astype(int)
    y, x = (rows - top)[:, None], (columns - left)[None]
    upper = noise[top][:, left] * (1 - x) + noise[top][:, left + 1] * x
    lower = noise[top + 1][:, left] * (1 - x) + noise[top + 1][:, left + 1] * x
    enlarged: NDArray[np.float32] = (upper * (1 - y) + lower * y).astype(np.float32)
    return enlarged


def typical_ms(call: Callable[[], object], num_repeats: int, clock: Clock = time.perf_counter) -> float:
    """Median time of a call, ms, after three that do not count."""
    for _ in range(3):
        call()
    times = []
    for _ in range(num_repeats):
        start_s = clock()
        call()
        times.append(clock() - start_s)
    return 1000 * median(times)


def fastest(trials: Sequence[Trial], min_gain: float = MIN_GAIN) -> Trial:
    """The fastest that passes; a later one takes the place of an earlier one only where it gains as much as said."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.passes and trial.ms * min_gain < best.ms:
            best = trial
    return best


def tune_extractor(
    extractor: StaticExtractor,
    matcher: Matcher,
    images: Sequence[Image],
    options: TuningOptions,
    clock: Clock = time.perf_counter,
) -> list[str]:
    """Chooses precision, convolutions, kernels and compilation of an extractor; one sentence per choice."""
    sentences = []
    start = ExtractorChoice(options.precisions[0], options.kernels[0], options.convolutions[0])
    reference = _found(extractor, matcher, images, start)

    def trial(name: str, choice: ExtractorChoice, is_same: bool) -> Trial:
        found = reference if is_same else _found(extractor, matcher, images, choice)
        extractor.use(choice)
        ms = typical_ms(lambda: extractor.extract(images[0]).num_valid, options.num_repeats, clock)
        return Trial(name, ms, None if is_same else agreement(reference, found))

    best = start
    fields = (("precision", options.precisions), ("convolutions", options.convolutions), ("kernels", options.kernels))
    for field, names in fields:
        if len(names) > 1:
            changes: dict[str, dict[str, Any]] = {name: {field: name} for name in names}
            choices = {name: replace(best, **change) for name, change in changes.items()}
            trials = [trial(name, choice, choice == start) for name, choice in choices.items()]
            chosen = fastest(trials, MIN_KERNEL_GAIN if field == "kernels" else MIN_GAIN)
            best = choices[chosen.name]
            sentences.append(_sentence(f"{extractor.kind} {field}", trials, chosen))
    if options.compiles:
        plain = trial("as written", best, best == start)
        try:
            trials = [plain, trial("compiled", replace(best, is_compiled=True), False)]
        except COMPILER_FAILURES as error:
            sentences.append(f"{extractor.kind} compilation: {_failure(error)}, runs as written")
        else:
            best = replace(best, is_compiled=fastest(trials).name == "compiled")
            sentences.append(_sentence(f"{extractor.kind} compilation", trials, fastest(trials)))
    extractor.use(best)
    return sentences


def _found(extractor: StaticExtractor, matcher: Matcher, images: Sequence[Image], choice: ExtractorChoice) -> Found:
    extractor.use(choice)
    return find_in([extractor.extract(image) for image in images], matcher.match)


def tune_matcher(
    matcher: StaticMatcher,
    features: Sequence[Features],
    options: TuningOptions,
    clock: Clock = time.perf_counter,
) -> list[str]:
    """Chooses precision, compilation, depth and width of a matcher on consecutive features; one sentence per choice."""
    sentences = []
    pair = features[-2], features[-1]

    def trial(name: str, choice: MatcherChoice, network: LightGlueStatic, reference: Found | None) -> Trial:
        matcher.use(choice, network)
        found = None if reference is None else agreement(reference, find_in(features, matcher.match))
        return Trial(name, typical_ms(lambda: matcher.match(*pair), options.num_repeats, clock), found)

    best = MatcherChoice(options.precisions[0], options.depths[0], options.widths[0] == "buckets")
    best = replace(best, layers_per_block=options.layers_per_block)
    network = create_static(matcher.eager, matcher.layout, best.precision)
    matcher.use(best, network)
    reference = find_in(features, matcher.match)
    if len(options.precisions) > 1:
        networks = {name: create_static(matcher.eager, matcher.layout, name) for name in options.precisions}
        trials = [
            trial(name, replace(best, precision=name), made, None if name == best.precision else reference)
            for name, made in networks.items()
        ]
        chosen = fastest(trials)
        best, network = replace(best, precision=chosen.name), networks[chosen.name]
        sentences.append(_sentence("lightglue precision", trials, chosen))
    if options.compiles:
        best, network, sentence = _compiled_or_not(matcher, best, network, trial, reference, options, clock)
        sentences.append(sentence)
    # Every size of the buckets would be compiled anew, and between neighbouring frames none is needed.
    widths = options.widths[:1] if best.is_compiled else options.widths
    ways = {
        _way_name(depth, width): replace(best, depth=depth, has_buckets=width == "buckets")
        for depth in options.depths
        for width in (widths if depth != "whole" else ("full",))
    }
    if len(ways) > 1:
        trials = [trial(name, choice, network, None) for name, choice in ways.items()]
        chosen = fastest(trials)
        best = ways[chosen.name]
        sentences.append(_sentence("lightglue depth", trials, chosen))
    matcher.use(best, network)
    matcher.prepare()
    return sentences


def _compiled_or_not(
    matcher: StaticMatcher,
    choice: MatcherChoice,
    network: LightGlueStatic,
    trial: Callable[[str, MatcherChoice, LightGlueStatic, Found | None], Trial],
    reference: Found,
    options: TuningOptions,
    clock: Clock,
) -> tuple[MatcherChoice, LightGlueStatic, str]:
    """One compiled layer serves all of them; where it takes longer than the budget, it is not waited for again."""
    what = (matcher.layout, matcher.eager.num_layers, choice.precision)
    if options.only_from_cache and not was_compiled(*what):
        return choice, network, f"lightglue compilation: {NOT_COMPILED}, runs as written"
    compiled = create_static(matcher.eager, matcher.layout, choice.precision)
    plain = trial("as written", choice, network, None)
    start_s = clock()
    try:
        with device_faults():
            compile_steps(compiled, options.compile_budget_s, clock)
        tried = trial("compiled", replace(choice, is_compiled=True), compiled, reference)
    except COMPILER_FAILURES as error:
        matcher.use(choice, network)
        return choice, network, f"lightglue compilation: {_failure(error)}, runs as written"
    took_s = clock() - start_s
    note_compiled(*what, took_s=took_s)
    chosen = fastest([plain, tried])
    sentence = f"{_sentence('lightglue compilation', [plain, tried], chosen)}, {took_s:.1f} s to compile"
    if chosen is tried:
        return replace(choice, is_compiled=True), compiled, sentence
    return choice, network, sentence


def compile_steps(network: LightGlueStatic, budget_s: float, clock: Clock = time.perf_counter) -> None:
    """Compiles what a layer does, and the assignment after it as long as the time allows."""
    start_s = clock()
    keep_compiled_code()
    network.advance = torch.compile(advance, dynamic=False, fullgraph=True)
    rows = torch.zeros((2, network.layout.length), device=network.device)
    network.layout.header(rows)[:, :3] = torch.tensor([1.0, 640.0, 480.0], device=network.device)
    with torch.no_grad():
        pair = network.run_layers(network.begin(rows), (0,))
        if clock() - start_s < budget_s:
            network.assign = torch.compile(assign, dynamic=False, fullgraph=True)
            network.result(pair)


def _failure(error: BaseException) -> str:
    reason = (str(error).splitlines() or [""])[0][:160]
    return f"failed ({type(error).__name__}: {reason})"


def _way_name(depth: str, width: str) -> str:
    return f"{depth}, {width}" if width != "full" else depth


def _sentence(what: str, trials: Sequence[Trial], chosen: Trial) -> str:
    return f"{what}: {chosen.name} ({'; '.join(str(trial) for trial in trials)})"
