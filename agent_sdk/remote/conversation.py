"""A Conversation there: the verbs as calls, and one ordered stream of events.

Truth is an event in the log; an answer to a call is only a receipt. `run` therefore waits for
TurnEnded in the stream, after every callback has seen it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal, Self

import msgspec
from msgspec import Raw

from agent_sdk.conversation import Accepted, Callback, Cursor, OnDelta, Outcome, Snapshot, Stats, outcome_of
from agent_sdk.definition import Agent
from agent_sdk.ids import new_id
from agent_sdk.protocol import events as event_types
from agent_sdk.protocol.errors import ConversationNotFound, InternalError, StateConflict, TimedOut
from agent_sdk.protocol.events import Delta, Event, TurnEnded
from agent_sdk.protocol.methods import (
    Configure,
    Delete,
    DeltaNotice,
    Effect,
    EventsNotice,
    GetEvents,
    GetState,
    Interrupt,
    Pause,
    Respond,
    Run,
    SendMessage,
    SetConfirmationPolicy,
    SetTitle,
    Subscribe,
    SwitchLlm,
    SyncReset,
    ToolCall,
    ToolOutput,
    UpdateSecrets,
)
from agent_sdk.protocol.methods.method import Done
from agent_sdk.protocol.specs import ConfirmationPolicy, Model, WorkspaceSpec
from agent_sdk.remote.connection import connect
from agent_sdk.remote.delivery import Delivery
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.tools import FunctionTool

logger = logging.getLogger("agent_sdk")


class RemoteConversation:
    """See conversation.Conversation. The turn runs on the server and goes on when this end is gone."""

    def __init__(
        self,
        agent: Agent | None,
        workspace: RemoteWorkspace,
        *,
        id: str | None = None,
        callbacks: Sequence[Callback] = (),
        on_delta: OnDelta | None = None,
        max_iterations: int = 500,
        confirmation: ConfirmationPolicy | None = None,
        secrets: dict[str, str] | None = None,
        title: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        """Describe it; it is opened at its first use.

        Args:
            agent: None attaches to an existing conversation as it is.
            workspace: entered already. Its first conversation shares its connection.
            id: of an existing conversation; its callbacks get the events from now on.
        """
        self._agent = agent
        self._workspace = workspace
        self._wanted = id
        self._functions: dict[str, FunctionTool] = agent.functions() if agent else {}
        self._settings: dict[str, Any] = {
            "max_iterations": max_iterations,
            "confirmation": confirmation or ConfirmationPolicy(),
            "secrets": dict(secrets or {}),
            "title": title,
            "tags": dict(tags or {}),
        }
        self._delivery = Delivery(tuple(callbacks), on_delta)
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._peer: Peer | None = None
        self._id = id or ""

    def __repr__(self) -> str:
        return f"<RemoteConversation {self._id or 'new'} at seq {self._delivery.seq}>"

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def id(self) -> str:
        """See Conversation.id."""
        return self._id

    @property
    def cursor(self) -> Cursor:
        """See Conversation.cursor."""
        return self._delivery.cursor

    async def send_message(self, text: str, *, mode: Literal["enqueue", "interrupt"] = "enqueue") -> Accepted:
        """See Conversation.send_message."""
        peer = await self._open()
        return await peer.call(SendMessage(op_id=new_id(), text=text, mode=mode))

    async def run(self, timeout: float | None = None) -> Outcome:
        """See Conversation.run."""
        peer = await self._open()
        answer = await peer.call(Run(op_id=new_id()))
        if answer.ended_seq and answer.ended_seq <= self._delivery.since:
            return await self._past_outcome(peer, answer.ended_seq)
        try:
            async with asyncio.timeout(timeout):
                return await self._delivery.outcome(answer.run_id)
        except TimeoutError:
            raise TimedOut(f"the turn still runs after {timeout} seconds", seconds=timeout) from None

    async def _past_outcome(self, peer: Peer, seq: int) -> Outcome:
        """The end of a turn that was over before this end began to listen."""
        page = await peer.call(GetEvents(after=seq - 1, limit=1))
        ended = event_types.decode(page.events[0]) if page.events else None
        if not isinstance(ended, TurnEnded):
            raise InternalError(f"the server says that event {seq} ended the turn, and it did not")
        return outcome_of(ended)

    async def pause(self) -> None:
        """See Conversation.pause."""
        await self._do(Pause(op_id=new_id()))

    async def interrupt(self, reason: str = "") -> None:
        """See Conversation.interrupt."""
        await self._do(Interrupt(op_id=new_id(), reason=reason))

    async def respond(
        self, request_id: str, answer: Literal["approve", "reject"], *, reason: str = ""
    ) -> None:
        """See Conversation.respond."""
        await self._do(Respond(op_id=new_id(), request_id=request_id, answer=answer, reason=reason))

    async def events(self, since: int = 0, follow: bool = False) -> AsyncIterator[Event]:
        """See Conversation.events. Pages of the log are fetched as they are consumed."""
        peer = await self._open()
        seq = since
        while True:
            page = await peer.call(GetEvents(after=seq))
            for raw in page.events:
                event = event_types.decode(raw)
                seq = event.seq
                yield event
            if page.events and seq < page.head_seq:
                continue
            if not follow or not await self._delivery.wait_beyond(seq):
                return

    async def state(self) -> Snapshot:
        """See Conversation.state."""
        return await (await self._open()).call(GetState())

    async def stats(self) -> Stats:
        """See Conversation.stats."""
        return (await self.state()).stats

    async def update_secrets(self, secrets: dict[str, str]) -> None:
        """See Conversation.update_secrets."""
        await self._do(UpdateSecrets(op_id=new_id(), secrets=secrets))

    async def set_confirmation_policy(self, policy: ConfirmationPolicy) -> None:
        """See Conversation.set_confirmation_policy."""
        await self._do(SetConfirmationPolicy(op_id=new_id(), policy=policy))

    async def switch_llm(self, llm: Model) -> None:
        """See Conversation.switch_llm."""
        await self._do(SwitchLlm(op_id=new_id(), llm=llm))

    async def set_title(self, title: str | None = None, *, tags: dict[str, str] | None = None) -> None:
        """See Conversation.set_title."""
        await self._do(SetTitle(op_id=new_id(), title=title, tags=tags))

    async def close(self) -> None:
        """See Conversation.close."""
        if self._peer is not None and self._workspace.on_notice == self._noticed:
            self._workspace.on_notice = None
        self._peer = None
        await self._delivery.close()
        await self._stack.aclose()

    async def delete(self) -> None:
        """See Conversation.delete."""
        await self._do(Delete(op_id=new_id()))
        await self.close()

    async def _do(self, call: Effect[Done]) -> None:
        await (await self._open()).call(call)

    # --- opening ---

    async def _open(self) -> Peer:
        async with self._opening:
            if self._peer is None:
                if self._delivery.closed:
                    raise StateConflict("the conversation is closed", state="closed")
                self._peer = await self._connect()
                self._workspace.on_close(self.close)
            return self._peer

    async def _connect(self) -> Peer:
        shared = self._workspace.connection
        if shared is None:
            raise ConversationNotFound("the workspace is not on an agent server; use agent_runs='here'")
        if not self._workspace.claimed and self._wanted in (None, shared.conversation):
            self._workspace.claimed = True
            self._workspace.on_notice = self._noticed
            connection = shared
        else:
            connection = await self._stack.enter_async_context(
                connect(
                    self._workspace.url,
                    self._workspace.api_key,
                    conversation=self._wanted or "new",
                    workspace=WorkspaceSpec(share=shared.conversation),
                    on_notice=self._noticed,
                )
            )
        self._id = connection.conversation or ""
        existing = self._wanted is not None or (connection is shared and self._workspace.attached)
        self._delivery.start(since=connection.answer.head_seq if existing else 0)
        await self._introduce(connection.peer)
        return connection.peer

    async def _introduce(self, peer: Peer) -> None:
        peer.handlers = {**peer.handlers, ToolCall: self._call_tool}
        self._delivery.follow(peer)
        await peer.call(Subscribe(after_seq=self._delivery.since))
        if self._agent is not None:
            await peer.call(Configure(op_id=new_id(), agent=self._agent.spec(), **self._settings))

    # --- what the server sends ---

    def _noticed(self, method: str, params: Raw) -> None:
        if method == EventsNotice.method:
            self._delivery.take(msgspec.json.decode(params, type=EventsNotice).events)
        elif method == DeltaNotice.method:
            self._delivery.take_delta(
                msgspec.json.decode(msgspec.json.decode(params, type=DeltaNotice).delta, type=Delta)
            )
        elif method == SyncReset.method:
            self._delivery.reset(msgspec.json.decode(params, type=SyncReset).reason)

    async def _call_tool(self, params: ToolCall, call: Inbound) -> ToolOutput:
        function = self._functions.get(params.tool)
        if function is None:
            return ToolOutput(text=f"this client has no tool {params.tool!r}", is_error=True)
        result = await function.run(params.arguments)
        return ToolOutput(text=result.text, is_error=result.is_error, data=result.data)
