"""The LightGlue network in its plain form: batched, masked, differentiable, under the published parameter names.

Lindenberger et al., "LightGlue: Local Feature Matching at Light Speed", ICCV 2023, arXiv 2306.13643, section 3. The
matcher in `frontends.lightglue` runs a rearranged copy of the same weights; this form is what training, static
graphs and export build on, and what the rearranged one is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontends.base import WeightsError


@dataclass(frozen=True, slots=True)
class LightGlueArchitecture:
    """What the shapes of a checkpoint say.

    input_dim        length of a descriptor.
    width            length of a point's state inside the network.
    num_heads        attention heads; each has width / num_heads channels, an even number.
    num_layers       layers, each of one self-attention and one cross-attention.
    num_coordinates  2: (x, y) of a keypoint; 4: (x, y, scale, orientation).
    has_confidence   whether there are heads for the exit after every layer.
    """

    input_dim: int
    width: int
    num_heads: int
    num_layers: int
    num_coordinates: int = 2
    has_confidence: bool = True

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


def published_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in float32 under the current parameter names, whatever the release it comes from.

    The first releases (and the published one for XFeat) store `self_attn.3.` where later ones have
    `transformers.3.self_attn.`; a matcher saved with its extractor carries the prefix `matcher.`. The table of
    confidence thresholds follows from the number of layers and is left out.
    """
    prefix = "matcher."
    nested = any(key.startswith(prefix) for key in state_dict)
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if nested and not key.startswith(prefix):
            continue
        parts = key.removeprefix(prefix).split(".")
        if parts[0] in ("self_attn", "cross_attn"):
            parts = ["transformers", parts[1], parts[0], *parts[2:]]
        if parts[0] != "confidence_thresholds":
            renamed[".".join(parts)] = value.to(torch.float32, copy=True)
    return renamed


def read_architecture(state_dict: Mapping[str, Tensor], name: str) -> LightGlueArchitecture:
    """Architecture of a checkpoint under current names; `name` is what an error calls it.

    The number of heads follows from the positional encoding, which holds half a head's channels.
    Raises WeightsError if this is no LightGlue.
    """
    try:
        width = state_dict["log_assignment.0.final_proj.weight"].shape[0]
        num_frequencies, num_coordinates = state_dict["posenc.Wr.weight"].shape
    except KeyError as error:
        raise WeightsError(f"{name}: not a LightGlue checkpoint, it has no {error.args[0]}") from None
    if width % (2 * num_frequencies):
        raise WeightsError(f"{name}: width {width} is not a multiple of {2 * num_frequencies} channels per head")
    projection = state_dict.get("input_proj.weight")
    return LightGlueArchitecture(
        input_dim=width if projection is None else projection.shape[1],
        width=width,
        num_heads=width // (2 * num_frequencies),
        num_layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("log_assignment.")),
        num_coordinates=num_coordinates,
        has_confidence=any(key.startswith("token_confidence.") for key in state_dict),
    )


def normalize_keypoints(keypoints: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Keypoints (..., 2) px with the centre of a (width, height) image at 0 and its longer side from -1 to 1."""
    size = keypoints.new_tensor(image_size)
    return (keypoints - size / 2) / (size.max() / 2)


def rotate_pairs(x: Tensor) -> Tensor:
    """Turn every channel pair (a, b) of (..., C) by a right angle, into (-b, a)."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)


class FourierEncoding(nn.Module):
    """Angles by which self-attention turns the channel pairs of queries and keys (section 3.1, "Positional")."""

    def __init__(self, num_coordinates: int, head_dim: int) -> None:
        super().__init__()
        self.Wr = nn.Linear(num_coordinates, head_dim // 2, bias=False)

    def forward(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, num_coordinates) -> cosine and sine (B, 1, N, head_dim), each value twice: for both of a pair."""
        angles = self.Wr(coordinates).repeat_interleave(2, dim=-1).unsqueeze(-3)
        return angles.cos(), angles.sin()


def feed_forward(width: int) -> nn.Sequential:
    """The network that turns (state, message) into an update of the state."""
    hidden = 2 * width
    return nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, width))


class SelfAttention(nn.Module):
    """Attention among the points of one image, relative in position through rotary encoding."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.ffn = feed_forward(width)

    def forward(self, x: Tensor, encoding: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x (B, N, width), encoding two of (B, 1, N, head_dim), mask (B, N) True where valid -> (B, N, width)."""
        cosine, sine = encoding
        batch, count, _ = x.shape
        query, key, value = self.Wqkv(x).view(batch, count, self.num_heads, -1, 3).transpose(1, 2).unbind(-1)
        query = query * cosine + rotate_pairs(query) * sine
        key = key * cosine + rotate_pairs(key) * sine
        message = self.out_proj(attend(query, key, value, mask))
        return cast(Tensor, x + self.ffn(torch.cat((x, message), dim=-1)))


class CrossAttention(nn.Module):
    """Attention between two images; a point's query and key are the same vector."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qk = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.ffn = feed_forward(width)

    def forward(self, x0: Tensor, x1: Tensor, mask0: Tensor | None, mask1: Tensor | None) -> tuple[Tensor, Tensor]:
        """x0 (B, M, width), x1 (B, N, width), masks (B, M) and (B, N) -> both after the exchange."""
        qk0, qk1 = self._heads(self.to_qk(x0)), self._heads(self.to_qk(x1))
        v0, v1 = self._heads(self.to_v(x0)), self._heads(self.to_v(x1))
        message0 = self.to_out(attend(qk0, qk1, v1, mask1))
        message1 = self.to_out(attend(qk1, qk0, v0, mask0))
        return x0 + self.ffn(torch.cat((x0, message0), dim=-1)), x1 + self.ffn(torch.cat((x1, message1), dim=-1))

    def _heads(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        return x.view(batch, count, self.num_heads, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of (B, H, M, C) over the valid ones of N -> (B, M, H C).

    Invalid points get a very low but finite logit, so that an image without a single valid point stays finite.
    """
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min / 2)
        bias = bias[:, None, None, :].expand(-1, -1, query.shape[-2], -1)
    attended = F.scaled_dot_product_attention(query.contiguous(), key.contiguous(), value.contiguous(), attn_mask=bias)
    return attended.transpose(1, 2).flatten(-2)


class TransformerLayer(nn.Module):
    """Self-attention in both images, then cross-attention between them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads)
        self.cross_attn = CrossAttention(width, num_heads)


class TokenConfidence(nn.Module):
    """How likely it is that a point's match at this layer is what the last layer will say (section 3.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.Linear(width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N) in [0, 1]; no gradient reaches the states."""
        return cast(Tensor, self.token(x.detach())[..., 0])


class MatchAssignment(nn.Module):
    """Similarity and matchability of points, combined into a soft assignment (section 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matchability = nn.Linear(width, 1)
        self.final_proj = nn.Linear(width, width)

    def forward(self, x0: Tensor, x1: Tensor, mask0: Tensor | None, mask1: Tensor | None) -> Tensor:
        """States (B, M, width), (B, N, width) -> log assignment (B, M + 1, N + 1).

        The inner block is the log of the soft partial assignment, -inf where either point is invalid; the last
        column and row hold the log probability that a point has no match.
        """
        scale = x0.shape[-1] ** -0.25
        similarity = (self.final_proj(x0) * scale) @ (self.final_proj(x1) * scale).mT
        invalid = None if mask0 is None or mask1 is None else ~(mask0[:, :, None] & mask1[:, None, :])
        if invalid is not None:
            similarity = similarity.masked_fill(invalid, torch.finfo(similarity.dtype).min / 2)
        logit0, logit1 = self.matchability(x0), self.matchability(x1)
        inner = F.log_softmax(similarity, dim=2) + F.log_softmax(similarity, dim=1)
        inner = inner + F.logsigmoid(logit0) + F.logsigmoid(logit1).mT
        if invalid is not None:
            inner = inner.masked_fill(invalid, -torch.inf)
        bottom = F.pad(F.logsigmoid(-logit1).mT, (0, 1))
        return torch.cat((torch.cat((inner, F.logsigmoid(-logit0)), dim=2), bottom), dim=1)


class LightGlueNetwork(nn.Module):
    """All layers of a LightGlue of any size; loads a state dict under current names strictly."""

    def __init__(self, architecture: LightGlueArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        width, num_layers = architecture.width, architecture.num_layers
        projects = architecture.input_dim != width
        self.input_proj = nn.Linear(architecture.input_dim, width) if projects else nn.Identity()
        self.posenc = FourierEncoding(architecture.num_coordinates, architecture.head_dim)
        self.transformers = nn.ModuleList(TransformerLayer(width, architecture.num_heads) for _ in range(num_layers))
        self.log_assignment = nn.ModuleList(MatchAssignment(width) for _ in range(num_layers))
        num_exits = num_layers - 1 if architecture.has_confidence else 0
        self.token_confidence = nn.ModuleList(TokenConfidence(width) for _ in range(num_exits))

    def states(
        self,
        descriptors0: Tensor,
        descriptors1: Tensor,
        coordinates0: Tensor,
        coordinates1: Tensor,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the states (B, M, width) and (B, N, width) after every layer.

        descriptors (B, M, input_dim); coordinates (B, M, num_coordinates), the first two as `normalize_keypoints`
        gives them, then scale in px and orientation in rad where the weights use them; mask (B, M) bool, True
        where there is a point: what the others hold changes nothing for the valid ones.
        """
        x0, x1 = self.input_proj(descriptors0), self.input_proj(descriptors1)
        encoding0, encoding1 = self.posenc(coordinates0), self.posenc(coordinates1)
        for layer in self.transformers:
            transformer = cast(TransformerLayer, layer)
            x0 = transformer.self_attn(x0, encoding0, mask0)
            x1 = transformer.self_attn(x1, encoding1, mask1)
            x0, x1 = transformer.cross_attn(x0, x1, mask0, mask1)
            yield x0, x1

    def forward(
        self,
        descriptors0: Tensor,
        descriptors1: Tensor,
        coordinates0: Tensor,
        coordinates1: Tensor,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
    ) -> Tensor:
        """Log assignment (B, M + 1, N + 1) of the last layer; arguments as in `states`."""
        *_, (x0, x1) = self.states(descriptors0, descriptors1, coordinates0, coordinates1, mask0, mask1)
        return cast(Tensor, self.log_assignment[-1](x0, x1, mask0, mask1))


def build_network(state_dict: Mapping[str, Tensor], name: str) -> LightGlueNetwork:
    """Network with the weights of a checkpoint of any release, in evaluation mode and float32.

    Raises WeightsError naming the first parameter that is missing, unexpected or of another shape.
    """
    renamed = published_names(state_dict)
    with torch.device("meta"):  # Nothing to initialize: every parameter comes from the file.
        network = LightGlueNetwork(read_architecture(renamed, name))
    expected = network.state_dict()
    for key in sorted(expected.keys() | renamed.keys()):
        have = tuple(renamed[key].shape) if key in renamed else "nothing"
        want = tuple(expected[key].shape) if key in expected else "nothing"
        if have != want:
            raise WeightsError(f"{name}: parameter {key}: expected {want}, got {have}; the file is not complete")
    network.load_state_dict(renamed, assign=True)
    return network.eval().requires_grad_(False)
