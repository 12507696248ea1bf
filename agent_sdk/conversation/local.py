"""A Conversation here: the log in a file or in memory, the agent in this process.

What happens in a turn is agent.loop's business, which turn runs is that of turns, what follows from
the log that of state and history. This file opens and closes, and turns verbs into events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Literal, Self, TypeVar

from agent_sdk.agent.mask import Mask
from agent_sdk.agent.runtime import Secrets
from agent_sdk.agent.turn_state import Course, Phase
from agent_sdk.conversation.configuration import AgentConfig, LocalOptions
from agent_sdk.conversation.contract import (
    Accepted,
    Conversation,
    Cursor,
    OnWaiting,
    Outcome,
    Snapshot,
    Stats,
)
from agent_sdk.conversation.dispatch import DeltaListener, Dispatcher, Listener, Unsubscribe
from agent_sdk.conversation.log import (
    ConversationLog,
    Tail,
    check_text,
    operation,
    with_acceptance,
    with_result,
)
from agent_sdk.conversation.turns import Left, Turns
from agent_sdk.definition import Agent
from agent_sdk.ids import checked_op_id, new_id
from agent_sdk.log.event_log import EventLog, Operation
from agent_sdk.protocol.checks import taking
from agent_sdk.protocol.errors import AgentServerError, HistoryLost, StateConflict, draining
from agent_sdk.protocol.events import (
    ConversationCreated,
    Event,
    PauseRequested,
    SecretsChanged,
    UserMessage,
)
from agent_sdk.protocol.methods.conversation import RunAnswer, SendMessage
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy, Model
from agent_sdk.workspace.contract import Workspace

FILE_NAME = "conversations.sqlite"

T = TypeVar("T")


class LocalConversation(Conversation):
    """A conversation whose log and agent are in this process. Use it from one event loop."""

    id: str = ""
    """Its id; empty before its first use."""

    @taking(LocalOptions)
    def __init__(self, options: LocalOptions) -> None:
        """Describe it; it is opened at its first use.

        Verbs that take an `op` remember the call in the commit of its first event, see `answered`.

        Args:
            agent: None: `configure` says later which agent answers.
            workspace: a folder, which the conversation enters and leaves; or a workspace, which the caller does.
            id: 1 to 64 letters, digits, `_`, `.`, `-`; one that the log has is attached to. None: a fresh one.
            persistence_dir: folder of the log; None: the conversation lives in memory.
            log: an open log, instead of `persistence_dir`; the caller closes it.
            run_client_tool: runs tools of `AgentSpec.client_tools` that are no functions of this process.
            place: where calls can be taken up that were begun before the conversation was opened.
            since: what the callbacks have seen: they get the events after it first. None: new events only.
            store: how the agent is stored beside the log. It is then there when the log is opened again, and a
                turn that was open goes on by itself. None: nothing is stored, such a turn is closed as
                interrupted, and `run` goes on.

        Raises:
            InvalidParams: the id is not acceptable.
        """
        self.id = options.id or new_id()
        self._options = options
        self._secrets = Secrets(options.secrets)
        self._delivery = Dispatcher(options.callbacks, options.on_delta)
        self.on_turn_failed: Callable[[Exception], None] = lambda failure: None
        """Told when a turn could not even write its end: it is open, and nobody runs it."""
        self._stack = AsyncExitStack()
        self._opening: asyncio.Task[Turns] | None = None
        self._opened: Turns | None = None
        self._course = Course()
        """Of all its turns."""
        self._closing: asyncio.Task[None] | None = None
        self._suspended = False

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
        return self._opened.log.epoch if self._opened else ""

    @property
    def head_seq(self) -> int:
        """The seq of the last event; 0 until the conversation is open."""
        return self._opened.log.head_seq if self._opened else 0

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self._delivery.seq)

    @property
    def mask(self) -> Mask:
        """The mask that hides what nobody may read of the agent: keys, headers, secrets."""
        return self._secrets.mask

    @property
    def working(self) -> bool:
        """Whether a turn runs, or waits for somebody."""
        return self._opened is not None and self._opened.current is not None

    def left(self, place: str) -> Left:
        """Return what `suspend` has left in this place."""
        return self._opened.left(place) if self._opened else "begun"

    # --- verbs ---

    async def answered(self, op: Operation | None, result: type[T]) -> T | None:
        """Return what the call of this `op` was answered when it came before, in whatever process; None: it is new.

        Raises:
            OpMismatch: another call came with this op_id.
            OpExpired: it came, and its answer is no longer kept.
        """
        return await (await self._open()).log.answered(op, result)

    async def record(self, *events: Event) -> None:
        """Append events of the surroundings, e.g. WorkspaceChanged."""
        await (await self._open()).log.append(*events)

    async def send_message(
        self,
        text: str,
        *,
        mode: Literal["enqueue", "interrupt"] = "enqueue",
        op_id: str | None = None,
        stops: str | None = None,
        op: Operation | None = None,
    ) -> Accepted:
        """Append a user message. A paused conversation stays so until `run`, or a message that interrupts.
        A repeated call returns what the first returned. `stops`: the turn that it may interrupt; None: any.

        Raises:
            InvalidParams: the text is empty or cannot be UTF-8.
            OpMismatch: the op_id was used for another message.
            StateConflict: no agent is configured, or the conversation is closed.
        """
        turns = await self._open()
        check_text(text)
        if op_id is not None:
            op = operation(SendMessage(op_id=checked_op_id(op_id), text=text, mode=mode))
        # Where nothing is done before the commit, that finds out whether the call came before.
        if mode == "interrupt" or not turns.agent.ready:
            if known := await turns.log.answered(op, Accepted):
                turns.unreported = known.run_id
                return known
            if not turns.agent.ready:
                raise StateConflict("no agent is configured yet", state="idle")
        if mode == "interrupt":
            turns.check()
            await turns.stop("a new message came", asked=True, run_id=stops)
        run_id = turns.run_id
        message = UserMessage(text=text, op_id=op.op_id if op else None)
        acceptance = with_acceptance(op, run_id)
        written = turns.submit(message, acceptance, run_id=run_id, wake=mode == "interrupt")
        records = await asyncio.shield(written)
        if not records and (known := await turns.log.answered(op, Accepted)):
            turns.unreported = known.run_id
            return known
        return Accepted(records[0].event.seq, run_id)

    async def run(self, timeout: float | None = None, *, on_waiting: OnWaiting | None = None) -> Outcome:
        """Wait for the end of the turn; the callbacks have seen every event of it when this returns.

        Raises:
            StorageFull, WorkspaceUnavailable, LeaseLost: the log could not be written, so the turn stopped.
        """
        return await (await self._open()).run(timeout, on_waiting or self._options.on_waiting)

    async def begin(self, *, unreported: str | None = None, op: Operation | None = None) -> RunAnswer:
        """Make the turn go on, as `run` does, and return which it is, at once. `unreported` is the `turn` of Run."""
        turns = await self._open()
        turns.check()
        coming = RunAnswer(run_id=turns.run_id, running=True)
        turn = await turns.begin(with_result(op, coming), unreported=unreported)
        if turn is not None:
            answer = RunAnswer(run_id=turn.run_id, running=True)
        else:
            ended = turns.log.turn.ended_seq
            answer = RunAnswer(run_id=turns.last.run_id, running=False, ended_seq=ended)
        await turns.log.append(op=with_result(op, answer))
        return answer

    async def pause(self, *, run_id: str | None = None, op: Operation | None = None) -> None:
        """Ask the turn to stop before its next step. Nothing happens when no turn runs, or not the one of `run_id`."""
        turns = await self._open()
        turn = turns.current if turns.meant(run_id) else None
        if turn is not None:
            await turn.begun.wait()  # or never: its message had come before
        turns.check()
        runs = turn is not None and turn is turns.current and not turn.course.ending
        pauses = runs and turns.log.turn.phase is not Phase.PAUSING
        await turns.log.append(*([PauseRequested()] if pauses else []), op=op)

    async def interrupt(
        self, reason: str = "", *, run_id: str | None = None, op: Operation | None = None
    ) -> None:
        """Stop the turn now. Nothing happens when no turn runs, or not the one of `run_id`."""
        turns = await self._open()
        turns.check()
        await turns.stop(reason, asked=True, run_id=run_id, op=op)
        await turns.log.append(op=op)

    async def respond(
        self,
        request_id: str,
        answer: Literal["approve", "reject"],
        *,
        reason: str = "",
        op: Operation | None = None,
    ) -> None:
        turns = await self._open()
        if not await turns.respond(request_id, answer, reason, op):
            await turns.log.append(op=op)

    async def events(self, since: Cursor | int = 0, follow: bool = False) -> AsyncIterator[Event]:
        turns = await self._open()
        if isinstance(since, Cursor):
            if since.epoch and since.epoch != self.epoch:
                raise HistoryLost("the log was made anew", epoch=self.epoch, from_seq=1)
            since = since.seq
        tail = Tail(turns.log, since)
        try:
            async for event in tail.events(follow=follow):
                yield event
        finally:
            tail.close()

    async def state(self) -> Snapshot:
        """Return the present state; a closed conversation has one, too.

        Raises:
            Overloaded: the conversation was suspended; the next process has its state.
        """
        if self._suspended:
            raise self._refusal()
        closed = self._closing is not None
        turns = self._opened if closed and self._opened is not None else await self._open()
        waits = (*turns.waits, *turns.agent.place.waits)
        return turns.log.state.snapshot(self.id, self.epoch, working=self.working, closed=closed, waits=waits)

    async def stats(self) -> Stats:
        return (await self.state()).stats

    async def update_secrets(self, secrets: dict[str, str], *, op: Operation | None = None) -> None:
        """Set secrets of the agent's terminal.

        Raises:
            InvalidParams: a name cannot be an environment variable.
        """
        turns = await self._open()
        self._secrets.add(secrets)
        await self._write(turns, [SecretsChanged(names=tuple(sorted(secrets)))], op)

    async def set_confirmation_policy(
        self, policy: ConfirmationPolicy, *, op: Operation | None = None
    ) -> None:
        turns = await self._open()
        runtime = turns.agent.present()
        runtime.confirmation = policy
        await self._write(turns, [runtime.configured()], op)

    async def switch_llm(self, llm: Model, *, op: Operation | None = None) -> None:
        """Use another model from the next model call on.

        Raises:
            InvalidParams: there is no way to reach this model.
        """
        turns = await self._open()
        runtime = turns.agent.present()
        runtime.switch(llm)
        await self._write(turns, [runtime.configured()], op)

    async def set_title(
        self,
        title: str | None = None,
        *,
        tags: dict[str, str] | None = None,
        op: Operation | None = None,
    ) -> None:
        """Name the conversation; tags are merged. What does not change is not written."""
        turns = await self._open()
        await turns.log.append(*turns.log.state.retitled(title, tags), op=op)

    async def configure(
        self,
        agent: Agent | AgentSpec,
        *,
        max_iterations: int = 500,
        confirmation: ConfirmationPolicy | None = None,
        secrets: dict[str, str] | None = None,
        title: str | None = None,
        tags: dict[str, str] | None = None,
        op: Operation | None = None,
    ) -> None:
        """Say which agent answers from the next turn on; the same agent keeps its tools and what they remember.

        A turn that had nobody to go on with it goes on. Secrets and tags are added to those there are.

        Raises:
            InvalidParams: the model or a tool does not exist.
        """
        turns = await self._open()
        policy = confirmation or ConfirmationPolicy()
        self._secrets.checked(secrets or {})  # before anything: what is refused changes nothing
        await turns.agent.use(agent, turns.log, max_iterations=max_iterations, confirmation=policy)
        events = turns.agent.news(turns.log.state)
        if secrets:
            self._secrets.add(secrets)
            events.append(SecretsChanged(names=tuple(sorted(secrets))))
        events += turns.log.state.retitled(title, tags)
        await self._write(turns, events, op)

    # --- following ---

    def subscribe(self, listener: Listener) -> Unsubscribe:
        """Call `listener` with (seq, JSON) of every new event, in order, right after its commit."""
        return self._delivery.subscribe(listener)

    def subscribe_deltas(self, listener: DeltaListener) -> Unsubscribe:
        """Call `listener` with every transient piece of an answer."""
        return self._delivery.subscribe_deltas(listener)

    # --- opening and closing ---

    async def close(self) -> None:
        """Let go of the conversation. A turn that this stops may be continued when the log is opened again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await self._until_closed()

    async def wind_down(self) -> None:
        """Start no more turns and let go of the present one, without an end in the log, for another process.
        What nobody could take up is finished first: an answer of the model, a tool that runs in this
        process. Returns when no turn runs; cancelling ends the waiting only.
        """
        self._course.leave()  # also what is being opened, or will be
        if self._opened is not None:
            await self._opened.leave(now=False)

    async def suspend(self) -> None:
        """Like `close`, but a turn that runs stays open in the log, for the next process; its commands run on."""
        if self._closing is None:
            self._suspended = True
            self._closing = asyncio.create_task(self._close(suspend=True))
        await self._until_closed()

    async def delete(self) -> None:
        await self._open()
        self._closing = asyncio.create_task(self._close(delete=True))
        await self._until_closed()

    async def _until_closed(self) -> None:
        # A callback that closes the conversation cannot wait for itself to return.
        if self._closing is not None and not self._delivery.delivering:
            await asyncio.shield(self._closing)

    async def _close(self, *, delete: bool = False, suspend: bool = False) -> None:
        """Stop the turn, wait for the callbacks, let go of everything; `delete` removes the log, too.

        With `suspend` the turn stays open in the log.
        """
        if self._opening is not None:
            await asyncio.wait({self._opening})
        if (turns := self._opened) is None:
            return
        try:
            if suspend:
                await turns.leave(now=True)
            else:
                await turns.end("the conversation was closed")
            await turns.log.settle()
            turns.log.end_tails()
            await self._delivery.drained()
            if delete:
                await turns.log.log.delete(self.id)
        finally:
            await self._stack.aclose()

    async def _write(self, turns: Turns, events: Sequence[Event], op: Operation | None) -> None:
        """Append what there is to append, store the agent as it is now, and remember that the call is done."""
        store = self._options.store
        packed = turns.agent.packed(store) if store else None
        if events or op or packed:
            await asyncio.shield(turns.log.submit(*events, op=op, settings=packed))

    async def _open(self) -> Turns:
        if self._closing is not None:
            raise self._refusal()
        if self._opened is not None:
            return self._opened
        if self._opening is None:
            self._opening = asyncio.create_task(self._really_open())
        opening = self._opening
        try:
            # Shared by all who come first; one of them being cancelled does not stop it.
            turns = await asyncio.shield(opening)
        finally:
            if opening.done() and self._opening is opening:
                self._opening = None
        if self._closing is not None:  # meanwhile
            raise self._refusal()
        return turns

    def _refusal(self) -> AgentServerError:
        """Return why no call is taken any more; of a suspended conversation the next process takes it."""
        return draining() if self._suspended else StateConflict("the conversation is closed", state="closed")

    async def _really_open(self) -> Turns:
        """Enter the workspace if it is a folder, open the log if it is a path or None, and go on where the log ends.

        Whatever raises leaves nothing open.
        """
        options, store = self._options, self._options.store
        async with AsyncExitStack() as stack:
            workspace = await stack.enter_async_context(_entered(options.workspace, self.close))
            agent = AgentConfig(self.id, workspace, options, self._secrets)
            stack.push_async_callback(agent.close)
            runtime = agent.first()
            event_log = options.log
            if event_log is None or options.persistence_dir is not None:
                folder = options.persistence_dir
                path = None if folder is None else Path(folder) / FILE_NAME
                event_log = await stack.enter_async_context(EventLog.open(path))
            log = ConversationLog(event_log, self.id, await event_log.create(self.id), self._delivery)
            log.mask = self.mask
            await log.replay()
            if (since := options.since) is not None:
                self._delivery.begin_with(log.past(Cursor("", since) if isinstance(since, int) else since))
            if store is None:
                await log.mend()
            elif stored := await event_log.settings(self.id):
                runtime = agent.restored(store, stored) or runtime
            if runtime is not None:
                await agent.begin(runtime, log)
            created = [] if log.state.created else [ConversationCreated(conversation=self.id)]
            named = log.state.retitled(options.title, options.tags)
            await log.append(*created, *agent.news(log.state), *named)
            restarts = None if store is None else store.restarts
            turns = Turns(log, agent, self._course, self.on_turn_failed, restarts=restarts)
            if store is not None:
                await turns.resume()
            self._stack, self._opened = stack.pop_all(), turns
        return turns


@asynccontextmanager
async def _entered(
    workspace: Workspace | str | PathLike[str], close: Callable[[], Awaitable[None]]
) -> AsyncIterator[Workspace]:
    if isinstance(workspace, str | PathLike):
        from agent_sdk.workspace.local import LocalWorkspace  # noqa: PLC0415  only for those who give a folder

        async with LocalWorkspace(workspace) as entered:
            yield entered
    else:
        if (register := getattr(workspace, "on_close", None)) is not None:
            register(close)
        yield workspace
