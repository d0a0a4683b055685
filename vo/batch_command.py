"""`vo batch`: many sequences with many configurations, here or on a Ray cluster, until one table is full."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vo.batch_jobs import FAILED, Job, Outcome, pending, plan, run_job
from vo.batch_manifest import BatchManifest, load_manifest
from vo.batch_table import Row, batch_rows, batch_tree, csv_text, html, markdown
from vo.bench_machine import read_machine
from vo.interrupts import stop_on_signals
from vo.output import prepare_directory, write_atomically
from vo.progress import progress
from vo.summary import library_versions
from vo.types import ConfigError

USER_ERROR, INTERRUPTED = 2, 130
TABLE_NAMES = ("table.md", "table.csv", "table.html", "batch.json")
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What the user asked for.

    data       what {data} stands for in the sources; None: LIGHTVO_DATA.
    num_jobs   runs at a time, on this machine.
    ray        address of a cluster, or "local"; None: processes of this machine.
    ray_cpus, ray_gpus   that each run takes of a cluster.
    """

    manifest: str
    output: Path
    data: str | None = None
    num_jobs: int = 1
    device: str | None = None
    max_frames: int | None = None
    ray: str | None = None
    ray_cpus: float = 1.0
    ray_gpus: float = 0.0
    is_quiet: bool = False


def batch_command(request: BatchRequest) -> int:
    """Runs what has not been run, writes the table after every run, prints it. 2 where a run failed, 130 interrupted.

    Raises VoError in one line.
    """
    manifest = load_manifest(request.manifest)
    data = request.data or os.environ.get("LIGHTVO_DATA")
    if data is None and any("{data}" in sequence.source for sequence in manifest.sequences):
        raise ConfigError(f"{request.manifest}: its sources lie under {{data}}: give --data DIR, or set LIGHTVO_DATA")
    prepare_directory(request.output)
    output = request.output.resolve()
    jobs = plan(manifest, data or "", output, device=request.device, max_frames=request.max_frames)
    todo = pending(jobs)
    if not request.is_quiet:
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} done before", file=sys.stderr, flush=True)
    rows = write_tables(manifest, jobs, request)
    failed: list[tuple[Job, Outcome]] = []
    with stop_on_signals() as stop, progress(len(todo), is_quiet=request.is_quiet) as advance:
        with closing(run_all(request, todo, stop)) as ended:
            for job, outcome in ended:
                advance(f"{job.name}: {outcome.status} after {outcome.seconds:.0f} s")
                if outcome.status == FAILED:
                    failed.append((job, outcome))
                rows = write_tables(manifest, jobs, request)
        is_interrupted = stop.is_set()
    if not request.is_quiet:
        print(markdown(manifest, rows), end="")
    for job, outcome in failed:
        print(f"vo: {job.name} failed: {outcome.reason} (log: {job.output}/log.txt)", file=sys.stderr)
    if is_interrupted:
        return INTERRUPTED
    return USER_ERROR if failed else 0


def run_all(
    request: BatchRequest, jobs: Sequence[Job], stop: threading.Event
) -> Generator[tuple[Job, Outcome], None, None]:
    """The jobs with their outcomes as they end; ends early, and ends what runs, when `stop` is set."""
    if not jobs:
        return
    if request.ray is None:
        yield from run_here(jobs, request.num_jobs, stop)
        return
    from vo.batch_ray import cluster, run_on_ray

    with (
        cluster(request.ray, request.num_jobs) as ray,
        closing(run_on_ray(ray, jobs, request.ray_cpus, request.ray_gpus)) as found,
    ):
        for ended in found:
            if stop.is_set():
                return
            if ended is not None:
                yield ended


def run_here(jobs: Sequence[Job], num_jobs: int, stop: threading.Event) -> Generator[tuple[Job, Outcome], None, None]:
    """So many processes of this machine at a time, which share its cores."""
    num_threads = max(1, (os.cpu_count() or 1) // num_jobs)
    with ThreadPoolExecutor(num_jobs) as pool:
        running: dict[Future[Outcome], Job] = {}
        waiting = list(jobs)
        try:
            while (waiting and not stop.is_set()) or running:
                while waiting and len(running) < num_jobs and not stop.is_set():
                    job = waiting.pop(0)
                    running[pool.submit(run_job, job, stop, num_threads)] = job
                for future in wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            # Whatever ended the loop, no run is left behind.
            if running:
                stop.set()


def write_tables(manifest: BatchManifest, jobs: Sequence[Job], request: BatchRequest) -> list[Row]:
    """The table so far in all its forms."""
    rows = batch_rows(manifest, jobs)
    tree = batch_tree(
        manifest,
        rows,
        date=datetime.now(UTC).date().isoformat(),
        command=command_line(request),
        machine=read_machine(),
        versions=library_versions(),
    )
    texts = (markdown(manifest, rows), csv_text(rows), html(manifest, rows), json.dumps(tree, indent=2) + "\n")
    for name, text in zip(TABLE_NAMES, texts, strict=True):
        write_atomically(request.output / name, text)
    return rows


def command_line(request: BatchRequest) -> str:
    """The command that repeats the batch, without where this machine keeps its files."""
    words = ["vo", "batch", Path(request.manifest).name, "--output", request.output.name]
    words += ["--jobs", str(request.num_jobs)] if request.num_jobs != 1 else []
    words += ["--device", request.device] if request.device is not None else []
    words += ["--max-frames", str(request.max_frames)] if request.max_frames is not None else []
    return shlex.join(words)
