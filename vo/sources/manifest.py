"""What is known about public datasets: one YAML manifest each in `datasets/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vo.sources.cameras import CAMERA_FIELDS, CameraFile, parse_camera
from vo.sources.textfiles import only_fields, read_yaml, text_field
from vo.types import SourceError

_FIELDS = ("name", "title", "citation", "page", "licence", "layout", "placement", "ground_truth", "cameras")
_REMEDY = "the manifests come with lightvo: install it again"


@dataclass(frozen=True, slots=True, eq=False)
class NamedCamera:
    """Fixed intrinsics of every sequence whose directory name contains `directory_contains`."""

    name: str
    directory_contains: str
    camera_file: CameraFile


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """One public dataset.

    name          prefix of its source, for example "tum".
    page          official page, where it is to be had.
    layout        (path in a sequence, what it holds) of every file that is read.
    placement     how to put the files in place, for people.
    cameras       intrinsics that are fixed for a family of sequences; empty where every sequence carries its own.
    """

    name: str
    title: str
    citation: str
    page: str
    licence: str
    layout: tuple[tuple[str, str], ...]
    placement: str
    ground_truth: str
    cameras: tuple[NamedCamera, ...] = ()

    def camera_for(self, directory: Path) -> CameraFile | None:
        """The fixed intrinsics that belong to a sequence directory by its name, or None."""
        directory_name = directory.resolve().name.lower()
        for named in self.cameras:
            if named.directory_contains in directory_name:
                return named.camera_file
        return None


def datasets_directory() -> Path:
    """The `datasets` directory: inside an installed package, otherwise beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "datasets", package.parent / "datasets"):
        if (directory / "kitti.yaml").is_file():
            return directory
    raise SourceError(f"{package / 'datasets'}: not found; {_REMEDY}")


def read_manifest(path: Path) -> Manifest:
    """Read a dataset's manifest; raises SourceError naming the file and the field."""
    fields, where = read_yaml(path, _REMEDY), str(path)
    only_fields(fields, _FIELDS, where)
    layout = _texts(fields, "layout", where)
    if not layout:
        raise SourceError(f"{where}: layout: expected at least one file")
    return Manifest(
        name=text_field(fields, "name", where),
        title=text_field(fields, "title", where),
        citation=text_field(fields, "citation", where),
        page=text_field(fields, "page", where),
        licence=text_field(fields, "licence", where),
        layout=layout,
        placement=text_field(fields, "placement", where),
        ground_truth=text_field(fields, "ground_truth", where),
        cameras=tuple(_camera(name, value, f"{where}: cameras.{name}") for name, value in _cameras(fields, where)),
    )


def _texts(fields: Mapping[str, object], name: str, where: str) -> tuple[tuple[str, str], ...]:
    texts = _mapping(fields.get(name), f"{where}: {name}")
    return tuple((key, text_field(texts, key, f"{where}: {name}")) for key in texts)


def _cameras(fields: Mapping[str, object], where: str) -> list[tuple[str, object]]:
    return list(_mapping(fields["cameras"], f"{where}: cameras").items()) if "cameras" in fields else []


def _camera(name: str, value: object, where: str) -> NamedCamera:
    fields = _mapping(value, where)
    only_fields(fields, ("directory_contains", *CAMERA_FIELDS), where)
    intrinsics = {key: item for key, item in fields.items() if key != "directory_contains"}
    return NamedCamera(name, text_field(fields, "directory_contains", where).lower(), parse_camera(intrinsics, where))


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SourceError(f"{where}: expected a mapping of names to values")
    return value
