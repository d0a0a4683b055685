"""Receives what a run publishes, and steers it. Needs numpy, pyzmq and msgpack, and neither torch nor OpenCV.

    with Client("tcp://127.0.0.1:5570") as client:
        for pose in client.poses():
            print(pose.frame_index, pose.T_world_camera)

docs/PROTOCOL.md is the specification; what is missing, and in which order things come, is vo/inbox.py's matter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from vo.endpoints import DEFAULT_ENDPOINT, request_endpoint
from vo.inbox import ANSWER_TIMEOUT_S, Inbox
from vo.keys import ClientKeys
from vo.messages import (
    CompressedImage,
    KeyframeUpdate,
    Message,
    PointsUpdate,
    Refusal,
    Reply,
    Request,
    RequestKind,
    RunState,
    ScaleQuantity,
    ScaleReading,
    StatusReport,
    Topic,
    VersionError,
    encode_request,
)
from vo.sequences import Gap
from vo.types import Camera, ConfigError, FrameTracks, PoseEstimate, TrackingStatus, VoError
from vo.wire import MAX_MESSAGE_BYTES

__all__ = [
    "DEFAULT_ENDPOINT",
    "Camera",
    "Client",
    "ClientKeys",
    "CompressedImage",
    "FrameTracks",
    "Gap",
    "KeyframeUpdate",
    "Message",
    "NoAnswerError",
    "PointsUpdate",
    "PoseEstimate",
    "RefusedError",
    "RunState",
    "ScaleQuantity",
    "ScaleReading",
    "StatusReport",
    "Topic",
    "TrackingStatus",
    "VersionError",
]

RECEIVE_HWM = 256
RECONNECT_MS = 100
GOODBYE_LINGER_MS = 100
MAX_DRAINED = 256
RETRY_S = 0.02
# How long messages that wait are handed out before the sockets are looked at again.
WORK_PERIOD_S = 0.01

_PROBLEMS = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the publisher does not let this key in (clients/ in its directory of keys)",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one side has keys and the other has none (--key and --server-key)",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the publisher broke the connection off (is --server-key its key?)",
}


class RefusedError(VoError):
    """A request that the publisher refused, with its reason."""


class NoAnswerError(VoError):
    """A request that nobody answered in time."""


class Client:
    """Receives messages of one publisher, one by one; reconnects by itself, also to a publisher that starts later.

    With `catch_up`, poses come complete and in order from the first one of the run, and keyframes and points as the
    whole map and then its changes: what was published before is asked for, and so is whatever got lost. With
    `conflate`, of every topic only the newest message is kept: for consumers that want to be current and nothing else.
    To be used from one thread.

    inbox  what was received, lost and thrown away so far.
    connection_problem   why the publisher does not talk to us, as far as is known; None where it does.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        topics: Sequence[Topic] = (Topic.POSE,),
        *,
        conflate: bool = False,
        catch_up: bool = True,
        keys: ClientKeys | None = None,
    ) -> None:
        """Connects to `endpoint`. Raises ConfigError for a bad address or key; whether anybody is there shows later."""
        answers_endpoint = request_endpoint(endpoint)
        self.inbox = Inbox(topics, conflate=conflate, catch_up=catch_up)
        self.connection_problem: str | None = None
        self._endpoint, self._num_requests = endpoint, 0
        self._worked_s = 0.0
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        try:
            self._subscriptions = [self._subscription(group, conflate) for group in self.inbox.socket_groups()]
            self._dealer = self._context.socket(zmq.DEALER)
            # Requests are for a publisher that is there, not to be queued for the next one.
            self._dealer.immediate = True
            self._monitor = self._dealer.get_monitor_socket(sum(_PROBLEMS))
            self._poller.register(self._monitor, zmq.POLLIN)
            for socket in (*self._subscriptions, self._dealer):
                _configure(socket, keys)
                self._poller.register(socket, zmq.POLLIN)
                socket.connect(answers_endpoint if socket is self._dealer else endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"{endpoint}: cannot be connected to ({error.strerror})") from error
        except VoError:
            self._context.destroy(linger=0)
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def session_id(self) -> str | None:
        """The run that is being received; it changes when the publisher is started anew. None before the first."""
        return self.inbox.session_id

    @property
    def is_silent(self) -> bool:
        """Nothing has been heard for three heartbeats: the publisher may be dead. Only rises while one receives."""
        return self.inbox.is_silent(time.monotonic())

    def take_gaps(self) -> tuple[Gap, ...]:
        """The losses found since the last call."""
        return self.inbox.take_gaps()

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None when none came in time, and once when the run is over.

        Raises VersionError where the publisher speaks another major version.
        """
        start_s = time.monotonic()
        deadline_s = None if timeout_s is None else start_s + timeout_s
        if start_s - self._worked_s >= WORK_PERIOD_S or timeout_s == 0:
            ready = self._poller.poll(0)
        else:
            # Whatever came with the last message is taken as it is: the sockets as a whole are looked at less often.
            self._drain_published()
            self._say_goodbye_if_complete()
            message = self.inbox.take()
            if message is not None:
                return message
            if self.inbox.take_end():
                return None
            ready = self._wait(deadline_s, start_s)
        while True:
            now_s = self._work(ready)
            message = self.inbox.take()
            if message is not None:
                return message
            if self.inbox.take_end():
                return None
            if deadline_s is not None and now_s >= deadline_s:
                return None
            ready = self._wait(deadline_s, now_s)

    def messages(self, timeout_s: float | None = None) -> Iterator[Message]:
        """Messages until the run is over and everything has come, or none comes for `timeout_s`."""
        while (message := self.receive(timeout_s)) is not None:
            yield message

    def poses(self, timeout_s: float | None = None) -> Iterator[PoseEstimate]:
        """The poses among `messages`, also those of lost frames, which have none. Raises ValueError if not received."""
        self._check_receives(Topic.POSE)
        return (message.body for message in self.messages(timeout_s) if isinstance(message.body, PoseEstimate))

    def tracks(self, timeout_s: float | None = None) -> Iterator[FrameTracks]:
        """The tracks among `messages`. Raises ValueError where this client does not receive them."""
        self._check_receives(Topic.TRACKS)
        return (message.body for message in self.messages(timeout_s) if isinstance(message.body, FrameTracks))

    def wait_for_fresh(
        self, topic: Topic = Topic.POSE, max_age_s: float = 0.2, timeout_s: float | None = None
    ) -> Message | None:
        """The newest message of a topic, published at most `max_age_s` ago; all older ones are thrown away.

        None when none came in time, or the run is over. Both clocks must agree where publisher and client are two
        machines.
        """
        self._check_receives(topic)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            message = self.receive(left_s)
            newest = None
            while message is not None:
                newest = message if message.header.topic is topic else newest
                message = self.receive(0)
            if newest is not None and time.time_ns() - newest.header.publish_time_ns <= max_age_s * 1e9:
                return newest
            if self.inbox.is_complete or (deadline_s is not None and time.monotonic() >= deadline_s):
                return None

    def ping(self, timeout_s: float = 1.0) -> float:
        """Seconds until the publisher's answer is here. Raises NoAnswerError."""
        start_s = time.monotonic()
        self._ask(RequestKind.PING, timeout_s)
        return time.monotonic() - start_s

    def stop(self, timeout_s: float = 1.0) -> None:
        """Ends the run as Ctrl-C would. Raises RefusedError and NoAnswerError."""
        self._ask(RequestKind.STOP, timeout_s)

    def send_scale(self, reading: ScaleReading) -> bool:
        """Sends a reading and waits for nothing; whether it is on its way: without a connection it is not.

        Only a refusal is answered; it counts in `inbox.num_refused` when more is received; `inbox.last_error` says why.
        """
        return self._send(Request(RequestKind.SCALE, scale=reading, tag=self._next_tag()))

    def send_speed(self, speed_m_s: float, timestamp_ns: int | None = None) -> bool:
        """Sends the present speed, m/s, to a run with the external scale source; times are on the frames' clock."""
        return self.send_scale(ScaleReading(ScaleQuantity.SPEED, speed_m_s, timestamp_ns))

    def send_distance(self, distance_m: float, start_timestamp_ns: int, timestamp_ns: int | None = None) -> bool:
        """Sends the length of the way between two times, m, like `send_speed`."""
        return self.send_scale(ScaleReading(ScaleQuantity.DISTANCE, distance_m, timestamp_ns, start_timestamp_ns))

    def close(self) -> None:
        """Closes the connections; safe to call twice."""
        if self._context.closed:
            return
        self._send(Request(RequestKind.GOODBYE))
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=GOODBYE_LINGER_MS)
        for socket in self._subscriptions:
            socket.close(linger=0)
        self._context.term()

    def _subscription(self, topics: Sequence[Topic], conflate: bool) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.SUB)
        if conflate:
            socket.conflate = True
        socket.rcvhwm = RECEIVE_HWM
        for topic in topics:
            socket.subscribe(topic.prefix)
        return socket

    def _check_receives(self, topic: Topic) -> None:
        if topic not in self.inbox.topics:
            raise ValueError(f"this client does not receive {topic.value}; give it in topics")

    def _next_tag(self) -> int:
        self._num_requests += 1
        return self._num_requests

    def _send(self, request: Request) -> bool:
        """Whether the request is on its way: without a connection it is not."""
        try:
            self._dealer.send(encode_request(request), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _ask(self, kind: RequestKind, timeout_s: float) -> Reply:
        """Sends a request until it is on its way, and waits for the answer."""
        deadline_s = time.monotonic() + timeout_s
        request, send_s = Request(kind, tag=self._next_tag()), 0.0
        while True:
            now_s = self._work(self._poller.poll(0))
            if now_s >= send_s:  # an answer may get lost, and what is asked for here may be asked twice
                send_s = now_s + (ANSWER_TIMEOUT_S if self._send(request) else RETRY_S)
            answer = self.inbox.take_reply(request.tag)
            if isinstance(answer, Refusal):
                raise RefusedError(f"{self._endpoint}: {answer.reason}")
            if answer is not None:
                return answer
            if now_s >= deadline_s:
                problem = f": {self.connection_problem}" if self.connection_problem else ""
                raise NoAnswerError(f"{self._endpoint}: no answer to {kind.value} within {timeout_s:g} s{problem}")
            self._dealer.poll(max(0, int((min(deadline_s, send_s) - now_s) * 1000) + 1))

    def _work(self, ready: list[tuple[Any, int]]) -> float:
        """Takes what has arrived on the sockets that are ready, and asks for what is missing; the time when it did."""
        self._drain(ready)
        now_s = self._worked_s = time.monotonic()
        request = self.inbox.next_request(now_s)
        if request is not None:
            self.inbox.note_request(request, now_s, was_sent=self._send(request))
        self._say_goodbye_if_complete()
        return now_s

    def _say_goodbye_if_complete(self) -> None:
        """Before the end is handed out: nobody may receive again then, and the publisher waits for this."""
        if self.inbox.take_farewell():
            self._send(Request(RequestKind.GOODBYE))

    def _wait(self, deadline_s: float | None, now_s: float) -> list[tuple[Any, int]]:
        """Until something arrives, or there is something to ask; the sockets that are ready then."""
        limits_s = [limit_s for limit_s in (deadline_s, self.inbox.next_request_s) if limit_s is not None]
        return self._poller.poll(max(0, int((min(limits_s) - now_s) * 1000) + 1) if limits_s else None)

    def _drain(self, ready: list[tuple[Any, int]]) -> None:
        """Takes what has arrived; published messages stay in the sockets while others wait to be handed out."""
        for socket, _ in ready:
            if socket is self._monitor:
                self.connection_problem = _PROBLEMS.get(recv_monitor_message(self._monitor)["event"])
            elif socket is self._dealer:
                self._drain_answers()
        self._drain_published()
        if not self.is_silent:
            self.connection_problem = None

    def _drain_answers(self) -> None:
        for _ in range(MAX_DRAINED):
            if not _has_message(self._dealer):
                return
            self.inbox.accept_answer(self._dealer.recv(zmq.NOBLOCK), time.monotonic())

    def _drain_published(self) -> None:
        """Takes published messages until one can be handed out: a pose does not wait until the tracks are decoded."""
        for socket in self._subscriptions:
            for _ in range(MAX_DRAINED):
                if self.inbox.is_full or not _has_message(socket):
                    break
                self.inbox.accept_published(socket.recv(zmq.NOBLOCK), time.monotonic())


def _has_message(socket: zmq.Socket[bytes]) -> bool:
    """Asking first costs less than the exception of a socket that is empty."""
    return bool(cast(int, socket.get(zmq.EVENTS)) & zmq.POLLIN)


def _configure(socket: zmq.Socket[bytes], keys: ClientKeys | None) -> None:
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.reconnect_ivl = RECONNECT_MS
    if keys is None:
        return
    try:
        socket.curve_publickey, socket.curve_secretkey = keys.own.public, keys.own.secret
        socket.curve_serverkey = keys.server
    except zmq.ZMQError as error:
        raise ConfigError("--key, --server-key: these files hold no valid keys; `vo keys DIR` makes them") from error
