"""Measures what the wire adds and whom a stuck consumer hurts: publisher and consumers in processes of their own.

    python tools/measure_wire.py --seconds 60 --json benchmarks/wire.json

Three consumers keep up, and one more is stopped (SIGSTOP) in the middle and goes on later; that is the part whose times
count. Then another one asks for everything from the first pose on, disconnects and comes back, and at the end the
publisher is started anew. Prints figures and whether they are within the limits as JSON; exits with 1 if not. `step_ms`
is a frame of a stand-in for tracking (a least-squares problem of a few ms) with its publication. Such times mean
something only on a machine that has nothing else to do; `floor_ms` is what plain sockets took on it just before and
after (tools/wire_floor.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

# As `vo run` sets it for itself: OpenBLAS' threads spin where they wait, and would take the consumers' processor.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from wire_floor import measure_floor, percentiles, stand_in

from vo.bench_machine import CpuWatch, read_machine
from vo.config import PublisherConfig
from vo.message_stream import MessageStream
from vo.publisher import Publisher
from vo.types import Camera, FrameTracks, PoseEstimate, TrackingStatus

SCHEMA = "lightvo-wire/1"
NUM_KEEPERS = 3
MAX_LATENCY_MS = 3.0
MAX_STUCK_RATIO = 1.05
MAX_REJOIN_S = 1.0
REJOIN_S = 2.0
SECOND_SESSION_S = 1.0
CURRENT_AGE_NS = 100_000_000
CAMERA = Camera(640, 480, np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]))
CONSUMER = Path(__file__).parent / "wire_consumer.py"
MAX_FLOOR_S = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One measurement; times in s from the first frame. `REJOIN_S` of frames follow for the one that comes back."""

    seconds: float
    rate_hz: float
    num_tracks: int
    stopped_s: float

    @property
    def stop_at_s(self) -> float:
        return (self.seconds - self.stopped_s) / 2

    @property
    def go_on_at_s(self) -> float:
        return self.stop_at_s + self.stopped_s

    @property
    def num_frames(self) -> int:
        """Frames whose times count."""
        return round(self.seconds * self.rate_hz)


@dataclass(slots=True)
class Timing:
    """What the publishing side notes: durations in ms of every frame, apart by whether a consumer was stopped."""

    publish_ms: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    step_ms: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    went_on_ns: int = 0


class Consumer:
    """A consumer's process."""

    def __init__(self, endpoint: str, kind: str) -> None:
        command = [sys.executable, str(CONSUMER), endpoint, kind]
        environment = os.environ | {"PYTHONPATH": str(CONSUMER.parents[1])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_until_ready(self) -> None:
        if self.process.stdout is None or self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("a consumer did not start")

    def say(self, command: str) -> None:
        if self.process.stdin is not None:
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()

    def report(self) -> dict:  # type: ignore[type-arg]
        output, _ = self.process.communicate(timeout=120)
        report: dict = json.loads(output.splitlines()[-1])  # type: ignore[type-arg]
        return report

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what the wire adds; prints JSON.")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=60.0, help="frames per second (default: %(default)s)")
    parser.add_argument("--tracks", type=int, default=1000, help="in every frame (default: %(default)s)")
    parser.add_argument("--stopped", type=float, help="s that one consumer is stopped (default: a third, at most 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    stopped_s = min(20.0, options.seconds / 3) if options.stopped is None else options.stopped
    watch = CpuWatch()
    plan = Plan(options.seconds, options.rate, options.tracks, stopped_s)
    before = floor(plan)
    result = measure(plan)
    after = floor(plan)
    result["floor_ms"] = {name: percentiles([*ages, *after[name]]) for name, ages in before.items()}
    result = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python tools/measure_wire.py --seconds {options.seconds:g} --rate {options.rate:g}"
        f" --tracks {options.tracks} --stopped {stopped_s:g}",
        "machine": dataclasses.asdict(read_machine()),
        "others_share": watch.others_share(),
        **result,
    }
    text = json.dumps(result, indent=2)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(result["within_limits"].values()) else 1


def floor(plan: Plan) -> dict[str, list[float]]:
    """Ages in ms of as many bytes on plain sockets."""
    sizes = {}
    stream = MessageStream(CAMERA)
    stream.add_consumer(lambda message: sizes.update({message.topic.value: len(message.data)}))
    stream.publish_pose(_pose(0))
    stream.publish_tracks(_tracks(plan.num_tracks))
    return measure_floor(min(plan.seconds / 4, MAX_FLOOR_S), plan.rate_hz, sizes, NUM_KEEPERS + 1, stand_in())


def measure(plan: Plan) -> dict:  # type: ignore[type-arg]
    """Everything, as it is printed."""
    config = PublisherConfig(endpoint="tcp://127.0.0.1:*", linger_ms=2000)
    publisher = Publisher(config, MessageStream(CAMERA, heartbeat_hz=config.heartbeat_hz))
    keepers = [Consumer(publisher.endpoint, "live") for _ in range(NUM_KEEPERS)]
    stopped, rejoiner = Consumer(publisher.endpoint, "live"), Consumer(publisher.endpoint, "catch_up")
    everybody = [*keepers, stopped, rejoiner]
    try:
        for consumer in everybody:
            consumer.wait_until_ready()
        timing = _publish_frames(publisher, plan, stopped)
        _publish_for_rejoiner(publisher, plan, rejoiner)
        num_frames = publisher.stream.num_sent  # type: ignore[attr-defined]
        publisher.close()
        restarted_ns = time.time_ns()
        _publish_second_session(dataclasses.replace(config, endpoint=publisher.endpoint), plan)
        reports = [consumer.report() for consumer in everybody]
    finally:
        for consumer in everybody:
            consumer.end()
    counts = {topic.value: number for topic, number in num_frames.items()}
    return _summary(plan, counts, timing, reports, restarted_ns)


def _publish_frames(publisher: Publisher, plan: Plan, stopped: Consumer) -> Timing:
    """The first session: frames at their times, and one consumer stopped meanwhile."""
    timing, tracks, stream, work = Timing(), _tracks(plan.num_tracks), _stream_of(publisher), stand_in()
    is_stopped = False
    start_s = time.monotonic()
    for index in range(plan.num_frames):
        now_s = index / plan.rate_hz
        time.sleep(max(0.0, start_s + now_s - time.monotonic()))
        if not is_stopped and plan.stop_at_s <= now_s < plan.go_on_at_s:
            stopped.process.send_signal(signal.SIGSTOP)
            is_stopped = True
        if is_stopped and now_s >= plan.go_on_at_s:
            timing.went_on_ns = time.time_ns()
            stopped.process.send_signal(signal.SIGCONT)
            is_stopped = False
        step_start_s = time.perf_counter()
        work()
        publish_start_s = time.perf_counter()
        stream.publish_pose(_pose(index))
        stream.publish_tracks(dataclasses.replace(tracks, frame_index=index, timestamp_ns=index * 16_666_667))
        stream.publish_status(fps=plan.rate_hz, num_frames=index + 1)
        end_s = time.perf_counter()
        timing.publish_ms[is_stopped].append((end_s - publish_start_s) * 1e3)
        timing.step_ms[is_stopped].append((end_s - step_start_s) * 1e3)
    if is_stopped:
        stopped.process.send_signal(signal.SIGCONT)
    return timing


def _publish_for_rejoiner(publisher: Publisher, plan: Plan, rejoiner: Consumer) -> None:
    """More frames: a consumer joins, and leaves and comes back when half of them are out."""
    tracks, stream = _tracks(plan.num_tracks), _stream_of(publisher)
    num_frames = round(REJOIN_S * plan.rate_hz)
    for count in range(num_frames):
        if count in (0, num_frames // 2):
            rejoiner.say("rejoin" if count else "join")
        index = plan.num_frames + count
        stream.publish_pose(_pose(index))
        stream.publish_tracks(dataclasses.replace(tracks, frame_index=index, timestamp_ns=index * 16_666_667))
        stream.publish_status(fps=plan.rate_hz, num_frames=index + 1)
        time.sleep(1 / plan.rate_hz)


def _stream_of(publisher: Publisher) -> MessageStream:
    if not isinstance(publisher.stream, MessageStream):
        raise TypeError("the publisher of a run has a stream of its own")
    return publisher.stream


def _publish_second_session(config: PublisherConfig, plan: Plan) -> None:
    stream = MessageStream(CAMERA, heartbeat_hz=config.heartbeat_hz)
    with Publisher(config, stream):
        for index in range(round(SECOND_SESSION_S * plan.rate_hz)):
            stream.publish_pose(_pose(index))
            time.sleep(1 / plan.rate_hz)


def _pose(index: int) -> PoseEstimate:
    return PoseEstimate(index, index * 16_666_667, np.eye(4), TrackingStatus.TRACKING, np.eye(6) * 1e-4)


def _tracks(num_tracks: int) -> FrameTracks:
    rng = np.random.default_rng(0)
    return FrameTracks(
        frame_index=0,
        timestamp_ns=0,
        track_ids=np.arange(num_tracks),
        keypoints=rng.uniform(0, 480, (num_tracks, 2)).astype(np.float32),
        lengths=np.ones(num_tracks, np.int32),
        has_landmark=np.ones(num_tracks, np.bool_),
    )


def _summary(plan: Plan, counts: dict[str, int], timing: Timing, reports: list[dict], restarted_ns: int) -> dict:  # type: ignore[type-arg]
    *keepers, stopped, rejoiner = reports
    latency_ms = {
        topic: percentiles(
            np.concatenate([report["topics"][topic]["ages_ns"][: plan.num_frames] for report in keepers]) * 1e-6
        )
        for topic in ("pose", "tracks")
    }
    publish_ms, step_ms = _compared(timing.publish_ms), _compared(timing.step_ms)
    current_s = _seconds_until_current(stopped, timing.went_on_ns)
    noticed_s = [max(report["sessions"].values()) / 1e9 - restarted_ns / 1e9 for report in reports]
    num_missed = sum(
        counts[topic] - report["topics"][topic]["num_received"] for report in keepers for topic in ("pose", "tracks")
    )
    num_out_of_order = sum(
        report["topics"][topic]["num_out_of_order"] for report in (*keepers, stopped) for topic in ("pose", "tracks")
    )
    return {
        "plan": dataclasses.asdict(plan) | {"consumers_that_keep_up": len(keepers)},
        "published": {topic: counts[topic] for topic in ("pose", "tracks")},
        "keep_up": {"num_lost": num_missed, "num_out_of_order": num_out_of_order, "latency_ms": latency_ms},
        "stopped": {
            "num_received": {topic: stopped["topics"][topic]["num_received"] for topic in ("pose", "tracks")},
            "num_lost": stopped["num_lost"],
            "current_after_s": current_s,
        },
        "publish_ms": publish_ms,
        "step_ms": step_ms,
        "rejoin_s": rejoiner["rejoins_s"],
        "restart_noticed_s": noticed_s,
        "num_sessions": [len(report["sessions"]) for report in reports],
        "within_limits": {
            "nothing_lost_or_out_of_order": num_missed == num_out_of_order == 0,
            "latency_p99": max(entry["p99"] for entry in latency_ms.values()) < MAX_LATENCY_MS,
            "step_p99_with_a_stuck_consumer": step_ms["p99_ratio"] < MAX_STUCK_RATIO,
            "current_after_being_stopped": current_s is not None and current_s < MAX_REJOIN_S,
            "rejoined": bool(rejoiner["rejoins_s"]) and max(rejoiner["rejoins_s"]) < MAX_REJOIN_S,
            "restart_noticed": all(len(report["sessions"]) == 2 for report in reports),
        },
    }


def _seconds_until_current(report: dict, went_on_ns: int) -> float | None:  # type: ignore[type-arg]
    """From SIGCONT until the first pose that was published just now; None where none came."""
    poses = report["topics"]["pose"]
    for time_ns, age_ns in zip(poses["times_ns"], poses["ages_ns"], strict=True):
        if time_ns >= went_on_ns and age_ns < CURRENT_AGE_NS:
            return float(time_ns - went_on_ns) * 1e-9
    return None


def _compared(durations_ms: dict[bool, list[float]]) -> dict:  # type: ignore[type-arg]
    without, with_stuck = percentiles(durations_ms[False]), percentiles(durations_ms[True])
    return {"all_keep_up": without, "one_stopped": with_stuck, "p99_ratio": with_stuck["p99"] / without["p99"]}


if __name__ == "__main__":
    sys.exit(main())
