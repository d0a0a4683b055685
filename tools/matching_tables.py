"""What the figures of matches say: learned matcher against nearest neighbours, our weights against published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmark_tables import table

Tree = Mapping[str, Any]

OWN_PREFIX = "own-"
OWN_MIN_INLIERS, OWN_MAX_ROTATION = 0.95, 1.05
_LEARNED, _NEAREST = "lightglue, full", "nearest"
_OWN_HEADER = ("gap", "features", "matcher", "inliers", "rotation error: ratio of medians / means", "reached")
_GAIN_HEADER = ("gap", "features", "inliers", "true inliers", "precision", "rotation error", "direction error", "wins")


def matcher_gain_lines(result: Tree) -> list[str]:
    """LightGlue with all layers against mutual nearest neighbours; nothing where only one of them was measured."""
    methods = by_method(result)
    rows = []
    for (extractor, matcher, gap), learned in methods.items():
        nearest = methods.get((extractor, _NEAREST, gap))
        if matcher != _LEARNED or nearest is None or not _is_posed(learned, nearest):
            continue
        inliers, true = (learned[key] / max(nearest[key], 1e-9) for key in ("inliers", "true_inliers"))
        rotation, direction = (learned[f"{key}_mean_deg"] / nearest[f"{key}_mean_deg"] for key in _ERRORS)
        better = {"inliers": inliers > 1, "rotation": rotation < 1, "direction": direction < 1}
        losing = [name for name, wins in better.items() if not wins]
        shown = "all three" if not losing else "not in " + ", ".join(losing)
        precision = f"{nearest['precision']:.3f} to {learned['precision']:.3f}"
        ratios = [f"{100 * value:.0f} %" for value in (inliers, true)]
        rows.append((str(gap), extractor, *ratios, precision, f"{rotation:.2f}", f"{direction:.2f}", shown))
    if not rows:
        return []
    return [
        "",
        "LightGlue with all layers against mutual nearest neighbours, ratios of the means (errors: less is better) and "
        "in which of inliers, rotation and direction it wins:",
        "",
        *table(_GAIN_HEADER, rows, num_left=2),
    ]


_ERRORS = ("rotation", "direction")


def own_weights_lines(result: Tree) -> list[str]:
    """Our extractor weights beside the published ones, under the same matcher; nothing where only one was measured.

    They become the default where every row has at least 95 % of the inliers and at most 1.05 times the rotation error.
    """
    methods = by_method(result)
    rows = []
    for (extractor, matcher, gap), own in methods.items():
        published = methods.get((extractor.removeprefix(OWN_PREFIX), matcher, gap))
        if not extractor.startswith(OWN_PREFIX) or published is None or not _is_posed(own, published):
            continue
        inliers = own["inliers"] / max(published["inliers"], 1e-9)
        rotation = [own[key] / published[key] for key in ("rotation_median_deg", "rotation_mean_deg")]
        reaches = inliers >= OWN_MIN_INLIERS and max(rotation) <= OWN_MAX_ROTATION
        shown = f"{rotation[0]:.2f} / {rotation[1]:.2f}"
        rows.append((str(gap), extractor, matcher, f"{100 * inliers:.0f} %", shown, "yes" if reaches else "no"))
    if not rows:
        return []
    return [
        "",
        "Our extractor weights against the published ones under the same matcher; they become the default where all "
        f"rows have {100 * OWN_MIN_INLIERS:.0f} % of the inliers and at most {OWN_MAX_ROTATION} x the rotation error:",
        "",
        *table(_OWN_HEADER, rows, num_left=3),
    ]


def by_method(result: Tree) -> dict[tuple[str, str, int], Tree]:
    """The figures of every method by extractor, matcher and gap."""
    return {(method["extractor"], method["matcher"], method["gap"]): method for method in result["methods"]}


def _is_posed(*methods: Tree) -> bool:
    """Whether all of them posed some pair, by more than nothing."""
    keys = ("rotation_median_deg", "rotation_mean_deg", "direction_mean_deg")
    return all(method[key] for method in methods for key in keys)
