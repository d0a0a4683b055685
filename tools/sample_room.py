"""The room of the sample clip: walls, window, furniture and what lies about, all from procedural materials."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
from sample_geometry import Blocker, FloatArray, Lamp, Rectangle, Surface, box, cylinder, lit, rectangle, sphere
from sample_pictures import (
    book_spine,
    dead_leaves,
    framed,
    landscape,
    leaf_blade,
    outdoors,
    panelled_door,
    paper_block,
)
from sample_render import Scene, build_scene
from sample_textures import Colour, Material, bricks, cardboard, curtain, fabric, page, paint, planks, rug, wood

SIZE = np.array([5.4, 4.6, 2.6])
WINDOW_Y = (1.5, 2.9)
WINDOW_Z = (0.95, 2.15)
SHELF_Z = (0.06, 0.43, 0.80, 1.15, 1.50, 1.875)
OAK, WALNUT, PINE = (0.66, 0.50, 0.34), (0.40, 0.28, 0.20), (0.76, 0.62, 0.44)
WALL, WHITE, BLACK = (0.83, 0.81, 0.76), (0.88, 0.88, 0.86), (0.10, 0.10, 0.11)
UP, EAST, NORTH = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])


def sample_scene(seed: int = 7) -> Scene:
    """The furnished and lit room; the same for the same seed."""
    parts = (_shell, _window, _pictures, _shelf, _table, _seats, _cupboard, _odds_and_ends, _plant)
    streams = np.random.default_rng(seed).spawn(len(parts))
    surfaces: list[Surface] = []
    for part, rng in zip(parts, streams, strict=True):
        surfaces.extend(part(rng))
    lamps = [
        Lamp(
            np.array([SIZE[0], WINDOW_Y[0], WINDOW_Z[0]]),
            NORTH * (WINDOW_Y[1] - WINDOW_Y[0]),
            UP * (WINDOW_Z[1] - WINDOW_Z[0]),
            -EAST,
            np.array([6.0, 6.3, 6.6]),
        ),
        Lamp(np.array([2.2, 1.8, 2.3]), 0.7 * EAST, 0.7 * NORTH, -UP, np.array([1.9, 1.75, 1.5])),
    ]
    room = np.stack((np.zeros(3), SIZE))
    ambient = np.array([0.21, 0.205, 0.20])
    return build_scene(lit(surfaces, _blockers(), lamps, room, ambient))


def _blockers() -> list[Blocker]:
    """The larger pieces, as boxes that cast shadow: foot, size and turn as where they are made below."""
    boxes: list[tuple[tuple[float, float, float], tuple[float, float, float], float]] = [
        *(((1.15, 4.42, z), (1.5, 0.30, 0.025), 0.0) for z in SHELF_Z),
        *(((x, 4.42, 0.0), (0.025, 0.30, 1.9), 0.0) for x in (0.4125, 1.8875)),
        ((2.75, 2.75, 0.71), (1.5, 0.85, 0.04), 4.0),
        ((4.35, 1.05, 0.0), (0.8, 0.8, 0.42), -32.0),
        ((4.55, 0.75, 0.42), (0.75, 0.2, 0.5), -32.0),
        ((3.85, 4.32, 0.0), (1.2, 0.45, 0.85), 0.0),
        ((1.95, 2.0, 0.44), (0.42, 0.42, 0.04), 25.0),
        ((1.78, 1.92, 0.48), (0.06, 0.42, 0.45), 25.0),
        ((0.55, 2.9, 0.0), (0.5, 0.4, 0.36), 18.0),
        ((0.60, 2.86, 0.36), (0.36, 0.30, 0.26), -12.0),
        ((2.35, 2.85, 0.75), (0.25, 0.18, 0.12), 12.0),
        ((3.0, 2.6, 0.75), (0.09, 0.09, 0.10), 0.0),
        ((5.05, 3.55, 0.0), (0.34, 0.34, 0.36), 0.0),
        ((4.0, 4.3, 0.85), (0.24, 0.2, 0.3), 0.0),
    ]
    return [
        Blocker(foot + UP * size[2] / 2.0, np.array(size) / 2.0, float(np.deg2rad(yaw))) for foot, size, yaw in boxes
    ]


def _wall(
    rng: np.random.Generator,
    material: Material,
    left: FloatArray,
    right: FloatArray,
    low: float,
    high: float,
    density: float,
) -> Rectangle:
    """Part of a wall between two floor points, as seen from inside, from height `low` to `high`."""
    origin = left + UP * high
    return rectangle(rng, origin, right - left, -UP * (high - low), material, density)


def _shell(rng: np.random.Generator) -> list[Surface]:
    """Walls, floor, ceiling, skirting, door and rug. Planes reach past each other, so that corners have no gaps."""
    x, y, z = SIZE
    over = 0.02
    south_west, south_east = np.array([-over, 0.0, 0.0]), np.array([x + over, 0.0, 0.0])
    north_west, north_east = np.array([-over, y, 0.0]), np.array([x + over, y, 0.0])
    ripple = fabric((0.62, 0.66, 0.62), 0.012, 0.035)
    brick = bricks((0.62, 0.42, 0.34), (0.68, 0.64, 0.58))
    surfaces: list[Surface] = [
        _wall(rng, paint(WALL), north_west, north_east, -over, z + over, 330.0),
        _wall(rng, ripple, south_east, south_west, -over, z + over, 250.0),
        _wall(rng, paint((0.72, 0.76, 0.78)), NORTH * -over, NORTH * (y + over), -over, z + over, 330.0),
        rectangle(
            rng,
            np.array([-over, y + over, 0.0]),
            EAST * (x + 2 * over),
            -NORTH * (y + 2 * over),
            planks((0.58, 0.43, 0.30)),
            420.0,
        ),
        rectangle(
            rng, np.array([-over, -over, z]), EAST * (x + 2 * over), NORTH * (y + 2 * over), paint(WHITE, 0.008), 120.0
        ),
        rectangle(
            rng,
            np.array([1.5, 3.3, 0.006]),
            EAST * 2.5,
            -NORTH * 1.7,
            rug((0.50, 0.22, 0.19), (0.80, 0.70, 0.52)),
            420.0,
        ),
    ]
    east = x * EAST
    ends = (-over, WINDOW_Y[0], WINDOW_Y[1], y + over)
    # The texture coordinates run from north to south here: the wall faces west.
    for low, high, first, last in (
        (-over, z + over, ends[0], ends[1]),
        (-over, z + over, ends[2], ends[3]),
        (-over, WINDOW_Z[0], ends[1], ends[2]),
        (WINDOW_Z[1], z + over, ends[1], ends[2]),
    ):
        surfaces.append(_wall(rng, brick, east + NORTH * last, east + NORTH * first, low, high, 420.0))
    skirting = paint((0.86, 0.85, 0.82), 0.02)
    surfaces += box(rng, (x / 2, y - 0.01, 0.0), (x, 0.02, 0.09), {"south": skirting, "top": skirting}, 300.0)
    surfaces += box(rng, (0.01, y / 2, 0.0), (0.02, y, 0.09), {"east": skirting, "top": skirting}, 300.0)
    surfaces += box(rng, (0.02, 1.3, 0.0), (0.04, 0.86, 2.05), {"east": panelled_door, "sides": skirting}, 350.0)
    for position, size in (
        ((0.03, 0.84, 0.0), (0.06, 0.07, 2.12)),
        ((0.03, 1.76, 0.0), (0.06, 0.07, 2.12)),
        ((0.03, 1.3, 2.05), (0.06, 0.99, 0.07)),
    ):
        surfaces += box(rng, position, size, {"sides": skirting}, 300.0)
    surfaces += sphere(rng, (0.085, 1.66, 1.02), 0.028, paint((0.72, 0.64, 0.40), 0.05), 500.0)
    return surfaces


def _window(rng: np.random.Generator) -> list[Surface]:
    """Reveal, frame bars, the view outside, a sill and curtains in folds."""
    x = float(SIZE[0])
    (y0, y1), (z0, z1) = WINDOW_Y, WINDOW_Z
    white, depth = paint((0.87, 0.87, 0.85), 0.02), 0.16
    outer = x + depth
    surfaces: list[Surface] = [
        rectangle(
            rng, np.array([x + 4.5, y1 + 5.0, 4.6]), -NORTH * (y1 - y0 + 10.0), -UP * 5.6, outdoors, 130.0, glow=1.9
        ),
        rectangle(rng, np.array([x, y1, z0]), EAST * depth, -NORTH * (y1 - y0), white, 300.0),
        rectangle(rng, np.array([x, y0, z1]), EAST * depth, NORTH * (y1 - y0), white, 300.0),
        rectangle(rng, np.array([x, y1, z1]), EAST * depth, -UP * (z1 - z0), white, 300.0),
        rectangle(rng, np.array([outer, y0, z1]), -EAST * depth, -UP * (z1 - z0), white, 300.0),
    ]
    bars = [(y0 + 0.03, 0.06), ((y0 + y1) / 2, 0.08), (y1 - 0.03, 0.06)]
    for middle, width in bars:
        surfaces += box(rng, (outer - 0.03, middle, z0), (0.06, width, z1 - z0), {"sides": white}, 400.0)
    for low, height in ((z0, 0.06), (z0 + 0.72, 0.05), (z1 - 0.06, 0.06)):
        surfaces += box(rng, (outer - 0.03, (y0 + y1) / 2, low), (0.058, y1 - y0, height), {"sides": white}, 400.0)
    surfaces += box(rng, (x - 0.04, (y0 + y1) / 2, z0 - 0.03), (0.3, y1 - y0 + 0.16, 0.03), wood(PINE, 0.1), 450.0)
    rod = wood(WALNUT)
    surfaces += box(rng, (x - 0.1, (y0 + y1) / 2, z1 + 0.17), (0.025, y1 - y0 + 0.9, 0.025), rod, 400.0)
    for start in (y0 - 0.42, y1 + 0.02):
        surfaces += _curtain(rng, x - 0.09, start, z1 + 0.17)
    return surfaces


def _curtain(rng: np.random.Generator, x: float, start: float, top: float, num_folds: int = 13) -> list[Surface]:
    """Strips of cloth at changing angles, hanging from `top` to just above the floor."""
    cloth = curtain((0.56, 0.58, 0.46))
    depths = x + 0.022 * np.where(np.arange(num_folds + 1) % 2, 1.0, -1.0) * rng.uniform(0.5, 1.2, num_folds + 1)
    sides = start + np.cumsum(rng.uniform(0.018, 0.044, num_folds + 1))
    strips: list[Surface] = []
    for k in range(num_folds):
        left, right = np.array([depths[k + 1], sides[k + 1], top]), np.array([depths[k], sides[k], top])
        strips.append(rectangle(rng, left, right - left, -UP * (top - 0.05), cloth, 420.0))
        strips.append(rectangle(rng, right, left - right, -UP * (top - 0.05), cloth, 260.0))
    return strips


def _pictures(rng: np.random.Generator) -> list[Surface]:
    """Framed pictures, posters and notes on the walls: south-facing ones on the north wall, east-facing on the west."""
    y = float(SIZE[1])
    warm = dead_leaves(
        ((0.82, 0.74, 0.60), (0.70, 0.30, 0.20), (0.24, 0.30, 0.36), (0.86, 0.62, 0.26), (0.42, 0.46, 0.38))
    )
    cool = dead_leaves(
        ((0.30, 0.40, 0.48), (0.78, 0.80, 0.78), (0.16, 0.24, 0.34), (0.58, 0.66, 0.62), (0.72, 0.50, 0.40)), 0.008
    )
    hills = landscape((0.80, 0.78, 0.72), (0.18, 0.24, 0.24))
    surfaces: list[Surface] = []
    # Glass over one picture and the dark screen mirror the room: not all that is seen is where it seems.
    north: list[tuple[float, float, float, float, Material, Colour, float]] = [
        (2.55, 1.30, 0.62, 0.86, framed(warm, 0.08, BLACK), BLACK, 0.0),
        (3.42, 1.52, 0.80, 0.56, framed(hills, 0.10, OAK), OAK, 0.06),
        (4.25, 1.38, 0.36, 0.48, framed(cool, 0.12, WALNUT), WALNUT, 0.0),
        (4.78, 1.62, 0.30, 0.30, framed(warm, 0.05, WHITE), WHITE, 0.0),
    ]
    for x, low, width, height, picture, colour, gloss in north:
        surfaces += box(rng, (x, y - 0.013, low), (width, 0.026, height), {"sides": wood(colour, 0.06)}, 560.0)
        corner = np.array([x - width / 2, y - 0.0262, low + height])
        surfaces.append(rectangle(rng, corner, EAST * width, -UP * height, picture, 560.0, gloss=gloss))
    west: list[tuple[float, float, float, float, Material]] = [
        (2.20, 1.20, 0.48, 0.68, cool),
        (4.05, 1.30, 0.50, 0.40, framed(landscape((0.72, 0.80, 0.86), (0.34, 0.26, 0.20)), 0.06, PINE)),
        (2.60, 1.38, 0.15, 0.21, page),
        (2.62, 1.12, 0.15, 0.21, page),
    ]
    for middle, low, width, height, picture in west:
        surfaces += box(
            rng, (0.004, middle, low), (0.008, width, height), {"east": picture, "sides": paint(WHITE)}, 480.0
        )
    surfaces += box(rng, (0.03, 3.25, 1.15), (0.06, 0.94, 0.56), paint((0.16, 0.16, 0.17), 0.03), 400.0)
    screen = paint((0.14, 0.14, 0.15), 0.03)
    surfaces.append(rectangle(rng, np.array([0.0602, 2.80, 1.69]), NORTH * 0.90, -UP * 0.52, screen, 300.0, gloss=0.07))
    south = framed(
        dead_leaves(((0.60, 0.58, 0.50), (0.30, 0.26, 0.30), (0.80, 0.78, 0.70), (0.52, 0.30, 0.28))), 0.06, OAK
    )
    surfaces += box(rng, (2.8, 0.012, 1.2), (1.0, 0.024, 0.7), {"north": south, "sides": wood(OAK)}, 350.0)
    return surfaces


def _shelf(rng: np.random.Generator) -> list[Surface]:
    """A bookcase against the north wall with books that differ in size, depth and lean, and a few gaps."""
    x0, width, depth, height = 0.40, 1.5, 0.30, 1.90
    y = float(SIZE[1]) - 0.03 - depth / 2.0
    board, side = wood(OAK, 0.12), 0.025
    surfaces: list[Surface] = []
    for x in (x0 + side / 2, x0 + width - side / 2):
        surfaces += box(rng, (x, y, 0.0), (side, depth, height), board, 450.0)
    back = y + depth / 2.0
    surfaces.append(_wall(rng, board, np.array([x0, back, 0.0]), np.array([x0 + width, back, 0.0]), 0.0, height, 300.0))
    for z in SHELF_Z:
        surfaces += box(
            rng,
            (x0 + width / 2, y, z),
            (width - 2 * side, depth - 0.005, 0.025),
            {"sides": board, "top": board, "bottom": board},
            450.0,
        )
    for low, high in pairwise(SHELF_Z):
        x = x0 + side + 0.005
        while x < x0 + width - side - 0.07:
            if rng.random() < 0.10:
                x += rng.uniform(0.04, 0.22)
                continue
            thickness, tall = rng.uniform(0.014, 0.052), (high - low - 0.025) * rng.uniform(0.58, 0.95)
            deep = min(rng.uniform(0.13, 0.23), depth - 0.02)
            front = y - depth / 2.0 + rng.uniform(0.005, 0.06)
            foot = (x + thickness / 2, front + deep / 2, low + 0.025)
            faces = {"south": book_spine, "east": book_spine, "west": book_spine, "top": paper_block}
            surfaces += box(rng, foot, (thickness, deep, tall), faces, 520.0)
            x += thickness + (0.001 if rng.random() < 0.8 else rng.uniform(0.003, 0.02))
    surfaces += box(rng, (0.75, y, 1.90), (0.34, 0.24, 0.19), cardboard, 450.0, 7.0)
    surfaces += cylinder(
        rng, (1.35, y, 1.90), 0.085, 0.24, fabric((0.42, 0.48, 0.55), 0.01), 450.0, lid=paint(BLACK), lid_drop=0.02
    )
    return surfaces


def _table(rng: np.random.Generator) -> list[Surface]:
    """A table in the middle of the room: books, papers, mugs, fruit, a small box."""
    top, legs = 0.75, wood(OAK, 0.12)
    surfaces: list[Surface] = list(box(rng, (2.75, 2.75, 0.71), (1.5, 0.85, 0.04), wood(PINE, 0.14), 620.0, 4.0))
    for dx, dy in ((-0.68, -0.35), (0.68, -0.35), (-0.68, 0.35), (0.68, 0.35)):
        surfaces += box(rng, (2.75 + dx, 2.75 + dy, 0.0), (0.06, 0.06, 0.71), {"sides": legs}, 400.0, 4.0)
    surfaces += box(rng, (2.35, 2.85, top), (0.25, 0.18, 0.12), cardboard, 620.0, 12.0)
    z, cover = top, {"south": book_spine, "sides": paper_block}
    for width, depth, thickness, yaw in (
        (0.30, 0.22, 0.035, 10.0),
        (0.26, 0.19, 0.028, -14.0),
        (0.22, 0.15, 0.04, 22.0),
    ):
        faces = {
            **cover,
            "top": dead_leaves((tuple(rng.uniform(0.2, 0.8, 3)), (0.85, 0.82, 0.75), (0.2, 0.2, 0.24)), 0.006),
        }
        surfaces += box(rng, (3.22, 2.80, z), (width, depth, thickness), faces, 620.0, yaw)
        z += thickness
    for x, y, yaw in ((2.62, 2.55, 8.0), (2.80, 2.60, -21.0), (2.70, 2.98, 40.0)):
        surfaces += box(rng, (x, y, top), (0.21, 0.297, 0.0015), {"top": page, "sides": paint(WHITE)}, 620.0, yaw)
    mug = partial(cylinder, rng, radius=0.041, height=0.095, density=620.0, lid_drop=0.012)
    surfaces += mug(base=(3.0, 2.6, top), material=paint((0.30, 0.42, 0.52), 0.06), lid=paint((0.16, 0.09, 0.06), 0.1))
    surfaces += mug(base=(2.42, 2.56, top), material=curtain((0.82, 0.78, 0.70)), lid=paint((0.75, 0.73, 0.70), 0.02))
    peel = ((0.80, 0.46, 0.14), (0.70, 0.62, 0.22), (0.62, 0.20, 0.16))
    for k, (x, y) in enumerate(((2.93, 2.86), (3.005, 2.895), (2.97, 2.95))):
        surfaces += sphere(rng, (x, y, top + 0.038), 0.038, fabric(peel[k], 0.004, 0.07), 620.0)
    return surfaces


def _seats(rng: np.random.Generator) -> list[Surface]:
    """A slatted chair at the table and an armchair in the corner by the window."""
    surfaces: list[Surface] = []
    stain = wood(WALNUT, 0.14)
    chair, turn = np.array([1.95, 2.0]), 25.0
    c, s = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))

    def at(dx: float, dy: float, z: float) -> tuple[float, float, float]:
        return float(chair[0] + c * dx - s * dy), float(chair[1] + s * dx + c * dy), z

    surfaces += box(rng, at(0, 0, 0.44), (0.42, 0.42, 0.04), stain, 560.0, turn)
    for dx, dy, height in ((-0.18, -0.18, 0.94), (-0.18, 0.18, 0.94), (0.18, -0.18, 0.44), (0.18, 0.18, 0.44)):
        surfaces += box(rng, at(dx, dy, 0.0), (0.038, 0.038, height), {"sides": stain, "top": stain}, 500.0, turn)
    for z, height in ((0.58, 0.05), (0.70, 0.05), (0.82, 0.08)):
        surfaces += box(rng, at(-0.18, 0.0, z), (0.02, 0.33, height), stain, 560.0, turn)
    cloth = fabric((0.34, 0.42, 0.46), 0.009, 0.12)
    parts = [
        ((4.35, 1.05, 0.0), (0.80, 0.80, 0.26)),
        ((4.33, 1.08, 0.26), (0.56, 0.66, 0.17)),
        ((4.55, 0.75, 0.26), (0.80, 0.20, 0.62)),
        ((4.02, 0.85, 0.26), (0.13, 0.70, 0.30)),
        ((4.68, 1.26, 0.26), (0.13, 0.70, 0.30)),
    ]
    for foot, size in parts:
        surfaces += box(rng, foot, size, cloth, 430.0, -32.0)
    surfaces += box(
        rng, (4.42, 0.98, 0.43), (0.38, 0.11, 0.34), rug((0.72, 0.52, 0.24), (0.30, 0.24, 0.22)), 460.0, -24.0
    )
    return surfaces


def _cupboard(rng: np.random.Generator) -> list[Surface]:
    """A chest of drawers against the north wall with a loudspeaker, a vase and a clock of books on it."""
    surfaces: list[Surface] = []
    front, y = 4.32 - 0.225, 4.32
    surfaces += box(rng, (3.85, y, 0.0), (1.2, 0.45, 0.85), wood(WALNUT, 0.13), 430.0)
    for row in range(3):
        for x in (3.56, 4.14):
            z = 0.08 + 0.255 * row
            surfaces += box(rng, (x, front - 0.008, z), (0.55, 0.016, 0.235), wood((0.47, 0.33, 0.23), 0.15), 520.0)
            surfaces += sphere(rng, (x, front - 0.032, z + 0.12), 0.017, paint((0.62, 0.56, 0.40), 0.05), 500.0)
    grille = fabric((0.20, 0.20, 0.21), 0.008, 0.16)
    surfaces += box(
        rng, (4.0, 4.3, 0.85), (0.24, 0.20, 0.30), {"south": grille, "sides": wood(WALNUT), "top": wood(WALNUT)}, 500.0
    )
    glaze = dead_leaves(((0.62, 0.66, 0.64), (0.30, 0.40, 0.50), (0.78, 0.76, 0.70)), 0.006, 0.05)
    surfaces += cylinder(rng, (3.52, 4.30, 0.85), 0.065, 0.26, glaze, 500.0, lid=paint(BLACK), lid_drop=0.03)
    x = 4.18
    for k in range(6):
        thickness = float(rng.uniform(0.02, 0.045))
        surfaces += box(
            rng,
            (x + thickness / 2, 4.33, 0.85),
            (thickness, 0.15, float(rng.uniform(0.17, 0.25))),
            {"south": book_spine, "east": book_spine, "west": book_spine, "top": paper_block},
            500.0,
            2.0 * (k % 2),
        )
        x += thickness + 0.004
    return surfaces


def _odds_and_ends(rng: np.random.Generator) -> list[Surface]:
    """Cartons, a ball, a bin, a standing lamp and the hanging lamp."""
    surfaces: list[Surface] = []
    surfaces += box(rng, (0.55, 2.9, 0.0), (0.5, 0.4, 0.36), cardboard, 480.0, 18.0)
    surfaces += box(rng, (0.60, 2.86, 0.36), (0.36, 0.30, 0.26), cardboard, 480.0, -12.0)
    ball = dead_leaves(((0.70, 0.66, 0.58), (0.62, 0.22, 0.18), (0.24, 0.34, 0.48)), 0.02, 0.12)
    surfaces += sphere(rng, (3.55, 1.75, 0.115), 0.115, ball, 480.0)
    surfaces += cylinder(
        rng,
        (2.12, 4.36, 0.0),
        0.13,
        0.31,
        fabric((0.50, 0.44, 0.34), 0.014, 0.14),
        480.0,
        lid=paint((0.07, 0.07, 0.07)),
        lid_drop=0.05,
    )
    metal = paint((0.30, 0.30, 0.31), 0.05)
    surfaces += cylinder(rng, (5.1, 0.35, 0.0), 0.014, 1.45, metal, 300.0)
    surfaces += cylinder(rng, (5.1, 0.35, 0.0), 0.15, 0.02, metal, 300.0, lid=metal)
    surfaces += cylinder(
        rng, (5.1, 0.35, 1.40), 0.17, 0.30, fabric((0.84, 0.78, 0.64), 0.008, 0.05), 350.0, lid=paint(WHITE)
    )
    surfaces += cylinder(rng, (2.55, 2.15, 2.28), 0.006, 0.34, metal, 400.0)
    surfaces += cylinder(
        rng, (2.55, 2.15, 2.08), 0.19, 0.20, fabric((0.80, 0.66, 0.48), 0.01, 0.06), 400.0, lid=paint(WHITE)
    )
    return surfaces


def _plant(rng: np.random.Generator) -> list[Surface]:
    """A pot beside the window with long leaves, each two flat pieces seen from both sides."""
    foot = np.array([4.98, 3.55, 0.0])
    surfaces: list[Surface] = list(
        cylinder(
            rng,
            tuple(foot),
            0.17,
            0.36,
            paint((0.58, 0.38, 0.30), 0.07),
            450.0,
            lid=paint((0.16, 0.12, 0.09), 0.25),
            lid_drop=0.03,
        )
    )
    for _ in range(22):
        azimuth, lean = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.08, 0.42)
        outward = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
        start = foot + outward * rng.uniform(0.0, 0.09) + UP * 0.32
        across = np.cross(UP, outward) * rng.uniform(0.028, 0.055)
        for angle, length, width in (
            (lean, rng.uniform(0.25, 0.5), 1.0),
            (lean + rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.3), 0.75),
        ):
            along = length * (np.cos(angle) * UP + np.sin(angle) * outward)
            corner, side = start + along - across * width / 2.0, across * width
            surfaces.append(rectangle(rng, corner, side, -along, leaf_blade, 480.0))
            surfaces.append(rectangle(rng, corner + side, -side, -along, leaf_blade, 480.0))
            start = start + along
    return surfaces
