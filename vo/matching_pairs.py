"""Pairs of images with a known homography or a known relative pose, as benchmarks of matching are laid out.

HPatches     one directory for each scene, i_* (light changes) or v_* (the viewpoint does), with 1.ppm to 6.ppm and
             H_1_2 to H_1_6, 3x3 matrices that map pixels of image 1 (Balntas et al., "HPatches", CVPR 2017).
pair list    one line a pair, as the lists of MegaDepth-1500 and ScanNet-1500 are: two file names, two turns of the
             images in quarters (may be missing), 9 numbers of K0, 9 of K1, and the motion that maps points of camera 0
             into camera 1: 16 numbers of a 4x4 matrix or 12 of a rotation and a translation (Sarlin et al.,
             "SuperGlue", CVPR 2020, released with its code).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vo.sources.textfiles import data_lines, read_text
from vo.trajectory import normalized_rotations
from vo.types import FloatArray, SourceError

_SUFFIXES = (".ppm", ".png", ".jpg", ".jpeg", ".pgm", ".bmp")
_MAX_ROTATION_ERROR = 1e-2
_NUMBERS = {34: 16, 30: 12}
# Left out by D2-Net and those who compare with it, for their size.
LARGE_SCENES = (
    *("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding"),
    *("v_artisans", "v_astronautis", "v_talent"),
)


@dataclass(frozen=True, slots=True, eq=False)
class HomographyPair:
    """Two images; H_1_0 (3, 3) maps homogeneous pixels of image 0 into image 1."""

    name: str
    group: str
    image0: Path
    image1: Path
    H_1_0: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class PosedPair:
    """Two images of pinhole cameras K0, K1 (3, 3) px; T_camera0_camera1 (4, 4), in an arbitrary unit."""

    name: str
    group: str
    image0: Path
    image1: Path
    K0: FloatArray
    K1: FloatArray
    T_camera0_camera1: FloatArray


ImagePair = HomographyPair | PosedPair


def read_pairs(path: Path, images: Path | None = None, skip: Collection[str] = ()) -> list[ImagePair]:
    """The pairs of a directory in HPatches' layout or of a list; `images` is what the names of a list lie under.

    Raises SourceError with file and line.
    """
    if path.is_dir():
        pairs: list[ImagePair] = [pair for pair in read_hpatches(path) if pair.name.split("/")[0] not in skip]
    else:
        pairs = [pair for pair in read_pair_list(path, images or path.parent)]
    if not pairs:
        raise SourceError(f"{path}: holds no pair of images")
    return pairs


def read_hpatches(directory: Path) -> list[HomographyPair]:
    """Pairs (1, k) of every scene, in the order of their names. Raises SourceError."""
    scenes = sorted(scene for scene in directory.iterdir() if scene.is_dir() and scene.name[:2] in ("i_", "v_"))
    if not scenes:
        raise SourceError(f"{directory}: expected scenes i_* and v_* as in HPatches")
    return [pair for scene in scenes for pair in _read_scene(scene)]


def _read_scene(scene: Path) -> list[HomographyPair]:
    group = {"i_": "illumination", "v_": "viewpoint"}[scene.name[:2]]
    files = sorted((int(file.name[4:]), file) for file in scene.glob("H_1_*") if file.name[4:].isdecimal())
    if not files:
        raise SourceError(f"{scene}: no H_1_2, H_1_3, ...; expected a homography for every image but the first")
    first = _image(scene, "1")
    return [
        HomographyPair(f"{scene.name}/1-{number}", group, first, _image(scene, str(number)), _read_homography(file))
        for number, file in files
    ]


def _image(scene: Path, name: str) -> Path:
    for suffix in _SUFFIXES:
        if (scene / f"{name}{suffix}").is_file():
            return scene / f"{name}{suffix}"
    raise SourceError(f"{scene / name}.ppm: not found; expected an image for every homography, and image 1")


def _read_homography(path: Path) -> FloatArray:
    lines = data_lines(read_text(path, "expected a 3x3 matrix"))
    values = _numbers(path, lines[0][0] if lines else 1, " ".join(line for _, line in lines).split())
    if len(values) != 9:
        raise SourceError(f"{path}: {len(values)} numbers; expected the 9 of a 3x3 matrix")
    H: FloatArray = np.array(values).reshape(3, 3)
    if abs(np.linalg.det(H)) < 1e-12:
        raise SourceError(f"{path}: not a homography: its determinant is zero")
    return H


def read_pair_list(path: Path, images: Path) -> list[PosedPair]:
    """Every line of a list as a pair. Raises SourceError with file and line."""
    lines = data_lines(read_text(path, "expected a list of pairs, one a line"))
    return [_read_pair(path, images, number, line) for number, line in lines]


def _read_pair(path: Path, images: Path, number: int, line: str) -> PosedPair:
    where = f"{path}:{number}"
    name0, name1, *texts = line.split()
    if len(texts) in (count + 2 for count in _NUMBERS):
        if texts[0] != "0" or texts[1] != "0":
            raise SourceError(f"{where}: images turned by {texts[0]} and {texts[1]} quarters; turn them upright first")
        texts = texts[2:]
    if len(texts) not in _NUMBERS:
        raise SourceError(
            f"{where}: {len(texts)} numbers after the names; expected 9 of K0, 9 of K1 and 16 or 12 of the motion, "
            "with or without two turns before them"
        )
    values = np.array(_numbers(path, number, texts))
    motion = values[18:]
    R, t = (motion.reshape(4, 4)[:3, :3], motion.reshape(4, 4)[:3, 3]) if len(motion) == 16 else _rotation_first(motion)
    rotation = normalized_rotations(R[None])[0]
    if np.linalg.norm(rotation - R) > _MAX_ROTATION_ERROR:
        raise SourceError(f"{where}: the motion holds no rotation")
    T_camera0_camera1 = np.eye(4)
    T_camera0_camera1[:3, :3], T_camera0_camera1[:3, 3] = rotation.T, -rotation.T @ t
    files = [images / name for name in (name0, name1)]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{where}: {file}: not found; name the directory of the images with --images")
    K0, K1 = values[:9].reshape(3, 3), values[9:18].reshape(3, 3)
    return PosedPair(f"{name0} {name1}", "posed", files[0], files[1], K0, K1, T_camera0_camera1)


def _rotation_first(motion: FloatArray) -> tuple[FloatArray, FloatArray]:
    """9 numbers of a rotation, row by row, then 3 of a translation."""
    return motion[:9].reshape(3, 3), motion[9:]


def _numbers(path: Path, line: int, texts: list[str]) -> list[float]:
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise SourceError(f"{path}:{line}: {error}; expected numbers") from None
    if not np.isfinite(values).all():
        raise SourceError(f"{path}:{line}: expected finite numbers")
    return values
