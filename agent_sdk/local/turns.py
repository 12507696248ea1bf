"""Which turn runs, which comes next, and which of them answers a message.

Whether a message joins the running turn is decided when it is submitted. A turn submits its end only
when no message is under way, and the next turn waits for the task of the one before.
"""

from __future__ import annotations

import asyncio
from typing import Any

from agent_sdk.agent.actor import Actor
from agent_sdk.agent.loop import Turn
from agent_sdk.ids import new_id
from agent_sdk.local.journal import Journal
from agent_sdk.protocol.errors import StateConflict


class Turns:
    """The turns of one conversation, one at a time."""

    def __init__(self, journal: Journal) -> None:
        self.actor: Actor | None = None
        """Who works in the next turn."""
        self.accepts = True
        """Whether new turns may start."""
        self._journal = journal
        self._next_run_id = new_id()
        self._turn: Turn | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def current(self) -> Turn | None:
        """The turn that runs: its end is not in the log yet."""
        turn, outcome = self._turn, self._journal.fold.outcome
        over = turn is not None and outcome is not None and outcome.run_id == turn.run_id
        return None if over else turn

    @property
    def run_id(self) -> str:
        """The turn that answers a message submitted now."""
        joins = self._turn is not None and not self._turn.ending
        return self._turn.run_id if joins and self._turn else self._next_run_id

    def message_committed(self, future: asyncio.Future[Any], *, run_id: str, wake: bool) -> None:
        """Start the turn that was promised to a message, unless it has started.

        What is paused stays so, unless the message is to `wake` it. A turn that had been joined and ends
        without reading the message leaves it to the next one.
        """
        if future.cancelled() or future.exception() is not None or not self._journal.history.unread:
            return
        if run_id == self._next_run_id and self.accepts and (wake or not self._journal.fold.paused):
            self._start()

    def begin(self) -> Turn | None:
        """Return the turn that runs, or start one when there is something to do, else None."""
        current = self.current
        if current is not None:
            return current
        fold = self._journal.fold
        if fold.stopped and not fold.turn_open:
            return None
        if self._journal.history.unread or fold.resumable or fold.turn_open:
            return self._start()
        return None

    async def ended(self, turn: Turn) -> None:
        """Wait for the end of a turn that `begin` or `current` returned."""
        await turn.over.wait()

    async def stop(self, reason: str, *, asked: bool) -> None:
        """End the running turn at once and wait for its end."""
        turn = self._turn
        if turn is not None:
            turn.stop(reason, asked=asked)
            await self.ended(turn)

    def _start(self) -> Turn:
        if self.actor is None:
            raise StateConflict("no agent is configured yet", state="idle")
        if not self.accepts:
            raise StateConflict("the conversation is closed", state="closed")
        turn = Turn(self._next_run_id, self.actor, self._journal)
        self._next_run_id = new_id()
        before, self._turn = self._task, turn
        self._task = asyncio.create_task(self._course(turn, before), name=f"turn {turn.run_id}")
        return turn

    async def _course(self, turn: Turn, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None and not before.done():
                await asyncio.wait({before})
            await turn.run()
        finally:
            turn.over.set()
            if self._turn is turn:
                self._turn = self._task = None
