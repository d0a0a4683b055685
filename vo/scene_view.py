"""How the scene is looked at: what is shown, which keys change it, and where the eye is. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from vo.scene import Layer
from vo.types import FloatArray

FIELD_OF_VIEW_DEG = 60.0
POINT_SIZES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
DEFAULT_POINT_SIZE = 2
SMOOTHING_S = 0.4
SETTLED = 1e-3
UP = np.array([0.0, -1.0, 0.0])


class Eye(Enum):
    """What moves the view."""

    FOLLOW = "follow"
    OVERVIEW = "overview"
    FREE = "free"


KEYS: tuple[tuple[str, str], ...] = (
    ("T", "trajectory"),
    ("K", "keyframes"),
    ("L", "landmarks"),
    ("C", "camera"),
    ("G", "ground truth"),
    ("I", "image"),
    ("F", "follow / free"),
    ("O", "overview"),
    ("+ -", "size of points"),
    ("S", "save picture"),
    ("H", "this help"),
    ("Q", "quit"),
)
_LAYER_KEYS = {
    "T": Layer.TRAJECTORY,
    "K": Layer.KEYFRAMES,
    "L": Layer.LANDMARKS,
    "C": Layer.CAMERA,
    "G": Layer.TRUTH,
}


@dataclass(slots=True)
class ViewState:
    """What the user has chosen.

    hidden                       layers that are not drawn.
    wants_picture, wants_quit    for the program to see to.
    """

    eye: Eye = Eye.FOLLOW
    hidden: set[Layer] = field(default_factory=set)
    shows_image: bool = True
    shows_help: bool = True
    point_size: float = POINT_SIZES[DEFAULT_POINT_SIZE]
    wants_picture: bool = False
    wants_quit: bool = False

    def press(self, key: str) -> bool:
        """One key, upper case; whether it means anything."""
        if key in _LAYER_KEYS:
            self.hidden ^= {_LAYER_KEYS[key]}
        elif key == "I":
            self.shows_image = not self.shows_image
        elif key == "H":
            self.shows_help = not self.shows_help
        elif key == "F":
            self.eye = Eye.FREE if self.eye is Eye.FOLLOW else Eye.FOLLOW
        elif key == "O":
            self.eye = Eye.OVERVIEW
        elif key in ("+", "-"):
            self._resize_points(1 if key == "+" else -1)
        elif key == "S":
            self.wants_picture = True
        elif key == "Q":
            self.wants_quit = True
        else:
            return False
        return True

    def is_on(self, label: str) -> bool | None:
        """Whether what a key of `KEYS` switches is on; None for one that switches nothing."""
        letter = next(letter for letter, text in KEYS if text == label)
        if letter in _LAYER_KEYS:
            return _LAYER_KEYS[letter] not in self.hidden
        states = {
            "I": self.shows_image,
            "F": self.eye is Eye.FOLLOW,
            "O": self.eye is Eye.OVERVIEW,
        }
        return states.get(letter)

    def _resize_points(self, step: int) -> None:
        index = POINT_SIZES.index(self.point_size) + step
        self.point_size = POINT_SIZES[min(max(index, 0), len(POINT_SIZES) - 1)]


@dataclass(frozen=True, slots=True, eq=False)
class Gaze:
    """From where to where one looks: eye, target and up (3,) in the world; near and far plane."""

    eye: FloatArray
    target: FloatArray
    up: FloatArray
    near: float
    far: float


def follow_gaze(T_world_camera: FloatArray, depth: float) -> Gaze:
    """From behind and above the camera, along its view; `depth` is how far away the scene is."""
    R, position = T_world_camera[:3, :3], T_world_camera[:3, 3]
    forward, up = R[:, 2], -R[:, 1]
    eye = position - 0.9 * depth * forward + 0.45 * depth * up
    return Gaze(eye, position + 0.6 * depth * forward, up, 0.01 * depth, 400 * depth)


def overview_gaze(low: FloatArray, high: FloatArray, aspect: float) -> Gaze:
    """All of a box with corners `low`, `high` (3,) obliquely from above; `aspect` is width by height of the view."""
    centre = (low + high) / 2
    radius = max(float(np.linalg.norm(high - low)) / 2, 1e-3)
    half_angle = np.deg2rad(FIELD_OF_VIEW_DEG / 2)
    half_angle = min(half_angle, float(np.arctan(np.tan(half_angle) * aspect)))
    direction = np.array([0.25, -0.75, -0.65])
    eye = centre + direction / np.linalg.norm(direction) * (radius / np.sin(half_angle))
    return Gaze(eye, centre, UP, 0.01 * radius, 100 * radius)


def approach(gaze: Gaze | None, goal: Gaze, elapsed_s: float) -> tuple[Gaze, bool]:
    """The view on its way to `goal`, and whether it has arrived: it gets there gently, whatever the frame rate."""
    if gaze is None:
        return goal, True
    share = 1.0 - float(np.exp(-elapsed_s / SMOOTHING_S))
    eye = gaze.eye + share * (goal.eye - gaze.eye)
    target = gaze.target + share * (goal.target - gaze.target)
    up = gaze.up + share * (goal.up - gaze.up)
    length = float(np.linalg.norm(up))
    up = up / length if length > 1e-6 else goal.up
    distance = np.linalg.norm(goal.eye - goal.target)
    is_there = bool(max(np.abs(eye - goal.eye).max(), np.abs(target - goal.target).max()) < SETTLED * distance)
    return Gaze(eye, target, up, goal.near, goal.far), is_there


def camera_matrix(gaze: Gaze, width: int, height: int) -> tuple[FloatArray, FloatArray]:
    """K (3, 3) and T_eye_world (4, 4) of a pinhole that looks like that: z forward, y down, px."""
    forward = gaze.target - gaze.eye
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, gaze.up)
    right = right / np.linalg.norm(right)
    T = np.eye(4)
    T[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    T[:3, 3] = -T[:3, :3] @ gaze.eye
    focal = height / 2 / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    K = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    return K, T
