"""Lanes, marks and graphs: what the emulation notices, and how the real ones call CUDA."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from frontends import graphs
from frontends.base import DeviceError
from frontends.device_faults import device_faults
from frontends.graphs import CudaBackend, EmulatedBackend, GraphError

CPU = torch.device("cpu")


def captured(function: Callable[[], None], *buffers: torch.Tensor) -> graphs.Graph:
    backend = EmulatedBackend(CPU)
    return backend.capture("tested", function, backend.lane("lane"), buffers)


def test_a_replay_computes_anew_from_the_buffers():
    given, made = torch.zeros(3), torch.zeros(3)

    def function() -> None:
        made.copy_(given + 1)

    graph = captured(function, given, made)
    given.fill_(4)
    graph.replay()
    assert made.tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("forbidden", "reason"),
    [
        (lambda x: x.sum().item(), "reads a value"),
        (lambda x: bool((x > 0).any()), "reads a value"),
        (lambda x: x.nonzero(), "depends on values"),
        (lambda x: x[x > 0], "depends on values"),
        (lambda x: x.masked_select(x > 0), "depends on values"),
        (lambda x: torch.unique(x), "depends on values"),
        (lambda x: torch.repeat_interleave(torch.ones(4, dtype=torch.int64)), "depends on values"),
        (lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]), "host data"),
        (lambda x: x + torch.tensor([1.0]), "host data"),
        (lambda x: x.__setitem__(x > 0, 1.0), "host data|depends on values"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(forbidden: Callable[[torch.Tensor], object], reason: str):
    values = torch.ones(4)

    def function() -> None:
        forbidden(values)

    with pytest.raises(GraphError, match=reason):
        captured(function, values)


def test_a_buffer_that_moves_is_noticed():
    buffer = torch.zeros(3)
    graph = captured(lambda: None, buffer)
    buffer.resize_(1000)
    with pytest.raises(GraphError, match="moved or changed its shape"):
        graph.replay()


def test_a_function_that_returns_its_result_is_noticed():
    with pytest.raises(GraphError, match="returns a value"):
        captured(lambda: torch.zeros(3))  # type: ignore[arg-type, return-value]


# Who may touch what, and when


def test_a_reader_on_another_lane_has_to_wait_for_the_writer():
    backend = EmulatedBackend(CPU)
    writer, reader, memory = backend.lane("writer"), backend.lane("reader"), object()
    writer.writes(memory)
    with pytest.raises(GraphError, match="lane reader reads"):
        reader.reads(memory)
    mark = backend.mark()
    writer.set(mark)
    reader.after(mark)
    reader.reads(memory)


def test_a_writer_has_to_wait_for_all_readers():
    backend = EmulatedBackend(CPU)
    first, second, third, memory = backend.lane("first"), backend.lane("second"), backend.lane("third"), object()
    done = [backend.mark(), backend.mark()]
    for lane, mark in zip((first, second), done, strict=True):
        lane.reads(memory)
        lane.set(mark)
    third.after(done[0])
    with pytest.raises(GraphError, match="lane third writes"):
        third.writes(memory)
    third.after(done[1])
    third.writes(memory)


def test_a_mark_that_was_set_too_early_orders_nothing():
    backend = EmulatedBackend(CPU)
    writer, reader, memory, mark = backend.lane("writer"), backend.lane("reader"), object(), backend.mark()
    writer.set(mark)
    writer.writes(memory)
    reader.after(mark)
    with pytest.raises(GraphError):
        reader.reads(memory)


def test_what_the_host_has_waited_for_is_over():
    backend = EmulatedBackend(CPU)
    writer, reader, memory, mark = backend.lane("writer"), backend.lane("reader"), object(), backend.mark()
    writer.writes(memory)
    writer.set(mark)
    mark.wait()
    reader.reads(memory)


def test_order_passes_through_a_lane_in_between():
    backend = EmulatedBackend(CPU)
    first, middle, last, memory = backend.lane("first"), backend.lane("middle"), backend.lane("last"), object()
    marks = backend.mark(), backend.mark()
    first.writes(memory)
    first.set(marks[0])
    middle.after(marks[0])
    middle.set(marks[1])
    last.after(marks[1])
    last.reads(memory)


# The real ones, against a CUDA that only writes down what it is asked for


class RecordedCuda:
    """Stands in for the parts of torch.cuda that the backend calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_in: str = "") -> None:
        self.calls: list[str] = []
        self.fails_in = fails_in
        for name in ("Stream", "Event", "graph", "stream", "device", "CUDAGraph", "graph_pool_handle", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call.startswith(self.fails_in) and self.fails_in:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    def _context(self, name: str) -> Any:
        outer = self

        class Context:
            def __enter__(self) -> None:
                outer._note(f"{name} enter")

            def __exit__(self, *_: object) -> None:
                outer._note(f"{name} exit")

        return Context()

    def _Stream(self, device: torch.device, priority: int = 0) -> Any:
        outer = self

        class Stream:
            def wait_event(self, event: Any) -> None:
                outer._note("wait_event")

        return Stream()

    def _Event(self) -> Any:
        outer = self

        class Event:
            def record(self, stream: Any) -> None:
                outer._note("record")

            def synchronize(self) -> None:
                outer._note("event synchronize")

            def query(self) -> bool:
                return True

        return Event()

    def _CUDAGraph(self) -> Any:
        outer = self

        class Graph:
            def replay(self) -> None:
                outer._note("replay")

        return Graph()

    def _graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        self._note(f"capture pool={pool} {capture_error_mode}")
        return self._context("graph")

    def _stream(self, stream: Any) -> Any:
        return self._context("stream")

    def _device(self, device: torch.device) -> Any:
        return self._context("device")

    def _graph_pool_handle(self) -> str:
        return "pool"

    def _synchronize(self, device: torch.device | None = None) -> None:
        self._note("synchronize")


def test_a_capture_warms_up_on_its_stream_first(monkeypatch: pytest.MonkeyPatch):
    cuda = RecordedCuda(monkeypatch)
    backend = CudaBackend(torch.device("cuda", 0))
    monkeypatch.setattr(backend, "_keeper", lambda pool, lane: cuda.calls.append(f"keep {pool}"))
    lane = backend.lane("lane")
    graph = backend.capture("tested", lambda: cuda.calls.append("work"), lane, ())
    assert cuda.calls == [
        "device enter",
        "synchronize",
        "stream enter",
        *["work"] * graphs.WARM_UP_CALLS,
        "stream exit",
        "synchronize",
        "keep pool",
        "capture pool=pool thread_local",
        "graph enter",
        "work",
        "graph exit",
        "synchronize",
        "device exit",
    ]
    cuda.calls.clear()
    backend.capture("another", lambda: None, lane, ())
    assert "keep pool" not in cuda.calls and "capture pool=pool thread_local" in cuda.calls
    cuda.calls.clear()
    with lane:
        graph.replay()
    assert cuda.calls == ["stream enter", "replay", "stream exit"]


def test_what_only_the_captured_function_knows_outlives_it(monkeypatch: pytest.MonkeyPatch):
    """A replay reads the tables whose addresses were captured, long after the function that made them is gone."""
    RecordedCuda(monkeypatch)
    backend = CudaBackend(torch.device("cuda", 0))
    monkeypatch.setattr(backend, "_keeper", lambda pool, lane: None)

    def program() -> Callable[[], None]:
        table = torch.ones(3)
        tables.append(weakref.ref(table))

        def run() -> None:
            table.add_(1)

        return run

    tables: list[weakref.ref[torch.Tensor]] = []
    graph = backend.capture("tested", program(), backend.lane("lane"), ())
    gc.collect()
    assert tables[0]() is not None
    del graph
    gc.collect()
    assert tables[0]() is None


def test_marks_are_events_on_the_stream(monkeypatch: pytest.MonkeyPatch):
    cuda = RecordedCuda(monkeypatch)
    backend = CudaBackend(torch.device("cuda", 0))
    first, second, mark = backend.lane("first"), backend.lane("second"), backend.mark()
    first.set(mark)
    second.after(mark)
    mark.wait()
    assert cuda.calls == ["record", "wait_event", "event synchronize"] and mark.is_done()


def test_a_device_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch):
    RecordedCuda(monkeypatch, fails_in="event synchronize")
    mark = CudaBackend(torch.device("cuda", 0)).mark()
    with pytest.raises(DeviceError, match=r"the GPU failed \(CUDA error: an illegal.*--device cpu$") as caught:
        mark.wait()
    assert "\n" not in str(caught.value)


def test_other_errors_keep_their_traceback():
    with pytest.raises(DeviceError, match="out of memory"), device_faults():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    with pytest.raises(RuntimeError, match="shapes"), device_faults():
        raise RuntimeError("shapes do not agree")
