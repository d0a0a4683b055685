"""Training pairs with exact correspondence: two views of one photograph, related by a homography."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from frontends.base import check_settings, setting

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WarpConfig:
    """How different the two views are; every value but `gray` is the largest one, drawn evenly up to it."""

    rotation_deg: float = setting(20.0, minimum=0.0, maximum=180.0, help="either way, deg")
    scale: float = setting(1.4, minimum=1.0, maximum=4.0, help="size ratio, either way")
    shear: float = setting(0.15, minimum=0.0, maximum=1.0, help="either way")
    perspective: float = setting(0.2, minimum=0.0, maximum=0.9, help="change of scale across the view")
    shift: float = setting(0.15, minimum=0.0, maximum=1.0, help="share of the side, either way")
    brightness: float = setting(0.15, minimum=0.0, maximum=1.0, help="added, share of the range")
    contrast: float = setting(1.4, minimum=1.0, maximum=4.0, help="ratio, either way")
    noise: float = setting(0.02, minimum=0.0, maximum=1.0, help="deviation, share of the range")
    gray: float = setting(0.0, minimum=0.0, maximum=1.0, help="share of the pairs that have no colour")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingPair:
    """Two views of the same size (S, S, 3) RGB uint8.

    flow  (S, S, 2) float32 px: where the pixels of view 0 lie in view 1, pixel centres at integers; also outside it.
    """

    image0: NDArray[np.uint8]
    image1: NDArray[np.uint8]
    flow: NDArray[np.float32]


def homographic_pair(
    photo: NDArray[np.uint8], side_px: int, generator: np.random.Generator, warp: WarpConfig | None = None
) -> TrainingPair:
    """Two square views of a photograph (H, W, 3) RGB uint8. Raises ValueError for one smaller than the views."""
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or min(photo.shape[:2]) < side_px:
        raise ValueError(
            f"photo: expected (H, W, 3) uint8 of at least {side_px} px a side, got {photo.shape} {photo.dtype}"
        )
    warp = warp or WarpConfig()
    # No number is drawn where the answer is known, so that pairs in colour alone are those of every seed before.
    if warp.gray > 0 and generator.uniform() < warp.gray:
        photo = np.repeat(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2).astype(np.uint8)
    H_view0_view1 = random_homography(side_px, generator, warp)
    column = int(generator.integers(photo.shape[1] - side_px + 1))
    row = int(generator.integers(photo.shape[0] - side_px + 1))
    to_view0 = np.array([[1.0, 0.0, -column], [0.0, 1.0, -row], [0.0, 0.0, 1.0]])
    view0 = photo[row : row + side_px, column : column + side_px]
    view1 = cv2.warpPerspective(
        photo, H_view0_view1 @ to_view0, (side_px, side_px), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT_101
    )
    images = [_relit(np.asarray(view, np.uint8), generator, warp) for view in (view0, view1)]
    return TrainingPair(images[0], images[1], homography_flow(H_view0_view1, side_px))


def random_homography(side_px: int, generator: np.random.Generator, warp: WarpConfig) -> FloatArray:
    """(3, 3): px of view 0 to px of view 1, a composition of plain motions about the centre of the view."""
    angle = np.deg2rad(warp.rotation_deg) * generator.uniform(-1, 1)
    scale = warp.scale ** generator.uniform(-1, 1)
    shear = warp.shear * generator.uniform(-1, 1)
    shift = warp.shift * side_px * generator.uniform(-1, 1, 2)
    # A point at the edge of the view is divided by 1 +- tilt.
    tilt = warp.perspective / side_px * generator.uniform(-1, 1, 2)
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    similarity = np.array([[cosine, -sine, shift[0]], [sine, cosine, shift[1]], [0.0, 0.0, 1.0]])
    sheared = np.array([[1.0, shear, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    tilted = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [tilt[0], tilt[1], 1.0]])
    centre = (side_px - 1) / 2
    to_centre = np.array([[1.0, 0.0, -centre], [0.0, 1.0, -centre], [0.0, 0.0, 1.0]])
    homography: FloatArray = np.linalg.inv(to_centre) @ similarity @ sheared @ tilted @ to_centre
    return homography


def homography_flow(H_view0_view1: FloatArray, side_px: int) -> NDArray[np.float32]:
    """(S, S, 2) float32 px in view 1 of every pixel of view 0."""
    columns, rows = np.meshgrid(np.arange(side_px), np.arange(side_px))
    points = np.stack((columns, rows, np.ones_like(rows)), axis=-1) @ H_view0_view1.T
    flow: NDArray[np.float32] = (points[..., :2] / points[..., 2:]).astype(np.float32)
    return flow


def _relit(image: NDArray[np.uint8], generator: np.random.Generator, warp: WarpConfig) -> NDArray[np.uint8]:
    """The image under another light, with the noise of a sensor."""
    gain = warp.contrast ** generator.uniform(-1, 1)
    offset = 255 * warp.brightness * generator.uniform(-1, 1)
    noise = generator.normal(0.0, 255 * warp.noise * generator.uniform(0, 1), image.shape)
    relit: NDArray[np.uint8] = np.clip((image - 127.5) * gain + 127.5 + offset + noise, 0, 255).astype(np.uint8)
    return relit
