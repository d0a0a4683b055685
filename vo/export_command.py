"""`vo export`: a run as the input of COLMAP, nerfstudio and the trainers that read their files."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from vo.export_formats import IMAGES, write_colmap, write_nerfstudio
from vo.export_images import image_name, image_reader, sampled_colors, write_jpegs, write_source_images
from vo.export_input import (
    ExportError,
    ExportInput,
    Selection,
    input_from_directory,
    input_from_recording,
    recorded_images,
)
from vo.export_scene import ExportScene, build_scene, rectified, resized, settled, triangulate_tracks
from vo.recording import Recording
from vo.sources import open_source
from vo.types import ConfigError

MAX_ERROR_PX = 4.0


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What the user asked for.

    kind           "colmap" or "nerfstudio".
    path           a recording, or the output directory of a run.
    frames, every  "keyframes" or "all" frames of a recording, and every how many.
    writes_images  also the images, out of the recording, or from `source` where one is given.
    undistorts     images without distortion, and a pinhole camera.
    max_error_px   of an observation.
    """

    kind: str
    path: Path
    output: Path
    writes_images: bool = False
    source: str | None = None
    camera_file: Path | None = None
    frames: str = "keyframes"
    every: int = 1
    undistorts: bool = False
    max_error_px: float = MAX_ERROR_PX


def export_command(request: ExportRequest) -> int:
    """Writes the files and says what is in them. Raises VoError in one line."""
    if not request.max_error_px > 0:
        raise ConfigError(f"--max-error-px: expected more than 0, got {request.max_error_px:g}")
    selection = Selection(request.frames, request.every)
    recording = None if request.path.is_dir() else Recording(request.path)
    if recording is None:
        given = input_from_directory(request.path, selection, request.camera_file)
    else:
        given = input_from_recording(recording, selection)
    notes = list(given.notes)
    names, size = _write_images(request, given, recording, selection)
    given = _with_images(given, names, notes)
    scene = _scene(request, given, size, notes)
    if request.writes_images and scene.landmarks.colors is None:
        colors = sampled_colors(scene, image_reader(request.output / IMAGES, names))
        scene = replace(scene, landmarks=replace(scene.landmarks, colors=colors))
    (write_colmap if request.kind == "colmap" else write_nerfstudio)(scene, names, request.output)
    if recording is not None:
        if not recording.is_complete:
            notes.append(f"the recording was cut short; {recording.num_lost_bytes} bytes at its end are lost")
        notes += dict.fromkeys(recording.damages)
    for note in notes:
        print(f"vo: {note}", file=sys.stderr, flush=True)
    print(_summary(request, scene, given.scale_source), flush=True)
    return 0


def _write_images(
    request: ExportRequest, given: ExportInput, recording: Recording | None, selection: Selection
) -> tuple[dict[int, str], tuple[int, int]]:
    """File names by frame index, and (width, height); without --images the names that the files would have."""
    wanted = {frame.frame_index for frame in given.frames}
    size = (given.camera.width, given.camera.height)
    if not request.writes_images:
        return {index: image_name(index, ".jpg") for index in wanted}, size
    directory, camera = request.output / IMAGES, given.camera if request.undistorts else None
    if request.source is not None:
        source = open_source(request.source, camera_file=request.camera_file)
        try:
            if (source.camera.width, source.camera.height) != size:
                raise ExportError(f"{request.source}: its images have another size than those of the run")
            return write_source_images(source, wanted, directory, camera)
        finally:
            source.close()
    if recording is None:
        raise ConfigError(f"{request.path}: an output directory holds no images; name their source: --source SOURCE")
    return write_jpegs(recorded_images(recording, selection), wanted, directory, camera)


def _with_images(given: ExportInput, names: dict[int, str], notes: list[str]) -> ExportInput:
    """What has an image; raises ExportError where nothing has."""
    frames = tuple(frame for frame in given.frames if frame.frame_index in names)
    if not frames:
        raise ExportError(
            f"none of {len(given.frames)} frames has an image there; name the source of the images: --source SOURCE"
        )
    if len(frames) < len(given.frames):
        notes.append(f"{len(given.frames) - len(frames)} of {len(given.frames)} frames have no image and are left out")
    return replace(given, frames=frames)


def _scene(request: ExportRequest, given: ExportInput, size: tuple[int, int], notes: list[str]) -> ExportScene:
    landmarks = given.landmarks
    if landmarks is None:
        landmarks = triangulate_tracks(given.camera, given.frames, given.tracks, request.max_error_px)
        if len(landmarks.ids):
            notes.append(f"no landmarks there: {len(landmarks.ids)} points are triangulated from the tracks")
    else:
        landmarks = settled(landmarks, given.camera, given.frames, given.tracks, request.max_error_px)
    scene = build_scene(given.camera, given.frames, given.tracks, landmarks, request.max_error_px)
    scene = resized(scene, *size)
    return rectified(scene) if request.undistorts else scene


def _summary(request: ExportRequest, scene: ExportScene, scale_source: str) -> str:
    unit = {"relative": "in relative units", "unknown": "of unknown scale"}.get(scale_source, f"in m ({scale_source})")
    return (
        f"exported    {request.output}/: {len(scene.images)} images, {len(scene.landmarks.ids)} points, "
        f"{scene.num_observations} observations, mean reprojection error {scene.mean_error_px:.2f} px; {unit}"
    )
