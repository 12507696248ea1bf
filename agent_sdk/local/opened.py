"""What exists of a conversation between its first use and its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from os import PathLike
from pathlib import Path

from agent_sdk.local.configuration import Configuration
from agent_sdk.local.delivery import Delivery
from agent_sdk.local.follower import Follower
from agent_sdk.local.journal import Journal
from agent_sdk.local.log import EventLog
from agent_sdk.local.turns import Turns
from agent_sdk.workspace import Workspace

Place = Workspace | str | PathLike[str]


class Opened:
    """An open conversation. Close it."""

    def __init__(self, journal: Journal, turns: Turns, stack: AsyncExitStack) -> None:
        self.journal = journal
        self.turns = turns
        self.followers: set[Follower] = set()
        self._stack = stack

    async def close(self, *, delete: bool) -> None:
        """Stop the turn, wait for the callbacks, let go of everything; `delete` removes the log, too."""
        try:
            self.turns.accepts = False
            await self.turns.stop("the conversation was closed", asked=False)
            await self.journal.settle()
            for follower in self.followers:
                follower.end()
            await self.journal.delivery.drained()
            if delete:
                await self.journal.log.delete(self.journal.conversation)
        finally:
            await self._stack.aclose()


async def open_conversation(
    configuration: Configuration,
    place: Place,
    log: EventLog | Path | None,
    delivery: Delivery,
    on_close: Callable[[], Awaitable[None]],
) -> Opened:
    """Enter the place if it is a folder, open the log if it is a path or None, and go on where the log ends.

    Whatever raises leaves nothing open.

    Args:
        on_close: given to a workspace that wants to close its conversations before itself.
    """
    async with AsyncExitStack() as stack:
        configuration.open(await _entered(place, stack, on_close))
        stack.push_async_callback(configuration.close)
        if not isinstance(log, EventLog):
            log = await stack.enter_async_context(EventLog.open(log))
        epoch = await log.create(configuration.conversation)
        journal = Journal(log, configuration.conversation, epoch, delivery)
        await journal.replay()
        await journal.mend()
        configuration.recall(journal.fold)
        if events := configuration.introduction(journal.fold):
            await journal.append(*events)
        turns = Turns(journal)
        turns.actor = configuration.actor
        return Opened(journal, turns, stack.pop_all())


async def _entered(place: Place, stack: AsyncExitStack, on_close: Callable[[], Awaitable[None]]) -> Workspace:
    if isinstance(place, str | PathLike):
        from agent_sdk.local.workspace import LocalWorkspace  # noqa: PLC0415  only for those who give a folder

        return await stack.enter_async_context(LocalWorkspace(place))
    register = getattr(place, "on_close", None)
    if register is not None:
        register(on_close)
    return place
