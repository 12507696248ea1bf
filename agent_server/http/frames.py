"""A look at the headers of WebSocket frames before aiohttp parses them.

aiohttp 3.14 refuses reserved bits, unknown opcodes, control frames that are fragmented or too long, and continuations
of nothing. It accepts unmasked frames from clients, lengths that are not minimal, any number of fragments (empty ones
cost no bytes of its limit) and of control frames; what is too long for it hears no limit.
"""

from __future__ import annotations

from msgspec import Struct

CLOSE = 8
"""The first opcode of control frames."""
LONGEST_HEADER = 14
FRAGMENTS = 4096
CONTROLS_PER_SECOND = 100

PROTOCOL_ERROR = 1002
POLICY = 1008
TOO_BIG = 1009


class Violation(Struct, frozen=True):
    """Why a connection has to be closed."""

    code: int
    """The close code of RFC 6455."""
    reason: str


class FrameWatch:
    """Follows the frames that one client sends."""

    def __init__(self, limit: int) -> None:
        """Take the longest message in bytes, all fragments together."""
        self._limit = limit
        self._message = 0
        self._head = b""
        self._left = 0
        self._fragments = 0
        self._second = -1
        self._controls = 0

    def look(self, data: bytes, now: float) -> Violation | None:
        """Look at the next bytes that came, in order; return what is wrong, or None.

        Args:
            data: the bytes as they came from the network.
            now: seconds of any clock that does not go back.
        """
        position = 0
        while (position := position + self._left) < len(data):
            self._left = 0
            head = self._head + data[position : position + LONGEST_HEADER - len(self._head)]
            extended = {126: 2, 127: 8}.get(head[1] & 0x7F, 0) if len(head) > 1 else 0
            size = 6 + extended
            if len(head) > 1 and not head[1] & 0x80:
                return Violation(PROTOCOL_ERROR, "a client's frames must be masked")
            if len(head) < size:
                self._head = head
                return None
            position += size - len(self._head)
            self._head = b""
            self._left = int.from_bytes(head[2 : 2 + extended], "big") if extended else head[1] & 0x7F
            if extended and self._left < (126 if extended == 2 else 1 << 16):
                return Violation(PROTOCOL_ERROR, "the length of a frame is not written in its shortest form")
            wrong = self._count(head[0], now)
            if wrong is not None:
                return wrong
        self._left = position - len(data)
        return None

    def _count(self, first: int, now: float) -> Violation | None:
        if first & 0x0F >= CLOSE:
            second = int(now)
            self._controls = self._controls + 1 if second == self._second else 1
            self._second = second
            if self._controls > CONTROLS_PER_SECOND:
                return Violation(POLICY, f"limit {CONTROLS_PER_SECOND} control frames in a second")
            return None
        self._fragments += 1
        self._message += self._left
        if self._message > self._limit:
            return Violation(TOO_BIG, f"limit {self._limit} bytes in a message")
        if self._fragments > FRAGMENTS:
            return Violation(POLICY, f"limit {FRAGMENTS} fragments in a message")
        if first & 0x80:
            self._fragments = self._message = 0
        return None
