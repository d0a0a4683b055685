"""Score rows for the ranking loss: queries of image 0 against candidates of image 1, labelled by ground-truth flow.

Revaud et al., "R2D2", NeurIPS 2019, section 3.3 and the training of its published networks. Flow (B, H, W, 2) is the
pixel of image 1 at which a pixel of image 0 is seen, pixel centres at integers. Candidates come from all B images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRows:
    """Q queries, each with N candidates.

    scores       (Q, N) cosine of the descriptors.
    is_match     (Q, N) bool: the candidate shows what the query shows; one or more per row.
    is_counted   (Q, N) bool: neither too near to a match to be wrong nor outside the image.
    reliability  (Q,) the mean of the query's and of its true place in image 1.
    """

    scores: Tensor
    is_match: Tensor
    is_counted: Tensor
    reliability: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DenseMaps:
    """Descriptors (B, D, H, W) of unit length and reliability (B, H, W) of one side of the pairs."""

    descriptors: Tensor
    reliability: Tensor


def full_rows(side0: DenseMaps, side1: DenseMaps, flow: Tensor, positive_px: float = 0.75) -> ScoreRows:
    """Every pixel of image 0 against every pixel of image 1: (B H W)^2 scores, for small images."""
    return grid_rows(side0, side1, flow, query_step=1, candidate_step=1, border=0, positive_px=positive_px)


def grid_rows(
    side0: DenseMaps,
    side1: DenseMaps,
    flow: Tensor,
    *,
    query_step: int = 8,
    candidate_step: int = 2,
    border: int = 16,
    positive_px: float = 3.0,
    negative_px: float | None = None,
) -> ScoreRows:
    """A grid of queries, `border` px clear of the edges, against a grid of candidates.

    Candidates within `positive_px` of a query's true place match it, those within `negative_px` (None: the same) of it
    but no nearer do not count. Queries that leave image 1, or have no match on the grid, give no row.
    """
    negative_px = positive_px if negative_px is None else negative_px
    images, rows, columns, targets = _queries(flow, query_step, border)
    places = _grid(side1.reliability, candidate_step)
    distances = torch.linalg.vector_norm(places[None, :, 1:] - targets[:, None], dim=2)
    is_same_image = places[None, :, 0] == images[:, None]
    is_match = is_same_image & (distances <= positive_px)
    is_counted = is_match | ~is_same_image | (distances > negative_px)
    kept = is_match.any(dim=1)
    images, rows, columns, targets = images[kept], rows[kept], columns[kept], targets[kept]
    queries = _at(side0.descriptors, torch.stack((images, columns, rows), dim=1))
    scores = queries @ _at(side1.descriptors, places).T
    reliability = _reliability(side0, side1, images, rows, columns, targets)
    return ScoreRows(scores, is_match[kept], is_counted[kept], reliability)


def near_far_rows(
    side0: DenseMaps,
    side1: DenseMaps,
    flow: Tensor,
    *,
    query_step: int = 8,
    border: int = 16,
    positive_px: float = 3.0,
    negative_px: float = 5.0,
    ring_px: float = 7.0,
    distractor_step: int = 8,
) -> ScoreRows:
    """The NG sampler: the best pixel around the true place, against a ring around it and a grid of everything else.

    The first candidate is the most similar pixel within `positive_px` of the true place; then the pixels between
    `negative_px` and `ring_px` of it; then a grid over all images, which leaves out what is nearer than `negative_px`.
    """
    if not positive_px < negative_px <= ring_px:
        raise ValueError(f"expected positive_px < negative_px <= ring_px, got {positive_px}, {negative_px}, {ring_px}")
    images, rows, columns, targets = _queries(flow, query_step, border)
    queries = _at(side0.descriptors, torch.stack((images, columns, rows), dim=1))
    near_places, is_near = _around(side1.reliability, images, targets, 0.0, positive_px)
    ring_places, is_ring = _around(side1.reliability, images, targets, negative_px, ring_px)
    places = _grid(side1.reliability, distractor_step)
    # All at once: backwards, every look into the maps costs a map of gradients.
    around = torch.cat((near_places, ring_places), dim=1)
    found = _at(side1.descriptors, torch.cat((around.flatten(0, 1), places)))
    num_queries, num_around = around.shape[:2]
    beside, far = found[: num_queries * num_around], found[num_queries * num_around :]
    compared = torch.einsum("qmd,qd->qm", beside.view(num_queries, num_around, -1), queries)
    near, ring = compared[:, : is_near.shape[1]], compared[:, is_near.shape[1] :]
    best = near.masked_fill(~is_near, -torch.inf).amax(dim=1, keepdim=True)
    distances = torch.linalg.vector_norm(places[None, :, 1:] - targets.round()[:, None], dim=2)
    is_far = (places[None, :, 0] != images[:, None]) | (distances >= negative_px)
    scores = torch.cat((best, ring, queries @ far.T), dim=1)
    is_match = torch.zeros_like(scores, dtype=torch.bool)
    is_match[:, 0] = True
    is_counted = torch.cat((is_match[:, :1], is_ring, is_far), dim=1)
    return ScoreRows(scores, is_match, is_counted, _reliability(side0, side1, images, rows, columns, targets))


def _queries(flow: Tensor, step: int, border: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, row and column (Q,) of a grid of pixels whose true place lies in image 1, and that place (Q, 2) px."""
    _, height, width, _ = flow.shape
    taken = torch.zeros(flow.shape[:3], dtype=torch.bool, device=flow.device)
    first = border + step // 2
    taken[:, first : height - border : step, first : width - border : step] = True
    size = flow.new_tensor([width, height])
    taken &= ((flow >= 0) & (flow <= size - 1)).all(dim=-1)
    images, rows, columns = taken.nonzero(as_tuple=True)
    return images, rows, columns, flow[images, rows, columns]


def _grid(like: Tensor, step: int) -> Tensor:
    """(N, 3): image, x and y of every `step`-th pixel of maps (B, H, W)."""
    ranges = [
        torch.arange(len(like), device=like.device),
        torch.arange(step // 2, like.shape[1], step, device=like.device),
        torch.arange(step // 2, like.shape[2], step, device=like.device),
    ]
    images, rows, columns = torch.meshgrid(*ranges, indexing="ij")
    return torch.stack((images.flatten(), columns.flatten(), rows.flatten()), dim=1)


def _at(descriptors: Tensor, places: Tensor) -> Tensor:
    """(N, D) of maps (B, D, H, W) at places (N, 3): image, x, y."""
    height, width = descriptors.shape[2:]
    images, columns, rows = places.T
    return descriptors.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, (images * height + rows) * width + columns)


def _around(
    like: Tensor, images: Tensor, targets: Tensor, nearest_px: float, farthest_px: float
) -> tuple[Tensor, Tensor]:
    """Places (Q, M, 3) in maps (B, H, W) at these distances from the pixel nearest to a target; whether in the image.

    Those that are not are moved onto its edge.
    """
    reach = int(farthest_px)
    steps = torch.arange(-reach, reach + 1, device=targets.device)
    offsets = torch.cartesian_prod(steps, steps)
    lengths = torch.linalg.vector_norm(offsets.float(), dim=1)
    offsets = offsets[(lengths >= nearest_px) & (lengths <= farthest_px)]
    places = targets.round().long()[:, None] + offsets
    size = torch.tensor([like.shape[2], like.shape[1]], device=places.device)
    is_inside = ((places >= 0) & (places < size)).all(dim=2)
    clamped = places.clamp(min=torch.zeros_like(size), max=size - 1)
    return torch.cat((images[:, None, None].expand(-1, len(offsets), 1), clamped), dim=2), is_inside


def _reliability(
    side0: DenseMaps, side1: DenseMaps, images: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> Tensor:
    nearest = targets.round().long()
    there = side1.reliability[images, nearest[:, 1], nearest[:, 0]]
    return (side0.reliability[images, rows, columns] + there) / 2
