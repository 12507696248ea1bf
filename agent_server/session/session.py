"""One WebSocket from its upgrade to its end: `initialize`, one conversation, its calls and its events."""

from __future__ import annotations

import asyncio

import structlog

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ConversationNotFound,
    InvalidRequest,
    Overloaded,
    Unauthorized,
)
from agent_sdk.protocol.methods import Initialize, Initialized, Subscribe, Subscribed
from agent_sdk.rpc.peer import SLOW_READER, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_server.conversations.hosted import CLOSE_GONE, Hosted
from agent_server.http.connection import CLOSE_LIMIT, CLOSE_UNAUTHORISED, Connection
from agent_server.http.frames import Violation
from agent_server.session.feed import Feed
from agent_server.session.introduction import NEW, check_initialize, initialized, named_or_new
from agent_server.session.lobby import Lobby

CLOSE_NORMAL = 1000
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
        self._code = 0
        """With which the connection ended."""
        self._begun = False
        self._late: asyncio.TimerHandle | None = None
        self.hosted: Hosted | None = None
        self._feed: Feed | None = None
        self._verdict: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self.peer = Peer(
            pipe,
            lobby.answers,
            opener=False,
            limits=lobby.config.limits,
            strict=True,
            on_bug=self._bug,
            budget=lobby.budget,
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
        # For the rest of this task, which aiohttp made for this one request.
        structlog.contextvars.bind_contextvars(connection=self.id)
        seconds = lobby.config.handshake_seconds
        self._late = asyncio.get_running_loop().call_later(
            seconds, self._too_late, f"no initialize within {seconds:g} s"
        )
        if self._connection.violation is not None:
            self._connection.violation.add_done_callback(self._violated)
        lobby.enter(self.peer, self)
        try:
            async with self.peer:
                self.peer.ended.add_done_callback(self._lost)
                code, reason = await self._verdict
                self._code = code
                if self.peer.lost is None:
                    await self.peer.close(code, reason)
                if self.hosted is not None:
                    lobby.logs.log.info("session_ended", code=code)
                else:
                    lobby.logs.refused(f"a connection ended with {code} before it had initialised: {reason}")
        finally:
            self._leave()

    def _lost(self, ended: asyncio.Future[ConnectionLost]) -> None:
        details = ended.result().details
        self.dismiss(int(details.get("close_code") or 1006), str(details.get("reason", "")))

    def _violated(self, seen: asyncio.Future[Violation]) -> None:
        violation = seen.result()
        self._lobby.metrics.refused.labels("bad_frame").inc()
        if not self._connection.is_stranger:
            self._lobby.logs.log.warning("frames_refused", code=violation.code, problem=violation.reason)
        self.dismiss(violation.code, violation.reason)

    def _too_late(self, reason: str) -> None:
        if not self._begun:
            self.dismiss(CLOSE_UNAUTHORISED, reason)

    def _leave(self) -> None:
        if self._late is not None:
            self._late.cancel()
        if self._feed is not None:
            self._feed.close()
        if self.hosted is not None:
            self.hosted.clients -= self._feed is not None
            self.hosted.guests.discard(self)
            self.hosted.tools.forget(self.peer)
            self._lobby.metrics.sessions.dec()
            self._lobby.conversations.let_go(self.hosted, for_good=self._code == CLOSE_NORMAL)
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
        return await initialized(self._lobby.config, hosted, self.id)

    def _authenticate(self, given: str | None) -> None:
        """Check the key of the first message, where the upgrade request had none."""
        if self._key_shown:
            return
        try:
            digest = self._lobby.authority.check(given, self._connection.address)
        except Unauthorized:
            self.dismiss(CLOSE_UNAUTHORISED, "wrong or missing API key")
            raise
        except Overloaded:
            self.dismiss(CLOSE_LIMIT, "too many wrong API keys")
            raise
        self._key_shown = True
        self._connection.recognise(digest)

    async def _bind(self, params: Initialize) -> Hosted:
        lobby = self._lobby
        try:
            id = await named_or_new(lobby.conversations, lobby.work, self._wanted, params)
            hosted = await lobby.conversations.hold(id)
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
        state = await self.hosted.state()
        return Subscribed(epoch=state.epoch, head_seq=state.head_seq, state=state)

    def _begin_feed(self, epoch: str | None, after: int) -> None:
        assert self.hosted is not None
        self._feed = Feed(
            self.hosted,
            self.peer,
            self._stuck,
            self._broken,
            patience=self._lobby.config.slow_reader_seconds,
        )
        # Peer queues the answer to this call as soon as the handler has ended: what begins one turn
        # of the loop later comes after it.
        asyncio.get_running_loop().call_soon(self._start_feed, self._feed, epoch, after)
        self.hosted.client_came()

    def _start_feed(self, feed: Feed, epoch: str | None, after: int) -> None:
        if not self.ended.done():
            feed.begin(epoch, after)

    def _broken(self, bug: BaseException) -> None:
        incident = new_id()
        self._bug(bug, incident)
        self.dismiss(1011, f"internal error {incident}")

    def _stuck(self, code: int, reason: str) -> None:
        if code == SLOW_READER:
            self._lobby.metrics.slow_readers.inc()
        self.dismiss(code, reason)
