"""What R2D2 is trained with, against brute force: pairs, average precision, samplers, repeatability losses."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from smooth_photos import photo

from frontends.training.average_precision import average_precision, reliability_loss
from frontends.training.homographic_pairs import WarpConfig, homographic_pair, homography_flow, random_homography
from frontends.training.repeatability import peakiness_loss, similarity_loss, warped
from frontends.training.samplers import DenseMaps, ScoreRows, full_rows, grid_rows, near_far_rows

PLAIN = WarpConfig(brightness=0.0, contrast=1.0, noise=0.0)


# ---------------------------------------------------------------- pairs


def test_the_flow_of_a_pair_leads_to_the_same_thing() -> None:
    for seed in range(5):
        pair = homographic_pair(photo(seed), 96, np.random.default_rng(seed), PLAIN)
        read = cv2.remap(pair.image1, pair.flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        inside = ((pair.flow >= 1) & (pair.flow <= 94)).all(axis=2)
        assert inside.mean() > 0.3
        difference = np.abs(read.astype(float) - pair.image0)[inside]
        assert np.median(difference) < 2 and difference.mean() < 3


def test_the_flow_is_that_of_the_homography() -> None:
    H = random_homography(64, np.random.default_rng(3), WarpConfig(perspective=0.5))
    flow = homography_flow(H, 64)
    points = np.random.default_rng(0).integers(0, 64, (50, 2))
    expected = cv2.perspectiveTransform(points[:, None].astype(np.float64), H)[:, 0]
    np.testing.assert_allclose(flow[points[:, 1], points[:, 0]], expected, atol=1e-3)


def test_pairs_depend_on_the_seed_alone_and_small_photos_are_refused() -> None:
    one, same, other = (homographic_pair(photo(), 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.image1, same.image1) and not np.array_equal(one.image1, other.image1)
    with pytest.raises(ValueError, match="photo: expected"):
        homographic_pair(photo(side=80), 96, np.random.default_rng(0))


def test_the_asked_share_of_the_pairs_has_no_colour() -> None:
    generator = np.random.default_rng(0)
    for share, least, most in ((0.0, 0, 0), (0.5, 15, 45), (1.0, 60, 60)):
        pairs = [homographic_pair(photo(), 48, generator, WarpConfig(noise=0.0, gray=share)) for _ in range(60)]
        gray = [all(np.ptp(image, axis=2).max() == 0 for image in (pair.image0, pair.image1)) for pair in pairs]
        assert least <= sum(gray) <= most


# ---------------------------------------------------------------- average precision


def exact_average_precision(scores: NDArray[np.float64], is_match: NDArray[np.bool_]) -> float:
    """Mean over the matches of the share of matches among everything ranked as high or higher."""
    precisions = [is_match[scores >= score].mean() for score in scores[is_match]]
    return float(np.mean(precisions)) if precisions else 0.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 19), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_precision_is_exact_for_scores_on_the_bins(row: list[tuple[int, bool, bool]]) -> None:
    bins, is_match, is_counted = (np.array(values) for values in zip(*row, strict=True))
    scores = bins / 19
    found = average_precision(
        torch.from_numpy(scores)[None], torch.from_numpy(is_match)[None], torch.from_numpy(is_counted)[None]
    )
    expected = exact_average_precision(scores[is_counted], is_match[is_counted])
    assert float(found[0]) == pytest.approx(expected, abs=1e-9)


def test_precision_of_any_scores_is_near_the_exact_one() -> None:
    """Between two bins a match counts a little with each of them, which moves the figure a little."""
    generator = np.random.default_rng(0)
    scores, is_match = generator.uniform(0, 1, (40, 60)), generator.uniform(0, 1, (40, 60)) < 0.2
    is_match[:, 0] = True
    scores[is_match] = np.sqrt(scores[is_match])
    expected = [exact_average_precision(*row) for row in zip(scores, is_match, strict=True)]
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(is_match)).numpy()
    assert np.ptp(expected) > 0.3
    assert np.abs(found - expected).mean() < 0.04 and np.corrcoef(found, expected)[0, 1] > 0.95


def test_precision_has_the_gradient_it_claims_and_rises_along_it() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    is_match = torch.rand(3, 9, generator=generator) < 0.4
    is_match[:, 0] = True
    assert torch.autograd.gradcheck(lambda s: average_precision(s, is_match, num_bins=7), (scores,))
    before = average_precision(scores, is_match)
    before.sum().backward()
    assert scores.grad is not None
    after = average_precision(scores.detach() + 0.02 * scores.grad.sign(), is_match)
    assert float(after.sum()) > float(before.detach().sum())


def test_scores_beyond_the_range_count_as_its_limits() -> None:
    is_match = torch.tensor([[True, False, False]])
    assert float(average_precision(torch.tensor([[1.4, 0.5, -2.0]]), is_match)[0]) == pytest.approx(1.0)
    assert float(average_precision(torch.tensor([[-3.0, 0.5, 0.9]]), is_match)[0]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="num_bins"):
        average_precision(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), num_bins=1)


def test_unreliable_rows_cost_the_base_and_reliable_ones_their_precision() -> None:
    precision = torch.tensor([0.9, 0.1])
    assert float(reliability_loss(precision, torch.tensor([1.0, 0.0]))) == pytest.approx((0.1 + 0.5) / 2)
    assert float(reliability_loss(precision, torch.tensor([0.0, 1.0]))) == pytest.approx((0.5 + 0.9) / 2)
    assert float(reliability_loss(torch.zeros(0), torch.zeros(0))) == 0.0


# ---------------------------------------------------------------- samplers


def random_pair(
    seed: int, batch: int = 2, height: int = 14, width: int = 17
) -> tuple[DenseMaps, DenseMaps, torch.Tensor]:
    """Dense maps of both sides, and a flow that shifts, stretches, and leaves the image here and there."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for _ in range(2):
        descriptors = torch.nn.functional.normalize(torch.randn(batch, 6, height, width, generator=generator), dim=1)
        sides.append(DenseMaps(descriptors, torch.rand(batch, height, width, generator=generator)))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    flow = torch.stack((columns * 1.1 - 1.3, rows * 0.9 + 1.7), dim=-1)[None].repeat(batch, 1, 1, 1)
    return sides[0], sides[1], flow + torch.rand(flow.shape, generator=generator) - 0.5


def queries(flow: torch.Tensor, step: int, border: int) -> list[tuple[int, int, int, float, float]]:
    """(image, row, column, x, y) of the grid's pixels that stay in the image."""
    found = []
    batch, height, width, _ = flow.shape
    for image in range(batch):
        for row in range(border + step // 2, height - border, step):
            for column in range(border + step // 2, width - border, step):
                x, y = flow[image, row, column].tolist()
                if 0 <= x <= width - 1 and 0 <= y <= height - 1:
                    found.append((image, row, column, x, y))
    return found


def reliability_of(side0: DenseMaps, side1: DenseMaps, query: tuple[int, int, int, float, float]) -> float:
    image, row, column, x, y = query
    return float(side0.reliability[image, row, column] + side1.reliability[image, round(y), round(x)]) / 2


def brute_grid(
    side0: DenseMaps,
    side1: DenseMaps,
    flow: torch.Tensor,
    steps: tuple[int, int],
    border: int,
    limits_px: tuple[float, float],
) -> list[tuple[list[float], list[bool], list[bool], float]]:
    """Rows of (scores, is_match, is_counted, reliability)."""
    rows = []
    batch, height, width, _ = flow.shape
    for query in queries(flow, steps[0], border):
        image, row, column, x, y = query
        scores, is_match, is_counted = [], [], []
        for other in range(batch):
            for v in range(steps[1] // 2, height, steps[1]):
                for u in range(steps[1] // 2, width, steps[1]):
                    distance = np.hypot(u - x, v - y) if other == image else np.inf
                    product = side0.descriptors[image, :, row, column] @ side1.descriptors[other, :, v, u]
                    scores.append(float(product))
                    is_match.append(bool(distance <= limits_px[0]))
                    is_counted.append(bool(distance <= limits_px[0] or distance > limits_px[1]))
        if any(is_match):
            rows.append((scores, is_match, is_counted, reliability_of(side0, side1, query)))
    return rows


def check_rows(found: ScoreRows, expected: list[tuple[list[float], list[bool], list[bool], float]]) -> None:
    assert len(found.scores) == len(expected) > 5
    scores, is_match, is_counted, reliability = zip(*expected, strict=True)
    np.testing.assert_allclose(found.scores, np.array(scores), atol=1e-5)
    np.testing.assert_array_equal(found.is_match, np.array(is_match))
    np.testing.assert_array_equal(found.is_counted, np.array(is_counted))
    np.testing.assert_allclose(found.reliability, reliability, atol=1e-6)


def test_the_full_sampler_against_brute_force() -> None:
    pair = random_pair(0, batch=1, height=8, width=9)
    found = full_rows(*pair)
    check_rows(found, brute_grid(*pair, (1, 1), 0, (0.75, 0.75)))
    assert found.scores.shape[1] == 8 * 9


@pytest.mark.parametrize(
    ("steps", "border", "limits_px"), [((3, 2), 2, (1.5, 1.5)), ((2, 3), 0, (2.0, 4.0)), ((1, 4), 3, (1.0, 3.0))]
)
def test_the_grid_sampler_against_brute_force(
    steps: tuple[int, int], border: int, limits_px: tuple[float, float]
) -> None:
    pair = random_pair(1)
    found = grid_rows(
        *pair,
        query_step=steps[0],
        candidate_step=steps[1],
        border=border,
        positive_px=limits_px[0],
        negative_px=limits_px[1],
    )
    check_rows(found, brute_grid(*pair, steps, border, limits_px))


def test_the_near_far_sampler_against_brute_force() -> None:
    side0, side1, flow = random_pair(2)
    found = near_far_rows(
        side0, side1, flow, query_step=2, border=1, positive_px=1.5, negative_px=2.0, ring_px=3.0, distractor_step=4
    )
    batch, height, width, _ = flow.shape
    asked = queries(flow, 2, 1)
    assert len(asked) == len(found.scores) > 20
    for index, query in enumerate(asked):
        image, row, column, x, y = query
        near, ring, far = [], [], []
        for other in range(batch):
            for v in range(height):
                for u in range(width):
                    score = float(side0.descriptors[image, :, row, column] @ side1.descriptors[other, :, v, u])
                    distance = np.hypot(u - round(x), v - round(y)) if other == image else np.inf
                    if distance <= 1.5:
                        near.append(score)
                    elif 2.0 <= distance <= 3.0:
                        ring.append(score)
                    if v % 4 == 2 and u % 4 == 2 and distance >= 2.0:
                        far.append(score)
        counted = found.scores[index][found.is_counted[index] & ~found.is_match[index]]
        np.testing.assert_allclose(np.sort(counted), np.sort([*ring, *far]), atol=1e-5)
        assert float(found.scores[index, 0]) == pytest.approx(max(near), abs=1e-5)
        assert found.is_match[index].nonzero().tolist() == [[0]] and bool(found.is_counted[index, 0])
        assert float(found.reliability[index]) == pytest.approx(reliability_of(side0, side1, query))
    with pytest.raises(ValueError, match="positive_px < negative_px"):
        near_far_rows(side0, side1, flow, positive_px=5.0, negative_px=3.0)


def test_gradients_reach_both_images() -> None:
    side0, side1, flow = random_pair(3)
    for side in (side0, side1):
        side.descriptors.requires_grad_()
    rows = near_far_rows(side0, side1, flow, query_step=2, border=1)
    (1 - average_precision(rows.scores, rows.is_match, rows.is_counted)).sum().backward()
    for side in (side0, side1):
        assert side.descriptors.grad is not None and float(side.descriptors.grad.abs().sum()) > 0


# ---------------------------------------------------------------- repeatability


def identity_flow(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((columns, rows), dim=-1).float()[None]


def test_maps_are_read_where_the_flow_leads() -> None:
    values = torch.rand(1, 2, 9, 11, generator=torch.Generator().manual_seed(0))
    flow = identity_flow(9, 11) + torch.tensor([0.25, -1.5])
    found, is_inside = warped(values, flow)
    expected = cv2.remap(values[0].permute(1, 2, 0).numpy(), flow[0].numpy(), None, cv2.INTER_LINEAR)
    inside = is_inside[0].numpy()
    assert inside.sum() == 10 * 7  # the last column and the first two rows leave the image
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy()[inside], expected[inside], atol=1e-5)


def test_equal_maps_are_similar_and_others_as_brute_force_says() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 24, 24, generator=generator)
    flow = identity_flow(24, 24).repeat(2, 1, 1, 1)
    assert float(similarity_loss(maps, maps, flow, 8)) == pytest.approx(0, abs=1e-6)
    shifted = torch.roll(maps, (3, 2), dims=(1, 2))
    assert float(similarity_loss(maps, shifted, flow + torch.tensor([2.0, 3.0]), 8)) == pytest.approx(0, abs=1e-6)
    other, losses = torch.rand(2, 24, 24, generator=generator), []
    for image in range(2):
        for row in range(0, 24 - 8 + 1, 4):
            for column in range(0, 24 - 8 + 1, 4):
                a, b = (m[image, row : row + 8, column : column + 8].flatten().numpy() for m in (maps, other))
                losses.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert float(similarity_loss(maps, other, flow, 8)) == pytest.approx(np.mean(losses), abs=1e-5)
    assert float(similarity_loss(maps, other, flow + 100, 8)) == 0.0


def test_peakiness_as_brute_force_says() -> None:
    assert float(peakiness_loss(torch.full((1, 20, 20), 0.7), 8)) == pytest.approx(1.0)
    maps = torch.rand(1, 15, 13, generator=torch.Generator().manual_seed(0))

    def windows(image: NDArray[np.float64], reach: int) -> list[NDArray[np.float64]]:
        """The window around every pixel, row by row, as far as it lies in the image."""
        height, width = image.shape
        return [
            image[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
            for row in range(height)
            for column in range(width)
        ]

    smooth = np.array([window.mean() for window in windows(maps[0].double().numpy(), 1)]).reshape(15, 13)
    for patch_px, reach in ((4, 2), (7, 3)):
        expected = 1 - np.mean([window.max() - window.mean() for window in windows(smooth, reach)])
        assert float(peakiness_loss(maps, patch_px)) == pytest.approx(expected, abs=1e-5)
