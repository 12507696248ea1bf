"""Which turn runs, which comes next, and which of them answers a message.

Whether a message joins the running turn is decided when it is submitted. A turn submits its end only
when no message is under way, and the next turn waits for the task of the one before. Where turns are
to survive their process, the one that is open in the log is gone on with before any other.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import msgspec

from agent_sdk.agent.loop import RESTARTS, Turn
from agent_sdk.agent.runtime import AgentRuntime
from agent_sdk.agent.turn_state import Course, Phase, Stage
from agent_sdk.conversation.configuration import AgentConfig
from agent_sdk.conversation.contract import OnWaiting, Outcome, still_runs, tell_waits
from agent_sdk.conversation.log import ConversationLog
from agent_sdk.idempotency import Asked
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import Operation, Record
from agent_sdk.protocol.errors import (
    InternalError,
    OpExpired,
    OutcomeUnknown,
    RequestNotFound,
    StateConflict,
    draining,
)
from agent_sdk.protocol.events import TurnStarted, UserMessage, Waiting
from agent_sdk.protocol.results import Accepted, Wait

Left = Literal["nothing", "written", "begun"]
"""Of a turn that was let go of: no call that is open, one that is written down, one that may have begun."""


class Turns:
    """The turns of one conversation, one at a time."""

    def __init__(
        self,
        log: ConversationLog,
        agent: AgentConfig,
        course: Course,
        on_failure: Callable[[Exception], None],
        *,
        restarts: int | None = None,
    ) -> None:
        """Take the log.

        Args:
            log: where they are written down.
            agent: whose turns these are.
            course: of the conversation; where that is let go of already, no turn starts.
            on_failure: told why the end of a turn could not be written, which nobody learns from the log.
            restarts: a turn that is open in the log is gone on with, so often at most; None: it is closed.
        """
        self.log = log
        self.agent = agent
        self.course = course
        """Of all of them: new ones start while it is working."""
        self.unreported: str | None = None
        """The turn that answers the last message or was begun last, until `run` has returned how it ended."""
        self._failure: Exception | None = None
        """Why the end of the last turn could not be written: it is open, and nobody runs it."""
        self._on_failure = on_failure
        self._restarts = restarts
        self._next_run_id = new_id()
        self._turn: Turn | None = None
        self._task: asyncio.Task[None] | None = None
        self._left: Turn | None = None

    @property
    def waits(self) -> tuple[Wait, ...]:
        """What the agent lacks, working or not, as far as the log does not say it."""
        missing = self.agent.missing
        key = [Wait(what="key", reason=missing)] if missing else []
        disk = [Wait(what="disk", reason=f"the log: {self._failure}")] if self._failure else []
        return (*key, *disk)

    @property
    def last(self) -> Outcome:
        """How the last turn ended.

        Raises:
            StateConflict: there was none.
        """
        if self.log.turn.outcome is None:
            raise StateConflict("there is no message yet", state="idle")
        return self.log.turn.outcome

    @property
    def current(self) -> Turn | None:
        """The turn that runs: its end is not in the log yet."""
        turn, outcome = self._turn, self.log.turn.outcome
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
        begins = self._turn is None and not self.log.turn.is_open and self._may_start(wake)
        start = [TurnStarted(run_id=run_id)] if begins else []
        written = self.log.submit(message, *start, op=op)
        turn = self._made() if begins else None

        # Not after an await: whoever sends the message may be cancelled, the message is there all the same.
        def committed(_: object) -> None:
            failure = CancelledError() if written.cancelled() else written.exception()
            waits = failure is None and bool(self.log.history.unread)
            if failure is None and written.result():  # what came before is not the last message
                self.unreported = run_id
            if turn is not None and (failure or not written.result()):
                self._withdraw(turn, failure)
            elif turn is not None:
                self._run(turn)
            elif waits and run_id == self._coming and self._may_start(wake):
                self._start()

        written.add_done_callback(committed)
        return written

    async def run(self, timeout: float | None, on_waiting: OnWaiting | None) -> Outcome:
        """Wait for the end of the turn, as Conversation.run does."""
        try:
            async with asyncio.timeout(timeout) as limit:
                turn = await self.begin(unreported=self.unreported)
                if turn is None:
                    self.unreported = None
                    return self.last
                await self._ended(turn, on_waiting)
                await self.log.delivery.drained()
        except TimeoutError:
            if not limit.expired():
                raise
            raise still_runs(timeout, self.log.state.waits) from None
        if turn.failure is not None:
            raise turn.failure
        if self.unreported == turn.run_id:  # else another message has come since
            self.unreported = None
        return turn.outcome or self.last

    async def _ended(self, turn: Turn, on_waiting: OnWaiting | None) -> None:
        """Wait for the end of a turn, and tell what it waits for until then."""
        told, news = set[Wait](), asyncio.Event()
        stop = self.log.delivery.subscribe(lambda seq, event: news.set())
        over = asyncio.ensure_future(turn.over.wait())
        over.add_done_callback(lambda _: news.set())
        try:
            while not over.done():
                news.clear()
                await tell_waits(self.log.state.waits, told, on_waiting)
                await news.wait()
        finally:
            stop()
            over.cancel()

    async def begin(self, op: Operation | None = None, *, unreported: str | None = None) -> Turn | None:
        """Return the turn that runs, or start one when there is something to do, else None. Its start is in the log.

        Args:
            unreported: the turn whose outcome the caller has not heard; if it has failed, it is not tried again.
            op: remembered with the start of the turn, if one is started.

        Raises:
            StorageFull, WorkspaceUnavailable, LeaseLost: its start could not be written.
            Overloaded: it is let go of, for another process.
        """
        while (turn := self._begin(op, unreported)) is not None:
            await turn.begun.wait()
            if self.log.turn.run_id == turn.run_id:
                break
            if turn.failure is not None or self.course.leaving:
                raise turn.failure or draining()
            await turn.over.wait()  # its message had come before: nothing began
        return turn

    def _begin(self, op: Operation | None, unreported: str | None) -> Turn | None:
        last = self.log.turn
        if self.current is not None or last.phase is Phase.STOPPED:
            return self.current
        heard = unreported is None or unreported != last.failed_run_id
        goes_on = heard and (last.resumable or last.is_open)
        return self._start(op) if goes_on or self.log.history.unread else None

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
            await self.log.settle()
            if not self.log.turn.answered(request_id, answer):
                raise
            return False
        return True

    async def resume(self) -> None:
        """Go on where another process has stopped: with the open turn, or with one that was promised to a message."""
        promised = await self._promised()
        if self.course.stage is not Stage.WORKING or not self.agent.ready:
            return
        if self._abandoned:
            self._start()
        elif promised is not None:
            self._next_run_id = promised
            self._start()

    async def _promised(self) -> str | None:
        """Return the turn that a message was promised when the process ended before it had started one."""
        last = self.log.turn
        for message in self.log.history.unread:
            if message.op_id is None or message.seq < last.started_seq or last.phase is Phase.PAUSED:
                continue
            with suppress(OpExpired, OutcomeUnknown):  # then it waits for `run`
                known = await self.log.operations.find(Asked(message.op_id))
                if known is not None and known.answer is not None:
                    run_id = msgspec.json.decode(known.answer, type=Accepted).run_id
                    if run_id != last.run_id:
                        return run_id
        return None

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
            await turn.over.wait()

    async def end(self, reason: str) -> None:
        """Start no more turns, and end the running one at once; it may be continued."""
        self.course.end()
        await self.stop(reason, asked=False)

    async def leave(self, *, now: bool) -> None:
        """Start no more turns, end the work of the present one without an end in the log, and wait for that."""
        self.course.leave()
        turn = self._turn
        if turn is not None:
            self._left = turn
            turn.leave(now=now)
            await turn.over.wait()

    def left(self, place: str) -> Left:
        """Return what the turn that was let go of has left here: calls that are written down, or that have begun."""
        open_calls = self.log.turn.open_calls.values()
        if not self.log.turn.is_open or all(call.place != place for call in open_calls):
            return "nothing"
        return "begun" if self._left is None or self._left.calls_begun else "written"

    @property
    def _abandoned(self) -> str | None:
        """The turn that is open in the log, that nobody runs, and that is gone on with."""
        left = self._restarts is not None and self._turn is None and self.log.turn.is_open
        return self.log.turn.run_id if left else None

    @property
    def _coming(self) -> str:
        return self._abandoned or self._next_run_id

    def _may_start(self, wake: bool) -> bool:
        """Whether a message may begin a turn, one that is to `wake` what is paused or another."""
        paused = self.log.turn.phase is Phase.PAUSED
        return self.course.stage is Stage.WORKING and (wake or not paused)

    def _start(self, op: Operation | None = None) -> Turn:
        if self.course.stage is not Stage.WORKING:
            raise StateConflict("the conversation is closed", state="closed")
        turn = self._made(op)
        self.unreported = turn.run_id
        self._run(turn)
        return turn

    def _made(self, op: Operation | None = None) -> Turn:
        """Make the turn that comes next; `_run` it, or `_withdraw` it."""
        if not self.agent.ready:
            raise StateConflict("no agent is configured yet", state="idle")
        restarts = RESTARTS if self._restarts is None else self._restarts
        self._turn = Turn(self._coming, self._present, self.log, restarts=restarts, op=op)
        if self._turn.run_id == self._next_run_id:
            self._next_run_id = new_id()
        return self._turn

    def _run(self, turn: Turn) -> None:
        self._failure = None
        self._task = asyncio.create_task(turn.run(after=self._task), name=f"turn {turn.run_id}")
        self._task.add_done_callback(lambda _: self._ran(turn))

    def _ran(self, turn: Turn) -> None:
        self._failure = turn.failure
        turn.begun.set()
        turn.over.set()
        if self._turn is turn:
            self._turn = self._task = None
        if turn.failure is not None:
            self._on_failure(turn.failure)

    def _withdraw(self, turn: Turn, failure: BaseException | None) -> None:
        """Forget a turn whose start was not written: a message that had joined it begins it, or the next one."""
        self._turn = None
        if turn.course.stage is not Stage.STOPPING:  # else nobody has joined it since, but the next one
            self._next_run_id = turn.run_id
        turn.failure = failure if isinstance(failure, Exception) else None
        turn.begun.set()
        turn.over.set()

    async def _present(self) -> AgentRuntime:
        """Return the agent, as soon as there is one; what is missing of it is in the log until then."""
        agent = self.agent
        if agent.runtime is None and agent.obstacle is None:
            await self.log.append(Waiting(what="key", reason=agent.missing))
            await agent.arrived.wait()
            await self.log.append(Waiting(what="key"))
        if agent.runtime is None:
            raise agent.obstacle or InternalError("nobody works in the turn")
        return agent.runtime
