"""What the server answers at which address."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

from aiohttp import hdrs, web
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
from agent_server.conversations.loaded import LoadedConversation
from agent_server.http.connection import Connection
from agent_server.http.errors import as_json, http_error
from agent_server.http.request import LARGEST_SEQ, PAGE, checked_number, number, read_body, wanted
from agent_server.http.security import KEY_SHOWN
from agent_server.http.websocket import accept, check_upgrade
from agent_server.session.event_stream import stream_events
from agent_server.session.handshake import NEW, check_initialize, initialized, named_or_new
from agent_server.session.methods import OF_THE_SERVER, HttpCall, needs_a_websocket
from agent_server.session.session import Session, Sessions

CLOSE_SECONDS = 1.5
"""How long a client may take to agree to the end of its connection."""
LINGER_SECONDS = 30.0
"""How long a client that reads nothing can still find out why it was cut off."""

_DOCUMENT = Path(__file__).with_name("openrpc.json")
"""Written by `make docs`."""


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
                linger=LINGER_SECONDS,
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
