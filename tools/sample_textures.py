"""Procedural materials of the sample room: every texture is computed here from noise, nothing is photographed.

A material is a function `(rng, width_m, height_m, density) -> image`: (H, W, 3) float32 in [0, 1], display-coded
(gamma 2.2) reflectance, H = height_m * density and W = width_m * density texels (at least one), row 0 at the top.
Contrast falls with frequency as in photographs (Field 1987): surfaces are sums of noise octaves, pictures are dead
leaves (occluding discs whose radii follow a power law; Lee, Mumford and Huang 2001).
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Colour = tuple[float, float, float]
Material = Callable[[np.random.Generator, float, float, float], Image]


def texel_shape(width_m: float, height_m: float, density: float) -> tuple[int, int]:
    """(rows, columns) of a texture, texels; `density` in texels per metre."""
    return max(1, round(height_m * density)), max(1, round(width_m * density))


def value_noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    cell: tuple[float, float],
    octaves: int = 5,
    persistence: float = 0.55,
) -> Image:
    """(H, W) float32 noise of about zero mean and unit variance; `cell` (x, y) texels of the coarsest octave.

    Each octave halves the cell and scales the amplitude by `persistence`; octaves finer than a texel are left out.
    Every octave is drawn at its own resolution, on top of the enlarged sum of the coarser ones.
    """
    rows, columns = shape
    field, variance, amplitude, cell_x, cell_y = None, 0.0, 1.0, max(cell[0], 1.0), max(cell[1], 1.0)
    for octave in range(octaves):
        grid = rng.standard_normal((int(rows / cell_y) + 4, int(columns / cell_x) + 4), dtype=np.float32)
        grid *= np.float32(amplitude)
        field = grid if field is None else grid + _resized(field, grid.shape)
        variance += amplitude**2
        amplitude *= persistence
        if octave + 1 == octaves or (cell_x <= 1.0 and cell_y <= 1.0):
            break
        cell_x, cell_y = max(cell_x / 2.0, 1.0), max(cell_y / 2.0, 1.0)
    to_grid = np.array([[1.0 / cell_x, 0.0, rng.uniform(1.0, 2.0)], [0.0, 1.0 / cell_y, rng.uniform(1.0, 2.0)]])
    smooth = cv2.warpAffine(field, to_grid, (columns, rows), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    # Interpolation between grid values lowers their variance by about a factor of two.
    return np.asarray(smooth * np.float32(1.4 / np.sqrt(variance)), np.float32)


def _resized(image: Image, shape: tuple[int, ...]) -> Image:
    return np.asarray(cv2.resize(image, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC), np.float32)


def tinted(colour: Colour, brightness: Image) -> Image:
    """(H, W, 3): the colour times (H, W) brightness."""
    return np.asarray(np.float32(colour) * brightness[..., None], np.float32)


def clipped(image: Image) -> Image:
    return np.clip(image, 0.01, 0.98, dtype=np.float32)


def paint(colour: Colour, contrast: float = 0.012) -> Material:
    """Rolled wall paint: almost without texture, with broad unevenness, fine stipple and a few marks."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        shape = texel_shape(width_m, height_m, density)
        broad = value_noise(rng, shape, (0.9 * density, 0.9 * density), 4)
        stipple = value_noise(rng, shape, (0.012 * density, 0.012 * density), 2)
        image = tinted(colour, 1.0 + np.float32(contrast) * broad + np.float32(0.6 * contrast) * stipple)
        for _ in range(int(rng.poisson(1.2 * width_m * height_m))):
            _scuff(rng, image, density)
        return clipped(image)

    return make


def _scuff(rng: np.random.Generator, image: Image, density: float) -> None:
    """Darken one short thin mark of the image in place."""
    rows, columns = image.shape[:2]
    start = rng.uniform((0, 0), (columns, rows))
    end = start + rng.normal(0.0, 0.02 * density, 2)
    mask = np.zeros((rows, columns), np.uint8)
    thickness = max(1, round(rng.uniform(0.001, 0.004) * density))
    cv2.line(mask, start.astype(int).tolist(), end.astype(int).tolist(), 255, thickness, cv2.LINE_AA)
    image *= 1.0 - np.float32(rng.uniform(0.05, 0.3) / 255.0) * mask[..., None]


def wood(colour: Colour, contrast: float = 0.16) -> Material:
    """One board with its grain along the longer side: bent rings, fibres and pores."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        rows, columns = texel_shape(width_m, height_m, density)
        upright = rows > columns
        shape = (columns, rows) if upright else (rows, columns)
        image = tinted(colour, 1.0 + np.float32(contrast) * _grain(rng, shape, density))
        image = clipped(image)
        return np.ascontiguousarray(image.transpose(1, 0, 2)) if upright else image

    return make


def _grain(rng: np.random.Generator, shape: tuple[int, int], density: float) -> Image:
    """(H, W) wood grain along x, about unit amplitude."""
    bend = value_noise(rng, shape, (0.8 * density, 0.10 * density), 3, 0.4)
    across = np.arange(shape[0], dtype=np.float32)[:, None] / np.float32(density)
    rings = np.sin(2.0 * np.pi * (across * rng.uniform(18.0, 32.0) + 0.9 * bend))
    fibres = value_noise(rng, shape, (0.25 * density, 0.006 * density), 4, 0.7)
    pores = np.minimum(value_noise(rng, shape, (0.03 * density, 0.003 * density), 2) + 1.2, 0.0)
    blotches = value_noise(rng, shape, (0.5 * density, 0.2 * density), 3)
    return np.asarray(0.35 * rings + 0.45 * fibres + 0.5 * pores + 0.35 * blotches, np.float32)


def planks(colour: Colour, plank_m: tuple[float, float] = (1.1, 0.135)) -> Material:
    """Floor boards along x in rows of staggered joints, each cut from other wood."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        shape = texel_shape(width_m, height_m, density)
        grain = _grain(rng, shape, density)
        tone = np.ones(shape, np.float32)
        board_rows = max(2, round(plank_m[1] * density))
        gap = max(1, round(0.002 * density))
        for top in range(0, shape[0], board_rows):
            rolled = np.roll(grain[top : top + board_rows], int(rng.integers(shape[1])), axis=1)
            grain[top : top + board_rows] = rolled
            left = -int(rng.integers(round(plank_m[0] * density)))
            while left < shape[1]:
                right = left + round(plank_m[0] * density * rng.uniform(0.7, 1.2))
                board = tone[top : top + board_rows, max(left, 0) : max(right, 0)]
                board[:] = rng.normal(1.0, 0.09)
                board[:, :gap] = board[:gap] = 0.45
                left = right
        warmth = value_noise(rng, shape, (0.7 * density, 0.7 * density), 3)
        wear = 1.0 + 0.04 * warmth
        return clipped(tinted(colour, (1.0 + np.float32(0.13) * grain) * tone * wear))

    return make


def bricks(colour: Colour, mortar: Colour) -> Material:
    """Bricks in running bond with uneven edges; relief is shaded as if lit from the upper left."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        shape = texel_shape(width_m, height_m, density)
        y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32) / np.float32(density)
        x += np.float32(0.0025) * value_noise(rng, shape, (0.06 * density, 0.06 * density), 3)
        y += np.float32(0.0022) * value_noise(rng, shape, (0.06 * density, 0.06 * density), 3)
        course = np.floor(y / 0.075).astype(np.int64)
        x += np.float32(0.1125) * (course % 2)
        column = np.floor(x / 0.225).astype(np.int64)
        edge = np.minimum(
            np.minimum(x - column * 0.225, (column + 1) * 0.225 - x),
            np.minimum(y - course * 0.075, (course + 1) * 0.075 - y),
        )
        body = np.clip((edge - 0.005) / 0.004, 0.0, 1.0).astype(np.float32)
        tones = rng.normal(1.0, 0.16, (course.max() + 1, column.max() + 1)).astype(np.float32)
        hues = rng.normal(0.0, 0.05, (course.max() + 1, column.max() + 1, 3)).astype(np.float32)
        rough = value_noise(rng, shape, (0.05 * density, 0.05 * density), 6, 0.75)
        height = body + 0.10 * rough
        relief = height - np.roll(height, (2, 1), (0, 1))
        face = (
            np.float32(colour) * (tones[course, column, None] + hues[course, column]) * (1.0 + 0.13 * rough[..., None])
        )
        joint = np.float32(mortar) * (1.0 + 0.10 * rough[..., None])
        image = joint + (face - joint) * body[..., None]
        return clipped(image * (1.0 + 0.22 * np.clip(relief, -1.0, 1.0)[..., None]))

    return make


def fabric(colour: Colour, thread_m: float = 0.006, contrast: float = 0.10) -> Material:
    """Coarse woven cloth: crossing threads of uneven thickness, folds and fading at larger scales."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        shape = texel_shape(width_m, height_m, density)
        thread = thread_m * density
        warp = value_noise(rng, shape, (1.2 * thread, 9 * thread), 2)
        weft = value_noise(rng, shape, (9 * thread, 1.2 * thread), 2)
        folds = value_noise(rng, shape, (0.25 * density, 0.25 * density), 5)
        brightness = 1.0 + np.float32(contrast) * (0.4 * warp + 0.4 * weft + 0.7 * folds)
        return clipped(tinted(colour, brightness))

    return make


def curtain(colour: Colour) -> Material:
    """Thin cloth with uneven upright stripes."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        shape = texel_shape(width_m, height_m, density)
        stripes = value_noise(rng, (1, shape[1]), (0.05 * density, 1.0), 4, 0.8)
        cloth = fabric(colour, 0.004, 0.06)(rng, width_m, height_m, density)
        return clipped(cloth * (1.0 + 0.08 * stripes[..., None]))

    return make


def rug(ground: Colour, accent: Colour) -> Material:
    """Hand-woven rug: bands of random width with irregular stepped motifs inside a border."""

    def make(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
        knots = texel_shape(width_m, height_m, 110.0)
        field = np.float32(rng.uniform(0.0, 0.25, (knots[0], 1, 1))) * np.ones((1, knots[1], 1), np.float32)
        row = 0
        while row < knots[0]:
            height = int(rng.integers(5, 17))
            motif = value_noise(rng, (height, knots[1]), (rng.uniform(5.0, 14.0), rng.uniform(3.0, 9.0)), 3, 0.7)
            if rng.random() < 0.75:
                field[row : row + height] = (motif[: knots[0] - row] > rng.uniform(-0.3, 0.8))[..., None]
            row += height + int(rng.integers(1, 4))
        image = np.float32(ground) + field * (np.float32(accent) - np.float32(ground))
        image *= 1.0 + 0.10 * rng.standard_normal((*knots, 1), dtype=np.float32)
        image[:6] = image[-6:] = image[:, :6] = image[:, -6:] = np.float32(ground) * 0.55
        shape = texel_shape(width_m, height_m, density)
        woven = np.asarray(cv2.resize(image, shape[::-1], interpolation=cv2.INTER_CUBIC), np.float32)
        pile = value_noise(rng, shape, (0.4 * density, 0.4 * density), 6, 0.7)
        return clipped(woven * (1.0 + 0.12 * pile[..., None]))

    return make


def cardboard(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
    """Corrugated board with a strip of tape, stains and, on larger faces, an address label."""
    shape = texel_shape(width_m, height_m, density)
    flutes = value_noise(rng, (1, shape[1]), (0.007 * density, 1.0), 1)
    stains = value_noise(rng, shape, (0.15 * density, 0.15 * density), 6, 0.65)
    image = tinted((0.68, 0.52, 0.36), 1.0 + np.float32(0.02) * flutes + np.float32(0.05) * stains)
    half = max(1, round(0.025 * density))
    middle = shape[0] // 2
    image[max(middle - half, 0) : middle + half] *= np.float32((1.10, 1.08, 1.0))
    label_shape = texel_shape(0.11, 0.075, density)
    if shape[0] > 2 * label_shape[0] and shape[1] > 2 * label_shape[1]:
        top, left = (
            int(rng.integers(4, shape[0] - label_shape[0] - 4)),
            int(rng.integers(4, shape[1] - label_shape[1] - 4)),
        )
        image[top : top + label_shape[0], left : left + label_shape[1]] = page(rng, 0.11, 0.075, density)
    return clipped(image)


def page(rng: np.random.Generator, width_m: float, height_m: float, density: float) -> Image:
    """A sheet of paper with lines of pseudo-writing in paragraphs of ragged length."""
    shape = texel_shape(width_m, height_m, density)
    ink = np.zeros(shape, np.uint8)
    line_m, y = rng.uniform(0.0055, 0.008), 0.1 * height_m
    while y < 0.9 * height_m:
        x, end = 0.1 * width_m, rng.uniform(0.35, 0.92) * width_m if rng.random() < 0.25 else 0.9 * width_m
        while x < end:
            word = rng.uniform(0.004, 0.016)
            corner = (round(x * density), round(y * density))
            opposite = (round(min(x + word, end) * density), round((y + 0.28 * line_m) * density))
            cv2.rectangle(ink, corner, opposite, int(rng.integers(70, 190)), -1)
            x += word + 0.0035
        y += line_m * (2.2 if rng.random() < 0.15 else 1.0)
    softened = np.asarray(cv2.GaussianBlur(ink, (0, 0), 0.6), np.float32) / 255.0
    return clipped(tinted((0.93, 0.92, 0.89), 1.0 - softened + np.float32(0.01) * value_noise(rng, shape, (40, 40), 4)))
