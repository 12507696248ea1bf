"""The HTTP server: its listening socket, its start and stop, and what it answers at which address, behind security."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from msgspec import Raw

from agent_sdk.ids import new_id
from agent_sdk.protocol.codec import Codec, Request, decode_params, unknown_method
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConversationDamaged,
    ConversationNotFound,
    InternalError,
    InvalidParams,
    InvalidRequest,
    to_wire,
)
from agent_sdk.protocol.methods.connection import Initialize
from agent_sdk.protocol.methods.conversation import Delete, EventPage
from agent_sdk.protocol.methods.method import Done
from agent_sdk.rpc.websocket import WebSocketPipe
from agent_server.config.options import ServerConfig
from agent_server.config.sources import TRY_LATER, StartRefused
from agent_server.conversations.loaded import LoadedConversation
from agent_server.http.connection import Connection, ConnectionLimiter, ProxyRules
from agent_server.http.errors import as_json, http_error
from agent_server.http.request import (
    LARGEST_SEQ,
    PAGE,
    accept,
    check_upgrade,
    checked_number,
    number,
    read_body,
    wanted,
)
from agent_server.http.security import KEY_SHOWN, HostRules, OriginRules, Security
from agent_server.session.methods import (
    NEW,
    OF_THE_SERVER,
    HttpCall,
    check_initialize,
    initialized,
    named_or_new,
    needs_a_websocket,
)
from agent_server.session.session import Session, Sessions
from agent_server.session.subscription import stream_events

BACKLOG = 512
SEND_BUFFER = 128 << 10
"""Bytes that the kernel keeps for a reader that does not read (Linux doubles it); without this some 4 MiB."""
LAST_ANSWERS_SECONDS = 1.0
CLOSE_SECONDS = 1.5
"""How long a client may take to agree to the end of its WebSocket."""
CUT_OFF_SECONDS = 30.0
"""How long a client that reads nothing can still find out why it was cut off."""
LINGER_SECONDS = 1.0
"""How long the rest of a refused body is read, so that the client finds the answer and not a reset connection."""
UNACKNOWLEDGED_MS = 30_000
"""How long sent bytes may stay unacknowledged until the kernel gives the connection up."""
CANNOT_LISTEN = {
    errno.EADDRINUSE: "the port is in use; choose another with --port, 0 takes a free one",
    errno.EACCES: "this user may not use the port; choose one above 1023 with --port",
    errno.EADDRNOTAVAIL: "no network interface of this machine has the address; choose another with --host",
}
_DOCUMENT = Path(__file__).with_name("openrpc.json")
"""Written by `make docs`."""


@asynccontextmanager
async def listening(
    config: ServerConfig,
    sessions: Sessions,
    routes: Routes,
    limiter: ConnectionLimiter,
    own_keys: Sequence[web.RouteDef] = (),
    at: Callable[[str], Handler | None] = lambda host: None,
) -> AsyncIterator[int]:
    """Serve HTTP for the length of the block; yields the port.

    Leaving closes the listening socket and the connections at once: whoever leaves has let the work
    finish and told the sessions.

    Args:
        config, sessions, routes, limiter: what is served, and to whom.
        own_keys: further routes, which check keys of their own.
        at: what serves all that is asked of another host name; None: this server does.

    Raises:
        StartRefused: the address or the port cannot be had.
    """
    security = Security(
        HostRules(config.host, config.allow_hosts),
        OriginRules(config.allow_origins),
        sessions.authority,
        sessions.logs,
        sessions.metrics,
        [route.handler for route in own_keys],
        at,
    )
    proxies = ProxyRules(config.proxies)
    app = web.Application(middlewares=security.middlewares(), client_max_size=config.limits.message_bytes)
    app.on_response_prepare.append(security.label)
    app.add_routes([*routes.table(), *own_keys])
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=LAST_ANSWERS_SECONDS)
    await runner.setup()
    left: list[Connection] = []
    try:
        server = runner.server
        assert server is not None

        def connect() -> Connection:
            return Connection(
                server,
                limiter,
                longest_message=config.limits.frame_bytes,
                proxies=proxies,
                access_log=None,
                auto_decompress=False,  # what is passed on goes as it came
                keepalive_timeout=config.handshake_seconds,
                lingering_time=LINGER_SECONDS,
            )

        listener = await asyncio.get_running_loop().create_server(
            connect, sock=bound_to(config.host, config.port), backlog=BACKLOG
        )
        try:
            yield int(listener.sockets[0].getsockname()[1])
        finally:
            listener.close()
            left = cast(list[Connection], server.connections)
            for connection in left:
                connection.force_close()
    finally:
        await runner.cleanup()
        for connection in left:
            connection.abort()  # of those who read nothing something is left to be sent


def bound_to(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        StartRefused: the address or the port cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as exc:
        raise StartRefused(f"cannot listen on {host}: {exc.strerror}; choose another with --host") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these from the socket that accepts them.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        with suppress(OSError):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
        bound.bind(address)
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except OSError as exc:
        bound.close()
        reason = CANNOT_LISTEN.get(exc.errno or 0, exc.strerror)
        raise StartRefused(f"cannot listen on {host}:{port}: {reason}", exit_code=TRY_LATER) from None
    return bound


class Routes:
    """What the server answers at which address."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._ending = asyncio.Event()

    def table(self) -> list[web.RouteDef]:
        """Return all routes."""
        return [
            web.get("/health", self.health, allow_head=True),
            web.get("/ready", self.ready),
            web.get("/metrics", self.metrics),
            web.get("/openrpc.json", self.openrpc),
            web.get("/v1/conversations", self.conversations),
            web.get("/v1/conversations/{id}", self.socket, allow_head=False),
            web.get("/v1/conversations/{id}/events", self.events, allow_head=False),
            web.post("/v1/rpc", self.rpc),
        ]

    def end(self) -> None:
        """End the event streams."""
        self._ending.set()

    async def health(self, request: web.Request) -> web.Response:
        """Tell that the process lives, and what it cannot do at present. `HEAD` works, too.

        Returns:
            `{"status": "ok"}`, or `{"status": "degraded", "degraded": ["disk"]}`: the disk is full, reading goes on.
        """
        if self._sessions.work.disk_full():
            return as_json({"status": "degraded", "degraded": ["disk"]})
        return as_json({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """Tell whether new work is welcome.

        Returns:
            `{"status": "ready"}`; 503 with `Retry-After` while the server stops.
        """
        if self._sessions.work.draining:
            return http_error(503, "the server is stopping", {hdrs.RETRY_AFTER: "1"})
        return as_json({"status": "ready"})

    async def metrics(self, request: web.Request) -> web.Response:
        """Return the metrics for Prometheus. The key in the option `metrics_key` opens this address, and no other.

        Returns:
            The metrics in the text format of Prometheus, version 0.0.4.
        """
        self._sessions.metrics.tasks.set(len(asyncio.all_tasks()))
        page = await asyncio.to_thread(self._sessions.metrics.page)
        return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def openrpc(self, request: web.Request) -> web.Response:
        """Return the description of all methods.

        Returns:
            An OpenRPC document.
        """
        document = await asyncio.to_thread(_DOCUMENT.read_bytes)
        return web.Response(body=document, content_type="application/json")

    async def conversations(self, request: web.Request) -> web.Response:
        """List the conversations, newest first.

        Returns:
            A list of [Snapshot](protocol.md#snapshot).

        Raises:
            InvalidParams: a parameter makes no sense.
        """
        return as_json(await self._sessions.conversations.snapshots(wanted(request)))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Return a page of events, or with `Accept: text/event-stream` all of them and then live ones.

        Returns:
            `epoch`, `events` and `head_seq`, the `seq` of the last event of the conversation; or Server-Sent Events.

        Raises:
            InvalidParams: a parameter, or `Last-Event-ID`, is no number or out of range.
            ConversationNotFound: no conversation has this id.
        """
        after = number(request, "after", 0, 0, LARGEST_SEQ)
        limit = number(request, "limit", PAGE, 1, PAGE)
        async with self._sessions.conversations.using(request.match_info["id"]) as loaded:
            if "text/event-stream" in request.headers.get(hdrs.ACCEPT, ""):
                last = request.headers.get("Last-Event-ID", "")
                if last:
                    after = checked_number("Last-Event-ID", last, 0, LARGEST_SEQ)
                return await stream_events(request, loaded, after, self._ending)
            page = await loaded.page(after, limit)
            events = [Raw(event) for _, event in page]
            return as_json(EventPage(epoch=loaded.epoch, events=events, head_seq=loaded.head_seq))

    async def socket(self, request: web.Request) -> web.StreamResponse:
        """Become a WebSocket that is bound to the conversation. The id `new` makes a conversation.

        Returns:
            101, and from then on the frames of the [protocol](protocol.md).

        Raises:
            InvalidRequest: the request is no upgrade (426), or its handshake is wrong.
            ConversationNotFound: no conversation has this id.
            Overloaded: the server is stopping.
        """
        check_upgrade(request)
        sessions, id = self._sessions, request.match_info["id"]
        sessions.work.admit()
        if request[KEY_SHOWN] and id != NEW and id not in sessions.conversations:
            raise ConversationNotFound(f"no conversation {id[:64]!r}", conversation=id[:64])
        config = sessions.config
        socket = await accept(
            request, longest_message=config.limits.frame_bytes, heartbeat=config.heartbeat_seconds
        )
        assert isinstance(request.protocol, Connection)
        session = Session(
            sessions,
            WebSocketPipe(
                socket,
                heartbeat=config.heartbeat_seconds,
                patience=CLOSE_SECONDS,
                linger=CUT_OFF_SECONDS,
            ),
            request.protocol,
            wanted=id,
            key_shown=request[KEY_SHOWN],
        )
        await session.run()
        return socket

    # --- one call over HTTP ---

    async def rpc(self, request: web.Request) -> web.Response:
        """Answer one JSON-RPC call. Methods that move bytes or call back need a WebSocket.

        Returns:
            The answer of JSON-RPC, with the status 200 also where it holds an error.

        Raises:
            LimitExceeded: the body is longer than `limits.message_bytes`.
            InvalidRequest: the body did not arrive in time (408).
            Overloaded: too many bytes of all clients are on their way.
        """
        config = self._sessions.config
        limit, seconds = config.limits.message_bytes, config.body_seconds
        with closing(self._sessions.budget.share()) as share:
            body = await read_body(request, limit=limit, seconds=seconds, take=share.take)
            return await self._answer(body, request.query.get("conversation"))

    async def _answer(self, body: bytearray, id: str | None) -> web.Response:
        codec = Codec(self._sessions.config.limits, strict=True)
        call: Request | None = None
        try:
            message = codec.receive(body, text=True)
            if not isinstance(message, Request):
                raise InvalidRequest("a call with an id is needed; there is nobody to send anything else to")
            call = message
            result = await self._call(call, id)
            answer = codec.response(call.id, result)
        except AgentServerError as exc:
            answer = codec.refusal(exc) if call is None else codec.failure(call.id, to_wire(exc))
        except Exception as exc:  # noqa: BLE001  the boundary of a call, as in Peer
            incident = new_id()
            self._sessions.metrics.bugs.inc()
            self._sessions.logs.bug(exc, incident)
            bug = InternalError("internal error", incident=incident)
            answer = codec.failure(call.id if call else None, to_wire(bug))
        return web.Response(body=answer, content_type="application/json")

    async def _call(self, call: Request, id: str | None) -> Any:
        if call.method == Initialize.method:
            return await self._initialize(call, id or NEW)
        if id is None:
            if call.method not in OF_THE_SERVER:
                raise InvalidParams(
                    "which conversation? POST /v1/rpc?conversation=ID; initialize makes one and answers its id"
                )
            return await self._run(call, None)
        conversations = self._sessions.conversations
        try:
            async with conversations.using(id) as loaded:
                return await self._run(call, loaded)
        except ConversationDamaged:
            if call.method != Delete.method:
                raise
            decode_params(Delete, call.params)
            await conversations.remove(id)
            return Done()

    async def _initialize(self, call: Request, wanted: str) -> Any:
        params = decode_params(Initialize, call.params)
        check_initialize(params)
        if params.resume is not None:
            raise needs_a_websocket()
        conversations = self._sessions.conversations
        id = await named_or_new(conversations, self._sessions.work, wanted, params)
        async with conversations.using(id) as loaded:
            return await initialized(self._sessions.config, loaded, new_id())

    async def _run(self, call: Request, loaded: LoadedConversation | None) -> Any:
        methods = self._sessions.methods
        method = methods.over_http.get(call.method)
        if method is None:
            raise unknown_method(call.method)
        inbound = HttpCall(call.id, loaded)
        return await methods.answer(inbound, decode_params(method, call.params), inbound)
