"""Pairs of views of layered scenes with exact correspondence, made on the device in batches.

A scene is a background photograph and cut-outs of others in front of it; every layer moves by a homography of its own,
so that the front ones hide and uncover what is behind (parallax). Without cut-outs it is the homographic pair of the
ALIKED and LightGlue trainings; with small motions it is two frames of a video.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from frontends.base import check_settings, setting
from frontends.training.pairs_homography import (
    MotionConfig,
    composed,
    inverted,
    is_inside,
    pixel_grid,
    random_homographies,
    sampled,
    transformed,
)
from frontends.training.photometry import PhotometryConfig, relit
from frontends.training.photos import PhotoBank

_HARMONICS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """Where points of one view lie in the other.

    points      (B, N, 2) px; infinite behind the camera.
    is_visible  (B, N) bool: inside the other view and not hidden there.
    is_known    (B, N) bool: whether that is certain; it is not at the edges of layers.
    """

    points: Tensor
    is_visible: Tensor
    is_known: Tensor


@dataclass(frozen=True, slots=True)
class LayersConfig:
    """Which scenes, and how the second view differs from the first."""

    size: tuple[int, int] = (256, 256)
    max_cutouts: int = setting(3, minimum=0, maximum=8, help="in front of the background")
    cutout_share: float = setting(0.7, minimum=0.0, maximum=1.0, help="probability of each cut-out to be there")
    video_share: float = setting(0.4, minimum=0.0, maximum=1.0, help="of pairs with small motions, as between frames")
    edge_px: float = setting(2.0, minimum=0.0, help="around the edges of layers nothing is known, px")

    def __post_init__(self) -> None:
        check_settings(self)


WIDE = MotionConfig()
VIDEO = MotionConfig(rotation_deg=4.0, spin=0.0, scale=1.12, shear=0.03, perspective=0.06, shift=0.06)
# What a cut-out does on top of the motion of the camera.
PARALLAX = MotionConfig(rotation_deg=3.0, spin=0.0, scale=1.15, shear=0.05, perspective=0.08, shift=0.08)
PLACEMENT = MotionConfig(rotation_deg=15.0, spin=0.0, scale=1.3, shear=0.1, perspective=0.2, shift=0.3)


@dataclass(frozen=True, slots=True, eq=False)
class LayeredPairs:
    """B pairs of views of (width, height) px.

    images0, images1  (B, 3, H, W) in [0, 1].
    to_photo          (2, B, L, 3, 3): px of a view to px of the photograph of a layer; layer 0 is the background, and a
                      higher one is in front of a lower one.
    outlines          (B, L, 4 + 2 * harmonics): whether the layer is there, centre (x, y) and mean radius in px of its
                      photograph, amplitudes and phases of the outline. The background's are not used.
    """

    images0: Tensor
    images1: Tensor
    to_photo: Tensor
    outlines: Tensor
    edge_px: float

    @property
    def size(self) -> tuple[int, int]:
        return self.images0.shape[3], self.images0.shape[2]

    def layers_at(self, side: int, points: Tensor) -> Tensor:
        """(B, N) int64: the layer that is seen at points (B, N, 2) px of view 0 or 1."""
        return _front_layer(self.to_photo[side], self.outlines, points)

    def transfer(self, side: int, points: Tensor) -> Transfer:
        """Where points (B, N, 2) px of view `side` lie in the other one."""
        layer = self.layers_at(side, points)
        motions = composed(inverted(self.to_photo[1 - side]), self.to_photo[side])
        moved = transformed(motions, points[:, None].expand(-1, motions.shape[1], -1, -1))
        index = layer[:, None, :, None].expand(-1, 1, -1, 2)
        there = moved.gather(1, index)[:, 0]
        inside = is_inside(there, self.size)
        seen = torch.where(inside[..., None], there, 0.0)
        visible = inside & (self.layers_at(1 - side, seen) == layer)
        known = self._is_clear(side, points, layer) & (~visible | self._is_clear(1 - side, seen, layer))
        return Transfer(there, visible, known)

    def _is_clear(self, side: int, points: Tensor, layer: Tensor) -> Tensor:
        """(B, N) bool: the same layer all around."""
        clear = torch.ones_like(layer, dtype=torch.bool)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            step = points.new_tensor([dx, dy]) * self.edge_px
            clear &= self.layers_at(side, points + step) == layer
        return clear


def _front_layer(to_photo: Tensor, outlines: Tensor, points: Tensor) -> Tensor:
    """(B, N): the foremost layer whose outline holds the point; layer 0 holds everything."""
    num_layers = outlines.shape[1]
    places = transformed(to_photo, points[:, None].expand(-1, num_layers, -1, -1))
    holds = inside_outline(outlines, places)
    holds[:, 0] = True
    order = torch.arange(num_layers, device=points.device)[None, :, None]
    return torch.where(holds, order, 0).amax(dim=1)


def inside_outline(outlines: Tensor, places: Tensor) -> Tensor:
    """(B, L, N) bool: whether places (B, L, N, 2) px of the photographs lie in the outlines (B, L, P)."""
    presence, centre, radius = outlines[..., 0, None], outlines[..., None, 1:3], outlines[..., 3, None]
    amplitudes, phases = outlines[..., 4:].chunk(2, dim=-1)
    offset = places - centre
    angle = torch.atan2(offset[..., 1], offset[..., 0])
    orders = torch.arange(1, _HARMONICS + 1, device=places.device)
    waves = (amplitudes[..., None, :] * torch.cos(angle[..., None] * orders + phases[..., None, :])).sum(dim=-1)
    distance = torch.linalg.vector_norm(offset, dim=-1)
    is_within: Tensor = distance < radius * (1 + waves)
    return (presence > 0) & torch.isfinite(distance) & is_within


def layered_pairs(
    bank: PhotoBank,
    count: int,
    generator: torch.Generator,
    config: LayersConfig,
    photometry: PhotometryConfig,
    motion: MotionConfig = WIDE,
    video: MotionConfig = VIDEO,
) -> LayeredPairs:
    """`count` pairs of random scenes; without photometric change where `photometry` has none."""
    num_layers = 1 + config.max_cutouts
    photos = bank.draw(count * num_layers, generator)
    device, side_px = photos.device, photos.shape[3]
    placed = _placements(count, num_layers, side_px, generator, config, device)
    is_video = torch.rand(count, generator=generator, device=device) < config.video_share
    camera = torch.where(
        is_video[:, None, None],
        random_homographies(count, config.size, generator, video, device),
        random_homographies(count, config.size, generator, motion, device),
    )
    parallax = random_homographies(count * num_layers, config.size, generator, PARALLAX, device)
    parallax = parallax.view(count, num_layers, 3, 3)
    parallax[:, 0] = torch.eye(3, device=device)
    moved = composed(placed, inverted(composed(parallax, camera[:, None])))
    to_photo = torch.stack((placed, moved))
    outlines = random_outlines(count, num_layers, side_px, generator, config, device)
    views = [rendered(photos, to_photo[side], outlines, config.size) for side in (0, 1)]
    if photometry.noise > 0 or photometry.contrast > 1:
        views = [relit(view, generator, photometry) for view in views]
    return LayeredPairs(views[0], views[1], to_photo, outlines, config.edge_px)


def _placements(
    count: int,
    num_layers: int,
    photo_px: int,
    generator: torch.Generator,
    config: LayersConfig,
    device: torch.device,
) -> Tensor:
    """(count, L, 3, 3): px of view 0 to px of the photographs: fitted, then moved about at random."""
    width, height = config.size
    fit = torch.eye(3, device=device)
    scale = photo_px / max(width, height)
    fit[0, 0] = fit[1, 1] = scale
    fit[0, 2], fit[1, 2] = (photo_px - scale * width) / 2, (photo_px - scale * height) / 2
    motions = random_homographies(count * num_layers, config.size, generator, PLACEMENT, device)
    return composed(fit, motions.view(count, num_layers, 3, 3))


def random_outlines(
    count: int, num_layers: int, photo_px: int, generator: torch.Generator, config: LayersConfig, device: torch.device
) -> Tensor:
    """(count, L, 4 + 2 * harmonics) rough blobs somewhere in their photographs; see `LayeredPairs.outlines`."""

    def uniform(low: float, high: float, size: int = 1) -> Tensor:
        return low + (high - low) * torch.rand((count, num_layers, size), generator=generator, device=device)

    presence = (uniform(0, 1) < config.cutout_share).float()
    centre = uniform(0.15, 0.85, 2) * photo_px
    radius = uniform(0.08, 0.25) * photo_px
    amplitudes = uniform(-0.15, 0.15, _HARMONICS)
    return torch.cat((presence, centre, radius, amplitudes, uniform(0, 2 * math.pi, _HARMONICS)), dim=2)


def rendered(photos: Tensor, to_photo: Tensor, outlines: Tensor, size: tuple[int, int]) -> Tensor:
    """Views (B, 3, H, W) of scenes: photos (B L, 3, S, S), to_photo (B, L, 3, 3), outlines (B, L, P)."""
    batch, num_layers = outlines.shape[:2]
    grid = pixel_grid(size, photos.device).expand(batch, -1, -1)
    layer = _front_layer(to_photo, outlines, grid)
    places = transformed(to_photo, grid[:, None].expand(-1, num_layers, -1, -1))
    places = places.clamp(-4e3, 4e3).flatten(0, 1)
    colours = sampled(photos, places, padding="reflection").view(batch, num_layers, 3, -1)
    view = colours.gather(1, layer[:, None, None, :].expand(-1, 1, 3, -1))[:, 0]
    return view.view(batch, 3, size[1], size[0])
