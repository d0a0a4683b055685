"""What happens to light between the world and a file, on batches on the device: exposure, blur, noise, compression."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from frontends.base import check_settings, setting

_BLOCK_PX = 8
_KERNEL_PX = 9


@dataclass(frozen=True, slots=True)
class PhotometryConfig:
    """How much images change: the largest value of each, drawn evenly up to it (ratios: evenly in the logarithm)."""

    contrast: float = setting(1.5, minimum=1.0, maximum=4.0, help="ratio, either way")
    brightness: float = setting(0.15, minimum=0.0, maximum=1.0, help="added, share of the range, either way")
    gamma: float = setting(1.5, minimum=1.0, maximum=4.0, help="exponent, either way")
    colour: float = setting(1.2, minimum=1.0, maximum=4.0, help="ratio between the channels, either way")
    illumination: float = setting(0.3, minimum=0.0, maximum=1.0, help="of a smooth field, either way")
    noise: float = setting(0.03, minimum=0.0, maximum=1.0, help="deviation, share of the range")
    blur_px: float = setting(1.2, minimum=0.0, maximum=3.0, help="deviation of a Gaussian, px")
    motion_px: float = setting(7.0, minimum=0.0, maximum=9.0, help="length of a motion blur, px")
    quantisation: float = setting(0.15, minimum=0.0, maximum=1.0, help="step of the block transform, share of range")
    probability: float = setting(0.33, minimum=0.0, maximum=1.0, help="of each kind of blur, and of compression")
    grey: float = setting(0.4, minimum=0.0, maximum=1.0, help="share of images without colour")

    def __post_init__(self) -> None:
        check_settings(self)


NO_CHANGE = PhotometryConfig(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def relit(images: Tensor, generator: torch.Generator, config: PhotometryConfig) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as another camera might have taken them, each with changes of its own."""
    draw = _Draws(generator, len(images), images.device)
    images = images.clamp(1e-4, 1.0) ** draw.ratio(config.gamma)
    images = images * draw.ratio(config.colour, channels=3)
    images = (images - 0.5) * draw.ratio(config.contrast) + 0.5 + draw.either_way(config.brightness)
    if config.illumination > 0:
        field = draw.uniform((3, 3)) * 2 - 1
        field = F.interpolate(field, images.shape[2:], mode="bicubic", align_corners=True)
        images = images * (1 + config.illumination * field)
    is_grey = draw.chance(config.grey)
    images = torch.where(is_grey, images.mean(dim=1, keepdim=True), images)
    if config.probability > 0:
        kernels = _kernels(draw, config)
        images = blurred(images, kernels)
    images = images + draw.normal(images.shape) * draw.uniform((1, 1)) * config.noise
    if config.probability > 0 and config.quantisation > 0:
        steps = config.quantisation * draw.uniform((1, 1)).clamp(min=0.02)
        images = torch.where(draw.chance(config.probability), block_quantised(images, steps), images)
    return images.clamp(0.0, 1.0)


class _Draws:
    """Random values, one set per image, all from one generator."""

    def __init__(self, generator: torch.Generator, count: int, device: torch.device) -> None:
        self.generator, self.count, self.device = generator, count, device

    def uniform(self, size: tuple[int, int], channels: int = 1) -> Tensor:
        shape = (self.count, channels, *size)
        return torch.rand(shape, generator=self.generator, device=self.device)

    def either_way(self, limit: float) -> Tensor:
        return (self.uniform((1, 1)) * 2 - 1) * limit

    def ratio(self, limit: float, channels: int = 1) -> Tensor:
        return ((self.uniform((1, 1), channels) * 2 - 1) * math.log(limit)).exp()

    def chance(self, probability: float) -> Tensor:
        return self.uniform((1, 1)) < probability

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def _kernels(draw: _Draws, config: PhotometryConfig) -> Tensor:
    """(B, 9, 9) one blur per image: none, Gaussian, or along a line."""
    gaussian = gaussian_kernels(draw.uniform((1, 1)).flatten() * config.blur_px)
    angles = draw.uniform((1, 1)).flatten() * math.pi
    lines = line_kernels(draw.uniform((1, 1)).flatten() * config.motion_px, angles)
    kind = draw.uniform((1, 1)).flatten()[:, None, None]
    none = torch.zeros_like(gaussian)
    none[:, _KERNEL_PX // 2, _KERNEL_PX // 2] = 1.0
    half = config.probability / 2
    return torch.where(kind < half, gaussian, torch.where(kind < 2 * half, lines, none))


def gaussian_kernels(deviations_px: Tensor) -> Tensor:
    """(B, 9, 9) normalised Gaussians; a deviation of 0 changes nothing."""
    steps = torch.arange(_KERNEL_PX, device=deviations_px.device) - _KERNEL_PX // 2
    profile = torch.exp(-0.5 * (steps / deviations_px.clamp(min=1e-3)[:, None]) ** 2)
    kernels = profile[:, :, None] * profile[:, None, :]
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def line_kernels(lengths_px: Tensor, angles: Tensor) -> Tensor:
    """(B, 9, 9) normalised lines through the centre; angles in rad from the x axis."""
    steps = torch.arange(_KERNEL_PX, device=angles.device) - _KERNEL_PX // 2
    x, y = steps[None, None, :], steps[None, :, None]
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    along, across = (x * cosine + y * sine).abs(), (x * sine - y * cosine).abs()
    reach = (lengths_px[:, None, None] / 2 + 0.5 - along).clamp(0, 1)
    kernels = reach * (1 - across).clamp(min=0)
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def blurred(images: Tensor, kernels: Tensor) -> Tensor:
    """Every image (B, C, H, W) under its own kernel (B, 9, 9); borders are mirrored."""
    batch, channels, height, width = images.shape
    margin = _KERNEL_PX // 2
    padded = F.pad(images, (margin,) * 4, mode="reflect")
    weights = kernels.to(images).repeat_interleave(channels, dim=0)[:, None]
    out = F.conv2d(padded.reshape(1, batch * channels, *padded.shape[2:]), weights, groups=batch * channels)
    return out.view(batch, channels, height, width)


def block_quantised(images: Tensor, steps: Tensor) -> Tensor:
    """Images (B, C, H, W) whose 8x8 blocks have their cosine transform rounded, high frequencies more coarsely.

    steps (B, 1, 1, 1): of the lowest frequency. What JPEG does to an image, without its tables. What does not fill a
    block at the right and lower edge stays as it is.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // _BLOCK_PX, width // _BLOCK_PX
    inside = images[:, :, : rows * _BLOCK_PX, : columns * _BLOCK_PX]
    blocks = inside.reshape(batch, channels, rows, _BLOCK_PX, columns, _BLOCK_PX).transpose(3, 4)
    basis = cosine_basis(images.device)
    frequencies = torch.arange(_BLOCK_PX, device=images.device)
    coarseness = 1 + (frequencies[:, None] + frequencies[None, :]) / 2
    steps = steps.view(batch, 1, 1, 1, 1, 1) * coarseness
    coefficients = ((basis @ blocks @ basis.T) / steps).round() * steps
    restored = (basis.T @ coefficients @ basis).transpose(3, 4).reshape(inside.shape)
    out = images.clone()
    out[:, :, : rows * _BLOCK_PX, : columns * _BLOCK_PX] = restored
    return out


def cosine_basis(device: torch.device) -> Tensor:
    """(8, 8) orthonormal: row k is the k-th cosine over the pixels of a block (type II)."""
    index = torch.arange(_BLOCK_PX, device=device, dtype=torch.float32)
    basis = torch.cos(math.pi / _BLOCK_PX * (index[None, :] + 0.5) * index[:, None]) * math.sqrt(2 / _BLOCK_PX)
    basis[0] /= math.sqrt(2)
    return basis
