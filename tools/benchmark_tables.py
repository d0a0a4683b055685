"""Markdown tables of the figures that `vo bench --json` and the measuring tools write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Tree = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> list[str]:
    """A Markdown table; the first `num_left` columns are aligned to the left, the others to the right."""
    marks = ["---" if column < num_left else "---:" for column in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


def machine_lines(results: Sequence[Tree]) -> list[str]:
    """Every machine and set of versions that occurs, with the dates it was used on."""
    seen: dict[str, set[str]] = {}
    for result in results:
        seen.setdefault(_machine_text(result), set()).add(result["date"])
    return [f"- {machine} ({', '.join(sorted(dates))})" for machine, dates in seen.items()]


def _machine_text(result: Tree) -> str:
    machine = result["machine"]
    threads = "" if machine["num_threads"] is None else f", {machine['num_threads']} of PyTorch's threads"
    parts = [f"{machine['cpu']}, {machine['num_cores']} cores{threads}"]
    if machine["memory_bytes"] is not None:
        parts.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB")
    parts.append(" ".join(machine["cpu_flags"]))
    if machine["gpu"] is not None:
        parts.append(machine["gpu"])
    if machine["omp_wait_policy"]:
        parts.append(f"OMP_WAIT_POLICY={machine['omp_wait_policy']}")
    if result.get("geometry"):
        parts.append(f"geometry {result['geometry']}")
    shown = ("python", "torch", "kornia", "opencv-python", "numpy")
    versions = result.get("versions", {})
    parts.append(", ".join(f"{name} {versions[name]}" for name in shown if name in versions))
    return "; ".join(part for part in parts if part)


def comparison_lines(results: Sequence[Tree]) -> list[str]:
    """One row per benchmark, stage and peer."""
    header = (
        "source",
        "stage",
        "ours",
        "ms",
        "against",
        "ms",
        "**ratio**",
        "90 % interval",
        "single pairs",
        "found (ours / theirs)",
        "same",
        "disturbed",
    )
    rows = [_comparison_row(result, item) for result in results for item in result["comparisons"]]
    return table(header, rows, num_left=3) if rows else ["No comparison has been measured yet."]


def _comparison_row(result: Tree, item: Tree) -> tuple[str, ...]:
    ratio = item["ratio"]
    method = {
        "extract": f"{result['extractor']}, {result['extractor_precision']}",
        "match": f"{result['matcher']}, {result['matcher_precision']}",
        "frame": f"{result['extractor']} + {result['matcher']}",
    }[item["stage"]]
    return (
        _case(result),
        item["stage"],
        method,
        f"{item['ours']['median_ms']:.1f}",
        item["description"],
        f"{item['theirs']['median_ms']:.1f}",
        f"**{ratio['median']:.2f}x**",
        f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        f"{ratio['min']:.2f} to {ratio['max']:.2f} ({ratio['num_pairs']})",
        f"{item['ours_count']:.0f} / {item['theirs_count']:.0f} {item['counted']}{_layers(item)}",
        "" if item["agreement"] is None else f"{100 * item['agreement']:.1f} %",
        _disturbed(result),
    )


def _case(result: Tree) -> str:
    """What was measured: the frames, the number of keypoints, and what else differs from the defaults."""
    shown = [f"{result['source']} {result['width']}x{result['height']}", f"{result['max_keypoints']} keypoints"]
    shown += [f"preset {result['preset']}"] if result["preset"] is not None else []
    named = ("name=", "variant=", "max_keypoints=")
    settings = [setting.rpartition(".")[2] for setting in result["settings"]]
    return ", ".join([*shown, *(f"`{setting}`" for setting in settings if not setting.startswith(named))])


def _disturbed(result: Tree) -> str:
    share = result["others_share"]
    return "" if share is None else f"{100 * share:.0f} %"


def _layers(item: Tree) -> str:
    if item["ours_layers"] is None and item["theirs_layers"] is None:
        return ""
    values = ("-" if value is None else f"{value:.1f}" for value in (item["ours_layers"], item["theirs_layers"]))
    return f"; layers {' / '.join(values)}"


def stage_lines(results: Sequence[Tree]) -> list[str]:
    """One row per benchmark: the stages of the odometry, run one after the other."""
    names = ("extract", "match", "track", "frame")
    header = (
        "source",
        "frontend",
        *(f"{name}, ms" for name in names),
        "frame p95 / p99 / max",
        "frames/s",
        "disturbed",
    )
    rows = []
    for result in results:
        stages = result["odometry"]["stages"]
        frame = stages["frame"]
        rows.append(
            (
                _case(result),
                f"{result['extractor']} + {result['matcher']}",
                *(f"{stages[name]['median_ms']:.1f}" if name in stages else "-" for name in names),
                f"{frame['p95_ms']:.0f} / {frame['p99_ms']:.0f} / {frame['max_ms']:.0f}",
                f"{result['odometry']['fps']:.1f}",
                _disturbed(result),
            )
        )
    return table(header, rows, num_left=2) if rows else ["Not measured yet."]


def stream_lines(results: Sequence[Tree]) -> list[str]:
    """One row per whole run through the threads to a published pose; nothing where there was none."""
    header = (
        "source",
        "frontend",
        "run",
        "frames (dropped)",
        "frames/s",
        "capture to published pose, ms: p50 / p95 / p99 / max",
        "growth after a fifth, MiB: process, GPU",
        "synchronisations",
    )
    rows = [
        (
            _case(result),
            f"{result['extractor']} + {result['matcher']}",
            run["mode"] if run["hz"] is None else f"{run['mode']} at {run['hz']:.0f} Hz",
            f"{run['num_frames']} ({run['num_dropped']})",
            f"{run['fps']:.1f}",
            " / ".join(f"{run['latency'][key]:.1f}" for key in ("median_ms", "p95_ms", "p99_ms", "max_ms")),
            f"{run['host_growth_bytes'] / 2**20:.0f}, {_mebibytes(run['gpu_growth_bytes'])}",
            "-" if run["num_syncs"] is None else str(run["num_syncs"]),
        )
        for result in results
        for run in result.get("streams", ())
    ]
    return table(header, rows, num_left=3) if rows else []


def _mebibytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def trajectory_line(result: Tree) -> str:
    """How far a path on the GPU is from that on the CPU."""
    poses = " and ".join(str(count) for count in result["num_poses"])
    return (
        f"{result['source']} on the GPU against the CPU in float32: {poses} poses; RMSE {result['rmse']:.3g} of a "
        f"path of {result['path_length']:.3g} ({result['rmse_aligned']:.3g} aligned), rotation "
        f"{result['rotation_deg_per_frame']:.3g} deg per frame."
    )


def memory_lines(results: Sequence[Tree]) -> list[str]:
    """One row per run: its largest resident set."""
    rows = [
        (
            f"`{result['command']}`",
            str(result["num_frames"]),
            " + ".join(result["weights"]) or "no weights",
            f"**{result['peak_bytes'] / 1e9:.2f} GB**",
            f"{result['limit_bytes'] / 1e9:.1f} GB",
        )
        for result in results
    ]
    return table(("run", "frames", "weights", "peak", "limit"), rows) if rows else ["Not measured yet."]


def matching_lines(result: Tree) -> list[str]:
    """Quality of every method at every gap, and what the adaptive settings cost."""
    return [
        f"{result['source']}, {result['num_frames']} frames, at most {result['max_keypoints']} keypoints each, "
        f"{result['date']}. Adaptive: depth confidence {result['depth_confidence']:g}, "
        f"width confidence {result['width_confidence']:g}.",
        "",
        *table(_METHOD_HEADER, [_method_row(method) for method in result["methods"]], num_left=3),
        "",
        "What adaptive depth and width cost against all layers and points, on the pairs that both pose "
        "(90 % bootstrap interval over the pairs; a negative loss is a gain):",
        "",
        *table(_COST_HEADER, [_cost_row(cost) for cost in result["adaptive_costs"]], num_left=2),
    ]


_METHOD_HEADER = (
    "gap",
    "features",
    "matcher",
    "pairs (rejected)",
    "matches",
    "inliers",
    "true inliers",
    "precision",
    "rotation error, deg: median / mean",
    "direction error, deg: median / mean",
    "layers",
    "kept",
    "match, ms",
)

_COST_HEADER = (
    "gap",
    "features",
    "pairs",
    "inliers lost",
    "true inliers lost",
    "rotation error, deg",
    "direction error, deg",
)


def _method_row(method: Tree) -> tuple[str, ...]:
    return (
        str(method["gap"]),
        method["extractor"],
        method["matcher"],
        f"{method['num_pairs']} ({method['num_rejected']})",
        f"{method['matches']:.0f}",
        f"{method['inliers']:.0f}",
        f"{method['true_inliers']:.0f}",
        f"{method['precision']:.3f}",
        _errors(method["rotation_median_deg"], method["rotation_mean_deg"], 3),
        _errors(method["direction_median_deg"], method["direction_mean_deg"], 2),
        f"{method['stop_layer']:.1f}" if method["stop_layer"] > 0 else "",
        f"{100 * method['kept_share']:.0f} %" if method["stop_layer"] > 0 else "",
        f"{method['match_median_ms']:.1f}",
    )


def _errors(median_deg: float | None, mean_deg: float | None, num_digits: int) -> str:
    """Empty where no pair was posed."""
    if median_deg is None or mean_deg is None:
        return ""
    return f"{median_deg:.{num_digits}f} / {mean_deg:.{num_digits}f}"


def _cost_row(cost: Tree) -> tuple[str, ...]:
    return (
        str(cost["gap"]),
        cost["extractor"],
        str(cost["num_pairs"]),
        _change(cost["inlier_loss_percent"], "{:.1f} %"),
        _change(cost["true_inlier_loss_percent"], "{:.1f} %"),
        _change(cost["rotation_change_deg"], "{:+.4f}"),
        _change(cost["direction_change_deg"], "{:+.3f}"),
    )


def _change(change: Tree, form: str) -> str:
    value, low, high = (form.format(change[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def run_lines(results: Sequence[Tree]) -> list[str]:
    """One row per recorded run: speed and accuracy."""
    header = (
        "run",
        "source",
        "frames",
        "poses",
        "frames/s",
        "extract / match / track, ms",
        "ATE, m",
        "rotation per frame, deg",
        "alignment",
        "path, m",
    )
    rows = [_run_row(result["label"], result["summary"]) for result in results]
    return table(header, rows, num_left=2) if rows else ["No figures yet."]


def _run_row(label: str, summary: Tree) -> tuple[str, ...]:
    stages, evaluation = summary["stages_ms"], summary["evaluation"]
    medians = (f"{stages[name]['p50']:.0f}" if name in stages else "-" for name in ("extract", "match", "track"))
    accuracy = ("", "", "", "")
    if evaluation is not None:
        accuracy = (
            f"{evaluation['ate_rmse_m']:.3f}",
            f"{evaluation['rpe_rot_deg']:.3f}",
            evaluation["align"],
            f"{evaluation['path_length_m']:.1f}",
        )
    return (
        label,
        summary["source"],
        str(summary["frames_processed"]),
        str(summary["poses"]),
        f"{summary['fps']:.1f}",
        " / ".join(medians),
        *accuracy,
    )


def kernel_lines(results: Sequence[Tree]) -> list[str]:
    """The compiled geometry against NumPy; nothing where that was not measured."""
    if not results:
        return []
    header = ("source", "what", "calls", "compiled, ms", "NumPy, ms", "**ratio**", "90 % interval")
    rows = [
        (
            f"{result['source']} ({result['date']})",
            row["name"],
            str(row["ratio"]["num_pairs"]),
            f"{row['compiled']['median_ms']:.2f}",
            f"{row['numpy']['median_ms']:.2f}",
            f"**{row['ratio']['median']:.1f}x**",
            f"{row['ratio']['low']:.1f} to {row['ratio']['high']:.1f}",
        )
        for result in results
        for row in result["rows"]
    ]
    return [
        "### The compiled geometry",
        "",
        "`python tools/measure_kernels.py`: what a run asked for, done again compiled and in NumPy in turn; processor",
        "time of one thread, medians.",
        "",
        *table(header, rows, num_left=2),
        "",
    ]
