"""WebSockets from their upgrade to their end: `initialize`, one conversation, its calls and its events."""

from __future__ import annotations

import asyncio
from typing import Any

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ConversationNotFound,
    InvalidRequest,
    NotInitialised,
    Overloaded,
    Unauthorized,
)
from agent_sdk.protocol.methods.connection import Draining, Initialize, Initialized, Ping
from agent_sdk.protocol.methods.conversation import Subscribe, Subscribed
from agent_sdk.rpc.budget import Budget
from agent_sdk.rpc.calls import Table
from agent_sdk.rpc.peer import SLOW_READER, Inbound, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_server.config.options import ServerConfig
from agent_server.conversations.loaded import CLOSE_GONE, LoadedConversation
from agent_server.conversations.registry import Conversations
from agent_server.http.connection import CLOSE_LIMIT, CLOSE_UNAUTHORISED, Connection, Violation
from agent_server.http.security import Authority
from agent_server.logs import ABOUT, Logs
from agent_server.metrics import Metrics
from agent_server.session.methods import NEW, Methods, check_initialize, initialized, named_or_new
from agent_server.session.subscription import Subscription
from agent_server.work import Work

CLOSE_NORMAL = 1000
CLOSE_DRAINING = 4503
BACK_AFTER_MS = 250
"""When clients may look for the next server: often it is there at once."""
SHOWN = 64


class Sessions:
    """All WebSockets of a server, and what they share."""

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
        self.budget = Budget(max(config.max_incoming_bytes, config.limits.message_bytes))
        """What holds bodies and messages while they arrive."""
        self.methods = Methods(conversations, metrics, work)
        # Shared by all connections, because there are thousands and most of them are idle.
        # A ping is answered by the peer itself.
        self.answers = Table(dict.fromkeys(self.methods.handlers.keys() - {Ping}, self._answer))
        self._open: dict[Peer, Session] = {}

    def __repr__(self) -> str:
        return f"<Sessions: {len(self._open)}>"

    def enter(self, session: Session) -> None:
        """Count a session that begins."""
        self._open[session.peer] = session

    def leave(self, session: Session) -> None:
        """Forget a session that is over."""
        del self._open[session.peer]

    def announce_end(self) -> None:
        """Tell every client that the server is about to stop."""
        for peer in self._open:
            peer.notify(Draining(retry_after_ms=BACK_AFTER_MS))

    async def dismiss(self, code: int, reason: str) -> None:
        """Close all sessions and wait until they have ended."""
        sessions = list(self._open.values())
        for session in sessions:
            session.dismiss(code, reason)
        if sessions:
            await asyncio.wait([session.ended for session in sessions])

    def _answer(self, params: Any, call: Inbound) -> Any:
        session = self._open[call.peer]
        if not session.initialised and not isinstance(params, Initialize):
            raise NotInitialised("the first message of a connection must be initialize")
        return self.methods.answer(session, params, call)


class Session:
    """One WebSocket."""

    conversation: LoadedConversation
    """Its conversation, once it has initialised."""

    def __init__(
        self, sessions: Sessions, pipe: Pipe, connection: Connection, *, wanted: str, key_shown: bool
    ) -> None:
        """Take over an upgraded connection.

        Args:
            wanted: the conversation of the address, or `new`.
            key_shown: whether the upgrade request carried the key; otherwise `initialize` must.
        """
        self.id = new_id()
        self.about = {"connection": self.id}
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sessions = sessions
        self._connection = connection
        self._wanted = wanted
        self._key_shown = key_shown
        self._code = 0
        """With which the connection ended."""
        self._begun = False
        self._late: asyncio.TimerHandle | None = None
        self.initialised = False
        self._subscription: Subscription | None = None
        self._verdict: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self.peer = Peer(
            pipe,
            sessions.answers,
            opener=False,
            limits=sessions.config.limits,
            strict=True,
            on_bug=self._bug,
            budget=sessions.budget,
        )

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.conversation if self.initialised else self._wanted}>"

    def dismiss(self, code: int, reason: str) -> None:
        """Close the connection, telling why. The first reason counts."""
        if not self._verdict.done():
            self._verdict.set_result((code, reason))

    async def run(self) -> None:
        """Serve until the connection has ended, by whichever side."""
        sessions = self._sessions
        # For the rest of this task, which aiohttp made for this one request.
        ABOUT.set(self.about)
        seconds = sessions.config.handshake_seconds
        self._late = asyncio.get_running_loop().call_later(
            seconds, self._too_late, f"no initialize within {seconds:g} s"
        )
        if self._connection.violation is not None:
            self._connection.violation.add_done_callback(self._violated)
        sessions.enter(self)
        try:
            async with self.peer:
                self.peer.ended.add_done_callback(self._lost)
                code, reason = await self._verdict
                self._code = code
                if self.peer.lost is None:
                    await self.peer.close(code, reason)
                if self.initialised:
                    sessions.logs.log.info("session_ended", code=code)
                else:
                    sessions.logs.refused(
                        f"a connection ended with {code} before it had initialised: {reason}"
                    )
        finally:
            self._leave()

    def _lost(self, ended: asyncio.Future[ConnectionLost]) -> None:
        details = ended.result().details
        self.dismiss(int(details.get("close_code") or 1006), str(details.get("reason", "")))

    def _violated(self, seen: asyncio.Future[Violation]) -> None:
        violation = seen.result()
        self._sessions.metrics.refused.labels("bad_frame").inc()
        if not self._connection.is_stranger:
            self._sessions.logs.log.warning("frames_refused", code=violation.code, problem=violation.reason)
        self.dismiss(violation.code, violation.reason)

    def _too_late(self, reason: str) -> None:
        if not self._begun:
            self.dismiss(CLOSE_UNAUTHORISED, reason)

    def _leave(self) -> None:
        if self._late is not None:
            self._late.cancel()
        if self._subscription is not None:
            self._subscription.close()
        if self.initialised:
            self.conversation.subscribers -= self._subscription is not None
            self.conversation.connections.discard(self)
            self.conversation.tools.forget(self.peer)
            self._sessions.metrics.sessions.dec()
            self._sessions.conversations.let_go(self.conversation, for_good=self._code == CLOSE_NORMAL)
        self._sessions.leave(self)
        self.ended.set_result(None)

    def _bug(self, bug: BaseException, incident: str) -> None:
        self._sessions.metrics.bugs.inc()
        conversation = self.conversation.id if self.initialised else self._wanted[:SHOWN]
        self._sessions.logs.bug(bug, incident, connection=self.id, conversation=conversation)

    # --- initialize ---

    async def initialize(self, params: Initialize) -> Initialized:
        """Answer the first message."""
        if self._begun:
            raise InvalidRequest("initialize came already")
        check_initialize(params)
        self._begun = True
        try:
            self._authenticate(params.auth)
            loaded = await self._bind(params)
        except AgentServerError:
            self._begun = False
            raise
        self.peer.other_limits = params.limits
        if params.resume is not None:
            self._subscribe(params.resume.epoch, params.resume.after_seq)
        return await initialized(self._sessions.config, loaded, self.id)

    def _authenticate(self, given: str | None) -> None:
        """Check the key of the first message, where the upgrade request had none."""
        if self._key_shown:
            return
        try:
            digest = self._sessions.authority.check(given, self._connection.address)
        except Unauthorized:
            self.dismiss(CLOSE_UNAUTHORISED, "wrong or missing API key")
            raise
        except Overloaded:
            self.dismiss(CLOSE_LIMIT, "too many wrong API keys")
            raise
        self._key_shown = True
        self._connection.recognise(digest)

    async def _bind(self, params: Initialize) -> LoadedConversation:
        sessions = self._sessions
        try:
            id = await named_or_new(sessions.conversations, sessions.work, self._wanted, params)
            loaded = await sessions.conversations.hold(id)
        except ConversationNotFound:
            if self._wanted != NEW:
                self.dismiss(CLOSE_GONE, "no such conversation")
            raise
        self.conversation, self.initialised = loaded, True
        self.about["conversation"] = id
        loaded.connections.add(self)
        sessions.metrics.sessions.inc()
        sessions.logs.log.info(
            "session_opened",
            conversation=id,
            client=params.client.name[:SHOWN],
            version=params.client.version[:SHOWN],
        )
        return loaded

    # --- events ---

    async def subscribe(self, params: Subscribe) -> Subscribed:
        """Begin to send events."""
        if self._subscription is not None:
            raise InvalidRequest("the connection is subscribed already")
        self._subscribe(params.epoch, params.after_seq)
        state = await self.conversation.state()
        return Subscribed(epoch=state.epoch, head_seq=state.head_seq, state=state)

    def _subscribe(self, epoch: str | None, after: int) -> None:
        self._subscription = Subscription(
            self.conversation,
            self.peer,
            self._stuck,
            self._broken,
            patience=self._sessions.config.slow_reader_seconds,
        )
        # Peer queues the answer to this call as soon as the handler has ended: what begins one turn
        # of the loop later comes after it.
        asyncio.get_running_loop().call_soon(self._start, self._subscription, epoch, after)
        self.conversation.subscribed()

    def _start(self, subscription: Subscription, epoch: str | None, after: int) -> None:
        if not self.ended.done():
            subscription.begin(epoch, after)

    def _broken(self, bug: BaseException) -> None:
        incident = new_id()
        self._bug(bug, incident)
        self.dismiss(1011, f"internal error {incident}")

    def _stuck(self, code: int, reason: str) -> None:
        if code == SLOW_READER:
            self._sessions.metrics.slow_readers.inc()
        self.dismiss(code, reason)
