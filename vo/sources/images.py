"""A directory of images, in natural order of their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vo.sources.cameras import CameraChoice, read_camera
from vo.sources.sequence import ImageEntry, ImageSequence, image_size
from vo.sources.timestamps import index_to_ns, nanoseconds, read_times
from vo.types import SourceError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})
DEFAULT_FPS = 30.0


def open_images(
    name: str, directory: Path, choice: CameraChoice, fps: float | None = None, *, times_in_names: bool = False
) -> ImageSequence:
    """The images of a directory as a source.

    Times come from `times.txt` beside the images (seconds, one line per image), from the file names where
    `times_in_names` says that those are whole nanoseconds, and otherwise from `fps` (default 30). Intrinsics come from
    `choice` or from `camera.yaml` beside the images. Raises SourceError.
    """
    paths = list_images(directory)
    if not paths:
        raise SourceError(f"{directory}: holds no images; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    times_ns = _times(directory, paths, fps, times_in_names)
    width, height = image_size(name, paths)
    own = directory / "camera.yaml"
    camera_file = choice.resolve(width, height)
    if camera_file is None and own.is_file():
        camera_file = read_camera(own)
    if camera_file is None:
        camera_file = choice.require(width, height, name)
    entries = [ImageEntry(time_ns, path) for time_ns, path in zip(times_ns, paths, strict=True)]
    ground_truth = directory / "groundtruth.txt"
    return ImageSequence(
        name, camera_file.camera, entries, ground_truth=ground_truth if ground_truth.is_file() else None
    )


def list_images(directory: Path) -> list[Path]:
    """The image files of a directory in natural order (`frame2` before `frame10`); hidden files are left out."""
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory")
    try:
        inside = list(directory.iterdir())
    except OSError as error:
        raise SourceError(f"{directory}: {error.strerror}") from None
    named = [path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    return sorted((path for path in named if path.is_file()), key=natural_key)


def natural_key(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Orders names by their numbers where they have some, numbers before letters; `01` and `1` by spelling."""
    parts = re.findall(r"(\d+)|(\D+)", path.name)
    return [(not digits, int(digits or 0), text) for digits, text in parts], path.name


def _times(directory: Path, paths: Sequence[Path], fps: float | None, times_in_names: bool) -> list[int]:
    times_file = directory / "times.txt"
    if times_in_names:
        refuse_fps(fps, "the file names give the times")
        return [_time_in_name(path) for path in paths]
    if times_file.is_file():
        refuse_fps(fps, f"{times_file} gives the times")
        times_ns = read_times(times_file)
        if len(times_ns) != len(paths):
            raise SourceError(f"{times_file}: {len(times_ns)} times for {len(paths)} images; expected one per image")
        return times_ns
    rate = DEFAULT_FPS if fps is None else check_fps(fps)
    return [index_to_ns(index, rate) for index in range(len(paths))]


def _time_in_name(path: Path) -> int:
    try:
        return nanoseconds(path.stem)
    except ValueError as error:
        raise SourceError(f"{path}: {error}; rename it, or drop `images-ns:` and pass --fps") from None


def check_fps(fps: float) -> float:
    """`fps` where it is a usable rate in Hz; raises SourceError otherwise."""
    if not 1e-3 <= fps <= 1e5:
        raise SourceError(f"--fps: expected 0.001 to 100000 frames per second, got {fps:g}")
    return fps


def refuse_fps(fps: float | None, reason: str) -> None:
    """Raise SourceError where a rate was given although the frames carry their own times."""
    if fps is not None:
        raise SourceError(f"--fps {fps:g}: {reason}; drop --fps")
