"""LightGlue with fixed shapes, for CUDA graphs: points that are out are masked, and the exit is a flag on the device.

The states of a pair stand in one batch of two. After every layer the device itself decides whether the pair is done
(Lindenberger et al., arXiv 2306.13643, section 3.3). From then on the states stay as they are, so running further
layers changes nothing, and the result is the same however many of them are launched together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from frontends.feature_pool import HEADER, RowLayout
from frontends.lightglue import LightGlue, exit_threshold
from frontends.lightglue_packed import PackedBlock, PackedLightGlue, log_sum_exp

RESULT_HEADER = 4
"""Numbers before the matches of a result: layers run, points kept in image 0 and 1, 1 where the pair is done."""

_OUT = -1e30  # of a similarity that must not count; finite, so that a side without points stays finite


@dataclass(frozen=True, slots=True)
class ExitRule:
    """When a pair is done, and when a point is out; see `LightGlueConfig`. Layers beyond `num_layers` are not run."""

    depth_confidence: float
    width_confidence: float
    num_layers: int
    log_threshold: float


@dataclass(frozen=True, slots=True, eq=False)
class PairState:
    """A pair of images between two layers, with room for N points each; buffers of a graph.

    state          (2, N, width) float32.
    cosine, sine   (2, 1, N, head_dim / 2) of the positional encoding, in the precision of the products.
    is_in          (2, N) bool, points still in play.
    kept           (2, N) int64, which point of the image each row is.
    is_done        () bool; stop_layer () int64, layers run until then; num_points () float64, points at the beginning.
    """

    state: Tensor
    cosine: Tensor
    sine: Tensor
    is_in: Tensor
    kept: Tensor
    is_done: Tensor
    stop_layer: Tensor
    num_points: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            *(self.state, self.cosine, self.sine, self.is_in, self.kept),
            *(self.is_done, self.stop_layer, self.num_points),
        )

    def copy_(self, other: PairState) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if mine is not theirs:
                mine.copy_(theirs)


DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of the tensors that hold a precision."""

LayerWeights = tuple[Tensor, ...]
Advance = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
Assign = Callable[..., Tensor]


class LightGlueStatic:
    """The weights of a LightGlue, and its steps as functions of fixed shapes.

    `advance` and `assign` are module functions of tensors only, so that one compilation serves every layer; they may be
    replaced by compiled ones.
    """

    def __init__(self, packed: PackedLightGlue, rule: ExitRule, layout: RowLayout, device: torch.device) -> None:
        self.rule, self.layout, self.dtype = rule, layout, packed.dtype
        self.num_heads, self.device = packed.num_heads, device
        self.width = packed.layers[0].match[0].shape[0]
        self.advance: Advance = advance
        self.assign: Assign = assign
        self._input, self._frequencies = packed.input, packed.frequencies
        self._layers = [self._layer_weights(packed, layer) for layer in range(rule.num_layers)]
        self._match_weights = self._stacked_heads(packed)

    def create_state(self, num_rows: int) -> PairState:
        """Buffers for up to `num_rows` points per image."""
        pairs, device = self._frequencies.shape[0], self.device
        return PairState(
            state=torch.zeros((2, num_rows, self.width), device=device),
            cosine=torch.zeros((2, 1, num_rows, pairs), device=device, dtype=self.dtype),
            sine=torch.zeros((2, 1, num_rows, pairs), device=device, dtype=self.dtype),
            is_in=torch.zeros((2, num_rows), device=device, dtype=torch.bool),
            kept=torch.zeros((2, num_rows), device=device, dtype=torch.int64),
            is_done=torch.zeros((), device=device, dtype=torch.bool),
            stop_layer=torch.zeros((), device=device, dtype=torch.int64),
            num_points=torch.zeros((), device=device, dtype=torch.float64),
        )

    def begin(self, rows: Tensor) -> PairState:
        """Before the first layer, of two rows of features (2, length)."""
        header = self.layout.header(rows)
        count, size = header[:, :1], header[:, 1:3]
        descriptors = self.layout.descriptors(rows)
        state = descriptors.contiguous() if self._input is None else F.linear(descriptors, *self._input)
        # As `normalize_keypoints`, with the size of the image taken from the row.
        centred = self.layout.keypoints(rows) - (size / 2)[:, None]
        angles = F.linear(centred / (size.amax(dim=1, keepdim=True) / 2)[:, None], self._frequencies)[:, None]
        positions = torch.arange(self.layout.capacity, device=self.device)
        return PairState(
            state=state,
            cosine=angles.cos().to(self.dtype),
            sine=angles.sin().to(self.dtype),
            is_in=positions < count,
            kept=positions.repeat(2, 1),  # laid out as in the buffers: a compiler makes a graph per layout
            is_done=(count == 0).any(),
            stop_layer=torch.zeros((), dtype=torch.int64, device=self.device),
            num_points=count.sum().to(torch.float64),
        )

    def run_layers(self, pair: PairState, layers: Sequence[int]) -> PairState:
        """After some layers; nothing happens to a pair that is done."""
        state, is_in, is_done, stop_layer = pair.state, pair.is_in, pair.is_done, pair.stop_layer
        for layer in layers:
            state, is_in, is_done, stop_layer = self.advance(
                *(state, pair.cosine, pair.sine, is_in, is_done, stop_layer, pair.num_points),
                self._layers[layer],
                self.num_heads,
                self.rule.depth_confidence < 1,
                self.rule.width_confidence < 1,
            )
        return PairState(state, pair.cosine, pair.sine, is_in, pair.kept, is_done, stop_layer, pair.num_points)

    def result(self, pair: PairState) -> Tensor:
        """(4 + 2 K,) float32: the header, of every point of image 0 its partner or -1, and the probability of that."""
        return self.assign(
            *(pair.state, pair.is_in, pair.kept, pair.is_done, pair.stop_layer),
            self._match_weights,
            self.rule.log_threshold,
            self.layout.capacity,
        )

    def squeezed(self, pair: PairState, num_rows: int) -> PairState:
        """The same with room for fewer points; those that are in move to the front, in their order."""
        order = torch.sort((~pair.is_in).to(torch.uint8), dim=1, stable=True).indices[:, :num_rows]
        wide, encoding = order.unsqueeze(-1), order[:, None, :, None]
        pairs = pair.cosine.shape[-1]
        return PairState(
            state=pair.state.gather(1, wide.expand(-1, -1, self.width)),
            cosine=pair.cosine.gather(2, encoding.expand(-1, -1, -1, pairs)),
            sine=pair.sine.gather(2, encoding.expand(-1, -1, -1, pairs)),
            is_in=pair.is_in.gather(1, order),
            kept=pair.kept.gather(1, order),
            is_done=pair.is_done,
            stop_layer=pair.stop_layer,
            num_points=pair.num_points,
        )

    def _layer_weights(self, packed: PackedLightGlue, layer: int) -> LayerWeights:
        weights, rule = packed.layers[layer], self.rule
        weight, bias = (self._halves_apart(tensor) for tensor in weights.within.projection)
        within = PackedBlock((weight, bias), weights.within.mix, weights.within.norm, weights.within.update)
        numbers = (
            torch.full((), exit_threshold(layer, rule.num_layers), device=self.device),
            torch.full((), 1 - rule.width_confidence, device=self.device),
            torch.full((), rule.depth_confidence, device=self.device, dtype=torch.float64),
            torch.full((), layer == rule.num_layers - 1, device=self.device, dtype=torch.bool),
        )
        return (*_tensors(within), *_tensors(weights.between), *weights.heads, *numbers)

    def _halves_apart(self, rows: Tensor) -> Tensor:
        """Rows of a projection to queries, keys and values, (3 width, ...), those of a channel pair half a head apart.

        Rotating then adds and multiplies whole halves, where pairs side by side would be read with a stride.
        """
        width, head_dim = self.width, self.width // self.num_heads
        order = torch.arange(width, device=rows.device).view(self.num_heads, head_dim // 2, 2)
        order = order.transpose(1, 2).flatten()
        return torch.cat((rows[:width][order], rows[width : 2 * width][order], rows[2 * width :]))

    def _stacked_heads(self, packed: PackedLightGlue) -> tuple[Tensor, ...]:
        """Weights of the assignment of every layer, to be picked on the device by the layer a pair stopped at."""
        layers = packed.layers[: self.rule.num_layers]
        return (
            torch.stack([layer.match[0] for layer in layers]),
            torch.stack([layer.match[1] for layer in layers]),
            torch.stack([layer.heads[0][1] for layer in layers]),
            torch.stack([layer.heads[1][1] for layer in layers]),
        )


def create_static(eager: LightGlue, layout: RowLayout, precision: str) -> LightGlueStatic:
    """The static form of a matcher, with its settings. ValueError for weights that need scales and orientations."""
    if eager.architecture.num_coordinates != 2:
        raise ValueError(f"{eager.name}: needs scales and orientations, which a row of features has not")
    depth, width = eager.confidences
    rule = ExitRule(depth, width, eager.num_layers, eager.log_threshold)
    return LightGlueStatic(eager.packed_in(DTYPES[precision]), rule, layout, eager.device)


def _tensors(block: PackedBlock) -> tuple[Tensor, ...]:
    return (*block.projection, *block.mix, *block.norm, *block.update)


def advance(
    state: Tensor,
    cosine: Tensor,
    sine: Tensor,
    is_in: Tensor,
    is_done: Tensor,
    stop_layer: Tensor,
    num_points: Tensor,
    weights: LayerWeights,
    num_heads: int,
    has_exit: bool,
    drops_points: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, points in play, done or not, and layers run, after one layer; all as before where the pair is done.

    A layer is the self-attention of both images and their cross-attention; arguments as in `PairState`.
    """
    within, between, (head, head_bias) = weights[:8], weights[8:16], weights[16:18]
    threshold, matchable_above, depth_confidence, is_last = weights[18:]
    bias = torch.where(is_in, 0.0, _OUT if state.dtype == within[0].dtype else -3e4).to(within[0].dtype)
    bias = bias[:, None, None, :]
    seen = _attend_within(state, cosine, sine, bias, within, num_heads)
    seen = _attend_between(seen, bias, between, num_heads)
    confidence, matchability = F.linear(seen, head, head_bias).sigmoid().unbind(-1)
    keeps = matchability > matchable_above
    is_exit = is_done
    if has_exit:
        num_open = ((confidence < threshold) & is_in).sum().to(torch.float64)
        is_exit = is_done | ((1.0 - num_open / num_points > depth_confidence) & ~is_last)
        keeps = keeps | (confidence <= threshold)
    now_in = is_in
    if drops_points:
        now_in = torch.where(is_exit | is_last, is_in, is_in & keeps)
    is_exit = is_exit | (now_in.sum(dim=1) == 0).any()
    return (
        torch.where(is_done, state, seen),
        torch.where(is_done, is_in, now_in),
        is_exit,
        torch.where(is_done, stop_layer, stop_layer + 1),
    )


def _attend_within(
    x: Tensor, cosine: Tensor, sine: Tensor, bias: Tensor, weights: tuple[Tensor, ...], num_heads: int
) -> Tensor:
    reduced = x.to(weights[0].dtype)
    query, key, value = (_heads(part, num_heads) for part in F.linear(reduced, *weights[:2]).chunk(3, dim=-1))
    query, key = (_rotated(part, cosine, sine) for part in (query, key))
    message = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return _updated(x, reduced, message, weights)


def _attend_between(x: Tensor, bias: Tensor, weights: tuple[Tensor, ...], num_heads: int) -> Tensor:
    reduced = x.to(weights[0].dtype)
    shared, value = (_heads(part, num_heads) for part in F.linear(reduced, *weights[:2]).chunk(2, dim=-1))
    # Each image looks at the other one of the batch.
    message = F.scaled_dot_product_attention(shared, shared.flip(0), value.flip(0), attn_mask=bias.flip(0))
    return _updated(x, reduced, message, weights)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(2, N, width) -> (2, heads, N, head_dim)."""
    return x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _updated(x: Tensor, reduced: Tensor, message: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    mix, mix_bias, scale, shift, update, update_bias = weights[2:]
    hidden = F.linear(torch.cat((reduced, message.transpose(1, 2).flatten(-2)), dim=-1), mix, mix_bias)
    hidden = F.gelu(F.layer_norm(hidden, hidden.shape[-1:], scale, shift))
    return x + F.linear(hidden, update, update_bias)


def assign(
    state: Tensor,
    is_in: Tensor,
    kept: Tensor,
    is_done: Tensor,
    stop_layer: Tensor,
    weights: tuple[Tensor, ...],
    log_threshold: float,
    capacity: int,
) -> Tensor:
    """The matches of a pair by the heads of the layer it stopped at; see `LightGlueStatic.result`."""
    layer = (stop_layer - 1).clamp(min=0).reshape(1)
    weight, bias, matchable_weight, matchable_bias = (stack.index_select(0, layer)[0] for stack in weights)
    vectors = F.linear(state, weight, bias)
    outside = ~(is_in[0][:, None] & is_in[1][None])
    similarity = (vectors[0] @ vectors[1].T).masked_fill(outside, _OUT)
    matchable = F.logsigmoid(state @ matchable_weight + matchable_bias)
    terms0 = matchable[0][:, None] - log_sum_exp(similarity, 1)
    terms1 = matchable[1][None] - log_sum_exp(similarity, 0)
    log_assignment = (similarity * 2 + terms0 + terms1).masked_fill(outside, -torch.inf)
    best, partners = log_assignment.max(dim=1)
    is_match = (best == log_assignment.amax(dim=0)[partners]) & (best > log_threshold)
    partner = torch.where(is_match, kept[1][partners], -1).to(torch.float32)
    result = torch.empty(RESULT_HEADER + 2 * capacity, device=state.device)
    result[0:1].copy_(stop_layer)
    result[1:3].copy_(is_in.sum(dim=1))
    result[3:4].copy_(is_done)
    partner_of, probability_of = result[RESULT_HEADER:].view(2, capacity)
    partner_of.fill_(-1)
    partner_of.scatter_(0, kept[0], partner)
    probability_of.fill_(0)
    probability_of.scatter_(0, kept[0], best.exp().clamp(max=1.0))
    return result


assert HEADER == 4, "the header of a row is count, width, height and one number to spare"
