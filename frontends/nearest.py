"""Mutual nearest neighbours: the matcher without weights, for float and for binary descriptors."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from frontends.base import Features, Matches, check_settings, setting


@dataclass(frozen=True, slots=True)
class NearestConfig:
    """Which mutual nearest neighbours count as matches."""

    name: Literal["nearest"] = "nearest"
    min_similarity: float = setting(
        0.0, minimum=0.0, maximum=1.0, help="cosine, or share of equal bits of binary descriptors, to reach"
    )
    max_ratio: float | None = setting(
        None, minimum=0.0, maximum=1.0, help="distance of the best over that of the second best, to stay below"
    )

    def __post_init__(self) -> None:
        check_settings(self)


class Nearest:
    """Matches features that are each other's most similar one.

    Similarity is the cosine of float descriptors of unit length, and the share of equal bits of binary (uint8) ones;
    it is also the score of a match, cut off at 0. Among equally similar ones the first counts, so that exchanging
    the two sides exchanges the columns of the result and nothing else.
    """

    def __init__(self, config: NearestConfig | None = None) -> None:
        self.config = config or NearestConfig()

    @torch.inference_mode()
    def match(self, features0: Features, features1: Features) -> Matches:
        """Matches in the order of features 0; the ratio test, if set, has to hold from both sides.

        Raises ValueError for descriptors of different kinds or lengths.
        """
        descriptors0, descriptors1 = (f.descriptors[: f.num_valid] for f in (features0, features1))
        if descriptors0.shape[1] != descriptors1.shape[1] or descriptors0.dtype != descriptors1.dtype:
            raise ValueError(
                f"descriptors: {features0.kind} {tuple(descriptors0.shape)} {descriptors0.dtype} cannot be compared "
                f"with {features1.kind} {tuple(descriptors1.shape)} {descriptors1.dtype}"
            )
        counts = len(descriptors0), len(descriptors1)
        indices, scores = self._indices(descriptors0, descriptors1.to(descriptors0.device))
        return Matches(indices.cpu().numpy(), scores.cpu().numpy(), 0, *counts)

    def _indices(self, descriptors0: Tensor, descriptors1: Tensor) -> tuple[Tensor, Tensor]:
        if len(descriptors0) == 0 or len(descriptors1) == 0:
            return descriptors0.new_zeros((0, 2), dtype=torch.int64), descriptors0.new_zeros(0, dtype=torch.float32)
        is_binary = descriptors0.dtype == torch.uint8
        vectors0, vectors1 = (signs(d) if is_binary else d for d in (descriptors0, descriptors1))
        # Two products of the same numbers: reducing one product over its columns takes several times longer.
        similarity0, best0, distinct0 = self._nearest(vectors0, vectors1, is_binary)
        _, best1, distinct1 = self._nearest(vectors1, vectors0, is_binary)
        rows = torch.arange(len(best0), device=best0.device)
        accepted = (best1[best0] == rows) & distinct0 & distinct1[best0] & (similarity0 >= self.config.min_similarity)
        rows = rows[accepted]
        return torch.stack((rows, best0[rows]), dim=1), similarity0[rows].clamp(0.0, 1.0)

    def _nearest(self, queries: Tensor, candidates: Tensor, is_binary: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of every query: similarity and index of the most similar candidate, and whether the ratio test holds."""
        products = _products(queries, candidates)
        values, indices = _row_maxima(products)
        similarity = _similarity(values, queries.shape[1], is_binary)
        if self.config.max_ratio is None or len(candidates) == 1:
            return similarity, indices, torch.ones_like(indices, dtype=torch.bool)
        second = products.to(torch.float32).scatter_(1, indices[:, None], -torch.inf).amax(dim=1)
        nearest, other = (_distance(maxima, queries.shape[1], is_binary) for maxima in (values, second))
        return similarity, indices, nearest < self.config.max_ratio * other


def comparable(features: Features) -> Tensor:
    """Valid descriptors (N, D) whose dot products are larger the more alike they are; binary ones as their `signs`."""
    descriptors = features.descriptors[: features.num_valid]
    return signs(descriptors) if descriptors.dtype == torch.uint8 else descriptors


def largest_products(queries: Tensor, candidates: Tensor) -> Tensor:
    """(K0,) dot product of every query (K0, D) with the candidate (K1, D) most like it, both of them `comparable`."""
    products = _products(queries, candidates)
    if products.device.type != "cpu":
        return products.amax(dim=1)
    return torch.from_numpy(products.numpy().max(axis=1))


def signs(descriptors: Tensor) -> Tensor:
    """Bits of (K, B) uint8 as (K, 8 B) of +1 and -1: the product of two such rows is 8 B - 2 Hamming.

    In the type with the fastest matrix product that is exact: on processors with instructions for it, int8; float32 on
    others; on a GPU bfloat16, which holds every such product of up to 256 bits.
    """
    if descriptors.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(descriptors.numpy(), axis=1, bitorder="little").view(np.int8))
        bits = bits if _has_fast_int8() else bits.to(torch.float32)
        return bits.mul_(2).sub_(1)
    shifts = torch.arange(8, dtype=torch.uint8, device=descriptors.device)
    bits = (descriptors[:, :, None] >> shifts) & 1
    dtype = torch.bfloat16 if 8 * descriptors.shape[1] <= 256 else torch.float32
    return bits.flatten(1).to(dtype).mul_(2).sub_(1)


@functools.cache
def _has_fast_int8() -> bool:
    """Whether torch multiplies int8 matrices here by the processor's dot products of bytes (VNNI, AMX)."""
    return hasattr(torch, "_int_mm") and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


class _Workspace(threading.local):
    """Memory of a thread for the products, which are by far the largest thing a match needs: asked for anew each time,
    it would be torn out of the heap in pieces that only seldom fit again, and a run would grow for an hour.
    """

    def __init__(self) -> None:
        # Arrays: a tensor that was made in inference mode cannot be written to outside of it.
        self._rooms = {torch.int32: np.empty(0, np.int32), torch.float32: np.empty(0, np.float32)}

    def table(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
        """(num_rows, num_columns) of anything, on the CPU; the next call may give the same memory away."""
        size = num_rows * num_columns
        if len(self._rooms[dtype]) < size:
            self._rooms[dtype] = np.empty(size, self._rooms[dtype].dtype)
        return torch.from_numpy(self._rooms[dtype][:size].reshape(num_rows, num_columns))


_workspace = _Workspace()


def _products(queries: Tensor, candidates: Tensor) -> Tensor:
    """(K0, K1) dot products; int32 of int8. On the CPU they last until the thread asks for others."""
    if queries.device.type != "cpu":
        return queries @ candidates.T
    if queries.dtype == torch.int8:
        products = _workspace.table(len(queries), len(candidates), torch.int32)
        torch._int_mm(queries, candidates.T, out=products)
        return products
    products = _workspace.table(len(queries), len(candidates), torch.float32)
    return torch.matmul(queries.float(), candidates.float().T, out=products)


def _row_maxima(products: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of every row (K0,) and where it is (K0,), the first of equal ones."""
    if products.device.type != "cpu":
        values, indices = products.max(dim=1)
        return values, indices
    # NumPy's is five times faster than torch's.
    indices = torch.from_numpy(products.numpy().argmax(axis=1))
    return products.gather(1, indices[:, None])[:, 0], indices


def _similarity(products: Tensor, length: int, is_binary: bool) -> Tensor:
    products = products.to(torch.float32)
    return (products / length + 1) / 2 if is_binary else products


def _distance(products: Tensor, length: int, is_binary: bool) -> Tensor:
    """Hamming distance, or Euclidean distance of unit vectors."""
    products = products.to(torch.float32)
    return (length - products) / 2 if is_binary else (2 - 2 * products).clamp(min=0).sqrt()
