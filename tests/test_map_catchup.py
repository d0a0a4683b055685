"""The map at a consumer is the publisher's, however late it comes and whatever gets lost on the way."""

from __future__ import annotations

import itertools
import random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.archive import Archive
from vo.config import PublisherConfig
from vo.inbox import GIVE_UP_S, Inbox
from vo.map_store import MapStore
from vo.message_stream import EncodedMessage, MessageStream, keyframe_updates, points_updates
from vo.messages import (
    Header,
    KeyframeUpdate,
    Message,
    PointsUpdate,
    ProtocolError,
    Request,
    RequestKind,
    RunState,
    Topic,
    decode,
    encode,
)
from vo.types import Camera, MapUpdate, TrackingStatus

CAMERA = Camera(640, 480, np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]))
Known = dict[tuple[str, int, int], bytes]


def a_map_update(rng: random.Random, index: int, num_ids: int = 12) -> MapUpdate:
    """Some keyframes and landmarks at places that are never the same; some landmarks go."""
    ids = sorted(rng.sample(range(num_ids), rng.randint(0, num_ids)))
    num_removed = rng.randint(0, len(ids))
    removed = sorted(rng.sample(ids, num_removed))
    moved = np.array([i for i in ids if i not in removed], np.int64)
    keyframes = np.array(sorted(rng.sample(range(num_ids), rng.randint(0, 5))), np.int64)
    T = np.tile(np.eye(4), (len(keyframes), 1, 1))
    T[:, 0, 3] = [rng.random() for _ in keyframes]
    return MapUpdate(
        frame_index=index,
        timestamp_ns=index * 1000,
        segment_id=rng.randint(0, 2),
        scale_source="relative",
        keyframe_indices=keyframes,
        keyframe_timestamps_ns=keyframes * 1000,
        T_world_keyframes=T,
        landmark_ids=moved,
        landmarks=np.array([[rng.random(), index, 1] for _ in moved]).reshape(-1, 3),
        landmark_colors=np.array([[rng.randrange(256)] * 3 for _ in moved], np.uint8).reshape(-1, 3),
        removed_landmark_ids=np.array(removed, np.int64),
    )


def apply(known: Known, body: object) -> None:
    """What docs/PROTOCOL.md tells a consumer to do, in its simplest form."""
    if isinstance(body, KeyframeUpdate):
        if body.is_reset:
            for key in [key for key in known if key[0] == "keyframe"]:
                del known[key]
        for keyframe, T in zip(body.keyframe_indices.tolist(), body.T_world_keyframes, strict=True):
            known["keyframe", body.segment_id, keyframe] = T.tobytes()
    if isinstance(body, PointsUpdate):
        if body.is_reset:
            for key in [key for key in known if key[0] == "point"]:
                del known[key]
        for landmark in body.removed_landmark_ids.tolist():
            known.pop(("point", body.segment_id, landmark), None)
        for landmark, point, color in zip(
            body.landmark_ids.tolist(), body.landmarks, body.landmark_colors, strict=True
        ):
            known["point", body.segment_id, landmark] = point.tobytes() + color.tobytes()


# --- the store ---


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4), st.integers(1, 60))
def test_store_holds_what_the_updates_amount_to(seed: int, page_size: int, max_updates: int, capacity: int) -> None:
    rng = random.Random(seed)
    whole, bounded, known = MapStore(10**6), MapStore(capacity), Known()
    for index in range(rng.randint(0, 25)):
        for update in points_updates(a_map_update(rng, index)):
            whole.apply(update)
            bounded.apply(update)
            apply(known, update)
    paged: Known = {}
    start: tuple[int, int] | None = (0, 0)
    while start is not None:
        page = whole.page(*start, page_size, max_updates)
        assert len(page.updates) <= max_updates
        assert sum(len(update.landmark_ids) for update in page.updates if isinstance(update, PointsUpdate)) <= page_size
        assert page.next_start is None or (page.next_start > start and page.updates)
        for update in page.updates:
            apply(paged, update)
        start = page.next_start
    assert paged == known
    kept: Known = {}
    for update in bounded.page(0, 0, 10**6, 10**6).updates:
        apply(kept, update)
    assert len(kept) <= capacity
    assert all(known[key] == value for key, value in kept.items())


def test_store_gives_up_the_oldest_first_and_keeps_to_its_kind() -> None:
    store = MapStore(4)
    rng = random.Random(1)
    (points,) = points_updates(a_map_update(rng, 0))[:1]
    for segment, ids in ((0, [1, 2, 3]), (1, [1, 2, 9])):
        update = PointsUpdate(
            1, 1, segment, "depth", np.array(ids), np.zeros((3, 3)), np.zeros((3, 3), np.uint8), np.zeros(0, np.int64)
        )
        store.apply(update)
    segments = [(update.segment_id, update.landmark_ids.tolist()) for update in store.page(0, 0, 99, 99).updates]  # type: ignore[union-attr]
    assert segments == [(0, [3]), (1, [1, 2, 9])]
    (keyframes,) = keyframe_updates(
        MapUpdate(
            1,
            1,
            0,
            "depth",
            np.array([1]),
            np.array([1]),
            np.eye(4)[None],
            np.zeros(0, np.int64),
            np.zeros((0, 3)),
            np.zeros((0, 3), np.uint8),
            np.zeros(0, np.int64),
        )
    )
    with pytest.raises(ValueError, match="does not belong"):
        store.apply(keyframes)
    with pytest.raises(ValueError, match="capacity"):
        MapStore(0)
    assert isinstance(points, PointsUpdate)


def test_large_updates_go_into_several_messages() -> None:
    update = a_map_update(random.Random(6), 4)
    parts, keyframe_parts = points_updates(update, 2), keyframe_updates(update, 2)
    assert max(len(part.landmark_ids) for part in parts) <= 2 and len(parts) > 1
    once, several = Known(), Known()
    for body in (*points_updates(update), *keyframe_updates(update)):
        apply(once, body)
    for body in (*parts, *keyframe_parts):
        apply(several, body)
    assert once == several
    removed = np.concatenate([part.removed_landmark_ids for part in parts])
    assert removed.tolist() == update.removed_landmark_ids.tolist()


# --- consumer and publisher ---


class Wire:
    """A publisher without sockets: what its stream says, and its answers."""

    def __init__(self, session_id: str = "a") -> None:
        self.stream = MessageStream(CAMERA, session_id=session_id, heartbeat_hz=1000.0)
        self.archive = Archive(PublisherConfig())
        self.sent: list[EncodedMessage] = []
        self.known: Known = {}
        self.stream.add_consumer(self.archive.add)
        self.stream.add_consumer(self.sent.append)

    def publish(self, update: MapUpdate) -> None:
        self.stream.publish_map(update)
        for body in (*keyframe_updates(update), *points_updates(update)):
            apply(self.known, body)

    def answer(self, request: Request) -> bytes:
        snapshot = self.archive.snapshot(request, self.stream)
        return encode(Message(self.stream.answer_header(Topic.SNAPSHOT, 0), snapshot))

    def take(self) -> list[EncodedMessage]:
        sent, self.sent[:] = list(self.sent), []
        return sent


def taken(inbox: Inbox, known: Known) -> None:
    while (message := inbox.take()) is not None:
        apply(known, message.body)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 0.6))
def test_consumer_gets_the_publishers_map(seed: int, page_size: int, loss: float) -> None:
    """It comes late, messages and answers get lost or come twice, and the map changes between two pages."""
    rng, ticks = random.Random(seed), itertools.count()
    with (
        patch("vo.archive.PAGE_POINTS", page_size),
        patch("vo.archive.PAGE_KEYFRAMES", page_size),
        patch("vo.message_stream.time.monotonic", lambda: next(ticks) / 1000),
    ):
        wire, inbox, known = Wire(), Inbox([Topic.KEYFRAME, Topic.POINTS]), Known()
        answers: list[bytes] = []
        now_s = 0.0
        for index in range(rng.randint(0, 20)):
            wire.publish(a_map_update(rng, index))
        wire.take()
        for index in range(60):
            now_s += 0.05
            if rng.random() < 0.4:
                wire.publish(a_map_update(rng, 100 + index))
            wire.stream.beat_if_due()
            for message in wire.take():
                if rng.random() >= loss:
                    inbox.accept_published(message.data, now_s)
            request = inbox.next_request(now_s)
            if request is not None:
                inbox.note_request(request, now_s, was_sent=True)
                answers += [wire.answer(request)] * rng.choice((0, 1, 1, 2))
            if answers and rng.random() < 0.7:
                inbox.accept_answer(answers.pop(rng.randrange(len(answers))), now_s)
            taken(inbox, known)
        wire.stream.finish()
        for message in wire.take():
            inbox.accept_published(message.data, now_s)
        for _ in range(200):
            now_s += 0.1
            request = inbox.next_request(now_s)
            if request is not None:
                inbox.note_request(request, now_s, was_sent=True)
                inbox.accept_answer(wire.answer(request), now_s)
            taken(inbox, known)
    assert inbox.is_complete and inbox.final_state is RunState.FINISHED
    assert known == wire.known
    assert inbox.num_lost[Topic.POINTS] == 0 and inbox.num_malformed == 0


def test_consumer_that_keeps_up_asks_once() -> None:
    wire, inbox, known = Wire(), Inbox([Topic.POINTS]), Known()
    rng = random.Random(2)
    wire.publish(a_map_update(rng, 0))
    request = inbox.next_request(0.0)
    assert request == Request(RequestKind.SNAPSHOT, Topic.POINTS)
    inbox.accept_answer(wire.answer(request), 0.0)
    wire.take()
    for index in range(50):
        wire.publish(a_map_update(rng, index))
        for message in wire.take():
            inbox.accept_published(message.data, 0.1)
        taken(inbox, known)
        assert inbox.next_request(10.0) is None
    assert known == {key: value for key, value in wire.known.items() if key[0] == "point"}


def test_without_answers_the_updates_come_after_a_while() -> None:
    wire, inbox, known = Wire(), Inbox([Topic.POINTS]), Known()
    rng = random.Random(4)
    for index in range(3):
        wire.publish(a_map_update(rng, index))
    for message in wire.take():
        inbox.accept_published(message.data, 0.0)
    now_s = 0.0
    while now_s < GIVE_UP_S + 1:
        assert inbox.take() is None
        request = inbox.next_request(now_s)
        if request is not None:
            inbox.note_request(request, now_s, was_sent=True)
        elif inbox.next_request_s is None:
            break
        now_s += 0.3
    taken(inbox, known)
    assert known == {key: value for key, value in wire.known.items() if key[0] == "point"}
    # From then on a loss is noted and the map asked for again, and what nobody answers for is a gap.
    wire.publish(a_map_update(rng, 3))
    lost = [message for message in wire.take() if message.topic is Topic.POINTS]
    wire.publish(a_map_update(rng, 4))
    for message in wire.take():
        inbox.accept_published(message.data, now_s)
    for step in range(40):
        request = inbox.next_request(now_s + 0.3 * step)
        if request is not None:
            inbox.note_request(request, now_s + 0.3 * step, was_sent=True)
    (gap,) = inbox.take_gaps()
    assert (gap.topic, gap.num_messages) == (Topic.POINTS, len(lost))


def test_an_empty_map_and_one_of_which_nothing_is_left() -> None:
    wire, inbox, known = Wire(), Inbox([Topic.POINTS]), Known()
    inbox.accept_answer(wire.answer(Request(RequestKind.SNAPSHOT, Topic.POINTS)), 0.0)
    assert inbox.next_request(1.0) is None and inbox.take() is None
    update = a_map_update(random.Random(3), 0)
    wire.publish(update)
    for message in wire.take():
        inbox.accept_published(message.data, 0.0)
    taken(inbox, known)
    assert known
    none_left = MapUpdate(
        1,
        1000,
        update.segment_id,
        "relative",
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros((0, 4, 4)),
        np.zeros(0, np.int64),
        np.zeros((0, 3)),
        np.zeros((0, 3), np.uint8),
        update.landmark_ids,
    )
    wire.publish(none_left)  # and this one is lost
    wire.take()
    wire.stream.beat_if_due()
    wire.stream.finish()
    for message in wire.take():
        inbox.accept_published(message.data, 2.0)
    request = inbox.next_request(3.0)
    assert request is not None
    inbox.accept_answer(wire.answer(request), 3.0)
    taken(inbox, known)
    assert known == {} and inbox.is_complete


def test_a_new_session_begins_with_its_own_map() -> None:
    first, second, inbox, known = Wire("first"), Wire("second"), Inbox([Topic.POINTS]), Known()
    rng = random.Random(5)
    for wire in (first, second):
        wire.publish(a_map_update(rng, 0))
        for message in wire.take():
            inbox.accept_published(message.data, 0.0)
        request = inbox.next_request(1.0)
        assert request is not None
        inbox.accept_answer(first.answer(request), 1.0)
        inbox.accept_answer(wire.answer(request), 1.0)
        taken(inbox, known)
    assert inbox.session_id == "second" and inbox.num_sessions == 2
    assert known == {key: value for key, value in second.known.items() if key[0] == "point"}


def test_what_is_not_kept_is_refused_and_pages_keep_their_header() -> None:
    wire = Wire()
    with pytest.raises(ProtocolError, match="tracks is not kept; ask for pose, status, camera, keyframe, points"):
        wire.answer(Request(RequestKind.SNAPSHOT, Topic.TRACKS))
    for index in (4, 5):
        wire.publish(a_map_update(random.Random(index), index))
    snapshot = wire.archive.snapshot(Request(RequestKind.SNAPSHOT, Topic.KEYFRAME), wire.stream)
    headers = [decode(data).header for data in snapshot.messages]
    assert {header.sequence for header in headers} == {snapshot.num_sent - 1}
    assert headers[-1] == Header(
        Topic.KEYFRAME,
        "a",
        snapshot.num_sent - 1,
        headers[-1].publish_time_ns,
        TrackingStatus.INITIALIZING,
        headers[-1].frame_index,
        1000 * (headers[-1].frame_index or 0),
    )
