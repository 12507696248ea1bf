"""What exists of a conversation between its first use and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from os import PathLike
from pathlib import Path

import msgspec

from agent_sdk.agent.loop import Turn
from agent_sdk.agent.turn_state import Course, Phase
from agent_sdk.conversation.configuration import AgentConfig
from agent_sdk.conversation.contract import Cursor, OnWaiting, Outcome, Wait, still_runs, tell_waits
from agent_sdk.conversation.dispatch import Dispatcher
from agent_sdk.conversation.log import ConversationLog, Tail
from agent_sdk.conversation.store import AgentStore
from agent_sdk.conversation.turns import Turns
from agent_sdk.idempotency import Asked
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import HistoryLost, OpExpired, OutcomeUnknown, StateConflict
from agent_sdk.protocol.events import Event, decode
from agent_sdk.protocol.results import Accepted
from agent_sdk.workspace.contract import Workspace

Place = Workspace | str | PathLike[str]


class Opened:
    """An open conversation. Close it."""

    def __init__(self, journal: ConversationLog, turns: Turns, stack: AsyncExitStack) -> None:
        self.journal = journal
        self.turns = turns
        self.untold: str | None = None
        """The turn that answers the last message or that `run` waited for, until `run` has returned how it ended."""
        self.followers: set[Tail] = set()
        self._stack = stack

    @property
    def last(self) -> Outcome:
        """How the last turn ended.

        Raises:
            StateConflict: there was none.
        """
        if self.journal.turn.outcome is None:
            raise StateConflict("there is no message yet", state="idle")
        return self.journal.turn.outcome

    async def run(self, timeout: float | None, on_waiting: OnWaiting | None) -> Outcome:
        """Wait for the end of the turn, as LocalConversation.run does."""
        turn = self.turns.begin(untold=self.untold)
        if turn is None:
            self.untold = None
            return self.last
        self.untold = turn.run_id
        try:
            async with asyncio.timeout(timeout) as limit:
                await self._ended(turn, on_waiting)
                await self.journal.delivery.drained()
        except TimeoutError:
            if not limit.expired():
                raise
            raise still_runs(timeout, self.journal.state.waits) from None
        if turn.failure is not None:
            raise turn.failure
        if self.untold == turn.run_id:  # else another message has come since
            self.untold = None
        return turn.outcome or self.last

    async def _ended(self, turn: Turn, on_waiting: OnWaiting | None) -> None:
        """Wait for the end of a turn, and tell what it waits for until then."""
        told: set[Wait] = set()
        news = asyncio.Event()
        stop = self.journal.delivery.subscribe(lambda seq, event: news.set())
        over = asyncio.ensure_future(turn.over.wait())
        over.add_done_callback(lambda _: news.set())
        try:
            while not over.done():
                news.clear()
                await tell_waits(self.journal.state.waits, told, on_waiting)
                await news.wait()
        finally:
            stop()
            over.cancel()

    async def close(self, *, delete: bool = False, suspend: bool = False) -> None:
        """Stop the turn, wait for the callbacks, let go of everything; `delete` removes the log, too.

        With `suspend` the turn stays open in the log.
        """
        try:
            if suspend:
                await self.turns.let_go(now=True)
            else:
                await self.turns.end("the conversation was closed")
            await self.journal.settle()
            for follower in self.followers:
                follower.end()
            await self.journal.delivery.drained()
            if delete:
                await self.journal.log.delete(self.journal.conversation)
        finally:
            await self._stack.aclose()


async def open_conversation(
    configuration: AgentConfig,
    place: Place,
    log: EventLog | Path | None,
    delivery: Dispatcher,
    on_close: Callable[[], Awaitable[None]],
    *,
    course: Course,
    store: AgentStore | None,
    since: Cursor | None,
) -> Opened:
    """Enter the place if it is a folder, open the log if it is a path or None, and go on where the log ends.

    Whatever raises leaves nothing open.

    Args:
        on_close: given to a workspace that wants to close its conversations before itself.
        course: of its turns; where that is let go of already, or meanwhile, none starts.
        store: the stored agent is restored, and a turn that another process has begun goes on; None: it is closed.
        since: callbacks get the events after it first.

    Raises:
        HistoryLost: `since` is of another history.
    """
    async with AsyncExitStack() as stack:
        configuration.open(await _entered(place, stack, on_close))
        stack.push_async_callback(configuration.close)
        if not isinstance(log, EventLog):
            log = await stack.enter_async_context(EventLog.open(log))
        epoch = await log.create(configuration.conversation)
        journal = ConversationLog(log, configuration.conversation, epoch, delivery)
        journal.mask = configuration.mask
        await journal.replay()
        if since is not None:
            delivery.begin_with(_past(journal, since))
        if store is None:
            await journal.mend()
        elif stored := await log.settings(configuration.conversation):
            configuration.restore(store, stored)
        await configuration.recall(journal)
        await journal.append(*configuration.introduction(journal.state))
        turns = Turns(journal, course, restarts=store.restarts if store else None)
        turns.missing, turns.obstacle = configuration.missing, configuration.obstacle
        turns.runtime = configuration.runtime
        if store is not None:
            turns.take_up(await _promised(journal))
        return Opened(journal, turns, stack.pop_all())


def _past(journal: ConversationLog, since: Cursor) -> AsyncIterator[Event]:
    """The events after a cursor, up to the present head."""
    head = journal.head_seq
    if since.epoch not in ("", journal.epoch) or not 0 <= since.seq <= head:
        raise HistoryLost(
            f"the log has no seq {since.seq} of epoch {since.epoch[:64]!r}; it is epoch {journal.epoch!r} up to {head}",
            epoch=journal.epoch,
            from_seq=1,
        )

    async def events() -> AsyncIterator[Event]:
        async for seq, body in journal.pages(since.seq):
            if seq > head:
                return
            yield decode(body)

    return events()


async def _promised(journal: ConversationLog) -> str | None:
    """The turn that a message was promised when the process ended before it had started one."""
    last = journal.turn
    for message in journal.history.unread:
        if message.op_id is None or message.seq < last.started_seq or last.phase is Phase.PAUSED:
            continue
        with suppress(OpExpired, OutcomeUnknown):  # then it waits for `run`
            known = await journal.operations.find(Asked(message.op_id))
            if known is not None and known.answer is not None:
                run_id = msgspec.json.decode(known.answer, type=Accepted).run_id
                if run_id != last.run_id:
                    return run_id
    return None


async def _entered(place: Place, stack: AsyncExitStack, on_close: Callable[[], Awaitable[None]]) -> Workspace:
    if isinstance(place, str | PathLike):
        from agent_sdk.workspace.local import LocalWorkspace  # noqa: PLC0415  only for those who give a folder

        return await stack.enter_async_context(LocalWorkspace(place))
    register = getattr(place, "on_close", None)
    if register is not None:
        register(on_close)
    return place
