"""One turn: ask the model, run the tools it calls, again and again, until there is nothing left to do.

Everything is written down before it counts: a call before it runs, a result before the model sees
it. A turn is one task and ends in exactly one TurnEnded, whatever happens. It never ends as finished
while a user's message is unread: it waits until all that was submitted is committed, looks once
more, and submits its end without giving way in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Literal

from agent_sdk.agent.actor import Actor
from agent_sdk.agent.calls import Calls
from agent_sdk.agent.journal import Journal
from agent_sdk.agent.llm.contract import Completion, ModelRequest
from agent_sdk.agent.llm.retry import complete_with_retries
from agent_sdk.conversation import Outcome, outcome_of
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
    Interrupted,
    ModelFailed,
    ModelUsed,
    RunStatus,
    ToolCalled,
    TurnEnded,
    TurnStarted,
)

logger = logging.getLogger("agent_sdk")

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

    def __init__(self, run_id: str, actor: Actor, journal: Journal) -> None:
        self.run_id = run_id
        self.ending = False
        """Its end is decided: a message from now on belongs to the next turn."""
        self.over = asyncio.Event()
        """Set by whoever runs it, when `run` has returned."""
        self.failure: Exception | None = None
        """Why not even its end could be written."""
        self.outcome: Outcome | None = None
        """How it ended."""
        self._actor = actor
        self._journal = journal
        self._calls = Calls(actor, journal)
        self._iterations = 0
        self._task: asyncio.Task[None] | None = None
        self._stopped: tuple[str, bool] | None = None

    def __repr__(self) -> str:
        return f"<Turn {self.run_id} after {self._iterations} steps>"

    async def run(self) -> None:
        """Work to the end; raises nothing, see `failure`. Cancelling the task is an interruption."""
        self._task = asyncio.current_task()
        try:
            await self._work()
        except Exception as exc:  # the turn's boundary: even the log may fail
            self.ending = True
            self.failure = exc
            logger.error("the end of turn %s could not be written", self.run_id, exc_info=exc)

    def stop(self, reason: str, *, asked: bool = True) -> None:
        """End it at once: calls under way are cancelled. Not `asked` for by a user: it may be continued."""
        if self.ending or self._stopped is not None:
            return
        self._stopped = (reason, asked)
        self._calls.stopped = True
        if self._task is not None:
            self._task.cancel()

    async def respond(self, request_id: str, answer: Literal["approve", "reject"], reason: str) -> None:
        """Answer an approval; returns when the answer is in the log."""
        if self.ending:
            raise RequestNotFound("the turn that asked has ended", request=request_id)
        await self._calls.respond(request_id, answer, reason)

    async def _work(self) -> None:
        try:
            await self._journal.mend()
            await self._journal.append(TurnStarted(run_id=self.run_id))
            if self._stopped is not None:
                raise asyncio.CancelledError
            ended = await self._steps()
            self.ending = True
            await self._journal.append(ended)
        except asyncio.CancelledError:
            if self._task is not None:
                self._task.uncancel()
            await self._interrupted()
        except Exception as exc:  # noqa: BLE001  the turn's boundary: every failure becomes an event
            await self._failed(exc)

    async def _steps(self) -> TurnEnded:
        journal, limit = self._journal, self._actor.max_iterations
        final = journal.history.answered
        while True:
            if final is not None:
                await journal.settle()
                if not journal.history.unread:
                    return self._end("finished", final_text=final)
            if journal.pause_requested:
                return self._end("paused")
            if self._iterations >= limit:
                return self._end("limit", reason=f"the turn has made {limit} model calls, which is its limit")
            self._iterations += 1
            final = await self._step()

    async def _step(self) -> str | None:
        """Ask once and run what is called; return the final text when the agent is done."""
        actor, history = self._actor, self._journal.history
        system = await actor.system()
        seen, started, llm = history.read(), time.monotonic(), actor.llm
        completion = await complete_with_retries(
            actor.client,
            ModelRequest(system=system, turns=history.turns, tools=actor.toolbox.specs),
            llm,
            on_delta=lambda text, thinking: self._journal.delta(self.run_id, text, thinking),
            on_failure=self._model_failed,
        )
        calls = self._called(completion)
        message = AgentMessage(
            run_id=self.run_id,
            text=_utf8(completion.text),
            thinking=_utf8(completion.thinking),
            tool_calls=len(calls),
            seen_seq=seen,
            provider=completion.provider,
        )
        used = _used(self.run_id, llm.model, completion, time.monotonic() - started)
        await self._journal.append(message, *calls, used)
        return await self._calls.run(calls) if calls else message.text

    def _called(self, completion: Completion) -> list[ToolCalled]:
        return [
            ToolCalled(
                run_id=self.run_id,
                call_id=self._journal.history.fresh_call_id(_utf8(use.call_id)),
                tool=_utf8(use.tool),
                arguments=_utf8(use.arguments),
            )
            for use in completion.tool_calls
        ]

    async def _model_failed(self, error: ModelError, attempt: int, retry_in: float | None) -> None:
        await self._journal.append(
            ModelFailed(
                run_id=self.run_id,
                error=error.kind,
                message=_utf8(self._actor.mask.text(error.message)),
                attempt=attempt,
                retry_in=retry_in,
            )
        )

    async def _interrupted(self) -> None:
        """Write how far it came; a turn whose end is on its way has nothing to add."""
        decided, self.ending = self.ending, True
        await self._journal.settle()
        if decided:
            return
        # A task that is cancelled without `stop` belongs to a program that ends.
        reason, asked = self._stopped or ("the program that ran it was stopped", False)
        why = f"interrupted before it returned: {reason}" if reason else "interrupted before it returned"
        events = self._calls.close(f"[{why}; what it had done already stays done]")
        if asked:
            events.append(Interrupted(reason=reason))
        await self._journal.append(*events, self._end("interrupted", reason=reason))

    async def _failed(self, exc: Exception) -> None:
        self.ending = True
        known = exc if isinstance(exc, AgentServerError) else InternalError(f"{type(exc).__name__}: {exc}")
        if known is not exc:
            logger.error("turn %s failed", self.run_id, exc_info=exc)
        message = _utf8(self._actor.mask.text(known.message))
        raised = ErrorRaised(
            error=known.kind,
            message=message,
            classification=_classify(exc),
            retryable=known.retryable,
        )
        await self._journal.settle()
        events = self._calls.close(f"[no result: {message}]")
        ended = self._end("failed", reason=message, error=known.kind, retryable=known.retryable)
        await self._journal.append(*events, raised, ended)

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
            final_text=final_text,
            reason=reason,
            error=error,
            retryable=retryable,
            iterations=self._iterations,
        )
        self.outcome = outcome_of(ended)
        return ended


def _classify(exc: Exception) -> Classification:
    for kind, classification in _CLASSES:
        if isinstance(exc, kind):
            return classification
    return "internal"


def _used(run_id: str, model: str, completion: Completion, seconds: float) -> ModelUsed:
    usage = completion.usage
    return ModelUsed(
        run_id=run_id,
        model=model,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        cost=usage.cost,
        seconds=seconds,
    )


def _utf8(text: str) -> str:
    """The text with `?` for what UTF-8 cannot say (lone surrogates, from a model's JSON)."""
    return text if text.isascii() else text.encode(errors="replace").decode()
