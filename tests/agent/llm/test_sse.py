"""Server-sent events: wherever the bytes are cut, the events are the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_sdk.agent.llm.decoding import EventParser, ServerSentEvent
from agent_sdk.protocol.errors import ModelAnswerTooLarge

Expected = list[tuple[bytes, bytes]]

STREAM = (
    "\ufeffevent: greeting\r\ndata: Grüße 🎉\r\n\r\n"
    ": a comment\n\n"
    "data:no space\rdata:  two spaces\r\r"
    "id: 7\nretry: 10\nunknown: field\ndata\n\n"
    "event: without data\n\n"
    "data: [DONE]\n\n"
    "data: never ended"
).encode()


def parsed(pieces: list[bytes], limit: int = 1 << 20) -> Expected:
    parser = EventParser(limit)
    events: list[ServerSentEvent] = []
    for piece in pieces:
        events += parser.feed(piece)
    return [(event.name, event.data) for event in events]


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(stream) + 1) for place in at})
    edges = [0, *places, len(stream)]
    return [stream[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def test_events_are_read_as_the_standard_says():
    assert parsed([STREAM]) == [
        (b"greeting", "Grüße 🎉".encode()),
        (b"message", b"no space\n two spaces"),
        (b"message", b""),
        (b"message", b"[DONE]"),
    ]


def test_single_bytes_give_the_same_events():
    assert parsed([bytes([byte]) for byte in STREAM]) == parsed([STREAM])


@given(st.lists(st.integers(min_value=0), max_size=20))
def test_any_cut_gives_the_same_events(at: list[int]):
    assert parsed(cut(STREAM, at)) == parsed([STREAM])


lines = st.lists(
    st.sampled_from(
        [b"data: a", b"data", b"data:\xc3\xbc", b"event: e", b"", b"", b":", b"\xef\xbb\xbf", b"x"]
    ),
    max_size=12,
)
ends = st.sampled_from([b"\n", b"\r", b"\r\n"])


@given(
    st.lists(st.tuples(lines, ends), max_size=4),
    st.lists(st.integers(min_value=0, max_value=400), max_size=9),
)
def test_any_stream_gives_the_same_events_however_it_is_cut(
    parts: list[tuple[list[bytes], bytes]], at: list[int]
):
    stream = b"".join(line + end for some, end in parts for line in some)
    assert parsed(cut(stream, at)) == parsed([stream])


@given(st.binary(max_size=300), st.lists(st.integers(min_value=0), max_size=9))
def test_any_bytes_are_taken_without_an_error(stream: bytes, at: list[int]):
    assert parsed(cut(stream, at)) == parsed([stream])


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 999, b"data: x\n", b": xxx\n"])
def test_an_event_without_an_end_is_refused_at_the_limit(piece: bytes):
    parser = EventParser(limit=10_000)
    with pytest.raises(ModelAnswerTooLarge, match="10000"):
        for _ in range(10_000):
            parser.feed(piece)


def test_the_limit_is_for_one_event_not_for_all():
    assert len(parsed([b"data: " + b"x" * 900 + b"\n\n"] * 100, limit=1000)) == 100


def test_a_line_in_pieces_counts_once():
    assert len(parsed([b"data: ", *[b"x" * 100] * 9, b"\n\n"], limit=1000)) == 1
