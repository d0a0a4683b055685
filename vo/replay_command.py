"""`vo replay` and `vo recording`: what can be done with a recording."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vo.config import PublisherConfig
from vo.interrupts import stop_on_signals
from vo.messages import RunState
from vo.output import OutputError, writing
from vo.publisher import Publisher
from vo.recording import Recording, RecordingError, RecordingWriter
from vo.replay import NS_PER_S, Passage, RecordedStream
from vo.types import ConfigError

INTERRUPTED = 130
MAX_RATE = 1000.0


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """What the user asked for.

    endpoint   where to publish; `keys` a directory of `vo keys`, for consumers on other machines.
    delay_s    before the first message, so that consumers that wait can connect.
    is_looped  begins again at the end, each time as another session.
    """

    path: Path
    endpoint: str
    keys: str = ""
    rate: float = 1.0
    start_s: float = 0.0
    end_s: float | None = None
    delay_s: float = 0.5
    is_looped: bool = False
    is_quiet: bool = False


def replay_command(request: ReplayRequest) -> int:
    """Publishes a recording; the exit code is 0, or 130 where it was interrupted. Raises VoError in one line."""
    _check(request)
    recording = Recording(request.path)
    duration_s = (recording.end_ns - recording.start_ns) / NS_PER_S
    if request.start_s > duration_s:
        raise ConfigError(f"--start {request.start_s:g}: {request.path} is over after {duration_s:.3f} s")
    passage = Passage(request.start_s, request.end_s, request.rate)
    config = PublisherConfig(endpoint=request.endpoint, keys=request.keys)
    with stop_on_signals() as stop:
        pass_index = 0
        while not stop.is_set():
            num_sent = _play_once(recording, passage, config, request, pass_index, stop)
            if not request.is_quiet:
                print(f"replayed    {num_sent} messages of {request.path}", flush=True)
            pass_index += 1
            if not request.is_looped:
                break
    for damage in dict.fromkeys(recording.damages):
        print(f"vo: {damage}", file=sys.stderr, flush=True)
    return INTERRUPTED if stop.is_set() else 0


def _play_once(
    recording: Recording,
    passage: Passage,
    config: PublisherConfig,
    request: ReplayRequest,
    pass_index: int,
    stop: threading.Event,
) -> int:
    """One pass through the recording, as a run of its own; how many messages it sent."""
    stream = RecordedStream(recording, pass_index=pass_index)
    with Publisher(config, stream, on_stop=stop.set) as publisher:
        if not request.is_quiet and pass_index == 0:
            _announce(recording, publisher.endpoint, passage)
        stop.wait(request.delay_s)
        stream.play(passage, stop)
        publisher.close(RunState.INTERRUPTED if stop.is_set() or not recording.is_complete else RunState.FINISHED)
    return sum(stream.num_sent.values())


def _announce(recording: Recording, endpoint: str, passage: Passage) -> None:
    duration_s = (recording.end_ns - recording.start_ns) / NS_PER_S
    print(f"replaying   {recording.path}: {duration_s:.1f} s at rate {passage.rate:g}, on {endpoint}", flush=True)
    if not recording.is_complete:
        print(f"vo: {_cut_short(recording)}", file=sys.stderr, flush=True)


def _cut_short(recording: Recording) -> str:
    return f"{recording.path}: was cut short; read up to its last whole record, {recording.num_lost_bytes} bytes left"


def info_command(path: Path) -> int:
    """Prints what is in a recording. Raises VoError."""
    recording = Recording(path)
    counts = Counter(message.topic for message in recording.messages())
    duration_s = (recording.end_ns - recording.start_ns) / NS_PER_S
    print(f"recording   {path}: {duration_s:.3f} s, {'complete' if recording.is_complete else 'cut short'}")
    for key, value in recording.metadata.items():
        print(f"{key:<11} {value}")
    for topic, count in sorted(counts.items()):
        print(f"{count:>11} {topic}")
    for damage in recording.damages:
        print(f"damaged     {damage}")
    return 0


def repair_command(path: Path, output: Path | None) -> int:
    """Writes what can be read of a recording as a complete file: a new one, or in the place of the old one.

    Raises VoError. The old file stays as it is until the new one is on the disk.
    """
    recording = Recording(path)
    if not recording.channel_specs:
        raise RecordingError(f"{path}: holds no whole message; there is nothing to repair")
    if recording.is_complete and output is None:
        print(f"{path}: is complete; nothing to repair")
        return 0
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished") if output is None else output
    try:
        num_messages = _rewrite(recording, unfinished)
        if output is None:
            with writing(path):
                unfinished.replace(path)
    except (OutputError, RecordingError):
        if output is None:
            unfinished.unlink(missing_ok=True)
        raise
    for damage in recording.damages:
        print(f"vo: {damage}", file=sys.stderr, flush=True)
    print(f"{output or path}: complete, {num_messages} messages; {recording.num_lost_bytes} bytes could not be read")
    return 0


def _rewrite(recording: Recording, path: Path) -> int:
    num_messages = 0
    with RecordingWriter(path, recording.channel_specs) as writer:
        writer.add_metadata(recording.metadata)
        for message in recording.messages():
            writer.add(message.topic, message.data, message.time_ns, message.publish_ns, message.sequence)
            num_messages += 1
        writer.finish()
    return num_messages


def _check(request: ReplayRequest) -> None:
    if request.endpoint == "off":
        raise ConfigError("--publish off: a replay does nothing else; give an address, as in tcp://127.0.0.1:5570")
    if not 0 < request.rate <= MAX_RATE:
        raise ConfigError(f"--rate: expected more than 0 and at most {MAX_RATE:g}, got {request.rate:g}")
    if not request.start_s >= 0:
        raise ConfigError(f"--start: expected seconds from the beginning, got {request.start_s:g}")
    if request.end_s is not None and not request.end_s >= request.start_s:
        raise ConfigError(f"--end: expected at least the {request.start_s:g} s of --start, got {request.end_s:g}")
    if not 0 <= request.delay_s <= 3600:
        raise ConfigError(f"--delay: expected 0 to 3600 s, got {request.delay_s:g}")
