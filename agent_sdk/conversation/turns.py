"""Which turn runs, which comes next, and which of them answers a message.

Whether a message joins the running turn is decided when it is submitted. A turn submits its end only
when no message is under way, and the next turn waits for the task of the one before. Where turns are
to survive their process, the one that is open in the log is gone on with before any other.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections.abc import Callable
from typing import Literal

from agent_sdk.agent.loop import RESTARTS, Turn
from agent_sdk.agent.runtime import AgentRuntime
from agent_sdk.agent.turn_state import Course, Phase, Stage
from agent_sdk.conversation.log import ConversationLog
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import Operation, Record
from agent_sdk.protocol.errors import (
    AgentServerError,
    InternalError,
    RequestNotFound,
    StateConflict,
    draining,
)
from agent_sdk.protocol.events import TurnStarted, UserMessage, Waiting
from agent_sdk.protocol.results import Wait

Left = Literal["nothing", "written", "begun"]
"""Of a turn that was let go of: no call that is open, one that is written down, one that may have begun."""


class Turns:
    """The turns of one conversation, one at a time."""

    def __init__(self, journal: ConversationLog, course: Course, *, restarts: int | None = None) -> None:
        """Take the log.

        Args:
            journal: the log.
            course: of the conversation; where that is let go of already, no turn starts.
            restarts: a turn that is open in the log is gone on with, so often at most; None: it is closed.
        """
        self.course = course
        """Of all of them: new ones start while it is working."""
        self._failure: Exception | None = None
        """Why the end of the last turn could not be written: it is open, and nobody runs it."""
        self.on_failure: Callable[[Exception], None] = lambda failure: None
        """Told of it: nobody learns it from the log."""
        self.missing = ""
        """Why there is no runtime although the conversation has an agent, a sentence; a turn then waits for one."""
        self.obstacle: AgentServerError | None = None
        """Why there cannot be one; a turn then fails with it."""
        self._runtime: AgentRuntime | None = None
        self._arrived: asyncio.Event | None = None
        """For the turn that waits for an runtime, if one does."""
        self._journal = journal
        self._restarts = restarts
        self._next_run_id = new_id()
        self._turn: Turn | None = None
        self._task: asyncio.Task[None] | None = None
        self._left: Turn | None = None

    @property
    def runtime(self) -> AgentRuntime | None:
        """Who works in the next turn, and in the present one if it still waits for somebody."""
        return self._runtime

    @runtime.setter
    def runtime(self, runtime: AgentRuntime | None) -> None:
        self._runtime = runtime
        if runtime is not None:
            self.missing, self.obstacle = "", None
            if self._arrived is not None:
                self._arrived.set()

    @property
    def ready(self) -> bool:
        """Whether a turn may start, even if it has to wait for its runtime."""
        return self._runtime is not None or bool(self.missing) or self.obstacle is not None

    @property
    def waits(self) -> tuple[Wait, ...]:
        """What the agent lacks, working or not, as far as the log does not say it."""
        key = [Wait(what="key", reason=self.missing)] if self.missing else []
        disk = [Wait(what="disk", reason=f"the log: {self._failure}")] if self._failure else []
        return (*key, *disk)

    @property
    def current(self) -> Turn | None:
        """The turn that runs: its end is not in the log yet."""
        turn, outcome = self._turn, self._journal.turn.outcome
        over = turn is not None and outcome is not None and outcome.run_id == turn.run_id
        return None if over else turn

    @property
    def run_id(self) -> str:
        """The turn that answers a message submitted now."""
        turn = self._turn
        joins = turn is not None and turn.course.stage not in (Stage.STOPPING, Stage.ENDING)
        return turn.run_id if joins and turn else self._coming

    def check(self) -> None:
        """Accept a call that acts on the turn that runs.

        Raises:
            Overloaded: it is let go of, for another process: that one takes the call.
        """
        if self.course.leaving:
            raise draining()

    def submit(
        self, message: UserMessage, op: Operation | None, *, run_id: str, wake: bool
    ) -> asyncio.Future[list[Record]]:
        """Queue a message, with the start of the turn that it was promised where none runs.

        What is paused stays so, unless the message is to `wake` it. A turn that had been joined and ends
        without reading the message leaves it to the next one.
        """
        begins = self._turn is None and not self._journal.turn.is_open and self._may_start(wake)
        start = [TurnStarted(run_id=run_id)] if begins else []
        written = self._journal.submit(message, *start, op=op)
        turn = self._made() if begins else None

        # Not after an await: whoever sends the message may be cancelled, the message is there all the same.
        def committed(_: object) -> None:
            failure = CancelledError() if written.cancelled() else written.exception()
            waits = failure is None and bool(self._journal.history.unread)
            if turn is not None and (failure or not written.result()):
                self._withdraw(turn, failure)
            elif turn is not None:
                self._run(turn)
            elif waits and run_id == self._coming and self._may_start(wake):
                self._start()

        written.add_done_callback(committed)
        return written

    def begin(self, op: Operation | None = None, *, untold: str | None = None) -> Turn | None:
        """Return the turn that runs, or start one when there is something to do, else None.

        Args:
            untold: the turn whose outcome the caller has not heard; if it has failed, it is not tried again.
            op: remembered with the start of the turn, if one is started.
        """
        current = self.current
        if current is not None:
            return current
        last = self._journal.turn
        if last.phase is Phase.STOPPED:
            return None
        if untold is not None and untold == last.failed_run_id and not self._journal.history.unread:
            return None
        if self._journal.history.unread or last.resumable or last.is_open:
            return self._start(op)
        return None

    async def respond(
        self, request_id: str, answer: Literal["approve", "reject"], reason: str, op: Operation | None
    ) -> bool:
        """Answer an approval; return False where it had this answer before, and nothing was written.

        Raises:
            RequestNotFound: nothing with this id waits, or it was answered otherwise.
        """
        self.check()
        turn = self.current
        try:
            if turn is None:
                raise RequestNotFound(f"no request {request_id!r} waits for an answer", request=request_id)
            await turn.respond(request_id, answer, reason, op)
        except RequestNotFound:
            await self._journal.settle()
            if not self._journal.turn.answered(request_id, answer):
                raise
            return False
        return True

    def take_up(self, promised: str | None) -> None:
        """Go on where another process has stopped: with the open turn, or with the one `promised` to a message."""
        if self.course.stage is not Stage.WORKING or not self.ready:
            return
        if self._abandoned:
            self._start()
        elif promised is not None:
            self._next_run_id = promised
            self._start()

    async def ended(self, turn: Turn) -> None:
        """Wait for the end of a turn that `begin` or `current` returned."""
        await turn.over.wait()

    def meant(self, run_id: str | None) -> bool:
        """Whether who wants to stop this turn, or None: whichever runs, means the one that runs."""
        return self._turn is not None and run_id in (None, self._turn.run_id)

    async def stop(
        self, reason: str, *, asked: bool, run_id: str | None = None, op: Operation | None = None
    ) -> None:
        """End the running turn, if it is `meant`, at once and wait for its end."""
        turn = self._turn
        if turn is not None and self.meant(run_id):
            turn.stop(reason, asked=asked, op=op)
            await self.ended(turn)

    async def end(self, reason: str) -> None:
        """Start no more turns, and end the running one at once; it may be continued."""
        self.course.end()
        await self.stop(reason, asked=False)

    async def let_go(self, *, now: bool) -> None:
        """Start no more turns, end the work of the present one without an end in the log, and wait for that."""
        self.course.leave()
        turn = self._turn
        if turn is not None:
            self._left = turn
            turn.let_go(now=now)
            await self.ended(turn)

    def left(self, place: str) -> Left:
        """Return what the turn that was let go of has left here: calls that are written down, or that have begun."""
        open_calls = self._journal.turn.open_calls.values()
        if not self._journal.turn.is_open or all(call.place != place for call in open_calls):
            return "nothing"
        return "begun" if self._left is None or self._left.calls_begun else "written"

    @property
    def _abandoned(self) -> str | None:
        """The turn that is open in the log, that nobody runs, and that is gone on with."""
        left = self._restarts is not None and self._turn is None and self._journal.turn.is_open
        return self._journal.turn.run_id if left else None

    @property
    def _coming(self) -> str:
        return self._abandoned or self._next_run_id

    def _may_start(self, wake: bool) -> bool:
        """Whether a message may begin a turn, one that is to `wake` what is paused or another."""
        paused = self._journal.turn.phase is Phase.PAUSED
        return self.course.stage is Stage.WORKING and (wake or not paused)

    def _start(self, op: Operation | None = None) -> Turn:
        if self.course.stage is not Stage.WORKING:
            raise StateConflict("the conversation is closed", state="closed")
        turn = self._made(op)
        self._run(turn)
        return turn

    def _made(self, op: Operation | None = None) -> Turn:
        """Make the turn that comes next; `_run` it, or `_withdraw` it."""
        if not self.ready:
            raise StateConflict("no agent is configured yet", state="idle")
        self._turn = Turn(
            self._coming,
            self._present,
            self._journal,
            restarts=RESTARTS if self._restarts is None else self._restarts,
            op=op,
        )
        if self._turn.run_id == self._next_run_id:
            self._next_run_id = new_id()
        return self._turn

    def _run(self, turn: Turn) -> None:
        self._failure = None
        self._task = asyncio.create_task(self._course(turn, self._task), name=f"turn {turn.run_id}")

    def _withdraw(self, turn: Turn, failure: BaseException | None) -> None:
        """Forget a turn whose start was not written: a message that had joined it begins it, or the next one."""
        self._turn, self._next_run_id = None, turn.run_id
        turn.failure = failure if isinstance(failure, Exception) else None
        turn.begun.set()
        turn.over.set()

    async def _present(self) -> AgentRuntime:
        if self._runtime is None and self.obstacle is None:
            self._arrived = asyncio.Event()  # made first: somebody may arrive while it is written down
            await self._journal.append(Waiting(what="key", reason=self.missing))
            await self._arrived.wait()
            await self._journal.append(Waiting(what="key"))
        if self._runtime is None:
            raise self.obstacle or InternalError("nobody works in the turn")
        return self._runtime

    async def _course(self, turn: Turn, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None and not before.done():
                await asyncio.wait({before})
            await turn.run()
        finally:
            self._failure = turn.failure
            turn.over.set()
            if self._turn is turn:
                self._turn = self._task = None
            if turn.failure is not None:
                self.on_failure(turn.failure)
