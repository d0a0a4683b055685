"""What XFeat*'s fine matcher learns: pairs of cells that show the same place, and the offset between them.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024, sections 3.2 and 3.3: of the
descriptors of two cells, a perceptron tells by which of 8x8 px the corner of the second is off in the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from frontends.xfeat_network import CELL_PX, DESCRIPTOR_DIM

HIDDEN = 512
_NUM_HIDDEN = 4


@dataclass(frozen=True, slots=True, eq=False)
class CellPairs:
    """Cells (M,) of image 0 and of image 1, row by row, and the class (M,) of their offset: rows of 8 px, from -4."""

    cells0: Tensor
    cells1: Tensor
    classes: Tensor


def cell_pairs(flow: Tensor) -> CellPairs:
    """Every cell of image 1 with the cell of image 0 that shows its corner.

    flow (H, W, 2) px: where the pixels of IMAGE 1 lie in image 0, pixel centres at integers; sides are multiples of 8.
    The corner of a cell is its first pixel. Corners that leave image 0 have no pair.
    """
    height, width = flow.shape[0] // CELL_PX, flow.shape[1] // CELL_PX
    corners = flow[::CELL_PX, ::CELL_PX].reshape(-1, 2).round().long()
    # Offsets go from -4 to 3 px.
    places = torch.div(corners + CELL_PX // 2, CELL_PX, rounding_mode="floor")
    offsets = corners - CELL_PX * places
    kept = ((places >= 0) & (places < places.new_tensor([width, height]))).all(dim=1).nonzero()[:, 0]
    cells0 = places[kept, 1] * width + places[kept, 0]
    classes = (offsets[kept, 1] + CELL_PX // 2) * CELL_PX + offsets[kept, 0] + CELL_PX // 2
    return CellPairs(cells0, kept, classes)


def fine_matcher() -> nn.Sequential:
    """An untrained perceptron (M, 128) -> (M, 64) with the layers, and the names, of the published one."""
    sizes = (2 * DESCRIPTOR_DIM, *(HIDDEN,) * _NUM_HIDDEN, CELL_PX**2)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers.append(nn.Linear(inputs, outputs))
        if outputs != CELL_PX**2:
            layers += [nn.BatchNorm1d(outputs, affine=False), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
