"""Mutual nearest neighbours against OpenCV's brute-force matcher and against the definition."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from frontends import nearest
from frontends.base import Features, Matcher, Matches
from frontends.nearest import Nearest, NearestConfig


def features(descriptors: NDArray[np.generic], num_valid: int | None = None, kind: str = "test") -> Features:
    count = len(descriptors)
    return Features(
        torch.zeros(count, 2),
        torch.ones(count),
        torch.from_numpy(np.ascontiguousarray(descriptors)),
        count if num_valid is None else num_valid,
        (640, 480),
        kind,
    )


def unit_vectors(rng: np.random.Generator, count: int, length: int = 64) -> NDArray[np.float32]:
    vectors = rng.normal(size=(count, length)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def observed_again(rng: np.random.Generator, vectors: NDArray[np.float32], noise: float) -> NDArray[np.float32]:
    """Two thirds of the vectors in another order and with noise, the rest new."""
    shuffled = vectors[rng.permutation(len(vectors))]
    shuffled[: len(vectors) // 3] = unit_vectors(rng, len(vectors) // 3, vectors.shape[1])
    shuffled += noise * rng.normal(size=vectors.shape).astype(np.float32)
    return shuffled / np.linalg.norm(shuffled, axis=1, keepdims=True)


def flipped_bits(rng: np.random.Generator, codes: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    noise = np.packbits(rng.random((len(codes), 8 * codes.shape[1])) < share, axis=1)
    return (codes ^ noise)[rng.permutation(len(codes))]


def opencv_pairs(
    descriptors0: NDArray[np.generic], descriptors1: NDArray[np.generic], norm: int
) -> list[tuple[int, int]]:
    found = cv2.BFMatcher(norm, crossCheck=True).match(descriptors0, descriptors1)
    return sorted((m.queryIdx, m.trainIdx) for m in found)


def pairs(matches: Matches) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j in matches.indices]


@pytest.mark.parametrize("has_fast_int8", [True, False])
def test_every_processor_counts_the_same_bits(monkeypatch: pytest.MonkeyPatch, has_fast_int8: bool) -> None:
    monkeypatch.setattr(nearest, "_has_fast_int8", lambda: has_fast_int8)
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (203, 32), dtype=np.uint8)
    others = flipped_bits(rng, codes, 0.1)[:150]
    assert nearest.signs(torch.from_numpy(codes)).dtype is (torch.int8 if has_fast_int8 else torch.float32)
    found = Nearest(NearestConfig(max_ratio=0.9)).match(features(codes), features(others))
    assert len(found) > 100
    differing = np.unpackbits(codes[found.indices[:, 0]] ^ others[found.indices[:, 1]], axis=1).sum(axis=1)
    np.testing.assert_array_equal(found.scores, (1 - differing / 256).astype(np.float32))
    assert pairs(Nearest().match(features(codes), features(others))) == opencv_pairs(codes, others, cv2.NORM_HAMMING)


def test_is_a_matcher() -> None:
    assert isinstance(Nearest(), Matcher)


def test_float_descriptors_agree_with_opencv() -> None:
    rng = np.random.default_rng(1)
    vectors0 = unit_vectors(rng, 700)
    vectors1 = observed_again(rng, vectors0, 0.08)[:650]
    matches = Nearest().match(features(vectors0), features(vectors1))
    assert len(matches) > 300
    assert pairs(matches) == opencv_pairs(vectors0, vectors1, cv2.NORM_L2)
    cosines = np.sum(vectors0[matches.indices[:, 0]] * vectors1[matches.indices[:, 1]], axis=1)
    np.testing.assert_allclose(matches.scores, cosines, atol=1e-6)
    assert (matches.stop_layer, matches.num_kept0, matches.num_kept1) == (0, 700, 650)


@pytest.mark.parametrize("num_bytes", [32, 64])
def test_binary_descriptors_agree_with_opencv(num_bytes: int) -> None:
    rng = np.random.default_rng(2)
    codes0 = rng.integers(0, 256, (400, num_bytes), dtype=np.uint8)
    codes1 = flipped_bits(rng, codes0, 0.2)[:380]
    matches = Nearest().match(features(codes0), features(codes1))
    assert len(matches) > 300
    expected = opencv_pairs(codes0, codes1, cv2.NORM_HAMMING)
    distances = np.bitwise_count(codes0[:, None] ^ codes1[None]).sum(axis=2, dtype=np.int64)
    untied = {(i, j) for i, j in expected if np.sum(distances[:, j] == distances[i, j]) == 1}
    assert untied <= set(pairs(matches))
    rows, columns = matches.indices.T
    np.testing.assert_array_equal(distances[rows, columns], distances.min(axis=1)[rows])
    np.testing.assert_array_equal(distances[rows, columns], distances.min(axis=0)[columns])
    np.testing.assert_allclose(matches.scores, 1 - distances[rows, columns] / (8 * num_bytes), atol=1e-7)


def test_ratio_agrees_with_opencv_from_both_sides() -> None:
    rng = np.random.default_rng(3)
    vectors0 = unit_vectors(rng, 500)
    vectors1 = observed_again(rng, vectors0, 0.1)

    def passing(queries: NDArray[np.float32], others: NDArray[np.float32]) -> set[tuple[int, int]]:
        found = cv2.BFMatcher(cv2.NORM_L2).knnMatch(queries, others, k=2)
        return {(a.queryIdx, a.trainIdx) for a, b in found if a.distance < 0.8 * b.distance}

    expected = passing(vectors0, vectors1) & {(j, i) for i, j in passing(vectors1, vectors0)}
    matches = Nearest(NearestConfig(max_ratio=0.8)).match(features(vectors0), features(vectors1))
    without = Nearest().match(features(vectors0), features(vectors1))
    assert set(pairs(matches)) == expected
    assert 0 < len(matches) < len(without)


def test_ratio_of_hamming_distances() -> None:
    codes0 = np.zeros((1, 32), np.uint8)
    codes1 = np.zeros((2, 32), np.uint8)
    codes1[0, 0], codes1[1, :2] = 0b1111, 0b11111  # distances 4 and 10
    query, candidates = features(codes0), features(codes1)
    assert pairs(Nearest(NearestConfig(max_ratio=0.45)).match(query, candidates)) == [(0, 0)]
    assert pairs(Nearest(NearestConfig(max_ratio=0.4)).match(query, candidates)) == []


def test_min_similarity_is_a_floor_on_the_score() -> None:
    rng = np.random.default_rng(4)
    vectors0 = unit_vectors(rng, 300)
    vectors1 = observed_again(rng, vectors0, 0.15)
    every = Nearest().match(features(vectors0), features(vectors1))
    floor = float(np.median(every.scores))
    some = Nearest(NearestConfig(min_similarity=floor)).match(features(vectors0), features(vectors1))
    np.testing.assert_array_equal(some.indices, every.indices[every.scores >= floor])


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_mutual_by_definition_whatever_ties(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count0, count1 = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 12))
    # Two bytes with few values: exact ties are common.
    codes0, codes1 = (rng.integers(0, 4, (n, 2), dtype=np.uint8) for n in (count0, count1))
    matches = Nearest().match(features(codes0), features(codes1))
    distances = np.bitwise_count(codes0[:, None] ^ codes1[None]).sum(axis=2, dtype=np.int64)
    expected = []
    if count0 and count1:
        first = distances.argmin(axis=1)
        expected = [(i, int(j)) for i, j in enumerate(first) if distances[:, j].argmin() == i]
    assert pairs(matches) == expected
    assert np.all((matches.scores >= 0) & (matches.scores <= 1))
    swapped = Nearest().match(features(codes1), features(codes0))
    assert sorted((j, i) for i, j in pairs(swapped)) == expected


def test_padding_is_not_matched() -> None:
    rng = np.random.default_rng(5)
    vectors0 = unit_vectors(rng, 60)
    vectors1 = observed_again(rng, vectors0, 0.1)
    padded = np.concatenate((vectors0[:40], vectors1[:20]))  # padding that would match perfectly
    matches = Nearest().match(features(padded, num_valid=40), features(vectors1))
    expected = Nearest().match(features(vectors0[:40]), features(vectors1))
    np.testing.assert_array_equal(matches.indices, expected.indices)
    np.testing.assert_allclose(matches.scores, expected.scores, atol=1e-6)


def test_nothing_on_either_side() -> None:
    rng = np.random.default_rng(6)
    some, none = features(unit_vectors(rng, 3)), features(unit_vectors(rng, 3), num_valid=0)
    for side0, side1 in ((some, none), (none, some), (none, none)):
        matches = Nearest(NearestConfig(max_ratio=0.9)).match(side0, side1)
        assert len(matches) == 0
        assert (matches.num_kept0, matches.num_kept1) == (side0.num_valid, side1.num_valid)


def test_one_candidate_has_no_second_to_compare_with() -> None:
    vector = unit_vectors(np.random.default_rng(7), 1)
    assert pairs(Nearest(NearestConfig(max_ratio=0.5)).match(features(vector), features(vector))) == [(0, 0)]


def test_different_descriptors_are_refused() -> None:
    rng = np.random.default_rng(8)
    with pytest.raises(ValueError, match=r"xfeat .* cannot be compared with aliked"):
        Nearest().match(
            features(unit_vectors(rng, 3, 64), kind="xfeat"), features(unit_vectors(rng, 3, 128), kind="aliked")
        )
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        Nearest().match(features(unit_vectors(rng, 3, 32)), features(np.zeros((3, 32), np.uint8)))


def test_settings_have_limits() -> None:
    with pytest.raises(ValueError, match="max_ratio"):
        NearestConfig(max_ratio=1.5)
    with pytest.raises(ValueError, match="min_similarity"):
        NearestConfig(min_similarity=-0.1)


@pytest.mark.parametrize("is_binary", [True, False])
def test_the_largest_product_is_that_with_the_most_similar_one(is_binary: bool) -> None:
    rng = np.random.default_rng(9)
    sides = [
        rng.integers(0, 256, (count, 32), np.uint8) if is_binary else unit_vectors(rng, count) for count in (7, 30)
    ]
    queries, candidates = (nearest.comparable(features(side, num_valid=len(side) - 2)) for side in sides)
    if is_binary:
        bits = [np.unpackbits(side[:-2], axis=1).astype(int) for side in sides]
        expected = (256 - 2 * (bits[0][:, None] != bits[1]).sum(axis=2)).max(axis=1)
    else:
        expected = (sides[0][:-2] @ sides[1][:-2].T).max(axis=1)
    np.testing.assert_allclose(nearest.largest_products(queries, candidates).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("inference_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_products_take_the_memory_of_those_before(inference_first: bool, dtype: torch.dtype) -> None:
    """In and out of inference mode; threads do not share it."""
    rng = np.random.default_rng(10)
    sides = [torch.from_numpy(rng.integers(-1, 2, (count, 64)).astype(np.int8)).to(dtype) for count in (90, 70, 30)]
    places, by_thread = [], []
    for is_inference in (inference_first, not inference_first):
        with torch.inference_mode(is_inference):
            for candidates in sides:
                products = nearest._products(sides[0], candidates)
                assert torch.equal(products.double(), sides[0].double() @ candidates.double().T)
                places.append(products.data_ptr())
    assert len(set(places)) == 1
    thread = threading.Thread(target=lambda: by_thread.append(nearest._products(sides[0], sides[1])))
    thread.start()
    thread.join()
    assert by_thread[0].data_ptr() != places[0]


def test_threads_that_match_at_once_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(11)
    jobs = [[features(rng.integers(0, 256, (count, 32), np.uint8)) for count in (400, 300)] for _ in range(8)]
    expected = [pairs(Nearest().match(*job)) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert [pairs(matches) for matches in pool.map(lambda job: Nearest().match(*job), jobs)] == expected
