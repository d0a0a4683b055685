"""Train a fine matcher for XFeat* on homographic pairs of photographs, where the published one is not at hand.

    python tools/train_xfeat_star.py --photos DIR --output xfeat-star.pt --minutes 3

Writes the weights of the backbone, which stay as they are, with a new fine matcher; the fine matcher alone, in float16,
where the name ends in .safetensors. Prints how far the offsets of held-out pairs are off with it, and without any (the
corner of the cell).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Read when torch is loaded. Threads that spin where they wait cost a training up to three quarters of its speed on a
# machine that has anything else to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from packaged_weights import write_weights
from torch import Tensor, nn
from train_r2d2 import find_photos

from frontends.base import VoError
from frontends.training.fine_offsets import cell_pairs, fine_matcher
from frontends.training.homographic_pairs import WarpConfig, homographic_pair
from frontends.weights import load_state_dict
from frontends.xfeat import gray_batch
from frontends.xfeat_network import CELL_PX, XFeatNetwork, load_network
from frontends.xfeat_star import SHARPNESS, refine

_SIDE_PX = 256
_PAIRS = 4
_NUM_HELD_OUT = 24
_LEARNING_RATE = 1e-3
_REPORT_S = 10.0
_WARP = WarpConfig(rotation_deg=10.0, scale=1.25, shear=0.1, perspective=0.15, shift=0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    data = os.environ.get("LIGHTVO_DATA")
    parser = argparse.ArgumentParser(description="Train a fine matcher for XFeat*.")
    parser.add_argument("--photos", type=Path, default=Path(data) / "photos" if data else None, required=not data)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        state_dict, _ = load_state_dict("xfeat")
        photos = find_photos(options.photos, _SIDE_PX)
    except VoError as error:
        print(f"train_xfeat_star: error: {error}", file=sys.stderr)
        return 2
    network = load_network(state_dict, torch.device("cpu"))
    matcher, held_out = train(network, photos, options.minutes, options.steps, options.seed)
    own = {f"fine_matcher.{name}": tensor for name, tensor in matcher.state_dict().items()}
    backbone = {name: tensor for name, tensor in state_dict.items() if not name.startswith("fine_matcher.")}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.suffix == ".safetensors":
        write_weights(own, options.output, _described(held_out, len(photos)))
    else:
        torch.save({**backbone, **own}, options.output)
    print(f"median error on held-out pairs: {held_out[1]:.2f} px, {held_out[0]:.2f} px without; {options.output}")
    return 0


def _described(held_out: tuple[float, float], num_photos: int) -> dict[str, str]:
    return {
        "architecture": "XFeat* fine matcher, key names of verlab/accelerated_features: 128-512-512-512-512-64",
        "fits": "xfeat-star",
        "data": f"{num_photos} still photographs, homographic pairs made on the fly",
        "recipe": f"frozen xfeat descriptors, cross-entropy over the 64 px of a cell, Adam {_LEARNING_RATE} to zero as "
        f"half a cosine, {_PAIRS} pairs of {_SIDE_PX} px a step",
        "measured": f"median error on held-out pairs {held_out[1]:.2f} px, {held_out[0]:.2f} px without",
    }


def train(
    network: XFeatNetwork, photos: Sequence[NDArray[np.uint8]], minutes: float, steps: int, seed: int
) -> tuple[nn.Sequential, tuple[float, float]]:
    """The trained fine matcher, and median errors in px on held-out pairs: of the corners, and refined."""
    torch.manual_seed(seed)
    matcher, generator = fine_matcher(), np.random.default_rng(seed)
    num_held_out = min(_NUM_HELD_OUT, len(photos) // 2)
    held_out, photos = photos[:num_held_out], photos[num_held_out:]
    optimiser = torch.optim.Adam(matcher.parameters(), lr=_LEARNING_RATE)
    start_s, reported_s = time.monotonic(), 0.0
    for step in range(steps):
        elapsed_s = time.monotonic() - start_s
        share = max(step / steps, elapsed_s / (60 * minutes))
        if share >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * share))
        chosen = [photos[index] for index in generator.integers(len(photos), size=_PAIRS)]
        descriptors, classes = examples(network, chosen, generator)
        loss = F.cross_entropy(SHARPNESS * matcher(descriptors), classes)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if elapsed_s - reported_s > _REPORT_S:
            reported_s = elapsed_s
            print(f"step {step + 1}, {elapsed_s:.0f} s: loss {loss.detach():.3f}", file=sys.stderr, flush=True)
    return matcher.eval(), errors_px(network, matcher, held_out, seed + 1)


@torch.no_grad()
def examples(
    network: XFeatNetwork, photos: Sequence[NDArray[np.uint8]], generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Descriptors (M, 128) of corresponding cells and the classes (M,) of their offsets, one pair of every photo."""
    descriptors, classes = [], []
    for photo in photos:
        pair = homographic_pair(photo, _SIDE_PX, generator, _WARP)
        cells = cell_pairs(torch.from_numpy(pair.flow))
        # The flow leads from view 0 to view 1; the fine matcher refines in the image that it leads to.
        maps1, maps0 = (
            network(gray_batch(image, "cpu")).descriptors.flatten(0, 2) for image in (pair.image0, pair.image1)
        )
        descriptors.append(torch.cat((maps0[cells.cells0], maps1[cells.cells1]), dim=1))
        classes.append(cells.classes)
    return torch.cat(descriptors), torch.cat(classes)


@torch.no_grad()
def errors_px(
    network: XFeatNetwork, matcher: nn.Sequential, photos: Sequence[NDArray[np.uint8]], seed: int
) -> tuple[float, float]:
    """Median distance in px from the true offset: of none at all, and of the refined one."""
    descriptors, classes = examples(network, photos, np.random.default_rng(seed))
    true = torch.stack((classes % CELL_PX, classes // CELL_PX), dim=1) - CELL_PX // 2
    offsets, _ = refine(matcher(descriptors))
    return tuple(  # type: ignore[return-value]
        float(torch.linalg.vector_norm((guess - true).float(), dim=1).median()) for guess in (torch.zeros(2), offsets)
    )


if __name__ == "__main__":
    sys.exit(main())
