"""Binary frames: pieces of byte streams and of long messages, behind a header of 16 bytes.

Big endian: version u8 = 1, kind u8, flags u16, stream u32, offset u64; then the payload.

    kind 0  data     offset: position of the payload's first byte; it never goes backwards, and a
                     sender that leaves bytes out jumps ahead. 1..65536 bytes.
    kind 1  end      offset: final position. Payload: trailer, at most 256 bytes.
    kind 2  credit   offset: how many payload bytes the sender may have sent in all since the
                     stream began; bytes that were jumped over cost nothing. No payload.
    kind 3  reset    the stream is over at once, in both directions. Payload: reason, UTF-8, at
                     most 256 bytes.
    kind 4  message  a piece of a JSON-RPC message; offset: its position in the message, flag 1:
                     the last piece. Stream 0 carries events, stream 1 everything else; each
                     carries one message after the other.

Flags have no other meaning yet and must be zero. Whoever opened the connection gives the byte
streams it opens odd numbers from 1, the other side even ones from 2.
"""

from __future__ import annotations

import struct

from msgspec import Struct

from agent_sdk.protocol.errors import BadBinaryHeader

VERSION = 1
HEADER_BYTES = 16
PAYLOAD_BYTES = 64 << 10
TRAILER_BYTES = 256

DATA, END, CREDIT, RESET, MESSAGE = range(5)
LAST = 1

_head = struct.Struct(">BBHIQ")


class Data(Struct, frozen=True, gc=False):
    """Bytes of a stream."""

    stream: int
    offset: int
    payload: bytes


class End(Struct, frozen=True, gc=False):
    """The stream ended as it should."""

    stream: int
    offset: int
    trailer: bytes


class Credit(Struct, frozen=True, gc=False):
    """The receiver has room: so many payload bytes may have been sent in all."""

    stream: int
    allowed: int


class Reset(Struct, frozen=True, gc=False):
    """One side gave the stream up."""

    stream: int
    reason: str


class Piece(Struct, frozen=True, gc=False):
    """A part of a JSON-RPC message."""

    stream: int
    offset: int
    payload: memoryview
    last: bool


BinaryFrame = Data | End | Credit | Reset | Piece


def data(stream: int, offset: int, payload: bytes | memoryview) -> bytes:
    """A data frame; the payload is copied once."""
    return b"".join((_head.pack(VERSION, DATA, 0, stream, offset), payload))


def end(stream: int, offset: int, trailer: bytes = b"") -> bytes:
    """An end frame."""
    return _head.pack(VERSION, END, 0, stream, offset) + trailer


def credit(stream: int, allowed: int) -> bytes:
    """A credit frame."""
    return _head.pack(VERSION, CREDIT, 0, stream, allowed)


def reset(stream: int, reason: str) -> bytes:
    """A reset frame; a long reason is cut."""
    cut = reason.encode(errors="replace")[:TRAILER_BYTES]
    return _head.pack(VERSION, RESET, 0, stream, 0) + cut


def piece(stream: int, offset: int, payload: bytes | memoryview, *, last: bool) -> bytes:
    """A message frame."""
    return b"".join((_head.pack(VERSION, MESSAGE, LAST if last else 0, stream, offset), payload))


def unpack(frame: bytes) -> BinaryFrame:
    """The meaning of a binary frame.

    Raises:
        BadBinaryHeader: too short or too long, an unknown version or kind, a flag without meaning,
            or a payload that the kind does not allow.
    """
    if not HEADER_BYTES <= len(frame) <= HEADER_BYTES + PAYLOAD_BYTES:
        raise BadBinaryHeader(
            f"a binary frame has 16 to {HEADER_BYTES + PAYLOAD_BYTES} bytes, not {len(frame)}"
        )
    version, kind, flags, stream, offset = _head.unpack_from(frame)
    if version != VERSION:
        raise BadBinaryHeader(f"unknown version {version}")
    if kind > MESSAGE:
        raise BadBinaryHeader(f"unknown kind {kind}")
    if kind == MESSAGE:
        return _unpack_piece(frame, flags, stream, offset)
    if flags:
        raise BadBinaryHeader(f"unknown flags {flags:#06x}")
    if stream == 0:
        raise BadBinaryHeader("stream 0 carries no bytes")
    if kind == DATA:
        if len(frame) == HEADER_BYTES:
            raise BadBinaryHeader("a data frame without data")
        return Data(stream, offset, frame[HEADER_BYTES:])
    payload = frame[HEADER_BYTES:]
    if kind == CREDIT:
        if payload:
            raise BadBinaryHeader("a credit frame has no payload")
        return Credit(stream, offset)
    if len(payload) > TRAILER_BYTES:
        raise BadBinaryHeader(f"more than {TRAILER_BYTES} bytes in an end or reset frame")
    return End(stream, offset, payload) if kind == END else Reset(stream, payload.decode(errors="replace"))


def _unpack_piece(frame: bytes, flags: int, stream: int, offset: int) -> Piece:
    if flags & ~LAST:
        raise BadBinaryHeader(f"unknown flags {flags:#06x}")
    if len(frame) == HEADER_BYTES:
        raise BadBinaryHeader("a message frame without data")
    return Piece(stream, offset, memoryview(frame)[HEADER_BYTES:], bool(flags & LAST))
