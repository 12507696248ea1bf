"""One WebSocket from its upgrade to its end: `initialize`, one conversation, its calls and its events."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import structlog
from msgspec.structs import asdict

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConversationNotFound,
    InvalidParams,
    InvalidRequest,
    NotInitialised,
    Overloaded,
    Unauthorized,
)
from agent_sdk.protocol.methods import (
    CONNECTION,
    CONVERSATION,
    WORKSPACE,
    ClientInfo,
    Draining,
    Initialize,
    Initialized,
    Subscribe,
    Subscribed,
)
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.version import __version__
from agent_server.auth import Authority
from agent_server.config import ServerConfig
from agent_server.connection import Connection
from agent_server.conversations import Conversations
from agent_server.feed import SLOW_READER, Feed
from agent_server.frames import Violation
from agent_server.handlers import Counter, Handlers, conversation_handlers
from agent_server.hosted import CLOSE_GONE, Hosted
from agent_server.logs import Logs
from agent_server.metrics import Metrics
from agent_server.work import RETRY_AFTER_MS, Work

CLOSE_UNAUTHORISED = 4401
CLOSE_LIMIT = 4429
CLOSE_DRAINING = 4503
NEW = "new"
SHOWN = 64
_LEAST = Limits(
    frame_bytes=1,
    message_bytes=64 << 10,
    payload_bytes=1,
    calls=1,
    window_bytes=1,
    queue_bytes=1,
    json_depth=1,
)
SERVER = ClientInfo(name="agent-server", version=__version__)


class Lobby:
    """What every session needs, and who has one."""

    def __init__(
        self,
        config: ServerConfig,
        conversations: Conversations,
        authority: Authority,
        logs: Logs,
        metrics: Metrics,
        work: Work,
    ) -> None:
        self.config = config
        self.conversations = conversations
        self.authority = authority
        self.logs = logs
        self.metrics = metrics
        self.work = work
        self.counter = Counter(metrics, work)
        self.sessions: set[Session] = set()

    def tables(self, hosted: Hosted) -> Handlers:
        """Return who answers the calls of a conversation; made once for all its connections."""
        if not hosted.handlers:
            hosted.handlers = self.counter.around(conversation_handlers(hosted, self.conversations), hosted)
        return hosted.handlers

    def announce_end(self) -> None:
        """Tell every client that the server is about to stop."""
        for session in self.sessions:
            session.peer.notify(Draining(retry_after_ms=RETRY_AFTER_MS))

    async def dismiss(self, code: int, reason: str) -> None:
        """Close all sessions and wait until they have ended."""
        sessions = list(self.sessions)
        for session in sessions:
            session.dismiss(code, reason)
        await asyncio.gather(*(session.ended.wait() for session in sessions))


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
        self.ended = asyncio.Event()
        self._lobby = lobby
        self._connection = connection
        self._wanted = wanted
        self._key_shown = key_shown
        self._begun = False
        self._hosted: Hosted | None = None
        self._feed: Feed | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()
        self._verdict: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self.peer = Peer(
            pipe,
            {**_refusing(), Initialize: self._initialize},
            opener=False,
            limits=lobby.config.limits,
            strict=True,
            on_bug=self._bug,
        )

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self._hosted or self._wanted}>"

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
            lobby.sessions.add(self)
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
        if self._hosted is not None:
            self._hosted.guests.discard(self)
            self._hosted.tools.forget(self.peer)
            self._lobby.metrics.sessions.dec()
        self._lobby.sessions.discard(self)
        self.ended.set()

    def _bug(self, bug: BaseException, incident: str) -> None:
        self._lobby.metrics.bugs.inc()
        conversation = self._hosted.id if self._hosted else self._wanted[:SHOWN]
        self._lobby.logs.bug(bug, incident, connection=self.id, conversation=conversation)

    # --- initialize ---

    async def _initialize(self, params: Initialize, call: Inbound) -> Initialized:
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
        self.peer.handlers = {
            **self._lobby.tables(hosted),
            Initialize: self._initialize,
            Subscribe: self._subscribe,
        }
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
        self._hosted = hosted
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

    async def _subscribe(self, params: Subscribe, call: Inbound) -> Subscribed:
        assert self._hosted is not None
        if self._feed is not None:
            raise InvalidRequest("the connection is subscribed already")
        self._begin_feed(params.epoch, params.after_seq)
        return Subscribed(epoch=self._hosted.epoch, head_seq=self._hosted.head_seq)

    def _begin_feed(self, epoch: str | None, after: int) -> None:
        assert self._hosted is not None
        self._feed = Feed(self._hosted, self.peer, self._stuck)
        # Peer queues the answer to this call as soon as the handler has ended: what begins one turn
        # of the loop later comes after it.
        asyncio.get_running_loop().call_soon(self._start_feed, self._feed, epoch, after)

    def _start_feed(self, feed: Feed, epoch: str | None, after: int) -> None:
        if not self.ended.is_set():
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


def check_initialize(params: Initialize) -> None:
    """Accept the params of `initialize`.

    Raises:
        InvalidParams: another version, or limits with which nothing could be sent.
    """
    if params.protocol_version != PROTOCOL_VERSION:
        raise InvalidParams(
            f"$.params.protocol_version: this server speaks {PROTOCOL_VERSION}, got {params.protocol_version}",
            supported=[PROTOCOL_VERSION],
        )
    for name, value in asdict(_LEAST).items():
        if getattr(params.limits, name) < value:
            raise InvalidParams(f"$.params.limits.{name}: expected int >= {value}")


async def named_or_new(conversations: Conversations, work: Work, wanted: str, params: Initialize) -> str:
    """Return the id of the conversation a client is bound to, which is made when it wants a new one.

    Raises:
        ConversationNotFound: there is none of that id.
        InvalidParams: a workspace is described for an existing one.
        Overloaded: a new one, and the server drains.
    """
    if wanted == NEW:
        work.admit()
        return await conversations.create(params.workspace)
    if wanted not in conversations:
        raise ConversationNotFound(f"no conversation {wanted[:SHOWN]!r}", conversation=wanted[:SHOWN])
    if params.workspace is not None:
        raise InvalidParams("$.params.workspace: an existing conversation has its workspace already")
    return wanted


def initialized(config: ServerConfig, hosted: Hosted, connection: str) -> Initialized:
    """Return the answer to `initialize`."""
    return Initialized(
        protocol_version=PROTOCOL_VERSION,
        server=SERVER,
        limits=config.limits,
        connection_id=connection,
        heartbeat_s=config.heartbeat_seconds,
        conversation=hosted.id,
        epoch=hosted.epoch,
        head_seq=hosted.head_seq,
    )


def _refusing() -> Handlers:
    """Who answers before `initialize`: nobody."""

    async def refuse(params: object, call: Inbound) -> object:
        raise NotInitialised("the first message of a connection must be initialize")

    return dict.fromkeys((*CONNECTION, *WORKSPACE, *CONVERSATION), refuse)
