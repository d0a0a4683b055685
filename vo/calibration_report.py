"""A calibration for people and programs: lines on the terminal, a JSON file beside camera.yaml, a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from vo.calibration import COVERAGE_CELLS, Calibration
from vo.calibration_verdict import Grade
from vo.plots import figure_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ARROW_SHARE = 0.08


def report_lines(calibration: Calibration, file: str) -> list[str]:
    """What `vo calibrate` says at the end."""
    camera, measures, deviations = calibration.camera, calibration.measures, calibration.deviations
    K = camera.K
    lines = [
        f"camera        {calibration.title}, {camera.width}x{camera.height} px: {file}",
        f"focal length  {K[0, 0]:.2f} +- {deviations['fx']:.2f}, {K[1, 1]:.2f} +- {deviations['fy']:.2f} px",
        f"centre        {K[0, 2]:.2f} +- {deviations['cx']:.2f}, {K[1, 2]:.2f} +- {deviations['cy']:.2f} px",
    ]
    if len(camera.distortion):
        names = list(deviations)[4:]
        terms = [f"{name} {value:.4g}" for name, value in zip(names, camera.distortion, strict=True)]
        lines.append(f"distortion    {', '.join(terms)}")
    lines += [
        f"error         {measures.rms_px:.3f} px; of views that were left out {measures.cross_validated_px:.3f} px",
        f"views         {measures.num_views} of {len(calibration.views)} used; corners in "
        f"{100 * measures.coverage:.0f} % of the image; directions known to {measures.uncertainty_px:.2g} px",
    ]
    lines += [f"left out      {view.name}: {view.reason}" for view in calibration.views if not view.is_used]
    grade, *findings = calibration.verdict.lines()
    return [*lines, f"verdict       {grade}", *(f"              {finding}" for finding in findings)]


def report_json(calibration: Calibration) -> str:
    """All figures as JSON; lengths in px of the images."""
    camera = calibration.camera
    tree = {
        "verdict": calibration.verdict.grade.value,
        "findings": [
            {"grade": one.grade.value, "text": one.text, "remedy": one.remedy} for one in calibration.verdict.findings
        ],
        "board": calibration.board.text,
        "square_m": calibration.board.square_m,
        "camera": {
            "model": camera.model.value,
            "width": camera.width,
            "height": camera.height,
            "fx": float(camera.K[0, 0]),
            "fy": float(camera.K[1, 1]),
            "cx": float(camera.K[0, 2]),
            "cy": float(camera.K[1, 2]),
            "distortion": camera.distortion.tolist(),
        },
        "deviations": calibration.deviations,
        "measures": asdict(calibration.measures),
        "models": [asdict(model) for model in calibration.models],
        "num_corners": len(calibration.corners_px),
        "num_corners_dropped": calibration.num_corners_dropped,
        "uncertainty_px": [
            [None if np.isnan(v) else round(v, 4) for v in row] for row in calibration.uncertainty_px.tolist()
        ],
        "views": [asdict(view) | {"is_used": view.is_used} for view in calibration.views],
    }
    return json.dumps(tree, indent=2, allow_nan=False)


def report_comment(calibration: Calibration) -> str:
    """Lines for the head of camera.yaml."""
    measures = calibration.measures
    lines = [
        f"Calibrated by vo calibrate with {calibration.board.text} from {measures.num_views} views.",
        f"Reprojection error {measures.rms_px:.3f} px, of views left out {measures.cross_validated_px:.3f} px.",
        f"Verdict: {calibration.verdict.grade.value}.",
    ]
    if calibration.verdict.grade is Grade.POOR:
        lines += [f"WARNING: {finding.text}." for finding in calibration.verdict.findings]
    return "\n".join(lines)


def report_png(calibration: Calibration) -> bytes:
    """A picture: where the corners were and how far they miss, how well the camera is known there, errors by view."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw_corners(axes[0, 0], calibration)
    _draw_uncertainty(axes[0, 1], calibration)
    _draw_views(axes[1, 0], calibration)
    _draw_residuals(axes[1, 1], calibration)
    figure.suptitle(f"{calibration.title}: {calibration.verdict.grade.value}")
    return figure_png(figure)


def _draw_corners(axes: Axes, calibration: Calibration) -> None:
    camera, corners, residuals = calibration.camera, calibration.corners_px, calibration.residuals_px
    longest_px = max(float(np.quantile(np.linalg.norm(residuals, axis=1), 0.98)), 1e-9)
    scale = _ARROW_SHARE * camera.width / longest_px
    axes.quiver(
        *corners.T, *(residuals.T * scale), angles="xy", scale_units="xy", scale=1.0, width=0.002, color="#0b62a4"
    )
    for column in range(1, COVERAGE_CELLS[0]):
        axes.axvline(column * camera.width / COVERAGE_CELLS[0] - 0.5, color="#d0d0d0", linewidth=0.5, zorder=0)
    for row in range(1, COVERAGE_CELLS[1]):
        axes.axhline(row * camera.height / COVERAGE_CELLS[1] - 0.5, color="#d0d0d0", linewidth=0.5, zorder=0)
    axes.set_title(f"corners, residuals x {scale:.0f}; {100 * calibration.measures.coverage:.0f} % covered", fontsize=9)
    _frame(axes, calibration)


def _draw_uncertainty(axes: Axes, calibration: Calibration) -> None:
    camera = calibration.camera
    extent = (-0.5, camera.width - 0.5, camera.height - 0.5, -0.5)
    picture = axes.imshow(calibration.uncertainty_px, extent=extent, cmap="viridis", interpolation="bilinear")
    axes.figure.colorbar(picture, ax=axes, label="px")
    axes.set_title("uncertainty of a direction", fontsize=9)
    _frame(axes, calibration)


def _draw_views(axes: Axes, calibration: Calibration) -> None:
    posed = [view for view in calibration.views if view.rms_px is not None]
    axes.bar(range(len(posed)), [view.rms_px or 0.0 for view in posed], color="#0b62a4")
    axes.axhline(calibration.measures.rms_px, color="#8c8c8c", linewidth=1.0)
    axes.set_title(f"error by view, {len(posed)} of {len(calibration.views)} used", fontsize=9)
    axes.set_ylabel("px")


def _draw_residuals(axes: Axes, calibration: Calibration) -> None:
    axes.plot(*calibration.residuals_px.T, ".", color="#0b62a4", markersize=2.0, alpha=0.5)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.3)
    axes.set_title("residuals (px)", fontsize=9)


def _frame(axes: Axes, calibration: Calibration) -> None:
    axes.set_xlim(-0.5, calibration.camera.width - 0.5)
    axes.set_ylim(calibration.camera.height - 0.5, -0.5)
    axes.set_aspect("equal")
