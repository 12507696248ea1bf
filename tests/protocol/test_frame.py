"""Binary frames, byte by byte."""

import pytest

from agent_sdk.protocol import frame
from agent_sdk.protocol.errors import BadBinaryHeader


def test_a_data_frame_costs_sixteen_bytes():
    head = bytes.fromhex("01 00 0000 00000007 0000000000010000")
    assert frame.data(7, 65536, b"spam") == head + b"spam"
    assert frame.unpack(head + b"spam") == frame.Data(7, 65536, b"spam")


def test_a_credit_frame_is_nothing_but_a_header():
    assert frame.credit(2, 2**40) == bytes.fromhex("01 02 0000 00000002 0000010000000000")


def test_an_end_frame_carries_a_trailer():
    assert frame.unpack(frame.end(1, 10, b"digest")) == frame.End(1, 10, b"digest")


def test_a_long_reason_is_cut():
    reset = frame.unpack(frame.reset(1, "x" * 1000))
    assert reset == frame.Reset(1, "x" * 256)


def head(version=1, kind=0, flags=0, stream=1, offset=0):
    return frame._head.pack(version, kind, flags, stream, offset)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "16 to"),
        (head()[:15], "16 to"),
        (head() + b"x" * 65537, "16 to"),
        (head(version=0) + b"x", "unknown version 0"),
        (head(version=2) + b"x", "unknown version 2"),
        (head(kind=5) + b"x", "unknown kind 5"),
        (head(kind=255), "unknown kind 255"),
        (head(flags=1) + b"x", "unknown flags 0x0001"),
        (head(kind=4, flags=2) + b"x", "unknown flags 0x0002"),
        (head(stream=0) + b"x", "stream 0"),
        (head(), "without data"),
        (head(kind=4), "without data"),
        (head(kind=2) + b"x", "no payload"),
        (head(kind=1) + b"x" * 257, "256"),
        (head(kind=3) + b"x" * 257, "256"),
    ],
)
def test_a_frame_that_breaks_the_rules_is_refused_with_the_reason(content, why):
    with pytest.raises(BadBinaryHeader, match=why):
        frame.unpack(content)


def test_the_longest_frame_is_accepted():
    assert len(frame.unpack(frame.data(1, 0, bytes(65536))).payload) == 65536
