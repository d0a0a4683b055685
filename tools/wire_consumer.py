"""A consumer in a process of its own, for tools/measure_wire.py: notes what comes, when, and how old it is.

With `live` it connects at once; with `catch_up` it waits for `join` on stdin and asks for all poses from the first one
on, and `rejoin` closes the connection and opens it anew. Ends when the second session is over, and prints what it has
seen as one JSON object.
"""

from __future__ import annotations

import json
import select
import sys
import time
from array import array
from itertools import pairwise

from vo.client import Client, Message, Topic

POLL_S = 0.05
PATIENCE_S = 30.0
# A message younger than this is the present: the next one is not out yet at 10 frames a second.
CURRENT_AGE_NS = 100_000_000


class Notes:
    """What one consumer has seen, by topic: sequence numbers, ages and times of receipt, all in ns."""

    def __init__(self) -> None:
        self.sequences = {topic: array("q") for topic in (Topic.POSE, Topic.TRACKS)}
        self.ages_ns = {topic: array("q") for topic in self.sequences}
        self.times_ns = {topic: array("q") for topic in self.sequences}
        self.sessions: dict[str, int] = {}
        self.num_lost = 0

    def add(self, message: Message, now_ns: int) -> None:
        header = message.header
        if header.topic in self.sequences and len(self.sessions) < 2:
            self.sequences[header.topic].append(header.sequence)
            self.ages_ns[header.topic].append(now_ns - header.publish_time_ns)
            self.times_ns[header.topic].append(now_ns)

    def add_session(self, session_id: str | None, now_ns: int) -> None:
        if session_id is not None:
            self.sessions.setdefault(session_id, now_ns)


def main() -> None:
    endpoint, catches_up = sys.argv[1], sys.argv[2] == "catch_up"
    notes, rejoins_s = Notes(), []
    if catches_up:
        print("ready", flush=True)
        sys.stdin.readline()
    client = _connected(endpoint, catches_up)
    deadline_s = time.monotonic() + PATIENCE_S
    while client.inbox.last_heard_s is None and time.monotonic() < deadline_s:
        client.receive(POLL_S)
    if not catches_up:
        print("ready", flush=True)
    while time.monotonic() < deadline_s and not (len(notes.sessions) > 1 and client.inbox.is_complete):
        message = client.receive(POLL_S)
        now_ns = time.time_ns()
        notes.add_session(client.session_id, now_ns)
        if message is not None:
            deadline_s = time.monotonic() + PATIENCE_S
            notes.add(message, now_ns)
        if catches_up and select.select([sys.stdin], [], [], 0)[0] and sys.stdin.readline().strip() == "rejoin":
            client.close()
            start_s = time.monotonic()
            client = _connected(endpoint, catches_up)
            _receive_until_current(client)
            rejoins_s.append(time.monotonic() - start_s)
    notes.num_lost += sum(client.inbox.num_lost.values())
    client.close()
    print(json.dumps(_report(notes, rejoins_s)), flush=True)


def _connected(endpoint: str, catches_up: bool) -> Client:
    topics = (Topic.POSE,) if catches_up else (Topic.POSE, Topic.TRACKS)
    return Client(endpoint, topics, catch_up=catches_up)


def _receive_until_current(client: Client) -> None:
    """Until everything from the first message on is here and the last one is of now."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        message = client.receive(POLL_S)
        if message is not None and time.time_ns() - message.header.publish_time_ns < CURRENT_AGE_NS:
            return


def _report(notes: Notes, rejoins_s: list[float]) -> dict[str, object]:
    return {
        "num_lost": notes.num_lost,
        "sessions": notes.sessions,
        "rejoins_s": rejoins_s,
        "topics": {
            topic.value: {
                "first_sequence": sequences[0] if sequences else None,
                "num_received": len(sequences),
                "num_out_of_order": sum(later <= earlier for earlier, later in pairwise(sequences)),
                "num_holes": sum(max(0, later - earlier - 1) for earlier, later in pairwise(sequences)),
                "ages_ns": notes.ages_ns[topic].tolist(),
                "times_ns": notes.times_ns[topic].tolist(),
            }
            for topic, sequences in notes.sequences.items()
        },
    }


if __name__ == "__main__":
    main()
