"""One WebSocket from its upgrade to its end: `initialize`, one conversation, its calls and its events."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import structlog

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConversationNotFound,
    InvalidRequest,
    Overloaded,
    Unauthorized,
)
from agent_sdk.protocol.methods import Initialize, Initialized, Subscribe, Subscribed
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import Pipe
from agent_server.connection import Connection
from agent_server.feed import SLOW_READER, Feed
from agent_server.frames import Violation
from agent_server.hosted import CLOSE_GONE, Hosted
from agent_server.introduction import NEW, check_initialize, initialized, named_or_new
from agent_server.lobby import Lobby

CLOSE_UNAUTHORISED = 4401
CLOSE_LIMIT = 4429
CLOSE_DRAINING = 4503
SHOWN = 64


class Session:
    """See the module's docstring."""

    def __init__(
        self, lobby: Lobby, pipe: Pipe, connection: Connection, *, wanted: str, key_shown: bool
    ) -> None:
        """Take over an upgraded connection.

        Args:
            wanted: the conversation of the address, or `new`.
            key_shown: whether the upgrade request carried the key; otherwise `initialize` must.
        """
        self.id = new_id()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lobby = lobby
        self._connection = connection
        self._wanted = wanted
        self._key_shown = key_shown
        self._begun = False
        self.hosted: Hosted | None = None
        self._feed: Feed | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()
        self._verdict: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self.peer = Peer(
            pipe,
            lobby.handlers,
            opener=False,
            limits=lobby.config.limits,
            strict=True,
            on_bug=self._bug,
        )

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.hosted or self._wanted}>"

    def dismiss(self, code: int, reason: str) -> None:
        """Close the connection, telling why. The first reason counts."""
        if not self._verdict.done():
            self._verdict.set_result((code, reason))

    async def run(self) -> None:
        """Serve until the connection has ended, by whichever side."""
        lobby = self._lobby
        seconds = lobby.config.handshake_seconds
        late = asyncio.get_running_loop().call_later(
            seconds, self._too_late, f"no initialize within {seconds:g} s"
        )
        with structlog.contextvars.bound_contextvars(connection=self.id):
            lobby.enter(self.peer, self)
            try:
                async with self._stack, self.peer:
                    code = await self._until_over()
                    lobby.logs.log.info("session_ended", code=code)
            finally:
                late.cancel()
                self._leave()

    async def _until_over(self) -> int:
        """Wait for the end of the connection, or bring it about; returns the close code."""
        closed = asyncio.ensure_future(self.peer.wait_closed())
        reasons: set[asyncio.Future[object]] = {closed, self._verdict}  # type: ignore[arg-type]
        violation = self._connection.violation
        if violation is not None:
            reasons.add(violation)  # type: ignore[arg-type]
        try:
            await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
            if closed.done():
                return int(closed.result().details.get("close_code") or 1006)
            if violation is not None and violation.done():
                self._violated(violation.result())
            code, reason = self._verdict.result()
            await self.peer.close(code, reason)
            return code
        finally:
            closed.cancel()
            await asyncio.gather(closed, return_exceptions=True)

    def _violated(self, violation: Violation) -> None:
        self._lobby.metrics.refused.labels("bad_frame").inc()
        self._lobby.logs.log.warning("frames_refused", code=violation.code, problem=violation.reason)
        self.dismiss(violation.code, violation.reason)

    def _too_late(self, reason: str) -> None:
        if not self._begun:
            self.dismiss(CLOSE_UNAUTHORISED, reason)

    def _leave(self) -> None:
        if self._feeding is not None:
            self._feeding.cancel()
        if self._feed is not None:
            self._feed.close()
        if self.hosted is not None:
            self.hosted.guests.discard(self)
            self.hosted.tools.forget(self.peer)
            self._lobby.metrics.sessions.dec()
        self._lobby.leave(self.peer)
        self.ended.set_result(None)

    def _bug(self, bug: BaseException, incident: str) -> None:
        self._lobby.metrics.bugs.inc()
        conversation = self.hosted.id if self.hosted else self._wanted[:SHOWN]
        self._lobby.logs.bug(bug, incident, connection=self.id, conversation=conversation)

    # --- initialize ---

    async def initialize(self, params: Initialize) -> Initialized:
        """See Lobby."""
        if self._begun:
            raise InvalidRequest("initialize came already")
        check_initialize(params)
        self._begun = True
        try:
            self._authenticate(params.auth)
            hosted = await self._bind(params)
        except AgentServerError:
            self._begun = False
            raise
        self.peer.other_limits = params.limits
        if params.resume is not None:
            self._begin_feed(params.resume.epoch, params.resume.after_seq)
        return initialized(self._lobby.config, hosted, self.id)

    def _authenticate(self, given: str | None) -> None:
        """Check the key of the first message, where the upgrade request had none."""
        if self._key_shown:
            return
        try:
            self._lobby.authority.check(given, self._connection.address)
        except Unauthorized:
            self.dismiss(CLOSE_UNAUTHORISED, "wrong or missing API key")
            raise
        except Overloaded:
            self.dismiss(CLOSE_LIMIT, "too many wrong API keys")
            raise
        self._key_shown = True
        self._connection.recognise()

    async def _bind(self, params: Initialize) -> Hosted:
        lobby = self._lobby
        try:
            id = await named_or_new(lobby.conversations, lobby.work, self._wanted, params)
            hosted = await self._stack.enter_async_context(lobby.conversations.using(id))
        except ConversationNotFound:
            if self._wanted != NEW:
                self.dismiss(CLOSE_GONE, "no such conversation")
            raise
        self.hosted = hosted
        hosted.guests.add(self)
        lobby.metrics.sessions.inc()
        lobby.logs.log.info(
            "session_opened",
            conversation=id,
            client=params.client.name[:SHOWN],
            version=params.client.version[:SHOWN],
        )
        return hosted

    # --- events ---

    async def subscribe(self, params: Subscribe) -> Subscribed:
        """See Lobby."""
        assert self.hosted is not None
        if self._feed is not None:
            raise InvalidRequest("the connection is subscribed already")
        self._begin_feed(params.epoch, params.after_seq)
        return Subscribed(epoch=self.hosted.epoch, head_seq=self.hosted.head_seq)

    def _begin_feed(self, epoch: str | None, after: int) -> None:
        assert self.hosted is not None
        self._feed = Feed(self.hosted, self.peer, self._stuck)
        # Peer queues the answer to this call as soon as the handler has ended: what begins one turn
        # of the loop later comes after it.
        asyncio.get_running_loop().call_soon(self._start_feed, self._feed, epoch, after)

    def _start_feed(self, feed: Feed, epoch: str | None, after: int) -> None:
        if not self.ended.done():
            self._feeding = asyncio.create_task(feed.run(epoch, after))
            self._feeding.add_done_callback(self._fed)

    def _fed(self, feeding: asyncio.Task[None]) -> None:
        if not feeding.cancelled() and (bug := feeding.exception()) is not None:
            incident = new_id()
            self._bug(bug, incident)
            self.dismiss(1011, f"internal error {incident}")

    def _stuck(self, code: int, reason: str) -> None:
        if code == SLOW_READER:
            self._lobby.metrics.slow_readers.inc()
        self.dismiss(code, reason)
