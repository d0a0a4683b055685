"""Markdown of what the wire adds, whom a stuck consumer hurts, and what a frame costs the viewer."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark_tables import Tree, table

_STUCK_NAMES = {
    "track_ms": "tracking",
    "track_processor_ms": "tracking, processor time of its thread",
    "publish_ms": "publication, in a thread of its own",
    "latency_ms": "capture to publication",
}


def wire_lines(wires: Sequence[Tree], stuck: Sequence[Tree], viewers: Sequence[Tree]) -> list[str]:
    """Three tables; what has not been measured says so."""
    return [
        *(line for result in wires for line in _wire(result)),
        *([] if wires else ["The wire: not measured yet.", ""]),
        *(line for result in stuck for line in _stuck(result)),
        *([] if stuck else ["With a stuck consumer: not measured yet.", ""]),
        *(line for result in viewers for line in _viewer(result)),
        *([] if viewers else ["The viewer: not measured yet.", ""]),
    ]


def _wire(result: Tree) -> list[str]:
    plan, keep_up, stopped = result["plan"], result["keep_up"], result["stopped"]
    rows = [
        (f"`{topic}`, publication to consumer, ms", f"{ms['p50']:.2f}", f"{ms['p99']:.2f}", f"{ms['max']:.1f}")
        for topic, ms in keep_up["latency_ms"].items()
    ]
    for topic, ms in result.get("floor_ms", {}).items():
        label = f"as many bytes as `{topic}` by plain sockets, nothing encoded or decoded, ms"
        rows.append((label, f"{ms['p50']:.2f}", f"{ms['p99']:.2f}", f"{ms['max']:.1f}"))
    for name, label in (("publish_ms", "publishing a frame, ms"), ("step_ms", "a stand-in for tracking with it, ms")):
        for key, state in (("all_keep_up", "all keep up"), ("one_stopped", "one stopped")):
            ms = result[name][key]
            rows.append((f"{label}; {state}", f"{ms['p50']:.2f}", f"{ms['p99']:.2f}", f"{ms['max']:.1f}"))
    num_sent = sum(result["published"].values()) * plan["consumers_that_keep_up"]
    current_s = stopped["current_after_s"]
    facts = (
        f"{keep_up['num_lost']} of {num_sent} messages lost by consumers that keep up, "
        f"{keep_up['num_out_of_order']} out of order",
        f"a consumer stopped for {plan['stopped_s']:g} s is current "
        + ("never" if current_s is None else f"{current_s:.2f} s")
        + f" after it goes on, and has lost {stopped['num_lost']} messages",
        f"one that reconnects has everything from the first pose on after {max(result['rejoin_s'], default=0):.2f} s",
        "a restart of the publisher is noticed by all"
        if result["within_limits"]["restart_noticed"]
        else "**a restart of the publisher is not noticed by all**",
    )
    return [
        f"{plan['consumers_that_keep_up']} consumers that keep up, {plan['rate_hz']:g} poses/s with "
        f"{plan['num_tracks']} tracks for {plan['seconds']:g} s, {result['date']}{_others(result)}:",
        "",
        *table(("", "p50", "p99", "max"), rows),
        "",
        *(f"- {fact}" for fact in facts),
        "",
    ]


def _stuck(result: Tree) -> list[str]:
    rows = []
    for name, figure in result["figures"].items():
        without, stuck, ratio = figure["all_keep_up"], figure["one_stuck"], figure["p99_ratio"]
        rows.append(
            (
                _STUCK_NAMES[name],
                f"{without['p50']:.2f} / {without['p99']:.2f}",
                f"{stuck['p50']:.2f} / {stuck['p99']:.2f}",
                f"{figure['p50_ratio']['ratio']:.3f}",
                f"**{ratio['ratio']:.3f}**",
                f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            )
        )
    counts = result["num_frames"]
    header = ("ms, p50 / p99", "all keep up", "one stuck", "ratio of p50", "**ratio of p99**", "90 % interval")
    return [
        f"A real run ({result['source']}, `{result['config']}`) with and without a stuck consumer of everything, in "
        f"stretches that change places: {counts['all_keep_up']} and {counts['one_stuck']} frames, "
        f"{result['num_stuck_consumers']} consumers stopped in the act; a ratio of p99 of at most "
        f"{result['max_ratio']:g} is asked for; {result['date']}{_others(result)}:",
        "",
        *table(header, rows),
        "",
    ]


def _viewer(result: Tree) -> list[str]:
    rows = []
    for stage in result["wall_ms"]:
        wall, processor = result["wall_ms"][stage], result["processor_ms"][stage]
        rows.append((stage, *(f"{cost[rank]:.2f}" for cost in (wall, processor) for rank in ("p50", "p95", "p99"))))
    shares = result["share_of_frames_within_budget"]
    header = ("stage, ms", "wall p50", "p95", "p99", "processor p50", "p95", "p99")
    driver = "in software" if result["draws_in_software"] else "by a GPU"
    rendering = (
        "Rendering was not measured."
        if result["render_ms"] is None
        else f"Rendering {result['size'][0]}x{result['size'][1]} {driver} takes {result['render_ms']:.0f} ms besides "
        f"({result['render_processor_ms']:.0f} ms of processor time)."
    )
    within = (
        f"{100 * shares['wall_ms']:.1f} % are within {result['budget_ms']:.1f} ms "
        f"({100 * shares['processor_ms']:.1f} % in processor time)"
    )
    return [
        f"What the window's thread of `vo view` does for a frame, {result['landmarks']} landmarks, {result['poses']} "
        f"poses and {result['keyframes']} keyframes, growing; {result['date']}:",
        "",
        *table(header, rows),
        "",
        f"Of {result['frames_measured']} frames {within}. {rendering}",
        "",
    ]


def _others(result: Tree) -> str:
    share = result.get("others_share")
    return "" if share is None else f"; other work took {100 * share:.0f} % of the processors"
