"""A bounded queue between two threads that can be closed from either end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Channel(Generic[Item]):
    """Carries items from one producer to one consumer, at most `capacity` at a time.

    A full channel makes the producer wait, or, with `drops_oldest`, gives up the item that has waited longest and
    counts it. Raises ValueError for a capacity below 1.
    """

    def __init__(self, capacity: int, *, drops_oldest: bool = False) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self._capacity = capacity
        self._drops_oldest = drops_oldest
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_dropped = 0

    @property
    def num_dropped(self) -> int:
        """Items that were given up for newer ones."""
        return self._num_dropped

    def put(self, item: Item) -> bool:
        """Hands over an item, waiting for room if need be; False once the channel is closed: nobody will take it."""
        with self._changed:
            while not self._is_closed and not self._drops_oldest and len(self._items) >= self._capacity:
                self._changed.wait()
            if self._is_closed:
                return False
            if len(self._items) >= self._capacity:
                self._items.popleft()
                self._num_dropped += 1
            self._items.append(item)
            self._changed.notify_all()
            return True

    def close(self) -> None:
        """Says that no more items come; those in the channel can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def discard(self) -> None:
        """Says that nobody takes items any more: closes the channel and empties it."""
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        """Yields items as they come until the channel is closed and empty."""
        while True:
            with self._changed:
                while not self._items and not self._is_closed:
                    self._changed.wait()
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
