"""Recordings after a kill, on a full disk, cut, damaged: what is read of them; and what keeps one from beginning."""

from __future__ import annotations

import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.writer import Writer
from recorded_run import foxglove_messages, own_bytes, record_run, say_run, true_frame
from synthetic_drive import write_drive
from synthetic_world import CAMERA

from vo import cli
from vo.mcap_recorder import McapRecorder
from vo.message_stream import EncodedMessage, MessageStream
from vo.messages import Topic, decode
from vo.output import OutputError
from vo.recording import ChannelSpec, Recording, RecordingError, RecordingWriter

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("recording") / "run.mcap"
    return path, record_run(path)


# --- kills ---

KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from recorded_run import say_run
from synthetic_world import CAMERA
from vo.mcap_recorder import McapRecorder
from vo.message_stream import MessageStream

recorder = McapRecorder(Path({path!r}))
stream = MessageStream(CAMERA)
stream.add_consumer(recorder.add)

def tell(index):
    print(index, time.monotonic(), flush=True)
    time.sleep(0.02)

say_run(stream, 1000, on_frame=tell)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory):
    """A recording whose process got SIGKILL, the frames it told of with their times, and the time of the kill."""
    path = tmp_path_factory.mktemp("killed") / "run.mcap"
    program = KILLED.format(tests=str(ROOT / "tests"), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        index, moment_s = line.split()
        told.append((int(index), float(moment_s)))
        if len(told) > 1 and told[-1][1] - told[0][1] > 2.6:
            break
    killed_s = time.monotonic()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return path, told, killed_s


def test_a_kill_costs_the_last_second_at_most(killed):
    path, told, killed_s = killed
    recording = Recording(path)
    assert not recording.is_complete
    frames = {decode(message.data).header.frame_index for message in recording.messages(["lightvo/pose"])}
    due = {index for index, moment_s in told if moment_s < killed_s - 1.0}
    assert len(due) > 20
    assert due <= frames
    assert recording.damages == []


def test_a_killed_recording_is_repaired_for_other_programs(killed, tmp_path, capfd):
    path, _, _ = killed
    assert cli.main(["recording", "repair", str(path), "--output", str(tmp_path / "whole.mcap")]) == 0
    assert "complete" in capfd.readouterr().out
    with (tmp_path / "whole.mcap").open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        assert reader.get_summary() is not None
        messages = [(c.topic, m.data, m.log_time, m.publish_time, m.sequence) for _, c, m in reader.iter_messages()]
    expected = [(m.topic, m.data, m.time_ns, m.publish_ns, m.sequence) for m in Recording(path).messages()]
    assert sorted(messages) == sorted(expected)
    assert Recording(tmp_path / "whole.mcap").metadata == Recording(path).metadata
    assert foxglove_messages(tmp_path / "whole.mcap", "/camera/pose")


def test_a_repair_takes_the_place_of_the_file_only_when_it_is_done(killed, tmp_path, capfd):
    path = tmp_path / "run.mcap"
    path.write_bytes(killed[0].read_bytes())
    assert cli.main(["recording", "repair", str(path)]) == 0
    assert Recording(path).is_complete
    assert os.listdir(tmp_path) == ["run.mcap"]
    assert cli.main(["recording", "repair", str(path)]) == 0
    assert "nothing to repair" in capfd.readouterr().out


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1), num_zeros=st.sampled_from([0, 0, 7, 5000]))
def test_a_file_cut_anywhere_is_read_up_to_there(recorded, share, num_zeros):
    """Also with zeros behind the cut, as some file systems leave after a power failure."""
    path, _ = recorded
    whole = path.read_bytes()
    cut = path.with_name("cut.mcap")
    cut.write_bytes(whole[: round(share * (len(whole) - 1))] + bytes(num_zeros))
    try:
        recording = Recording(cut)
    except RecordingError as error:
        assert cut.stat().st_size < 8 + num_zeros and "is no MCAP file" in str(error)
        return
    assert not recording.is_complete
    messages = [message.data for message in recording.messages()]
    assert messages == [message.data for message in Recording(path).messages()][: len(messages)]


def test_a_damaged_chunk_is_left_out_and_told(tmp_path, capfd):
    path = tmp_path / "run.mcap"
    with RecordingWriter(path, [ChannelSpec("lightvo/pose", "lightvo/1")]) as writer:
        for index in range(3):
            writer.add("lightvo/pose", bytes([index]) * 1000, index, index)
            writer.commit()
        writer.finish()
    content = bytearray(path.read_bytes())
    second = Recording(path)._chunks[1]
    content[second.offset + 60] ^= 0xFF
    path.write_bytes(content)
    recording = Recording(path)
    assert [message.data[0] for message in recording.messages()] == [0, 2]
    assert len(recording.damages) == 1 and str(second.offset) in recording.damages[0]


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"no MCAP at all"])
def test_what_is_no_recording_is_refused_in_one_line(tmp_path, capfd, content: bytes):
    path = tmp_path / "run.mcap"
    path.write_bytes(content)
    for arguments in (["info", path], ["repair", path]):
        assert cli.main(["recording", *map(str, arguments)]) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1 and str(path) in error


def test_a_chunk_that_promises_too_much_is_refused(tmp_path):
    path = tmp_path / "run.mcap"
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start()
        channel = writer.register_channel("lightvo/pose", "lightvo/1", 0)
        writer.add_message(channel, 0, b"x", 0)
        writer.finish()
    content = bytearray(path.read_bytes())
    offset = Recording(path)._chunks[0].offset
    content[offset + 16 : offset + 24] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(RecordingError, match="larger than"):
        Recording(path)


# --- disks ---


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """No file grows beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_recording_and_not_the_run(tmp_path, capfd):
    """The limit on the size of files stands for the disk; results are small, the recording is not."""
    drive, path, output = write_drive(tmp_path, 30), tmp_path / "run.mcap", tmp_path / "out"
    limit_bytes = 1_000_000  # about half of the recording
    arguments = ["run", drive, "--config", "orb", "--publish", "off", "--record", path, "--output", output]
    arguments += ["--realtime", "--set", "pipeline.policy=lossless"]
    with disk_of(limit_bytes):
        assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    told = [line for line in err.splitlines() if not line.startswith("frame ")]  # progress
    assert len(told) == 1 and str(path) in told[0] and "the run goes on" in told[0], err
    assert "ended early" in out
    lines = (output / "trajectory_tum.txt").read_text().splitlines()
    assert len(lines) == 30 and (output / "summary.json").exists()
    assert path.stat().st_size <= limit_bytes
    recording = Recording(path)
    poses = list(recording.messages(["lightvo/pose"]))
    assert not recording.is_complete and 0 < len(poses) < 30 and recording.damages == []


def test_a_disk_that_hangs_never_delays_a_pose_and_costs_images_first(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    commit = RecordingWriter.commit

    def hang(writer: RecordingWriter) -> None:
        may_go_on.wait(30)
        commit(writer)

    with McapRecorder(tmp_path / "run.mcap", max_queue_bytes=400_000) as recorder:
        monkeypatch.setattr(RecordingWriter, "commit", hang)
        stream = MessageStream(CAMERA)
        stream.add_consumer(recorder.add)
        messages: list[EncodedMessage] = []
        stream.add_consumer(messages.append)
        truth = say_run(stream, 3)
        time.sleep(0.7)  # the thread hangs now
        delays_s = []
        image = next(message for message in messages if message.topic is Topic.IMAGE)
        pose = next(message for message in messages if message.topic is Topic.POSE)
        for _ in range(200):
            start_s = time.perf_counter()
            recorder.add(image)
            recorder.add(pose)
            delays_s.append(time.perf_counter() - start_s)
        num_lost = recorder.num_lost
        may_go_on.set()
    assert np.percentile(delays_s, 90) < 0.005
    num_fitting = 200_000 // len(image.data)
    assert abs(num_lost - (200 - num_fitting)) <= 2 + 200 * len(pose.data) // len(image.data)
    recorded_poses = list(Recording(tmp_path / "run.mcap").messages(["lightvo/pose"]))
    assert len(recorded_poses) == 200 + len(truth.tracks)
    assert recorder.num_recorded == len(own_bytes(tmp_path / "run.mcap"))


def test_an_image_larger_than_the_queue_is_recorded_all_the_same(tmp_path):
    with McapRecorder(tmp_path / "run.mcap", max_queue_bytes=100_000) as recorder:
        stream = MessageStream(CAMERA)
        stream.add_consumer(recorder.add)
        say_run(stream, 1, with_map=False)
        time.sleep(0.2)  # the queue is empty now
        recorder.add_keyframe(true_frame(0))
    assert len(foxglove_messages(tmp_path / "run.mcap", "/camera/keyframe")) == 1


def test_a_file_that_cannot_be_made_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        McapRecorder(tmp_path / "file" / "run.mcap")


def test_a_missing_package_is_named_with_the_remedy_before_the_run(tmp_path, monkeypatch, capfd):
    for module in ("vo.recording", "vo.mcap_recorder", "vo.foxglove"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mcap.data_stream", None)
    drive = write_drive(tmp_path, 3)
    assert cli.main(["run", str(drive), "--config", "orb", "--record", str(tmp_path / "run.mcap")]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and "lightvo[record]" in error
    assert not (tmp_path / "run.mcap").exists()


@pytest.mark.parametrize("missing", ["foxglove_schemas_protobuf.Pose_pb2", "google.protobuf.message"])
def test_so_are_the_packages_of_the_schemas(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(OutputError, match=r"lightvo\[record\]"):
        runpy.run_path(str(ROOT / "vo" / "foxglove.py"))
