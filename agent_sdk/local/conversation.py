"""A Conversation here: the log in a file or in memory, the agent in this process.

What happens in a turn is agent.loop's business, which turn runs is that of turns, what follows from
the log that of fold and history. This file opens and closes, and turns verbs into events.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from os import PathLike
from pathlib import Path
from typing import Literal, Self

import msgspec

from agent_sdk.agent.actor import RunClientTool
from agent_sdk.conversation import Accepted, Callback, OnDelta, Outcome, Snapshot, Stats
from agent_sdk.definition import Agent
from agent_sdk.ids import new_id
from agent_sdk.local.configuration import Configuration
from agent_sdk.local.delivery import Delivery
from agent_sdk.local.follower import Follower
from agent_sdk.local.journal import DeltaListener, Journal, Listener
from agent_sdk.local.log import EventLog, Operation
from agent_sdk.local.turns import Turns
from agent_sdk.protocol.errors import InvalidParams, OpMismatch, RequestNotFound, StateConflict, TimedOut
from agent_sdk.protocol.events import (
    ConversationCreated,
    Event,
    PauseRequested,
    TitleChanged,
    UserMessage,
)
from agent_sdk.protocol.methods import RunAnswer
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy, Model
from agent_sdk.workspace import Workspace

FILE_NAME = "conversations.sqlite"

_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


class LocalConversation:
    """See conversation.Conversation. Use it from one event loop."""

    def __init__(
        self,
        agent: Agent | AgentSpec | None,
        workspace: Workspace | str | PathLike[str] = ".",
        *,
        id: str | None = None,
        callbacks: Sequence[Callback] = (),
        on_delta: OnDelta | None = None,
        persistence_dir: str | PathLike[str] | None = None,
        max_iterations: int = 500,
        confirmation: ConfirmationPolicy | None = None,
        secrets: dict[str, str] | None = None,
        title: str | None = None,
        tags: dict[str, str] | None = None,
        log: EventLog | None = None,
        run_client_tool: RunClientTool | None = None,
    ) -> None:
        """Describe it; it is opened at its first use.

        Args:
            agent: None: `configure` says later which agent answers.
            workspace: a folder, which the conversation enters and leaves; or a workspace, which the caller does.
            id: 1 to 64 letters, digits, `_`, `.`, `-`; one that the log has is attached to. None: a fresh one.
            persistence_dir: folder of the log; None: the conversation lives in memory.
            log: an open log, instead of `persistence_dir`; the caller closes it.
            run_client_tool: runs tools of `AgentSpec.client_tools` that are no functions of this process.

        Raises:
            InvalidParams: the id is not acceptable.
        """
        if id is not None and not _ID.match(id):
            raise InvalidParams("id: it is 1 to 64 letters, digits, '_', '.' and '-'")
        self.id = id or new_id()
        """See Conversation.id."""
        self._place = workspace
        self._path = Path(persistence_dir) / FILE_NAME if persistence_dir is not None else None
        self._log = log
        self._configuration = Configuration(
            agent,
            conversation=self.id,
            max_iterations=max_iterations,
            confirmation=confirmation or ConfirmationPolicy(),
            secrets=secrets or {},
            run_client_tool=run_client_tool,
        )
        self._title, self._tags = title, dict(tags or {})
        self._delivery = Delivery(callbacks, on_delta)
        self._listeners: dict[object, Listener] = {}
        self._delta_listeners: dict[object, DeltaListener] = {}
        self._followers: set[Follower] = set()
        self._stack = AsyncExitStack()
        self._opening: asyncio.Task[tuple[Journal, Turns]] | None = None
        self._opened: tuple[Journal, Turns] | None = None
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<LocalConversation {self.id} at seq {self.head_seq}>"

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def epoch(self) -> str:
        """Of the log; empty until the conversation is open."""
        return self._opened[0].epoch if self._opened else ""

    @property
    def head_seq(self) -> int:
        """The seq of the last event; 0 until the conversation is open."""
        return self._opened[0].head_seq if self._opened else 0

    @property
    def run_client_tool(self) -> RunClientTool | None:
        """How tools of a client are run; it is told of the RequestOpened. May be set at any time."""
        return self._configuration.run_client_tool

    @run_client_tool.setter
    def run_client_tool(self, runner: RunClientTool | None) -> None:
        self._configuration.run_client_tool = runner

    # --- verbs ---

    async def send_message(
        self, text: str, *, mode: Literal["enqueue", "interrupt"] = "enqueue", op_id: str | None = None
    ) -> Accepted:
        """See Conversation.send_message. A paused conversation stays paused until `run`.

        Args:
            op_id: of the call, for the log's ledger: a repeated call returns what the first returned.

        Raises:
            InvalidParams: the text is empty or cannot be UTF-8.
            OpMismatch: the op_id was used for another message.
            StateConflict: no agent is configured, or the conversation is closed.
        """
        journal, turns = await self._open()
        digest = hashlib.sha256(_message_bytes(text) + b"\0" + mode.encode()).digest()
        if turns.actor is None:
            raise StateConflict("no agent is configured yet", state="idle")
        if op_id is not None and (known := await self._known(journal, op_id, digest)):
            return known
        if mode == "interrupt":
            await turns.stop("a new message came", asked=True)
        run_id = turns.run_id
        operation = (
            None if op_id is None else Operation(op_id, digest, lambda events: _accepted(events, run_id))
        )
        written = journal.submit(UserMessage(text=text, op_id=op_id), op=operation)
        # Not after the await: whoever sends the message may be cancelled, the message is there all the same.
        written.add_done_callback(turns.message_committed)
        records = await asyncio.shield(written)
        if not records and op_id is not None and (known := await self._known(journal, op_id, digest)):
            return known
        return Accepted(records[0].event.seq, run_id)

    async def run(self, timeout: float | None = None) -> Outcome:
        """See Conversation.run. The callbacks have seen every event of the turn when it returns.

        Raises:
            StorageFull, WorkspaceUnavailable, LeaseLost: the log could not be written, so the turn stopped.
        """
        journal, turns = await self._open()
        turn = turns.begin()
        if turn is None:
            return _last(journal)
        try:
            async with asyncio.timeout(timeout):
                await turns.ended(turn)
                await self._delivery.drained()
        except TimeoutError:
            raise TimedOut(f"the turn still runs after {timeout} seconds", seconds=timeout) from None
        if turn.failure is not None:
            raise turn.failure
        return turn.outcome or _last(journal)

    async def begin(self) -> RunAnswer:
        """Like `run`, without waiting: make the turn go on, and say which it is or was."""
        journal, turns = await self._open()
        turn = turns.begin()
        if turn is not None:
            return RunAnswer(run_id=turn.run_id, running=True)
        return RunAnswer(run_id=_last(journal).run_id, running=False, ended_seq=journal.fold.ended_seq)

    async def pause(self) -> None:
        """See Conversation.pause. Nothing happens when no turn runs."""
        journal, turns = await self._open()
        if turns.current is not None and not turns.current.ending and not journal.pause_requested:
            await journal.append(PauseRequested())

    async def interrupt(self, reason: str = "") -> None:
        """See Conversation.interrupt. Nothing happens when no turn runs."""
        _, turns = await self._open()
        await turns.stop(reason, asked=True)

    async def respond(
        self, request_id: str, answer: Literal["approve", "reject"], *, reason: str = ""
    ) -> None:
        """See Conversation.respond."""
        _, turns = await self._open()
        if turns.current is None:
            raise RequestNotFound(f"no request {request_id[:64]!r} waits for an answer", request=request_id)
        await turns.current.respond(request_id, answer, reason)

    async def events(self, since: int = 0, follow: bool = False) -> AsyncIterator[Event]:
        """See Conversation.events."""
        journal, _ = await self._open()
        follower = Follower(journal, since)
        self._followers.add(follower)
        try:
            async for event in follower.events(follow=follow):
                yield event
        finally:
            self._followers.discard(follower)
            follower.close()

    async def state(self) -> Snapshot:
        """See Conversation.state; a closed conversation has one, too."""
        closed = self._closing is not None and self._opened is not None
        journal, turns = self._opened if closed and self._opened else await self._open()
        return journal.fold.snapshot(self.id, journal.epoch, working=turns.current is not None, closed=closed)

    async def stats(self) -> Stats:
        """See Conversation.stats."""
        return (await self.state()).stats

    async def update_secrets(self, secrets: dict[str, str]) -> None:
        """See Conversation.update_secrets.

        Raises:
            InvalidParams: a name cannot be an environment variable.
        """
        journal, _ = await self._open()
        await journal.append(self._configuration.add_secrets(secrets))

    async def set_confirmation_policy(self, policy: ConfirmationPolicy) -> None:
        """See Conversation.set_confirmation_policy."""
        journal, _ = await self._open()
        await journal.append(self._configuration.set_confirmation(policy))

    async def switch_llm(self, llm: Model) -> None:
        """See Conversation.switch_llm.

        Raises:
            InvalidParams: there is no way to reach this model.
        """
        journal, _ = await self._open()
        await journal.append(self._configuration.switch_llm(llm))

    async def set_title(self, title: str | None = None, *, tags: dict[str, str] | None = None) -> None:
        """See Conversation.set_title."""
        journal, _ = await self._open()
        merged = {**journal.fold.tags, **(tags or {})}
        await journal.append(TitleChanged(title=journal.fold.title if title is None else title, tags=merged))

    async def configure(
        self,
        agent: Agent | AgentSpec,
        *,
        max_iterations: int = 500,
        confirmation: ConfirmationPolicy | None = None,
    ) -> None:
        """Say which agent answers from the next turn on; the same agent keeps its tools and what they remember.

        Raises:
            InvalidParams: the model or a tool does not exist.
        """
        journal, turns = await self._open()
        policy = confirmation or ConfirmationPolicy()
        self._configuration.replace(agent, max_iterations=max_iterations, confirmation=policy)
        self._configuration.recall(journal.fold)
        turns.actor = self._configuration.actor
        if events := self._configuration.news(journal.fold):
            await journal.append(*events)

    # --- following ---

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with (seq, JSON) of every new event, in order, after its commit; return the unsubscribing."""
        key = object()
        self._listeners[key] = listener
        return lambda: (self._listeners.pop(key, None), None)[1]

    def subscribe_deltas(self, listener: DeltaListener) -> Callable[[], None]:
        """Call `listener` with every transient piece of an answer; return the unsubscribing."""
        key = object()
        self._delta_listeners[key] = listener
        return lambda: (self._delta_listeners.pop(key, None), None)[1]

    # --- opening and closing ---

    async def close(self) -> None:
        """See Conversation.close. A turn it stops may be continued when the log is opened again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(delete=False))
        await self._until_closed()

    async def delete(self) -> None:
        """See Conversation.delete."""
        await self._open()
        self._closing = asyncio.create_task(self._close(delete=True))
        await self._until_closed()

    async def _until_closed(self) -> None:
        assert self._closing is not None
        # A callback that closes the conversation cannot wait for itself to return.
        if not self._delivery.delivering:
            await asyncio.shield(self._closing)

    async def _close(self, *, delete: bool) -> None:
        if self._opening is not None:
            await asyncio.wait({self._opening})
        try:
            if self._opened is not None:
                journal, turns = self._opened
                turns.accepts = False
                await turns.stop("the conversation was closed", asked=False)
                await journal.settle()
                for follower in self._followers:
                    follower.end()
                await self._delivery.drained()
                if delete:
                    await journal.log.delete(self.id)
        finally:
            await self._stack.aclose()

    async def _open(self) -> tuple[Journal, Turns]:
        if self._closing is not None:
            raise StateConflict("the conversation is closed", state="closed")
        if self._opened is not None:
            return self._opened
        if self._opening is None:
            self._opening = asyncio.create_task(self._really_open())
        opening = self._opening
        try:
            # Shared by all who come first; one of them being cancelled does not stop it.
            return await asyncio.shield(opening)
        finally:
            if opening.done() and self._opened is None and self._opening is opening:
                self._opening = None

    async def _really_open(self) -> tuple[Journal, Turns]:
        async with AsyncExitStack() as stack:
            workspace = await self._enter(stack)
            self._configuration.open(workspace)
            stack.push_async_callback(self._configuration.close)
            log = self._log
            if log is None:
                log = await stack.enter_async_context(EventLog.open(self._path))
            journal = Journal(log, self.id, await log.create(self.id), self._delivery)
            journal.listeners, journal.delta_listeners = self._listeners, self._delta_listeners
            await journal.replay()
            await journal.mend()
            self._configuration.recall(journal.fold)
            await self._introduce(journal)
            turns = Turns(journal)
            turns.actor = self._configuration.actor
            self._stack = stack.pop_all()
        self._opened = journal, turns
        return self._opened

    async def _enter(self, stack: AsyncExitStack) -> Workspace:
        if isinstance(self._place, str | PathLike):
            from agent_sdk.local.workspace import LocalWorkspace  # noqa: PLC0415  only for those who give a folder

            return await stack.enter_async_context(LocalWorkspace(self._place))
        on_close = getattr(self._place, "on_close", None)
        if on_close is not None:
            on_close(self.close)
        return self._place

    async def _introduce(self, journal: Journal) -> None:
        """Write who and what this is, as far as the log does not say so already."""
        fold = journal.fold
        events: list[Event] = []
        if journal.head_seq == 0:
            events.append(ConversationCreated(conversation=self.id))
        events += self._configuration.news(fold)
        title = fold.title if self._title is None else self._title
        tags = {**fold.tags, **self._tags}
        if (title, tags) != (fold.title, fold.tags):
            events.append(TitleChanged(title=title, tags=tags))
        if events:
            await journal.append(*events)

    async def _known(self, journal: Journal, op_id: str, digest: bytes) -> Accepted | None:
        operation = await journal.log.operation(self.id, op_id)
        if operation is None:
            return None
        if operation.digest != digest:
            raise OpMismatch("this op_id was used for another call", op_id=op_id)
        assert isinstance(operation.result, bytes)
        return msgspec.json.decode(operation.result, type=Accepted)


def _accepted(events: Sequence[Event], run_id: str) -> bytes:
    return msgspec.json.encode(Accepted(events[0].seq, run_id))


def _last(journal: Journal) -> Outcome:
    if journal.fold.outcome is None:
        raise StateConflict("there is no message yet", state="idle")
    return journal.fold.outcome


def _message_bytes(text: str) -> bytes:
    if not text.strip():
        raise InvalidParams("text: a message needs at least one character that is not white space")
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidParams(
            f"text: character {exc.start} is half of a surrogate pair, which UTF-8 cannot say"
        ) from None
