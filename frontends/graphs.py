"""Lanes, marks and graphs: what the engine needs of a GPU, and the same without one.

A *lane* is a CUDA stream, a *mark* an event on it, a *graph* a function over fixed buffers that is captured once and
replayed. `EmulatedBackend` runs the same calls on any device, one after the other, and checks what only a GPU would
punish: a captured function that looks at a value on the host or makes a tensor of host data, buffers that have moved,
and a lane that touches memory another lane may still be using.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frontends.device_faults import device_faults

WARM_UP_CALLS = 3
"""Calls before a capture: libraries choose their algorithms, compilers compile, allocators get their memory."""


class GraphError(RuntimeError):
    """A mistake in our own code that a capture, or another order of events on a GPU, would bring to light."""


class Mark(Protocol):
    """A place in the work of a lane; it can be set anew, and whoever waited before is not concerned."""

    def wait(self) -> None:
        """The calling thread waits until the lane has come there. Raises DeviceError where the device has failed."""
        ...

    def is_done(self) -> bool: ...


class Lane(Protocol):
    """Work of the device in order, beside that of other lanes. `with lane:` sends what follows to it."""

    def __enter__(self) -> Lane: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def set(self, mark: Mark) -> None:
        """The mark now stands for everything sent so far."""
        ...

    def after(self, mark: Mark) -> None:
        """What is sent from now on waits for the mark, on the device."""
        ...

    def reads(self, *memory: object) -> None:
        """Says what the work sent next reads; only checked where lanes are emulated."""
        ...

    def writes(self, *memory: object) -> None: ...


class Graph(Protocol):
    """A captured function."""

    def replay(self) -> None:
        """Sends the work of the function to the lane that is current; the buffers are where they were."""
        ...


class Backend(Protocol):
    """What makes lanes, marks, graphs and pinned memory on one device."""

    @property
    def device(self) -> torch.device: ...

    def lane(self, name: str, *, is_urgent: bool = False) -> Lane: ...

    def mark(self) -> Mark: ...

    def pinned(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros in memory of the host that the device can read and write by itself."""
        ...

    def capture(self, name: str, function: Callable[[], None], lane: Lane, buffers: Sequence[Tensor]) -> Graph:
        """Captures a function that reads and writes `buffers` and nothing else that lives on.

        Called once per graph, in the warm-up. Raises DeviceError where the device has no memory left.
        """
        ...


def wait_for(lane: Lane, mark: Mark) -> None:
    """The calling thread waits until the lane has done everything sent so far; the mark is one to spare."""
    lane.set(mark)
    mark.wait()


# CUDA


class CudaMark:
    """An event. Waiting spins without Python's lock: a sleeping wait would wake up tens of microseconds late."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        with device_faults():
            self.event.synchronize()

    def is_done(self) -> bool:
        with device_faults():
            return bool(self.event.query())  # type: ignore[no-untyped-call]


class CudaLane:
    """A stream. It may be current in one thread at a time; PyTorch keeps the current stream per thread."""

    def __init__(self, device: torch.device, is_urgent: bool) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1 if is_urgent else 0)  # type: ignore[no-untyped-call]
        self._current: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> Lane:
        context = torch.cuda.stream(self.stream)
        context.__enter__()  # type: ignore[no-untyped-call]
        self._current.append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current.pop().__exit__(kind, error, trace)

    def set(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        mark.event.record(self.stream)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self.stream.wait_event(mark.event)

    def reads(self, *memory: object) -> None:
        """Nothing to do: marks order the lanes."""

    def writes(self, *memory: object) -> None:
        """Nothing to do: marks order the lanes."""


class CudaGraphReplay:
    """A captured CUDA graph, and all memory whose addresses are in it: the buffers, and what the function holds.

    Weights and tables that only the function knows would be given to somebody else once it is gone.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, function: Callable[[], None], buffers: Sequence[Tensor]) -> None:
        self._graph = graph
        self._function = function
        self._buffers = tuple(buffers)

    def replay(self) -> None:
        self._graph.replay()


class CudaBackend:
    """Streams, events and CUDA graphs of one device.

    Graphs that are captured on one lane share a pool of memory for what they need in between, and nothing that lives
    on is in there: they are replayed one after the other, on that lane only, in any order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: dict[int, Any] = {}
        self._keepers: list[object] = []

    @property
    def device(self) -> torch.device:
        return self._device

    def lane(self, name: str, *, is_urgent: bool = False) -> Lane:
        return CudaLane(self._device, is_urgent)

    def mark(self) -> Mark:
        return CudaMark()

    def pinned(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def capture(self, name: str, function: Callable[[], None], lane: Lane, buffers: Sequence[Tensor]) -> Graph:
        assert isinstance(lane, CudaLane)
        with device_faults(), torch.cuda.device(self._device), torch.no_grad():
            # Work of the stream that made the buffers has to be over before another stream uses them.
            torch.cuda.synchronize(self._device)
            with lane:
                for _ in range(WARM_UP_CALLS):
                    function()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            pool = self._pool(lane)
            # Other threads may use CUDA meanwhile (an image of a new shape in the middle of a run): only what this
            # thread does may break its capture.
            with torch.cuda.graph(graph, pool=pool, stream=lane.stream, capture_error_mode="thread_local"):
                function()
            torch.cuda.synchronize(self._device)
        return CudaGraphReplay(graph, function, buffers)

    def _pool(self, lane: CudaLane) -> Any:
        """The pool of a lane; made with a graph that is never replayed and outlives all others.

        A pool whose last graph is gone must not be captured into again, and ways that are tried and dropped would come
        to that.
        """
        if id(lane) not in self._pools:
            self._pools[id(lane)] = torch.cuda.graph_pool_handle()
            self._keepers.append(self._keeper(self._pools[id(lane)], lane))
        return self._pools[id(lane)]

    def _keeper(self, pool: Any, lane: CudaLane) -> object:
        scrap, graph = torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph, pool=pool, stream=lane.stream, capture_error_mode="thread_local"):
            scrap.zero_()
        return graph, scrap, lane


# Emulation


class _Knowledge(threading.local):
    """What the calling thread has waited for: everything it sends later is after that."""

    def __init__(self) -> None:
        self.clock: dict[int, int] = {}


class EmulatedMark:
    """Remembers how far every lane had come, as far as the lane that set it knew (a vector clock)."""

    def __init__(self, host: _Knowledge) -> None:
        self._host = host
        self.clock: dict[int, int] = {}

    def wait(self) -> None:
        _merge(self._host.clock, self.clock)

    def is_done(self) -> bool:
        return True


class _Access:
    """Who wrote a memory last, and who has read it since: (lane, its time)."""

    def __init__(self, memory: object) -> None:
        self.memory = memory  # kept, so that its id is not given to another
        self.write: tuple[int, int] | None = None
        self.reads: dict[int, int] = {}


class EmulatedLane:
    """Runs at once what it is sent, and checks by vector clocks that a real lane could not have run it too early."""

    def __init__(self, name: str, backend: EmulatedBackend) -> None:
        self.name = name
        self._backend = backend
        self._clock: dict[int, int] = {}

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def set(self, mark: Mark) -> None:
        assert isinstance(mark, EmulatedMark)
        self._tick()
        mark.clock = dict(self._clock)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, EmulatedMark)
        _merge(self._clock, mark.clock)

    def reads(self, *memory: object) -> None:
        now = self._tick()
        for item in memory:
            access = self._backend.access(item)
            self._check("reads", access, [access.write] if access.write else [])
            access.reads[id(self)] = now

    def writes(self, *memory: object) -> None:
        now = self._tick()
        for item in memory:
            access = self._backend.access(item)
            self._check("writes", access, [*access.reads.items(), *([access.write] if access.write else [])])
            access.write, access.reads = (id(self), now), {}

    def _tick(self) -> int:
        _merge(self._clock, self._backend.host.clock)
        self._clock[id(self)] = self._clock.get(id(self), 0) + 1
        return self._clock[id(self)]

    def _check(self, verb: str, access: _Access, earlier: Sequence[tuple[int, int]]) -> None:
        for lane, time in earlier:
            if lane != id(self) and self._clock.get(lane, 0) < time:
                raise GraphError(f"lane {self.name} {verb} {access.memory!r} while another lane may still use it")


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for lane, time in other.items():
        clock[lane] = max(clock.get(lane, 0), time)


class EmulatedGraph:
    """Calls the function again, over the same buffers."""

    def __init__(self, name: str, function: Callable[[], None], buffers: Sequence[Tensor], is_checked: bool) -> None:
        self.name = name
        self._function = function
        self._buffers = tuple(buffers)
        self._signature = [_signature(buffer) for buffer in self._buffers]
        self._is_checked = is_checked

    def replay(self) -> None:
        if [_signature(buffer) for buffer in self._buffers] != self._signature:
            raise GraphError(f"graph {self.name}: a buffer has moved or changed its shape since the capture")
        with NoHostAccess(self.name) if self._is_checked else nullcontext(), torch.no_grad():
            result: object = self._function()
        if result is not None:
            raise GraphError(f"graph {self.name}: the function returns a value; results belong into buffers")


def _signature(buffer: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    return buffer.data_ptr(), buffer.shape, buffer.stride(), buffer.dtype


class EmulatedBackend:
    """The same calls without CUDA. `is_checked` is False where compiled functions run, which allow no looking on."""

    def __init__(self, device: torch.device, is_checked: bool = True) -> None:
        self._device = device
        self._is_checked = is_checked
        self._accesses: dict[int, _Access] = {}
        self.host = _Knowledge()
        self.captured: list[str] = []

    @property
    def device(self) -> torch.device:
        return self._device

    def lane(self, name: str, *, is_urgent: bool = False) -> Lane:
        return EmulatedLane(name, self)

    def mark(self) -> Mark:
        return EmulatedMark(self.host)

    def pinned(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def capture(self, name: str, function: Callable[[], None], lane: Lane, buffers: Sequence[Tensor]) -> Graph:
        graph = EmulatedGraph(name, function, buffers, self._is_checked)
        graph.replay()
        self.captured.append(name)
        return graph

    def access(self, memory: object) -> _Access:
        return self._accesses.setdefault(id(memory), _Access(memory))


_HOST_ACCESS = {
    "_local_scalar_dense": "reads a value on the host",
    "item": "reads a value on the host",
    "is_nonzero": "reads a value on the host",
    "equal": "reads a value on the host",
    "nonzero": "makes a shape that depends on values",
    "masked_select": "makes a shape that depends on values",
    "unique_dim": "makes a shape that depends on values",
    "_unique2": "makes a shape that depends on values",
    "unique_consecutive": "makes a shape that depends on values",
    "bincount": "makes a shape that depends on values",
    "lift_fresh": "makes a tensor of host data",
}


class NoHostAccess(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises GraphError at the first operation that a CUDA graph could not hold."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func._schema.name.removeprefix("aten::")
        reason = _HOST_ACCESS.get(operation)
        if operation in ("index", "index_put", "index_put_") and any(_is_mask(index) for index in args[1]):
            reason = "makes a shape that depends on values (a mask as an index)"
        if operation == "repeat_interleave" and isinstance(args[0], Tensor) and func._overloadname == "Tensor":
            reason = "makes a shape that depends on values"
        if reason is not None:
            raise GraphError(f"graph {self._name}: {operation} {reason}")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
