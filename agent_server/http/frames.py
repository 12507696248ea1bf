"""A look at WebSocket frames before aiohttp parses them: what it lets pass and RFC 6455 or we do not.

aiohttp 3.14 accepts unmasked frames from clients, lengths that are not minimal, any number of
fragments (empty ones cost no bytes of its message limit) and any number of pings. This watcher
reads the frame headers only, without I/O and without a clock, and says where a connection goes wrong.
"""

from __future__ import annotations

from msgspec import Struct

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
OPCODES = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG})
CLOSE_CODES = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})
LONGEST_CONTROL = 125
LONGEST_HEADER = 14
FRAGMENTS = 4096
CONTROLS_PER_SECOND = 100

PROTOCOL_ERROR = 1002
POLICY = 1008
TOO_BIG = 1009


class Violation(Struct, frozen=True):
    """Why the connection has to be closed."""

    code: int
    """The close code of RFC 6455."""
    reason: str
    at: int = 0
    """How many bytes of the looked-at piece came before it and are fine."""


class FrameWatch:
    """Follows the frames that one client sends."""

    def __init__(self, limit: int) -> None:
        """Take the longest message in bytes, all fragments together."""
        self._limit = limit
        self._head = b""
        self._left = 0
        self._closing: bytes | None = None
        self._mask = b""
        self._fragments = 0
        self._message = 0
        self._second = -1
        self._controls = 0

    def look(self, data: bytes, now: float) -> Violation | None:
        """Look at the next bytes that came, in order.

        Args:
            data: as they came from the network.
            now: seconds of any clock that does not go back.

        Returns:
            What is wrong, or None. After a violation the watcher must not be used any more.
        """
        position, size = 0, len(data)
        while position < size:
            begins = position
            if self._left:
                position, wrong = self._payload(data, position)
            else:
                position, wrong = self._next_header(data, position, now)
            if wrong is not None:
                return Violation(wrong.code, wrong.reason, begins)
        return None

    def _payload(self, data: bytes, position: int) -> tuple[int, Violation | None]:
        end = min(position + self._left, len(data))
        self._left -= end - position
        if self._closing is None:
            return end, None
        self._closing += data[position:end]
        return end, None if self._left else self._close_frame(self._closing)

    def _next_header(self, data: bytes, position: int, now: float) -> tuple[int, Violation | None]:
        head = self._head + data[position : position + LONGEST_HEADER - len(self._head)]
        length = _header_length(head)
        if length is None or len(head) < length:
            self._head = head
            return len(data), _wrong_opcode(head[0])  # at once: a bad frame is not waited for
        position += length - len(self._head)
        self._head = b""
        return position, self._header(head[:length], now)

    def _header(self, head: bytes, now: float) -> Violation | None:
        opcode, final, masked, length = head[0] & 0x0F, head[0] & 0x80, head[1] & 0x80, head[1] & 0x7F
        wrong = _wrong_opcode(head[0])
        if wrong is not None:
            return wrong
        if not masked:
            return Violation(PROTOCOL_ERROR, "a client's frames must be masked")
        if length == 126:
            length = int.from_bytes(head[2:4], "big")
            minimal = length > LONGEST_CONTROL
        elif length == 127:
            length = int.from_bytes(head[2:10], "big")
            minimal = length > 0xFFFF
        else:
            minimal = True
        self._mask = head[-4:]
        self._left = length
        self._closing = None
        if opcode >= CLOSE:
            return self._control(opcode, final, length, now)
        if not minimal:
            return Violation(PROTOCOL_ERROR, "the length of a frame is not written in its shortest form")
        return self._data(opcode, final, length)

    def _control(self, opcode: int, final: int, length: int, now: float) -> Violation | None:
        if not final:
            return Violation(PROTOCOL_ERROR, "a control frame must not be fragmented")
        if length > LONGEST_CONTROL:
            return Violation(PROTOCOL_ERROR, f"limit {LONGEST_CONTROL} bytes in a control frame")
        if opcode == CLOSE and length:
            self._closing = b""
        second = int(now)
        self._controls = self._controls + 1 if second == self._second else 1
        self._second = second
        if self._controls > CONTROLS_PER_SECOND:
            return Violation(POLICY, f"limit {CONTROLS_PER_SECOND} control frames in a second")
        return None

    def _data(self, opcode: int, final: int, length: int) -> Violation | None:
        if opcode == CONTINUATION and not self._fragments:
            return Violation(PROTOCOL_ERROR, "a continuation of nothing")
        if opcode != CONTINUATION and self._fragments:
            return Violation(PROTOCOL_ERROR, "a new message inside of another")
        self._fragments += 1
        self._message += length
        if self._message > self._limit:
            return Violation(TOO_BIG, f"limit {self._limit} bytes in a message")
        if self._fragments > FRAGMENTS:
            return Violation(POLICY, f"limit {FRAGMENTS} fragments in a message")
        if final:
            self._fragments = self._message = 0
        return None

    def _close_frame(self, masked: bytes) -> Violation | None:
        self._closing = None
        payload = bytes(byte ^ self._mask[index % 4] for index, byte in enumerate(masked))
        code = int.from_bytes(payload[:2], "big")
        if len(payload) < 2 or not (code in CLOSE_CODES or 3000 <= code <= 4999):
            return Violation(PROTOCOL_ERROR, "not a close code")
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            return Violation(PROTOCOL_ERROR, "the reason of a close frame must be UTF-8")
        return None


def _wrong_opcode(first: int) -> Violation | None:
    if first & 0x70:
        return Violation(PROTOCOL_ERROR, "reserved bits must be zero")
    if first & 0x0F not in OPCODES:
        return Violation(PROTOCOL_ERROR, f"unknown opcode {first & 0x0F}")
    return None


def _header_length(head: bytes) -> int | None:
    """The length of this frame's header; None while that cannot be known. An unmasked one has no mask to wait for."""
    if len(head) < 2:
        return None
    extended = {126: 2, 127: 8}.get(head[1] & 0x7F, 0)
    return 2 + extended + (4 if head[1] & 0x80 else 0)
