"""Where a training's pairs come from: photographs alone, or a share of them from posed collections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from frontends.training.pairs_layers import LayeredPairs, LayersConfig, layered_pairs
from frontends.training.pairs_posed import PosedCollection, PosedPairs, load_posed_pairs
from frontends.training.photometry import PhotometryConfig, relit
from frontends.training.photos import PhotoBank, TrainingError

Pairs = LayeredPairs | PosedPairs
_LAYERED = ("images0", "images1", "to_photo", "outlines", "edge_px")
_POSED = ("images0", "images1", "depths0", "depths1", "K0", "K1", "T_camera1_camera0")


class PairSource(Protocol):
    """Makes batches of pairs, random by the generator only."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, count: int, generator: torch.Generator) -> Pairs: ...


@dataclass(frozen=True, slots=True, eq=False)
class LayeredSource:
    """Pairs made of photographs."""

    bank: PhotoBank
    layers: LayersConfig
    photometry: PhotometryConfig

    @property
    def device(self) -> torch.device:
        return self.bank.pixels.device

    def __call__(self, count: int, generator: torch.Generator) -> LayeredPairs:
        return layered_pairs(self.bank, count, generator, self.layers, self.photometry)


@dataclass(frozen=True, slots=True, eq=False)
class MixedSource:
    """Batches of `share` come from posed collections, the others from photographs.

    Frames of a collection that cannot be read are replaced by others, and counted in `unreadable`.
    """

    layered: LayeredSource
    collections: Sequence[PosedCollection]
    share: float
    unreadable: list[str]

    @property
    def device(self) -> torch.device:
        return self.layered.device

    def __call__(self, count: int, generator: torch.Generator) -> Pairs:
        # Two values whatever comes of them, so that the rest of the batch does not depend on it.
        draw, seed = torch.rand(2, generator=generator, device=generator.device, dtype=torch.float64).tolist()
        if not self.collections or draw >= self.share:
            return self.layered(count, generator)
        random = np.random.default_rng(int(seed * 2**53))
        for _ in range(8):
            collection = self.collections[int(random.integers(len(self.collections)))]
            chosen = random.integers(len(collection.pairs), size=count)
            try:
                pairs = load_posed_pairs(collection, chosen, self.layered.layers.size, self.device)
            except TrainingError as error:
                self.unreadable.append(str(error))
                continue
            images0, images1 = (relit(v, generator, self.layered.photometry) for v in (pairs.images0, pairs.images1))
            return replace(pairs, images0=images0, images1=images1)
        raise TrainingError(f"{self.unreadable[-1]} ({len(self.unreadable)} pairs could not be read)")


def as_tensors(pairs: Pairs) -> dict[str, Tensor]:
    """Pairs as plain tensors, for a batch that can be saved; see `from_tensors`."""
    names = _LAYERED if isinstance(pairs, LayeredPairs) else _POSED
    return {name: torch.as_tensor(getattr(pairs, name)) for name in names}


def from_tensors(batch: Mapping[str, Tensor]) -> Pairs:
    """The pairs that `as_tensors` took apart."""
    if "depths0" in batch:
        return PosedPairs(**{name: batch[name] for name in _POSED})  # type: ignore[arg-type]
    images = (batch["images0"], batch["images1"])
    return LayeredPairs(*images, batch["to_photo"], batch["outlines"], float(batch["edge_px"]))
