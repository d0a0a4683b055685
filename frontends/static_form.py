"""What an extractor looks like to the engine: a function from an image in a fixed buffer to tensors of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StaticFeatures:
    """Keypoints (K, 2) px of the full image, scores (K,), descriptors (K, D); zeros from `count`, a tensor (1,), on."""

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True)
class ExtractorChoice:
    """How an extractor is run; what it finds does not depend on it, but for the precision.

    precision     one of `StaticForm.precisions`.
    kernels       "torch", or "triton" for kernels of our own.
    convolutions  one of `StaticForm.convolutions`: "stored" takes the maps as they lie in memory (channels last),
                  "planar" channel by channel; "benchmarked" has cuDNN try its algorithms, in either.
    is_compiled   by torch.compile.
    """

    precision: str = "float32"
    kernels: str = "torch"
    convolutions: str = "stored"
    is_compiled: bool = False

    @property
    def is_planar(self) -> bool:
        return self.convolutions.startswith("planar")

    @property
    def is_benchmarked(self) -> bool:
        return self.convolutions.endswith("benchmarked")


Program = Callable[[Tensor], StaticFeatures]
"""From an image (H, W, 3) or (H, W) uint8 on the device to its features, without a look at any value."""


class StaticForm(Protocol):
    """An extractor that can be captured."""

    @property
    def kind(self) -> str: ...

    @property
    def capacity(self) -> int:
        """K."""
        ...

    @property
    def descriptor_dim(self) -> int: ...

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it can compute in, the exact one first."""
        ...

    @property
    def kernels(self) -> tuple[str, ...]:
        """Whose kernels there are, "torch" first; "triton" where they can run."""
        ...

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Ways to run the convolutions, the stored layout first."""
        ...

    def program(self, shape: tuple[int, ...], choice: ExtractorChoice) -> Program:
        """For images of a shape. Raises ValueError for a shape it does not take."""
        ...


@contextmanager
def arithmetic(precision: str, is_benchmarked: bool = False) -> Iterator[None]:
    """Whether float32 products on a GPU may be rounded to TF32 inside; elsewhere, and for other types, no difference.

    is_benchmarked  cuDNN tries all its algorithms for a convolution that it sees for the first time.
    The choice ends up in what is captured, so it holds for replays too.
    """
    # The older of PyTorch's two switches: it sets both, while the newer one alone makes reading the older an error, and
    # its compiler reads that.
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32, convolution.benchmark
    matmul.allow_tf32 = convolution.allow_tf32 = precision == "tf32"
    convolution.benchmark = is_benchmarked
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32, convolution.benchmark = before


class AreaResize:
    """Shrinks an image on the device as OpenCV's INTER_AREA does on the host: the mean over what a pixel covers.

    Every output row is a weighted sum of input rows, and so is every column: two matrix products.
    """

    def __init__(self, full: tuple[int, int], resized: tuple[int, int], device: torch.device) -> None:
        """Sizes are (width, height) px."""
        self._columns = area_weights(full[0], resized[0], device)
        self._rows = area_weights(full[1], resized[1], device)
        # OpenCV halves in integers and rounds halves up; elsewhere halves go to the even number.
        self._halves_up = full == (2 * resized[0], 2 * resized[1])

    def __call__(self, image: Tensor) -> Tensor:
        """(H, W, 3) or (H, W) uint8 -> the same, smaller."""
        planes = image.float() if image.ndim == 2 else image.permute(2, 0, 1).float()
        with arithmetic("float32"):
            shrunk = self._rows @ planes @ self._columns.T
        whole = torch.floor(shrunk + 0.5) if self._halves_up else torch.round(shrunk)
        whole = whole.clamp_(0, 255).to(torch.uint8)
        return whole if image.ndim == 2 else whole.permute(1, 2, 0)


def area_weights(size: int, resized: int, device: torch.device) -> Tensor:
    """(resized, size) float32: the share that every input pixel has in every output pixel."""
    scale = size / resized
    edges = torch.arange(resized + 1, dtype=torch.float64) * scale
    pixels = torch.arange(size, dtype=torch.float64)
    first, last = edges[:-1, None].clamp(min=pixels), edges[1:, None].clamp(max=pixels + 1)
    return ((last - first).clamp_(min=0) / scale).float().to(device)
