import struct

import pytest

from agent_server.http.connection import FrameWatch
from tests.server.wire import BINARY, CLOSE, CONTINUATION, PING, TEXT, frame

LIMIT = 1 << 20


def code(data: bytes, *, now: float = 0.0) -> int | None:
    wrong = FrameWatch(LIMIT).look(data, now)
    return wrong.code if wrong else None


FINE = {
    "text": frame(TEXT, b"hello"),
    "empty": frame(TEXT),
    "126 bytes": frame(BINARY, b"x" * 126),
    "70 000 bytes": frame(BINARY, b"x" * 70_000),
    "exactly the limit": frame(TEXT, b"x" * LIMIT),
    "fragments with a ping between": frame(TEXT, b"a", final=False) + frame(PING) + frame(CONTINUATION, b"b"),
    "close": frame(CLOSE, struct.pack(">H", 1000) + b"bye"),
    "close without a code": frame(CLOSE),
    "close with a code of ours": frame(CLOSE, struct.pack(">H", 4404)),
    "one hundred pings": frame(PING) * 100,
    "many messages": frame(TEXT, b"x") * 5000,
}
WRONG = {
    "unmasked": (frame(TEXT, b"hello", masked=False), 1002),
    "length in 2 bytes for 5": (frame(TEXT, b"hello", width=2), 1002),
    "length in 8 bytes for 5": (frame(TEXT, b"hello", width=8), 1002),
    "2**31": (frame(BINARY, width=8, length=2**31), 1009),
    "2**63 + 1": (frame(BINARY, width=8, length=2**63 + 1), 1009),
    "limit + 1": (frame(TEXT, width=8, length=LIMIT + 1), 1009),
    "fragments beyond the limit": (frame(TEXT, b"x" * LIMIT, final=False) + frame(CONTINUATION, b"x"), 1009),
    "endless empty fragments": (
        frame(TEXT, final=False) + frame(CONTINUATION, final=False) * 500_000,
        1008,
    ),
    "101 pings in a second": (frame(PING) * 101, 1008),
}


@pytest.mark.parametrize("data", FINE.values(), ids=FINE)
def test_a_right_frame_passes(data):
    assert code(data) is None


@pytest.mark.parametrize(("data", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_frame_is_named(data, expected):
    assert code(data) == expected


@pytest.mark.parametrize(("data", "expected"), WRONG.values(), ids=WRONG)
def test_it_makes_no_difference_how_the_bytes_arrive(data, expected):
    watch = FrameWatch(LIMIT)
    found = (watch.look(data[i : i + 1], 0.0) for i in range(len(data)))
    assert next(wrong for wrong in found if wrong).code == expected


def test_right_frames_may_arrive_byte_by_byte():
    watch = FrameWatch(LIMIT)
    data = frame(TEXT, b"a" * 300, final=False) + frame(PING, b"?") + frame(CONTINUATION, b"b") + frame(CLOSE)
    assert [watch.look(data[i : i + 1], 0.0) for i in range(len(data))] == [None] * len(data)


def test_pings_over_several_seconds_are_fine():
    watch = FrameWatch(LIMIT)
    assert [watch.look(frame(PING) * 90, second) for second in range(5)] == [None] * 5
