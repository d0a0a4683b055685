"""kornia's LightGlue with random weights, a pair of images for it, and how ours is asked for the same."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from frontends.base import Features
from frontends.lightglue_network import build_network, normalize_keypoints
from frontends.lightglue_packed import PackedLightGlue

CONFIGURATIONS = {"256/4/9": (256, 4, 9, 128), "128/2/6": (128, 2, 6, 64), "96/1/6": (96, 1, 6, 64)}
IMAGE_SIZE = (640, 480)


@contextmanager
def one_thread() -> Iterator[None]:
    """The matrices here are too small to share, and other tests may be running."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@functools.cache
def kornia_network(configuration: str, **changes: Any) -> Any:
    """kornia's LightGlue with random weights that match: peaked similarities, spread confidences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightglue = pytest.importorskip("kornia.feature.lightglue")
    width, num_heads, num_layers, input_dim = CONFIGURATIONS[configuration]
    torch.manual_seed(0)
    settings = {"input_dim": input_dim, "descriptor_dim": width, "num_heads": num_heads, "n_layers": num_layers}
    network = lightglue.LightGlue(None, flash=False, **{**settings, **changes}).eval().requires_grad_(False)
    if network.conf.input_dim != width:
        network.input_proj.weight.mul_(10)
    for layer, assignment in enumerate(network.log_assignment):
        assignment.final_proj.weight.mul_(1.8)
        assignment.matchability.weight.mul_(5)
        assignment.matchability.bias.fill_(3.0 - 2.4 * layer / num_layers)
    for layer, confidence in enumerate(network.token_confidence):
        confidence.token[0].weight.mul_(2)
        confidence.token[0].bias.fill_(1.0 + 0.9 * layer)
    return network


def learned(network: Any) -> dict[str, Tensor]:
    return {key: value for key, value in network.state_dict().items() if key != "confidence_thresholds"}


def planted_pair(input_dim: int, count0: int = 180, count1: int = 150, seed: int = 0) -> tuple[Features, Features]:
    """Two views of random points: descriptors and positions of the first 120 come again with some noise."""
    generator = torch.Generator().manual_seed(seed)

    def described(vectors: Tensor, keypoints: Tensor) -> Features:
        unit = torch.nn.functional.normalize(vectors, dim=1)
        return Features(keypoints, torch.ones(len(unit)), unit, len(unit), IMAGE_SIZE, "planted")

    vectors0 = torch.randn(count0, input_dim, generator=generator)
    keypoints0 = torch.rand(count0, 2, generator=generator) * torch.tensor([600.0, 440.0]) + 20
    vectors1 = torch.randn(count1, input_dim, generator=generator)
    keypoints1 = torch.rand(count1, 2, generator=generator) * torch.tensor([600.0, 440.0]) + 20
    shared = min(120, count0, count1)
    vectors1[:shared] = vectors0[:shared] + 0.05 * vectors1[:shared]
    keypoints1[:shared] = keypoints0[:shared] + torch.randn(shared, 2, generator=generator) * 4 - 3
    order = torch.randperm(count1, generator=generator)
    return described(vectors0, keypoints0), described(vectors1[order], keypoints1[order].clamp(0, 479))


def run_kornia(
    network: Any, features0: Features, features1: Features, depth: float = 0.95, width: float = 0.99
) -> dict[str, Any]:
    """kornia's result; a confidence of 1 is what kornia calls -1."""
    network.conf.depth_confidence = depth if depth < 1 else -1
    network.conf.width_confidence = width if width < 1 else -1

    def image(features: Features) -> dict[str, Tensor]:
        count = features.num_valid
        data = {
            "keypoints": features.keypoints[None, :count],
            "descriptors": features.descriptors[None, :count],
            "image_size": torch.tensor([features.image_size]),
        }
        if features.scales is not None and features.orientations is not None:
            data |= {"scales": features.scales[None, :count], "oris": features.orientations[None, :count]}
        return data

    with torch.inference_mode():
        result: dict[str, Any] = network({"image0": image(features0), "image1": image(features1)})
    return result


def coordinates(features: Features) -> Tensor:
    return normalize_keypoints(features.keypoints[: features.num_valid], features.image_size)


def packed_log_assignment(packed: PackedLightGlue, features0: Features, features1: Features) -> Tensor:
    """Inner block after all layers of the rearranged network."""
    pair = (features0, features1)
    spans = packed.spans([f.num_valid for f in pair], torch.device("cpu"))
    state = torch.cat([packed.project(f.descriptors[: f.num_valid]) for f in pair])
    rotations = torch.cat([packed.rotations(coordinates(f)) for f in pair])
    for layer in range(len(packed.layers)):
        state = packed.attend_between(layer, packed.attend_within(layer, state, rotations, spans), *spans)
    return packed.log_assignment(len(packed.layers) - 1, state, *spans)


def plain_log_assignment(state_dict: dict[str, Tensor], features0: Features, features1: Features) -> Tensor:
    network = build_network(state_dict, "test")
    descriptors = (features0.descriptors[None], features1.descriptors[None])
    log_assignment: Tensor = network(*descriptors, coordinates(features0)[None], coordinates(features1)[None])
    return log_assignment
