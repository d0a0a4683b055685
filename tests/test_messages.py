"""The wire format: golden bytes, an independent reader, and what nobody may send."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from wire_samples import (
    ADDED_KEYS,
    PUBLISH_TIME_NS,
    a_message,
    a_pose,
    golden_messages,
    golden_requests,
    read_by_the_book,
    same,
    some_keyframes,
    some_points,
    some_tracks,
)

from vo import wire
from vo.map_messages import check_pose, check_poses
from vo.message_types import MAX_IMAGE_BYTES, MAX_KEYFRAMES, MAX_POINTS
from vo.messages import (
    MAX_REQUEST_BYTES,
    MAX_SNAPSHOT_MESSAGES,
    CompressedImage,
    Header,
    Message,
    Request,
    RequestKind,
    RunState,
    ScaleQuantity,
    ScaleReading,
    Snapshot,
    StatusReport,
    Topic,
    decode,
    decode_request,
    encode,
    encode_request,
    quat_xyzw_from_rotation,
)
from vo.types import CameraModel, ImageCondition, PoseEstimate, Rejection, TrackingStatus

PROTOCOL_FILE = Path(__file__).parents[1] / "docs" / "PROTOCOL.md"
GOLDEN_FILE = Path(__file__).parent / "golden_messages.json"


# --- what is right ---


@pytest.mark.parametrize("name", golden_messages())
def test_golden_bytes(name: str) -> None:
    golden = bytes.fromhex("".join(json.loads(GOLDEN_FILE.read_text())[name]))
    message = golden_messages()[name]
    assert encode(message) == golden
    decoded = decode(golden)
    assert decoded.header == message.header
    if name != "status":  # the topics it left out come back as zero
        assert same(decoded.body, message.body)


@pytest.mark.parametrize("name", golden_requests())
def test_golden_requests(name: str) -> None:
    golden = bytes.fromhex("".join(json.loads(GOLDEN_FILE.read_text())[name]))
    request = golden_requests()[name]
    assert encode_request(request) == golden and len(golden) < MAX_REQUEST_BYTES
    assert decode_request(golden) == request


def test_golden_map_is_what_the_specification_says() -> None:
    golden = {name: bytes.fromhex("".join(lines)) for name, lines in json.loads(GOLDEN_FILE.read_text()).items()}
    topic, header, arrays = read_by_the_book(golden["keyframe"])
    assert (topic, header["segment_id"], header["scale_source"], header["is_reset"]) == (
        "keyframe",
        2,
        "relative",
        False,
    )
    assert (header["frame_index"], header["capture_time_ns"]) == (7, 1_233_333_331)
    assert arrays["keyframe_indices"] == ([2], [1, 5])
    assert arrays["keyframe_timestamps_ns"] == ([2], [1_033_333_333, 1_166_666_665])
    assert arrays["T_world_keyframes"][0] == [2, 4, 4]
    assert arrays["T_world_keyframes"][1][16:] == [0, -1, 0, 1.5, 1, 0, 0, -2.25, 0, 0, 1, 4, 0, 0, 0, 1]
    topic, header, arrays = read_by_the_book(golden["points"])
    assert (topic, header["scale_source"]) == ("points", "depth")
    assert arrays["landmark_ids"] == ([3], [3, 5, 2**40])
    assert arrays["landmarks"] == ([3, 3], [0.5, 1.25, 4, -1, 0, 2, 8, -0.5, 16])
    assert arrays["landmark_colors"] == ([3, 3], [255, 0, 0, 0, 128, 0, 1, 2, 3])
    assert arrays["removed_landmark_ids"] == ([1], [4])
    topic, header, arrays = read_by_the_book(golden["image"])
    assert (topic, header["format"], header["width"], header["height"]) == ("image", "jpeg", 320, 240)
    assert bytes(arrays["data"][1]) == bytes.fromhex("ffd8ffe000104a46494600010100ffd9")
    _, header, arrays = read_by_the_book(golden["snapshot_map"])
    assert (header["of_topic"], header["num_sent"]) == ("keyframe", 9)
    assert [header[key] for key in ("first_segment", "first_id", "next_segment", "next_id")] == [2, 3, 2, 6]
    inner = bytes(arrays["messages"][1])
    assert arrays["message_lengths"] == ([1], [len(inner)])
    _, header, _ = read_by_the_book(inner)
    assert (header["sequence"], header["is_reset"]) == (8, True)
    assert [read_by_the_book(golden[name])[1]["tag"] for name in ("reply", "refusal")] == [42, 43]


def test_golden_pose_is_what_the_specification_says() -> None:
    golden = bytes.fromhex("".join(json.loads(GOLDEN_FILE.read_text())["pose"]))
    topic, header, arrays = read_by_the_book(golden)
    assert topic == "pose"
    assert header.pop("arrays").keys() == arrays.keys()
    assert header == {
        "schema": "lightvo/1",
        "session": "00c0ffee00c0ffee",
        "sequence": 5,
        "frame_index": 7,
        "capture_time_ns": 1_233_333_331,
        "publish_time_ns": PUBLISH_TIME_NS,
        "status": "tracking",
        "parent_frame": "world",
        "child_frame": "camera",
        "segment_id": 2,
        "scale_source": "relative",
        "rejection": None,
        "num_matches": 400,
        "num_inliers": 321,
        "is_keyframe": True,
        "is_stationary": False,
        "stop_layer": 3,
    }
    assert arrays["position_xyz"] == ([3], [1.5, -2.25, 4.0])
    assert arrays["quat_xyzw"] == ([4], pytest.approx([0, 0, math.sqrt(0.5), math.sqrt(0.5)]))
    assert arrays["T_world_camera"] == ([4, 4], [0, -1, 0, 1.5, 1, 0, 0, -2.25, 0, 0, 1, 4, 0, 0, 0, 1])
    assert arrays["covariance"][1][::7] == [value / 1024 for value in (1, 2, 3, 4, 5, 6)]


def test_a_pose_of_an_older_publisher_is_read() -> None:
    """These are the golden bytes of `pose` from before keys were added to it."""
    older = bytes.fromhex("".join(json.loads(GOLDEN_FILE.read_text())["pose_before_added_keys"]))
    _, header, _ = read_by_the_book(older)
    assert header.keys() == read_by_the_book(encode(golden_messages()["pose"]))[1].keys() - ADDED_KEYS["pose"]
    assert same(decode(older).body, dataclasses.replace(a_pose(), stop_layer=0))


def test_a_status_of_an_older_publisher_is_read() -> None:
    older = bytes.fromhex("".join(json.loads(GOLDEN_FILE.read_text())["status_before_added_keys"]))
    _, header, _ = read_by_the_book(older)
    status = golden_messages()["status"]
    assert header.keys() == read_by_the_book(encode(status))[1].keys() - ADDED_KEYS["status"]
    body = decode(older).body
    assert isinstance(body, StatusReport) and isinstance(status.body, StatusReport)
    assert (body.image_health, body.is_camera_away) == (None, False)
    assert (body.state, body.fps, body.num_dropped) == (status.body.state, status.body.fps, status.body.num_dropped)


def test_a_condition_of_a_newer_publisher_is_left_out() -> None:
    """The words of `conditions` may grow within the version; a reader keeps those that it knows."""
    name, header, _ = read_by_the_book(encode(golden_messages()["status"]))
    header["image_health"]["conditions"] = "on_fire blurred"
    body = decode(wire.pack(name, {**header, "arrays": None}, {})).body
    assert isinstance(body, StatusReport) and body.image_health is not None
    assert body.image_health.conditions == (ImageCondition.BLURRED,)


def test_lost_pose_carries_no_pose() -> None:
    golden = bytes.fromhex("".join(json.loads(GOLDEN_FILE.read_text())["pose_lost"]))
    _, header, arrays = read_by_the_book(golden)
    assert (header["status"], header["rejection"], arrays) == ("lost", "too_few_inliers", {})
    body = decode(golden).body
    assert isinstance(body, PoseEstimate) and body.T_world_camera is None and body.covariance is None


def test_the_specification_is_complete_and_its_examples_are_true() -> None:
    text = PROTOCOL_FILE.read_text()
    for message in golden_messages().values():
        topic, header, arrays = read_by_the_book(encode(message))
        assert f"`{topic}`" in text
        for name in (*header, *arrays, *(entry[0].replace("|", "&#124;") for entry in header["arrays"].values())):
            assert f"`{name}`" in text or f"<code>{name}</code>" in text, f"{topic}: {name} is not documented"
    for enum in (TrackingStatus, Rejection, RunState, RequestKind, ScaleQuantity, CameraModel, ImageCondition):
        assert all(f"`{option.value}`" in text for option in enum)
    dump, requests = (block.split("\n```")[0] for block in text.split("```text\n")[1:])
    example = b"".join(bytes.fromhex(line[6:54]) for line in dump.splitlines())
    assert example == encode(golden_messages()["tracks"])
    named = dict(line.split(": ") for line in requests.splitlines())
    assert named == {
        name.removeprefix("request_"): encode_request(request).hex(" ") for name, request in golden_requests().items()
    }
    for request in golden_requests().values():
        assert all(f"`{key}`" in text for key in msgpack.unpackb(encode_request(request)))
    for limit in (MAX_KEYFRAMES, MAX_POINTS, MAX_IMAGE_BYTES, wire.MAX_HEADER_BYTES, wire.MAX_MESSAGE_BYTES):
        assert str(limit) in text.replace(",", ""), f"the limit {limit} is not documented"


def test_quaternion_agrees_with_scipy() -> None:
    rotations = Rotation.random(500, rng=np.random.default_rng(1)).as_matrix()
    half_turns = [np.diag(signs) for signs in ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1], [1.0, 1, 1])]
    for R in [*rotations, *half_turns]:
        expected = Rotation.from_matrix(R).as_quat(canonical=True)
        got = quat_xyzw_from_rotation(R)
        assert np.abs(got - expected).max() < 1e-14 or np.abs(got + expected).max() < 1e-14
        assert got[3] >= 0 and abs(np.linalg.norm(got) - 1) < 1e-15


def _verdict(check: Any, T: Any) -> str:
    try:
        check("T", T)
    except wire.ProtocolError as error:
        return str(error)
    return ""


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1e-9, 1e-5, 1.0, math.nan, math.inf, -1e39, 1e300]),
    st.integers(0, 15),
    st.booleans(),
)
def test_one_pose_is_judged_as_many_are(seed: int, change: float, place: int, is_mirrored: bool) -> None:
    rng = np.random.default_rng(seed)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = Rotation.random(random_state=rng).as_matrix(), rng.normal(size=3)
    if is_mirrored:
        T[:3, 0] *= -1
    T.flat[place] += change
    verdict = _verdict(check_pose, T)
    assert verdict == _verdict(check_poses, T[None])
    is_translation = place in (3, 7, 11)
    is_small = change == 0.0 or (change == 1e-9 and place < 12) or (change in (1e-5, 1.0) and is_translation)
    assert (verdict == "") is (is_small and not is_mirrored)


def test_sequences_and_topics_of_a_prefix() -> None:
    assert Topic.POSE.prefix == b"pose\0"
    assert encode(a_message(a_pose())).startswith(Topic.POSE.prefix)
    assert all(len(topic.value) <= wire.MAX_TOPIC_BYTES for topic in Topic)


@pytest.mark.parametrize("module", ["vo.messages", "vo.inbox", "vo.message_stream", "vo.client"])
def test_a_program_that_listens_needs_little(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "cv2", "scipy", "yaml", "open3d", "mcap", "matplotlib", "kornia"}
    assert ("zmq" in loaded) == (module == "vo.client")
    assert {"numpy", "msgpack", "vo"} <= loaded


# --- what the caller must not do ---


def test_encoding_refuses_what_nobody_could_read() -> None:
    header = a_message(a_pose()).header
    with pytest.raises(ValueError, match="does not carry"):
        Message(header, some_tracks())
    with pytest.raises(ValueError, match="frame 7"):
        Message(header, a_pose(8))
    with pytest.raises(ValueError, match="tracking"):
        Message(header, a_pose(7, TrackingStatus.LOST))
    with pytest.raises(ValueError, match="session_id"):
        Header(Topic.STATUS, "x" * 257, 0, 0, TrackingStatus.TRACKING)
    with pytest.raises(ValueError, match="sequence"):
        Header(Topic.STATUS, "x", -1, 0, TrackingStatus.TRACKING)
    with pytest.raises(ValueError, match="fps"):
        StatusReport(RunState.RUNNING, fps=math.nan)
    with pytest.raises(ValueError, match="num_sent of pose"):
        StatusReport(RunState.RUNNING, num_sent={Topic.POSE: -1})
    for changes, complaint in (
        ({"keyframe_indices": np.array([5, 1])}, "keyframe_indices: expected rising"),
        ({"keyframe_indices": np.array([-1, 1])}, "keyframe_indices: expected rising"),
        ({"keyframe_timestamps_ns": np.zeros(3, np.int64)}, "keyframe_timestamps_ns"),
        ({"T_world_keyframes": np.zeros((2, 3, 4))}, "T_world_keyframes"),
        ({"segment_id": -1}, "segment_id"),
        ({"scale_source": "x" * 257}, "scale_source"),
    ):
        with pytest.raises(ValueError, match=complaint):
            dataclasses.replace(some_keyframes(), **changes)
    for changes, complaint in (
        ({"landmark_ids": np.arange(MAX_POINTS + 1)}, "landmark_ids: 100001 is above"),
        ({"landmarks": np.zeros((3, 3), np.float32)}, "landmarks"),
        ({"landmark_colors": np.zeros((3, 4), np.uint8)}, "landmark_colors"),
        ({"removed_landmark_ids": np.array([2, 2])}, "removed_landmark_ids: expected rising"),
    ):
        with pytest.raises(ValueError, match=complaint):
            dataclasses.replace(some_points(), **changes)
    for data in (b"\x89PNG", b"\xff\xd8", b"\xff\xd8" + bytes(MAX_IMAGE_BYTES)):
        with pytest.raises(ValueError, match="a JPEG file"):
            CompressedImage(0, 0, 1, 1, np.frombuffer(data, np.uint8))
    for reading, complaint in (
        ((ScaleQuantity.SPEED, -1.0), "value"),
        ((ScaleQuantity.SPEED, math.nan), "value"),
        ((ScaleQuantity.SPEED, 1e7), "value"),
        ((ScaleQuantity.SPEED, 1.0, 5, 4), "a speed has none"),
        ((ScaleQuantity.DISTANCE, 1.0, 5), "a distance needs it"),
        ((ScaleQuantity.DISTANCE, 1.0, 5, 5), "a time before 5"),
        ((ScaleQuantity.DISTANCE, 1.0, -5, 0), "a time before -5"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ScaleReading(*reading)
    for bad in ({"kind": RequestKind.SCALE}, {"kind": RequestKind.PING, "tag": -1}):
        with pytest.raises(ValueError, match=r"scale|tag"):
            Request(**bad)
    with pytest.raises(ValueError, match="both or none"):
        Snapshot(Topic.POINTS, 0, 0, RunState.RUNNING, (), 0, 0, next_segment=1)
    with pytest.raises(ValueError, match="a pose has not"):
        Snapshot(Topic.POSE, 0, 0, RunState.RUNNING, (), 0, 0)
    with pytest.raises(ValueError, match="messages"):
        Snapshot(Topic.POSE, 0, 0, RunState.RUNNING, (b"x",) * (MAX_SNAPSHOT_MESSAGES + 1))
    with pytest.raises(ValueError, match="above 16777216"):
        encode(a_message(Snapshot(Topic.POSE, 0, 1, RunState.RUNNING, (bytes(wire.MAX_MESSAGE_BYTES),))))
