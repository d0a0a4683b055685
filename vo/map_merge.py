"""How a consumer gets the whole map of a topic: pages of a snapshot, then the updates that came meanwhile. Pure."""

from __future__ import annotations

from vo.messages import Message, Snapshot

MAX_PENDING_UPDATES = 512


class MapMerge:
    """Orders the messages of `keyframe` or `points` so that applying them one after the other gives the map.

    Pages come at different times, while the map changes. Applying every update from the oldest page's `num_sent` on
    afterwards sets that right: an update says where things are, not by how much they moved.

    num_duplicates  messages that came again.
    """

    def __init__(self) -> None:
        self._pages: list[Message] = []
        self._pending: list[Message] = []
        self._start: tuple[int, int] = (0, 0)
        self._first_needed: int | None = None
        self._next_sequence: int | None = None
        self._num_sent = 0
        self.is_settled = False
        self.num_duplicates = 0

    @property
    def wanted(self) -> tuple[int, int] | None:
        """Where the next page to ask for begins, (segment, id); None while nothing is missing."""
        return None if self.is_settled else self._start

    def add(self, message: Message) -> list[Message]:
        """A published message; what can be handed out now, in order. After a loss the map is asked for again."""
        if not self.is_settled:
            self._pending.append(message)
            if len(self._pending) > MAX_PENDING_UPDATES:
                self._restart()
            return []
        sequence = message.header.sequence
        if self._next_sequence is not None and sequence < self._next_sequence:
            self.num_duplicates += 1
            return []
        if self._next_sequence is not None and sequence > self._next_sequence:
            self._restart()
            self._pending.append(message)
            return []
        self._next_sequence = sequence + 1
        return [message]

    def note_sent(self, num_sent: int) -> None:
        """The publisher says by subscription how many there were: a loss at the end shows too."""
        self._num_sent = num_sent
        if self.is_settled and num_sent > (self._next_sequence or 0):
            self._restart()

    def add_page(self, snapshot: Snapshot, messages: list[Message]) -> list[Message]:
        """A page that was asked for, and its messages; what can be handed out now: all of it with the last page."""
        if self.is_settled or not self._fits(snapshot):
            return []
        self._first_needed = snapshot.num_sent if self._first_needed is None else self._first_needed
        self._pages += messages
        if snapshot.next_segment is not None and snapshot.next_id is not None:
            self._start = (snapshot.next_segment, snapshot.next_id)
            return []
        live = [message for message in self._pending if message.header.sequence >= self._first_needed]
        end = self._first_needed + len(live)
        is_whole = [message.header.sequence for message in live] == list(range(self._first_needed, end))
        if not is_whole or end < self._num_sent:
            self._restart()
            self._pending = live
            return []
        return self._settle(self._pages + live, end)

    def give_up(self) -> tuple[list[Message], tuple[int, int] | None]:
        """Nobody answers: what came by subscription, as it is, and the numbers (first, end) of a loss before it."""
        if self.is_settled:
            return [], None
        pending = self._pending
        known = self._next_sequence
        if not pending:
            self.is_settled = True
            return [], None
        first = pending[0].header.sequence
        lost = (known, first) if known is not None and first > known else None
        return self._settle(pending, pending[-1].header.sequence + 1), lost

    def _fits(self, snapshot: Snapshot) -> bool:
        """Whether the page continues those before it: an answer may come twice, or after the map was asked for anew."""
        is_next = (snapshot.first_segment, snapshot.first_id) == self._start
        return is_next and (self._first_needed is None or snapshot.num_sent >= self._first_needed)

    def _restart(self) -> None:
        self._pages, self._pending = [], []
        self._start, self._first_needed, self.is_settled = (0, 0), None, False

    def _settle(self, messages: list[Message], next_sequence: int) -> list[Message]:
        self._pages, self._pending = [], []
        self._next_sequence, self.is_settled = next_sequence, True
        return messages
