"""What a provider sends, decoded: server-sent events (WHATWG HTML, section 9.2), and JSON that may be damaged a little.

Lines are split as bytes, so a cut within a UTF-8 character needs no care, and payloads stay bytes:
a JSON decoder takes them as they are. `id` and `retry` are ignored: a model's answer is not resumed.
What a strict decoder refuses is read all the same, because an answer that was paid for is worth more than
its wrong byte. Halves of a character stay in strings until `as_utf8` joins them: the other half may be in
the next piece of the answer. Knows no dialect and no connection.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from agent_sdk.protocol.errors import ModelAnswerTooLarge
from agent_sdk.tools import as_utf8

T = TypeVar("T")

EVENT_BYTES = 8 << 20

BOM = b"\xef\xbb\xbf"


class ServerSentEvent(Struct, frozen=True, gc=False):
    """One event."""

    data: bytes
    """Its `data` lines, joined by line feeds."""
    name: bytes = b"message"


class EventParser:
    """Takes bytes, gives the events that became complete with them."""

    def __init__(self, limit: int = EVENT_BYTES) -> None:
        self._limit = limit
        self._rest: list[bytes] = []
        """The pieces of a line that has not ended yet."""
        self._data: list[bytes] = []
        self._name = b""
        self._size = 0
        """Bytes of the event that is being read."""
        self._after_cr = False
        self._first_line = True

    def feed(self, piece: bytes) -> list[ServerSentEvent]:
        """Return the events that end in this piece, in order. One without its blank line comes at the `end`.

        Raises:
            ModelAnswerTooLarge: an event is longer than the limit; nothing can be fed any more.
        """
        if not piece:
            return []
        if self._after_cr and piece[:1] == b"\n":
            piece = piece[1:]  # the second half of a CRLF
            self._after_cr = False
            if not piece:
                return []
        self._after_cr = piece[-1:] == b"\r"
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return self._lines(piece.split(b"\n"))

    def end(self) -> list[ServerSentEvent]:
        """Return the event that nothing but its blank line is missing of, or the end of its last line, if there is one.

        The standard throws it away; providers leave the blank line out, and their answer is whole.
        """
        return self._lines([b"", b"", b""])

    def _lines(self, lines: list[bytes]) -> list[ServerSentEvent]:
        events: list[ServerSentEvent] = []
        rest = lines.pop()
        for line in lines:
            if self._rest:
                self._size -= sum(map(len, self._rest))  # counted again, with the whole line
                line = b"".join((*self._rest, line))
                self._rest.clear()
            if self._first_line:
                self._first_line = False
                line = line.removeprefix(BOM)
            if line:
                self._field(line)
                continue
            if self._data:
                events.append(ServerSentEvent(b"\n".join(self._data), self._name or b"message"))
            self._data, self._name, self._size = [], b"", 0
        if rest:
            self._rest.append(rest)
            self._count(len(rest))
        return events

    def _field(self, line: bytes) -> None:
        self._count(len(line))
        if line[:1] == b"{":  # an error that a proxy wrote into the stream
            self._data.append(line)
            return
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self._limit:
            raise ModelAnswerTooLarge(
                f"the model's answer has an event of more than {self._limit} bytes", limit=self._limit
            )


def json_value(data: bytes) -> Any:
    """Return what the JSON says; None when it is none."""
    try:
        return json.loads(
            data.decode(errors="replace"),
            strict=False,
            parse_constant=lambda _: None,
            object_pairs_hook=lambda pairs: {as_utf8(name): member for name, member in pairs},
        )
    except (ValueError, RecursionError):
        return None


def decode_json(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Return what the JSON says, as the decoder's type; raise the decoder's error when it is none of that."""
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        try:
            return msgspec.convert(json_value(data), decoder.type)
        except (msgspec.ValidationError, UnicodeError):
            raise exc from None


def encode_json(something: Any) -> bytes:
    """Return JSON of a value in which there may be halves of characters."""
    try:
        return msgspec.json.encode(something)
    except UnicodeEncodeError:
        return msgspec.json.encode(json.loads(as_utf8(json.dumps(something, ensure_ascii=False))))


def is_whole(data: bytes) -> bool:
    """Whether the data of an event that ends with its stream came whole."""
    return json_value(data) is not None or data.strip() == b"[DONE]"
