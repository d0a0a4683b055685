"""Interpolation tables of ALIKED's inference for one image size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frontends.aliked_network import BLOCK_STRIDES, padding_to_stride
from frontends.aliked_sampling import upsampling_taps


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How the coarse branches (strides 2, 8 and 32) of an image of height x width px are upsampled.

    H' and W' are the sides padded to multiples of the largest stride; origin is (left, top) px of the image in there.
    coarse_sizes     (height, width) of the branches, in cells. A branch is a table of its cells, row by row, and the
                     coarse table of an image is the three below each other.
    mixing_rows      (H', 6) int64: the two rows of each branch that a row lies between, counted through all branches;
    mixing_weights   (H', 6) float32.
    row_cells        (H, 12) and column_cells (W, 12) int32: the four cells of each branch around a pixel of the image
                     are rows of the coarse table, by the pixel's row plus by its column;
    row_weights      (H, 12) and column_weights (W, 12) float32, to be multiplied.
    """

    size: tuple[int, int]
    origin: tuple[int, int]
    coarse_sizes: tuple[tuple[int, int], ...]
    mixing_rows: Tensor
    mixing_weights: Tensor
    row_cells: Tensor
    row_weights: Tensor
    column_cells: Tensor
    column_weights: Tensor


def create_layout(height: int, width: int, device: torch.device) -> Layout:
    """Layout for images of height x width px."""
    left, right, top, bottom = padding_to_stride(height, width)
    padded_height, padded_width = top + height + bottom, left + width + right
    coarse_sizes = tuple((padded_height // stride, padded_width // stride) for stride in BLOCK_STRIDES[1:])
    mixing_rows, mixing_weights, row_cells, row_weights, column_cells, column_weights = [], [], [], [], [], []
    first_row = first_cell = 0
    for coarse_height, coarse_width in coarse_sizes:
        rows = upsampling_taps(coarse_height, padded_height, device)
        columns = upsampling_taps(coarse_width, padded_width, device)
        mixing_rows.append(rows.indices.t() + first_row)
        mixing_weights.append(rows.weights.t())
        row_cells.append((rows.indices * coarse_width + first_cell).t().repeat_interleave(2, dim=1))
        row_weights.append(rows.weights.t().repeat_interleave(2, dim=1))
        column_cells.append(columns.indices.t().repeat(1, 2))
        column_weights.append(columns.weights.t().repeat(1, 2))
        first_row += coarse_height
        first_cell += coarse_height * coarse_width
    image_rows, image_columns = slice(top, top + height), slice(left, left + width)
    return Layout(
        size=(height, width),
        origin=(left, top),
        coarse_sizes=coarse_sizes,
        mixing_rows=torch.cat(mixing_rows, dim=1),
        mixing_weights=torch.cat(mixing_weights, dim=1),
        row_cells=torch.cat(row_cells, dim=1)[image_rows].int(),
        row_weights=torch.cat(row_weights, dim=1)[image_rows].contiguous(),
        column_cells=torch.cat(column_cells, dim=1)[image_columns].int(),
        column_weights=torch.cat(column_weights, dim=1)[image_columns].contiguous(),
    )
