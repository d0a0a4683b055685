"""What a batch runs: sequences x configurations, and the figures that others have published for the same sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from frontends.base import check_settings, setting
from vo.config_loader import load_config, load_settings
from vo.sources.manifest import datasets_directory
from vo.types import ConfigError

FIGURES = (
    "ate_rmse_m",
    "rpe_rot_deg",
    "rpe_trans_m",
    "kitti_t_err_percent",
    "kitti_r_err_deg_per_100m",
    "coverage",
    "lost_episodes",
    "fps",
)
_MAX_NAME = 80


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """One way to run every sequence: a preset or YAML file (none: the defaults), and keys that differ."""

    name: str
    config: str | None = None
    set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """One sequence: `source` as for `vo run`, with {data} for the directory of --data."""

    name: str
    source: str
    max_frames: int | None = setting(None, minimum=1, help="stop after so many")

    def __post_init__(self) -> None:
        check_settings(self)
        _check_name(self.name)


@dataclass(frozen=True, slots=True)
class PublishedFigure:
    """One figure of a peer for one sequence."""

    sequence: str
    figure: Literal[
        "ate_rmse_m",
        "rpe_rot_deg",
        "rpe_trans_m",
        "kitti_t_err_percent",
        "kitti_r_err_deg_per_100m",
        "coverage",
        "lost_episodes",
        "fps",
    ]
    value: float


@dataclass(frozen=True, slots=True)
class Peer:
    """Another system; `origin` is where its figures were published, so that anyone can look them up."""

    name: str
    origin: str
    figures: tuple[PublishedFigure, ...]

    def __post_init__(self) -> None:
        if not self.origin.strip():
            raise ValueError("origin: say where the figures were published")


@dataclass(frozen=True, slots=True)
class BatchManifest:
    """A batch. `repeats` runs of every pair of sequence and configuration show the spread."""

    title: str
    sequences: tuple[BatchSequence, ...]
    configs: tuple[BatchConfig, ...]
    repeats: int = setting(1, minimum=1, maximum=100, help="runs of each")
    peers: tuple[Peer, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        _check_names("sequences", [sequence.name for sequence in self.sequences])
        _check_names("configs", [config.name for config in self.configs])
        known = {sequence.name for sequence in self.sequences}
        unknown = [f.sequence for peer in self.peers for f in peer.figures if f.sequence not in known]
        if unknown:
            raise ValueError(f"peers: {unknown[0]!r} is none of the sequences")


def official_manifests() -> list[str]:
    """Names of the manifests that come with lightvo."""
    return sorted(path.stem for path in (datasets_directory() / "batches").glob("*.yaml"))


def load_manifest(source: str) -> BatchManifest:
    """A manifest by file, or by name one that comes with lightvo; its configurations are read too, to refuse early.

    Raises ConfigError in one line.
    """
    path = Path(source)
    if not path.suffix and len(path.parts) == 1:
        path = datasets_directory() / "batches" / f"{source}.yaml"
    if not path.is_file():
        names = ", ".join(official_manifests())
        raise ConfigError(f"{source}: no such manifest; give a YAML file, or one of {names}")
    manifest = load_settings(BatchManifest, path)
    for config in manifest.configs:
        try:
            load_config(config.config, config.set)
        except ConfigError as error:
            raise ConfigError(f"{path.name}: configs: {config.name}: {error}") from None
    return manifest


def _check_name(name: str) -> None:
    """A name becomes a directory."""
    is_plain = all(letter.isalnum() or letter in "-_." for letter in name) and not name.startswith(".")
    if not 0 < len(name) <= _MAX_NAME or not is_plain:
        raise ValueError(f"name: {name!r}: expected letters, digits, '-', '_' and '.', not '.' first")


def _check_names(field: str, names: list[str]) -> None:
    doubled = [name for name in names if names.count(name) > 1]
    if not names or doubled:
        problem = f"{doubled[0]!r} occurs twice" if doubled else "expected at least one"
        raise ValueError(f"{field}: {problem}")
