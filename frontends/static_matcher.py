"""LightGlue as graphs: all layers in one, or blocks of layers until the pair is done, in buffers as small as it needs.

A graph ends with the matches of the layer it has come to, so a block costs one launch, one copy and one wait: where the
first block settles a pair, as between neighbouring frames, nothing else happens. Which way is fastest is measured; the
matches are the same whichever is taken (`frontends.lightglue_static`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import Features, Matches
from frontends.device_faults import device_faults
from frontends.feature_pool import HEADER, RowLayout, lent_slot
from frontends.graphs import Backend, Graph, Lane, wait_for
from frontends.lightglue import LightGlue
from frontends.lightglue_static import RESULT_HEADER, LightGlueStatic, PairState, create_static
from frontends.static_form import arithmetic

BUCKETS = (3 / 4, 1 / 2)
"""Shares of the capacity that points are squeezed into as they get fewer, largest first."""
_BUCKET_STEP = 16  # points; kernels like round numbers


@dataclass(frozen=True, slots=True)
class MatcherChoice:
    """How the layers are run; the result does not depend on it, but for the precision.

    depth  "whole": one graph; "blocks": the next block once the flag of the last one has been read; "speculative": one
           block is launched ahead of the flag.
    """

    precision: str = "float32"
    depth: str = "whole"
    has_buckets: bool = False
    is_compiled: bool = False
    layers_per_block: int = 2


class PairMemory:
    """The two rows a matcher works on, on the device and pinned for features that come from elsewhere."""

    def __init__(self, layout: RowLayout, backend: Backend) -> None:
        self.rows = torch.zeros((2, layout.length), device=backend.device)
        self.staged = backend.pinned(2, layout.length)
        self.sent = backend.mark()

    def __repr__(self) -> str:
        return "the rows of a pair"


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """The graphs of one choice: whole, or by (block, bucket), and from one bucket to the next smaller one."""

    whole: Graph | None
    blocks: dict[tuple[int, int], Graph]
    squeezes: dict[tuple[int, int], Graph]
    results: tuple[Tensor, ...]


class StaticMatcher:
    """A LightGlue for features of one kind and capacity; any number of threads may call, one after the other runs.

    Features of another capacity, or with fewer than the engine's, are taken too: through the host, or by `eager`.
    """

    def __init__(self, eager: LightGlue, layout: RowLayout, backend: Backend) -> None:
        self.eager, self.layout = eager, layout
        self.choice = MatcherChoice()
        self.lane: Lane = backend.lane("match", is_urgent=True)
        self.num_blocks_run = 0
        self._backend = backend
        self._memory = PairMemory(layout, backend)
        self._network = create_static(eager, layout, self.choice.precision)
        self._captured: _Captured | None = None
        self._lock = threading.Lock()
        num_layers = eager.num_layers
        length = RESULT_HEADER + 2 * layout.capacity
        self._host = backend.pinned(num_layers, length)
        self._host_arrays: NDArray[np.float32] = self._host.numpy()
        self._done = [backend.mark() for _ in range(num_layers)]
        self._idle = backend.mark()

    @property
    def precision(self) -> str:
        """For the summary of a run and the tables of a benchmark."""
        choice = self.choice
        depth = "one graph" if choice.depth == "whole" else f"{choice.depth} of {choice.layers_per_block} layers"
        parts = [choice.precision, *(["compiled"] if choice.is_compiled else []), depth]
        return ", ".join([*parts, *(["buckets"] if choice.has_buckets else [])])

    def match(self, features0: Features, features1: Features) -> Matches:
        """Matches with their probabilities; empty if either side has no points.

        Raises WeightsError for features the weights were not made for, DeviceError where the device fails.
        """
        for features in (features0, features1):
            self.eager.check_fit(features.kind, features.descriptors.shape[1])
        if max(len(features0.scores), len(features1.scores)) > self.layout.capacity:
            return self.eager.match(features0, features1)
        with self._lock, device_faults():
            captured = self._captured or self.prepare()
            with self.lane:
                for number, features in enumerate((features0, features1)):
                    self._load(number, features)
                result = self._run_whole(captured) if captured.whole else self._run_blocks(captured)
            # The array is read before the lock is given back: the next pair overwrites it.
            return self._matches(result)

    def use(self, choice: MatcherChoice, network: LightGlueStatic | None = None) -> None:
        """Runs the layers another way from now on, with a network in the precision of the choice where it changes."""
        if choice == self.choice and network is None:
            return
        with self._lock:
            # A block that was launched ahead may still run, and its buffers must not be given away under it.
            wait_for(self.lane, self._idle)
            self.choice, self._captured = choice, None
            self._network = network or self._network

    def prepare(self) -> _Captured:
        """Captures the graphs of the choice, unless it has been done. Raises DeviceError."""
        if self._captured is None:
            with arithmetic(self.choice.precision):
                self._captured = self._capture_whole() if self.choice.depth == "whole" else self._capture_blocks()
        return self._captured

    # Capturing

    def _capture_whole(self) -> _Captured:
        network, rows = self._network, self._memory.rows
        result = self._empty_result()

        def run() -> None:
            pair = network.run_layers(network.begin(rows), range(network.rule.num_layers))
            result.copy_(network.result(pair))

        graph = self._backend.capture("match, whole", run, self.lane, (rows, result))
        return _Captured(graph, {}, {}, (result,))

    def _capture_blocks(self) -> _Captured:
        network, rows, spans = self._network, self._memory.rows, self._spans()
        sizes = self._sizes()
        pairs = [network.create_state(size) for size in sizes]
        results = tuple(self._empty_result() for _ in spans)
        blocks: dict[tuple[int, int], Graph] = {}
        squeezes: dict[tuple[int, int], Graph] = {}
        for block, layers in enumerate(spans):
            for bucket, pair in enumerate(pairs if block > 0 else pairs[:1]):
                name = f"match, layers {layers.start}-{layers.stop - 1} of {sizes[bucket]} points"
                function = self._block(pair, layers, results[block], rows if block == 0 else None)
                buffers = (*pair.tensors(), results[block], rows)
                blocks[block, bucket] = self._backend.capture(name, function, self.lane, buffers)
        for wide in range(len(pairs)):
            for narrow in range(wide + 1, len(pairs)):
                name = f"match, {sizes[wide]} points into {sizes[narrow]}"
                function = self._squeeze(pairs[wide], pairs[narrow], sizes[narrow])
                buffers = (*pairs[wide].tensors(), *pairs[narrow].tensors())
                squeezes[wide, narrow] = self._backend.capture(name, function, self.lane, buffers)
        return _Captured(None, blocks, squeezes, results)

    def _block(self, pair: PairState, layers: range, result: Tensor, rows: Tensor | None) -> Callable[[], None]:
        network = self._network

        def run() -> None:
            after = network.run_layers(pair if rows is None else network.begin(rows), layers)
            pair.copy_(after)
            result.copy_(network.result(after))

        return run

    def _squeeze(self, wide: PairState, narrow: PairState, size: int) -> Callable[[], None]:
        return lambda: narrow.copy_(self._network.squeezed(wide, size))

    def _spans(self) -> list[range]:
        step, count = self.choice.layers_per_block, self._network.rule.num_layers
        return [range(first, min(first + step, count)) for first in range(0, count, step)]

    def _sizes(self) -> list[int]:
        """Points that the buffers hold, largest first."""
        capacity = self.layout.capacity
        shares = BUCKETS if self.choice.has_buckets else ()
        rounded = [-(-int(capacity * share) // _BUCKET_STEP) * _BUCKET_STEP for share in shares]
        return sorted({capacity, *(size for size in rounded if size < capacity)}, reverse=True)

    def _empty_result(self) -> Tensor:
        return torch.zeros(RESULT_HEADER + 2 * self.layout.capacity, device=self._backend.device)

    # Running, inside the lock and on the lane

    def _load(self, number: int, features: Features) -> None:
        row = self._memory.rows[number]
        self.lane.writes(self._memory)
        slot = lent_slot(features)
        if slot is not None and slot.layout == self.layout:
            self.lane.after(slot.written)
            self.lane.reads(slot)
            row.copy_(slot.row)
            self.lane.set(slot.read)
        else:
            self._load_from_host(number, features)

    def _load_from_host(self, number: int, features: Features) -> None:
        """Features that another extractor made: packed on the host, which is slow, and sent."""
        self._memory.sent.wait()
        count, staged, layout = features.num_valid, self._memory.staged[number], self.layout
        staged.zero_()
        staged[:HEADER] = torch.tensor([count, *features.image_size, 0.0])
        layout.keypoints(staged)[:count] = features.keypoints[:count].cpu()
        layout.scores(staged)[:count] = features.scores[:count].cpu()
        layout.descriptors(staged)[:count] = features.descriptors[:count].cpu()
        self._memory.rows[number].copy_(staged, non_blocking=True)
        self.lane.set(self._memory.sent)

    def _run_whole(self, captured: _Captured) -> NDArray[np.float32]:
        assert captured.whole is not None
        self.num_blocks_run = 1
        captured.whole.replay()
        return self._fetched(0, captured.results[0], is_waiting=True)

    def _run_blocks(self, captured: _Captured) -> NDArray[np.float32]:
        num_blocks, bucket, launched = len(captured.results), 0, 0
        sizes, ahead = self._sizes(), 1 if self.choice.depth == "speculative" else 0
        for block in range(num_blocks):
            while launched <= min(block + ahead, num_blocks - 1):
                captured.blocks[launched, bucket].replay()
                self._fetched(launched, captured.results[launched])
                launched += 1
            result = self._fetched(block, captured.results[block], is_waiting=True, is_copying=False)
            if result[3] or block == num_blocks - 1:
                break
            smaller = fitting_bucket(sizes, int(result[1:3].max()), bucket)
            if smaller != bucket:
                captured.squeezes[bucket, smaller].replay()
                bucket = smaller
        self.num_blocks_run = launched
        return result

    def _fetched(
        self, number: int, result: Tensor, *, is_waiting: bool = False, is_copying: bool = True
    ) -> NDArray[np.float32]:
        if is_copying:
            self._host[number].copy_(result, non_blocking=True)
            self.lane.set(self._done[number])
        if is_waiting:
            self._done[number].wait()
        row: NDArray[np.float32] = self._host_arrays[number]
        return row

    def _matches(self, result: NDArray[np.float32]) -> Matches:
        partner, scores = result[RESULT_HEADER:].reshape(2, self.layout.capacity)
        rows = np.flatnonzero(partner >= 0)
        indices = np.stack((rows, partner[rows].astype(np.int64)), axis=1)
        found = scores[rows]
        if len(indices) and np.bincount(indices[:, 1]).max() > 1:
            # Two points of image 0 may tie exactly for one of image 1: the first has it.
            first = np.sort(np.unique(indices[:, 1], return_index=True)[1])
            indices, found = indices[first], found[first]
        stop_layer, num_kept0, num_kept1 = (int(number) for number in result[:3])
        return Matches(indices, found, stop_layer, num_kept0, num_kept1)


def fitting_bucket(sizes: Sequence[int], num_points: int, current: int) -> int:
    """The smallest of the sizes (largest first) with room for the points, not larger than the current one."""
    fitting = [bucket for bucket, size in enumerate(sizes) if size >= num_points and bucket >= current]
    return fitting[-1] if fitting else current
