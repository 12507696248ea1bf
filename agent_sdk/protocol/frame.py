"""Binary frames, pieces of byte streams and of long messages behind a header of 16 bytes; and the credit of streams.

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

Both ends count payload bytes since the stream began. The receiver publishes how many may have been
sent in all; so a credit that arrives twice or late does no harm, and memory is bounded by one
window per stream.
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


class SendWindow:
    """The sender's view."""

    __slots__ = ("_allowed", "_sent")

    def __init__(self, size: int) -> None:
        self._allowed = size
        self._sent = 0

    @property
    def room(self) -> int:
        """Bytes that may be sent now."""
        return self._allowed - self._sent

    def take(self, wanted: int) -> int:
        """Use up to `wanted` bytes of the room; returns how many may be sent now, 0: wait for credit."""
        taken = min(wanted, self._allowed - self._sent)
        self._sent += taken
        return taken

    def granted(self, allowed: int) -> bool:
        """The receiver allows so many bytes in all; returns whether that is more than before.

        Raises:
            BadBinaryHeader: less than before. Credit is never taken back.
        """
        if allowed < self._allowed:
            raise BadBinaryHeader(f"credit went back from {self._allowed} to {allowed}")
        more = allowed > self._allowed
        self._allowed = allowed
        return more


class ReceiveWindow:
    """The receiver's view."""

    __slots__ = ("_allowed", "_consumed", "_received", "_size", "ended", "position")

    def __init__(self, size: int) -> None:
        self._size = size
        self._allowed = size
        self._received = 0
        self._consumed = 0
        self.position = 0
        """Where the next byte belongs."""
        self.ended = False

    @property
    def held(self) -> int:
        """Bytes that arrived and were not consumed yet."""
        return self._received - self._consumed

    @property
    def expected(self) -> int:
        """Bytes that may still come in with the credit given so far."""
        return 0 if self.ended else self._allowed - self._received

    def arrived(self, offset: int, length: int) -> None:
        """Bytes came in.

        Raises:
            BadBinaryHeader: past the credit, behind the position, or after the end.
        """
        if offset < self.position or self.ended:
            raise self._misplaced(offset)
        if self._received + length > self._allowed:
            raise BadBinaryHeader(f"{self._received + length - self._allowed} bytes more than the credit")
        self._received += length
        self.position = offset + length

    def end(self, offset: int) -> None:
        """The sender is done; its last position is `offset`.

        Raises:
            BadBinaryHeader: behind the position, or a second end.
        """
        if offset < self.position or self.ended:
            raise self._misplaced(offset)
        self.position = offset
        self.ended = True

    def consumed(self, length: int, *, any_room: bool = False) -> int | None:
        """Bytes were used up; returns the new total to publish, or None while that is not worth a frame.

        It is worth one when half a window became free (`any_room`: anything), and not any more when the
        sender is done.
        """
        self._consumed += length
        allowed = self._consumed + self._size
        if self.ended or (allowed - self._allowed < self._size // 2 and not any_room):
            return None
        self._allowed = allowed
        return allowed

    def _misplaced(self, offset: int) -> BadBinaryHeader:
        if self.ended:
            return BadBinaryHeader("a frame after the end of its stream")
        return BadBinaryHeader(f"offset went back from {self.position} to {offset}")
