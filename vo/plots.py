"""Figures of trajectories and their errors. Matplotlib is imported when one is drawn, without a display or pyplot."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vo.trajectory import Trajectory
from vo.types import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vo.evaluation import Comparison, SegmentErrors

_ESTIMATE, _TRUTH = "#0b62a4", "#8c8c8c"
_DPI = 110


def path_figure(
    trajectory: Trajectory | None,
    comparison: Comparison | None = None,
    *,
    breaks: Sequence[int] = (),
    unit: str = "m",
) -> Figure:
    """The path from above, in the frame of the first camera: x to the right, z up the page, equal axes.

    comparison  scales the path to the truth and lays the truth under it, in metres.
    breaks      rows of the trajectory before which tracking was lost: the line is interrupted there.
    unit        of the trajectory, where there is no comparison.
    """
    figure = _figure(7.0, 7.0)
    axes = figure.add_subplot()
    if comparison is not None:
        _draw_truth(axes, comparison)
        unit = "m"
    if trajectory is not None:
        scale = 1.0 if comparison is None else comparison.alignment.scale
        _draw_path(axes, scale * trajectory.positions, breaks)
    else:
        axes.text(0.5, 0.5, "no pose", ha="center", transform=axes.transAxes)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"x, right ({unit})")
    axes.set_ylabel(f"z, forward ({unit})")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
    if comparison is not None:
        result = comparison.evaluation
        axes.set_title(f"ATE {result.ate_rmse_m:.3g} m RMSE ({result.align}), {result.num_poses} poses")
    return figure


def errors_figure(comparison: Comparison) -> Figure:
    """Errors over time: position after alignment, then rotation and translation from pose to pose."""
    figure = _figure(8.0, 7.0)
    trajectory, rows = comparison.trajectory, comparison.rows
    if trajectory.has_times:
        times, label = (trajectory.timestamps_ns[rows] - trajectory.timestamps_ns[rows[0]]) / 1e9, "time (s)"
    else:
        times, label = trajectory.timestamps_ns[rows].astype(np.float64), "frame"
    curves = (
        (times, comparison.position_errors_m, "position (m)"),
        (times[1:], comparison.rotation_errors_deg, "rotation per pose (deg)"),
        (times[1:], comparison.translation_errors_m, "translation per pose (m)"),
    )
    for number, (x, y, name) in enumerate(curves, start=1):
        axes = figure.add_subplot(3, 1, number)
        axes.plot(x, y, color=_ESTIMATE, linewidth=1.0)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3)
    axes.set_xlabel(label)
    return figure


def segments_figure(segments: SegmentErrors, distances_m: FloatArray | None = None) -> Figure:
    """Drift: translation in percent and rotation in deg per 100 m, by length of segment, means over single segments.

    distances_m  (N,) way of the truth up to each pose: draws every segment where it begins, too.
    """
    figure = _figure(8.0 if distances_m is None else 12.0, 6.0)
    num_columns = 1 if distances_m is None else 2
    lengths_m = np.unique(segments.lengths_m)
    values = ((segments.t_err_percent, "translation (%)"), (segments.r_err_deg_per_100m, "rotation (deg / 100 m)"))
    for row, (errors, name) in enumerate(values):
        axes = figure.add_subplot(2, num_columns, row * num_columns + 1)
        means = [errors[segments.lengths_m == length].mean() for length in lengths_m]
        axes.plot(segments.lengths_m, errors, ".", color=_TRUTH, markersize=3.0, label="segment")
        axes.plot(lengths_m, means, "o-", color=_ESTIMATE, label="mean")
        axes.legend(loc="best")
        _finish_drift(axes, name, "length of the segment (m)")
        if distances_m is not None:
            _draw_drift_along(figure.add_subplot(2, 2, 2 * row + 2), segments, errors, distances_m, name)
    return figure


def _draw_drift_along(
    axes: Axes, segments: SegmentErrors, errors: FloatArray, distances_m: FloatArray, name: str
) -> None:
    for number, length_m in enumerate(np.unique(segments.lengths_m)):
        chosen = segments.lengths_m == length_m
        starts_m = distances_m[segments.first_rows[chosen]]
        axes.plot(starts_m, errors[chosen], ".-", color=f"C{number}", linewidth=0.8, label=f"{length_m:g} m")
    axes.legend(loc="best", fontsize="small", ncols=2)
    _finish_drift(axes, name, "way before the segment (m)")


def _finish_drift(axes: Axes, name: str, label: str) -> None:
    axes.set_ylabel(name)
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)


def figure_png(figure: Figure) -> bytes:
    """The figure as a PNG file. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def load_ahead() -> threading.Thread:
    """Loads what figures need, and what drawing the first one loads, on a thread of its own; half a second of work."""
    thread = threading.Thread(target=lambda: figure_png(path_figure(None)), name="plots", daemon=True)
    thread.start()
    return thread


def _figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_path(axes: Axes, positions: FloatArray, breaks: Sequence[int]) -> None:
    parts = np.split(positions, breaks)
    for number, part in enumerate(parts):
        axes.plot(part[:, 0], part[:, 2], color=_ESTIMATE, linewidth=1.4, label=None if number else "estimate")
    axes.plot(*positions[0, [0, 2]], "o", color=_ESTIMATE, label="start")
    axes.plot(*positions[-1, [0, 2]], "s", color=_ESTIMATE, label="end")


def _draw_truth(axes: Axes, comparison: Comparison) -> None:
    """The truth between the first and the last associated pose, turned into the frame of the first camera."""
    first, last = comparison.truth_rows[[0, -1]]
    positions_m = comparison.truth.positions[first : last + 1]
    alignment = comparison.alignment
    turned = (positions_m - alignment.translation) @ alignment.rotation
    axes.plot(turned[:, 0], turned[:, 2], color=_TRUTH, linewidth=2.6, label="ground truth")
