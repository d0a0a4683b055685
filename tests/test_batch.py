"""Batches: what a manifest may say, what is run and what is not run again, the table, and a cluster of two workers."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from synthetic_drive import write_drive

from vo import batch_jobs
from vo.batch_jobs import DONE, FAILED, INTERRUPTED, Job, Outcome, pending, plan, read_outcome, run_job
from vo.batch_manifest import BatchManifest, load_manifest, official_manifests
from vo.batch_table import batch_rows, csv_text, html, markdown
from vo.cli import main
from vo.types import ConfigError

NUM_FRAMES = 10
MANIFEST = {
    "title": "Two drives",
    "sequences": [
        {"name": "05", "source": "kitti:{data}/sequences/05"},
        {"name": "06", "source": "kitti:{data}/sequences/06", "max_frames": 8},
    ],
    "configs": [{"name": "orb", "config": "orb"}],
    "peers": [
        {
            "name": "Other|System",
            "origin": "its paper, table 1",
            "figures": [{"sequence": "05", "figure": "ate_rmse_m", "value": 0.5}],
        }
    ],
    "notes": ["drawn by <hand>"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("05", "06"):
        write_drive(root, NUM_FRAMES, name)
    return root


def write_manifest(directory: Path, **changes: object) -> Path:
    path = directory / "two.yaml"
    path.write_text(yaml.safe_dump({**MANIFEST, **changes}))
    return path


def fake_results(job: Job, ate_m: float, *, status: str = DONE, fps: float = 10.0) -> None:
    """What a run would have left behind."""
    directory = Path(job.output)
    directory.mkdir(parents=True)
    evaluation = {"ate_rmse_m": ate_m, "coverage": 0.5, "kitti_t_err_percent": None}
    (directory / "summary.json").write_text(json.dumps({"evaluation": evaluation, "fps": fps, "lost_episodes": 1}))
    outcome = {"status": status, "fingerprint": job.fingerprint, "seconds": 1.0, "host": "here", "reason": "too bad"}
    (directory / "job.json").write_text(json.dumps(outcome))


# --- manifests ------------------------------------------------------------------------------------------------------


def test_the_official_manifests_can_be_read() -> None:
    assert official_manifests() == ["euroc", "heads", "kitti", "tum"]
    manifests = {name: load_manifest(name) for name in official_manifests()}
    assert [sequence.name for sequence in manifests["kitti"].sequences] == [f"{k:02d}" for k in range(11)]
    assert len(manifests["euroc"].sequences) == 11
    families = {sequence.name.split("_")[0] for sequence in manifests["tum"].sequences}
    assert families == {"freiburg1", "freiburg2", "freiburg3"}
    for manifest in manifests.values():
        jobs = plan(manifest, "/d", Path("/o"))
        assert len({job.output for job in jobs}) == len(jobs) == len(manifest.sequences) * len(manifest.configs)
        assert all("{" not in job.source for job in jobs)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sequences": []}, "sequences: expected at least one"),
        ({"sequences": [{"name": "a", "source": "x"}] * 2}, "sequences: 'a' occurs twice"),
        ({"sequences": [{"name": "../a", "source": "x"}]}, r"sequences\[0\]\.name: '\.\./a'"),
        ({"sequences": [{"name": "a", "source": "x", "frames": 3}]}, r"sequences\[0\]\.frames: unknown key"),
        ({"configs": [{"name": "a", "config": "nowhere"}]}, "configs: a: nowhere: no such preset"),
        ({"configs": [{"name": "a", "set": ["frontend.devise=cpu"]}]}, "configs: a: .*devise: unknown key"),
        ({"repeats": 0}, "repeats: "),
        ({"peers": [{"name": "P", "origin": " ", "figures": []}]}, r"peers\[0\]\.origin: say where"),
        (
            {"peers": [{"name": "P", "origin": "o", "figures": [{"sequence": "9", "figure": "fps", "value": 1.0}]}]},
            "peers: '9' is none of the sequences",
        ),
        (
            {"peers": [{"name": "P", "origin": "o", "figures": [{"sequence": "05", "figure": "x", "value": 1.0}]}]},
            r"peers\[0\]\.figures\[0\]\.figure: .*not valid",
        ),
    ],
)
def test_a_wrong_manifest_is_refused_by_path(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"two\.yaml: {complaint}"):
        load_manifest(str(write_manifest(tmp_path, **changes)))


def test_a_manifest_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"kiti: no such manifest; .* euroc, heads, kitti, tum"):
        load_manifest("kiti")


# --- jobs -----------------------------------------------------------------------------------------------------------


def planned(tmp_path: Path, data: str = "/data", max_frames: int | None = None, **changes: object) -> list[Job]:
    manifest = load_manifest(str(write_manifest(tmp_path, **changes)))
    return plan(manifest, data, tmp_path / "out", max_frames=max_frames)


def test_repeats_come_last_and_limits_are_the_smaller_ones(tmp_path: Path) -> None:
    jobs = planned(
        tmp_path, max_frames=9, repeats=2, configs=[{"name": "a"}, {"name": "b", "set": ["pipeline.threaded=false"]}]
    )
    assert [job.name for job in jobs] == ["a/05", "a/06", "b/05", "b/06", "a/05/2", "a/06/2", "b/05/2", "b/06/2"]
    limits = [job.arguments[job.arguments.index("--max-frames") + 1] for job in jobs[:2]]
    assert limits == ["9", "8"] and "pipeline.threaded=false" in jobs[2].arguments
    assert jobs[0].source == "kitti:/data/sequences/05"


def test_what_has_been_done_is_not_done_again_unless_it_was_something_else(tmp_path: Path) -> None:
    jobs = planned(tmp_path)
    assert pending(jobs) == jobs
    fake_results(jobs[0], 0.1)
    fake_results(jobs[1], 0.1, status=FAILED)
    assert pending(jobs) == [jobs[1]], "what failed is tried again"
    # Where the data lie does not matter; the settings do.
    assert pending(planned(tmp_path, data="/elsewhere")) == [planned(tmp_path, data="/elsewhere")[1]]
    assert len(pending(planned(tmp_path, max_frames=5))) == 2
    (Path(jobs[0].output) / "summary.json").unlink()
    assert read_outcome(jobs[0]) is None, "done, but its results are gone"
    (Path(jobs[1].output) / "job.json").write_text("{torn")
    assert read_outcome(jobs[1]) is None


def test_a_stopped_run_is_ended_and_will_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = planned(tmp_path)[0]
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def popen(_command: list[str], **settings: object) -> subprocess.Popen[bytes]:
        started.append(real([sys.executable, "-c", stubborn], **settings))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(batch_jobs.subprocess, "Popen", popen)
    monkeypatch.setattr(batch_jobs, "_GRACE_S", 0.3)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    outcome = run_job(job, stop)
    assert outcome.status == INTERRUPTED and started[0].returncode == -signal.SIGKILL
    assert read_outcome(job) is None and pending([job]) == [job]


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_medians_ranges_peers_and_means(tmp_path: Path) -> None:
    manifest = load_manifest(str(write_manifest(tmp_path, repeats=3)))
    jobs = plan(manifest, "", tmp_path / "out")
    for number, job in enumerate(jobs):
        if job.name != "orb/06/3":
            fake_results(job, [0.3, 1.0, 0.1, 2.0, 0.2][number], status=FAILED if job.name == "orb/06/2" else DONE)
    rows = batch_rows(manifest, jobs)
    assert [(row.sequence, row.method, row.num_runs) for row in rows] == [
        ("05", "orb", 3),
        ("05", "Other|System", 1),
        ("06", "orb", 1),
        ("mean", "orb", 4),
    ]
    assert rows[0].median("ate_rmse_m") == np.median([0.3, 0.1, 0.2])
    assert rows[3].median("ate_rmse_m") == pytest.approx((0.2 + 1.0) / 2)
    assert rows[2].note == "failed: too bad; not run yet"
    text = markdown(manifest, rows)
    assert "| 05 | orb | 3 of 3 | 0.2 (0.1 to 0.3) |" in text and "50.0 %" in text
    assert "Other\\|System | published | 0.5 |" in text and "published: its paper, table 1" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    table = list(csv.DictReader(csv_text(rows).splitlines()))
    assert [float(row["ate_rmse_m"]) for row in table] == [0.2, 0.5, 1.0, pytest.approx(0.6)]
    assert table[0]["kitti_t_err_percent"] == "" and table[0]["fps"] == "10.0"
    page = html(manifest, rows)
    assert "drawn by &lt;hand&gt;" in page and "0.2 (0.1 to 0.3)" in page


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIGHTVO_DATA", raising=False)
    sequences = [MANIFEST["sequences"][1], {"name": "07", "source": "kitti:{data}/sequences/07"}]  # type: ignore[index]
    manifest = write_manifest(tmp_path, sequences=sequences, peers=[])
    arguments = ["batch", str(manifest), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 2
    assert "give --data DIR, or set LIGHTVO_DATA" in capfd.readouterr().err
    arguments += ["--data", str(data)]
    assert main(arguments) == 2, "one sequence is not there"
    output = capfd.readouterr()
    assert "2 runs, 0 done before" in output.err and "vo: orb/07 failed: vo: error: " in output.err
    assert "over 1 of 2 sequences" in output.out
    table = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert float(table[0]["ate_rmse_m"]) < 0.1 and float(table[0]["coverage"]) == 1.0
    summary = json.loads((tmp_path / "out" / "orb" / "06" / "run1" / "summary.json").read_text())
    assert summary["frames_processed"] == 8
    write_drive(data, NUM_FRAMES, "07")
    before = (tmp_path / "out" / "orb" / "06" / "run1" / "job.json").stat().st_mtime_ns
    assert main(arguments) == 0
    output = capfd.readouterr()
    assert "2 runs, 1 done before" in output.err and "over " not in output.out
    assert (tmp_path / "out" / "orb" / "06" / "run1" / "job.json").stat().st_mtime_ns == before
    assert main([*arguments, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    tree = json.loads((tmp_path / "out" / "batch.json").read_text())
    assert tree["schema"] == "lightvo-batch/1" and str(tmp_path) not in json.dumps(tree)


def batch_command(manifest: Path, output: Path, data: Path) -> list[str]:
    """The command line of a batch in a process of its own."""
    return [sys.executable, "-m", "vo", "batch", str(manifest), "--output", str(output), "--data", str(data)]


def test_an_interrupted_batch_ends_its_runs(data: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, sequences=[{"name": "clip", "source": "demo"}], peers=[])
    command = batch_command(manifest, tmp_path / "out", data)
    batch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "orb" / "clip" / "run1" / "trajectory_tum.txt"
    end_s = time.monotonic() + 60
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < end_s:
        time.sleep(0.1)
    batch.send_signal(signal.SIGINT)
    out, err = batch.communicate(timeout=60)
    assert batch.returncode == 130, err
    assert "not run yet" in out
    # The run was asked to end, and wrote what it had.
    assert json.loads((log.parent / "summary.json").read_text())["interrupted"]
    assert not (log.parent / "job.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_two_workers_of_a_local_ray(data: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray leaves threads, handlers and warnings behind."""
    manifest = write_manifest(tmp_path)
    command = batch_command(manifest, tmp_path / "out", data)
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [*command, "--ray", "local", "--jobs", "2"], capture_output=True, text=True, env=environment, timeout=150
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("orb/*/run1/job.json"))]
    assert [outcome["status"] for outcome in outcomes] == [DONE, DONE]
    assert "| 05 | orb | 1 of 1 | 0." in done.stdout
    jobs = plan(load_manifest(str(manifest)), str(data), (tmp_path / "out").resolve())
    assert pending(jobs) == [], "what Ray has done is done"


def test_an_outcome_is_what_a_job_writes() -> None:
    assert set(Outcome.__dataclass_fields__) == {"status", "fingerprint", "seconds", "host", "reason"}
    assert isinstance(load_manifest("heads"), BatchManifest)


@pytest.mark.parametrize(
    ("manifest", "peer", "average_m"),
    [
        ("kitti", "ORB-SLAM2, monocular, without loop closure", 69.727),
        ("kitti", "DF-VO", 16.440),
        ("kitti", "DROID-VO", 54.188),
        ("kitti", "DPVO", 53.609),
        ("kitti", "DPV-SLAM++ (closes loops)", 25.749),
        ("euroc", "DROID-SLAM, odometry only", 0.186),
        ("euroc", "DSO", 0.601),
        ("euroc", "DPVO", 0.104),
        ("tum", "DROID-SLAM (global bundle adjustment)", 0.038),
        ("tum", "TartanVO, scaled by the truth", 0.206),
        ("tum", "MASt3R-SLAM, calibrated (closes loops)", 0.030),
        ("tum", "DPVO", 0.0931),
    ],
)
def test_published_figures_have_the_published_average(manifest: str, peer: str, average_m: float) -> None:
    """The average that stands beside the figures where they were published: no figure was mistyped."""
    found = next(entry for entry in load_manifest(manifest).peers if entry.name == peer)
    assert sum(f.value for f in found.figures) / len(found.figures) == pytest.approx(average_m, abs=0.6e-3)
