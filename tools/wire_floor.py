"""What plain sockets take from here to there: the part of the wire's latency that is the machine's own.

As many bytes as a pose and its tracks have on the wire go by TCP to consumers in processes of their own, at the same
rate and after the same stand-in for tracking. Nothing is encoded, kept, asked for or decoded: a consumer waits for the
bytes and notes how old they are. tools/measure_wire.py measures this before and after what it is about, so that both
can be told apart. Started as a program this is such a consumer: PORT SIZES, as `measure_floor` starts it.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

# As `vo run` sets it for itself: OpenBLAS' threads spin where they wait, and would take the consumers' processor.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

_TIME = struct.Struct("<q")

Ages = dict[str, list[float]]


def stand_in() -> Callable[[], object]:
    """Some milliseconds of work as tracking does it: a least-squares problem."""
    problem = np.random.default_rng(1).normal(size=(1200, 60))
    return lambda: np.linalg.lstsq(problem, problem[:, 0], rcond=None)


def measure_floor(
    seconds: float, rate_hz: float, sizes: Mapping[str, int], num_consumers: int, work: Callable[[], object]
) -> Ages:
    """Ages in ms of all messages of every consumer, by name; `sizes` in bytes, in the order in which they go out."""
    num_frames = round(seconds * rate_hz)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60.0)
        command = [sys.executable, __file__, str(server.getsockname()[1]), json.dumps(dict(sizes))]
        consumers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(num_consumers)]
        try:
            connections = [server.accept()[0] for _ in consumers]
            _send_frames(connections, num_frames, rate_hz, sizes, work)
            reports = [json.loads(consumer.communicate(timeout=60)[0]) for consumer in consumers]
        finally:
            for consumer in consumers:
                consumer.kill()
                consumer.wait()
    return {name: [age for report in reports for age in report[name]] for name in sizes}


def _send_frames(
    connections: Sequence[socket.socket],
    num_frames: int,
    rate_hz: float,
    sizes: Mapping[str, int],
    work: Callable[[], object],
) -> None:
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    start_s = time.monotonic()
    for index in range(num_frames):
        time.sleep(max(0.0, start_s + index / rate_hz - time.monotonic()))
        work()
        for size in sizes.values():
            message = _TIME.pack(time.time_ns()).ljust(size, b"\0")
            for connection in connections:
                connection.sendall(message)
    for connection in connections:
        connection.close()


def receive(port: int, sizes: Mapping[str, int]) -> Ages:
    """A consumer: ages in ms of what comes until the other side closes."""
    ages: Ages = {name: [] for name in sizes}
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as stream:
        while True:
            for name, size in sizes.items():
                message = stream.read(size)
                if len(message) < size:
                    return ages
                ages[name].append((time.time_ns() - _TIME.unpack_from(message)[0]) * 1e-6)


def percentiles(values: np.ndarray | Sequence[float]) -> dict[str, float]:
    p50, p99, top = np.percentile(values, (50, 99, 100))
    return {"p50": float(p50), "p99": float(p99), "max": float(top)}


if __name__ == "__main__":
    print(json.dumps(receive(int(sys.argv[1]), json.loads(sys.argv[2]))))
