"""Recordings: what is in them, read by the library that defines the format."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from mcap.reader import make_reader
from numpy.testing import assert_allclose, assert_array_equal
from recorded_run import (
    BROWN,
    FISHEYE,
    INTERVAL_NS,
    LOST,
    PINHOLE,
    RATIONAL,
    START_NS,
    foxglove_messages,
    own_bytes,
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
from vo.recording import Recording
from vo.types import Camera

NUM_FRAMES = 24


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("recording") / "run.mcap"
    return path, record_run(path, NUM_FRAMES)


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
