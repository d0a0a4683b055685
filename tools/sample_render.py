"""An exact renderer for textured rectangles, upright cylinders and spheres seen by a moving pinhole camera.

Everything a frame needs is evaluated per sample: rays through given sub-pixel positions at given times, the nearest
surface along each, and its texture from a mip-map. Averaging the samples of a pixel gives motion blur and smooth
edges together. Inverse depth and texture coordinates times inverse depth are linear over the image of a plane
(Heckbert 1989, "Fundamentals of Texture Mapping"), so rectangles cost a few additions per sample and are exact.

Camera x right, y down, z forward; pixel (0, 0) is the centre of the top-left pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from sample_geometry import Cylinder, FloatArray, Rectangle, Sphere, Surface
from sample_textures import Image

from vo.types import Camera

NUM_LEVELS = 5
ALIGNMENT = 2 ** (NUM_LEVELS - 1)
NEAR_M, FAR_M = 0.05, 1e6
# Radiance 1.0 in the atlas, which leaves headroom for lit and glowing surfaces.
UNIT_RADIANCE = 8192.0
# Samples handled at once: what fits the processor's cache is several times faster.
BLOCK = 160_000

Samples: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Atlas:
    """All textures in one image, with its mip levels below it.

    pixels   (H, W, 3) uint16 linear radiance.
    corners  (N, 2) texels (x, y) of each surface's first texel in level 0.
    levels   (NUM_LEVELS, 2) texels (x, y) of the corner of each level.
    """

    pixels: NDArray[np.uint16]
    corners: NDArray[np.int64]
    levels: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """Surfaces, lit, with their textures in the atlas.

    planes     (N, 4) unit normal and offset: a point's height over the surface; bodies count as far below.
    densities  (N,) texels per metre.
    """

    surfaces: tuple[Surface, ...]
    atlas: Atlas
    planes: FloatArray
    densities: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A camera at S moments: `poses` (S, 4, 4) T_world_camera, `jitter` (S, 2) px added to the pixel centres."""

    camera: Camera
    poses: FloatArray
    jitter: FloatArray

    @property
    def centres(self) -> FloatArray:
        """(S, 3) m."""
        return self.poses[:, :3, 3]

    @property
    def rays(self) -> FloatArray:
        """(S, 3, 3): times (x, y, 1) px, the direction in the world, of unit length along the optical axis."""
        return np.asarray(self.poses[:, :3, :3] @ np.linalg.inv(self.camera.K))


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """What the samples see; all (S, H, W) for S sub-exposures.

    inverse_depth  1/m along the optical axis, 0 where there is nothing.
    texel_x/y      level-0 texels in the atlas, times inverse depth.
    surface        index of the surface.
    """

    inverse_depth: Samples
    texel_x: Samples
    texel_y: Samples
    surface: NDArray[np.int32]


def build_scene(surfaces: list[Surface]) -> Scene:
    """Pack the textures of the surfaces into an atlas, tallest first, and build its mip levels."""
    planes = [
        (*s.normal, -s.normal @ s.origin) if isinstance(s, Rectangle) else (0.0, 0.0, 0.0, FAR_M) for s in surfaces
    ]
    densities = np.array([s.density for s in surfaces], np.float32)
    return Scene(tuple(surfaces), _pack(surfaces), np.array(planes), densities)


def _pack(surfaces: list[Surface], width: int = 8192) -> Atlas:
    guard = ALIGNMENT
    sizes = [tuple(-(-(n + 2 * guard) // ALIGNMENT) * ALIGNMENT for n in s.texture.shape[:2]) for s in surfaces]
    corners = np.zeros((len(surfaces), 2), np.int64)
    x = y = shelf = 0
    for index in sorted(range(len(surfaces)), key=lambda i: -sizes[i][0]):
        rows, columns = sizes[index]
        if x + columns > width:
            x, y, shelf = 0, y + shelf, 0
        corners[index] = x, y
        x, shelf = x + columns, max(shelf, rows)
    height = y + shelf
    pixels = np.zeros((height + height // 2, width, 3), np.uint16)
    for (left, top), (rows, columns), surface in zip(corners, sizes, surfaces, strict=True):
        pixels[top : top + rows, left : left + columns] = _guarded(surface, rows, columns, guard)
    return Atlas(pixels, corners + guard, _add_levels(pixels, width, height))


def _add_levels(pixels: NDArray[np.uint16], width: int, height: int) -> NDArray[np.int64]:
    """Fill in the levels, each half of the one before, side by side under level 0; returns their corners (x, y)."""
    corners = [(0, 0)]
    for level in range(1, NUM_LEVELS):
        (x, y), (rows, columns) = corners[-1], (height >> level, width >> level)
        finer = pixels[y : y + 2 * rows, x : x + 2 * columns]
        x = 0 if level == 1 else x + 2 * columns
        pixels[height : height + rows, x : x + columns] = cv2.resize(
            finer, (columns, rows), interpolation=cv2.INTER_AREA
        )
        corners.append((x, height))
    return np.array(corners, np.int64)


def _guarded(surface: Surface, rows: int, columns: int, guard: int) -> NDArray[np.uint16]:
    """The texture with a margin that repeats its edge (around a body: its other end): filters see no neighbour."""
    texture = np.clip(surface.texture * np.float32(UNIT_RADIANCE), 0.0, 65535.0).astype(np.uint16)
    below, beside = rows - guard - texture.shape[0], columns - guard - texture.shape[1]
    tall = np.pad(texture, ((guard, below), (0, 0), (0, 0)), mode="edge")
    mode = "edge" if isinstance(surface, Rectangle) else "wrap"
    return np.pad(tall, ((0, 0), (guard, beside), (0, 0)), mode=mode)  # type: ignore[call-overload, no-any-return]


def trace(scene: Scene, view: View, mirror: Rectangle | None = None) -> Hits:
    """Nearest surface of every sample; with a mirror, from behind which the view looks, of those in front of it."""
    shape = (len(view.poses), view.camera.height, view.camera.width)
    hits = Hits(*(np.zeros(shape, np.float32) for _ in range(3)), np.full(shape, -1, np.int32))
    heights = scene.planes[:, :3] @ view.centres.T + scene.planes[:, 3:]
    for index in np.flatnonzero((heights > 1e-4).all(axis=1)):
        surface, corner = scene.surfaces[index], scene.atlas.corners[index]
        outline = _outline(surface)
        if mirror is not None and ((outline - mirror.origin) @ mirror.normal < 1e-3).all():
            continue
        where = _image_box(view, outline)
        if where is None:
            continue
        if isinstance(surface, Rectangle):
            _trace_rectangle(hits, int(index), surface, corner, view, where)
        else:
            _trace_body(hits, int(index), surface, corner, view, where)
    return hits


def _image_box(view: View, outline: FloatArray) -> tuple[slice, slice] | None:
    """Rows and columns that may see the convex hull of `outline` (N, 3) m in any of the poses; None where none can.

    A hull that reaches behind the camera is cut at the near plane along the segments between all of its points.
    """
    camera = view.camera
    inside = np.swapaxes(view.poses[:, :3, :3], 1, 2) @ (outline.T[None] - view.poses[:, :3, 3:])
    depth = inside[:, 2]
    if (depth < NEAR_M).all():
        return None
    points = inside.transpose(0, 2, 1)
    if (depth < NEAR_M).any():
        first, second = np.triu_indices(len(outline), 1)
        a, b = points[:, first], points[:, second]
        crosses = (a[..., 2] < NEAR_M) != (b[..., 2] < NEAR_M)
        share = (NEAR_M - a[crosses][:, 2:]) / (b[crosses][:, 2:] - a[crosses][:, 2:])
        points = np.concatenate((points[depth >= NEAR_M], a[crosses] + share * (b[crosses] - a[crosses])))
    pixels = points.reshape(-1, 3) @ camera.K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    low = np.maximum(np.floor(pixels.min(axis=0)) - 1.0, 0.0).astype(int)
    high = np.minimum(np.ceil(pixels.max(axis=0)) + 2.0, (camera.width, camera.height)).astype(int)
    if (low >= high).any():
        return None
    return slice(low[1], high[1]), slice(low[0], high[0])


def _trace_rectangle(
    hits: Hits, index: int, surface: Rectangle, corner: NDArray[np.int64], view: View, where: tuple[slice, slice]
) -> None:
    centres, rays = view.centres, view.rays
    # Each row holds the coefficients of x, y and 1 in a quantity linear over the image.
    inverse_depth = (surface.normal @ rays) / ((surface.origin - centres) @ surface.normal)[:, None]
    forms = [inverse_depth]
    for edge in (surface.edge_u, surface.edge_v):
        dual = edge / (edge @ edge)
        forms.append(dual @ rays + ((centres - surface.origin) @ dual)[:, None] * inverse_depth)
    rows, columns = where
    block = max(1, BLOCK // ((rows.stop - rows.start) * (columns.stop - columns.start)))
    for first in range(0, len(centres), block):
        part = slice(first, first + block)
        w, u, v = (_linear(form[part], rows, columns, view.jitter[part]) for form in forms)
        seen = w > hits.inverse_depth[part, rows, columns]
        if surface.is_disc:
            seen &= (u - 0.5 * w) ** 2 + (v - 0.5 * w) ** 2 <= 0.25 * w * w
        else:
            seen &= (u >= 0.0) & (v >= 0.0) & (u <= w) & (v <= w)
        size = surface.texture.shape
        _keep(hits, (part, rows, columns), seen, index, w, u * np.float32(size[1]), v * np.float32(size[0]), corner)


def _linear(form: FloatArray, rows: slice, columns: slice, jitter: FloatArray) -> Samples:
    """(S, h, w) values of the linear forms (S, 3) at the samples of a part of the image."""
    constant = form[:, 2] + form[:, 0] * jitter[:, 0] + form[:, 1] * jitter[:, 1]
    x = np.arange(columns.start, columns.stop, dtype=np.float64)
    y = np.arange(rows.start, rows.stop, dtype=np.float64)
    along = (form[:, 0, None] * x).astype(np.float32)
    down = (form[:, 1, None] * y + constant[:, None]).astype(np.float32)
    return along[:, None, :] + down[:, :, None]


def _keep(
    hits: Hits,
    where: tuple[slice, slice, slice],
    seen: NDArray[np.bool_],
    index: int,
    inverse_depth: Samples,
    x: Samples,
    y: Samples,
    corner: NDArray[np.int64],
) -> None:
    """Enter the samples that see this surface; x, y are texels from its corner times inverse depth."""
    # Texel centres are half a texel inside the corner, as pixel centres are in an image.
    x += np.float32(corner[0] - 0.5) * inverse_depth
    y += np.float32(corner[1] - 0.5) * inverse_depth
    np.copyto(hits.inverse_depth[where], inverse_depth, where=seen)
    np.copyto(hits.texel_x[where], x, where=seen)
    np.copyto(hits.texel_y[where], y, where=seen)
    np.copyto(hits.surface[where], np.int32(index), where=seen)


def _trace_body(
    hits: Hits,
    index: int,
    surface: Cylinder | Sphere,
    corner: NDArray[np.int64],
    view: View,
    where: tuple[slice, slice],
) -> None:
    rows, columns = where
    meet = _meet_cylinder if isinstance(surface, Cylinder) else _meet_sphere
    for one, (eye, rays) in enumerate(zip(view.centres, view.rays, strict=True)):
        part = slice(one, one + 1)
        ray = np.stack([_linear(row[None], rows, columns, view.jitter[part]) for row in rays], axis=-1)
        depth, u, v = meet(surface, eye, ray)  # type: ignore[arg-type]
        with np.errstate(divide="ignore"):
            w = np.where(depth > NEAR_M, 1.0 / depth, 0.0).astype(np.float32)
        seen = w > hits.inverse_depth[part, rows, columns]
        size = surface.texture.shape
        x, y = (u * size[1] * w).astype(np.float32), (v * size[0] * w).astype(np.float32)
        _keep(hits, (part, rows, columns), seen, index, w, x, y, corner)


def _outline(surface: Surface) -> FloatArray:
    """(4, 3) m corners of a rectangle, (8, 3) m those of a box around a body."""
    if isinstance(surface, Rectangle):
        corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) @ np.stack((surface.edge_u, surface.edge_v))
        return np.asarray(surface.origin + corners)
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    if isinstance(surface, Sphere):
        return surface.centre + surface.radius * signs
    half = np.array([surface.radius, surface.radius, surface.height / 2.0])
    return surface.base + (0.0, 0.0, surface.height / 2.0) + half * signs


def _meet_sphere(surface: Sphere, eye: FloatArray, ray: Samples) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Depth (0: missed) and texture fractions where rays (..., 3) of unit depth meet the ball."""
    ray64, offset = ray.astype(np.float64), eye - surface.centre
    depth = _near_root((ray64**2).sum(-1), ray64 @ offset, float(offset @ offset) - surface.radius**2)
    point = (offset + depth[..., None] * ray64) / surface.radius
    longitude = np.arctan2(point[..., 1], point[..., 0])
    return depth, (longitude / (2.0 * np.pi)) % 1.0, np.arccos(np.clip(point[..., 2], -1.0, 1.0)) / np.pi


def _meet_cylinder(surface: Cylinder, eye: FloatArray, ray: Samples) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Depth (0: missed) and texture fractions where rays (..., 3) of unit depth meet the mantle."""
    ray64, offset = ray.astype(np.float64), eye - surface.base
    flat, start = ray64[..., :2], offset[:2]
    depth = _near_root((flat**2).sum(-1), flat @ start, float(start @ start) - surface.radius**2)
    point = offset + depth[..., None] * ray64
    v = 1.0 - point[..., 2] / surface.height
    depth = np.where((v >= 0.0) & (v <= 1.0), depth, 0.0)
    return depth, (np.arctan2(point[..., 1], point[..., 0]) / (2.0 * np.pi)) % 1.0, v


def _near_root(a: FloatArray, half_b: FloatArray, c: float) -> FloatArray:
    """Smaller root of a t^2 + 2 half_b t + c, or 0 where there is none."""
    discriminant = half_b**2 - a * c
    return np.where(discriminant > 0.0, (-half_b - np.sqrt(np.maximum(discriminant, 0.0))) / a, 0.0)


def render(scene: Scene, view: View) -> Image:
    """(H, W, 3) float32 radiance: the mean over the moments of the view."""
    hits = trace(scene, view)
    image = _shade(scene, view, hits, hits.inverse_depth > 0.0)
    for index, surface in enumerate(scene.surfaces):
        if isinstance(surface, Rectangle) and surface.gloss and (seen := hits.surface == index).any():
            _add_mirror_image(image, scene, view, surface, seen)
    return image


def _add_mirror_image(image: Image, scene: Scene, view: View, mirror: Rectangle, seen: NDArray[np.bool_]) -> None:
    """Add what the samples that see a mirror (S, H, W) see in it: the room as from behind the mirror."""
    ys, xs = np.flatnonzero(seen.any(axis=(0, 2))), np.flatnonzero(seen.any(axis=(0, 1)))
    rows, columns = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
    K = view.camera.K - np.array([[0.0, 0.0, xs[0]], [0.0, 0.0, ys[0]], [0.0, 0.0, 0.0]])
    across = np.eye(4)
    across[:3, :3] -= 2.0 * np.outer(mirror.normal, mirror.normal)
    across[:3, 3] = 2.0 * (mirror.normal @ mirror.origin) * mirror.normal
    size = (int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1))
    behind = View(Camera(*size, K), across @ view.poses, view.jitter)
    hits = trace(scene, behind, mirror)
    reflected = seen[:, rows, columns] & (hits.inverse_depth > 0.0)
    image[rows, columns] += np.float32(mirror.gloss) * _shade(scene, behind, hits, reflected)


def _shade(scene: Scene, view: View, hits: Hits, seen: NDArray[np.bool_]) -> Image:
    """(H, W, 3) radiance of the samples that are `seen` (S, H, W), summed over S and divided by S."""
    total = np.zeros((view.camera.height, view.camera.width, 3), np.float32)
    slant = _slant(view.camera)
    for one, eye in enumerate(view.centres):
        inverse_depth = np.where(seen[one], hits.inverse_depth[one], np.float32(1.0))
        level = _level(scene, view, inverse_depth, hits.surface[one], slant, eye)
        colours = _look_up(scene.atlas, hits.texel_x[one] / inverse_depth, hits.texel_y[one] / inverse_depth, level)
        total += colours * seen[one][..., None]
    return np.asarray(total / np.float32(UNIT_RADIANCE * len(view.poses)), np.float32)


def _slant(camera: Camera) -> Samples:
    """(H, W) length of the ray of each pixel per unit of depth."""
    x = (np.arange(camera.width) - camera.K[0, 2]) / camera.K[0, 0]
    y = (np.arange(camera.height) - camera.K[1, 2]) / camera.K[1, 1]
    return np.sqrt(x[None] ** 2 + y[:, None] ** 2 + 1.0).astype(np.float32)


def _level(
    scene: Scene, view: View, inverse_depth: Samples, surface: NDArray[np.int32], slant: Samples, eye: FloatArray
) -> Samples:
    """(H, W) mip level of each sample.

    A pixel covers `density * depth / f` texels across and, on a slanted surface, more along the slope. The S samples
    of a pixel (its pattern repeats after eight) resolve about sqrt(S) parts of that, so a sample is filtered to one.
    """
    heights = (scene.planes[:, :3] @ eye + scene.planes[:, 3]).astype(np.float32)
    cosine = np.clip(heights[surface] * inverse_depth / slant, 0.05, 1.0)
    across = scene.densities[surface] / (inverse_depth * np.float32(view.camera.focal_px))
    parts = np.float32(np.sqrt(min(len(view.poses), 8)))
    footprint = np.maximum(across * np.float32(0.6), across / cosine / parts)
    return np.clip(np.log2(np.maximum(footprint, 1.0)), 0.0, NUM_LEVELS - 1.001).astype(np.float32)


def _look_up(atlas: Atlas, x: Samples, y: Samples, level: Samples) -> Samples:
    """(H, W, 3) radiance at level-0 texels, interpolated in the two mip levels around `level`."""
    lower = level.astype(np.int32)
    fraction = (level - lower)[..., None]
    corners = atlas.levels.astype(np.float32)
    colours = []
    for step in (lower, lower + 1):
        scale = np.exp2(-step.astype(np.float32))
        # Level 0 texel t has its centre at (t + 0.5) * scale - 0.5 of a coarser level.
        map_x, map_y = (x + 0.5) * scale - 0.5 + corners[step, 0], (y + 0.5) * scale - 0.5 + corners[step, 1]
        colours.append(cv2.remap(atlas.pixels, map_x, map_y, cv2.INTER_LINEAR).astype(np.float32))
    return np.asarray(colours[0] + fraction * (colours[1] - colours[0]), np.float32)


def depth_map(scene: Scene, camera: Camera, T_world_camera: FloatArray) -> NDArray[np.float32]:
    """(H, W) float32 m at the pixel centres, 0 where there is nothing."""
    w = trace(scene, View(camera, T_world_camera[None], np.zeros((1, 2)))).inverse_depth[0]
    return np.where(w > 0.0, 1.0 / np.where(w > 0.0, w, 1.0), 0.0).astype(np.float32)
