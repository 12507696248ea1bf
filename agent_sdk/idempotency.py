"""Calls that change something run once per op_id, however often they come.

What makes two calls the same, what a call gets that came before, which failures count as no run at all, and for how
long an answer is known: all that is decided here. What is remembered is kept by a `BackEnd`, of which there are two:

* `InMemory` keeps it for as long as its process lives: in front of a workspace, and in front of a conversation.
* `LoggedOperations` of the event log keeps it on the disk: what has to be known by the next process. There a call is
  written down before it is sent to a box, with the name of that box, and what a verb of a conversation answers
  is written in the commit of its events.

A call that came before, with the same params, gets its answer; it waits where it still runs; and where it has begun
and nobody runs it any more, its outcome is unknown. With other params it is refused. `IdempotencyStore` does all that
in one process; calls that a server forwards attach in the box, because each repetition has byte streams of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Struct

from agent_sdk.protocol.errors import (
    AgentServerError,
    Cancelled,
    InvalidParams,
    LimitExceeded,
    NotFound,
    OpExpired,
    OpMismatch,
    OutcomeUnknown,
    PathError,
    PolicyDenied,
)
from agent_sdk.protocol.methods.method import Effect, varying, without_defaults

KEPT = 10_000
"""Answers that are kept in any case: of the newest operations."""
KEPT_SECONDS = 24 * 3600.0
"""For how long more of them are kept."""
KEPT_AT_MOST = 100_000
KEPT_BYTES = 64 << 20
EXPIRED = 100_000
_REFUSALS = (LimitExceeded, NotFound, PathError, PolicyDenied)

T = TypeVar("T")
A = TypeVar("A")


class Asked(NamedTuple):
    """What tells a call from all others."""

    op_id: str
    digest: bytes = b""
    """Of its method and params; the same op_id with another digest is another call. Empty: whichever came with it."""
    method: str = ""
    instance: str = ""
    """Of the box it is about to be sent to."""

    def check(self, digest: bytes | None) -> None:
        """Accept it as the call with this digest that came before; None: what is known of that is its op_id alone.

        Raises:
            OpExpired: its answer is not known any more.
            OpMismatch: it is another one.
        """
        if digest is None:
            raise OpExpired(
                f"what op_id {self.op_id} answered is not kept any more, and it is not run again",
                op_id=self.op_id,
            )
        if self.digest and digest != self.digest:
            raise OpMismatch(f"op_id {self.op_id} came before with other params", op_id=self.op_id)


class Known(Struct, Generic[A], frozen=True, kw_only=True):
    """What is remembered of a call."""

    op_id: str
    method: str = ""
    instance: str = ""
    """Of the box it was sent to."""
    at: float = 0.0
    """When it began; seconds since the Unix epoch."""
    answer: A | None = None
    """None: it has begun, and nobody has said how it ended."""


class BackEnd(Protocol[A]):
    """Where calls and their answers are remembered."""

    async def begin(self, call: Asked) -> Known[A] | None:
        """Remember that a call is about to run; when it is known already return what is, and change nothing.

        Raises:
            OpMismatch: the op_id came before with other params.
            OpExpired: it came before, and its answer is not known any more.
        """
        ...

    async def finish(self, op_id: str, answer: A) -> None:
        """Remember what a begun call answered; what it answered first stays."""
        ...

    async def withdraw(self, op_id: str) -> None:
        """Forget a begun call that did nothing, so that it may come again; one that finished stays."""
        ...


class Answer(NamedTuple):
    """What a call answered in this process: a result or an error."""

    result: Any = None
    error: BaseException | None = None

    def give(self) -> Any:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result


class _Kept:
    """A call that has finished."""

    __slots__ = ("answer", "digest", "ended", "weight")

    def __init__(self, digest: bytes, answer: Answer, weight: int) -> None:
        self.digest = digest
        self.answer = answer
        self.weight = weight
        self.ended = time.monotonic()


class InMemory(BackEnd[Answer]):
    """Remembers for as long as the process lives.

    Finished calls are kept for 24 h, and the last 10 000 for longer; at most 100 000. When their
    results hold more than 64 MiB of output, the oldest lose that. What is forgotten is never run again.
    """

    def __init__(
        self,
        *,
        weigh: Callable[[Any], int] = lambda _: 0,
        strip: Callable[[Any], Any] = lambda result: result,
        kept: int = KEPT,
        seconds: float = KEPT_SECONDS,
    ) -> None:
        """Remember nothing yet.

        Args:
            weigh: the bytes of output a result holds on to.
            strip: makes a result without them.
            kept: how many finished calls are kept in any case.
            seconds: how long more of them are kept.
        """
        self._weigh = weigh
        self._strip = strip
        self._kept = kept
        self._seconds = seconds
        self._bytes = 0
        self._begun: dict[str, bytes] = {}
        self._finished: OrderedDict[str, _Kept] = OrderedDict()
        self._heavy: OrderedDict[str, _Kept] = OrderedDict()
        self._expired: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, op_id: str) -> bool:
        return op_id in self._begun or op_id in self._finished or op_id in self._expired

    async def begin(self, call: Asked) -> Known[Answer] | None:
        op_id = call.op_id
        if (kept := self._finished.get(op_id)) is not None:
            call.check(kept.digest)
            return Known(op_id=op_id, answer=kept.answer)
        if op_id in self._begun or op_id in self._expired:
            call.check(self._begun.get(op_id))
            return Known(op_id=op_id)
        self._begun[op_id] = call.digest
        return None

    async def finish(self, op_id: str, answer: Answer) -> None:
        digest = self._begun.pop(op_id, None)
        if digest is None:
            return
        weight = self._weigh(answer.result) if answer.error is None else 0
        kept = self._finished[op_id] = _Kept(digest, answer, weight)
        if weight:
            self._bytes += weight
            self._heavy[op_id] = kept
        while self._bytes > KEPT_BYTES and len(self._heavy) > 1:
            self._lighten(self._heavy.popitem(last=False)[1])
        self._expire()

    async def withdraw(self, op_id: str) -> None:
        self._begun.pop(op_id, None)

    def _lighten(self, kept: _Kept) -> None:
        kept.answer = Answer(self._strip(kept.answer.result))
        self._bytes -= kept.weight
        kept.weight = 0

    def _expire(self) -> None:
        """Forget what ended long ago, but for its op_ids."""
        while len(self._finished) > self._kept:
            op_id, oldest = next(iter(self._finished.items()))
            young = oldest.ended + self._seconds > time.monotonic()
            if young and len(self._finished) <= KEPT_AT_MOST:
                return
            del self._finished[op_id]
            if self._heavy.pop(op_id, None) is not None:
                self._bytes -= oldest.weight
            self._expired[op_id] = None
            if len(self._expired) > EXPIRED:
                self._expired.popitem(last=False)


class Caller(Protocol):
    """Who waits for an operation."""

    @property
    def abandoned(self) -> bool:
        """Whether the connection to it has ended, so that it may come back and ask again."""
        ...


class _Run:
    """A call that runs."""

    __slots__ = ("task", "waiting")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.waiting = 0


class IdempotencyStore:
    """Runs each call once in this process, and lets one that is repeated attach to the run."""

    def __init__(self, kept: InMemory) -> None:
        """Take what remembers."""
        self._kept = kept
        self._running: dict[str, _Run] = {}
        self._broken_off: Callable[[], AgentServerError] = _by_another_caller

    def __contains__(self, op_id: str) -> bool:
        return op_id in self._kept

    @property
    def under_way(self) -> tuple[str, ...]:
        """The op_ids of what runs, oldest first."""
        return tuple(self._running)

    def is_running(self, op_id: str) -> bool:
        """Whether this operation is under way."""
        return op_id in self._running

    async def settled(self, op_id: str) -> None:
        """Wait until this operation is not under way."""
        while (run := self._running.get(op_id)) is not None:
            await asyncio.wait({run.task})

    async def run(
        self, call: Effect[Any], action: Callable[[], Awaitable[T]], caller: Caller | None = None
    ) -> T:
        """Do what `run_as` does, for a call of the protocol."""
        return await self.run_as(call.op_id, type(call), asked(call), action, caller)

    async def run_as(
        self,
        op_id: str,
        method: type[Effect[Any]],
        asked: Any,
        action: Callable[[], Awaitable[T]],
        caller: Caller | None = None,
    ) -> T:
        """Run `action` for this call, or attach to its run, or return what it returned, or raise what it raised.

        Failures before any effect are not kept: the same call then runs again; nor is an OpMismatch of the
        action, which knows an earlier owner of the op_id. Cancelling the last
        one who waits cancels the action, waits for its end and forgets it; but an action whose
        callers only lost their connection goes on, so that they can come back to it.

        Args:
            op_id: names the call.
            method: what kind of call it is.
            asked: what it asks for: structs, and what Python writes as JSON, mappings of every kind among it.
            action: does what it asks for.
            caller: who waits; None: nobody that could lose a connection.

        Raises:
            OpMismatch: the op_id came before with other params.
            OpExpired: the op_id came before, too long ago.
            OutcomeUnknown: it has begun, and nobody runs it any more.
            Cancelled: another caller of the same operation cancelled it.
        """
        # SipHash under a key of this process: no two calls can be made alike, and OpenSSL need not be loaded.
        # As text that is no text of JSON, too (half a character): whether it is taken is for the action to say.
        digest = hash(json.dumps((method.method, asked), sort_keys=True, default=_plain))
        known = await self._kept.begin(Asked(op_id, digest.to_bytes(8, "big", signed=True)))
        if known is not None and known.answer is not None:
            return known.answer.give()  # type: ignore[no-any-return]
        if known is None:
            run = self._running[op_id] = _Run(asyncio.create_task(self._act(op_id, method, action)))
            run.task.add_done_callback(partial(self._over, op_id))
        elif (attached := self._running.get(op_id)) is not None:
            run = attached
        else:
            raise OutcomeUnknown(f"op_id {op_id} has begun, and nobody knows how it ended", op_id=op_id)
        await self._wait(run, caller)
        if run.task.cancelled():
            raise self._broken_off()
        result: T = run.task.result()
        return result

    async def close(self, broken_off: Callable[[], AgentServerError] | None = None) -> None:
        """Cancel what runs and wait for it.

        Args:
            broken_off: makes the error that callers of it get; None: a Cancelled.
        """
        self._broken_off = broken_off or self._broken_off
        runs = dict(self._running)
        for run in runs.values():
            run.task.cancel()
        if runs:
            await asyncio.wait({run.task for run in runs.values()})
        for op_id, run in runs.items():
            # A task that was cancelled before its first step has done nothing, and has not said so itself.
            if run.task.cancelled() and self._running.get(op_id) in (None, run):
                await self._kept.withdraw(op_id)

    async def _act(self, op_id: str, method: type[Effect[Any]], action: Callable[[], Awaitable[T]]) -> T:
        answer: Answer | None = None
        try:
            result = await action()
            answer = Answer(result)
            return result
        except Exception as exc:
            # Where it is an OpMismatch the action knew better whose op_id it is: the right call may still come.
            vain = isinstance(exc, AgentServerError) and did_nothing(method, exc)
            answer = None if vain or isinstance(exc, OpMismatch) else Answer(error=exc)
            raise
        finally:
            await (self._kept.withdraw(op_id) if answer is None else self._kept.finish(op_id, answer))

    def _over(self, op_id: str, task: asyncio.Task[Any]) -> None:
        if (run := self._running.get(op_id)) is not None and run.task is task:
            del self._running[op_id]

    async def _wait(self, run: _Run, caller: Caller | None) -> None:
        run.waiting += 1
        try:
            await asyncio.wait({run.task})
        except asyncio.CancelledError:
            if run.waiting == 1 and not (caller is not None and caller.abandoned):
                run.task.cancel()
                await asyncio.wait({run.task})
            raise
        finally:
            run.waiting -= 1


def _by_another_caller() -> Cancelled:
    return Cancelled("the operation was cancelled by another caller")


def did_nothing(method: type[Effect[Any]], error: AgentServerError) -> bool:
    """Return whether a call that failed so had no effect: it may come again under its op_id, and is run then."""
    refused = isinstance(error, InvalidParams) or (method.begins and isinstance(error, _REFUSALS))
    return error.retryable or refused


def asked(call: Effect[Any]) -> dict[str, Any]:
    """Return what a call asks for: the same whenever it is repeated, also by another version of a client.

    Its streams do not belong to that, nor the turn that its program knows of.
    """
    fields = without_defaults(call, everywhere=True)
    differing = varying(type(call)) | {"op_id", "turn"}
    return {name: value for name, value in fields.items() if name not in differing}


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else msgspec.to_builtins(value)
