"""Receives what the viewer shows, in a thread of its own, so that neither the window nor the network waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from vo.client import Client
from vo.keys import ClientKeys
from vo.message_types import CompressedImage, Message, Topic
from vo.scene_live import Link
from vo.scene_panel import Picture, read_image

TOPICS = (Topic.POSE, Topic.KEYFRAME, Topic.POINTS, Topic.TRACKS, Topic.IMAGE, Topic.STATUS, Topic.CAMERA)
MAX_WAITING = 4096
MAX_WAITING_TRACKS = 16
POLL_S = 0.1
JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """A message and when it came, Unix time; of an image, the picture, so that the window need not read it."""

    message: Message
    received_ns: int
    picture: Picture | None = None


class Mailbox:
    """What has come and has not been looked at: everything of the map, but of pictures only the newest."""

    def __init__(self, capacity: int = MAX_WAITING) -> None:
        self._capacity = capacity
        self._changed = threading.Condition()
        self._messages: deque[Received] = deque()
        self._tracks: deque[Received] = deque(maxlen=MAX_WAITING_TRACKS)
        self._image: Received | None = None
        self._session_id: str | None = None
        self._is_closed = False

    def put(self, received: Received) -> None:
        """Adds a message; waits for room where it must not be lost, until somebody takes or closes."""
        header = received.message.header
        with self._changed:
            if header.session_id != self._session_id:  # pictures of the last run must not come after the new one
                self._session_id, self._image = header.session_id, None
                self._tracks.clear()
            if header.topic is Topic.IMAGE:
                self._image = received
            elif header.topic is Topic.TRACKS:
                self._tracks.append(received)
            else:
                self._changed.wait_for(lambda: self._is_closed or len(self._messages) < self._capacity)
                self._messages.append(received)

    def take(self, max_messages: int) -> list[Received]:
        """At most so many messages in the order in which they came, then the tracks and the newest image."""
        with self._changed:
            taken = [self._messages.popleft() for _ in range(min(max_messages, len(self._messages)))]
            if not self._messages:  # pictures wait until the scene is as far as they are
                taken += self._tracks
                self._tracks.clear()
                taken += [] if self._image is None else [self._image]
                self._image = None
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Whoever waits for room need not wait any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class SceneFeed:
    """The messages of one publisher, also one that starts later or anew.

    mailbox  what has come.
    """

    def __init__(self, endpoint: str, keys: ClientKeys | None = None) -> None:
        """Connects and begins to receive. Raises ConfigError for an address or keys that are none."""
        self.mailbox = Mailbox()
        self._endpoint = endpoint
        self._client = Client(endpoint, TOPICS, keys=keys)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._is_complete = False
        self._thread = threading.Thread(target=self._receive_all, name="feed", daemon=True)
        self._thread.start()

    def __enter__(self) -> SceneFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_complete(self) -> bool:
        """The run is over and everything of it has been put into the mailbox."""
        return self._is_complete

    def link(self) -> Link:
        """How the connection is now. Raises what ended the reception: a publisher of another version."""
        if self._failure is not None:
            raise self._failure
        inbox = self._client.inbox
        return Link(
            endpoint=self._endpoint,
            is_heard=inbox.last_heard_s is not None,
            is_silent=self._client.is_silent,
            problem=self._client.connection_problem or "",
            num_lost=sum(inbox.num_lost.values()),
            num_malformed=inbox.num_malformed,
        )

    def close(self) -> None:
        """Ends the reception; safe to call twice."""
        self._stop.set()
        self.mailbox.close()
        self._thread.join(JOIN_TIMEOUT_S)

    def _receive_all(self) -> None:
        with ExitStack() as ending:
            ending.push(self._carry)
            client = ending.enter_context(self._client)
            while not self._stop.is_set():
                message = client.receive(POLL_S)
                if message is None:
                    self._is_complete = client.inbox.is_complete
                    continue
                self._is_complete = False
                received_ns, body = time.time_ns(), message.body
                picture = read_image(body) if isinstance(body, CompressedImage) else None
                self.mailbox.put(Received(message, received_ns, picture))

    def _carry(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Takes what ended the reception over to `link`, which is called in the main thread."""
        self._failure = failure
        return True
