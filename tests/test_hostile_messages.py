"""Bytes that are wrong in every way are refused with one error, in little memory and time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import (
    ADDED_KEYS,
    a_message,
    a_pose,
    an_image,
    edited,
    framed,
    golden_messages,
    golden_requests,
    read_by_the_book,
    some_points,
)

from vo import wire
from vo.message_types import MAX_POINTS
from vo.messages import (
    MAX_REQUEST_BYTES,
    MAX_SNAPSHOT_MESSAGES,
    ProtocolError,
    Request,
    RequestKind,
    Topic,
    VersionError,
    decode,
    decode_request,
    encode,
    encode_request,
)
from vo.types import TrackingStatus

NUM_MUTATIONS = 100_000


def test_editing_nothing_changes_nothing() -> None:
    message = a_message(a_pose())
    assert edited(message) == encode(message)
    assert decode(edited(message, something_new=[1, {"a": None}])).header == message.header


@pytest.mark.parametrize("name", golden_messages())
def test_every_key_is_needed_and_checked(name: str) -> None:
    message = golden_messages()[name]
    topic, header, _ = read_by_the_book(encode(message))
    for key in header:
        if key in ADDED_KEYS.get(topic, ()):
            decode(edited(message, **{key: ...}))
        else:
            with pytest.raises(ProtocolError, match="arrays" if key == "arrays" else key):
                decode(edited(message, **{key: ...}))
        wrong_values: list[Any] = [[], {}, b"bytes", "x" * 300, -(2**63), 2**64 - 1, math.inf]
        for wrong in wrong_values:
            if (key in ("fps", "heartbeat_hz") and wrong == 2**64 - 1) or (key == "arrays" and wrong == {}):
                continue  # a whole number is a number, and some messages have no arrays
            with pytest.raises(ProtocolError):
                decode(edited(message, **{key: wrong}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"arrays": {}}, "behind the last array"),
        ({"status": "asleep"}, "status: expected initializing, tracking, lost, relocalized"),
        ({"sequence": -1}, "sequence"),
        ({"sequence": True}, "sequence"),
        ({"sequence": 1.0}, "sequence"),
        ({"is_keyframe": 1}, "is_keyframe"),
        ({"rejection": "bored"}, "rejection"),
        ({"frame_index": None}, "frame_index"),
        ({"capture_time_ns": None}, "capture_time_ns"),
        ({"parent_frame": "map"}, "parent_frame: expected world"),
        ({"child_frame": "base"}, "child_frame: expected camera"),
        ({"schema": "other/1"}, "schema"),
        ({"schema": 1}, "schema"),
    ],
)
def test_wrong_header_of_a_pose(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        decode(edited(a_message(a_pose()), **changes))


def test_a_lost_status_is_the_only_one_without_a_pose() -> None:
    with pytest.raises(ProtocolError, match="must have a pose"):
        decode(edited(a_message(a_pose(8, TrackingStatus.LOST)), status="tracking"))


@pytest.mark.parametrize("schema", ["lightvo/2", "lightvo/0", "lightvo/10", "lightvo/1.1"])
def test_other_versions_are_named(schema: str) -> None:
    for decoder, data in (
        (decode, edited(a_message(a_pose()), schema=schema)),
        (decode_request, msgpack.packb({"schema": schema, "request": "snapshot"})),
    ):
        with pytest.raises(VersionError, match=f"{schema}.*lightvo/1"):
            decoder(data)


def with_arrays(topic: str, arrays: dict[str, Any]) -> bytes:
    return wire.pack(topic, {**read_by_the_book(encode(golden_messages()[topic]))[1], "arrays": None}, arrays)


@pytest.mark.parametrize(
    "T",
    [
        np.full((4, 4), np.nan),
        np.full((4, 4), np.inf),
        np.diag([1e308, 1e308, 1e308, 1]),
        np.diag([-1.0, 1, 1, 1]),
        np.diag([1.0, 1, 1.001, 1]),
        np.diag([1.0, 1, 1, 2]),
        np.zeros((4, 4)),
        np.eye(3),
        np.eye(4, dtype=np.float32),
    ],
)
def test_what_is_no_pose(T: np.ndarray) -> None:
    arrays = {"position_xyz": np.zeros(3), "quat_xyzw": np.array([0.0, 0, 0, 1]), "T_world_camera": T}
    with pytest.raises(ProtocolError, match="T_world_camera"):
        decode(with_arrays("pose", arrays))


def test_what_are_no_tracks_and_no_camera() -> None:
    good = {
        "track_ids": np.zeros(2, "<i8"),
        "keypoints": np.zeros((2, 2), "<f4"),
        "lengths": np.ones(2, "<i4"),
        "has_landmark": np.zeros(2, "|u1"),
    }
    decode(with_arrays("tracks", good))
    for name, array in (
        ("has_landmark", np.full(2, 2, "|u1")),
        ("lengths", np.ones(3, "<i4")),
        ("keypoints", np.zeros((2, 3), "<f4")),
        ("track_ids", np.zeros((2, 1), "<i8")),
        ("track_ids", np.zeros(2, "<i4")),
    ):
        with pytest.raises(ProtocolError, match=name if name != "lengths" else "lengths|shape"):
            decode(with_arrays("tracks", good | {name: array}))
    for K in (np.full((3, 3), np.nan), np.zeros((3, 3))):
        with pytest.raises(ProtocolError, match="K"):
            decode(with_arrays("camera", {"K": K, "distortion": np.zeros(0)}))
    with pytest.raises(ProtocolError, match="distortion"):
        decode(with_arrays("camera", {"K": np.eye(3)}))


@pytest.mark.parametrize(
    ("lengths", "num_bytes", "complaint"),
    [
        ([3, 4], 8, "sum to 7"),
        ([2**62, 2**62, 2**62], 8, "sum to"),
        ([-1, 9], 8, "-1 bytes"),
        ([0, 8], 8, "0 bytes"),
        ([1] * (MAX_SNAPSHOT_MESSAGES + 1), MAX_SNAPSHOT_MESSAGES + 1, "above 1024"),
    ],
)
def test_wrong_snapshots(lengths: list[int], num_bytes: int, complaint: str) -> None:
    arrays = {"message_lengths": np.array(lengths, "<i8"), "messages": np.zeros(num_bytes, "|u1")}
    with pytest.raises(ProtocolError, match=complaint):
        decode(with_arrays("snapshot", arrays))


def hostile() -> dict[str, bytes]:
    pose = encode(a_message(a_pose()))
    layouts: dict[str, Any] = {
        "offset_negative": {"a": ("<f8", (1,), -8)},
        "offset_huge": {"a": ("<f8", (1,), 2**62)},
        "offset_unaligned": {"a": ("|u1", (1,), 1)},
        "overlap": {"a": ("|u1", (8,), 0), "b": ("|u1", (8,), 0)},
        "shape_huge": {"a": ("<f8", (2**40,), 0)},
        "shape_product": {"a": ("<f8", (2**16, 2**16, 2**16, 2**16), 0)},
        "shape_empty_and_huge": {"a": ("<f8", (0, 2**62, 2**62), 0)},
        "shape_negative": {"a": ("<f8", (-1,), 0)},
        "shape_deep": {"a": ("|u1", (1,) * 5, 0)},
        "shape_flag": {"a": ("|u1", (True,), 0)},
        "shape_text": {"a": ("|u1", "11", 0)},
        "dtype_object": {"a": ("|O", (1,), 0)},
        "dtype_map": {"a": ({"a": 1}, (1,), 0)},
        "dtype_records": {"a": ("<f8,<f8", (1,), 0)},
        "entry_short": {"a": ("<f8", (1,))},
        "entry_map": {"a": {"dtype": "<f8"}},
        "name_bytes": {b"a": ("<f8", (1,), 0)},
    }
    header = read_by_the_book(pose)[1]
    messages = {
        name: framed(b"pose", msgpack.packb(header | {"arrays": layout})) + bytes(8) for name, layout in layouts.items()
    }
    return messages | {
        "empty": b"",
        "only_topic": b"pose\0",
        "no_topic": pose[4:],
        "topic_long": b"p" * 17 + pose[4:],
        "topic_unknown": b"poses" + pose[4:],
        "topic_binary": b"\xff\xfe" + pose[4:],
        "header_claims_4_gib": b"pose\0" + b"\xff" * 4 + pose[9:],
        "header_cut": pose[:40],
        "header_no_map": framed(b"pose", msgpack.packb([1, 2])),
        "header_rest": framed(b"pose", msgpack.packb({"schema": "lightvo/1"}) + b"\0"),
        "header_array_of_4_gib": framed(b"pose", b"\x81\xa1a\xdd\xff\xff\xff\xff"),
        "header_map_of_4_gib": framed(b"pose", b"\xdf\xff\xff\xff\xff"),
        "header_text_of_4_gib": framed(b"pose", b"\x81\xa1a\xdb\xff\xff\xff\xff"),
        "header_bytes_of_4_gib": framed(b"pose", b"\x81\xa1a\xc6\xff\xff\xff\xff"),
        "header_extension_of_4_gib": framed(b"pose", b"\x81\xa1a\xc9\xff\xff\xff\xff\x05"),
        "header_timestamp_bad": framed(b"pose", b"\x81\xa1a\xc7\x00\xff"),
        "header_nested": framed(b"pose", b"\x81\xa1a" + b"\x91" * 10_000 + b"\xc0"),
        "header_key_twice": framed(b"pose", b"\x82\xa1a\x01\xa1a\x02"),
        "header_key_list": framed(b"pose", b"\x81\x91\x01\x01"),
        "header_no_utf8": framed(b"pose", b"\x81\xa1\xff\x01"),
        "header_many_keys": framed(b"pose", msgpack.packb({str(i): i for i in range(65)})),
        "message_too_long": pose + bytes(wire.MAX_MESSAGE_BYTES),
        "message_rest": pose + b"\0",
        "message_cut": pose[:-1],
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_bytes_are_refused_without_memory(name: str) -> None:
    data = hostile()[name]
    with pytest.raises(ProtocolError):
        decode(data)  # whatever is imported or compiled lazily is done now
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            decode(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 512 * 1024
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_long_header_is_not_even_parsed() -> None:
    decode(edited(a_message(a_pose()), **{f"unknown{i}": "x" * 250 for i in range(40)}))
    with pytest.raises(ProtocolError, match=r"header of .* is above 16384"):
        decode(edited(a_message(a_pose()), something="x" * wire.MAX_HEADER_BYTES))


@pytest.mark.parametrize(
    "changes",
    [
        {"keyframe_indices": np.array([5, 1], "<i8")},
        {"keyframe_indices": np.array([-1, 1], "<i8")},
        {"keyframe_timestamps_ns": np.zeros(3, "<i8")},
        {"T_world_keyframes": np.zeros((2, 4, 4))},
        {"T_world_keyframes": np.full((2, 4, 4), np.nan)},
        {"T_world_keyframes": np.stack([np.eye(4), np.diag([1.0, 1, -1, 1])])},
        {"T_world_keyframes": np.stack([np.eye(4)] * 2).astype("<f4")},
    ],
)
def test_what_are_no_keyframes(changes: dict[str, Any]) -> None:
    good = {
        "keyframe_indices": np.array([1, 5], "<i8"),
        "keyframe_timestamps_ns": np.zeros(2, "<i8"),
        "T_world_keyframes": np.stack([np.eye(4)] * 2),
    }
    decode(with_arrays("keyframe", good))
    with pytest.raises(ProtocolError, match=next(iter(changes))):
        decode(with_arrays("keyframe", good | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"landmark_ids": np.array([2, 2], "<i8")},
        {"landmarks": np.zeros((3, 3))},
        {"landmarks": np.array([[0, 0, 1], [0, math.inf, 1]])},
        {"landmark_colors": np.zeros((2, 4), "|u1")},
        {"removed_landmark_ids": np.array([3, 1], "<i8")},
        {"removed_landmark_ids": np.arange(MAX_POINTS + 1, dtype="<i8")},
    ],
)
def test_what_are_no_points(changes: dict[str, Any]) -> None:
    good = {
        "landmark_ids": np.array([1, 5], "<i8"),
        "landmarks": np.zeros((2, 3)),
        "landmark_colors": np.zeros((2, 3), "|u1"),
        "removed_landmark_ids": np.zeros(0, "<i8"),
    }
    decode(with_arrays("points", good))
    with pytest.raises(ProtocolError, match=next(iter(changes))):
        decode(with_arrays("points", good | changes))


def test_what_is_no_image() -> None:
    for data in (b"\x89PNG\r\n", b"\xff\xd8", b""):
        with pytest.raises(ProtocolError, match="JPEG"):
            decode(with_arrays("image", {"data": np.frombuffer(data, "|u1")}))
    image = a_message(an_image())
    for changes, complaint in (({"format": "png"}, "format"), ({"width": 0}, "width"), ({"height": None}, "height")):
        with pytest.raises(ProtocolError, match=complaint):
            decode(edited(image, **changes))


def test_hostile_requests() -> None:
    good = {"schema": "lightvo/1", "request": "snapshot", "tag": 0, "topic": "pose", "first_sequence": 0}
    assert decode_request(msgpack.packb(good)) == Request(RequestKind.SNAPSHOT)
    for changes in (
        {"request": "shutdown"},
        {"topic": "snapshot"},
        {"topic": "points"},
        {"topic": "points", "first_segment": 0, "first_id": -1},
        {"topic": "depth"},
        {"tag": None},
        {"tag": -1},
        {"request": "scale"},
        {"request": "scale", "quantity": "speed_m_s", "value": -1.0, "timestamp_ns": None, "start_timestamp_ns": None},
        {"request": "scale", "quantity": "speed_m_s", "value": "1", "timestamp_ns": None, "start_timestamp_ns": None},
        {"request": "scale", "quantity": "speed_m_s", "value": 1.0, "timestamp_ns": 5, "start_timestamp_ns": 4},
        {"request": "scale", "quantity": "distance_m", "value": 1.0, "timestamp_ns": 5, "start_timestamp_ns": 5},
        {"request": "scale", "quantity": "height_m", "value": 1.0, "timestamp_ns": None, "start_timestamp_ns": None},
        {"first_sequence": -1},
        {"first_sequence": None},
        {"schema": None},
        {"padding": "x" * MAX_REQUEST_BYTES},
    ):
        with pytest.raises(ProtocolError):
            decode_request(msgpack.packb(good | changes))
    for data in (b"", b"\x00", b"\xc1", msgpack.packb("snapshot")):
        with pytest.raises(ProtocolError):
            decode_request(data)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([b"", *(topic.prefix for topic in Topic)]), st.booleans())
def test_noise_is_a_protocol_error(noise: bytes, prefix: bytes, is_header: bool) -> None:
    data = framed(prefix[:-1], noise) if is_header and prefix else prefix + noise
    with pytest.raises(ProtocolError):
        decode(data)
    with pytest.raises(ProtocolError):
        decode_request(noise)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four random injuries of the kinds that break parsers."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(result)) if result else 0
        match rng.randrange(6):
            case 0 if result:
                result[at] ^= 1 << rng.randrange(8)
            case 1 if result:
                result[at] = rng.choice((0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xC9, 0xDB, 0xDD, 0xDF, 0xFF))
            case 2:
                del result[at:]
            case 3:
                del result[at : at + rng.randint(1, 16)]
            case 4:
                result[at:at] = rng.randbytes(rng.randint(1, 16))
            case _:
                start = rng.randrange(len(data))
                result[at : at + 8] = data[start : start + 8]
    return bytes(result)


def test_injured_messages_are_read_or_refused_and_nothing_else() -> None:
    rng = random.Random(5)
    messages = [encode(message) for message in golden_messages().values()]
    requests = [encode_request(request) for request in golden_requests().values()]
    num_refused = 0
    for index in range(NUM_MUTATIONS):
        is_request = index % 5 == 0
        data = mutated(rng.choice(requests if is_request else messages), rng)
        try:
            if is_request:
                decode_request(data)
            else:
                decode(data)
        except ProtocolError:
            num_refused += 1
    # Injured floats in an array are still floats, so some must pass; most injuries hit something that is checked.
    assert NUM_MUTATIONS * 0.7 < num_refused < NUM_MUTATIONS * 0.999


def test_reading_never_takes_more_memory_than_the_specification_says() -> None:
    """Injured headers claim sizes of every kind; what is allocated must stay below a few times the header's limit."""
    rng = random.Random(6)
    messages = [encode(message) for message in golden_messages().values()]
    largest = encode(a_message(dataclasses.replace(some_points(), **many_points(MAX_POINTS))))
    for data in messages:
        decode(data)
    tracemalloc.start()
    try:
        for _ in range(3_000):
            data = mutated(rng.choice(messages), rng)
            tracemalloc.reset_peak()
            before_bytes, _ = tracemalloc.get_traced_memory()
            with contextlib.suppress(ProtocolError):
                decode(data)
            _, peak_bytes = tracemalloc.get_traced_memory()
            assert peak_bytes - before_bytes < 512 * 1024
        tracemalloc.reset_peak()
        before_bytes, _ = tracemalloc.get_traced_memory()
        decode(largest)
        _, peak_bytes = tracemalloc.get_traced_memory()
        assert peak_bytes - before_bytes < len(largest) < wire.MAX_MESSAGE_BYTES
    finally:
        tracemalloc.stop()


def many_points(num_points: int) -> dict[str, Any]:
    return {
        "landmark_ids": np.arange(num_points),
        "landmarks": np.zeros((num_points, 3)),
        "landmark_colors": np.zeros((num_points, 3), np.uint8),
        "removed_landmark_ids": np.zeros(0, np.int64),
    }


class HeaderValues:
    """Values of every kind in every place of a header."""

    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=5)
        | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
        max_leaves=6,
    )


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_value_in_any_key_is_read_or_refused(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(list(golden_messages().values())))
    _, header, _ = read_by_the_book(encode(message))
    key = data.draw(st.sampled_from(list(header)))
    value = data.draw(HeaderValues.values)
    if key == "arrays" and data.draw(st.booleans()) and header["arrays"]:
        name = data.draw(st.sampled_from(list(header["arrays"])))
        value = header["arrays"] | {name: value}
    try:
        decoded = decode(edited(message, **{key: value}))
    except ProtocolError:
        return
    assert read_by_the_book(encode(decoded))[1][key] is not None or value is None
