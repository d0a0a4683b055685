"""Sequence numbers: what a publisher keeps for late joiners, and how a consumer puts messages in order. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from vo.messages import Topic

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages `first_sequence` to `last_sequence` of a topic that never came."""

    topic: Topic
    session_id: str
    first_sequence: int
    last_sequence: int

    @property
    def num_messages(self) -> int:
        return self.last_sequence - self.first_sequence + 1


class History:
    """The last `capacity` messages of a topic; their numbers follow each other, from whichever came first.

    end_sequence  one more than the number of the last message.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self._capacity = capacity
        self._ring: list[bytes] = []
        self._base = 0
        self.end_sequence = 0

    @property
    def oldest_sequence(self) -> int:
        return self.end_sequence - len(self._ring)

    def add(self, message: bytes, sequence: int) -> None:
        """Keeps one more; where numbers were left out before it, nothing older can be given any more."""
        if sequence != self.end_sequence:
            self._ring.clear()
        if not self._ring:
            self._base = sequence
        if len(self._ring) < self._capacity:
            self._ring.append(message)
        else:
            self._ring[(sequence - self._base) % self._capacity] = message
        self.end_sequence = sequence + 1

    def take(self, first_sequence: int, max_messages: int, max_bytes: int) -> tuple[bytes, ...]:
        """Messages from `first_sequence`, or the oldest one kept, within both limits; always one if there is one."""
        messages: list[bytes] = []
        num_bytes = 0
        for sequence in range(max(first_sequence, self.oldest_sequence), self.end_sequence):
            message = self._ring[(sequence - self._base) % self._capacity]
            num_bytes += len(message)
            if messages and (len(messages) == max_messages or num_bytes > max_bytes):
                break
            messages.append(message)
        return tuple(messages)


class OrderedMerge(Generic[Item]):
    """Puts items that come from two sides, out of order and twice, into one sequence from 0 without gaps.

    next_sequence   the first item that was neither taken nor given up.
    num_duplicates  items that came again.
    """

    def __init__(self) -> None:
        self._pending: dict[int, Item] = {}
        self.next_sequence = 0
        self.num_duplicates = 0

    @property
    def num_pending(self) -> int:
        """Items that wait for an earlier one."""
        return len(self._pending)

    @property
    def end(self) -> int:
        """One more than the last sequence number seen."""
        return max(self._pending, default=self.next_sequence - 1) + 1

    def add(self, sequence: int, item: Item) -> None:
        if sequence < self.next_sequence or sequence in self._pending:
            self.num_duplicates += 1
        else:
            self._pending[sequence] = item

    def take(self) -> list[Item]:
        """The items whose turn it is."""
        items = []
        while self.next_sequence in self._pending:
            items.append(self._pending.pop(self.next_sequence))
            self.next_sequence += 1
        return items

    def give_up_before(self, limit: int) -> tuple[int, int] | None:
        """Stops waiting for the first hole before `limit`: its first and last sequence, None where there is none."""
        end = min(self._pending, default=limit)
        first, end = self.next_sequence, min(end, limit)
        if end <= first:
            return None
        self.next_sequence = end
        return first, end - 1
