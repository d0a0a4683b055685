"""What a run amounts to, in numbers: the content of summary.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vo.evaluation import Evaluation
    from vo.self_calibration import FocalEstimate
    from vo.sources.base import LiveReport

# Distributions whose version can change a trajectory or its speed.
_DISTRIBUTIONS = ("lightvo", "torch", "opencv-python", "numpy", "scipy", "evo", "pyzmq")


@dataclass(frozen=True, slots=True)
class LatencyMs:
    """From the capture of a frame to the publication of its pose, percentiles over the frames, ms."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class StageTime:
    """Time one stage takes for a frame, percentiles over the frames, ms."""

    name: str
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class UsedWeights:
    """A file of weights that was loaded."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A whole run.

    source             as the user would write it again.
    interrupted        whether it was stopped before the source ended.
    frames_read        delivered by the source.
    frames_processed   that went through the odometry.
    frames_dropped     taken from a live source but given up for newer ones.
    frames_skipped     that the source could not read.
    poses              frames with a pose.
    keyframes, stationary_frames   frames with that mark.
    lost_episodes      runs of consecutive LOST frames.
    fps                frames processed per second of wall clock.
    latency_ms         None without a processed frame.
    stages             one entry per stage.
    mean_matches, mean_inliers     per processed frame; None without one.
    image_conditions   (what was wrong with images, how many), the most frequent first; see `ImageCondition`.
    mean_stop_layer    layers the matcher ran; None where it has none.
    scale_source       unit of the translations, see `PoseEstimate`.
    mode               of the odometry: "map", or "two_view" for a chain of relative poses.
    radial_distortion  found beyond the calibration: a ray of length r is the ray times 1 - kappa r^2.
    self_calibration   what was found of the focal length; None where it was not asked for.
    device             for example "cpu" or the name of the GPU.
    versions           (distribution, version), see `library_versions`.
    weights            every file of weights in use.
    fallbacks          what was replaced by something else, one sentence each.
    geometry           how poses were computed: "compiled", or "numpy" and why; see `vo.kernels`.
    engine             what the warm-up on a GPU measured and chose, one sentence each.
    live               what a camera delivered; None of a file.
    evaluation         against the ground truth, where there is one.
    """

    source: str
    interrupted: bool
    frames_read: int
    frames_processed: int
    frames_dropped: int
    frames_skipped: int
    poses: int
    keyframes: int
    lost_episodes: int
    stationary_frames: int
    fps: float
    latency_ms: LatencyMs | None
    stages: tuple[StageTime, ...]
    mean_matches: float | None
    mean_inliers: float | None
    mean_stop_layer: float | None
    scale_source: str
    radial_distortion: float
    device: str
    versions: tuple[tuple[str, str], ...]
    weights: tuple[UsedWeights, ...]
    fallbacks: tuple[str, ...]
    engine: tuple[str, ...] = ()
    mode: str = "map"
    geometry: str = "numpy"
    image_conditions: tuple[tuple[str, int], ...] = ()
    live: LiveReport | None = None
    self_calibration: FocalEstimate | None = None
    evaluation: Evaluation | None = None


def summary_json(summary: RunSummary) -> str:
    """summary.json: the fields by their names, `stages_ms` and `versions` as mappings. Raises ValueError on NaN."""
    tree = asdict(summary)
    stages = tree.pop("stages")
    tree["stages_ms"] = {stage["name"]: {"p50": stage["p50_ms"], "p95": stage["p95_ms"]} for stage in stages}
    tree["versions"] = dict(summary.versions)
    tree["image_conditions"] = dict(summary.image_conditions)
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def latency_percentiles(latencies_ms: Sequence[float], maximum_ms: float | None = None) -> LatencyMs | None:
    """Percentiles by linear interpolation; None of nothing. `maximum_ms` where the values are a sample of more."""
    if not len(latencies_ms):
        return None
    p50, p95, p99 = np.percentile(latencies_ms, (50, 95, 99)).tolist()
    return LatencyMs(p50, p95, p99, float(max(latencies_ms) if maximum_ms is None else maximum_ms))


def stage_times(times_ms: Mapping[str, Sequence[float]]) -> tuple[StageTime, ...]:
    """Percentiles of every stage that ran at least once, in the given order."""
    ran = [(name, values) for name, values in times_ms.items() if len(values)]
    return tuple(StageTime(name, *np.percentile(values, (50, 95)).tolist()) for name, values in ran)


def library_versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of Python, the platform, and the libraries a run depends on; those not installed are left out."""
    found = [("python", platform.python_version()), ("platform", platform.platform())]
    for name in _DISTRIBUTIONS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue  # run from a checkout, or OpenCV under another distribution name
    return tuple(found)
