"""The tracks on disk: read back with NumPy alone, in bounded parts, whole after Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from synthetic_drive import write_drive

from vo import cli
from vo.output import OutputError
from vo.tracks_archive import TracksArchive, TracksError, read_tracks
from vo.types import FrameTracks

ROOT = Path(__file__).parents[1]


def frame_tracks(index: int, num_tracks: int) -> FrameTracks:
    rng = np.random.default_rng(index)
    return FrameTracks(
        index,
        index * 33_000_000,
        np.sort(rng.choice(10_000, num_tracks, replace=False)).astype(np.int64),
        rng.uniform(0, 640, (num_tracks, 2)).astype(np.float32),
        rng.integers(1, 50, num_tracks).astype(np.int32),
        rng.random(num_tracks) < 0.5,
    )


def assert_same(tracks: FrameTracks, expected: FrameTracks) -> None:
    assert (tracks.frame_index, tracks.timestamp_ns) == (expected.frame_index, expected.timestamp_ns)
    for name in ("track_ids", "keypoints", "lengths", "has_landmark"):
        assert_array_equal(getattr(tracks, name), getattr(expected, name))
        assert getattr(tracks, name).dtype == getattr(expected, name).dtype


def test_tracks_come_back_frame_by_frame_also_without_any_track(tmp_path):
    frames = [frame_tracks(3 * i, num_tracks) for i, num_tracks in enumerate((5, 0, 7, 1, 0, 0, 4))]
    with TracksArchive(tmp_path / "tracks", max_frames=3) as archive:
        for frame in frames:
            archive.add(frame)
    assert sorted(os.listdir(tmp_path / "tracks")) == [f"tracks_{i:06d}.npz" for i in range(3)]
    for tracks, expected in zip(read_tracks(tmp_path / "tracks"), frames, strict=True):
        assert_same(tracks, expected)


def test_a_part_is_bounded_by_its_observations_too(tmp_path):
    with TracksArchive(tmp_path, max_observations=100) as archive:
        for i in range(10):
            archive.add(frame_tracks(i, 30))
    sizes = [len(np.load(path)["track_ids"]) for path in sorted(tmp_path.glob("*.npz"))]
    assert sizes == [120, 120, 60]


def test_the_snippet_of_the_documentation_reads_them(tmp_path, monkeypatch, capsys):
    frames = [frame_tracks(i, 4) for i in range(5)]
    with TracksArchive(tmp_path / "out" / "desk" / "tracks", max_frames=2) as archive:
        for frame in frames:
            archive.add(frame)
    text = (ROOT / "docs" / "RECORDING.md").read_text()
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "tracks_*.npz" in code)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "RECORDING.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line, frame in zip(lines, frames, strict=True):
        assert line.split()[:2] == [str(frame.frame_index), str(len(frame.track_ids))]


def test_parts_of_an_earlier_run_go_with_the_first_frame(tmp_path):
    (tmp_path / "tracks_000009.npz").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("kept")
    with TracksArchive(tmp_path):
        assert (tmp_path / "tracks_000009.npz").exists()
    assert (tmp_path / "tracks_000009.npz").exists()
    with TracksArchive(tmp_path) as archive:
        archive.add(frame_tracks(0, 3))
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "tracks_000000.npz"]


def test_a_disk_that_refuses_is_one_line(tmp_path):
    directory = tmp_path / "tracks"
    archive = TracksArchive(directory, max_frames=1)
    archive.add(frame_tracks(0, 3))
    while not (directory / "tracks_000000.npz").exists():
        time.sleep(0.01)
    for path in directory.glob("*"):
        path.unlink()
    directory.rmdir()
    with pytest.raises(OutputError, match="cannot write"):
        for i in range(1, 50):
            archive.add(frame_tracks(i, 3))
        archive.close()


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"\x93NUMPY"])
def test_what_is_no_file_of_tracks_is_one_line(tmp_path, content):
    (tmp_path / "tracks_000000.npz").write_bytes(content)
    with pytest.raises(TracksError, match=r"tracks_000000\.npz"):
        list(read_tracks(tmp_path))
    with pytest.raises(TracksError, match="--save-tracks"):
        list(read_tracks(tmp_path / "nothing"))


def test_a_run_saves_the_tracks_of_every_frame(tmp_path, capfd):
    drive, output = write_drive(tmp_path, 8), tmp_path / "out"
    arguments = ["run", str(drive), "--config", "orb", "--publish", "off", "--save-tracks"]
    assert cli.main(arguments) == 2
    assert "--output DIR" in capfd.readouterr().err
    assert cli.main([*arguments, "--output", str(output), "--quiet"]) == 0
    frames = list(read_tracks(output / "tracks"))
    assert [frame.frame_index for frame in frames] == list(range(8))
    lengths = dict(zip(frames[6].track_ids.tolist(), frames[6].lengths.tolist(), strict=True))
    followed = [i for i in frames[7].track_ids.tolist() if i in lengths]
    assert len(followed) > 50
    now = dict(zip(frames[7].track_ids.tolist(), frames[7].lengths.tolist(), strict=True))
    assert all(now[track_id] == lengths[track_id] + 1 for track_id in followed)


def test_ctrl_c_leaves_every_frame_that_was_computed(tmp_path):
    output = tmp_path / "out"
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "vo", "run", str(write_drive(tmp_path, 40)), "--config", "orb", "--publish", "off"),
            *("--save-tracks", "--output", str(output), "--realtime", "--set", "pipeline.policy=lossless"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    trajectory = output / "trajectory_tum.txt"
    while run.poll() is None and not (trajectory.exists() and len(trajectory.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    times = [int(line.split()[0].replace(".", "")) for line in trajectory.read_text().splitlines()]
    frames = list(read_tracks(output / "tracks"))
    assert 3 <= len(times) <= len(frames) < 40, out
