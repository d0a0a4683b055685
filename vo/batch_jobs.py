"""The runs of a batch: which there are, one of them as a process, and what it left behind.

A job is plain data and its outcome a file beside its results, `job.json`, so that a batch goes on where it stopped, on
this machine or on another that sees the same directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vo import __version__
from vo.batch_manifest import BatchManifest
from vo.output import prepare_directory, write_atomically
from vo.recorder import SUMMARY_NAME

JOB_NAME, LOG_NAME = "job.json", "log.txt"
DONE, FAILED, INTERRUPTED = "done", "failed", "interrupted"
_POLL_S = 0.2
_GRACE_S = 20.0
_EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one sequence with one configuration.

    source      with the directory of the data put in.
    output      directory of its results.
    fingerprint of everything that decides the result, apart from where the data lie: other settings, another run.
    """

    sequence: str
    config: str
    repeat: int
    source: str
    output: str
    arguments: tuple[str, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.config}/{self.sequence}" + (f"/{self.repeat}" if self.repeat > 1 else "")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended; `reason` is a line of its log where it failed."""

    status: str
    fingerprint: str
    seconds: float
    host: str
    reason: str = ""


def plan(
    manifest: BatchManifest, data: str, output: Path, *, device: str | None = None, max_frames: int | None = None
) -> list[Job]:
    """Every run of a batch, repeats last, so that each pair has a figure early."""
    jobs = []
    for repeat in range(1, manifest.repeats + 1):
        for config in manifest.configs:
            for sequence in manifest.sequences:
                limits = [count for count in (sequence.max_frames, max_frames) if count is not None]
                arguments = ["--publish", "off", "--quiet"]
                arguments += ["--config", config.config] if config.config is not None else []
                for override in config.set:
                    arguments += ["--set", override]
                arguments += ["--max-frames", str(min(limits))] if limits else []
                arguments += ["--device", device] if device is not None else []
                directory = output / config.name / sequence.name / f"run{repeat}"
                decisive = [__version__, sequence.source, *arguments, str(repeat)]
                jobs.append(
                    Job(
                        sequence=sequence.name,
                        config=config.name,
                        repeat=repeat,
                        source=sequence.source.replace("{data}", data),
                        output=str(directory),
                        arguments=tuple(arguments),
                        fingerprint=hashlib.sha256(json.dumps(decisive).encode()).hexdigest(),
                    )
                )
    return jobs


def read_outcome(job: Job) -> Outcome | None:
    """How the job ended before; None where it has not run, was interrupted, or was another one."""
    path = Path(job.output) / JOB_NAME
    try:
        outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        # Not there, torn, or of another version: the job runs again, which mends it.
        return None
    has_results = outcome.status != DONE or (Path(job.output) / SUMMARY_NAME).is_file()
    return outcome if outcome.fingerprint == job.fingerprint and has_results else None


def pending(jobs: Sequence[Job]) -> list[Job]:
    """Those that have not come to a good end yet; what has failed is tried again."""
    return [job for job in jobs if (outcome := read_outcome(job)) is None or outcome.status != DONE]


def run_job(job: Job, stop: threading.Event | None = None, num_threads: int | None = None) -> Outcome:
    """Runs `vo run` in a process of its own, writes its log and `job.json`; `stop` ends it early.

    num_threads  of its libraries, where the environment does not say.
    """
    directory = Path(job.output)
    prepare_directory(directory)
    (directory / JOB_NAME).unlink(missing_ok=True)
    environment = dict(os.environ)
    if num_threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(num_threads))
    command = [sys.executable, "-m", "vo", "run", job.source, "--output", job.output, *job.arguments]
    start_s = time.monotonic()
    with (directory / LOG_NAME).open("wb") as log:
        # A session of its own: Ctrl-C reaches the batch, which ends its runs in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        code = _wait(process, stop or threading.Event())
    status = {0: DONE, _EXIT_INTERRUPTED: INTERRUPTED}.get(code, FAILED)
    reason = "" if status == DONE else _last_line(directory / LOG_NAME) or f"ended with exit code {code}"
    outcome = Outcome(status, job.fingerprint, time.monotonic() - start_s, platform.node(), reason)
    if status != INTERRUPTED:
        write_atomically(directory / JOB_NAME, json.dumps(asdict(outcome), indent=2) + "\n")
    return outcome


def _wait(process: subprocess.Popen[bytes], stop: threading.Event) -> int:
    """The exit code; a run that is stopped writes what it has, and is killed where it does not end."""
    try:
        while process.poll() is None and not stop.wait(_POLL_S):
            pass
    finally:
        # Also when this process itself is interrupted: no run is left behind.
        is_stopped = process.poll() is None
        if is_stopped:
            _end(process)
    return _EXIT_INTERRUPTED if is_stopped else process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
