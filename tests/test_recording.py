"""Recordings: what is in them, read by the library that defines the format, and what a kill or a full disk leaves."""

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

import cv2
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.writer import Writer
from numpy.testing import assert_allclose, assert_array_equal
from recorded_run import (
    BROWN,
    FISHEYE,
    INTERVAL_NS,
    LOST,
    PINHOLE,
    RATIONAL,
    START_NS,
    record_run,
    say_run,
    true_frame,
)
from synthetic_drive import write_drive
from synthetic_world import CAMERA

from vo import cli
from vo.camera_models import scaled_camera
from vo.mcap_recorder import McapRecorder
from vo.message_stream import EncodedMessage, MessageStream
from vo.messages import CompressedImage, RunState, Topic, decode
from vo.output import OutputError
from vo.recording import ChannelSpec, Recording, RecordingError, RecordingWriter
from vo.types import Camera

ROOT = Path(__file__).parents[1]
NUM_FRAMES = 24


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("recording") / "run.mcap"
    return path, record_run(path, NUM_FRAMES)


def foxglove_messages(path: Path, topic: str) -> list:
    """Messages of a channel and their times, decoded with nothing but the schema that the file itself holds."""
    decoded = []
    with path.open("rb") as file:
        for schema, _, message in make_reader(file, validate_crcs=True).iter_messages(topics=[topic]):
            pool = descriptor_pool.DescriptorPool()
            for definition in descriptor_pb2.FileDescriptorSet.FromString(schema.data).file:
                pool.Add(definition)
            kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(schema.name))
            decoded.append((kind.FromString(message.data), message.log_time))
    return decoded


def own_bytes(path: Path) -> list[bytes]:
    return [message.data for message in Recording(path).messages() if message.topic.startswith("lightvo/")]


# --- what is in a recording ---


def test_every_message_is_recorded_byte_for_byte_and_in_order(recorded):
    path, truth = recorded
    assert own_bytes(path) == [message.data for message in truth.messages]
    with path.open("rb") as file:
        summary = make_reader(file).get_summary()
    counts = {
        summary.channels[number].topic: count for number, count in summary.statistics.channel_message_counts.items()
    }
    assert counts["lightvo/pose"] == NUM_FRAMES
    assert counts["/camera/pose"] == counts["/tf"] == NUM_FRAMES - 1  # one frame is lost
    assert counts["/camera/keyframe"] == len(truth.keyframes)
    assert {summary.channels[number].message_encoding for number in summary.channels} == {"lightvo/1", "protobuf"}


def test_foxglove_gets_the_pose_and_the_transform(recorded):
    path, truth = recorded
    poses, transforms = foxglove_messages(path, "/camera/pose"), foxglove_messages(path, "/tf")
    indices = [index for index in range(NUM_FRAMES) if index != LOST]
    for index, (pose, time_ns), (link, _) in zip(indices, poses, transforms, strict=True):
        T = truth.published[index]
        assert pose.timestamp.ToNanoseconds() == time_ns == START_NS + index * INTERVAL_NS
        assert (pose.frame_id, link.parent_frame_id, link.child_frame_id) == ("world", "world", "camera")
        p, q = pose.pose.position, pose.pose.orientation
        assert_allclose([p.x, p.y, p.z], T[:3, 3])
        assert_allclose([link.translation.x, link.translation.y, link.translation.z], T[:3, 3])
        R = cv2.Rodrigues(2 * np.arccos(q.w) * np.array([q.x, q.y, q.z]) / (np.linalg.norm([q.x, q.y, q.z]) or 1))[0]
        assert_allclose(R, T[:3, :3], atol=1e-7)


def test_foxglove_gets_points_keyframes_and_images(recorded):
    path, truth = recorded
    cloud, _ = foxglove_messages(path, "/landmarks")[0]
    fields = {field.name: (field.offset, field.type) for field in cloud.fields}
    seen = truth.tracks[0].track_ids
    raw = np.frombuffer(cloud.data, np.uint8).reshape(-1, cloud.point_stride)
    assert len(raw) == len(seen) + 1
    for axis, name in enumerate("xyz"):
        assert fields[name][1] == 7  # FLOAT32
        column = np.ascontiguousarray(raw[:, fields[name][0] : fields[name][0] + 4]).view("<f4")[:, 0]
        assert_allclose(column[:-1], truth.points[seen, axis], rtol=1e-6)
    assert_array_equal(raw[:-1, fields["red"][0]], seen % 256)
    assert_array_equal(raw[:-1, fields["green"][0]], seen // 256)
    keyframes, _ = foxglove_messages(path, "/keyframes")[1]
    assert_allclose([keyframes.poses[1].position.z], truth.keyframes[4][2, 3])
    image, time_ns = foxglove_messages(path, "/camera/keyframe")[2]
    assert (image.format, time_ns) == ("jpeg", START_NS + 8 * INTERVAL_NS)
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(image.data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert np.abs(pixels.astype(int) - truth.images[8]).mean() < 3


def test_foxglove_gets_the_tracks_of_every_image_in_its_pixels(tmp_path):
    """It counts from the corner of the first pixel: one pixel of the small image is two of the camera's."""
    truth = record_run(tmp_path / "run.mcap", 8, reduction=2)
    annotations = foxglove_messages(tmp_path / "run.mcap", "/camera/tracks")
    assert [time_ns for _, time_ns in annotations] == [START_NS, START_NS + 5 * INTERVAL_NS]
    with_landmark, without = annotations[1][0].points
    assert len(without.points) == 0 and with_landmark.type == 1  # POINTS
    drawn = [[point.x, point.y] for point in with_landmark.points]
    assert_allclose(drawn, (truth.tracks[5].keypoints.astype(float) + 0.5) / 2)


@pytest.mark.parametrize(
    ("camera", "model", "num_coefficients"),
    [
        (PINHOLE, "plumb_bob", 5),
        (BROWN, "plumb_bob", 5),
        (RATIONAL, "rational_polynomial", 8),
        (FISHEYE, "kannala_brandt", 4),
    ],
)
def test_foxglove_gets_the_calibration_in_its_own_terms(tmp_path, camera: Camera, model, num_coefficients):
    record_run(tmp_path / "run.mcap", 3, camera)
    calibration, _ = foxglove_messages(tmp_path / "run.mcap", "/camera/calibration")[0]
    assert (calibration.width, calibration.height) == (camera.width, camera.height)
    assert calibration.distortion_model == model
    assert_allclose(np.reshape(calibration.K, (3, 3)), camera.K)
    assert_allclose(np.reshape(calibration.P, (3, 4))[:, :3], camera.K)
    assert len(calibration.D) == num_coefficients
    assert_allclose(calibration.D[: len(camera.distortion)], camera.distortion)


def test_the_calibration_is_that_of_the_images_where_they_are_smaller(tmp_path):
    path = tmp_path / "run.mcap"
    with McapRecorder(path) as recorder:
        stream = MessageStream(CAMERA)
        stream.add_consumer(recorder.add)
        say_run(stream, 2)
        frame = true_frame(3)
        small = cv2.imencode(".jpg", frame.image[::2, ::2])[1].reshape(-1)
        stream.publish_image(CompressedImage(3, frame.timestamp_ns, 320, 240, small))
    calibration, _ = foxglove_messages(path, "/camera/calibration")[-1]
    assert (calibration.width, calibration.height) == (320, 240)
    # The corner of the image is the same corner: 0.5 px before the centre of the first pixel.
    assert calibration.K[0] == CAMERA.K[0, 0] / 2
    assert calibration.K[2] + 0.5 == pytest.approx((CAMERA.K[0, 2] + 0.5) / 2)
    assert_allclose(scaled_camera(scaled_camera(CAMERA, 320, 240), 640, 480).K, CAMERA.K)


def test_a_clock_that_is_not_unix_time_is_shifted_to_it(tmp_path):
    path = tmp_path / "run.mcap"
    before_ns = time.time_ns()
    truth = record_run(path, 5, start_ns=-INTERVAL_NS)
    recording = Recording(path)
    shift_ns = int(recording.metadata["clock_shift_ns"])
    assert before_ns <= recording.start_ns <= time.time_ns()
    for message, original in zip(recording.messages(["lightvo/pose"]), poses_of(truth.messages), strict=True):
        assert message.time_ns == original.capture_ns + shift_ns
        assert message.publish_ns == original.publish_ns


def poses_of(messages: list[EncodedMessage]) -> list[EncodedMessage]:
    return [message for message in messages if message.topic is Topic.POSE]


def test_unix_time_is_kept_and_early_messages_get_the_time_of_the_first_frame(recorded):
    path, _ = recorded
    messages = list(Recording(path).messages())
    assert Recording(path).metadata["clock_shift_ns"] == "0"
    assert messages[0].topic == "lightvo/camera"  # published before the first frame
    assert messages[0].time_ns == START_NS
    assert all(messages[i].time_ns <= messages[i + 1].time_ns for i in range(len(messages) - 1))


def test_an_interval_reads_only_what_lies_in_it(recorded):
    path, _ = recorded
    recording = Recording(path)
    start_ns, end_ns = START_NS + 3 * INTERVAL_NS, START_NS + 5 * INTERVAL_NS
    messages = list(recording.messages(["lightvo/pose"], start_ns, end_ns))
    assert [decode(message.data).header.frame_index for message in messages] == [3, 4, 5]
    assert not list(recording.messages(start_ns=recording.end_ns + 1))


# --- runs ---


def test_a_run_records_as_many_poses_as_it_writes(tmp_path, capfd):
    drive = write_drive(tmp_path, 12)
    path, output = tmp_path / "run.mcap", tmp_path / "out"
    arguments = [
        "run",
        str(drive),
        "--config",
        "orb",
        "--publish",
        "off",
        "--record",
        str(path),
        "--output",
        str(output),
    ]
    assert cli.main(arguments) == 0
    assert f"recording   {path}: " in capfd.readouterr().out
    lines = [line for line in (output / "trajectory_tum.txt").read_text().splitlines() if line]
    with path.open("rb") as file:
        poses = [decode(message.data).body for _, _, message in make_reader(file).iter_messages("lightvo/pose")]
    posed = [pose for pose in poses if pose.T_world_camera is not None]
    assert len(posed) == len(lines) > 0
    assert len(foxglove_messages(path, "/camera/pose")) == len(lines)
    positions = [[float(value) for value in line.split()[1:4]] for line in lines]
    assert_allclose([pose.T_world_camera[:3, 3] for pose in posed], positions)
    status = [decode(message.data).body for message in Recording(path).messages(["lightvo/status"])][-1]
    assert status.state is RunState.FINISHED
    assert len(foxglove_messages(path, "/camera/keyframe")) == sum(pose.is_keyframe for pose in poses)


def test_a_recording_is_never_written_over(tmp_path, capfd):
    path = tmp_path / "run.mcap"
    record_run(path, 2)
    before = path.read_bytes()
    assert cli.main(["run", str(write_drive(tmp_path, 3)), "--config", "orb", "--record", str(path)]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and "exists already" in error
    assert path.read_bytes() == before


def test_a_run_without_a_frame_leaves_no_file(tmp_path):
    with McapRecorder(tmp_path / "run.mcap") as recorder:
        stream = MessageStream(CAMERA)
        stream.add_consumer(recorder.add)
        stream.beat_if_due()
        stream.finish()
    assert not (tmp_path / "run.mcap").exists()


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
