"""An extractor whose network is a graph: one upload, one launch, one copy back, and nobody waits for any of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import Features
from frontends.device_faults import device_faults
from frontends.feature_pool import FeaturePool, RowLayout, UploadRing
from frontends.graphs import Backend, Graph, Lane, wait_for
from frontends.static_form import ExtractorChoice, StaticForm, arithmetic


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """Everything for images of one shape: buffers whose addresses are in the graph, and the graph."""

    image: Tensor
    row: Tensor
    graph: Graph
    uploads: UploadRing
    image_size: tuple[int, int]


class StaticExtractor:
    """`extract` gives away features that the device has yet to compute. One thread at a time.

    lane   where the network runs; uploads have a lane of their own, so that the next image arrives meanwhile.
    """

    def __init__(self, form: StaticForm, backend: Backend, upload_slots: int = 3) -> None:
        self.form = form
        self.choice = ExtractorChoice(form.precisions[0])
        self.lane: Lane = backend.lane("extract")
        self.layout = RowLayout(form.capacity, form.descriptor_dim)
        self.pool = FeaturePool(self.layout, backend, self.lane)
        self._backend = backend
        self._upload_lane = backend.lane("upload", is_urgent=True)
        self._upload_slots = upload_slots
        self._prepared: dict[tuple[int, ...], _Prepared] = {}
        self._idle = backend.mark()
        self._lock = threading.Lock()

    @property
    def kind(self) -> str:
        return self.form.kind

    @property
    def precision(self) -> str:
        """For the summary of a run and the tables of a benchmark."""
        choice = self.choice
        parts = [choice.precision, f"{choice.kernels} kernels", f"{choice.convolutions} convolutions"]
        return ", ".join([*parts, *(["compiled"] if choice.is_compiled else [])])

    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Features of one image (H, W, 3) RGB or (H, W) gray, uint8, best first; rows beyond `num_valid` are zeros.

        The image may change as soon as this returns. Raises ValueError when the image is not of such a shape and type,
        or too small, DeviceError where the device fails.
        """
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"image: expected (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}")
        with self._lock, device_faults():
            prepared = self._prepared.get(image.shape) or self.prepare(image.shape)
            upload = prepared.uploads.send(image)
            loan = self.pool.lend()
            slot = loan.slot
            with self.lane as lane:
                lane.after(upload.sent)
                lane.reads(upload.arrived)
                prepared.image.copy_(upload.arrived)
                lane.set(upload.taken)
                prepared.graph.replay()
                # Whoever held this slot before may have sent it to the matcher in the end.
                lane.after(slot.read)
                lane.writes(slot)
                slot.row.copy_(prepared.row)
                lane.set(slot.written)
                slot.host.copy_(slot.row[: self.layout.host_length], non_blocking=True)
                lane.set(slot.ready)
            return self.pool.features(loan, prepared.image_size, self.kind)

    def use(self, choice: ExtractorChoice) -> None:
        """Runs the network another way from now on; what was captured is captured anew when it is needed."""
        if choice == self.choice:
            return
        with self._lock:
            # Images may still be on their way through buffers that must not be given away under them.
            wait_for(self._upload_lane, self._idle)
            wait_for(self.lane, self._idle)
            self.choice = choice
            self._prepared.clear()

    def prepare(self, shape: tuple[int, ...]) -> _Prepared:
        """Captures the network for images of a shape, unless it has been done. Raises ValueError, DeviceError."""
        if shape not in self._prepared:
            image = torch.zeros(shape, dtype=torch.uint8, device=self._backend.device)
            row = torch.zeros(self.layout.length, device=self._backend.device)
            function = self._function(image, row)
            name = f"{self.kind} {'x'.join(str(side) for side in shape)} {self.choice.precision}"
            with arithmetic(self.choice.precision, self.choice.is_benchmarked):
                graph = self._backend.capture(name, function, self.lane, (image, row))
            uploads = UploadRing(shape, self._upload_slots, self._backend, self._upload_lane)
            self._prepared[shape] = _Prepared(image, row, graph, uploads, (shape[1], shape[0]))
        return self._prepared[shape]

    def _function(self, image: Tensor, row: Tensor) -> Callable[[], None]:
        """What is captured: from one fixed buffer to the other."""
        program = self.form.program(tuple(image.shape), self.choice)
        if self.choice.is_compiled:
            program = torch.compile(program, dynamic=False)
        image_size = (image.shape[1], image.shape[0])

        def run() -> None:
            found = program(image)
            self.layout.fill(
                row,
                count=found.count,
                image_size=image_size,
                keypoints=found.keypoints,
                scores=found.scores,
                descriptors=found.descriptors,
            )

        return run
