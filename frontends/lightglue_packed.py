"""LightGlue rearranged for matching one pair: the same function as the plain network in fewer and larger operations.

The points of both images stand below each other in one matrix, so that every linear map runs once for both. The
output projection of attention has no nonlinearity before the feed-forward network and is multiplied into its first
map. Channel pairs are complex numbers, which makes the rotary encoding one product. Matrix products and attention run
in a chosen precision; states, rotations and the assignment stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontends.lightglue_network import (
    LightGlueNetwork,
    MatchAssignment,
    TokenConfidence,
    TransformerLayer,
)

GRANULARITY = 64
"""Rows that images are padded to a multiple of in reduced precision.

The libraries behind it generate code for every new matrix shape, which takes ten times as long as the product itself;
the number of points changes with every frame.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Where the points of one image stand among the rows of a packed matrix.

    rows    all rows of the image; those after its points are padding.
    points  the rows that hold points, at least one.
    bias    (1, 1, 1, rows) 0 for points and -inf for padding, None without padding.
    """

    rows: slice
    points: slice
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class PackedBlock:
    """Weights of one attention with its feed-forward network, (out, in) as `F.linear` takes them.

    projection  state to queries, keys and values, every one head by head.
    mix         (state, attended values) to the hidden layer.
    norm        scale and shift of the layer norm.
    update      hidden layer to the change of the state.
    """

    projection: tuple[Tensor, Tensor]
    mix: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]
    update: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayer:
    """Weights of one layer: the blocks in the chosen precision, the heads in float32.

    heads  state to the logits of confidence and matchability; the confidence is 0 where the network has no head.
    match  state to the vector whose products are similarities.
    """

    within: PackedBlock
    between: PackedBlock
    heads: tuple[Tensor, Tensor]
    match: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLightGlue:
    """All weights, ready to run on one pair.

    granularity  every image is padded to a multiple of this many rows.
    """

    dtype: torch.dtype
    granularity: int
    num_heads: int
    input: tuple[Tensor, Tensor] | None
    frequencies: Tensor
    layers: tuple[PackedLayer, ...]

    def spans(self, counts: Sequence[int], device: torch.device) -> tuple[Span, ...]:
        """Rows for images with these numbers of points, one after the other."""
        spans: list[Span] = []
        start = 0
        for count in counts:
            size = -(-count // self.granularity) * self.granularity
            bias = None
            if size > count:
                bias = torch.zeros((1, 1, 1, size), dtype=self.dtype, device=device)
                bias[..., count:] = -torch.inf
            spans.append(Span(slice(start, start + size), slice(start, start + count), bias))
            start += size
        return tuple(spans)

    def rotations(self, coordinates: Tensor) -> Tensor:
        """Coordinates (N, num_coordinates) -> complex64 (N, 1, head_dim / 2) of modulus one."""
        angles = F.linear(coordinates, self.frequencies)
        return torch.polar(torch.ones_like(angles), angles)[:, None]

    def project(self, descriptors: Tensor) -> Tensor:
        """Descriptors (N, input_dim) float32 -> states (N, width)."""
        return descriptors if self.input is None else F.linear(descriptors, *self.input)

    def attend_within(self, layer: int, x: Tensor, rotations: Tensor, spans: Sequence[Span]) -> Tensor:
        """Self-attention of the states (N, width) of any number of images."""
        block, width = self.layers[layer].within, x.shape[1]
        inputs, projected = self._project(x, block)
        turned = rotate(projected[:, : 2 * width], rotations).to(self.dtype)
        queries, keys, values = turned[:, :width], turned[:, width:], projected[:, 2 * width :]
        for span in spans:
            rows = span.rows
            inputs[rows, width:] = attend(queries[rows], keys[rows], values[rows], span.bias, self.num_heads)
        return updated(x, inputs, block)

    def attend_between(self, layer: int, x: Tensor, span0: Span, span1: Span) -> Tensor:
        """Cross-attention of the states (N, width) of two images."""
        block, width = self.layers[layer].between, x.shape[1]
        inputs, projected = self._project(x, block)
        shared, values = projected[:, :width], projected[:, width:]
        for span, other in ((span0, span1), (span1, span0)):
            message = attend(shared[span.rows], shared[other.rows], values[other.rows], other.bias, self.num_heads)
            inputs[span.rows, width:] = message
        return updated(x, inputs, block)

    def _project(self, x: Tensor, block: PackedBlock) -> tuple[Tensor, Tensor]:
        """The input (N, 2 width) of the feed-forward network, its first half filled, and the projected states."""
        inputs = x.new_empty((len(x), 2 * x.shape[1]), dtype=self.dtype)
        inputs[:, : x.shape[1]] = x
        return inputs, F.linear(inputs[:, : x.shape[1]], *block.projection)

    def decisions(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and matchability (N,), both in [0, 1], of states (N, width)."""
        probabilities = F.linear(x, *self.layers[layer].heads).sigmoid()
        return probabilities[:, 0], probabilities[:, 1]

    def log_assignment(self, layer: int, x: Tensor, span0: Span, span1: Span) -> Tensor:
        """Inner block (count 0, count 1) of the log assignment; the unmatched column and row are not made."""
        vectors = F.linear(x, *self.layers[layer].match)
        similarity = vectors[span0.points] @ vectors[span1.points].T
        weight, bias = self.layers[layer].heads
        matchable = F.logsigmoid(x @ weight[1] + bias[1])
        # 2 s - (log sum over the row) - (log sum over the column), plus what either point says of being matched.
        terms0 = matchable[span0.points, None] - log_sum_exp(similarity, 1)
        terms1 = matchable[None, span1.points] - log_sum_exp(similarity, 0)
        return similarity.mul_(2).add_(terms0).add_(terms1)


def rotate(channels: Tensor, rotations: Tensor) -> Tensor:
    """Turn the channel pairs of (N, heads x head_dim) by the rotations (N, 1, head_dim / 2); float32."""
    count, _, pairs = rotations.shape
    as_complex = torch.view_as_complex(channels.to(torch.float32).reshape(count, -1, pairs, 2))
    return torch.view_as_real(as_complex * rotations).view(count, -1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """Softmax attention of (M, width) over (N, width), head by head -> (M, width)."""
    query, key, value = (t.view(len(t), num_heads, -1).transpose(0, 1)[None] for t in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended[0].transpose(0, 1).reshape(query.shape[2], -1)


def updated(x: Tensor, inputs: Tensor, block: PackedBlock) -> Tensor:
    """States (N, width) after the feed-forward network has seen them and what they attended to, (N, 2 width)."""
    hidden = F.linear(inputs, *block.mix)
    hidden = F.gelu(F.layer_norm(hidden, hidden.shape[1:], *block.norm))
    return x + F.linear(hidden, *block.update)


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Log of the sum of the exponentials of a matrix, the dimension kept.

    Several times faster on the CPU than torch.logsumexp. What is e^80 below the largest adds nothing in float32, and
    exponentials further down are denormal numbers, which are slow.
    """
    largest = x.amax(dim, keepdim=True)
    return (x - largest).clamp_(min=-80).exp_().sum(dim, keepdim=True).log_().add_(largest)


def pack(network: LightGlueNetwork, dtype: torch.dtype) -> PackedLightGlue:
    """The weights of a network, rearranged, with the blocks in `dtype`."""
    projection = network.input_proj
    layers = []
    for index, module in enumerate(network.transformers):
        transformer = cast(TransformerLayer, module)
        assignment = cast(MatchAssignment, network.log_assignment[index])
        has_exit = index < len(network.token_confidence)
        confidence = cast(TokenConfidence, network.token_confidence[index]) if has_exit else None
        layers.append(
            PackedLayer(
                _pack_within(transformer, dtype),
                _pack_between(transformer, dtype),
                _pack_heads(assignment, confidence),
                _scaled(_linear(assignment.final_proj), network.architecture.width**-0.25),
            )
        )
    return PackedLightGlue(
        dtype=dtype,
        granularity=1 if dtype == torch.float32 else GRANULARITY,
        num_heads=network.architecture.num_heads,
        input=_linear(projection) if isinstance(projection, nn.Linear) else None,
        frequencies=network.posenc.Wr.weight,
        layers=tuple(layers),
    )


def _linear(module: nn.Linear) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _scaled(weights: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return weights[0] * scale, weights[1] * scale


def _pack_within(layer: TransformerLayer, dtype: torch.dtype) -> PackedBlock:
    attention = layer.self_attn
    # Published rows alternate between query, key and value; here all queries come first, then keys, then values.
    weight, bias = (torch.cat((t[0::3], t[1::3], t[2::3])) for t in _linear(attention.Wqkv))
    return _pack_block((weight, bias), attention.out_proj, attention.ffn, dtype)


def _pack_between(layer: TransformerLayer, dtype: torch.dtype) -> PackedBlock:
    attention = layer.cross_attn
    pairs = zip(_linear(attention.to_qk), _linear(attention.to_v), strict=True)
    weight, bias = (torch.cat(pair) for pair in pairs)
    return _pack_block((weight, bias), attention.to_out, attention.ffn, dtype)


def _pack_block(
    projection: tuple[Tensor, Tensor], output: nn.Linear, ffn: nn.Sequential, dtype: torch.dtype
) -> PackedBlock:
    first, norm, last = cast(nn.Linear, ffn[0]), cast(nn.LayerNorm, ffn[1]), cast(nn.Linear, ffn[3])
    of_state, of_message = first.weight.chunk(2, dim=1)
    mix = (torch.cat((of_state, of_message @ output.weight), dim=1), first.bias + of_message @ output.bias)

    def reduced(weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return weights[0].to(dtype), weights[1].to(dtype)

    return PackedBlock(reduced(projection), reduced(mix), reduced((norm.weight, norm.bias)), reduced(_linear(last)))


def _pack_heads(assignment: MatchAssignment, confidence: TokenConfidence | None) -> tuple[Tensor, Tensor]:
    weight, bias = _linear(assignment.matchability)
    if confidence is None:
        return torch.cat((torch.zeros_like(weight), weight)), torch.cat((torch.full_like(bias, -torch.inf), bias))
    confidence_weight, confidence_bias = _linear(cast(nn.Linear, confidence.token[0]))
    return torch.cat((confidence_weight, weight)), torch.cat((confidence_bias, bias))
