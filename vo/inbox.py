"""What a consumer makes of the messages that reach it: order, losses, restarts, and what to ask for. Pure.

Poses reach a consumer on two ways, by subscription and as snapshots of what was published before. Both carry the
same messages with the same sequence numbers, so one merge makes the complete sequence of them. The map (keyframes and
points) is asked for as it is, and what is published from then on changes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from vo.map_merge import MapMerge
from vo.messages import (
    MAP_TOPICS,
    PUBLISHED_TOPICS,
    Message,
    ProtocolError,
    Refusal,
    Reply,
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
MAX_REPLIES = 256
SILENT_PERIODS = 3.0


@dataclass(slots=True)
class _Asker:
    """When to ask for what is missing of a topic, and since when nobody has answered."""

    ask_s: float = 0.0
    asking_since_s: float | None = None
    retry_s: float = FIRST_RETRY_S


@dataclass(slots=True)
class _Session:
    """What is known about one run of a publisher.

    merge         poses, in order from the first one.
    maps          keyframes and points, each complete.
    expected      next sequence number of each topic that is not merged, from the first that came.
    num_poses     poses published, as far as the publisher said; those before must come or be asked for.
    is_caught_up  the snapshot has been received up to its end, or there is none to be had.
    is_heard      a message came by subscription: from then on no loss goes unnoticed.
    end           the final state and when a snapshot told it, while the subscription may still have more.
    """

    session_id: str
    merge: OrderedMerge[Message] = field(default_factory=OrderedMerge)
    maps: dict[Topic, MapMerge] = field(default_factory=dict)
    expected: dict[Topic, int] = field(default_factory=dict)
    num_poses: int = 0
    is_caught_up: bool = False
    is_heard: bool = False
    end: tuple[RunState, float] | None = None
    final_state: RunState | None = None


class Inbox:
    """Takes the bytes that arrive and hands out messages in order; times are seconds of any clock that only rises.

    topics          what is handed out.
    num_sessions    runs seen: a rise means that the publisher was started anew.
    num_received    messages handed out, by topic.
    num_lost        messages known to be lost, by topic.
    num_malformed   messages thrown away because they broke the protocol; `last_error` says how.
    num_duplicates  messages that came more than once.
    num_refused     requests that the publisher refused; `last_error` says why.
    last_heard_s    when the last message came by subscription, heartbeats included; None before the first.
    heartbeat_hz    how often the publisher makes itself heard, as it says.
    """

    def __init__(self, topics: Sequence[Topic], *, conflate: bool = False, catch_up: bool = True) -> None:
        """`conflate` keeps only the newest message of each topic; `catch_up` makes poses and map complete."""
        self.topics = tuple(dict.fromkeys(topics))
        if not self.topics or not set(self.topics) <= set(PUBLISHED_TOPICS):
            raise ValueError(f"topics: expected some of {', '.join(topic.value for topic in PUBLISHED_TOPICS)}")
        self._conflate = conflate
        catches_up = catch_up and not conflate
        self._catches_up = catches_up and Topic.POSE in self.topics
        self._map_topics = tuple(topic for topic in self.topics if topic in MAP_TOPICS) if catches_up else ()
        self.num_sessions = 0
        self.num_received = dict.fromkeys(PUBLISHED_TOPICS, 0)
        self.num_lost = dict.fromkeys(PUBLISHED_TOPICS, 0)
        self.num_malformed = 0
        self.num_duplicates = 0
        self.num_refused = 0
        self.last_error: str | None = None
        self.last_heard_s: float | None = None
        self.heartbeat_hz = 1.0
        self._session: _Session | None = None
        self._retired: deque[str] = deque(maxlen=16)
        self._ready: deque[Message] = deque()
        self._gaps: list[Gap] = []
        self._is_farewell_taken = self._is_end_taken = False
        self._replies: deque[Reply | Refusal] = deque(maxlen=MAX_REPLIES)
        self._askers: dict[Topic, _Asker] = {}
        self._renew_askers()

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
        times_s = [asker.ask_s for topic, asker in self._askers.items() if self._wanted(topic) is not None]
        return min(times_s, default=None)

    def socket_groups(self) -> list[list[Topic]]:
        """Topics by socket: CONFLATE keeps one message a socket, whatever its topic. The status is always needed."""
        topics = [*self.topics, *(() if Topic.STATUS in self.topics else (Topic.STATUS,))]
        return [[topic] for topic in topics] if self._conflate else [topics]

    def take(self) -> Message | None:
        """The next message."""
        if not self._ready:
            return None
        message = self._ready.popleft()
        self.num_received[message.header.topic] += 1
        return message

    def is_silent(self, now_s: float) -> bool:
        """Nothing has been heard for three heartbeats: the publisher may be dead, or out of reach."""
        return self.last_heard_s is None or now_s - self.last_heard_s > SILENT_PERIODS / max(self.heartbeat_hz, 1e-3)

    def take_reply(self, tag: int) -> Reply | Refusal | None:
        """The answer to the request with this tag, if it has come; it is forgotten then."""
        for reply in self._replies:
            if reply.tag == tag:
                self._replies.remove(reply)
                return reply
        return None

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
        elif header.topic in session.maps:
            self._accept_update(session.maps[header.topic], message)
        else:
            self._deliver_live(session, message)
        if isinstance(body, StatusReport):
            self._note_status(session, body)

    def accept_answer(self, data: bytes, now_s: float) -> None:
        """An answer to a request. Raises VersionError for another major version."""
        message = self._decoded(data)
        if message is None:
            return
        if isinstance(message.body, Reply | Refusal):
            self._note_reply(message.body)
            return
        if not isinstance(message.body, Snapshot) or message.body.of_topic not in self._askers:
            return
        asker = self._askers[message.body.of_topic]
        asker.ask_s = now_s + PROBE_PERIOD_S
        if self._session is None:
            self._begin(message.header.session_id)
            asker = self._askers[message.body.of_topic]
        # Only a subscription may tell of a new run: messages of the old one may still be on their way there.
        session = self._session
        if session is not None and session.session_id == message.header.session_id:
            asker.asking_since_s = None
            if self._accept_snapshot(session, message.body, now_s):
                asker.ask_s = now_s

    def next_request(self, now_s: float) -> Request | None:
        """What to ask for now, if anything. What nobody answers for is given up after a while."""
        # The topic that has waited longest comes first: a long map must not keep the others waiting.
        for topic, asker in sorted(self._askers.items(), key=lambda item: item[1].ask_s):
            if self._wanted(topic) is None:
                asker.asking_since_s = None
                continue
            if now_s < asker.ask_s:
                continue
            self._give_up_if_unanswered(topic, asker, now_s)
            request = self._wanted(topic)
            if request is not None:
                return request
        return None

    def note_request(self, request: Request, now_s: float, *, was_sent: bool) -> None:
        """The request was sent, or could not be for lack of a connection, which is tried again soon at first."""
        asker = self._askers[request.topic]
        if asker.asking_since_s is None:
            asker.asking_since_s = now_s
        asker.ask_s = now_s + (ANSWER_TIMEOUT_S if was_sent else asker.retry_s)
        asker.retry_s = FIRST_RETRY_S if was_sent else min(2 * asker.retry_s, ANSWER_TIMEOUT_S)

    def _give_up_if_unanswered(self, topic: Topic, asker: _Asker, now_s: float) -> None:
        session = self._session
        if session is None:
            return
        if topic is Topic.POSE and session.end is not None:
            state, end_s = session.end
            if now_s - max(end_s, self.last_heard_s or end_s) > GIVE_UP_S:
                session.final_state = state
        if asker.asking_since_s is None or now_s - asker.asking_since_s <= GIVE_UP_S:
            return
        asker.asking_since_s = now_s
        if topic is Topic.POSE:
            session.is_caught_up = True
            self._give_up_before(session, max(session.num_poses, session.merge.end))
        else:
            messages, lost = session.maps[topic].give_up()
            self._ready.extend(messages)
            if lost is not None:
                self._note_gap(session, topic, *lost)

    def _renew_askers(self) -> None:
        topics = (*((Topic.POSE,) if self._catches_up else ()), *self._map_topics)
        self._askers = {topic: _Asker() for topic in topics}

    def _note_reply(self, reply: Reply | Refusal) -> None:
        self._replies.append(reply)
        if isinstance(reply, Refusal):
            self.num_refused += 1
            self.last_error = f"the publisher refused a request: {reply.reason}"

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
        if not all(merge.is_settled for merge in session.maps.values()):
            return False
        return not self._catches_up or session.merge.next_sequence >= session.num_poses

    def _wanted(self, topic: Topic) -> Request | None:
        """What to ask for of a topic; None while nothing of it is missing."""
        if topic in self._map_topics:
            start = (0, 0) if self._session is None else self._session.maps[topic].wanted
            if start is None:
                return None
            return Request(RequestKind.SNAPSHOT, topic, first_segment=start[0], first_id=start[1])
        first_sequence = self._first_wanted_pose()
        return None if first_sequence is None else Request(RequestKind.SNAPSHOT, topic, first_sequence)

    def _first_wanted_pose(self) -> int | None:
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
            if self._catches_up:
                self._give_up_before(self._session, max(self._session.num_poses, self._session.merge.end))
            self._retired.append(self._session.session_id)
        self._session = _Session(session_id, maps={topic: MapMerge() for topic in self._map_topics})
        self.num_sessions += 1
        self._is_farewell_taken = self._is_end_taken = False
        self._renew_askers()
        return self._session

    def _merge(self, session: _Session, message: Message) -> None:
        num_duplicates = session.merge.num_duplicates
        session.merge.add(message.header.sequence, message)
        self.num_duplicates += session.merge.num_duplicates - num_duplicates
        self._ready.extend(session.merge.take())
        if session.merge.num_pending > MAX_PENDING_POSES:
            self._give_up_before(session, session.merge.end)

    def _accept_update(self, merge: MapMerge, message: Message) -> None:
        num_duplicates = merge.num_duplicates
        self._ready.extend(merge.add(message))
        self.num_duplicates += merge.num_duplicates - num_duplicates

    def _deliver_live(self, session: _Session, message: Message) -> None:
        """A message of a topic that is taken as it comes: a loss is noted, not asked for."""
        topic, sequence = message.header.topic, message.header.sequence
        expected = session.expected.get(topic, sequence)
        if sequence < expected:
            self.num_duplicates += 1
            return
        self._note_gap(session, topic, expected, sequence)
        session.expected[topic] = sequence + 1
        if topic in self.topics:
            if self._conflate:
                self._ready = deque(waiting for waiting in self._ready if waiting.header.topic is not topic)
            self._ready.append(message)

    def _note_status(self, session: _Session, report: StatusReport) -> None:
        """What was published before the status and has not come with it is lost, or is to be asked for."""
        self.heartbeat_hz = report.heartbeat_hz
        session.num_poses = max(session.num_poses, report.num_sent[Topic.POSE])
        for topic, merge in session.maps.items():
            merge.note_sent(report.num_sent[topic])
        if report.state.is_final:
            session.final_state = report.state
        if self._conflate:  # a socket for each topic: a status may come before what was published before it
            return
        for topic, expected in session.expected.items():
            if topic is not Topic.STATUS:
                self._note_gap(session, topic, expected, report.num_sent[topic])
                session.expected[topic] = max(expected, report.num_sent[topic])

    def _accept_snapshot(self, session: _Session, snapshot: Snapshot, now_s: float) -> bool:
        """Merges the messages of an answer; whether that brought anything."""
        if snapshot.of_topic is not Topic.POSE:
            return self._accept_page(session, snapshot)
        next_sequence = session.merge.next_sequence
        self._give_up_before(session, min(snapshot.oldest_sequence, snapshot.num_sent))
        for message in self._messages_of(session, snapshot):
            self._merge(session, message)
        if session.merge.next_sequence >= snapshot.num_sent:
            session.is_caught_up = True
        if snapshot.state.is_final:
            session.num_poses = max(session.num_poses, snapshot.num_sent)
            session.end = session.end or (snapshot.state, now_s)
            if self.topics == (Topic.POSE,):
                session.final_state = snapshot.state
        return session.merge.next_sequence > next_sequence

    def _accept_page(self, session: _Session, snapshot: Snapshot) -> bool:
        merge = session.maps[snapshot.of_topic]
        before = merge.wanted
        self._ready.extend(merge.add_page(snapshot, self._messages_of(session, snapshot)))
        return merge.wanted != before

    def _messages_of(self, session: _Session, snapshot: Snapshot) -> list[Message]:
        messages = []
        for data in snapshot.messages:
            # A copy: a view of one message would keep the whole answer in memory.
            message = self._decoded(bytes(data))
            if message is None:
                continue
            if message.header.topic is snapshot.of_topic and message.header.session_id == session.session_id:
                messages.append(message)
            else:
                topics = f"{snapshot.of_topic.value} holds a {message.header.topic.value}"
                self._note_malformed(ProtocolError(f"a snapshot of {topics}"))
        return messages

    def _give_up_before(self, session: _Session, limit: int) -> None:
        """Delivers the poses before `limit` that are there and notes the others as lost."""
        self._ready.extend(session.merge.take())
        while session.merge.next_sequence < limit:
            hole = session.merge.give_up_before(limit)
            if hole is not None:
                self._note_gap(session, Topic.POSE, hole[0], hole[1] + 1)
            self._ready.extend(session.merge.take())

    def _note_gap(self, session: _Session, topic: Topic, first_sequence: int, end_sequence: int) -> None:
        if end_sequence > first_sequence and topic in self.topics and not self._conflate:
            self._gaps.append(Gap(topic, session.session_id, first_sequence, end_sequence - 1))
            self.num_lost[topic] += end_sequence - first_sequence
