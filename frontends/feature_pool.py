"""Memory of the device for features, lent to one image at a time and taken back when nobody holds it any more.

A slot is one row of float32 numbers, so that a frame crosses to the host in one copy and to the matcher in another:

    count, width, height, 0 | keypoints (K, 2) | scores (K,) | padding | descriptors (K, D)

What stands before the descriptors is what the host wants; a count is exact in float32 up to 2^24.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import Features
from frontends.device_faults import device_faults
from frontends.graphs import Backend, Lane, Mark

HEADER = 4
_ALIGNMENT = 4  # numbers: vectors of 16 bytes
_SLOTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where things stand in a row for K keypoints with D-dimensional descriptors, counted in numbers."""

    capacity: int
    descriptor_dim: int

    @property
    def host_length(self) -> int:
        """Of the part that the host wants."""
        return -(-(HEADER + 3 * self.capacity) // _ALIGNMENT) * _ALIGNMENT

    @property
    def length(self) -> int:
        return self.host_length + self.capacity * self.descriptor_dim

    def header(self, rows: Tensor) -> Tensor:
        """(..., 4): count, width and height of the image in px, 0."""
        return rows[..., :HEADER]

    def keypoints(self, rows: Tensor) -> Tensor:
        """(..., K, 2) px, a view."""
        return self._table(rows[..., HEADER : HEADER + 2 * self.capacity])

    def scores(self, rows: Tensor) -> Tensor:
        """(..., K), a view."""
        return rows[..., HEADER + 2 * self.capacity : HEADER + 3 * self.capacity]

    def descriptors(self, rows: Tensor) -> Tensor:
        """(..., K, D), a view."""
        return self._table(rows[..., self.host_length :])

    def _table(self, part: Tensor) -> Tensor:
        return part.view(*part.shape[:-1], self.capacity, -1)

    def fill(
        self,
        row: Tensor,
        *,
        count: Tensor,
        image_size: tuple[int, int],
        keypoints: Tensor,
        scores: Tensor,
        descriptors: Tensor,
    ) -> None:
        """Writes a row; `count` is a tensor of one number. Nothing is read on the host."""
        row[0:1].copy_(count.reshape(1))
        row[1:2].fill_(image_size[0])
        row[2:3].fill_(image_size[1])
        self.keypoints(row).copy_(keypoints)
        self.scores(row).copy_(scores)
        self.descriptors(row).copy_(descriptors)


class Slot:
    """One row on the device and what the host gets of it.

    written  the device has the row; ready: the host has its part; read: the matcher has copied the row.
    """

    def __init__(self, layout: RowLayout, row: Tensor, host: Tensor, backend: Backend) -> None:
        self.layout, self.row, self.host = layout, row, host
        self.keypoints, self.scores = layout.keypoints(row), layout.scores(row)
        self.descriptors = layout.descriptors(row)
        self.host_array: NDArray[np.float32] = host.numpy()
        self.written, self.ready, self.read = backend.mark(), backend.mark(), backend.mark()

    def __repr__(self) -> str:
        return "a slot of features"


class Loan:
    """A slot in the hands of one `Features`; it goes back to the pool when the last holder lets go."""

    def __init__(self, slot: Slot, pool: FeaturePool) -> None:
        self.slot, self._pool = slot, pool

    def __del__(self) -> None:
        self._pool.take_back(self.slot)

    def num_valid(self) -> int:
        self.slot.ready.wait()
        return int(self.slot.host_array[0])

    def host_keypoints(self) -> NDArray[np.float32]:
        self.slot.ready.wait()
        capacity = self.slot.layout.capacity
        return self.slot.host_array[HEADER : HEADER + 2 * capacity].reshape(capacity, 2).copy()


def lent_slot(features: Features) -> Slot | None:
    """The slot that holds exactly these features; None where there is none, or they have been changed since."""
    loan = features.memory
    if not isinstance(loan, Loan) or features.descriptors is not loan.slot.descriptors:
        return None
    if features.keypoints is not loan.slot.keypoints:
        return None
    # Features that are counted have been computed: asking again waits for nothing.
    return loan.slot if not features.is_counted or features.num_valid == loan.num_valid() else None


class FeaturePool:
    """Slots of one layout. It grows when all are lent, as the map keeps the features of its keyframes.

    lane  the one that writes the slots: their memory belongs to its stream.
    """

    def __init__(self, layout: RowLayout, backend: Backend, lane: Lane) -> None:
        self.layout = layout
        self._backend = backend
        self._lane = lane
        self._free: deque[Slot] = deque()
        self._lock = threading.Lock()
        self.num_slots = 0
        self._grow()

    def lend(self) -> Loan:
        """A slot that nobody holds. What is sent to it has to wait for its mark `read`."""
        with self._lock:
            if not self._free:
                self._grow()
            return Loan(self._free.popleft(), self)

    def take_back(self, slot: Slot) -> None:
        """From any thread, also in the middle of `lend`: nothing here waits for the lock."""
        self._free.append(slot)

    def features(self, loan: Loan, image_size: tuple[int, int], kind: str) -> Features:
        """What the slot will hold, before it does."""
        slot = loan.slot
        return Features.pending(slot.keypoints, slot.scores, slot.descriptors, loan, image_size, kind)

    def _grow(self) -> None:
        layout = self.layout
        with device_faults(), self._lane:
            # Not filled: nothing may be sent to the device here that another lane would have to wait for.
            rows = torch.empty((_SLOTS_AT_ONCE, layout.length), device=self._backend.device)
        hosts = self._backend.pinned(_SLOTS_AT_ONCE, layout.host_length)
        self._free += [Slot(layout, row, host, self._backend) for row, host in zip(rows, hosts, strict=True)]
        self.num_slots += _SLOTS_AT_ONCE


class UploadRing:
    """Pinned buffers through which images of one shape go to the device, on a lane of their own.

    The host writes the next image while earlier ones are on their way.
    """

    def __init__(self, shape: tuple[int, ...], num_slots: int, backend: Backend, lane: Lane) -> None:
        self.shape = shape
        self._lane = lane
        with device_faults(), lane:
            self._stops = [Stop(shape, backend) for _ in range(num_slots)]
        self._next = 0

    def send(self, image: NDArray[np.uint8]) -> Stop:
        """Copies the image and sends it on. Who reads `arrived` on a lane waits for `sent` and sets `taken`."""
        stop = self._stops[self._next]
        self._next = (self._next + 1) % len(self._stops)
        # The pinned buffer is written again: its last image has to be on the device.
        stop.sent.wait()
        np.copyto(stop.array, image)
        with self._lane as lane:
            lane.after(stop.taken)
            lane.writes(stop.arrived)
            stop.arrived.copy_(stop.pinned, non_blocking=True)
            lane.set(stop.sent)
        return stop


class Stop:
    """One buffer of a ring, on either side."""

    def __init__(self, shape: tuple[int, ...], backend: Backend) -> None:
        self.pinned = backend.pinned(*shape, dtype=torch.uint8)
        self.array: NDArray[np.uint8] = self.pinned.numpy()
        self.arrived = torch.empty(shape, dtype=torch.uint8, device=backend.device)
        self.sent: Mark = backend.mark()
        self.taken: Mark = backend.mark()
