from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.selection import spread_order

places = st.lists(st.tuples(st.integers(0, 199), st.integers(0, 99)), min_size=1, max_size=60)


def spread_slowly(keypoints, cell_px):
    """Rounds over the cells, written out."""
    order = []
    while len(order) < len(keypoints):
        used = set()
        for row, (x, y) in enumerate(keypoints):
            cell = (x // cell_px, y // cell_px)
            if row not in order and cell not in used:
                order.append(row)
                used.add(cell)
    return order


@settings(deadline=None, max_examples=80)
@given(places, st.sampled_from([7, 25, 300]))
def test_order_is_that_of_rounds_over_the_cells(keypoints, cell_px):
    found = spread_order(torch.tensor(keypoints, dtype=torch.float32), cell_px)
    assert found.tolist() == spread_slowly(keypoints, cell_px)


def test_a_batch_is_ordered_row_by_row():
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(2, 40, 2, generator=generator) * 100
    together = spread_order(batch, 20)
    for row in range(2):
        assert together[row].tolist() == spread_order(batch[row], 20).tolist()


def test_one_cell_keeps_the_order_of_strength():
    keypoints = torch.rand(30, 2, generator=torch.Generator().manual_seed(1)) * 10
    assert spread_order(keypoints, 1000).tolist() == list(range(30))
