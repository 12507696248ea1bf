"""One connection to a server or a box: reach it, authenticate, learn its limits. It owns the Peer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ssl import SSLContext
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from msgspec import Raw

from agent_sdk.ids import checked_new_conversation
from agent_sdk.outbound import proxy_for, trusted
from agent_sdk.protocol.errors import AgentServerError, ConnectionLost, InvalidParams, Unauthorized
from agent_sdk.protocol.methods.connection import ClientInfo, Initialize, Initialized
from agent_sdk.protocol.methods.method import Method
from agent_sdk.protocol.specs import PROTOCOL_VERSION, SUBPROTOCOL, Limits, WorkspaceSpec
from agent_sdk.remote.address import checked_key, checked_url
from agent_sdk.remote.refusal import (
    LONGEST_BODY,
    check_no_tls,
    other_version,
    refused,
    unauthorised,
    unreachable,
)
from agent_sdk.rpc.peer import Handler, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.rpc.unix import connect_unix
from agent_sdk.version import __version__

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.client_proto import ResponseHandler

OnNotice = Callable[[str, Raw], None]
HEARTBEAT_SECONDS = 20.0
ANSWER_SECONDS = 30.0
"""For the upgrade, and again for the answer to `initialize`."""
SWITCHING = 101
CLIENT = ClientInfo(name="agent-sdk", version=__version__)


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
    ssl: SSLContext | None = None,
    direct: bool = False,
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
        api_key: the key of a server, or the token of a box.
        ssl: which certificates count; None: those that this machine trusts, and SSL_CERT_FILE names.
        direct: go there without the proxy that the environment names.
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
        if urlsplit(url).scheme == "unix":
            pipe = await _reach_box(urlsplit(url).path)
        else:
            pipe = await _reach_server(
                stack, checked_url(url), checked_key(api_key), ssl, direct, conversation, heartbeat
            )
        peer = Peer(pipe, handlers or {}, opener=True, on_notice=on_notice)
        await stack.enter_async_context(peer)
        initialize = Initialize(
            protocol_version=PROTOCOL_VERSION,
            client=CLIENT,
            limits=Limits(),
            auth=api_key if url.startswith("unix:") else None,
            workspace=workspace if conversation == "new" else None,
            conversation=checked_new_conversation(new_id) if conversation == "new" else None,
        )
        try:
            answer = await peer.call(initialize, timeout=ANSWER_SECONDS)
        except InvalidParams as exc:
            raise other_version(url, exc) from None
        except Unauthorized as exc:
            raise unauthorised(url, api_key) from exc
        peer.other_limits = answer.limits
        yield Connection(peer, answer)


class _Refused(Exception):
    """Carries an error through aiohttp, which takes those that are an OSError for its own."""

    def __init__(self, error: AgentServerError) -> None:
        self.error = error


async def _reach_box(path: str) -> Pipe:
    try:
        return await connect_unix(path)
    except OSError as exc:
        raise ConnectionLost(f"no box listens on {path}: {exc.strerror or exc}") from None


async def _gone(protocol: ResponseHandler, transport: asyncio.Transport | None) -> None:
    """Close the socket of a WebSocket that has ended. With TLS, it would else wait for the other end's last word."""
    closed = protocol.closed
    if transport is not None:
        transport.abort()
    if closed is not None:
        await asyncio.wait((closed,))
        closed.exception()


async def _reach_server(
    stack: AsyncExitStack,
    url: str,
    api_key: str | None,
    ssl: SSLContext | None,
    direct: bool,
    conversation: str,
    heartbeat: float,
) -> Pipe:
    import aiohttp  # noqa: PLC0415  costs 0.3 s; local work does without

    from agent_sdk.rpc.websocket import WebSocketPipe  # noqa: PLC0415

    async def only_upgraded(
        request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Refuse every other answer while its body can be read; so no redirect is followed either."""
        answer = await send(request)
        if answer.status == SWITCHING:
            if (connection := answer.connection) is not None and connection.protocol is not None:
                stack.push_async_callback(_gone, connection.protocol, connection.transport)
            return answer
        with suppress(aiohttp.ClientError):
            body = await answer.content.read(LONGEST_BODY)
        answer.close()
        raise _Refused(refused(url, answer.status, answer.headers, body, api_key=api_key))

    session = await stack.enter_async_context(
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), middlewares=(only_upgraded,))
    )
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            socket = await session.ws_connect(
                f"{url}/v1/conversations/{conversation}",
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                protocols=(SUBPROTOCOL,),
                max_msg_size=Limits().frame_bytes,
                heartbeat=heartbeat,
                compress=0,
                autoclose=True,
                decode_text=False,
                proxy=None if direct else proxy_for(url),
                ssl=await trusted(url, ssl),
            )
    except _Refused as exc:
        raise exc.error from None
    except aiohttp.ServerDisconnectedError as exc:
        if exc.message is None or isinstance(exc.message, str):  # not a byte came
            await check_no_tls(url)
        raise unreachable(url, exc, direct=direct) from None
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise unreachable(url, exc, direct=direct) from None
    return WebSocketPipe(socket, heartbeat=heartbeat)
