"""WebSockets where they begin: the upgrade, checked more strictly than aiohttp does (RFC 6455 section 4.2.1), and a
look at the headers of frames before aiohttp parses them.

aiohttp 3.14 refuses reserved bits, unknown opcodes, control frames that are fragmented or too long, and continuations
of nothing. It accepts unmasked frames from clients, lengths that are not minimal, any number of fragments (empty ones
cost no bytes of its limit) and of control frames; what is too long for it hears no limit.
"""

from __future__ import annotations

import binascii
from base64 import b64decode

from aiohttp import hdrs, web
from msgspec import Struct

from agent_sdk.protocol.errors import InvalidRequest, TooManySubprotocols
from agent_sdk.protocol.specs import SUBPROTOCOL

VERSION = "13"
SUBPROTOCOLS = 16
CLOSE_SECONDS = 2.0
"""How long a client may take to answer a close frame."""
CLOSE = 8
"""The first opcode of control frames."""
LONGEST_HEADER = 14
FRAGMENTS = 4096
CONTROLS_PER_SECOND = 100

PROTOCOL_ERROR = 1002
POLICY = 1008
TOO_BIG = 1009


def is_upgrade(request: web.BaseRequest) -> bool:
    """Whether the client wants a WebSocket."""
    return "websocket" in request.headers.get(hdrs.UPGRADE, "").lower()


def check_upgrade(request: web.BaseRequest) -> None:
    """Accept an upgrade request.

    Raises:
        InvalidRequest: details: `status` and `headers` of the HTTP answer.
        TooManySubprotocols: more than 16 are offered.
    """
    headers = request.headers
    if not is_upgrade(request) or "upgrade" not in headers.get(hdrs.CONNECTION, "").lower():
        raise _needed("this address is a WebSocket; connect with Upgrade: websocket")
    if hdrs.TRANSFER_ENCODING in headers or headers.get(hdrs.CONTENT_LENGTH, "0") != "0":
        raise InvalidRequest("an upgrade request has no body", status=400)
    if headers.getall(hdrs.SEC_WEBSOCKET_VERSION, []) != [VERSION]:
        raise _needed(f"the version of the WebSocket protocol must be {VERSION}")
    keys = headers.getall(hdrs.SEC_WEBSOCKET_KEY, [])
    if len(keys) != 1 or not _is_nonce(keys[0]):
        raise InvalidRequest("one Sec-WebSocket-Key of 16 bytes in base64 is needed", status=400)
    offered = [
        name.strip()
        for header in headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, [])
        for name in header.split(",")
    ]
    if len(offered) > SUBPROTOCOLS:
        raise TooManySubprotocols(
            f"limit {SUBPROTOCOLS} subprotocols, got {len(offered)}", limit=SUBPROTOCOLS
        )
    if offered and SUBPROTOCOL not in offered:
        raise InvalidRequest(f"the subprotocol must be {SUBPROTOCOL}", status=400)


async def accept(request: web.Request, *, longest_message: int, heartbeat: float) -> web.WebSocketResponse:
    """Answer 101. Extensions are not taken up: compression costs memory per connection and more time than it saves."""
    socket = web.WebSocketResponse(
        protocols=(SUBPROTOCOL,),
        heartbeat=heartbeat,
        timeout=CLOSE_SECONDS,
        compress=False,
        # aiohttp refuses messages of this size; ours is the longest that is accepted.
        max_msg_size=longest_message + 1,
        decode_text=False,
    )
    await socket.prepare(request)
    return socket


def _needed(sentence: str) -> InvalidRequest:
    headers = {hdrs.SEC_WEBSOCKET_VERSION: VERSION, hdrs.UPGRADE: "websocket"}
    return InvalidRequest(sentence, status=426, headers=headers)


def _is_nonce(key: str) -> bool:
    try:
        return len(b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


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
