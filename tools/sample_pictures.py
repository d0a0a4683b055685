"""Procedural pictures of the sample room: posters, book covers, the view through the window.

Materials as in sample_textures: `(rng, width_m, height_m, density) -> (H, W, 3)` display-coded reflectance.
"""

from __future__ import annotations

import cv2
import numpy as np
from sample_textures import Colour, Image, Material, clipped, texel_shape, tinted, value_noise

COVERS: tuple[Colour, ...] = (
    (0.45, 0.12, 0.11),
    (0.13, 0.19, 0.33),
    (0.16, 0.29, 0.20),
    (0.78, 0.73, 0.62),
    (0.12, 0.12, 0.13),
    (0.70, 0.52, 0.20),
    (0.45, 0.45, 0.44),
    (0.85, 0.84, 0.81),
    (0.36, 0.24, 0.16),
    (0.18, 0.38, 0.42),
    (0.60, 0.34, 0.24),
    (0.30, 0.27, 0.38),
)


def framed(picture: Material, margin: float, frame: Colour) -> Material:
    """A picture behind a white mount inside a frame; `margin` is the mount's share of the shorter side."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        shape = texel_shape(width_m, height_m, density)
        image = tinted((0.9, 0.89, 0.86), 1.0 + np.float32(0.01) * value_noise(rng, shape, (60.0, 60.0), 4))
        border = max(2, round(0.022 * density))
        mount = border + round(margin * min(shape))
        inside = picture(rng, (shape[1] - 2 * mount) / density, (shape[0] - 2 * mount) / density, density)
        image[mount : mount + inside.shape[0], mount : mount + inside.shape[1]] = inside
        grain = 1.0 + np.float32(0.08) * value_noise(rng, shape, (0.1 * density, 0.02 * density), 4)
        wooden = tinted(frame, grain)
        for side in (np.s_[:border], np.s_[-border:], np.s_[:, :border], np.s_[:, -border:]):
            image[side] = wooden[side]
        return clipped(image)

    return make


def dead_leaves(palette: tuple[Colour, ...], min_radius_m: float = 0.004, max_radius_m: float = 0.25) -> Material:
    """Occluding discs, ellipses and polygons with radii distributed as r^-3 over a mottled ground."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        rows, columns = texel_shape(2 * width_m, 2 * height_m, density)
        image = tinted(palette[0], 1.0 + np.float32(0.08) * value_noise(rng, (rows, columns), (0.4 * density,) * 2, 5))
        low, high = min_radius_m**-2, min(max_radius_m, 0.4 * min(width_m, height_m)) ** -2
        for _ in range(int(220 + 900 * width_m * height_m)):
            radius = 2.0 * density / np.sqrt(rng.uniform(high, low))
            colour = np.float32(palette[int(rng.integers(len(palette)))]) * rng.normal(1.0, 0.12)
            _leaf(rng, image, rng.uniform((0, 0), (columns, rows)), radius, colour.tolist())
        image *= 1.0 + 0.05 * value_noise(rng, (rows, columns), (0.05 * density,) * 2, 5)[..., None]
        shape = texel_shape(width_m, height_m, density)
        return clipped(np.asarray(cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA), np.float32))

    return make


def _leaf(rng: np.random.Generator, image: Image, centre: np.ndarray, radius: float, colour: list[float]) -> None:
    """Paint one shape over the image in place; `centre` (2,) and `radius` in texels."""
    point = centre.astype(int).tolist()
    if rng.random() < 0.6:
        axes = [max(1, round(radius)), max(1, round(radius * rng.uniform(0.4, 1.0)))]
        cv2.ellipse(image, point, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_8)
        return
    angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
    spokes = radius * rng.uniform(0.6, 1.2, len(angles))
    outline = centre + spokes[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    cv2.fillPoly(image, [outline.astype(np.int32)], colour, cv2.LINE_8)


def landscape(sky: Colour, near: Colour) -> Material:
    """Hills behind hills, each ridge a noise profile, paler with distance, painted with visible strokes."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        shape = texel_shape(width_m, height_m, density)
        fade = np.linspace(0.85, 1.1, shape[0], dtype=np.float32)[:, None]
        clouds = value_noise(rng, shape, (0.5 * shape[1], 0.12 * shape[0]), 6, 0.6)
        image = tinted(sky, fade * (1.0 + 0.09 * clouds))
        heights = np.arange(shape[0], dtype=np.float32)[:, None] / shape[0]
        for layer in range(6):
            ridge = value_noise(rng, (1, shape[1]), (shape[1] / (1.5 + layer), 1.0), 7, 0.5)
            mask = heights > 0.35 + 0.105 * layer + 0.05 * ridge
            share = (layer + 1) / 6.0
            colour = np.float32(sky) * (1.0 - share) + np.float32(near) * share
            strokes = value_noise(rng, shape, (0.05 * density, 0.012 * density), 5, 0.75)
            hill = colour * (1.0 + (0.06 + 0.14 * share) * strokes[..., None])
            image = np.where(mask[..., None], hill, image).astype(np.float32)
        return clipped(image)

    return make


def outdoors(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
    """What the window shows: sky, a tree line, the wall of a house across the street."""
    shape = texel_shape(width_m, height_m, density)
    image = landscape((0.86, 0.91, 0.96), (0.30, 0.38, 0.22))(rng, width_m, height_m, density)
    foliage = value_noise(rng, shape, (0.5 * density, 0.5 * density), 6, 0.75)
    crown = value_noise(rng, shape, (1.4 * density, 1.4 * density), 6, 0.55)
    crown += np.linspace(-2.2, 1.6, shape[0], dtype=np.float32)[:, None]
    leaves = np.float32((0.40, 0.45, 0.30)) * (1.0 + 0.24 * foliage[..., None])
    top, left = round(0.18 * shape[0]), round(0.52 * shape[1])
    plaster = 1.0 + np.float32(0.05) * value_noise(rng, shape, (0.5 * density,) * 2, 5)
    image[top:, left:] = tinted((0.80, 0.70, 0.58), plaster)[top:, left:]
    for row in range(3):
        for column in range(4):
            y, x = top + round((0.35 + 1.25 * row) * density), left + round((0.3 + 1.05 * column) * density)
            image[y : y + round(0.75 * density), x : x + round(0.5 * density)] = rng.uniform(0.2, 0.45)
    return clipped(np.where((crown > 0.35)[..., None], leaves, image).astype(np.float32))


def book_spine(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
    """The back of a book: one colour, bands, a title of strokes across the spine, worn edges."""
    shape = texel_shape(width_m, height_m, density)
    colour = np.array(COVERS[int(rng.integers(len(COVERS)))]) * rng.normal(1.0, 0.12) + rng.normal(0.0, 0.03, 3)
    wear = value_noise(rng, shape, (0.06 * density, 0.06 * density), 6, 0.7)
    image = tinted(tuple(colour.tolist()), 1.0 + np.float32(0.07) * wear)
    ink = np.float32(rng.uniform(0.75, 0.95) if colour.mean() < 0.45 else rng.uniform(0.05, 0.2))
    for _ in range(int(rng.integers(0, 4))):
        top = int(rng.integers(shape[0]))
        image[top : top + max(1, round(rng.uniform(0.002, 0.012) * density))] = ink * np.float32(
            rng.uniform(0.6, 1.0, 3)
        )
    y, end = rng.uniform(0.12, 0.3) * height_m, rng.uniform(0.55, 0.85) * height_m
    margin = round(rng.uniform(0.2, 0.34) * shape[1])
    while y < end:
        letter = rng.uniform(0.004, 0.012)
        if rng.random() < 0.8:
            side = margin + int(rng.integers(0, 1 + max(1, shape[1] // 8)))
            image[round(y * density) : round((y + letter) * density), side : shape[1] - margin] = ink
        y += letter + rng.uniform(0.002, 0.005)
    bend = 1.0 - 0.35 * np.abs(np.linspace(-1.0, 1.0, shape[1], dtype=np.float32)) ** 3
    return clipped(image * bend[None, :, None])


def paper_block(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
    """The cut edges of a book's pages."""
    shape = texel_shape(width_m, height_m, density)
    along = (0.2 * density, 0.0025 * density) if shape[1] > shape[0] else (0.0025 * density, 0.2 * density)
    return clipped(tinted((0.82, 0.77, 0.66), 1.0 + np.float32(0.08) * value_noise(rng, shape, along, 3)))


def panelled_door(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
    """A painted door: two panels whose bevels catch the light, brush strokes along the grain."""
    shape = texel_shape(width_m, height_m, density)
    strokes = value_noise(rng, shape, (0.008 * density, 0.4 * density), 4, 0.7)
    image = tinted((0.80, 0.79, 0.74), 1.0 + np.float32(0.018) * strokes)
    bevel = max(1, round(0.012 * density))
    for top_m, bottom_m in ((0.14, 0.95), (1.12, height_m - 0.2)):
        top, bottom = round(top_m * density), round(bottom_m * density)
        left, right = round(0.13 * density), shape[1] - round(0.13 * density)
        image[top : top + bevel, left:right] *= 0.72
        image[bottom - bevel : bottom, left:right] *= 1.12
        image[top:bottom, left : left + bevel] *= 0.82
        image[top:bottom, right - bevel : right] *= 1.06
    return clipped(image)


def leaf_blade(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
    """A long leaf with bands across and a pale rim."""
    shape = texel_shape(width_m, height_m, density)
    bands = value_noise(rng, shape, (0.05 * density, 0.03 * density), 5, 0.7)
    image = tinted((0.27, 0.42, 0.20), 1.0 + np.float32(0.25) * bands)
    rim = max(1, round(0.12 * shape[1]))
    image[:, :rim] = image[:, -rim:] = np.float32((0.62, 0.64, 0.34))
    return clipped(image)
