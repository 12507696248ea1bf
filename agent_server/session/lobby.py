"""What all WebSocket sessions share: the server's parts, the list of those who are here, one table of methods."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Protocol

from agent_sdk.protocol.errors import NotInitialised
from agent_sdk.protocol.methods import (
    CONVERSATION,
    SANDBOX,
    WORKSPACE,
    Draining,
    Initialize,
    Initialized,
    Method,
    Subscribe,
    Subscribed,
)
from agent_sdk.rpc.answers import Table
from agent_sdk.rpc.budget import Budget
from agent_sdk.rpc.peer import Inbound, Peer
from agent_server.config.options import ServerConfig
from agent_server.conversations.hosted import Hosted
from agent_server.conversations.registry import Conversations
from agent_server.http.auth import Authority
from agent_server.logs import Logs
from agent_server.metrics import Metrics
from agent_server.session.handlers import Counter, Handlers, conversation_handlers
from agent_server.work import Work

BACK_AFTER_MS = 250
"""When clients may look for the next server: often it is there at once."""


class Attendee(Protocol):
    """A session, as far as the lobby knows it."""

    @property
    def hosted(self) -> Hosted | None:
        """Its conversation, once it has initialised."""
        ...

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when it is over."""
        ...

    def dismiss(self, code: int, reason: str) -> None:
        """Close it."""
        ...

    async def initialize(self, params: Initialize) -> Initialized:
        """Answer the first message."""
        ...

    async def subscribe(self, params: Subscribe) -> Subscribed:
        """Begin to send events."""
        ...


class Lobby:
    """See the module's docstring."""

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
        self.counter = Counter(metrics, work)
        # Shared by all connections, because there are thousands and most of them are idle.
        self.handlers: Handlers = {
            **{method: partial(self._answer, method) for method in (*WORKSPACE, *SANDBOX, *CONVERSATION)},
            Initialize: self._initialize,
            Subscribe: self._subscribe,
        }
        self.answers = Table(self.handlers)
        self._here: dict[Peer, Attendee] = {}

    def __repr__(self) -> str:
        return f"<Lobby of {len(self._here)} sessions>"

    def enter(self, peer: Peer, session: Attendee) -> None:
        """A session begins."""
        self._here[peer] = session

    def leave(self, peer: Peer) -> None:
        """A session is over."""
        del self._here[peer]

    def table(self, hosted: Hosted) -> Handlers:
        """Return who answers the calls of a conversation; made at its first call, for all its connections."""
        if not hosted.handlers:
            hosted.handlers = self.counter.around(conversation_handlers(hosted, self.conversations), hosted)
        return hosted.handlers

    def announce_end(self) -> None:
        """Tell every client that the server is about to stop."""
        for peer in self._here:
            peer.notify(Draining(retry_after_ms=BACK_AFTER_MS))

    async def dismiss(self, code: int, reason: str) -> None:
        """Close all sessions and wait until they have ended."""
        sessions = list(self._here.values())
        for session in sessions:
            session.dismiss(code, reason)
        if sessions:
            await asyncio.wait([session.ended for session in sessions])

    async def _answer(self, method: type[Method[Any]], params: Any, call: Inbound) -> Any:
        return await self.table(self._hosted(call))[method](params, call)

    async def _initialize(self, params: Initialize, call: Inbound) -> Initialized:
        return await self._here[call.peer].initialize(params)

    async def _subscribe(self, params: Subscribe, call: Inbound) -> Subscribed:
        self._hosted(call)
        return await self._here[call.peer].subscribe(params)

    def _hosted(self, call: Inbound) -> Hosted:
        hosted = self._here[call.peer].hosted
        if hosted is None:
            raise NotInitialised("the first message of a connection must be initialize")
        return hosted
