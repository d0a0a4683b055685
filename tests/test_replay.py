"""Replaying: the same messages with the same bytes, in the same rhythm, from anywhere in the recording."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zmq
from mcap.writer import Writer
from recorded_run import INTERVAL_NS, record_run, say_run
from synthetic_world import CAMERA

import vo.replay
from vo import cli
from vo.config import PublisherConfig
from vo.listen import listen
from vo.mcap_recorder import McapRecorder
from vo.message_stream import EncodedMessage, MessageStream
from vo.messages import PUBLISHED_TOPICS, RunState, StatusReport, Topic, decode
from vo.publisher import Publisher
from vo.recording import Recording
from vo.replay import Passage, RecordedStream, restamped

ROOT = Path(__file__).parents[1]
NUM_FRAMES = 24
GOLDEN = json.loads((Path(__file__).parent / "golden_messages.json").read_text())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("replay") / "run.mcap"
    return path, record_run(path, NUM_FRAMES)


class PretendedTime(threading.Event):
    """An event that nobody sets: waiting for it moves a clock instead, so that rhythms can be read on any machine."""

    now_s = 1000.0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now_s += timeout
        return False


def played(path: Path, passage: Passage | None = None, pass_index: int = 0) -> tuple[list[EncodedMessage], list[float]]:
    """What a replay hands out, and when."""
    stream = RecordedStream(Recording(path), pass_index=pass_index)
    messages, times_s = [], []
    pretended = PretendedTime()
    stream.add_consumer(messages.append)
    stream.add_consumer(lambda message: times_s.append(pretended.now_s))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vo.replay, "time", SimpleNamespace(monotonic=lambda: pretended.now_s))
        stream.play(passage or Passage(rate=100.0), pretended)
    stream.finish()
    return messages, times_s


@contextmanager
def subscribed(endpoint: str) -> Iterator[list[bytes]]:
    """Everything that any topic of `endpoint` carries, taken by a bare socket."""
    received: list[bytes] = []
    done = threading.Event()
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.rcvhwm = 0
        subscriber.subscribe(b"")
        subscriber.connect(endpoint)

        def take() -> None:
            while not done.is_set():
                if subscriber.poll(20):
                    received.append(subscriber.recv())

        thread = threading.Thread(target=take)
        thread.start()
        yield received
        done.set()
        thread.join()


def without_time(data: bytes) -> bytes:
    return restamped(data, 0)


# --- bytes ---


def golden(name: str) -> bytes:
    return bytes.fromhex("".join(GOLDEN[name]))


@pytest.mark.parametrize("name", [name for name in sorted(GOLDEN) if b"publish_time_ns" in golden(name)])
def test_only_the_publish_time_of_a_message_changes(name):
    data = golden(name)
    message = decode(data)
    assert restamped(data, message.header.publish_time_ns) == data
    for time_ns in (0, 127, 2**40, 2**63 - 1):  # MessagePack writes them in 1 to 9 bytes
        changed = restamped(data, time_ns)
        assert decode(changed).header.publish_time_ns == time_ns
        assert restamped(changed, message.header.publish_time_ns) == data
    assert decode(restamped(data, 5, "other")).header.session_id == "other"


def test_keys_of_later_versions_are_kept():
    data = golden("pose")
    end = data.index(b"\0") + 5
    header_end = end + int.from_bytes(data[end - 4 : end], "little")
    header = bytes([data[end] + 1]) + data[end + 1 : header_end] + b"\xa3new\x01" if data[end] < 0x8F else None
    if header is None:  # a map of 16 keys or more has its size in two bytes
        size = int.from_bytes(data[end + 1 : end + 3], "big") + 1
        header = b"\xde" + size.to_bytes(2, "big") + data[end + 3 : header_end] + b"\xa3new\x01"
    start = data[: end - 4] + len(header).to_bytes(4, "little") + header
    extended = start.ljust(-(-len(start) // 8) * 8, b"\0") + data[-(-header_end // 8) * 8 :]
    assert restamped(extended, decode(data).header.publish_time_ns) == extended
    assert b"\xa3new\x01" in restamped(extended, 3)


def test_a_replay_hands_out_every_message_byte_for_byte(recorded):
    path, truth = recorded
    before_ns = time.time_ns()
    messages, _ = played(path)
    assert [without_time(message.data) for message in messages] == [without_time(m.data) for m in truth.messages]
    assert [(m.topic, m.sequence, m.capture_ns) for m in messages] == [
        (m.topic, m.sequence, m.capture_ns) for m in truth.messages
    ]
    assert all(before_ns <= decode(message.data).header.publish_time_ns <= time.time_ns() for message in messages)


def test_a_replay_over_the_wire_is_the_run_byte_for_byte(recorded, free_port):
    """`vo replay` to any subscriber: nothing is added, nothing left out, nothing changed but the publish times."""
    path, truth = recorded
    endpoint = f"tcp://127.0.0.1:{free_port}"
    with subscribed(endpoint) as received:
        assert cli.main(["replay", str(path), "--publish", endpoint, "--rate", "20", "--quiet"]) == 0
        time.sleep(0.1)
    assert [without_time(data) for data in received] == [without_time(message.data) for message in truth.messages]


def test_vo_listen_prints_the_same_of_a_run_and_of_its_replay(tmp_path, free_port):
    endpoint, path = f"tcp://127.0.0.1:{free_port}", tmp_path / "run.mcap"
    topics = ("pose", "tracks", "keyframe", "points")

    def heard(publish) -> list[dict]:
        output = io.StringIO()
        thread = threading.Thread(
            target=listen, args=(endpoint, topics, True), kwargs={"until_finished": True, "stream": output}
        )
        thread.start()
        publish()
        thread.join(20)
        assert not thread.is_alive()
        lines = [json.loads(line) for line in output.getvalue().splitlines()]
        return [{key: value for key, value in line.items() if key != "publish_time_ns"} for line in lines]

    def run() -> None:
        stream = MessageStream(CAMERA)
        with McapRecorder(path) as recorder:
            stream.add_consumer(recorder.add)
            with Publisher(PublisherConfig(endpoint=endpoint), stream):
                time.sleep(0.6)
                say_run(stream, NUM_FRAMES)

    def replay() -> None:
        assert cli.main(["replay", str(path), "--publish", endpoint, "--rate", "20", "--delay", "0.6", "--quiet"]) == 0

    live, again = heard(run), heard(replay)
    assert len([line for line in live if line["topic"] == "pose"]) == NUM_FRAMES
    assert {line["topic"] for line in live} == set(topics)
    by_topic = {topic: [line for line in live if line["topic"] == topic] for topic in topics}
    assert {topic: [line for line in again if line["topic"] == topic] for topic in topics} == by_topic


# --- rhythm, passages, ends ---


def test_the_rhythm_is_that_of_the_camera(recorded):
    path, _ = recorded
    messages, times_s = played(path, Passage(rate=4.0))
    poses = [(m, t) for m, t in zip(messages, times_s, strict=True) if m.topic is Topic.POSE]
    first_ns, first_s = poses[0][0].capture_ns, poses[0][1]
    delays_s = [t - first_s - (m.capture_ns - first_ns) * 1e-9 / 4 for m, t in poses]
    duration_s = (NUM_FRAMES - 1) * INTERVAL_NS * 1e-9 / 4
    np.testing.assert_allclose(delays_s, 0.0, atol=1e-9)
    assert times_s[-1] - times_s[0] == pytest.approx(duration_s)
    start_s = time.monotonic()
    RecordedStream(Recording(path)).play(Passage(rate=4.0), threading.Event())
    assert time.monotonic() - start_s > duration_s - 0.01, "on the clock of the machine it waits too"


def test_a_passage_begins_with_the_path_and_the_map_before_it(recorded):
    path, truth = recorded
    messages, times_s = played(path, Passage(start_s=0.52, end_s=0.78, rate=2.0))
    sent = {topic: [m.sequence for m in messages if m.topic is topic] for topic in PUBLISHED_TOPICS}
    assert sent[Topic.POSE] == list(range(16))  # up to 0.75 s
    assert sent[Topic.KEYFRAME] == sent[Topic.POINTS] == [0, 1, 2, 3]
    frames = [decode(m.data).header.frame_index for m in messages if m.topic is Topic.TRACKS]
    assert frames == [11, 12, 13, 14, 15]
    eleventh = next(i for i, m in enumerate(messages) if m.topic is Topic.POSE and m.sequence == 11)
    assert times_s[eleventh - 1] == times_s[0]  # all at once
    status = decode(messages[-1].data)
    assert isinstance(status.body, StatusReport) and status.body.state is RunState.FINISHED
    assert status.body.num_sent[Topic.POSE] == 16
    assert len(truth.messages) > len(messages)


def test_a_consumer_that_comes_late_gets_the_poses_from_the_first_one(recorded, free_port):
    path, _ = recorded
    endpoint = f"tcp://127.0.0.1:{free_port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "vo", "replay", str(path), "--publish", endpoint, "--delay", "0", "--rate", "0.5"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "replaying" in process.stdout.readline()
    time.sleep(1.0)
    output = io.StringIO()
    counts = listen(endpoint, ("pose",), True, until_finished=True, timeout_s=10.0, stream=output)
    assert process.wait(10) == 0
    process.stdout.close()
    sequences = [json.loads(line)["sequence"] for line in output.getvalue().splitlines()]
    assert sequences == list(range(NUM_FRAMES))
    assert counts.num_lost == 0 and counts.final_state is RunState.FINISHED


def test_the_recording_of_a_killed_run_is_replayed_and_ends_as_interrupted(tmp_path, free_port, capfd):
    path = tmp_path / "run.mcap"
    recorder = McapRecorder(path)
    stream = MessageStream(CAMERA)
    stream.add_consumer(recorder.add)
    say_run(stream, 5)
    time.sleep(0.7)  # on the disk now, as if the process were killed here
    copy = tmp_path / "copy.mcap"
    copy.write_bytes(path.read_bytes())
    recorder.close()
    endpoint = f"tcp://127.0.0.1:{free_port}"
    with subscribed(endpoint) as received:
        assert cli.main(["replay", str(copy), "--publish", endpoint, "--rate", "20"]) == 0
        time.sleep(0.1)
    assert capfd.readouterr().err.count("was cut short") == 1
    last = decode(received[-1])
    assert isinstance(last.body, StatusReport) and last.body.state is RunState.INTERRUPTED
    assert last.body.num_sent[Topic.POSE] == 5
    assert last.header.sequence == last.body.num_sent[Topic.STATUS]


def test_every_pass_of_a_loop_is_a_session_of_its_own(recorded, free_port):
    path, truth = recorded
    first, _ = played(path, pass_index=0)
    second, _ = played(path, pass_index=1)
    sessions = {decode(message.data).header.session_id for message in second}
    assert sessions == {"00c0ffee00c0ffee-1"}
    assert [restamped(m.data, 0, "x") for m in second] == [restamped(m.data, 0, "x") for m in first]
    endpoint = f"tcp://127.0.0.1:{free_port}"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vo",
            "replay",
            str(path),
            "--publish",
            endpoint,
            "--rate",
            "10",
            "--delay",
            "0",
            "--loop",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.stdout.close()
    num_messages = f"replayed    {len(truth.messages)} messages"
    assert lines[1].startswith(num_messages) and lines[2].startswith(num_messages)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "0"), "--rate"),
        (("--rate", "nan"), "--rate"),
        (("--start", "-1"), "--start"),
        (("--start", "60"), "is over after"),
        (("--start", "1", "--end", "0.5"), "--end"),
        (("--publish", "ipc://x"), "ipc://x"),
        (("--publish", "off"), "--publish off"),
        (("--publish", "tcp://0.0.0.0:5999"), "0.0.0.0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(recorded, capfd, arguments, said):
    assert cli.main(["replay", str(recorded[0]), *arguments]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and said in error


def test_a_file_without_our_messages_is_refused_in_one_line(tmp_path, capfd):
    path = tmp_path / "foreign.mcap"
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start()
        writer.add_message(writer.register_channel("/imu", "json", 0), 5, b"{}", 5)
        writer.finish()
    assert cli.main(["replay", str(path)]) == 2
    assert "holds no messages of lightvo" in capfd.readouterr().err
