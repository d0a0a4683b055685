"""What `vo listen` prints, and how it ends."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from wire_samples import golden_messages, some_keyframes

from vo.config import PublisherConfig
from vo.keys import load_client_keys
from vo.keys_command import keys_command
from vo.listen import ListenCounts, as_json_line, as_text_line, listen
from vo.message_stream import MessageStream
from vo.messages import Body, Header, Message, RunState, Snapshot, StatusReport, Topic
from vo.publisher import Publisher
from vo.types import Camera, ConfigError, FrameTracks, PoseEstimate, Rejection, TrackingStatus

ANY_PORT = PublisherConfig(endpoint="tcp://127.0.0.1:*", heartbeat_hz=50.0, linger_ms=10_000)
CAMERA = Camera(640, 480, np.array([[500.25, 0, 320], [0, 500.5, 240], [0, 0, 1]]))
PATIENCE_S = 20


def a_pose(index: int) -> PoseEstimate:
    T = np.array([[0.0, -1, 0, 0.1 * index], [1, 0, 0, -2.5], [0, 0, 1, 4], [0, 0, 0, 1]])
    covariance = np.diag([1.0, 1, 1, 1, 1, math.inf])
    return PoseEstimate(
        index, 33_333_333 * index, T, TrackingStatus.TRACKING, covariance, None, 400, 321, is_keyframe=index == 1
    )


def a_message(topic: Topic, body: Body, index: int = 1) -> Message:
    status = body.status if isinstance(body, PoseEstimate) else TrackingStatus.TRACKING
    return Message(Header(topic, "session", 9, 10**18, status, index, 33_333_333 * index), body)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher(ANY_PORT, MessageStream(CAMERA, heartbeat_hz=50.0)) as publisher:
        yield publisher


def in_thread(publisher: Publisher, num_poses: int) -> threading.Thread:
    """The rest of a run: some more poses, then the end."""

    def run() -> None:
        for index in range(num_poses, 2 * num_poses):
            publisher.stream.publish_pose(a_pose(index))
            publisher.stream.publish_tracks(some_tracks(index))
        publisher.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def some_tracks(index: int) -> FrameTracks:
    return FrameTracks(
        frame_index=index,
        timestamp_ns=33_333_333 * index,
        track_ids=np.array([4, 5, 6, 7]),
        keypoints=np.array([[0.5, 1.5], [2, 3], [4, 5], [6, 7]], np.float32),
        lengths=np.ones(4, np.int32),
        has_landmark=np.array([True, True, False, True]),
    )


def test_every_pose_of_the_run_as_json(publisher: Publisher, capsys: pytest.CaptureFixture[str]) -> None:
    """It starts in the middle of the run, and ends by itself with the run."""
    for index in range(300):
        publisher.stream.publish_pose(a_pose(index))
    thread = in_thread(publisher, 300)
    stream = io.StringIO()
    counts = listen(publisher.endpoint, as_json=True, until_finished=True, timeout_s=PATIENCE_S, stream=stream)
    thread.join(PATIENCE_S)
    assert counts == ListenCounts(600, 0, 0, 1, RunState.FINISHED, is_interrupted=False)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["sequence"] for line in lines] == list(range(600))
    assert lines[1] | {"publish_time_ns": 0} == {
        "topic": "pose",
        "session": publisher.session_id,
        "sequence": 1,
        "frame_index": 1,
        "timestamp_ns": 33_333_333,
        "publish_time_ns": 0,
        "status": "tracking",
        "position_xyz": [0.1, -2.5, 4.0],
        "quat_xyzw": pytest.approx([0, 0, math.sqrt(0.5), math.sqrt(0.5)]),
        "T_world_camera": [[0, -1, 0, 0.1], [1, 0, 0, -2.5], [0, 0, 1, 4], [0, 0, 0, 1]],
        "covariance": [[None if i == j == 5 else float(i == j) for j in range(6)] for i in range(6)],
        "segment_id": 0,
        "scale_source": "relative",
        "rejection": None,
        "num_matches": 400,
        "num_inliers": 321,
        "is_keyframe": True,
        "is_stationary": False,
        "stop_layer": 0,
    }
    assert capsys.readouterr().err == "vo listen: the run is over: finished\n"


def test_lines_for_people() -> None:
    pose = as_text_line(a_message(Topic.POSE, a_pose(1)))
    assert " ".join(pose.split()) == (
        "pose 9 frame 1 t 0.033 s tracking xyz 0.100 -2.500 4.000 q 0.0000 0.0000 0.7071 0.7071 "
        "inliers 321/400 keyframe"
    )
    layered = as_text_line(a_message(Topic.POSE, dataclasses.replace(a_pose(1), stop_layer=3)))
    assert " ".join(layered.split()).endswith("inliers 321/400 layers 3 keyframe")
    lost = PoseEstimate(1, 33_333_333, None, TrackingStatus.LOST, rejection=Rejection.TOO_FEW_MATCHES)
    assert as_text_line(a_message(Topic.POSE, lost)).endswith("lost          inliers 0/0  too_few_matches")
    tracks = as_text_line(a_message(Topic.TRACKS, some_tracks(1)))
    assert tracks.endswith("4 tracks, 3 with a landmark  px 4: (0.5, 1.5), 5: (2.0, 3.0), 6: (4.0, 5.0), ...")
    report = StatusReport(RunState.RUNNING, 29.96, 200, 3, {Topic.POSE: 200})
    assert as_text_line(a_message(Topic.STATUS, report)).endswith(
        "running  30.0 frames/s  200 frames, 3 dropped, 200 poses"
    )
    assert "640 x 480 px  pinhole  f 500.25 500.50 px" in as_text_line(a_message(Topic.CAMERA, CAMERA))
    for name, end in (
        ("keyframe", "frame      7  t 1.233 s  2 keyframes placed"),
        ("points", "frame      7  t 1.233 s  3 landmarks placed, 1 removed"),
        ("image", "frame      7  t 1.233 s  320 x 240 px  jpeg  16 bytes"),
    ):
        assert as_text_line(golden_messages()[name]).endswith(end)
    whole = golden_messages()["keyframe"].header, some_keyframes(is_reset=True)
    assert as_text_line(Message(*whole)).endswith("2 keyframes placed  whole map begins")


def test_the_map_and_images_as_json() -> None:
    keyframes, points, image = (
        json.loads(as_json_line(golden_messages()[name])) for name in ("keyframe", "points", "image")
    )
    assert (keyframes["keyframe_indices"], keyframes["is_reset"], keyframes["segment_id"]) == ([1, 5], False, 2)
    assert np.array_equal(keyframes["T_world_keyframes"], some_keyframes().T_world_keyframes)
    assert (points["landmark_ids"], points["removed_landmark_ids"]) == ([3, 5, 2**40], [4])
    assert points["landmarks"][0] == [0.5, 1.25, 4] and points["landmark_colors"][2] == [1, 2, 3]
    assert base64.b64decode(image["data_base64"])[:2] == b"\xff\xd8" and (image["width"], image["height"]) == (320, 240)


def test_a_key_that_is_not_let_in_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("ours", "theirs"):
        keys_command(tmp_path / folder)
    capsys.readouterr()
    config = dataclasses.replace(ANY_PORT, keys=str(tmp_path / "theirs"))
    stranger = load_client_keys(tmp_path / "ours" / "client.key_secret", tmp_path / "theirs" / "server.key")
    with Publisher(config, MessageStream(CAMERA, heartbeat_hz=50.0)) as publisher:
        counts = listen(publisher.endpoint, timeout_s=3.7, stream=io.StringIO(), keys=stranger)
    assert counts.num_messages == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "no publisher yet" in line and "does not let this key in" in line


def test_every_topic_as_json() -> None:
    tracks = json.loads(as_json_line(a_message(Topic.TRACKS, some_tracks(1))))
    assert tracks["keypoints"] == [[0.5, 1.5], [2, 3], [4, 5], [6, 7]] and tracks["has_landmark"][2] is False
    report = StatusReport(RunState.FAILED, 29.5, 200, 3, {Topic.POSE: 200})
    status = json.loads(as_json_line(a_message(Topic.STATUS, report)))
    assert (status["state"], status["fps"], status["num_sent"]) == ("failed", 29.5, {"pose": 200})
    camera = json.loads(as_json_line(a_message(Topic.CAMERA, CAMERA)))
    assert camera["K"] == CAMERA.K.tolist() and camera["model"] == "pinhole"
    lost = json.loads(as_json_line(a_message(Topic.POSE, PoseEstimate(1, 33_333_333, None, TrackingStatus.LOST))))
    assert lost["position_xyz"] is lost["T_world_camera"] is lost["covariance"] is None
    snapshot = a_message(Topic.SNAPSHOT, Snapshot(Topic.POSE, 0, 0, RunState.RUNNING, ()))
    for as_line in (as_json_line, as_text_line):
        with pytest.raises(ValueError, match="snapshot is not published"):
            as_line(snapshot)


def test_stops_after_so_many_messages_or_so_much_silence(publisher: Publisher) -> None:
    for index in range(10):
        publisher.stream.publish_pose(a_pose(index))
    stream = io.StringIO()
    assert listen(publisher.endpoint, max_messages=4, stream=stream).num_messages == 4
    assert len(stream.getvalue().splitlines()) == 4
    start_s = time.monotonic()
    counts = listen(publisher.endpoint, timeout_s=0.5, stream=stream)
    assert counts.num_messages == 10 and counts.final_state is None
    assert 0.5 <= time.monotonic() - start_s < PATIENCE_S


def test_losses_and_restarts_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    first = Publisher(dataclasses.replace(ANY_PORT, max_snapshot_poses=5), MessageStream(CAMERA, heartbeat_hz=50.0))
    for index in range(8):
        first.stream.publish_pose(a_pose(index))

    stream, is_done = io.StringIO(), threading.Event()

    def run() -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while stream.getvalue().count("\n") < 5 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        first.close()
        with Publisher(
            dataclasses.replace(ANY_PORT, endpoint=first.endpoint),
            MessageStream(CAMERA, session_id="second", heartbeat_hz=50.0),
        ) as second:
            second.stream.publish_pose(a_pose(0))
            is_done.wait(PATIENCE_S)

    thread = threading.Thread(target=run)
    thread.start()
    counts = listen(first.endpoint, max_messages=6, timeout_s=PATIENCE_S, stream=stream)
    is_done.set()
    thread.join(PATIENCE_S)
    assert (counts.num_messages, counts.num_lost, counts.num_sessions) == (6, 3, 2)
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "vo listen: lost pose 0..2, 3 messages",
        "vo listen: the run is over: finished",
        "vo listen: the publisher was started anew: session second",
    ]


def test_wrong_topics_and_addresses_are_one_line() -> None:
    with pytest.raises(
        ConfigError, match="--topic poses: unknown topic; valid: pose, tracks, keyframe, points, image, status, camera"
    ):
        listen("tcp://127.0.0.1:5570", ["poses"])
    with pytest.raises(ConfigError, match=r"give tcp://127\.0\.0\.1:PORT"):
        listen("5570")


def start(publisher: Publisher) -> subprocess.Popen[str]:
    # A shell starts background jobs with SIGINT ignored, and children inherit that: a terminal would not.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from vo.listen import listen; "
    code += f"print(listen({publisher.endpoint!r}).is_interrupted, flush=True)"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ends_cleanly_on_interrupt(publisher: Publisher) -> None:
    publisher.stream.publish_pose(a_pose(0))
    process = start(publisher)
    assert process.stdout is not None and "frame" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, errors) == (0, "True\n", "")


def test_ends_cleanly_when_nobody_reads(publisher: Publisher) -> None:
    """As in `vo listen | head -1`."""
    publisher.stream.publish_pose(a_pose(0))
    process = start(publisher)
    assert process.stdout is not None and process.stderr is not None
    assert "frame" in process.stdout.readline()
    process.stdout.close()
    deadline_s = time.monotonic() + PATIENCE_S
    index = 1
    while process.poll() is None:
        assert time.monotonic() < deadline_s
        publisher.stream.publish_pose(a_pose(index))
        index += 1
        time.sleep(0.01)
    assert (process.returncode, process.stderr.read()) == (0, "")
    process.stderr.close()


def test_listening_needs_no_torch() -> None:
    code = "import sys, vo.listen; print([m for m in ('torch', 'cv2', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
