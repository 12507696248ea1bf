"""Credit: the sender never sends more than allowed, and never waits for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_sdk.protocol.errors import BadBinaryHeader
from agent_sdk.protocol.frame import ReceiveWindow, SendWindow


def test_a_sender_may_send_one_window_at_once():
    window = SendWindow(100)
    assert (window.take(60), window.take(60), window.take(60)) == (60, 40, 0)
    assert window.room == 0


def test_credit_is_a_total_and_may_arrive_twice():
    window = SendWindow(100)
    window.take(100)
    assert window.granted(150)
    assert not window.granted(150)
    assert window.take(100) == 50


def test_credit_is_never_taken_back():
    window = SendWindow(100)
    with pytest.raises(BadBinaryHeader, match="from 100 to 99"):
        window.granted(99)


def test_new_credit_is_published_when_half_a_window_is_free():
    window = ReceiveWindow(100)
    window.arrived(0, 100)
    assert window.consumed(49) is None
    assert window.consumed(1) == 150
    assert window.held == 50


def test_bytes_past_the_credit_are_refused():
    window = ReceiveWindow(100)
    window.arrived(0, 100)
    with pytest.raises(BadBinaryHeader, match="1 bytes more"):
        window.arrived(100, 1)


def test_a_jump_ahead_costs_no_credit():
    window = ReceiveWindow(100)
    window.arrived(5 << 30, 100)
    assert (window.position, window.held, window.expected) == ((5 << 30) + 100, 100, 0)


def test_an_offset_never_goes_back():
    window = ReceiveWindow(100)
    window.arrived(10, 10)
    with pytest.raises(BadBinaryHeader, match="from 20 to 19"):
        window.arrived(19, 1)
    with pytest.raises(BadBinaryHeader, match="from 20 to 19"):
        window.end(19)


def test_nothing_comes_after_the_end():
    window = ReceiveWindow(100)
    window.end(7)
    assert (window.position, window.expected) == (7, 0)
    for late in (lambda: window.arrived(7, 1), lambda: window.end(7)):
        with pytest.raises(BadBinaryHeader, match="after the end"):
            late()


def test_a_stream_that_has_ended_needs_no_credit():
    window = ReceiveWindow(100)
    window.arrived(0, 100)
    window.end(100)
    assert window.consumed(100) is None


@given(
    size=st.integers(1, 1000),
    writes=st.lists(st.integers(1, 3000), max_size=20),
    reads=st.lists(st.integers(1, 500), min_size=1),
)
def test_whatever_is_written_arrives_and_at_most_a_window_is_held(size, writes, reads):
    sender, receiver = SendWindow(size), ReceiveWindow(size)
    position, step = 0, 0
    for left in writes:
        while left:
            taken = sender.take(left)
            receiver.arrived(position, taken)
            position, left = position + taken, left - taken
            assert receiver.held <= size
            if not taken:
                step += 1
                allowed = receiver.consumed(min(receiver.held, reads[step % len(reads)]))
                if allowed is not None:
                    sender.granted(allowed)
    assert receiver.position == sum(writes)
