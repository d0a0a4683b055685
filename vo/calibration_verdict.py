"""What a calibration is worth, in words. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

REFERENCE_WIDTH_PX = 640.0
MIN_VIEWS = 5
BLUR_LIMIT_PX = 4.0


class Grade(Enum):
    """What to do with a calibration: use it, use it with care, or take new images."""

    GOOD = "good"
    USABLE = "usable"
    POOR = "not good enough"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that keeps a calibration from being good, and what to do about it."""

    grade: Grade
    text: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Measures:
    """What is judged. Lengths in px of the calibrated images.

    width_px            of the images: thresholds in px grow with it.
    num_views, num_dropped   views used, and views with a board that were not.
    rms_px, cross_validated_px   reprojection error of the views used, and of views that were held out of the fit.
    focal_percent       standard deviation of the focal length.
    uncertainty_px      standard deviation of a projected direction that 95 % of the image stay below, rotation apart.
    coverage            share of the cells of the image in which corners were seen.
    edge_width_px       median over the views used.
    num_tilted          views in which the board is turned away by more than 15 degrees.
    folds               the distortion cannot be inverted somewhere in the image.
    """

    width_px: int
    num_views: int
    num_dropped: int
    rms_px: float
    cross_validated_px: float
    focal_percent: float
    uncertainty_px: float
    coverage: float
    edge_width_px: float
    num_tilted: int
    folds: bool

    @property
    def unit_px(self) -> float:
        """What a pixel of an image 640 px wide is here."""
        return max(1.0, self.width_px / REFERENCE_WIDTH_PX)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The worst grade of the findings, good without any."""

    findings: tuple[Finding, ...]

    @property
    def grade(self) -> Grade:
        grades = {finding.grade for finding in self.findings}
        return next((grade for grade in (Grade.POOR, Grade.USABLE) if grade in grades), Grade.GOOD)

    def lines(self) -> list[str]:
        """For people: the grade, then what keeps it from being better."""
        return [f"{self.grade.value}", *(f"{finding.text}: {finding.remedy}" for finding in self.findings)]


def blur_limit_px(width_px: int) -> float:
    """Width of edges above which an image of this width counts as blurred."""
    return BLUR_LIMIT_PX * max(1.0, width_px / REFERENCE_WIDTH_PX / 1.5)


def judge(measures: Measures) -> Verdict:
    """The verdict; thresholds are stated beside what they are for."""
    m, unit = measures, measures.unit_px
    limit = blur_limit_px(m.width_px)
    still = "hold the board still, give more light, focus, and take the images again"
    everywhere = "take views with the board in the corners and at the edges of the image"
    rules = (
        _above(
            m.edge_width_px, limit, 1.5 * limit, f"the images are blurred (edges {m.edge_width_px:.1f} px wide)", still
        ),
        _above(
            m.rms_px,
            0.35 * unit,
            0.8 * unit,
            f"corners miss the model by {m.rms_px:.2f} px",
            "use a flat, rigid board, a global shutter or still views, and sharp images; or try another --model",
        ),
        _above(
            m.cross_validated_px / max(m.rms_px, 0.05 * unit),
            1.6,
            3.0,
            f"views that were left out fit worse ({m.cross_validated_px:.2f} px) than those used ({m.rms_px:.2f} px)",
            "add views until both agree",
        ),
        _above(
            m.focal_percent,
            0.3,
            1.0,
            f"the focal length is known to {m.focal_percent:.2g} % only",
            "add views in which the board is tilted and near",
        ),
        _above(
            m.uncertainty_px,
            0.5 * unit,
            2.0 * unit,
            f"directions are uncertain by up to {m.uncertainty_px:.2g} px",
            everywhere,
        ),
        _below(m.coverage, 0.7, 0.4, f"corners were seen in {100 * m.coverage:.0f} % of the image only", everywhere),
        _below(m.num_views, 15, 8, f"{m.num_views} views were used", "take 20 to 40"),
        _below(
            m.num_tilted,
            6,
            3,
            f"the board is tilted in {m.num_tilted} views only",
            "tilt it by 20 to 45 degrees, each way",
        ),
        _above(
            m.num_dropped / (m.num_views + m.num_dropped),
            0.25,
            0.5,
            f"{m.num_dropped} of {m.num_views + m.num_dropped} views had to be dropped",
            "see their reasons in the report, and replace them",
        ),
        Finding(
            Grade.POOR,
            "the distortion folds over inside the image",
            "choose --model fisheye, or cover the image better",
        )
        if m.folds
        else None,
    )
    return Verdict(tuple(finding for finding in rules if finding is not None))


def _above(value: float, usable: float, poor: float, text: str, remedy: str) -> Finding | None:
    """A finding where a value exceeds its limits; a value that is not a number exceeds them all."""
    if value <= usable:
        return None
    return Finding(Grade.USABLE if value <= poor else Grade.POOR, text, remedy)


def _below(value: float, usable: float, poor: float, text: str, remedy: str) -> Finding | None:
    if value >= usable:
        return None
    return Finding(Grade.USABLE if value >= poor else Grade.POOR, text, remedy)
