"""One connection to a server or a box: reach it, authenticate, learn its limits. It owns the Peer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from msgspec import Raw

from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ConversationNotFound,
    InvalidParams,
    Overloaded,
    PolicyDenied,
    Unauthorized,
)
from agent_sdk.protocol.methods import ClientInfo, Initialize, Initialized, Method
from agent_sdk.protocol.specs import PROTOCOL_VERSION, SUBPROTOCOL, Limits, WorkspaceSpec
from agent_sdk.rpc.peer import Handler, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.rpc.unix import connect_unix
from agent_sdk.version import __version__

if TYPE_CHECKING:
    import aiohttp

OnNotice = Callable[[str, Raw], None]
HEARTBEAT_SECONDS = 20.0
ANSWER_SECONDS = 30.0
"""For the upgrade, and again for the answer to `initialize`."""
CLIENT = ClientInfo(name="agent-sdk", version=__version__)

_REFUSALS: Mapping[int, Callable[[str], AgentServerError]] = {
    401: lambda url: Unauthorized(f"{url} does not accept the API key; pass the server's key as api_key"),
    403: lambda url: PolicyDenied(f"{url} refuses this origin"),
    404: lambda url: ConversationNotFound(f"{url}: no such conversation"),
    421: lambda url: PolicyDenied(f"{url} is not a name this server answers to"),
}
_BUSY = {429: "refuses further connections for now", 503: "is shutting down"}


class Connection:
    """An initialised connection."""

    def __init__(self, peer: Peer, answer: Initialized) -> None:
        self.peer = peer
        self.answer = answer

    @property
    def conversation(self) -> str | None:
        """Id of the conversation it is bound to; None on a box."""
        return self.answer.conversation


@asynccontextmanager
async def connect(
    url: str,
    api_key: str | None = None,
    *,
    conversation: str = "new",
    workspace: WorkspaceSpec | None = None,
    handlers: Mapping[type[Method[Any]], Handler] | None = None,
    on_notice: OnNotice | None = None,
    new_id: str | None = None,
    heartbeat: float = HEARTBEAT_SECONDS,
) -> AsyncIterator[Connection]:
    """Open a connection, and close it when the block ends.

    Args:
        url: `http://host:port` or `https://…` of a server, or `unix:///path` of a box.
        conversation: id of an existing one; `new` makes one with `workspace`.
        new_id: the id that the new one gets; repeated, it leads to the one that was made.
        heartbeat: seconds of silence after which a server is asked whether it is alive; one that does
            not answer within half of that is lost.

    Raises:
        ConnectionLost: nobody answers there, or not within 30 s.
        Unauthorized, ConversationNotFound, PolicyDenied, Overloaded: the server refuses.
        InvalidParams: the URL makes no sense.
    """
    async with AsyncExitStack() as stack:
        pipe = await _reach(stack, url, api_key, conversation, heartbeat)
        peer = Peer(pipe, handlers or {}, opener=True, on_notice=on_notice)
        await stack.enter_async_context(peer)
        answer = await peer.call(
            Initialize(
                protocol_version=PROTOCOL_VERSION,
                client=CLIENT,
                limits=Limits(),
                workspace=workspace if conversation == "new" else None,
                conversation=new_id if conversation == "new" else None,
            ),
            timeout=ANSWER_SECONDS,
        )
        peer.other_limits = answer.limits
        yield Connection(peer, answer)


async def _reach(
    stack: AsyncExitStack, url: str, api_key: str | None, conversation: str, heartbeat: float
) -> Pipe:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        try:
            return await connect_unix(parts.path)
        except OSError as exc:
            raise ConnectionLost(f"no box listens on {parts.path}: {exc.strerror or exc}") from None
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
        raise InvalidParams(f"url must start with http://, https:// or unix:// and name a host (got {url!r})")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return await _reach_server(stack, url.rstrip("/"), headers, conversation, heartbeat)


async def _reach_server(
    stack: AsyncExitStack, url: str, headers: dict[str, str], conversation: str, heartbeat: float
) -> Pipe:
    import aiohttp  # noqa: PLC0415  costs 0.3 s; local work does without

    from agent_sdk.rpc.websocket import WebSocketPipe  # noqa: PLC0415

    session = await stack.enter_async_context(aiohttp.ClientSession())
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            socket = await _upgrade(session, f"{url}/v1/conversations/{conversation}", headers, heartbeat)
    except aiohttp.WSServerHandshakeError as exc:
        raise _refused(url, exc) from None
    except (aiohttp.ClientError, OSError, TimeoutError) as exc:
        raise unreachable(url, exc) from None
    return WebSocketPipe(socket)


def _refused(url: str, exc: aiohttp.WSServerHandshakeError) -> AgentServerError:
    refusal = _REFUSALS.get(exc.status)
    if refusal is not None:
        return refusal(url)
    if exc.status in _BUSY:
        seconds = exc.headers.get("Retry-After", "1") if exc.headers else "1"
        after = min(int(seconds), 60) * 1000 if seconds.isdecimal() else 1000
        return Overloaded(f"{url} {_BUSY[exc.status]}", retry_after_ms=after)
    says = f"it answered {exc.status} {exc.message}"
    if exc.status >= 500:
        return ConnectionLost(f"{url} cannot be reached for now: {says}")
    return ConnectionLost(f"{url} is no agent server: {says}", status=exc.status)


def unreachable(url: str, exc: Exception) -> ConnectionLost:
    """Return what there is to say when nobody answers at an address."""
    number = getattr(getattr(exc, "os_error", exc), "errno", None)
    reason = os.strerror(number) if number and number > 0 else str(exc) or type(exc).__name__
    return ConnectionLost(f"cannot reach {url}: {reason}; is the server running there?")


def _upgrade(
    session: aiohttp.ClientSession, url: str, headers: dict[str, str], heartbeat: float
) -> Awaitable[aiohttp.ClientWebSocketResponse[Literal[False]]]:
    # A redirect to another origin loses the Authorization header (aiohttp drops it), so the key stays here.
    return session.ws_connect(
        url.replace("http", "ws", 1) if url.startswith("http") else url,
        headers=headers,
        protocols=(SUBPROTOCOL,),
        max_msg_size=Limits().frame_bytes,
        heartbeat=heartbeat,
        compress=0,
        autoclose=True,
        decode_text=False,
    )
