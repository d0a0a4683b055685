"""What a consumer makes of the messages that reach it: order, losses, restarts, and what to ask for. Pure.

Poses reach a consumer on two ways, by subscription and as snapshots of what was published before. Both carry the
same messages with the same sequence numbers, so one merge makes the complete sequence of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from vo.messages import (
    PUBLISHED_TOPICS,
    Message,
    ProtocolError,
    Refusal,
    Request,
    RequestKind,
    RunState,
    Snapshot,
    StatusReport,
    Topic,
    VersionError,
    decode,
)
from vo.sequences import Gap, OrderedMerge

MAX_PENDING_POSES = 10_000
ANSWER_TIMEOUT_S = 0.5
GIVE_UP_S = 5.0
PROBE_PERIOD_S = 0.2
FIRST_RETRY_S = 0.02


@dataclass(slots=True)
class _Session:
    """What is known about one run of a publisher.

    merge         poses, in order from the first one.
    expected      next sequence number of each topic that is not merged, from the first that came.
    num_poses     poses published, as far as the publisher said; those before must come or be asked for.
    is_caught_up  the snapshot has been received up to its end, or there is none to be had.
    is_heard      a message came by subscription: from then on no loss goes unnoticed.
    end           the final state and when a snapshot told it, while the subscription may still have more.
    """

    session_id: str
    merge: OrderedMerge[Message] = field(default_factory=OrderedMerge)
    expected: dict[Topic, int] = field(default_factory=dict)
    num_poses: int = 0
    is_caught_up: bool = False
    is_heard: bool = False
    end: tuple[RunState, float] | None = None
    final_state: RunState | None = None


class Inbox:
    """Takes the bytes that arrive and hands out messages in order; times are seconds of any clock that only rises.

    num_sessions    runs seen: a rise means that the publisher was started anew.
    num_received    messages handed out, by topic.
    num_lost        messages known to be lost, by topic.
    num_malformed   messages thrown away because they broke the protocol; `last_error` says how.
    num_duplicates  messages that came more than once.
    last_heard_s    when the last message came by subscription, heartbeats included; None before the first.
    """

    def __init__(self, topics: Sequence[Topic], *, conflate: bool = False, catch_up: bool = True) -> None:
        """`conflate` keeps only the newest message of each topic; `catch_up` makes poses complete from the first."""
        self._topics = tuple(dict.fromkeys(topics))
        if not self._topics or not set(self._topics) <= set(PUBLISHED_TOPICS):
            raise ValueError(f"topics: expected some of {', '.join(topic.value for topic in PUBLISHED_TOPICS)}")
        self._conflate = conflate
        self._catches_up = catch_up and not conflate and Topic.POSE in self._topics
        self.num_sessions = 0
        self.num_received = dict.fromkeys(PUBLISHED_TOPICS, 0)
        self.num_lost = dict.fromkeys(PUBLISHED_TOPICS, 0)
        self.num_malformed = 0
        self.num_duplicates = 0
        self.last_error: str | None = None
        self.last_heard_s: float | None = None
        self._session: _Session | None = None
        self._retired: deque[str] = deque(maxlen=16)
        self._ready: deque[Message] = deque()
        self._gaps: list[Gap] = []
        self._is_farewell_taken = self._is_end_taken = False
        self._ask_s = 0.0
        self._asking_since_s: float | None = None
        self._retry_s = FIRST_RETRY_S

    @property
    def session_id(self) -> str | None:
        """The run that is being received; None before the first message."""
        return None if self._session is None else self._session.session_id

    @property
    def final_state(self) -> RunState | None:
        """How the run ended, once the publisher said so."""
        return None if self._session is None else self._session.final_state

    @property
    def is_complete(self) -> bool:
        """The run is over, and everything that will ever come from it has been handed out."""
        return self._is_over() and not self._ready

    @property
    def is_full(self) -> bool:
        """Messages wait to be handed out; one that keeps only the newest always has room."""
        return bool(self._ready) and not self._conflate

    @property
    def next_request_s(self) -> float | None:
        """When `next_request` may have something to ask; None while nothing is missing."""
        return None if self._first_wanted() is None else self._ask_s

    def socket_groups(self) -> list[list[Topic]]:
        """Topics by socket: CONFLATE keeps one message a socket, whatever its topic. The status is always needed."""
        topics = [*self._topics, *(() if Topic.STATUS in self._topics else (Topic.STATUS,))]
        return [[topic] for topic in topics] if self._conflate else [topics]

    def take(self) -> Message | None:
        """The next message."""
        if not self._ready:
            return None
        message = self._ready.popleft()
        self.num_received[message.header.topic] += 1
        return message

    def take_gaps(self) -> tuple[Gap, ...]:
        """The losses found since the last call."""
        gaps, self._gaps = tuple(self._gaps), []
        return gaps

    def take_farewell(self) -> bool:
        """True once for a run, when everything has come: the publisher need not wait any more."""
        if self._is_farewell_taken or not self._is_over():
            return False
        self._is_farewell_taken = True
        return True

    def take_end(self) -> bool:
        """True once for a run, when everything has been handed out too."""
        if self._is_end_taken or not self.is_complete:
            return False
        self._is_end_taken = True
        return True

    def accept_published(self, data: bytes, now_s: float) -> None:
        """A message that came by subscription. Raises VersionError for another major version."""
        message = self._decoded(data)
        if message is None:
            return
        header, body = message.header, message.body
        if header.session_id in self._retired:
            self.num_duplicates += 1
            return
        self.last_heard_s = now_s
        session = self._session
        if session is None or session.session_id != header.session_id:
            session = self._begin(header.session_id)
        session.is_heard = True
        if header.topic is Topic.POSE and self._catches_up:
            self._merge(session, message)
        else:
            self._deliver_live(session, message)
        if isinstance(body, StatusReport):
            self._note_status(session, body)

    def accept_answer(self, data: bytes, now_s: float) -> None:
        """An answer to a request. Raises VersionError for another major version."""
        message = self._decoded(data)
        if message is None:
            return
        self._ask_s = now_s + PROBE_PERIOD_S
        if isinstance(message.body, Refusal):
            self.last_error = f"the publisher refused a request: {message.body.reason}"
        if not isinstance(message.body, Snapshot) or message.body.of_topic is not Topic.POSE:
            return
        if self._session is None:
            self._begin(message.header.session_id)
        # Only a subscription may tell of a new run: messages of the old one may still be on their way there.
        session = self._session
        if session is not None and session.session_id == message.header.session_id:
            self._asking_since_s = None
            if self._accept_snapshot(session, message.body, now_s):
                self._ask_s = now_s

    def next_request(self, now_s: float) -> Request | None:
        """What to ask for now, if anything. Poses that nobody answers for are given up after a while."""
        if self._first_wanted() is None:
            self._asking_since_s = None
            return None
        if now_s < self._ask_s:
            return None
        session = self._session
        if session is not None and session.end is not None:
            state, end_s = session.end
            if now_s - max(end_s, self.last_heard_s or end_s) > GIVE_UP_S:
                session.final_state = state
        if session is not None and self._asking_since_s is not None and now_s - self._asking_since_s > GIVE_UP_S:
            session.is_caught_up = True
            self._asking_since_s = now_s
            self._give_up_before(session, max(session.num_poses, session.merge.end))
        first_sequence = self._first_wanted()
        return None if first_sequence is None else Request(RequestKind.SNAPSHOT, Topic.POSE, first_sequence)

    def note_request(self, now_s: float, *, was_sent: bool) -> None:
        """The request was sent, or could not be for lack of a connection, which is tried again soon at first."""
        if self._asking_since_s is None:
            self._asking_since_s = now_s
        self._ask_s = now_s + (ANSWER_TIMEOUT_S if was_sent else self._retry_s)
        self._retry_s = FIRST_RETRY_S if was_sent else min(2 * self._retry_s, ANSWER_TIMEOUT_S)

    def _decoded(self, data: bytes) -> Message | None:
        try:
            return decode(data)
        except VersionError:
            raise
        except ProtocolError as error:
            self._note_malformed(error)
        return None

    def _note_malformed(self, error: ProtocolError) -> None:
        self.num_malformed += 1
        self.last_error = str(error)

    def _is_over(self) -> bool:
        session = self._session
        if session is None or session.final_state is None:
            return False
        return not self._catches_up or session.merge.next_sequence >= session.num_poses

    def _first_wanted(self) -> int | None:
        """The first pose to ask for; None while there is nothing to ask."""
        session = self._session
        if not self._catches_up or self._is_over():
            return None
        if session is None:
            return 0
        next_sequence = session.merge.next_sequence
        is_missing = session.merge.num_pending > 0 or session.num_poses > next_sequence
        is_settled = session.is_caught_up and session.is_heard and session.end is None and not is_missing
        return None if is_settled else next_sequence

    def _begin(self, session_id: str) -> _Session:
        """A run begins; the one before it ends as it is."""
        if self._session is not None:
            self._give_up_before(self._session, max(self._session.num_poses, self._session.merge.end))
            self._retired.append(self._session.session_id)
        self._session = _Session(session_id)
        self.num_sessions += 1
        self._is_farewell_taken = self._is_end_taken = False
        self._asking_since_s, self._ask_s = None, 0.0
        return self._session

    def _merge(self, session: _Session, message: Message) -> None:
        num_duplicates = session.merge.num_duplicates
        session.merge.add(message.header.sequence, message)
        self.num_duplicates += session.merge.num_duplicates - num_duplicates
        self._ready.extend(session.merge.take())
        if session.merge.num_pending > MAX_PENDING_POSES:
            self._give_up_before(session, session.merge.end)

    def _deliver_live(self, session: _Session, message: Message) -> None:
        """A message of a topic that is taken as it comes: a loss is noted, not asked for."""
        topic, sequence = message.header.topic, message.header.sequence
        expected = session.expected.get(topic, sequence)
        if sequence < expected:
            self.num_duplicates += 1
            return
        self._note_gap(session, topic, expected, sequence)
        session.expected[topic] = sequence + 1
        if topic in self._topics:
            if self._conflate:
                self._ready = deque(waiting for waiting in self._ready if waiting.header.topic is not topic)
            self._ready.append(message)

    def _note_status(self, session: _Session, report: StatusReport) -> None:
        """What was published before the status and has not come with it is lost, or is to be asked for."""
        session.num_poses = max(session.num_poses, report.num_sent[Topic.POSE])
        if report.state.is_final:
            session.final_state = report.state
        if self._conflate:  # a socket for each topic: a status may come before what was published before it
            return
        for topic, expected in session.expected.items():
            if topic is not Topic.STATUS:
                self._note_gap(session, topic, expected, report.num_sent[topic])
                session.expected[topic] = max(expected, report.num_sent[topic])

    def _accept_snapshot(self, session: _Session, snapshot: Snapshot, now_s: float) -> bool:
        """Merges the poses of an answer; whether that brought anything."""
        next_sequence = session.merge.next_sequence
        self._give_up_before(session, min(snapshot.oldest_sequence, snapshot.num_sent))
        for data in snapshot.messages:
            # A copy: a view of one pose would keep the whole answer in memory.
            message = self._decoded(bytes(data))
            if message is None:
                continue
            if message.header.topic is Topic.POSE and message.header.session_id == session.session_id:
                self._merge(session, message)
            else:
                self._note_malformed(ProtocolError(f"a snapshot of poses holds a {message.header.topic.value}"))
        if session.merge.next_sequence >= snapshot.num_sent:
            session.is_caught_up = True
        if snapshot.state.is_final:
            session.num_poses = max(session.num_poses, snapshot.num_sent)
            session.end = session.end or (snapshot.state, now_s)
            if self._topics == (Topic.POSE,):
                session.final_state = snapshot.state
        return session.merge.next_sequence > next_sequence

    def _give_up_before(self, session: _Session, limit: int) -> None:
        """Delivers the poses before `limit` that are there and notes the others as lost."""
        self._ready.extend(session.merge.take())
        while session.merge.next_sequence < limit:
            hole = session.merge.give_up_before(limit)
            if hole is not None:
                self._note_gap(session, Topic.POSE, hole[0], hole[1] + 1)
            self._ready.extend(session.merge.take())

    def _note_gap(self, session: _Session, topic: Topic, first_sequence: int, end_sequence: int) -> None:
        if end_sequence > first_sequence and topic in self._topics and not self._conflate:
            self._gaps.append(Gap(topic, session.session_id, first_sequence, end_sequence - 1))
            self.num_lost[topic] += end_sequence - first_sequence
