"""From what the user writes to a source of frames."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vo.sources.base import Source
from vo.sources.cameras import CameraChoice
from vo.types import SourceError

if TYPE_CHECKING:  # the configuration of the frontends imports torch
    from vo.config import WebcamConfig

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.+")
_EXPECTED = (
    "expected `demo`, `webcam:0`, a video file or URL, a directory of images, "
    "or `kitti:DIR`, `tum:DIR`, `euroc:DIR` (layouts: datasets/README.md)"
)


def open_source(
    spec: str,
    *,
    camera_file: Path | None = None,
    fov_deg: float | None = None,
    fps: float | None = None,
    wants_stereo: bool = False,
    webcam: WebcamConfig | None = None,
) -> Source:
    """The source of frames that `spec` names.

    spec         `demo`, `webcam:0`, `webcam:/dev/video0`, a video file or URL, a directory of images (`images-ns:DIR`
                 where file names are times in ns), `kitti:DIR`, `tum:DIR`, `euroc:DIR`, or a bare path that is
                 recognised by what lies there; `loop:` before any that is not live begins it anew whenever it ends.
    camera_file  camera.yaml to use instead of the source's own intrinsics.
    fov_deg      horizontal field of view to guess the intrinsics from instead.
    fps          rate of frames that carry no times of their own: image directories (default 30), videos, webcams.
    webcam       what cameras and live streams are asked for.
    wants_stereo read the right images of a stereo camera too, and fail where there are none (KITTI and EuRoC only).

    Raises SourceError, in one line that names what was found and what is expected.
    """
    if spec.startswith("loop:"):
        return _open_loop(
            spec,
            lambda lap: open_source(lap, camera_file=camera_file, fov_deg=fov_deg, fps=fps, wants_stereo=wants_stereo),
        )
    choice = CameraChoice(camera_file, fov_deg)
    if wants_stereo:
        return _open_stereo(spec, choice, fps)
    kind, colon, rest = spec.partition(":")
    if not colon:
        kind = ""
    if spec == "demo":
        from vo.sources.manifest import datasets_directory

        return _open_clip(spec, datasets_directory() / "sample", choice, fps)
    if kind == "webcam":
        from vo.sources.webcam import open_webcam

        return open_webcam(spec, rest, choice, fps, webcam)
    if kind in ("kitti", "tum", "euroc", "images", "images-ns"):
        return _open_directory(kind, spec, _path(spec, rest), choice, fps)
    if _URL.fullmatch(spec):
        from vo.sources.video import open_video_url

        return open_video_url(spec, choice, fps, webcam)
    return _open_bare(spec, _path(spec, spec), choice, fps)


def _open_loop(spec: str, open_one: Callable[[str], Source]) -> Source:
    from vo.sources.loop import LoopSource

    lap = spec.removeprefix("loop:")
    source = LoopSource(spec, lambda: open_one(lap))
    if source.is_endless:
        source.close()
        raise SourceError(f"{spec}: {lap} is live and never ends; drop loop:")
    return source


def _open_stereo(spec: str, choice: CameraChoice, fps: float | None) -> Source:
    """A source with right images; SourceError where its kind has none."""
    from vo.sources.euroc import open_euroc
    from vo.sources.kitti import open_kitti

    kind, _, rest = spec.partition(":")
    path = _path(spec, rest if kind in ("kitti", "euroc") else spec)
    if kind not in ("kitti", "euroc") and path.is_dir():
        kind = recognise(path)
    match kind:
        case "kitti":
            return open_kitti(spec, path, choice, fps, wants_stereo=True)
        case "euroc":
            return open_euroc(spec, path, choice, fps, wants_stereo=True)
        case _:
            raise SourceError(
                f"{spec}: has no second camera; odometry.scale: stereo needs kitti:DIR with image_1, or euroc:DIR "
                "with cam1"
            )


def _open_directory(kind: str, spec: str, directory: Path, choice: CameraChoice, fps: float | None) -> Source:
    from vo.sources.euroc import open_euroc
    from vo.sources.images import open_images
    from vo.sources.kitti import open_kitti
    from vo.sources.tum import open_tum

    match kind:
        case "kitti":
            return open_kitti(spec, directory, choice, fps)
        case "tum":
            return open_tum(spec, directory, choice, fps)
        case "euroc":
            return open_euroc(spec, directory, choice, fps)
        case _:
            return open_images(spec, directory, choice, fps, times_in_names=kind == "images-ns")


def _open_bare(spec: str, path: Path, choice: CameraChoice, fps: float | None) -> Source:
    from vo.sources.images import IMAGE_SUFFIXES

    if path.is_dir():
        kind = recognise(path)
        return _open_clip(spec, path, choice, fps) if kind == "clip" else _open_directory(kind, spec, path, choice, fps)
    if not path.exists():
        raise SourceError(f"{spec}: no such file or directory; {_EXPECTED}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SourceError(f"{spec}: one image is no sequence; name its directory: {path.parent}")
    if path.is_char_device():
        raise SourceError(f"{spec}: a device; write webcam:{path}")
    from vo.sources.video import open_video

    return open_video(spec, path, choice, fps)


def _open_clip(spec: str, directory: Path, choice: CameraChoice, fps: float | None) -> Source:
    from vo.sources.video import open_video

    clip = directory / "clip.mp4"
    if not clip.is_file():
        raise SourceError(f"{clip}: not found; it comes with lightvo: install again, or run tools/make_sample.py")
    return open_video(spec, clip, choice, fps)


def recognise(directory: Path) -> str:
    """What a directory holds: kitti, tum, euroc, clip or images; raises SourceError where it fits none of them."""
    from vo.sources.images import list_images

    has_images_0 = (directory / "image_0").is_dir() or (directory / "image_2").is_dir()
    if has_images_0 and ((directory / "calib.txt").exists() or (directory / "times.txt").exists()):
        return "kitti"
    if (directory / "rgb.txt").is_file():
        return "tum"
    if (directory / "mav0" / "cam0").is_dir() or (directory / "cam0" / "sensor.yaml").is_file():
        return "euroc"
    if (directory / "clip.mp4").is_file() and (directory / "camera.yaml").is_file():
        return "clip"
    if list_images(directory):
        return "images"
    raise SourceError(
        f"{directory}: {_contents(directory)}; expected images, calib.txt with image_0 (KITTI), rgb.txt (TUM), "
        "mav0/cam0 (EuRoC), or clip.mp4 with camera.yaml"
    )


def _contents(directory: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in directory.iterdir())
    if not names:
        return "is empty"
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"holds {shown}"


def _path(spec: str, text: str) -> Path:
    if not text:
        raise SourceError(f"{spec!r}: names nothing; {_EXPECTED}")
    return Path(text).expanduser()
