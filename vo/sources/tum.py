"""TUM RGB-D sequences (Sturm et al. 2012): rgb.txt and depth.txt list images with their times."""

from __future__ import annotations

from pathlib import Path

from vo.sources.cameras import CameraChoice, CameraFile, read_camera
from vo.sources.images import refuse_fps
from vo.sources.manifest import datasets_directory, read_manifest
from vo.sources.registration import DepthCamera
from vo.sources.sequence import ImageEntry, ImageSequence, image_size
from vo.sources.textfiles import data_lines, read_text
from vo.sources.timestamps import associate, seconds_to_ns
from vo.types import SourceError

DEPTH_SCALE = 5000.0
MAX_DEPTH_DELAY_NS = 20_000_000
_LAYOUT = (
    "a TUM RGB-D sequence holds rgb.txt and rgb/, and depth.txt and depth/ if it has depth; see datasets/README.md"
)


def open_tum(name: str, directory: Path, choice: CameraChoice, fps: float | None = None) -> ImageSequence:
    """A sequence directory with rgb.txt, and depth.txt where there is depth.

    Each colour image gets the depth image nearest in time, at most 20 ms away, and no depth image is used twice.
    Intrinsics: `choice`, else camera.yaml in the directory, else those published for freiburg1, 2 and 3, recognised by
    the directory's name. Depth is in units of 1/5000 m unless a camera.yaml gives `depth_scale`, and registered to the
    colour image unless one gives `depth_camera`. Raises SourceError.
    """
    refuse_fps(fps, "TUM frames carry their own times (rgb.txt)")
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; {_LAYOUT}")
    colour = _read_list(directory, "rgb.txt")
    if not colour:
        raise SourceError(f"{directory / 'rgb.txt'}: lists no images; {_LAYOUT}")
    depth = _read_list(directory, "depth.txt") if (directory / "depth.txt").is_file() else []
    camera_file, depth_scale, depth_camera = _intrinsics(name, directory, choice, [path for _, path in colour])
    ground_truth = directory / "groundtruth.txt"
    return ImageSequence(
        name,
        camera_file.camera,
        _entries(colour, depth),
        depth_scale=depth_scale,
        depth_camera=depth_camera,
        ground_truth=ground_truth if ground_truth.is_file() else None,
    )


def _entries(colour: list[tuple[int, Path]], depth: list[tuple[int, Path]]) -> list[ImageEntry]:
    partners = associate([time for time, _ in colour], [time for time, _ in depth], MAX_DEPTH_DELAY_NS)
    return [
        ImageEntry(time_ns, path, None if partner is None else depth[partner][1])
        for (time_ns, path), partner in zip(colour, partners, strict=True)
    ]


def _read_list(directory: Path, file_name: str) -> list[tuple[int, Path]]:
    """(time in ns, image) of each line `seconds path`."""
    listing, listed = directory / file_name, []
    for number, line in data_lines(read_text(listing, _LAYOUT)):
        seconds, _, relative = line.partition(" ")
        try:
            time_ns = seconds_to_ns(seconds)
        except ValueError as error:
            raise SourceError(f"{listing}:{number}: {error}; expected `seconds path`") from None
        if not relative.strip():
            raise SourceError(f"{listing}:{number}: {line!r} has no path; expected `seconds path`")
        listed.append((time_ns, directory / relative.strip()))
    return listed


def _intrinsics(
    name: str, directory: Path, choice: CameraChoice, images: list[Path]
) -> tuple[CameraFile, float, DepthCamera | None]:
    """The camera, the units of a depth image per metre, and what took it where it is not registered yet."""
    own_path = directory / "camera.yaml"
    own = read_camera(own_path) if own_path.is_file() else None
    published = read_manifest(datasets_directory() / "tum.yaml").camera_for(directory)
    size = image_size(name, images) if choice.fov_deg is not None else (0, 0)
    chosen = choice.resolve(*size)
    all_known = [known for known in (chosen, own, published) if known]
    scales = [known.depth_scale for known in all_known if known.depth_scale is not None]
    depth_cameras = [known.depth_camera for known in all_known if known.depth_camera is not None]
    camera_file = chosen or own or published
    if camera_file is None:
        raise SourceError(
            f"{directory}: no intrinsics: neither camera.yaml nor freiburg1, freiburg2 or freiburg3 in the directory's "
            "name; pass --camera FILE"
        )
    return camera_file, scales[0] if scales else DEPTH_SCALE, depth_cameras[0] if depth_cameras else None
