"""Channels between stages: order, room, and what is lost of it."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo.channel import Channel


def test_channel_keeps_order_and_waits_for_room() -> None:
    channel: Channel[int] = Channel(2)
    producer = threading.Thread(target=lambda: ([channel.put(i) for i in range(100)], channel.close()))
    producer.start()
    assert list(channel) == list(range(100))
    producer.join()
    assert channel.num_dropped == 0


def test_channel_holds_no_more_than_its_capacity() -> None:
    channel: Channel[int] = Channel(3)
    put: list[int] = []
    producer = threading.Thread(target=lambda: [put.append(i) for i in range(9) if channel.put(i)])
    producer.start()
    time.sleep(0.05)
    assert put == [0, 1, 2]
    channel.discard()
    producer.join(5)
    assert not producer.is_alive()
    assert put == [0, 1, 2]


def test_channel_that_drops_keeps_the_newest() -> None:
    channel: Channel[int] = Channel(2, drops_oldest=True)
    assert all(channel.put(i) for i in range(5))
    channel.close()
    assert (list(channel), channel.num_dropped) == ([3, 4], 3)


def test_closed_channel_takes_nothing_and_gives_the_rest() -> None:
    channel: Channel[int] = Channel(2)
    channel.put(1)
    channel.close()
    assert not channel.put(2)
    assert list(channel) == [1]
    assert list(channel) == []
    with pytest.raises(ValueError, match="capacity"):
        Channel(0)


@settings(deadline=None, max_examples=25)
@given(num_items=st.integers(0, 60), capacity=st.integers(1, 8), drops=st.booleans())
def test_channel_loses_only_what_it_counts(num_items: int, capacity: int, drops: bool) -> None:
    channel: Channel[int] = Channel(capacity, drops_oldest=drops)
    producer = threading.Thread(target=lambda: ([channel.put(i) for i in range(num_items)], channel.close()))
    producer.start()
    taken = list(channel)
    producer.join()
    assert taken == sorted(taken)
    assert len(taken) + channel.num_dropped == num_items
    assert drops or channel.num_dropped == 0
    assert not taken or taken[-1] == num_items - 1
