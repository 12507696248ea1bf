"""One turn: ask the model, run the tools it calls, again and again, until there is nothing left to do.

Everything is written down before it counts: a call before it runs, a result before the model sees
it. A turn is one task and ends in exactly one TurnEnded, whatever happens; one whose process died
before that is gone on with by another, in the same run_id, from where the log ends. It never ends as
finished while a user's message is unread: it waits until all that was submitted is committed, looks
once more, and submits its end without giving way in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from agent_sdk.agent.calls import Calls
from agent_sdk.agent.history import ASKED_AGAIN, CONTINUED, FULL, INTERRUPTED, ending_of, failure
from agent_sdk.agent.runtime import AgentRuntime
from agent_sdk.agent.turn_state import PRESENT, Course, Phase, Stage, TurnLog
from agent_sdk.conversation.contract import Outcome, outcome_of
from agent_sdk.middleware import ModelCall, Stop, TurnContext
from agent_sdk.models import FINISH_REASONS
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    InternalError,
    LimitExceeded,
    ModelError,
    PolicyDenied,
    RequestNotFound,
    ToolError,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.events import (
    AgentMessage,
    ErrorRaised,
    Event,
    Interrupted,
    ModelFailed,
    ModelUsed,
    RunStatus,
    ToolCalled,
    TurnEnded,
    TurnResumed,
    TurnStarted,
)
from agent_sdk.tools import as_utf8

logger = logging.getLogger("agent_sdk")

RESTARTS = 10
"""Processes in a row that may end while they run a turn before it is given up, where nothing else is said."""

Classification = Literal["model", "tool", "workspace", "policy", "limit", "internal"]

_CLASSES: tuple[tuple[type[Exception], Classification], ...] = (
    (ModelError, "model"),
    (ToolError, "tool"),
    (WorkspaceUnavailable, "workspace"),
    (ConnectionLost, "workspace"),
    (PolicyDenied, "policy"),
    (LimitExceeded, "limit"),
)


class Turn:
    """Run it as a task of its own."""

    def __init__(
        self,
        run_id: str,
        present: Callable[[], Awaitable[AgentRuntime]],
        log: TurnLog,
        *,
        restarts: int = RESTARTS,
        op: Any = None,
    ) -> None:
        """Make a turn.

        Args:
            run_id: its id.
            present: returns the agent that runs the turn, as soon as the conversation has one.
            log: where it is written down.
            restarts: how many processes in a row may end while they run it, without bringing it further.
            op: the operation that starts it, see TurnLog.append.
        """
        self.run_id = run_id
        self.course = Course()
        self.begun = asyncio.Event()
        """Set when its start is in the log, or cannot get there."""
        self.over = asyncio.Event()
        """Set by the Turns it belongs to, when the task that ran it has ended."""
        self.failure: Exception | None = None
        """Why not even its end could be written."""
        self.outcome: Outcome | None = None
        """How it ended; None after its end: another process is to go on with it."""
        self._present = present
        self._runtime: AgentRuntime
        """The agent that runs the turn, when it is `entered`."""
        self._entered = False
        self._log = log
        self._resumes = log.turn.is_open and log.turn.run_id == run_id
        """Whether another process has begun it."""
        self._restarts = restarts
        self._op = op
        self._calls = Calls(log, self.course, self._context)
        self._iterations = 0
        if self._resumes:
            self._iterations = log.turn.iterations
            self._calls.adopt()
            self.begun.set()
        self._system: str | None = None
        self._max_model_calls = 0
        self._in_vain = 0
        """How many answers in a row the output limit has cut, or were empty."""
        self._full = False
        """The last answer filled the context window."""
        self._finish_reason = ""
        self._pieces: list[tuple[str, str]] = []
        """Text and thinking that have come of the answer that is being written."""
        self._seen = 0
        """The log's last seq when the model's next answer, or the one that is being written, was asked for."""
        self._task: asyncio.Task[None] | None = None
        self._why: tuple[str, bool, Any] = ("the program that ran it was stopped", False, None)
        """What `stop` was told; a task that is cancelled without it belongs to a program that ends."""

    @property
    def calls_begun(self) -> bool:
        """Whether a call without a result may have begun."""
        return self._calls.begun

    def __repr__(self) -> str:
        return f"<Turn {self.run_id} after {self._iterations} steps>"

    async def run(self, *, after: asyncio.Task[None] | None = None) -> None:
        """Work to the end, when the task `after` which it comes has ended.

        An error is kept in `failure`, not raised. Cancelling the task is an interruption.
        """
        if after is not None and not after.done():
            await asyncio.wait({after})
        self._task = asyncio.current_task()
        PRESENT.set(self.course)
        try:
            try:
                events = await self._until_end()
                self.course.end()
                await self._log.append(*events)
            except asyncio.CancelledError:
                if self._task is not None:
                    self._task.uncancel()
                if self.course.leaving:
                    logger.info("turn %s is left to another process", self.run_id)
                else:
                    await self._interrupted()
            except Exception as exc:  # noqa: BLE001  the turn's boundary: every failure becomes an event
                await self._failed(exc)
        except Exception as exc:  # even the log may fail
            self.course.end()
            self.failure = exc
            bug = None if isinstance(exc, AgentServerError) else exc
            logger.error("the end of turn %s could not be written: %s", self.run_id, exc, exc_info=bug)
        finally:
            if self._entered:
                await self._runtime.close()

    def stop(self, reason: str, *, asked: bool = True, op: Any = None) -> None:
        """End it at once: calls under way are cancelled. Not `asked` for by a user: it may be continued."""
        if self.course.stage in (Stage.STOPPING, Stage.ENDING):
            return
        self.course.stage, self._why = Stage.STOPPING, (reason, asked, op)
        if self._task is not None:
            self._task.cancel()

    def leave(self, *, now: bool) -> None:
        """End the work without an end in the log, so that another process goes on with it.

        What nobody could take up is finished first and written down: an answer of the model, a tool that
        runs in this process. With `now` it is broken off.
        """
        self.course.leave()
        # Else its end in the log must not be broken off.
        if self._task is not None and self.course.break_off(now=now):
            self._task.cancel()

    async def respond(
        self, request_id: str, answer: Literal["approve", "reject"], reason: str, op: Any = None
    ) -> None:
        """Answer an approval; returns when the answer is in the log."""
        if self.course.ending:
            raise RequestNotFound("the turn that asked has ended", request=request_id)
        await self._calls.respond(request_id, answer, reason, op)

    async def _until_end(self) -> list[Event]:
        """Work until the turn ends by itself; return the events that say so, to be written without giving way."""
        begin = self._resume if self._resumes else self._start
        while True:
            try:
                final = await begin()
                return await self._steps(final)
            except Stop as stop:
                self.course.check(may_leave=False)
                await self._runtime.chain.on_turn_end(self._context(), stop.status)
                self.course.check(may_leave=False)
                await self._log.settle()
                events = self._calls.close(f"[no result: {stop.reason}]")
                # What came before the last request the middleware knew when it stopped.
                news = any(message.seq > self._seen for message in self._log.history.unread)
                if stop.status != "finished" or not news:
                    end = self._end(stop.status, final_text=stop.final_text, reason=stop.reason)
                    return [*events, end]
                begin = self._go_on
                await self._log.append(*events)

    async def _start(self) -> str | None:
        if self._log.turn.run_id != self.run_id:  # else its start was written with the message
            await self._log.mend()
            await self._log.append(TurnStarted(run_id=self.run_id), op=self._op)
        self.begun.set()
        await self._enter()
        return self._log.history.answered

    async def _resume(self) -> str | None:
        """Go on where the log ends; return the final text when nothing but the end was missing."""
        await self._enter()
        state = self._log.turn
        if state.in_vain >= self._restarts:
            await self._calls.abandon()
            raise LimitExceeded(
                f"the turn was given up: {state.in_vain} processes in a row ended while they ran it; "
                "what it still ran was ended"
            )
        await self._log.append(TurnResumed(run_id=self.run_id, generation=state.generation + 1))
        if state.open_calls:
            return await self._calls.resume()
        return state.concluded or self._log.history.answered

    async def _go_on(self) -> str | None:
        """Go on behind a stop that came before a message was read."""
        return None

    async def _enter(self) -> None:
        """Wait for who works in this turn."""
        self.course.check()
        self._runtime = self._calls.runtime = runtime = await self._present()
        self._max_model_calls, self._entered = runtime.max_iterations, True
        self.course.check()

    async def _steps(self, final: str | None) -> list[Event]:
        self._seen = self._log.history.head_seq
        if not self._iterations:
            await self._runtime.chain.on_turn_start(self._context())
        while True:
            self.course.check()
            if final is not None and await self._is_over():
                return [self._end("finished", final_text=final)]
            await self._runtime.place.ready()
            if self._log.turn.phase is Phase.PAUSING:
                raise Stop("", status="paused")
            final, answer = await self._step()
            if answer:
                return [*answer, self._end("finished", final_text=final or "")]

    async def _is_over(self) -> bool:
        """Whether nobody has said anything that the model has not read, also not because the turn is to end."""
        log = self._log
        await log.settle()
        if not log.history.unread:
            await self._runtime.chain.on_turn_end(self._context(), "finished")
            self.course.check()
            await log.settle()
        return not log.history.unread

    async def _step(self) -> tuple[str | None, list[Event]]:
        """Ask once and do what follows from the answer; return the final text when the agent is done.

        With it comes the answer if it is to be written with the end of the turn.
        """
        request = await self._request()
        with self.course.finishing():  # what it costs is not to be lost
            message, calls, unwritten = await self._ask(request)
        if unwritten:
            return message.text, unwritten
        self.course.check(may_leave=False)
        ending = ending_of(message)
        if ending == "done":
            return self._log.history.said, []
        in_vain = ending in ("cut", "empty") or (ending == "calls" and all(call.cut for call in calls))
        self._in_vain = self._in_vain + 1 if in_vain else 0
        self._full = ending == "full"
        if ending == "withheld" or (ending == "empty" and self._in_vain > ASKED_AGAIN):
            raise failure(message)
        return (await self._calls.run() if ending == "calls" else None), []

    async def _request(self) -> ModelCall:
        """Return what the model is asked."""
        runtime, history = self._runtime, self._log.history
        if self._system is None:
            self._system = await runtime.chain.prompt(self._context())
            self.course.check()
        self._seen = history.head_seq
        request = ModelCall(
            system=self._system,
            turns=history.coming(),
            tools=runtime.toolbox.specs,
            llm=runtime.spec.llm,
            client=runtime.client,
        )
        request = await runtime.chain.before_model(self._context(), request)
        self.course.check()
        if self._full:
            raise Stop(FULL, final_text=history.said)
        if self._in_vain > CONTINUED:
            raise Stop(
                f"the output limit of the model cut {self._in_vain} answers in a row; "
                "raise max_output_tokens, or run again to have the answer continued",
                final_text=history.said,
            )
        return request

    async def _ask(self, request: ModelCall) -> tuple[AgentMessage, list[ToolCalled], list[Event]]:
        """Ask the model and write down what it answers, in any case, or return it to be written with the end."""
        self._iterations, started = self._iterations + 1, time.monotonic()
        self._log.history.read(self._seen)
        completion = await request.client.complete(request, on_delta=self._hear)
        seconds, raised = time.monotonic() - started, None
        try:
            completion = await self._runtime.chain.after_model(self._context(), completion)
        except Exception as exc:  # noqa: BLE001  raised again when the answer is written
            raised = exc
        self._finish_reason = reason = as_utf8(completion.finish_reason)
        if reason not in FINISH_REASONS:
            self._finish_reason = self._log.mask.text(reason)
        calls, requests = self._calls.open(self.run_id, completion)
        message = AgentMessage(
            run_id=self.run_id,
            text=as_utf8(completion.text),
            thinking=as_utf8(completion.thinking),
            tool_calls=len(calls),
            finish_reason=self._finish_reason,
            seen_seq=self._seen,
            provider=completion.provider,
        )
        usage = completion.usage
        used = ModelUsed(
            run_id=self.run_id,
            model=request.llm.model,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            cost=usage.cost,
            seconds=seconds,
        )
        self._pieces.clear()
        # In one commit: a call without a request needed none, whatever the policy is after a restart. Where a
        # middleware broke off, nobody was asked whether it needs one.
        further: Sequence[Event] = requests
        if raised is not None:
            why = raised.reason if isinstance(raised, Stop) else f"{type(raised).__name__}: {raised}"
            further = self._calls.refuse(calls, f"[no result: {why}]")
        elif self._is_last(message):
            return message, calls, [message, used]
        await self._log.append(message, *calls, used, *further)
        if raised is not None:
            raise raised
        return message, calls, []

    def _is_last(self, message: AgentMessage) -> bool:
        """Whether the turn ends with this answer, and nobody has to see the answer before that."""
        history = self._log.history
        goes_on = (
            history.continues or history.was_cut
        )  # then the final text is what has been written, and masked
        done = ending_of(message) == "done" and not goes_on and not history.unread
        free = self.course.stage is Stage.WORKING and self._log.settled
        return done and free and not self._runtime.chain.ends_turns

    def _hear(self, text: str, thinking: str) -> None:
        """Take a piece of the answer that is being written."""
        self._pieces.append((text, thinking))
        self._log.delta(self.run_id, text, thinking)

    def _broken_off(self) -> list[Event]:
        """What had come of an answer, which somebody may have read."""
        text, thinking = ("".join(as_utf8(piece[part]) for piece in self._pieces) for part in (0, 1))
        if not (text or thinking):
            return []
        self._finish_reason = INTERRUPTED
        return [
            AgentMessage(
                run_id=self.run_id,
                text=text,
                thinking=thinking,
                finish_reason=INTERRUPTED,
                seen_seq=self._seen,
            )
        ]

    def _context(self) -> TurnContext:
        """Return what middleware may know and do in a turn that has come so far."""
        runtime = self._runtime
        return TurnContext(
            run_id=self.run_id,
            workspace=runtime.workspace,
            tools=runtime.toolbox.by_name,
            model_calls=self._iterations,
            max_model_calls=self._max_model_calls,
            confirmation=runtime.confirmation,
            describe=runtime.describe,
            hide=self._log.mask.data,
            append=self._note,
        )

    async def _note(self, event: Event) -> None:
        if isinstance(event, ModelFailed) and event.retry_in is not None:
            self._pieces.clear()  # the next try begins from the start
        await self._log.append(event)

    async def _interrupted(self) -> None:
        """Write how far it came; a turn whose end is on its way has nothing to add."""
        decided_now = self.course.end()
        await self._log.settle()
        if not decided_now:
            return
        reason, asked, op = self._why
        why = f"interrupted before it returned: {reason}" if reason else "interrupted before it returned"
        events = [
            *self._broken_off(),
            *self._calls.close(f"[{why}; what it had done already stays done]"),
        ]
        if asked:
            events.append(Interrupted(reason=reason))
        await self._log.append(*events, self._end("interrupted", reason=reason), op=op)

    async def _failed(self, exc: Exception) -> None:
        self.course.end()
        known = exc if isinstance(exc, AgentServerError) else InternalError(f"{type(exc).__name__}: {exc}")
        if isinstance(known, InternalError):
            logger.error("turn %s failed", self.run_id, exc_info=exc)
        message, come = as_utf8(self._log.mask.text(known.message)), self._broken_off()
        self._finish_reason = str(known.details.get("finish_reason", self._finish_reason))
        raised = ErrorRaised(
            error=known.kind,
            message=message,
            classification=next((said for kind, said in _CLASSES if isinstance(exc, kind)), "internal"),
            retryable=known.retryable,
        )
        await self._log.settle()
        events = [*come, *self._calls.close(f"[no result: {message}]")]
        ended = self._end("failed", reason=message, error=known.kind, retryable=known.retryable)
        await self._log.append(*events, raised, ended)

    def _end(
        self,
        status: RunStatus,
        *,
        final_text: str = "",
        reason: str = "",
        error: str | None = None,
        retryable: bool = False,
    ) -> TurnEnded:
        ended = TurnEnded(
            run_id=self.run_id,
            status=status,
            final_text=self._log.mask.text(final_text),
            reason=self._log.mask.text(reason),
            error=error,
            retryable=retryable,
            iterations=self._iterations,
            finish_reason=self._finish_reason,
        )
        self.outcome = outcome_of(ended)
        return ended
