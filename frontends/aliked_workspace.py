"""What ALIKED's inference keeps from frame to frame for one image size: memory, strips and interpolation tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frontends.aliked_network import BLOCK_STRIDES, AlikedArchitecture, padding_to_stride
from frontends.aliked_sampling import upsampling_taps

STRIP_VALUES = 1_048_576  # float32 values per strip of rows: what two cores hold in their second-level caches


@dataclass(frozen=True, slots=True, eq=False)
class RowMixing:
    """How the rows of a strip of full-resolution logits arise from rows of the coarse logits of all branches.

    windows    per branch, the (first, last + 1) coarse rows that the strip needs.
    indices    (R, 6) int64 into those rows, one branch after the other; weights (R, 6) float32.
    """

    windows: tuple[tuple[int, int], ...]
    indices: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CellTables:
    """The twelve cells (four of each coarse branch) around a full-resolution pixel, by its row plus by its column.

    Of the image without padding: cell indices (H, 12) and (W, 12) int32 into the coarse table of one image, to be
    added; weights (H, 12) and (W, 12) float32, to be multiplied.
    """

    row_cells: Tensor
    row_weights: Tensor
    column_cells: Tensor
    column_weights: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """Memory and tables for `batch` images of one size, overwritten by every call that uses them.

    images         (B, 3, H', W') float32, channels-last, padded to multiples of STRIDE; so are all that follow.
    block1         (B, c1, H', W'), output of the first block.
    pooled1        (B, c1, H'/2, W'/2): sums of it over 2x2 px.
    coarse         (B, cells, D/4): the coarse branches as tables of pixels, one below the other.
    coarse_sizes   (height, width) of the coarse branches, in cells.
    scores         (B, 1, H', W').
    origin         (left, top) px of the image in the padded one; size (height, width) px of it.
    """

    images: Tensor
    block1: Tensor
    pooled1: Tensor
    coarse: Tensor
    coarse_sizes: tuple[tuple[int, int], ...]
    scores: Tensor
    origin: tuple[int, int]
    size: tuple[int, int]
    strip_rows: int
    row_mixing: tuple[RowMixing, ...]
    cell_tables: CellTables


def strips(height: int, rows: int, lag: int) -> list[tuple[int, int]]:
    """Input strips (start, end) of about `rows` rows for `lag` streamed convolutions, so that outputs are whole strips.

    The first strip has `lag` rows more, the last one what is left.
    """
    bounds = [0, *range(rows + lag, height, rows)]
    if len(bounds) > 1 and height - bounds[-1] <= lag:
        bounds.pop()
    return list(zip(bounds, [*bounds[1:], height], strict=True))


SCORE_LAG = 3  # 3x3 convolutions in the score head
_HEAP_BYTES = 31 << 20  # just below the most that glibc's allocator adapts to


def keep_freed_memory() -> None:
    """Make the C allocator keep some tens of megabytes that are freed, where it is glibc's.

    It gives large blocks back to the system at once, until it sees one as large as these freed. Without that, the
    temporaries of every frame are mapped and zeroed anew: thousands of page faults, a fifth of the time of a frame.
    """
    block = torch.empty(_HEAP_BYTES, dtype=torch.uint8)
    del block


def create_workspace(
    architecture: AlikedArchitecture, batch: int, height: int, width: int, device: torch.device
) -> Workspace:
    """Workspace for `batch` images of height x width px."""
    keep_freed_memory()
    left, right, top, bottom = padding_to_stride(height, width)
    rows, columns = height + top + bottom, width + left + right
    c1, branch_dim = architecture.channels[0], architecture.descriptor_dim // 4
    sizes = tuple((rows // stride, columns // stride) for stride in BLOCK_STRIDES[1:])
    strip_rows = rows if device.type != "cpu" else max(32, STRIP_VALUES // (columns * branch_dim) // 8 * 8)

    def maps(channels: int, stride: int = 1) -> Tensor:
        shape = (batch, channels, rows // stride, columns // stride)
        return torch.empty(shape, device=device, memory_format=torch.channels_last)

    return Workspace(
        images=maps(3),
        block1=maps(c1),
        pooled1=maps(c1, 2),
        coarse=torch.empty(batch, sum(h * w for h, w in sizes), branch_dim, device=device),
        coarse_sizes=sizes,
        scores=maps(1),
        origin=(left, top),
        size=(height, width),
        strip_rows=strip_rows,
        row_mixing=tuple(
            _row_mixing([h for h, _ in sizes], rows, strip, batch, device)
            for strip in strips(rows, strip_rows, SCORE_LAG)
        ),
        cell_tables=_cell_tables(sizes, (rows, columns), (left, top), (height, width), device),
    )


def _row_mixing(
    coarse_heights: Sequence[int], height: int, strip: tuple[int, int], batch: int, device: torch.device
) -> RowMixing:
    windows, indices, weights, first_row = [], [], [], 0
    for coarse_height in coarse_heights:
        taps = upsampling_taps(coarse_height, height, torch.device("cpu"))
        rows = taps.indices[:, slice(*strip)]
        window = int(rows.min()), int(rows.max()) + 1
        windows.append(window)
        indices.append(rows.t() - window[0] + first_row)
        weights.append(taps.weights[:, slice(*strip)].t())
        first_row += window[1] - window[0]
    first_of_image = torch.arange(batch).view(-1, 1, 1) * first_row
    all_indices = (torch.cat(indices, dim=1) + first_of_image).flatten(0, 1)
    all_weights = torch.cat(weights, dim=1).repeat(batch, 1)
    return RowMixing(tuple(windows), all_indices.to(device), all_weights.to(device))


def _cell_tables(
    sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int],
    origin: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
) -> CellTables:
    row_cells, row_weights, column_cells, column_weights = [], [], [], []
    first_cell = 0
    for height, width in sizes:
        rows, columns = (upsampling_taps(n, full, device) for n, full in zip((height, width), padded, strict=True))
        row_cells.append((rows.indices * width + first_cell).t().repeat_interleave(2, dim=1))
        row_weights.append(rows.weights.t().repeat_interleave(2, dim=1))
        column_cells.append(columns.indices.t().repeat(1, 2))
        column_weights.append(columns.weights.t().repeat(1, 2))
        first_cell += height * width
    (left, top), (image_height, image_width) = origin, size
    rows_inside, columns_inside = slice(top, top + image_height), slice(left, left + image_width)
    return CellTables(
        row_cells=torch.cat(row_cells, dim=1)[rows_inside].int(),
        row_weights=torch.cat(row_weights, dim=1)[rows_inside].contiguous(),
        column_cells=torch.cat(column_cells, dim=1)[columns_inside].int(),
        column_weights=torch.cat(column_weights, dim=1)[columns_inside].contiguous(),
    )
