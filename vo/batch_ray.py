"""The runs of a batch on a Ray cluster: the only import of `ray`.

Every worker needs lightvo, and must see the directories of the data and of the results under the same paths, as on a
shared file system: a job travels as a line of JSON, its results stay where they are written.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from vo.batch_jobs import Job, Outcome, run_job
from vo.types import ConfigError

LOCAL = "local"
_POLL_S = 0.5
_GRACE_S = 30.0


@contextmanager
def cluster(address: str, num_workers: int) -> Iterator[Any]:
    """Ray, connected to a cluster ("auto", "HOST:PORT", "ray://HOST:PORT") or started here ("local"), until the end.

    num_workers  processors to start "local" with; a cluster knows its own.

    Raises ConfigError where Ray is not installed or does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--ray {address}: Ray is not installed: pip install 'lightvo[ray]' ({error})") from error
    settings: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == LOCAL:
        settings |= {"address": LOCAL, "num_cpus": num_workers, "include_dashboard": False}
    else:
        settings["address"] = address
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--ray {address}: cannot be reached: {reason}; start it with `ray start --head`") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_on_ray(
    ray: Any, jobs: Sequence[Job], num_cpus: float, num_gpus: float
) -> Generator[tuple[Job, Outcome] | None, None, None]:
    """Every job with its outcome as they end, and None now and then meanwhile.

    Closing the iterator gives up what has not begun, and stops what has.
    """
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(_run_text)
    running = {remote.remote(json.dumps(asdict(job)), max(1, int(num_cpus))): job for job in jobs}
    try:
        while running:
            ended, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
            if not ended:
                yield None
            for reference in ended:
                job = running.pop(reference)
                yield job, _outcome(ray, reference, job)
    finally:
        # Not by force: the workers then end the runs that they have started.
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_GRACE_S)


def _run_text(text: str, num_threads: int) -> str:
    """A job on a worker, both ways as JSON."""
    tree = json.loads(text)
    job = Job(**{**tree, "arguments": tuple(tree["arguments"])})
    return json.dumps(asdict(run_job(job, num_threads=num_threads)))


def _outcome(ray: Any, reference: Any, job: Job) -> Outcome:
    """What a worker said, or why it said nothing."""
    try:
        return Outcome(**json.loads(ray.get(reference)))
    except ray.exceptions.RayError as error:
        return Outcome("failed", job.fingerprint, 0.0, "ray", " ".join(str(error).split())[-300:])
