"""WebSockets where they begin: the upgrade, checked more strictly than aiohttp does (RFC 6455 section 4.2.1)."""

from __future__ import annotations

import binascii
from base64 import b64decode

from aiohttp import hdrs, web

from agent_sdk.protocol.errors import InvalidRequest, TooManySubprotocols
from agent_sdk.protocol.specs import SUBPROTOCOL

VERSION = "13"
SUBPROTOCOLS = 16
CLOSE_SECONDS = 2.0
"""How long a client may take to answer a close frame."""


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
