"""Publishes poses and tracks on ZeroMQ sockets, and receives them. The only module that imports zmq.

A publisher binds two ports: messages go out on the first as they come (PUB), and on the next one (ROUTER) a consumer
asks for those it missed. docs/PROTOCOL.md is the specification.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Sequence
from ipaddress import AddressValueError, IPv4Address
from typing import TYPE_CHECKING

import zmq

from vo.inbox import Inbox
from vo.message_stream import EncodedMessage, MessageSource, final_state
from vo.messages import (
    LOGGED_TOPICS,
    MAX_REQUEST_BYTES,
    MAX_SNAPSHOT_MESSAGES,
    Body,
    Message,
    ProtocolError,
    Refusal,
    Request,
    RequestKind,
    RunState,
    Snapshot,
    Topic,
    decode_request,
    encode,
    encode_request,
)
from vo.sequences import History
from vo.types import ConfigError, VoError
from vo.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:  # the configuration of the frontends imports torch, which a program that only listens can do without
    from vo.config import PublisherConfig

SNAPSHOT_BYTES = 1024 * 1024
SNAPSHOT_QUEUE = 8
MAX_WAITED_FOR = 256
MAX_BIND_ATTEMPTS = 50

RECEIVE_HWM = 256
RECONNECT_MS = 100
GOODBYE_LINGER_MS = 100
MAX_DRAINED = 256


class PublishError(VoError):
    """An address that cannot be bound: names it and the remedy."""


# --- addresses ---


def snapshot_endpoint(endpoint: str) -> str:
    """Where the publisher of `endpoint` answers requests: the next port. Raises ConfigError for a bad address."""
    host, port = _parsed(endpoint)
    if port is None:
        raise ConfigError(f"{endpoint}: a port is needed to connect to, as in tcp://127.0.0.1:5570")
    return f"tcp://{host}:{port + 1}"


def _parsed(endpoint: str) -> tuple[str, int | None]:
    """Host and port of an address; None for any free port."""
    match = re.fullmatch(r"tcp://([A-Za-z0-9._*-]+):(\d{1,5}|\*)", endpoint)
    if match is None:
        raise ConfigError(f"{endpoint}: no address of a publisher; give tcp://127.0.0.1:PORT")
    port = None if match[2] == "*" else int(match[2])
    if port is not None and not 1 <= port <= 65534:
        raise ConfigError(f"{endpoint}: the port must be in 1..65534, since the next one is used too")
    return ("127.0.0.1" if match[1] == "localhost" else match[1]), port


def _parsed_loopback(endpoint: str) -> tuple[str, int | None]:
    """Like `_parsed`, for binding: refuses what other machines could reach."""
    host, port = _parsed(endpoint)
    try:
        is_loopback = IPv4Address(host).is_loopback
    except AddressValueError:
        is_loopback = False
    if not is_loopback:
        raise ConfigError(
            f"{endpoint}: refused, for other machines could read it without encryption; "
            "bind tcp://127.0.0.1:PORT and forward that port and the next one (ssh -L), or use --publish off"
        )
    return host, port


def _bind(publisher: zmq.Socket[bytes], router: zmq.Socket[bytes], endpoint: str) -> str:
    """Binds both sockets to neighbouring ports; returns the address of the first."""
    host, port = _parsed_loopback(endpoint)
    if port is not None:
        _bind_one(publisher, f"tcp://{host}:{port}")
        _bind_one(router, f"tcp://{host}:{port + 1}")
        return f"tcp://{host}:{port}"
    for _ in range(MAX_BIND_ATTEMPTS):
        _bind_one(publisher, f"tcp://{host}:*")
        bound = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        try:
            router.bind(snapshot_endpoint(bound))
        except (zmq.ZMQError, ConfigError):
            publisher.unbind(bound)
        else:
            return bound
    raise PublishError(f"{endpoint}: found no two free ports that are neighbours; give a port or --publish off")


def _bind_one(socket: zmq.Socket[bytes], address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror})"
        raise PublishError(f"{address} {reason}; use --publish tcp://127.0.0.1:PORT or --publish off") from error


# --- publisher ---


class Publisher:
    """The sockets of one run: what its stream says goes out, and what consumers missed is answered. Nothing here waits.

    A thread of its own keeps the heart of the stream beating and answers requests.

    endpoint     the address that was bound.
    session_id   names this run.
    num_refused  requests that were malformed or could not be served.
    """

    def __init__(self, config: PublisherConfig, stream: MessageSource) -> None:
        """Binds `config.endpoint`. Raises ConfigError and PublishError, each in one line with the remedy."""
        if config.endpoint == "off":
            raise ValueError("endpoint: off means that there is no publisher")
        self._config, self.stream = config, stream
        self._histories = {topic: History(1) for topic in LOGGED_TOPICS}
        self._histories[Topic.POSE] = History(config.max_snapshot_poses)
        self.num_refused = 0
        self._num_answers = 0
        self._lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._is_closed = False
        self._close_deadline_s: float | None = None
        self._context = zmq.Context()
        try:
            self._open_sockets()
        except (VoError, zmq.ZMQError):
            self._context.destroy(linger=0)
            raise
        stream.add_consumer(self._send)
        self._thread = threading.Thread(target=self._serve, name="publisher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(final_state(error_type))

    @property
    def session_id(self) -> str:
        return self.stream.session_id

    def close(self, state: RunState = RunState.FINISHED) -> None:
        """Finishes the stream and ends within the configured linger; safe to call twice.

        Consumers that asked for a snapshot are waited for until they have everything and say goodbye. A final state
        that was published before is kept.
        """
        with self._close_lock:
            if self._is_closed:
                return
            self.stream.finish(state)
            self._is_closed = True
        deadline_s = time.monotonic() + self._config.linger_ms / 1000
        self._close_deadline_s = deadline_s
        self._waker.send(b"")
        self._thread.join()
        self.stream.remove_consumer(self._send)
        remaining_ms = max(0, int((deadline_s - time.monotonic()) * 1000))
        self._waker.close(linger=0)
        self._publisher.close(linger=remaining_ms)
        self._router.close(linger=remaining_ms)
        self._context.term()

    def _open_sockets(self) -> None:
        self._publisher = self._context.socket(zmq.PUB)
        self._publisher.set_hwm(self._config.send_hwm)
        self._publisher.maxmsgsize = MAX_REQUEST_BYTES  # of what consumers send: their subscriptions
        self._router = self._context.socket(zmq.ROUTER)
        self._router.sndhwm = SNAPSHOT_QUEUE
        self._router.maxmsgsize = MAX_REQUEST_BYTES
        self.endpoint = _bind(self._publisher, self._router, self._config.endpoint)
        # A socket pair inside the process ends the wait of the thread at once, where an event could not.
        self._waker = self._context.socket(zmq.PAIR)
        self._wakened = self._context.socket(zmq.PAIR)
        self._waker.bind("inproc://waker")
        self._wakened.connect("inproc://waker")

    def _send(self, message: EncodedMessage) -> None:
        """Sends and keeps one message of the stream, which calls this from one thread at a time."""
        self._publisher.send(message.data, zmq.NOBLOCK)
        with self._lock:
            if message.topic in self._histories:
                self._histories[message.topic].add(message.data, message.sequence)

    def _serve(self) -> None:
        """The thread: heartbeats and answers until the run is closed and nobody is waited for any more."""
        with self._wakened:  # left open, it would keep `close` waiting, whatever happened here
            self._serve_until_closed()

    def _serve_until_closed(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wakened, zmq.POLLIN)
        waited_for: dict[bytes, None] = {}
        while True:
            now_s, deadline_s = time.monotonic(), self._close_deadline_s
            if deadline_s is not None and (not waited_for or now_s >= deadline_s):
                break
            wait_s = self.stream.beat_if_due()
            if deadline_s is not None:
                wait_s = min(wait_s, deadline_s - now_s)
            events = dict(poller.poll(max(0, int(wait_s * 1000) + 1)))
            if self._wakened in events:
                self._wakened.recv()
            if self._router in events:
                self._answer(self._router.recv_multipart(), waited_for)

    def _answer(self, parts: list[bytes], waited_for: dict[bytes, None]) -> None:
        """Answers one request: the sender's identity, with or without an empty part (REQ, DEALER), and the request."""
        envelope = parts[:-1]
        if not (len(envelope) == 1 or (len(envelope) == 2 and not envelope[1])):
            self.num_refused += 1
            return
        try:
            request = decode_request(parts[-1])
            if request.kind is RequestKind.GOODBYE:
                waited_for.pop(envelope[0], None)
                return
            answer = self._snapshot(request)
        except ProtocolError as error:
            self.num_refused += 1
            answer = self._encode_answer(Topic.REFUSAL, Refusal(str(error)[:200]))
        else:
            waited_for[envelope[0]] = None
            if len(waited_for) > MAX_WAITED_FOR:
                del waited_for[next(iter(waited_for))]
        self._router.send_multipart([*envelope, answer], zmq.NOBLOCK)

    def _snapshot(self, request: Request) -> bytes:
        """As many of the requested messages as go into one answer."""
        if request.topic not in self._histories:
            kept = ", ".join(topic.value for topic in self._histories)
            raise ProtocolError(f"topic: {request.topic.value} is not kept; ask for {kept}")
        with self._lock:
            history = self._histories[request.topic]
            messages = history.take(request.first_sequence, MAX_SNAPSHOT_MESSAGES, SNAPSHOT_BYTES)
            oldest_sequence, end_sequence = history.oldest_sequence, history.end_sequence
            state = self.stream.state
        return self._encode_answer(
            Topic.SNAPSHOT, Snapshot(request.topic, oldest_sequence, end_sequence, state, messages)
        )

    def _encode_answer(self, topic: Topic, body: Body) -> bytes:
        self._num_answers += 1
        return encode(Message(self.stream.answer_header(topic, self._num_answers - 1), body))


# --- subscriber ---


class Subscriber:
    """Receives messages of one publisher, one by one; reconnects by itself, also to a publisher that starts later.

    With `catch_up`, poses come complete and in order from the first one of the run: what was published before is
    asked for, and so is whatever got lost. With `conflate`, of every topic only the newest message is kept: for
    consumers that want to be current and nothing else.

    inbox  what was received, lost and thrown away so far.
    """

    def __init__(
        self,
        endpoint: str,
        topics: Sequence[Topic] = (Topic.POSE,),
        *,
        conflate: bool = False,
        catch_up: bool = True,
    ) -> None:
        """Connects to `endpoint`. Raises ConfigError for a bad address; whether anybody is there shows later."""
        answers_endpoint = snapshot_endpoint(endpoint)
        self.inbox = Inbox(topics, conflate=conflate, catch_up=catch_up)
        self._context = zmq.Context()
        self._subscriptions = [self._subscription(group, conflate) for group in self.inbox.socket_groups()]
        self._dealer = self._context.socket(zmq.DEALER)
        # Requests are for a publisher that is there, not to be queued for the next one.
        self._dealer.immediate = True
        self._dealer.reconnect_ivl = RECONNECT_MS
        self._dealer.maxmsgsize = MAX_MESSAGE_BYTES
        self._poller = zmq.Poller()
        try:
            for socket in (*self._subscriptions, self._dealer):
                self._poller.register(socket, zmq.POLLIN)
                socket.connect(answers_endpoint if socket is self._dealer else endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"{endpoint}: cannot be connected to ({error.strerror})") from error

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None when none came in time, and once when the run is over.

        Raises VersionError where the publisher speaks another major version.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._drain()
            now_s = time.monotonic()
            request = self.inbox.next_request(now_s)
            if request is not None:
                self.inbox.note_request(now_s, was_sent=self._send(request))
            if self.inbox.take_farewell():
                self._send(Request(RequestKind.GOODBYE))
            message = self.inbox.take()
            if message is not None:
                return message
            if self.inbox.take_end():
                return None
            if deadline_s is not None and now_s >= deadline_s:
                return None
            limits_s = [limit_s for limit_s in (deadline_s, self.inbox.next_request_s) if limit_s is not None]
            self._poller.poll(max(0, int((min(limits_s) - now_s) * 1000) + 1) if limits_s else None)

    def close(self) -> None:
        """Closes the connections; safe to call twice."""
        if self._context.closed:
            return
        self._send(Request(RequestKind.GOODBYE))
        self._dealer.close(linger=GOODBYE_LINGER_MS)
        for socket in self._subscriptions:
            socket.close(linger=0)
        self._context.term()

    def _subscription(self, topics: Sequence[Topic], conflate: bool) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.SUB)
        if conflate:
            socket.conflate = True
        socket.rcvhwm = RECEIVE_HWM
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        socket.reconnect_ivl = RECONNECT_MS
        for topic in topics:
            socket.subscribe(topic.prefix)
        return socket

    def _send(self, request: Request) -> bool:
        """Whether the request is on its way: without a connection it is not."""
        try:
            self._dealer.send(encode_request(request), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _drain(self) -> None:
        """Takes what has arrived, unless messages wait to be handed out: the rest is better kept in the sockets."""
        if self.inbox.is_full:
            return
        for socket, _ in self._poller.poll(0):
            for _ in range(MAX_DRAINED):
                try:
                    data = socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if socket is self._dealer:
                    self.inbox.accept_answer(data, time.monotonic())
                else:
                    self.inbox.accept_published(data, time.monotonic())
