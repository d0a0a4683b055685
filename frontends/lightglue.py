"""LightGlue: matching two sets of features, as deep and as wide as the pair is hard.

Lindenberger et al., "LightGlue: Local Feature Matching at Light Speed", ICCV 2023, arXiv 2306.13643.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from frontends.base import Features, Matches, WeightsError, check_settings, setting
from frontends.lightglue_network import build_network, normalize_keypoints
from frontends.lightglue_packed import PackedLightGlue, Span, pack

PRESETS: Mapping[str, tuple[float, float, int | None]] = {
    "real-time": (0.95, 0.99, None),
    "accurate": (1.0, 1.0, None),
    "edge": (0.90, 0.95, 5),
}
"""Depth confidence, width confidence and most layers of every preset.

The exits of "real-time" lose at most 1.7 % of the inliers of all layers between neighbouring frames (KITTI 00 and
7-Scenes), and 2.5 to 4.0 % at gaps of 3 and 5 frames; a depth confidence of 0.98 brings the latter below 2.5 %.
"""

NUM_REMEMBERED = 4
"""Images whose states are remembered."""


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
    """One image's states (rows, width) after the first self-attention, which no other image has a part in.

    rotations  (rows, 1, head_dim / 2) of the positional encoding.
    count      how many rows hold points; the rest is padding.
    """

    state: Tensor
    rotations: Tensor
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """The points of both images that are still in play, packed with those of image 0 first.

    kept  (N,) int64 of either image, which of its points these are.
    """

    state: Tensor
    rotations: Tensor
    spans: tuple[Span, Span]
    kept: tuple[Tensor, Tensor]

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.kept[0]), len(self.kept[1])


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
        network = build_network(state_dict, name)
        self.architecture = network.architecture
        self._network = network.to(self.device)
        self._packed = pack(self._network, picked_precision(config.precision, self.device))
        self._depth_confidence, self._width_confidence, max_layers = config.limits()
        self._num_layers = min(max_layers or self.architecture.num_layers, self.architecture.num_layers)
        if self._depth_confidence < 1 and not self.architecture.has_confidence:
            raise WeightsError(f"{name}: has no confidence heads to stop early with; set depth_confidence to 1")
        self.log_threshold = math.log(config.filter_threshold) if config.filter_threshold > 0 else -math.inf
        self._recent: list[tuple[weakref.ref[Features], _Encoded]] = []

    @property
    def precision(self) -> str:
        """The precision of matrix products in use: "float32", "bfloat16" or "float16"."""
        return str(self._packed.dtype).removeprefix("torch.")

    @property
    def num_layers(self) -> int:
        """Layers that are run at most."""
        return self._num_layers

    @property
    def confidences(self) -> tuple[float, float]:
        """Depth and width confidence in use."""
        return self._depth_confidence, self._width_confidence

    def packed_in(self, dtype: torch.dtype) -> PackedLightGlue:
        """The weights with products in a precision, which may be another than the configured one."""
        return self._packed if dtype == self._packed.dtype else pack(self._network, dtype)

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
        pair = self._joined(self._encoded(features0), self._encoded(features1))
        num_points = sum(pair.counts)
        for layer in range(self._num_layers):
            pair = self._after_layer(layer, pair)
            if layer == self._num_layers - 1:
                break
            masks = self._undecided(layer, pair, num_points)
            if masks is None:
                break
            pair = self._reduced(pair, masks)
            if 0 in pair.counts:
                return _no_matches(layer + 1, *pair.counts)
        return self._assigned(layer, pair)

    def _after_layer(self, layer: int, pair: _Pair) -> _Pair:
        state = pair.state
        if layer > 0:
            state = self._packed.attend_within(layer, state, pair.rotations, pair.spans)
        return replace(pair, state=self._packed.attend_between(layer, state, *pair.spans))

    def _undecided(self, layer: int, pair: _Pair, num_points: int) -> tuple[Tensor, Tensor] | None:
        """Which points of either image are worth keeping, or None where enough of all points are decided."""
        confidence, matchability = self._packed.decisions(layer, pair.state)
        threshold = exit_threshold(layer, self._num_layers)
        mask = matchability > 1 - self._width_confidence
        if self._depth_confidence < 1:
            num_open = sum(int((confidence[span.points] < threshold).sum()) for span in pair.spans)
            if 1.0 - num_open / num_points > self._depth_confidence:
                return None
            mask |= confidence <= threshold
        if self._width_confidence == 1:
            mask = torch.ones_like(mask)
        return mask[pair.spans[0].points], mask[pair.spans[1].points]

    def _reduced(self, pair: _Pair, masks: tuple[Tensor, Tensor]) -> _Pair:
        chosen = tuple(mask.nonzero()[:, 0] for mask in masks)
        counts = len(chosen[0]), len(chosen[1])
        if counts == pair.counts:
            return pair
        span0, span1 = self._packed.spans(counts, self.device)
        # Padding repeats the first point; its rows take no part.
        rows = torch.zeros(span1.rows.stop, dtype=torch.int64, device=self.device)
        rows[span0.points] = chosen[0] + pair.spans[0].points.start
        rows[span1.points] = chosen[1] + pair.spans[1].points.start
        kept = pair.kept[0][chosen[0]], pair.kept[1][chosen[1]]
        return _Pair(pair.state[rows], pair.rotations[rows], (span0, span1), kept)

    def _assigned(self, layer: int, pair: _Pair) -> Matches:
        log_assignment = self._packed.log_assignment(layer, pair.state, *pair.spans)
        best, largest_of_column = log_assignment.max(dim=1), log_assignment.amax(dim=0)
        is_match = (best.values == largest_of_column[best.indices]) & (best.values > self.log_threshold)
        rows = is_match.nonzero()[:, 0]
        indices = torch.stack((pair.kept[0][rows], pair.kept[1][best.indices[rows]]), dim=1).cpu().numpy()
        # Two points of image 0 may tie exactly for one of image 1: the first has it.
        first = np.sort(np.unique(indices[:, 1], return_index=True)[1])
        scores = best.values[rows].exp().clamp(max=1.0).cpu().numpy()
        return Matches(indices[first], scores[first], layer + 1, *pair.counts)

    def _joined(self, encoded0: _Encoded, encoded1: _Encoded) -> _Pair:
        counts = encoded0.count, encoded1.count
        span0, span1 = self._packed.spans(counts, self.device)
        return _Pair(
            torch.cat((encoded0.state, encoded1.state)),
            torch.cat((encoded0.rotations, encoded1.rotations)),
            (span0, span1),
            (torch.arange(counts[0], device=self.device), torch.arange(counts[1], device=self.device)),
        )

    def _encoded(self, features: Features) -> _Encoded:
        """The image's states, remembered for the few used last: the previous frame, a keyframe."""
        alive = [(entry, entry[0]()) for entry in self._recent]
        found = next((entry for entry, owner in alive if owner is features), None)
        if found is None:
            found = (weakref.ref(features), self._encode(features))
        others = [entry for entry, owner in alive if owner is not None and entry is not found]
        self._recent = [found, *others[: NUM_REMEMBERED - 1]]
        return found[1]

    def _encode(self, features: Features) -> _Encoded:
        count = features.num_valid
        (span,) = self._packed.spans((count,), self.device)
        padding = (0, 0, 0, span.rows.stop - count)
        descriptors = features.descriptors[:count].to(self.device, torch.float32)
        state = self._packed.project(F.pad(descriptors, padding))
        rotations = self._packed.rotations(F.pad(self._coordinates(features), padding))
        return _Encoded(self._packed.attend_within(0, state, rotations, (span,)), rotations, count)

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
    """Confidence above which a point counts as decided after `layer` (from 0) of `num_layers`; section 3.3."""
    return 0.8 + 0.1 * math.exp(-4.0 * layer / num_layers)


def picked_precision(requested: str, device: torch.device) -> torch.dtype:
    """Precision of matrix products: as requested, or for "auto" what is known to pay on this machine.

    A CPU with matrix tiles (AMX) multiplies bfloat16 several times faster than float32 and more than 99 % of the
    matches stay the same; everywhere else it is float32.
    """
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[requested]
    # Older versions of torch cannot tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    has_tiles = device.type == "cpu" and capabilities.get("amx_bf16", False)
    return torch.bfloat16 if has_tiles else torch.float32


def _no_matches(stop_layer: int, num_kept0: int, num_kept1: int) -> Matches:
    return Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), stop_layer, num_kept0, num_kept1)
