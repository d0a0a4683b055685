"""Publishes the messages of a run on ZeroMQ sockets, and answers what consumers ask.

A publisher binds two ports: messages go out on the first as they come (PUB), and on the next one (ROUTER) a consumer
asks for those it missed, and sends requests. docs/PROTOCOL.md is the specification; vo/client.py is the other side.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import zmq
from zmq.utils import z85

from vo.archive import Archive
from vo.endpoints import check_bindable, request_endpoint
from vo.keys import ZAP_DOMAIN, ServerKeys, load_server_keys, zap_reply
from vo.message_stream import EncodedMessage, MessageSource, final_state
from vo.messages import (
    MAX_REQUEST_BYTES,
    PUBLISHED_TOPICS,
    Body,
    Message,
    ProtocolError,
    Refusal,
    Reply,
    Request,
    RequestKind,
    RunState,
    ScaleReading,
    Topic,
    decode_request,
    encode,
)
from vo.types import ConfigError, VoError

if TYPE_CHECKING:  # the configuration of the frontends imports torch, which a replay can do without
    from vo.config import PublisherConfig

SNAPSHOT_QUEUE = 8
MAX_WAITED_FOR = 256
MAX_SCALE_READINGS = 1024
MAX_BIND_ATTEMPTS = 50
ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class PublishError(VoError):
    """An address that cannot be bound: names it and the remedy."""


class Publisher:
    """The sockets of one run: what its stream says goes out, and what consumers ask is answered. Nothing here waits.

    A thread of its own keeps the heart of the stream beating, answers requests, and decides whose key is let in.

    endpoint     the address that was bound.
    session_id   names this run.
    on_stop      called from the publisher's thread when a consumer asks to end the run; None: it is refused.
    num_refused  requests that were malformed or could not be served.
    num_scale_readings_dropped   readings that nobody took in time.
    """

    def __init__(
        self,
        config: PublisherConfig,
        stream: MessageSource,
        *,
        on_stop: Callable[[], None] | None = None,
        accepts_scale: bool = False,
    ) -> None:
        """Binds `config.endpoint`. Raises ConfigError and PublishError, each in one line with the remedy.

        accepts_scale  whether somebody calls `take_scale_readings`; otherwise readings are refused.
        """
        if config.endpoint == "off":
            raise ValueError("endpoint: off means that there is no publisher")
        self._config, self.stream = config, stream
        self.on_stop, self._accepts_scale = on_stop, accepts_scale
        self._keys = load_server_keys(Path(config.keys)) if config.keys else None
        self._archive = Archive(config)
        self._prefixes: set[bytes] = set()
        self._scale_readings: deque[ScaleReading] = deque()
        self.num_scale_readings_dropped = 0
        self.num_refused = 0
        self._num_answers = 0
        self._close_lock = threading.Lock()
        self._is_closed = False
        self._close_deadline_s: float | None = None
        self._context = zmq.Context()
        try:
            self._open_sockets()
        except (VoError, zmq.ZMQError):
            self._context.destroy(linger=0)
            raise
        stream.add_consumer(self._send, self.is_wanted)
        self._thread = threading.Thread(target=self._serve, name="publisher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(final_state(error_type))

    @property
    def session_id(self) -> str:
        return self.stream.session_id

    def is_wanted(self, topic: Topic) -> bool:
        """Whether anybody subscribes to a topic, as of the last message published."""
        return any(topic.prefix.startswith(prefix) for prefix in self._prefixes)

    def take_scale_readings(self) -> tuple[ScaleReading, ...]:
        """The scale readings that consumers have sent since the last call, oldest first; each has its time."""
        readings = []
        while self._scale_readings:
            readings.append(self._scale_readings.popleft())
        return tuple(readings)

    def close(self, state: RunState = RunState.FINISHED) -> None:
        """Finishes the stream and ends within the configured linger; safe to call twice.

        Consumers that asked for a snapshot are waited for until they have everything and say goodbye. A final state
        that was published before is kept.
        """
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        self.stream.finish(state)
        deadline_s = time.monotonic() + self._config.linger_ms / 1000
        self._close_deadline_s = deadline_s
        with suppress(zmq.Again):  # it has seen the time and gone already; a send that waits would wait for ever
            self._waker.send(b"", zmq.NOBLOCK)
        self._thread.join()
        self.stream.remove_consumer(self._send)
        remaining_ms = max(0, int((deadline_s - time.monotonic()) * 1000))
        self._waker.close(linger=0)
        self._publisher.close(linger=remaining_ms)
        self._router.close(linger=remaining_ms)
        if self._zap is not None:
            self._zap.close(linger=0)
        self._context.term()

    def _open_sockets(self) -> None:
        # The judge of keys comes first, and where it is missing nobody is let in.
        self._zap = self._context.socket(zmq.REP) if self._keys is not None else None
        if self._zap is not None:
            self._zap.bind(ZAP_ENDPOINT)
        self._publisher = self._context.socket(zmq.XPUB)  # a PUB that also tells what is subscribed to
        self._publisher.set_hwm(self._config.send_hwm)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.sndhwm = SNAPSHOT_QUEUE
        for socket in (self._publisher, self._router):
            socket.maxmsgsize = MAX_REQUEST_BYTES  # of what consumers send: subscriptions and requests
            if self._keys is not None:
                _require_keys(socket, self._keys, self._config.keys)
        self.endpoint = _bind(self._publisher, self._router, self._config.endpoint, has_keys=self._keys is not None)
        # A socket pair inside the process ends the wait of the thread at once, where an event could not.
        self._waker = self._context.socket(zmq.PAIR)
        self._wakened = self._context.socket(zmq.PAIR)
        self._waker.bind("inproc://waker")
        self._wakened.connect("inproc://waker")

    def _send(self, message: EncodedMessage) -> None:
        """Sends and keeps one message of the stream, which calls this from one thread at a time."""
        self._publisher.send(message.data, zmq.NOBLOCK)
        self._archive.add(message)
        self._note_subscriptions()

    def _note_subscriptions(self) -> None:
        """What consumers as a whole subscribe to and no longer do; what matches no topic is forgotten at once."""
        while cast(int, self._publisher.get(zmq.EVENTS)) & zmq.POLLIN:
            notice = self._publisher.recv(zmq.NOBLOCK)
            prefix = notice[1:]
            if notice[:1] == b"\1" and any(topic.prefix.startswith(prefix) for topic in PUBLISHED_TOPICS):
                self._prefixes.add(prefix)
            else:
                self._prefixes.discard(prefix)

    def _serve(self) -> None:
        """The thread: heartbeats and answers until the run is closed and nobody is waited for any more."""
        with self._wakened:  # left open, it would keep `close` waiting, whatever happened here
            self._serve_until_closed()

    def _serve_until_closed(self) -> None:
        poller = zmq.Poller()
        for socket in (self._router, self._wakened, self._zap):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        waited_for: dict[bytes, None] = {}
        while True:
            now_s, deadline_s = time.monotonic(), self._close_deadline_s
            if deadline_s is not None and (not waited_for or now_s >= deadline_s):
                break
            wait_s = self.stream.beat_if_due()
            self._archive.digest()
            if deadline_s is not None:
                wait_s = min(wait_s, deadline_s - now_s)
            events = dict(poller.poll(max(0, int(wait_s * 1000) + 1)))
            if self._wakened in events:
                self._wakened.recv()
            if self._zap is not None and self._zap in events:
                self._judge(self._zap)
            if self._router in events:
                self._answer(self._router.recv_multipart(), waited_for)

    def _judge(self, zap: zmq.Socket[bytes]) -> None:
        """Answers libzmq whether a client that has shown its key is let in."""
        request = zap.recv_multipart()
        allowed = self._keys.allowed if self._keys is not None else frozenset()
        key = request[6] if len(request) == 7 else b""
        zap.send_multipart(zap_reply(request, allowed, bytes(z85.encode(key)) if len(key) == 32 else b""))

    def _answer(self, parts: list[bytes], waited_for: dict[bytes, None]) -> None:
        """Answers one request: the sender's identity, with or without an empty part (REQ, DEALER), and the request."""
        envelope = parts[:-1]
        if not (len(envelope) == 1 or (len(envelope) == 2 and not envelope[1])):
            self.num_refused += 1
            return
        tag = 0
        try:
            request = decode_request(parts[-1])
            tag = request.tag
            if request.kind is RequestKind.GOODBYE:
                waited_for.pop(envelope[0], None)
                return
            answer = self._served(request)
            if answer is None:
                return
        except ProtocolError as error:
            self.num_refused += 1
            answer = self._encode_answer(Topic.REFUSAL, Refusal(str(error)[:200], tag))
        else:
            if request.kind is RequestKind.SNAPSHOT:
                waited_for[envelope[0]] = None
            if len(waited_for) > MAX_WAITED_FOR:
                del waited_for[next(iter(waited_for))]
        self._router.send_multipart([*envelope, answer], zmq.NOBLOCK)

    def _served(self, request: Request) -> bytes | None:
        """Does what is asked for; the answer, if there is one. Raises ProtocolError with the reason why not."""
        match request.kind:
            case RequestKind.SNAPSHOT:
                return self._encode_answer(Topic.SNAPSHOT, self._archive.snapshot(request, self.stream))
            case RequestKind.STOP:
                if self.on_stop is None:
                    raise ProtocolError("stop: this run cannot be ended from outside, or not yet")
                self.on_stop()
            case RequestKind.SCALE:
                self._accept_scale(request.scale)
                return None  # they come many times a second, and the queue of answers is short
        return self._encode_answer(Topic.REPLY, Reply(request.kind, request.tag))

    def _accept_scale(self, reading: ScaleReading | None) -> None:
        if reading is None or not self._accepts_scale:
            raise ProtocolError("scale: this run takes no scale readings; its scale source must be external")
        if reading.timestamp_ns is None:
            now_ns = self.stream.answer_header(Topic.REPLY, 0).capture_time_ns
            start_ns = reading.start_timestamp_ns
            if now_ns is None or (start_ns is not None and start_ns >= now_ns):
                raise ProtocolError("timestamp_ns: no frame has been published since then; give a time")
            reading = replace(reading, timestamp_ns=now_ns)
        self._scale_readings.append(reading)
        if len(self._scale_readings) > MAX_SCALE_READINGS:
            self._scale_readings.popleft()
            self.num_scale_readings_dropped += 1

    def _encode_answer(self, topic: Topic, body: Body) -> bytes:
        self._num_answers += 1
        return encode(Message(self.stream.answer_header(topic, self._num_answers - 1), body))


def _require_keys(socket: zmq.Socket[bytes], keys: ServerKeys, folder: str) -> None:
    """Lets a socket speak CURVE only, and with those alone whom our judge lets in."""
    try:
        socket.curve_publickey, socket.curve_secretkey = keys.own.public, keys.own.secret
    except zmq.ZMQError as error:
        raise ConfigError(f"{folder}: server.key_secret holds no valid keys; `vo keys DIR` makes new ones") from error
    socket.curve_server = True
    socket.zap_domain = ZAP_DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def _bind(publisher: zmq.Socket[bytes], router: zmq.Socket[bytes], endpoint: str, *, has_keys: bool) -> str:
    """Binds both sockets to neighbouring ports; returns the address of the first."""
    host, port = check_bindable(endpoint, has_keys=has_keys)
    if port is not None:
        _bind_one(publisher, f"tcp://{host}:{port}")
        _bind_one(router, f"tcp://{host}:{port + 1}")
        return f"tcp://{host}:{port}"
    for _ in range(MAX_BIND_ATTEMPTS):
        _bind_one(publisher, f"tcp://{host}:*")
        bound = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        try:
            router.bind(request_endpoint(bound))
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
