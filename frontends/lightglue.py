"""LightGlue: matching two sets of features, as deep and as wide as the pair is hard.

Lindenberger et al., "LightGlue: Local Feature Matching at Light Speed", ICCV 2023, arXiv 2306.13643.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from frontends.base import Features, Matches, WeightsError, check_settings, setting
from frontends.lightglue_network import (
    LightGlueArchitecture,
    MatchAssignment,
    TransformerLayer,
    build_network,
    normalize_keypoints,
)

PRESETS: Mapping[str, tuple[float, float, int | None]] = {
    "real-time": (0.95, 0.99, None),
    "accurate": (1.0, 1.0, None),
    "edge": (0.90, 0.95, 5),
}
"""Depth confidence, width confidence and most layers of every preset."""


@dataclass(frozen=True, slots=True)
class LightGlueConfig:
    """How far LightGlue goes, and which weights it uses; the architecture is read from the weights.

    What is left at null follows the preset: real-time (0.95, 0.99, all layers), accurate (1, 1, all layers),
    edge (0.90, 0.95, 5 layers).
    """

    name: Literal["lightglue"] = "lightglue"
    weights: str | None = setting(None, help="state dict of any LightGlue release; null: those made for the extractor")
    preset: str = setting("real-time", choices=tuple(PRESETS), help="what the settings below are where they are null")
    depth_confidence: float | None = setting(
        None, minimum=0.0, maximum=1.0, help="share of confident points that ends the layers; 1 runs all"
    )
    width_confidence: float | None = setting(
        None, minimum=0.0, maximum=1.0, help="drops points that are unmatchable with this confidence; 1 keeps all"
    )
    max_layers: int | None = setting(None, minimum=1, help="layers run at most")
    filter_threshold: float = setting(0.1, minimum=0.0, maximum=1.0, help="probability a match has to exceed")
    precision: str = setting(
        "auto", choices=("auto", "float32", "bfloat16", "float16"), help="of matrix products; auto picks by machine"
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def limits(self) -> tuple[float, float, int | None]:
        """Depth confidence, width confidence and most layers (None: all), with the preset filled in."""
        chosen = (self.depth_confidence, self.width_confidence, self.max_layers)
        depth, width, layers = (
            value if value is not None else default for value, default in zip(chosen, PRESETS[self.preset], strict=True)
        )
        return cast(tuple[float, float, int | None], (depth, width, layers))


@dataclass(frozen=True, slots=True, eq=False)
class _Encoded:
    """One image's points (1, N, width) after the first self-attention, which no other image has a part in."""

    state: Tensor
    encoding: tuple[Tensor, Tensor]


class LightGlue:
    """Matches features with the LightGlue weights in a state dict of any release.

    name, fits   what the weights are called and the kinds of features they were made for (none given: any kind of
                 the right descriptor length); features that do not fit raise WeightsError naming both.
    """

    def __init__(
        self,
        config: LightGlueConfig,
        state_dict: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        *,
        name: str = "lightglue",
        fits: tuple[str, ...] = (),
    ) -> None:
        self.config = config
        self.name = name
        self.fits = fits
        self.device = torch.device(device)
        self._network = build_network(state_dict, name).to(self.device)
        depth_confidence, width_confidence, max_layers = config.limits()
        self._depth_confidence, self._width_confidence = depth_confidence, width_confidence
        self._num_layers = min(max_layers or self.architecture.num_layers, self.architecture.num_layers)
        if depth_confidence < 1 and not self.architecture.has_confidence:
            raise WeightsError(f"{name}: has no confidence heads to stop early with; set depth_confidence to 1")
        self._recent: list[tuple[weakref.ref[Features], _Encoded]] = []

    @property
    def architecture(self) -> LightGlueArchitecture:
        return self._network.architecture

    @property
    def precision(self) -> str:
        """The precision of matrix products in use: "float32", "bfloat16" or "float16"."""
        return "float32"

    def check_fit(self, kind: str, descriptor_dim: int | None = None) -> None:
        """Raise WeightsError unless these weights were made for features of this kind and descriptor length."""
        made_for = " or ".join(self.fits) if self.fits else f"{self.architecture.input_dim}-dimensional descriptors"
        if self.fits and kind not in self.fits:
            raise WeightsError(f"{self.name}: made for {made_for}, not for {kind}; choose other weights or extractor")
        if descriptor_dim is not None and descriptor_dim != self.architecture.input_dim:
            raise WeightsError(
                f"{self.name}: made for {made_for} of length {self.architecture.input_dim}, {kind} has descriptors of "
                f"length {descriptor_dim}; choose other weights or extractor"
            )

    @torch.inference_mode()
    def match(self, features0: Features, features1: Features) -> Matches:
        """Matches with their probabilities; empty if either side has no points.

        Raises WeightsError for features the weights were not made for, ValueError for features without the scale
        and orientation that the weights need.
        """
        for features in (features0, features1):
            self.check_fit(features.kind, features.descriptors.shape[1])
        if features0.num_valid == 0 or features1.num_valid == 0:
            return _no_matches(0, features0.num_valid, features1.num_valid)
        encoded0, encoded1 = self._encoded(features0), self._encoded(features1)
        return self._match(encoded0, encoded1)

    def _match(self, encoded0: _Encoded, encoded1: _Encoded) -> Matches:
        x0, x1 = encoded0.state, encoded1.state
        encoding0, encoding1 = encoded0.encoding, encoded1.encoding
        num_points = x0.shape[1] + x1.shape[1]
        kept0 = torch.arange(x0.shape[1], device=self.device)
        kept1 = torch.arange(x1.shape[1], device=self.device)
        for index in range(self._num_layers):
            transformer = cast(TransformerLayer, self._network.transformers[index])
            if index > 0:
                x0 = transformer.self_attn(x0, encoding0, None)
                x1 = transformer.self_attn(x1, encoding1, None)
            x0, x1 = transformer.cross_attn(x0, x1, None, None)
            if index == self._num_layers - 1:
                break
            confidence0 = self._network.token_confidence[index](x0)[0]
            confidence1 = self._network.token_confidence[index](x1)[0]
            threshold = exit_threshold(index, self._num_layers)
            unconfident = (confidence0 < threshold).sum() + (confidence1 < threshold).sum()
            if 1.0 - unconfident / num_points > self._depth_confidence:
                break
            keep0 = self._keep(index, x0, confidence0 <= threshold)
            keep1 = self._keep(index, x1, confidence1 <= threshold)
            kept0, kept1 = kept0[keep0], kept1[keep1]
            x0, x1 = x0[:, keep0], x1[:, keep1]
            encoding0 = (encoding0[0][:, :, keep0], encoding0[1][:, :, keep0])
            encoding1 = (encoding1[0][:, :, keep1], encoding1[1][:, :, keep1])
            if len(kept0) == 0 or len(kept1) == 0:
                return _no_matches(index + 1, len(kept0), len(kept1))
        log_assignment = self._network.log_assignment[index](x0, x1, None, None)[0, :-1, :-1]
        rows, columns, scores = _mutual(log_assignment, self.config.filter_threshold)
        indices = torch.stack((kept0[rows], kept1[columns]), dim=1)
        return Matches(indices.cpu().numpy(), scores.cpu().numpy(), index + 1, len(kept0), len(kept1))

    def _keep(self, index: int, x: Tensor, unsure: Tensor) -> Tensor:
        if self._width_confidence >= 1:
            return torch.ones_like(unsure)
        assignment = cast(MatchAssignment, self._network.log_assignment[index])
        matchability = torch.sigmoid(assignment.matchability(x)[0, :, 0])
        return (matchability > 1 - self._width_confidence) | unsure

    def _encoded(self, features: Features) -> _Encoded:
        self._recent = [entry for entry in self._recent if entry[0]() is not None]
        for reference, encoded in self._recent:
            if reference() is features:
                return encoded
        encoded = self._encode(features)
        self._recent = [(weakref.ref(features), encoded), *self._recent[:3]]
        return encoded

    def _encode(self, features: Features) -> _Encoded:
        count = features.num_valid
        x = self._network.input_proj(features.descriptors[None, :count].to(self.device, torch.float32))
        encoding = self._network.posenc(self._coordinates(features)[None])
        transformer = cast(TransformerLayer, self._network.transformers[0])
        return _Encoded(transformer.self_attn(x, encoding, None), encoding)

    def _coordinates(self, features: Features) -> Tensor:
        """(num_valid, num_coordinates) float32 as the positional encoding takes them."""
        count = features.num_valid
        columns = [normalize_keypoints(features.keypoints[:count].to(self.device, torch.float32), features.image_size)]
        if self.architecture.num_coordinates == 4:
            if features.scales is None or features.orientations is None:
                raise ValueError(f"features of kind {features.kind}: {self.name} needs their scales and orientations")
            extra = torch.stack((features.scales[:count], features.orientations[:count]), dim=1)
            columns.append(extra.to(self.device, torch.float32))
        return torch.cat(columns, dim=1)


def exit_threshold(layer: int, num_layers: int) -> float:
    """Confidence above which a point counts as decided after `layer` (from 0) of `num_layers`; equation 12."""
    return 0.8 + 0.1 * math.exp(-4.0 * layer / num_layers)


def _mutual(log_assignment: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and probabilities of the entries (M, N) that are largest in both and above the threshold."""
    best0, best1 = log_assignment.max(dim=1), log_assignment.max(dim=0)
    rows = torch.arange(len(log_assignment), device=log_assignment.device)
    scores = best0.values.exp()
    rows = rows[(best1.indices[best0.indices] == rows) & (scores > threshold)]
    return rows, best0.indices[rows], scores[rows]


def _no_matches(stop_layer: int, num_kept0: int, num_kept1: int) -> Matches:
    return Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), stop_layer, num_kept0, num_kept1)
