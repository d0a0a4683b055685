"""Random plane-to-plane motions and warping of image batches, on the device. Pixel centres lie at integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from frontends.base import check_settings, setting


@dataclass(frozen=True, slots=True)
class MotionConfig:
    """How far a view is from another; every value is the largest one, drawn evenly up to it."""

    rotation_deg: float = setting(25.0, minimum=0.0, maximum=180.0, help="in the image plane, either way, deg")
    spin: float = setting(0.1, minimum=0.0, maximum=1.0, help="share of views with any rotation up to 180 deg")
    scale: float = setting(1.6, minimum=1.0, maximum=4.0, help="size ratio, either way")
    shear: float = setting(0.15, minimum=0.0, maximum=1.0, help="either way")
    perspective: float = setting(0.25, minimum=0.0, maximum=0.9, help="change of scale across the view")
    shift: float = setting(0.2, minimum=0.0, maximum=1.0, help="share of the side, either way")

    def __post_init__(self) -> None:
        check_settings(self)


SMALL_MOTION = MotionConfig(rotation_deg=3.0, spin=0.0, scale=1.08, shear=0.02, perspective=0.05, shift=0.05)


def random_homographies(
    count: int, size: tuple[int, int], generator: torch.Generator, config: MotionConfig, device: torch.device
) -> Tensor:
    """(count, 3, 3) float32: px of one view of (width, height) to px of another; plain motions about the centre.

    Translation x rotation x scale x shear x perspective, the composition of ALIKED's synthetic pairs.
    """

    def either_way(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=device) * 2 - 1) * limit

    width, height = size
    side = max(size)
    spins = torch.rand(count, generator=generator, device=device) < config.spin
    angle = torch.where(spins, either_way(math.pi), either_way(math.radians(config.rotation_deg)))
    scale = either_way(math.log(config.scale)).exp()
    shear, shift_x, shift_y = (either_way(v) for v in (config.shear, config.shift * width, config.shift * height))
    tilt_x, tilt_y = (either_way(config.perspective / side) for _ in range(2))
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    similarity = _matrices((cosine, -sine, shift_x), (sine, cosine, shift_y), (zero, zero, one))
    sheared = _matrices((one, shear, zero), (zero, one, zero), (zero, zero, one))
    tilted = _matrices((one, zero, zero), (zero, one, zero), (tilt_x, tilt_y, one))
    centre = torch.eye(3, device=device)
    centre[0, 2], centre[1, 2] = (width - 1) / 2, (height - 1) / 2
    return composed(centre, similarity, sheared, tilted, inverted(centre))


def _matrices(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


# No matrix products for places: autocast would make them in bfloat16, which is a pixel off at the far side of an image,
# and a GPU in TensorFloat-32, which is a quarter of one off.


def composed(first: Tensor, *others: Tensor) -> Tensor:
    """The product of matrices (..., 3, 3), from left to right, in their own precision."""
    for other in others:
        first = (first[..., :, :, None] * other[..., None, :, :]).sum(dim=-2)
    return first


def inverted(matrices: Tensor) -> Tensor:
    """Inverses of matrices (..., 3, 3), which are not singular: by their adjugates, without waiting for the device."""
    a, b, c = matrices.unbind(dim=-2)
    columns = [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]
    determinants = (a * columns[0]).sum(dim=-1)
    inverses: Tensor = torch.stack(columns, dim=-1) / determinants[..., None, None]
    return inverses


def applied(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Vectors (..., N, 3) multiplied by matrices (..., 3, 3), in their own precision; of two: (x, y, 1)."""
    x, y, *z = vectors[..., None].unbind(dim=-2)
    column_x, column_y, column_z = matrices[..., None, :, :].unbind(dim=-1)
    last = column_z * z[0] if z else column_z
    return torch.addcmul(torch.addcmul(last, column_x, x), column_y, y)


def transformed(homographies: Tensor, points: Tensor) -> Tensor:
    """Points (..., N, 2) px under homographies (..., 3, 3); points on or beyond the horizon become infinite."""
    projected = applied(homographies, points)
    depth = projected[..., 2:]
    return torch.where(depth > 1e-6, projected[..., :2] / depth.clamp(min=1e-6), torch.inf)


def pixel_grid(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H W, 2) float32: the (x, y) px of all pixels of an image of (width, height), row by row."""
    width, height = size
    columns = torch.arange(width, device=device, dtype=torch.float32)
    rows = torch.arange(height, device=device, dtype=torch.float32)
    return torch.stack((columns.repeat(height), rows.repeat_interleave(width)), dim=-1)


def sampled(images: Tensor, places: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """Images (B, C, H, W) read at places (B, N, 2) px -> (B, C, N); what is outside is zero, or the border's mirror."""
    height, width = images.shape[2:]
    scale = places.new_tensor([2 / width, 2 / height])
    grid = ((places + 0.5) * scale - 1).nan_to_num(posinf=1e4, neginf=-1e4).clamp(-1e4, 1e4)
    return F.grid_sample(images, grid[:, None], mode=mode, padding_mode=padding, align_corners=False)[:, :, 0]


def warped(images: Tensor, H_source_view: Tensor, size: tuple[int, int], padding: str = "reflection") -> Tensor:
    """Views (B, C, h, w) of (width, height): pixel p shows what images (B, C, H, W) hold at `H_source_view` p."""
    width, height = size
    grid = pixel_grid(size, images.device).expand(len(images), -1, -1)
    places = transformed(H_source_view, grid).clamp(-2e3, 2e3)
    return sampled(images, places, padding=padding).view(*images.shape[:2], height, width)


def is_inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """(...) bool: whether points (..., 2) px lie between the centres of the outermost pixels of (width, height)."""
    limit = points.new_tensor(size) - 1
    return ((points >= 0) & (points <= limit)).all(dim=-1)


def random_views(photos: Tensor, side_px: int, generator: torch.Generator, config: MotionConfig) -> Tensor:
    """(B, 3, s, s) views of photographs (B, 3, S, S): a random cut-out, moved, turned, scaled and tilted."""
    batch, _, height, width = photos.shape
    size = (side_px, side_px)
    motion = random_homographies(batch, size, generator, config, photos.device)
    room = photos.new_tensor([width - side_px, height - side_px])
    corner = torch.rand((batch, 2), generator=generator, device=photos.device) * room
    to_photo = torch.eye(3, device=photos.device).repeat(batch, 1, 1)
    to_photo[:, :2, 2] = corner
    return warped(photos, composed(to_photo, motion), size)
