"""What a request says: after the `?` of its address, where anything unknown is refused, in its body, and where it wants
a WebSocket, which is checked more strictly than aiohttp does (RFC 6455 section 4.2.1)."""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode
from collections.abc import Callable
from typing import Any, get_args

import msgspec
from aiohttp import hdrs, web
from msgspec import Raw

from agent_sdk.ids import is_id
from agent_sdk.protocol.checks import whole
from agent_sdk.protocol.codec import decode_params
from agent_sdk.protocol.errors import InvalidParams, InvalidRequest, LimitExceeded, TooManySubprotocols
from agent_sdk.protocol.methods.conversation import ListConversations
from agent_sdk.protocol.results import State
from agent_sdk.protocol.specs import SUBPROTOCOL

PAGE = 1000
LARGEST_SEQ = 2**53
STATES: tuple[str, ...] = get_args(State)
PARAMETERS: dict[str, dict[str, str]] = {
    "/v1/conversations": {
        "limit": f"how many at most, 1..{PAGE} (100)",
        "before": "only those that are older than the conversation with this id",
        "state": f"only those in this state: {', '.join(STATES)}",
        "tag": "only those with this tag, `NAME=VALUE`; may be repeated",
    },
    "/v1/conversations/{id}/events": {
        "after": "only events with a higher `seq` (0)",
        "limit": f"how many at most on a page, 1..{PAGE} ({PAGE})",
    },
    "/v1/rpc": {"conversation": "the id of the conversation that the call concerns, if it concerns one"},
}
"""By address, each with what it is for; other addresses take none."""
VERSION = "13"
SUBPROTOCOLS = 16
CLOSE_SECONDS = 2.0
"""How long a client may take to answer a close frame."""
_REPEATED = "tag"
_SHOWN = 64


def check_query(request: web.Request) -> None:
    """Check that an address is asked for nothing that it does not know.

    Raises:
        InvalidParams: it is, or a parameter comes twice.
    """
    resource = request.match_info.route.resource
    if resource is None:  # there is no such address
        return
    known = PARAMETERS.get(resource.canonical, {})
    for name in request.query:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise InvalidParams(f"?{name[:_SHOWN]}: there is no such parameter; {resource.canonical} {takes}")
        if name != _REPEATED and len(request.query.getall(name)) > 1:
            raise InvalidParams(f"?{name}: it is given more than once; leave one")


def wanted(request: web.Request) -> ListConversations:
    """Return which conversations are asked for: limit, before, state, and any number of `tag=NAME=VALUE`.

    Raises:
        InvalidParams: one of these makes no sense.
    """
    given: dict[str, Any] = {"limit": number(request, "limit", 100, 1, PAGE), "tags": {}}
    state, before = (request.query.get(name) for name in ("state", "before"))
    if state is not None and state not in STATES:
        raise InvalidParams(f"?state: expected one of {', '.join(STATES)}, got {state[:_SHOWN]!r}")
    if before is not None and not is_id(before):
        raise InvalidParams(f"?before: expected the id of a conversation, got {before[:_SHOWN]!r}")
    given |= {"state": state, "before": before}
    for tag in request.query.getall("tag", []):
        name, equals, value = tag.partition("=")
        if not (name and equals) or name in given["tags"]:
            raise InvalidParams(
                f"?tag: expected NAME=VALUE with another NAME each time, got {tag[:_SHOWN]!r}"
            )
        given["tags"][name] = value
    return decode_params(ListConversations, Raw(msgspec.json.encode(given)))


def number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    """Return what a parameter says; without it the default.

    Raises:
        InvalidParams: it is no number, or out of range.
    """
    text = request.query.get(name)
    return default if text is None else checked_number(f"?{name}", text, least, most)


def checked_number(name: str, text: str, least: int, most: int) -> int:
    """Return the number in a text of digits.

    Raises:
        InvalidParams: it is none, or out of range.
    """
    found = whole(text)
    if found is not None and least <= found <= most:
        return found
    raise InvalidParams(f"{name}: expected int {least}..{most}, got {text[:_SHOWN]!r}")


async def read_body(
    request: web.Request, *, limit: int, seconds: float, take: Callable[[int], object] = lambda size: None
) -> bytearray:
    """Return the body of a request.

    Args:
        request: whose.
        limit: bytes that it may have.
        seconds: how long it may take.
        take: told of bytes before they are read; what it raises is raised.

    Raises:
        LimitExceeded, InvalidRequest: it is too long, or too slow.
    """
    too_long = LimitExceeded(f"a body of more than {limit} bytes", field="body", limit=limit)
    announced, body = request.content_length or 0, bytearray()
    if announced > limit:
        raise too_long
    take(announced)
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.content.iter_any():
                if len(body) + len(piece) > limit:
                    raise too_long
                if not announced:
                    take(len(piece))
                body += piece
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {seconds:g} s", status=408) from None
    return body


def is_upgrade(request: web.BaseRequest) -> bool:
    """Return whether the client wants a WebSocket."""
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
