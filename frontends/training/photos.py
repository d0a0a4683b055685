"""Still photographs as one tensor on the device, and the small YAML file that names the folders of training data."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import VoError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_HELD_OUT_ONE_OF = 10
# A photograph longer than this many times its shorter side is cut into several squares.
_MAX_ASPECT = 1.25


class TrainingError(VoError):
    """Training cannot start or go on; the message is one line with its remedy."""


@dataclass(frozen=True, slots=True)
class DataFolders:
    """Where the data of a training lies.

    photos     folders of still photographs.
    rgbd       recordings in the layout of the TUM RGB-D benchmark, with ground truth.
    megadepth  files `scene_info.npz` beside the images and depths that they name.
    video      folders of consecutive frames, for validation only: nothing is ever trained on them.
    """

    photos: tuple[Path, ...] = ()
    rgbd: tuple[Path, ...] = ()
    megadepth: tuple[Path, ...] = ()
    video: tuple[Path, ...] = ()


def read_data_folders(path: Path) -> DataFolders:
    """The folders of a YAML file: lists of paths, relative to the file, `$NAME` replaced from the environment.

    Raises TrainingError naming the key for what is not such a file, and for folders that do not exist.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"{path}: cannot be read as YAML: {reason}; give a file of data folders") from error
    known = [entry.name for entry in fields(DataFolders)]
    if not isinstance(tree, dict):
        raise TrainingError(f"{path}: expected the keys {', '.join(known)}; give a list of folders for each")
    for key in tree:
        if key not in known:
            raise TrainingError(f"{path}: {key}: unknown key; valid: {', '.join(known)}")
    return DataFolders(**{key: tuple(_folders(path, key, value)) for key, value in tree.items()})


def _folders(path: Path, key: str, value: object) -> list[Path]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TrainingError(f"{path}: {key}: expected a list of paths, got {value!r}")
    folders = []
    for item in value:
        expanded = os.path.expandvars(item)
        if "$" in expanded:
            raise TrainingError(f"{path}: {key}: {item}: the environment variable is not set; set it or give a path")
        folder = path.parent / Path(expanded).expanduser()
        if not folder.exists():
            raise TrainingError(f"{path}: {key}: {folder}: no such file or folder; correct the path or remove it")
        folders.append(folder)
    return folders


@dataclass(frozen=True, slots=True, eq=False)
class PhotoBank:
    """Square cut-outs of photographs, (N, 3, S, S) uint8 RGB on the device.

    num_photos   photographs that could be read.
    skipped      names of those that could not.
    """

    pixels: Tensor
    num_photos: int
    skipped: tuple[str, ...] = field(default=())

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3, S, S) float32 in [0, 1], drawn with repetition."""
        chosen = torch.randint(len(self.pixels), (count,), generator=generator, device=self.pixels.device)
        return self.pixels[chosen].float() / 255

    def first(self, count: int) -> Tensor:
        """(count, 3, S, S) float32: cut-outs spread evenly over the bank, always the same."""
        chosen = torch.linspace(0, len(self.pixels) - 1, count).round().long()
        return self.pixels[chosen.to(self.pixels.device)].float() / 255


def load_photos(
    folders: Sequence[Path], side_px: int, device: torch.device, max_photos: int | None = None
) -> tuple[PhotoBank, PhotoBank]:
    """Photographs for training, and the tenth of them that is held out, chosen by name so that it never changes.

    Every photograph is brought to `side_px` on its shorter side and cut into squares that cover it. One that cannot be
    read is left out and named in `skipped`. Raises TrainingError when fewer than two remain on either side.
    """
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if max_photos is not None and len(paths) > max_photos:
        paths = [paths[index] for index in np.linspace(0, len(paths) - 1, max_photos).round().astype(int)]
    banks = []
    for is_held_out in (False, True):
        cuts: list[NDArray[np.uint8]] = []
        skipped, num_photos = [], 0
        for path in paths:
            if (zlib.crc32(path.name.encode()) % _HELD_OUT_ONE_OF == 0) is not is_held_out:
                continue
            photo = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if photo is None or min(photo.shape[:2]) < 32:
                skipped.append(path.name)
                continue
            num_photos += 1
            cuts += square_cuts(np.asarray(photo[..., ::-1], np.uint8), side_px)
        if num_photos < 2:
            what = "held-out photographs" if is_held_out else "photographs to train on"
            where = ", ".join(map(str, folders)) or "no folder"
            raise TrainingError(f"{where}: {num_photos} {what}; name folders with 30 or more photographs")
        pixels = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).contiguous().to(device)
        banks.append(PhotoBank(pixels, num_photos, tuple(skipped)))
    return banks[0], banks[1]


def square_cuts(photo: NDArray[np.uint8], side_px: int) -> list[NDArray[np.uint8]]:
    """Squares (S, S, 3) that cover a photograph (H, W, 3), resized to S px on its shorter side."""
    height, width = photo.shape[:2]
    scale = side_px / min(height, width)
    size = (max(side_px, round(width * scale)), max(side_px, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(photo, size, interpolation=method), np.uint8)
    length = max(size)
    count = 1 if length <= _MAX_ASPECT * side_px else -(-length // side_px)
    cuts = []
    for start in (
        np.linspace(0, length - side_px, count).round().astype(int) if count > 1 else [(length - side_px) // 2]
    ):
        piece = resized[:, start : start + side_px] if size[0] >= size[1] else resized[start : start + side_px]
        cuts.append(np.ascontiguousarray(piece))
    return cuts
