"""Order, losses and restarts as a consumer sees them: pure logic under an invented clock."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.inbox import ANSWER_TIMEOUT_S, GIVE_UP_S, Inbox
from vo.messages import Body, Header, Message, Request, RequestKind, RunState, Snapshot, StatusReport, Topic, encode
from vo.sequences import Gap, History, OrderedMerge
from vo.types import FrameTracks, PoseEstimate, TrackingStatus


class Run:
    """One run of a publisher without sockets: makes messages, keeps poses, answers requests."""

    def __init__(self, session_id: str = "a", capacity: int = 1000) -> None:
        self.session_id = session_id
        self.history = History(capacity)
        self.num_tracks = 0
        self.num_statuses = 0
        self.state = RunState.RUNNING

    def pose(self) -> bytes:
        index = self.history.end_sequence
        pose = PoseEstimate(index, index * 1000, None, TrackingStatus.LOST)
        self.history.add(self._encoded(Topic.POSE, index, pose, index), index)
        return self.history.take(index, 1, 1)[0]

    def tracks(self) -> bytes:
        index, self.num_tracks = self.num_tracks, self.num_tracks + 1
        empty = np.zeros(0, np.int64)
        body = FrameTracks(
            index, index * 1000, empty, np.zeros((0, 2), np.float32), np.zeros(0, np.int32), np.zeros(0, np.bool_)
        )
        return self._encoded(Topic.TRACKS, index, body, index)

    def status(self, state: RunState = RunState.RUNNING) -> bytes:
        self.state = state
        num_sent = {Topic.POSE: self.history.end_sequence, Topic.TRACKS: self.num_tracks}
        self.num_statuses += 1
        return self._encoded(Topic.STATUS, self.num_statuses - 1, StatusReport(state, num_sent=num_sent), None)

    def answer(self, request: Request, max_messages: int = 1000) -> bytes:
        assert request.kind is RequestKind.SNAPSHOT
        messages = self.history.take(request.first_sequence, max_messages, 10**6)
        history = self.history
        body = Snapshot(request.topic, history.oldest_sequence, history.end_sequence, self.state, messages)
        return self._encoded(Topic.SNAPSHOT, 0, body, None)

    def _encoded(self, topic: Topic, sequence: int, body: Body, index: int | None) -> bytes:
        capture_time_ns = None if index is None else index * 1000
        return encode(
            Message(Header(topic, self.session_id, sequence, 0, TrackingStatus.LOST, index, capture_time_ns), body)
        )


def taken(inbox: Inbox) -> list[int]:
    sequences = []
    while (message := inbox.take()) is not None:
        sequences.append(message.header.sequence)
    return sequences


def ask(inbox: Inbox, now_s: float) -> Request | None:
    request = inbox.next_request(now_s)
    if request is not None:
        inbox.note_request(request, now_s, was_sent=True)
    return request


# --- sequences ---


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 70), st.integers(1, 10), st.integers(1, 40))
def test_history_keeps_the_last_messages(
    capacity: int, num_added: int, first_sequence: int, max_messages: int, max_bytes: int
) -> None:
    history = History(capacity)
    messages = [bytes([i]) * (1 + i % 5) for i in range(num_added)]
    for sequence, message in enumerate(messages):
        history.add(message, sequence)
    assert (history.end_sequence, history.oldest_sequence) == (num_added, max(0, num_added - capacity))
    expected: list[bytes] = []
    for message in messages[max(first_sequence, history.oldest_sequence) :]:
        if expected and (len(expected) == max_messages or sum(map(len, expected)) + len(message) > max_bytes):
            break
        expected.append(message)
    assert list(history.take(first_sequence, max_messages, max_bytes)) == expected
    history.add(b"after a gap", num_added + 3)
    assert (history.oldest_sequence, history.end_sequence) == (num_added + 3, num_added + 4)
    assert history.take(first_sequence, 10, 100) == ((b"after a gap",) if first_sequence <= num_added + 3 else ())
    with pytest.raises(ValueError, match="capacity"):
        History(0)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 15)), st.integers(0, 20))
def test_merge_orders_and_accounts_for_everything(arrivals: list[int], limit: int) -> None:
    merge: OrderedMerge[int] = OrderedMerge()
    out: list[int] = []
    for sequence in arrivals:
        merge.add(sequence, sequence)
        out += merge.take()
    assert out == list(range(len(out)))
    assert merge.num_duplicates == len(arrivals) - len(set(arrivals))
    lost: list[int] = []
    while merge.next_sequence < limit:
        hole = merge.give_up_before(limit)
        lost += [] if hole is None else range(hole[0], hole[1] + 1)
        out += merge.take()
    assert merge.give_up_before(limit) is None
    assert sorted(out + lost) == list(range(max(limit, len(out + lost))))
    assert set(lost).isdisjoint(arrivals)


# --- the inbox ---


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    num_poses=st.integers(0, 60),
    capacity=st.integers(1, 80),
    loss=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    chunk=st.integers(1, 20),
)
def test_every_pose_comes_in_order_or_is_reported(
    seed: int, num_poses: int, capacity: int, loss: float, chunk: int
) -> None:
    """Subscription and snapshot lose, delay and repeat messages at random; only what nobody keeps may be lost."""
    rng = random.Random(seed)
    run, inbox = Run(capacity=capacity), Inbox([Topic.POSE])
    num_unheard = rng.randint(0, num_poses)
    out: list[int] = []
    answers: list[bytes] = []
    now_s = 0.0
    for index in range(num_poses):
        data = run.pose()
        if index >= num_unheard and rng.random() >= loss:
            inbox.accept_published(data, now_s)
        now_s += rng.choice((0.0, 0.01, 0.3))
        request = ask(inbox, now_s) if index >= num_unheard else None
        if request is not None and rng.random() >= loss / 2:
            answers.append(run.answer(request, chunk))
        if answers and rng.random() < 0.5:
            inbox.accept_answer(answers.pop(0), now_s)
        out += taken(inbox)
    inbox.accept_published(run.status(RunState.FINISHED), now_s)
    for _ in range(200):
        if inbox.is_complete:
            break
        now_s += 0.1
        request = ask(inbox, now_s)
        if request is not None:
            inbox.accept_answer(run.answer(request, chunk), now_s)
        out += taken(inbox)
    assert inbox.is_complete and inbox.final_state is RunState.FINISHED
    assert out == sorted(set(out))
    lost = [sequence for gap in inbox.take_gaps() for sequence in range(gap.first_sequence, gap.last_sequence + 1)]
    assert sorted(out + lost) == list(range(num_poses))
    assert inbox.num_lost[Topic.POSE] == len(lost)
    assert all(sequence < run.history.oldest_sequence for sequence in lost)
    assert inbox.take_end() and not inbox.take_end()
    assert inbox.next_request(now_s + 100) is None and inbox.next_request_s is None


def test_late_joiner_waits_for_the_past_before_it_hands_out_the_present() -> None:
    run, inbox = Run(), Inbox([Topic.POSE])
    past = [run.pose() for _ in range(5)]
    assert ask(inbox, 0.0) == Request(RequestKind.SNAPSHOT, Topic.POSE, 0)
    inbox.accept_published(run.pose(), 0.0)
    assert taken(inbox) == []
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), 0.1)
    assert taken(inbox) == [0, 1, 2, 3, 4, 5]
    inbox.accept_published(past[2], 0.2)
    assert taken(inbox) == [] and inbox.num_duplicates == 2
    inbox.accept_published(run.pose(), 0.2)
    assert taken(inbox) == [6]


def test_asks_only_while_something_is_missing_and_not_too_often() -> None:
    run, inbox = Run(), Inbox([Topic.POSE])
    assert ask(inbox, 0.0) is not None
    assert ask(inbox, ANSWER_TIMEOUT_S * 0.9) is None
    assert ask(inbox, ANSWER_TIMEOUT_S) is not None
    inbox.accept_published(run.pose(), 0.6)
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), 0.6)
    assert inbox.next_request_s is None
    lost = run.pose()
    inbox.accept_published(run.pose(), 1.0)
    assert ask(inbox, 1.0) == Request(RequestKind.SNAPSHOT, Topic.POSE, 1)
    inbox.accept_published(lost, 1.1)
    assert inbox.next_request_s is None and taken(inbox) == [0, 1, 2]


def test_the_last_pose_is_missed_too() -> None:
    """Nothing follows it: only the count in the status tells."""
    run, inbox = Run(), Inbox([Topic.POSE])
    inbox.accept_published(run.pose(), 0.0)
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), 0.0)
    run.pose()
    inbox.accept_published(run.status(RunState.FINISHED), 0.1)
    assert not inbox.is_complete
    request = ask(inbox, 1.0)
    assert request == Request(RequestKind.SNAPSHOT, Topic.POSE, 1)
    inbox.accept_answer(run.answer(request), 1.0)
    assert taken(inbox) == [0, 1] and inbox.is_complete


def test_a_snapshot_alone_tells_that_the_run_is_over() -> None:
    run, inbox = Run(), Inbox([Topic.POSE])
    run.pose()
    run.status(RunState.INTERRUPTED)
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), 0.0)
    assert not inbox.is_complete and taken(inbox) == [0]
    assert inbox.is_complete and inbox.final_state is RunState.INTERRUPTED


def test_an_early_answer_does_not_cut_off_the_subscription() -> None:
    """A snapshot overtakes what is still on its way: with other topics, the end is where the subscription ends."""
    run, inbox = Run(), Inbox([Topic.POSE, Topic.TRACKS])
    inbox.accept_published(run.pose(), 0.0)
    inbox.accept_published(run.tracks(), 0.0)
    late = [run.tracks(), run.status(RunState.FINISHED)]
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), 0.0)
    assert len(taken(inbox)) == 2 and not inbox.is_complete and not inbox.take_farewell()
    for data in late:
        inbox.accept_published(data, 0.1)
    assert taken(inbox) == [1] and inbox.is_complete and inbox.take_farewell() and not inbox.take_farewell()


def test_an_end_that_never_comes_by_subscription_is_believed_after_a_while() -> None:
    run, inbox = Run(), Inbox([Topic.POSE, Topic.TRACKS])
    inbox.accept_published(run.pose(), 0.0)
    run.status(RunState.FINISHED)
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), 1.0)
    assert taken(inbox) == [0]
    ask(inbox, GIVE_UP_S)
    assert not inbox.is_complete
    ask(inbox, GIVE_UP_S + 1.5)
    assert inbox.is_complete and inbox.final_state is RunState.FINISHED and inbox.next_request_s is None


def test_without_answers_the_poses_come_after_a_while_with_the_loss_noted() -> None:
    run, inbox = Run(), Inbox([Topic.POSE])
    missed = run.pose()
    inbox.accept_published(run.pose(), 0.0)
    now_s = 0.0
    while now_s < GIVE_UP_S:
        ask(inbox, now_s)
        assert taken(inbox) == []
        now_s += 0.25
    ask(inbox, now_s + ANSWER_TIMEOUT_S)
    assert taken(inbox) == [1]
    assert inbox.take_gaps() == (Gap(Topic.POSE, "a", 0, 0),)
    inbox.accept_published(missed, now_s)
    assert taken(inbox) == [] and inbox.num_duplicates == 1
    inbox.accept_published(run.pose(), now_s)
    assert taken(inbox) == [2]


def test_an_answer_restarts_the_patience() -> None:
    """A publisher that was slow once is not given up at once the next time."""
    run, inbox = Run(), Inbox([Topic.POSE])
    inbox.accept_published(run.pose(), 0.0)
    ask(inbox, 0.0)
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), GIVE_UP_S * 0.9)
    run.pose()
    inbox.accept_published(run.pose(), GIVE_UP_S * 2)
    assert ask(inbox, GIVE_UP_S * 2) is not None and ask(inbox, GIVE_UP_S * 2.5) is not None
    assert taken(inbox) == [0] and inbox.take_gaps() == ()


def test_without_a_connection_it_tries_again_soon_and_then_less_often() -> None:
    inbox = Inbox([Topic.POSE])
    now_s, times_s = 0.0, []
    while now_s < 5:
        request = inbox.next_request(now_s)
        if request is not None:
            inbox.note_request(request, now_s, was_sent=False)
            times_s.append(now_s)
        next_s = inbox.next_request_s
        assert next_s is not None
        now_s = next_s
    waits_s = np.diff(times_s)
    assert waits_s[0] < 0.05 and waits_s.max() <= ANSWER_TIMEOUT_S and (np.diff(waits_s) >= -1e-9).all()


def test_a_new_session_is_noticed_and_the_old_one_settled() -> None:
    first, second, inbox = Run("first"), Run("second"), Inbox([Topic.POSE, Topic.TRACKS])
    inbox.accept_published(first.pose(), 0.0)
    first.pose()
    late = first.pose()
    inbox.accept_published(late, 0.0)
    inbox.accept_published(second.pose(), 0.0)
    assert inbox.session_id == "second" and inbox.num_sessions == 2
    assert taken(inbox) == [0, 2, 0]
    assert inbox.take_gaps() == (Gap(Topic.POSE, "first", 1, 1),)
    inbox.accept_published(late, 0.1)
    inbox.accept_answer(first.answer(Request(RequestKind.SNAPSHOT)), 0.1)
    assert inbox.session_id == "second" and taken(inbox) == []


def test_a_new_session_takes_nothing_back_that_was_delivered_live() -> None:
    first, second, inbox = Run("first"), Run("second"), Inbox([Topic.POSE], catch_up=False)
    for data in (first.pose(), first.pose(), first.status(), second.pose()):
        inbox.accept_published(data, 0.0)
    assert taken(inbox) == [0, 1, 0]
    assert inbox.num_lost[Topic.POSE] == 0 and inbox.take_gaps() == ()


def test_gaps_of_topics_that_nobody_keeps() -> None:
    run, inbox = Run(), Inbox([Topic.TRACKS])
    run.tracks()
    inbox.accept_published(run.tracks(), 0.0)
    assert inbox.take_gaps() == (), "what came before the first one was not subscribed to"
    run.tracks()
    run.tracks()
    inbox.accept_published(run.tracks(), 0.0)
    run.tracks()
    inbox.accept_published(run.status(), 0.0)
    inbox.accept_published(run.tracks(), 0.0)
    assert taken(inbox) == [1, 4, 6]
    assert inbox.take_gaps() == (Gap(Topic.TRACKS, "a", 2, 3), Gap(Topic.TRACKS, "a", 5, 5))
    assert inbox.num_lost[Topic.TRACKS] == 3 and inbox.next_request_s is None


def test_conflate_keeps_the_newest_and_knows_no_gaps() -> None:
    run, inbox = Run(), Inbox([Topic.POSE, Topic.TRACKS], conflate=True)
    assert inbox.socket_groups() == [[Topic.POSE], [Topic.TRACKS], [Topic.STATUS]]
    poses = [run.pose() for _ in range(5)]
    inbox.accept_published(run.status(), 0.0)
    for data in (poses[0], run.tracks(), poses[3], poses[4]):
        inbox.accept_published(data, 0.0)
    assert not inbox.is_full
    assert [message.header.topic for message in iter(inbox.take, None)] == [Topic.TRACKS, Topic.POSE]
    assert inbox.num_received[Topic.POSE] == 1
    assert inbox.take_gaps() == () and inbox.next_request_s is None


def test_malformed_bytes_are_counted() -> None:
    run, inbox = Run(), Inbox([Topic.POSE])
    inbox.accept_published(b"pose\0rubbish", 0.0)
    inbox.accept_answer(b"", 0.0)
    assert inbox.num_malformed == 2 and inbox.last_error is not None and inbox.last_heard_s is None
    other = Run("b")
    run.history.add(other.pose(), 0)
    inbox.accept_answer(run.answer(Request(RequestKind.SNAPSHOT)), 0.0)
    assert inbox.num_malformed == 3, "a pose of another session in a snapshot"
    with pytest.raises(ValueError, match="topics"):
        Inbox([Topic.SNAPSHOT])
    with pytest.raises(ValueError, match="topics"):
        Inbox([])
