"""What a publisher keeps for consumers that come late: messages of some topics, and what those of the map amount to."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vo.map_store import PAGE_KEYFRAMES, PAGE_POINTS, MapMessage, MapStore
from vo.message_stream import EncodedMessage, MessageSource
from vo.messages import (
    LOGGED_TOPICS,
    MAP_TOPICS,
    MAX_SNAPSHOT_MESSAGES,
    KeyframeUpdate,
    Message,
    PointsUpdate,
    ProtocolError,
    Request,
    Snapshot,
    Topic,
    decode,
    encode,
)
from vo.sequences import History

if TYPE_CHECKING:
    from vo.config import PublisherConfig

SNAPSHOT_BYTES = 1024 * 1024


class Archive:
    """Takes every message where it is published, and gives snapshots to the thread that answers requests.

    Messages of the map are only put aside by `add`; `digest`, in the other thread, works them in.
    """

    def __init__(self, config: PublisherConfig) -> None:
        self._lock = threading.Lock()
        self._histories = {topic: History(1) for topic in LOGGED_TOPICS}
        self._histories[Topic.POSE] = History(config.max_snapshot_poses)
        self._maps = {
            Topic.KEYFRAME: MapStore(config.max_snapshot_keyframes),
            Topic.POINTS: MapStore(config.max_snapshot_landmarks),
        }
        self._ends = dict.fromkeys(MAP_TOPICS, 0)
        self._last: dict[Topic, MapMessage] = {}
        self._undigested: deque[EncodedMessage] = deque()

    def add(self, message: EncodedMessage) -> None:
        """Keeps one message."""
        if message.topic in MAP_TOPICS:
            self._undigested.append(message)
        elif message.topic in self._histories:
            with self._lock:
                self._histories[message.topic].add(message.data, message.sequence)

    def digest(self) -> None:
        """Works the map's messages in; from one thread only."""
        while self._undigested:
            message = decode(self._undigested.popleft().data)
            topic, body = message.header.topic, message.body
            if isinstance(body, KeyframeUpdate | PointsUpdate):
                self._maps[topic].apply(body)
                self._last[topic], self._ends[topic] = body, message.header.sequence + 1

    def snapshot(self, request: Request, stream: MessageSource) -> Snapshot:
        """As much of what is asked for as goes into one answer. Raises ProtocolError for a topic that is not kept."""
        if request.topic in MAP_TOPICS:
            return self._map_snapshot(request, stream)
        if request.topic not in self._histories:
            kept = ", ".join(topic.value for topic in (*self._histories, *MAP_TOPICS))
            raise ProtocolError(f"topic: {request.topic.value} is not kept; ask for {kept}")
        with self._lock:
            history = self._histories[request.topic]
            messages = history.take(request.first_sequence, MAX_SNAPSHOT_MESSAGES, SNAPSHOT_BYTES)
            return Snapshot(request.topic, history.oldest_sequence, history.end_sequence, stream.state, messages)

    def _map_snapshot(self, request: Request, stream: MessageSource) -> Snapshot:
        """A page of the map as messages of its own, numbered as the last one that they include."""
        self.digest()
        topic, end, start = request.topic, self._ends[request.topic], (request.first_segment, request.first_id)
        if topic not in self._last:
            return Snapshot(topic, 0, 0, stream.state, (), *start)
        max_elements = PAGE_KEYFRAMES if topic is Topic.KEYFRAME else PAGE_POINTS
        page = self._maps[topic].page(*start, max_elements, MAX_SNAPSHOT_MESSAGES)
        updates = page.updates
        if start == (0, 0):
            first, *others = updates or (_emptied(self._last[topic]),)
            updates = (replace(first, is_reset=True), *others)
        messages = []
        for update in updates:
            header = stream.answer_header(topic, end - 1)
            header = replace(header, frame_index=update.frame_index, capture_time_ns=update.timestamp_ns)
            messages.append(encode(Message(header, update)))
        return Snapshot(topic, 0, end, stream.state, tuple(messages), *start, *(page.next_start or (None, None)))


def _emptied(update: MapMessage) -> MapMessage:
    """The update without its content: a map of which nothing is left."""
    ids = np.zeros(0, np.int64)
    if isinstance(update, KeyframeUpdate):
        return replace(update, keyframe_indices=ids, keyframe_timestamps_ns=ids, T_world_keyframes=np.zeros((0, 4, 4)))
    return replace(
        update,
        landmark_ids=ids,
        landmarks=np.zeros((0, 3)),
        landmark_colors=np.zeros((0, 3), np.uint8),
        removed_landmark_ids=ids,
    )
