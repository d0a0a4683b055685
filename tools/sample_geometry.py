"""Surfaces of the sample scene and the light that falls on them.

World frame: x east, y north, z up, metres. A texture's row 0 is the top of its surface, column 0 the left as seen
from the side the surface faces. Colours here are linear reflectance or radiance, not display-coded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from sample_textures import Image, Material

FloatArray: TypeAlias = NDArray[np.float64]
GAMMA = 2.2


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """A one-sided rectangle, or the ellipse inscribed in it.

    origin          (3,) m, the corner of texel row 0, column 0.
    edge_u, edge_v  (3,) m, perpendicular, along the texture's columns and rows.
    texture         (H, W, 3) float32; radiance once lit.
    glow            radiance of a source of light per unit of texture; None for a lit surface.
    gloss           share of the mirror image of the room that is seen on top, as on glass.
    """

    origin: FloatArray
    edge_u: FloatArray
    edge_v: FloatArray
    texture: Image
    is_disc: bool = False
    glow: float | None = None
    gloss: float = 0.0

    @property
    def normal(self) -> FloatArray:
        """(3,) unit, towards the side from which the rectangle is seen."""
        normal = np.cross(self.edge_v, self.edge_u)
        return np.asarray(normal / np.linalg.norm(normal))

    @property
    def density(self) -> float:
        """Texels per metre."""
        return float(self.texture.shape[1] / np.linalg.norm(self.edge_u))

    def points(self, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Points and normals (N, 3) at texture fractions u, v (N,)."""
        points = self.origin + u[:, None] * self.edge_u + v[:, None] * self.edge_v
        return points, np.broadcast_to(self.normal, points.shape)


def density_around(texture: Image, radius: float) -> float:
    """Pixels per metre of a texture that is wound once around a circle."""
    return float(texture.shape[1] / (2.0 * np.pi * radius))


@dataclass(frozen=True, slots=True, eq=False)
class Cylinder:
    """The mantle of an upright cylinder, seen from outside; `base` (3,) m is the centre of its foot."""

    base: FloatArray
    radius: float
    height: float
    texture: Image
    glow: float | None = None

    @property
    def density(self) -> float:
        return density_around(self.texture, self.radius)

    def points(self, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        angle = 2.0 * np.pi * u
        normals = np.stack((np.cos(angle), np.sin(angle), np.zeros_like(angle)), axis=1)
        points = self.base + self.radius * normals
        points[:, 2] += (1.0 - v) * self.height
        return points, normals


@dataclass(frozen=True, slots=True, eq=False)
class Sphere:
    """A ball; the texture is wound around the vertical axis."""

    centre: FloatArray
    radius: float
    texture: Image
    glow: float | None = None

    @property
    def density(self) -> float:
        return density_around(self.texture, self.radius)

    def points(self, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        longitude, colatitude = 2.0 * np.pi * u, np.pi * v
        ring = np.sin(colatitude)
        normals = np.stack((ring * np.cos(longitude), ring * np.sin(longitude), np.cos(colatitude)), axis=1)
        return self.centre + self.radius * normals, normals


Surface: TypeAlias = Rectangle | Cylinder | Sphere


@dataclass(frozen=True, slots=True, eq=False)
class Blocker:
    """A box that casts shadow: centre (3,), half extent (3,) m, turned by `yaw_rad` about the vertical."""

    centre: FloatArray
    half: FloatArray
    yaw_rad: float


@dataclass(frozen=True, slots=True, eq=False)
class Lamp:
    """A rectangular source of light: corner, edge vectors (3,) m, `colour` (3,) radiant power, face normal (3,)."""

    corner: FloatArray
    edge_u: FloatArray
    edge_v: FloatArray
    normal: FloatArray
    colour: FloatArray


def turned(yaw_rad: float) -> FloatArray:
    """(3, 3) rotation about the vertical."""
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rectangle(
    rng: np.random.Generator,
    origin: FloatArray,
    edge_u: FloatArray,
    edge_v: FloatArray,
    material: Material,
    density: float,
    *,
    is_disc: bool = False,
    glow: float | None = None,
    gloss: float = 0.0,
) -> Rectangle:
    """A rectangle covered with a material; display-coded colours become linear here."""
    width_m, height_m = float(np.linalg.norm(edge_u)), float(np.linalg.norm(edge_v))
    texture = material(rng, width_m, height_m, density) ** np.float32(GAMMA)
    return Rectangle(np.asarray(origin, float), edge_u, edge_v, texture, is_disc, glow, gloss)


def box(
    rng: np.random.Generator,
    foot: tuple[float, float, float],
    size: tuple[float, float, float],
    materials: Material | dict[str, Material],
    density: float,
    yaw_deg: float = 0.0,
) -> list[Rectangle]:
    """The faces of an upright box standing with the middle of its bottom on `foot`; `size` x, y, z in metres.

    A dict names a material per face: "south" (the front of an unturned box), "east", "north", "west", "top",
    "bottom"; faces it does not name take the one of "sides", and are left out where that is missing.
    """
    rotation, half = turned(np.deg2rad(yaw_deg)), np.array(size) / 2.0
    centre = foot + half[2] * np.array([0.0, 0.0, 1.0])
    x, y, z = 2.0 * half[0] * rotation[:, 0], 2.0 * half[1] * rotation[:, 1], 2.0 * half[2] * rotation[:, 2]
    faces = {
        "south": (-x - y + z, x, -z),
        "east": (x - y + z, y, -z),
        "north": (x + y + z, -x, -z),
        "west": (-x + y + z, -y, -z),
        "top": (-x + y + z, x, -y),
        "bottom": (-x - y - z, x, y),
    }
    made = []
    for name, (corner, edge_u, edge_v) in faces.items():
        material = materials.get(name, materials.get("sides")) if isinstance(materials, dict) else materials
        if material is not None:
            made.append(rectangle(rng, centre + corner / 2.0, edge_u, edge_v, material, density))
    return made


def cylinder(
    rng: np.random.Generator,
    base: tuple[float, float, float],
    radius: float,
    height: float,
    material: Material,
    density: float,
    *,
    lid: Material | None = None,
    lid_drop: float = 0.0,
) -> list[Surface]:
    """An upright cylinder, with a disc `lid_drop` metres below its rim where a lid material is given."""
    texture = material(rng, 2.0 * np.pi * radius, height, density) ** np.float32(GAMMA)
    surfaces: list[Surface] = [Cylinder(np.array(base), radius, height, _seamless(texture))]
    if lid is not None:
        corner = base + np.array([-radius, radius, height - lid_drop])
        edge_u, edge_v = np.array([2.0 * radius, 0.0, 0.0]), np.array([0.0, -2.0 * radius, 0.0])
        surfaces.append(rectangle(rng, corner, edge_u, edge_v, lid, density, is_disc=True))
    return surfaces


def sphere(
    rng: np.random.Generator, centre: tuple[float, float, float], radius: float, material: Material, density: float
) -> list[Surface]:
    """A ball covered with a material."""
    texture = material(rng, 2.0 * np.pi * radius, np.pi * radius, density) ** np.float32(GAMMA)
    return [Sphere(np.array(centre), radius, _seamless(texture))]


def _seamless(texture: Image) -> Image:
    """The texture with its last columns faded into its first ones, so that it closes around a body."""
    band = texture.shape[1] // 6
    fade = np.linspace(0.0, 1.0, band, dtype=np.float32)[None, :, None]
    closed = texture[:, : texture.shape[1] - band].copy()
    closed[:, :band] = fade * closed[:, :band] + (1.0 - fade) * texture[:, -band:]
    return closed


def lit(
    surfaces: list[Surface], blockers: list[Blocker], lamps: list[Lamp], room: FloatArray, ambient: FloatArray
) -> list[Surface]:
    """The surfaces with their textures multiplied by the light on them; `room` (2, 3): lowest and highest corner.

    Direct light of the lamps with soft shadows, plus `ambient` (3,) dimmed where near things close the sky: all
    diffuse, sampled every few centimetres and interpolated.
    """
    grids = [_light_grid(surface) for surface in surfaces]
    samples = [surface.points(u.ravel(), v.ravel()) for surface, (u, v) in zip(surfaces, grids, strict=True)]
    normals = np.concatenate([normal for _, normal in samples])
    points = np.concatenate([point for point, _ in samples]) + 0.004 * normals
    light = ambient * _openness(points, normals, blockers, room)[:, None]
    for lamp in lamps:
        light += _direct_light(points, normals, lamp, blockers)[:, None] * lamp.colour
    ends = np.cumsum([u.size for u, _ in grids])[:-1]
    parts = np.split(light.astype(np.float32), ends)
    return [
        _shaded(surface, part.reshape(*u.shape, 3))
        for surface, (u, _), part in zip(surfaces, grids, parts, strict=True)
    ]


def _light_grid(surface: Surface, spacing_m: float = 0.07) -> tuple[FloatArray, FloatArray]:
    """Texture fractions (rows, columns) of cell centres about `spacing_m` apart."""
    rows, columns = (max(2, round(n / surface.density / spacing_m)) for n in surface.texture.shape[:2])
    v, u = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    return u, v


def _shaded(surface: Surface, light: Image) -> Surface:
    if surface.glow is not None:
        return replace(surface, texture=surface.texture * np.float32(surface.glow))
    rows, columns = surface.texture.shape[:2]
    smooth = np.asarray(cv2.resize(light, (columns, rows), interpolation=cv2.INTER_LINEAR), np.float32)
    return replace(surface, texture=surface.texture * smooth)


def _direct_light(points: FloatArray, normals: FloatArray, lamp: Lamp, blockers: list[Blocker]) -> FloatArray:
    """(N,) share of the lamp's power, averaged over points spread on it."""
    total = np.zeros(len(points))
    steps = 4
    for k in range(steps * steps):
        a, b = (k // steps + 0.5) / steps, (k % steps + 0.5) / steps
        offset = lamp.corner + a * lamp.edge_u + b * lamp.edge_v - points
        distance = np.linalg.norm(offset, axis=1)
        direction = offset / distance[:, None]
        arriving = np.einsum("ij,ij->i", direction, normals) * -(direction @ lamp.normal)
        facing = np.flatnonzero((arriving > 0.0) & (direction @ lamp.normal < 0.0))
        seen = ~_blocked(points[facing], direction[facing], distance[facing], blockers)
        total[facing] += seen * arriving[facing] / np.maximum(distance[facing], 0.3) ** 2
    return total / (steps * steps)


def _openness(
    points: FloatArray, normals: FloatArray, blockers: list[Blocker], room: FloatArray, reach_m: float = 0.7
) -> FloatArray:
    """(N,) cosine-weighted share of the hemisphere that is open for `reach_m`; corners of the room darken too."""
    num_directions = 18
    k = np.arange(num_directions) + 0.5
    ring, angle = np.sqrt(k / num_directions), k * np.pi * (3.0 - np.sqrt(5.0))
    local = np.stack((ring * np.cos(angle), ring * np.sin(angle), np.sqrt(1.0 - ring**2)), axis=1)
    helper = np.where(np.abs(normals[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    tangent = np.cross(helper, normals)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    bitangent = np.cross(normals, tangent)
    total = np.zeros(len(points))
    reach = np.full(len(points), reach_m)
    for a, b, c in local:
        direction = a * tangent + b * bitangent + c * normals
        closed = _blocked(points, direction, reach, blockers)
        ahead = points + reach_m * direction
        closed |= np.any((ahead < room[0]) | (ahead > room[1]), axis=1)
        total += np.where(closed, 0.35, 1.0)
    return total / num_directions


def _blocked(
    points: FloatArray, directions: FloatArray, reach: FloatArray, blockers: list[Blocker]
) -> NDArray[np.bool_]:
    """(N,) whether a ray meets a box before `reach` (slab method, Kay and Kajiya 1986)."""
    hit = np.zeros(len(points), bool)
    for blocker in blockers:
        rotation = turned(blocker.yaw_rad)
        start, along = (points - blocker.centre) @ rotation, directions @ rotation
        enter, leave = np.full(len(points), -np.inf), np.full(len(points), np.inf)
        for axis in range(3):
            inverse = 1.0 / np.where(np.abs(along[:, axis]) < 1e-9, 1e-9, along[:, axis])
            middle, spread = -start[:, axis] * inverse, np.abs(blocker.half[axis] * inverse)
            np.maximum(enter, middle - spread, out=enter)
            np.minimum(leave, middle + spread, out=leave)
        hit |= (enter < leave) & (leave > 1e-3) & (enter < reach)
    return hit
