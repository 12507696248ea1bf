"""Calls that change something run once per op_id, however often they come.

Here is what all have in common who see to that: what makes two calls the same, which failures count as
no run at all, and for how long an answer is known. An `IdempotencyStore` remembers for as long as its
process lives, and lets a repeated call attach to the one that runs: in front of a workspace, and in front
of a conversation. What has to be known by the next process is in the log (`agent_sdk.log.operations`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from agent_sdk.protocol.errors import (
    AgentServerError,
    Cancelled,
    InvalidParams,
    LimitExceeded,
    NotFound,
    OpExpired,
    OpMismatch,
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


class Caller(Protocol):
    """Who waits for an operation."""

    @property
    def abandoned(self) -> bool:
        """Whether the connection to it has ended, so that it may come back and ask again."""
        ...


class Entry:
    """One operation: what it was asked to do, and how far it is."""

    __slots__ = ("digest", "ended", "error", "result", "task", "waiting", "weight")

    def __init__(self, digest: int, task: asyncio.Task[Any]) -> None:
        """Make an entry for a task that has just begun."""
        self.digest = digest
        """Of what it asks for: SipHash under a key of this process, so that no two calls can be made alike."""
        self.task: asyncio.Task[Any] | None = task
        """While it runs."""
        self.waiting = 0
        self.result: Any = None
        self.error: BaseException | None = None
        self.weight = 0
        self.ended = 0.0


class IdempotencyStore:
    """Remembers in memory, for as long as the process lives.

    Ended operations are kept for 24 h, and the last 10 000 for longer; at most 100 000. When their
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
        """Make an empty store.

        Args:
            weigh: the bytes of output a result holds on to.
            strip: makes a result without them.
            kept: how many ended operations are kept in any case.
            seconds: how long more of them are kept.
        """
        self._weigh = weigh
        self._strip = strip
        self._kept = kept
        self._seconds = seconds
        self._bytes = 0
        self._running: dict[str, Entry] = {}
        self._finished: OrderedDict[str, Entry] = OrderedDict()
        self._heavy: OrderedDict[str, Entry] = OrderedDict()
        self._expired: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, op_id: str) -> bool:
        return op_id in self._running or op_id in self._finished or op_id in self._expired

    @property
    def under_way(self) -> tuple[str, ...]:
        """The op_ids of what runs, oldest first."""
        return tuple(self._running)

    def is_running(self, op_id: str) -> bool:
        """Whether this operation is under way."""
        return op_id in self._running

    async def settled(self, op_id: str) -> None:
        """Wait until this operation is not under way."""
        while (entry := self._running.get(op_id)) is not None and entry.task is not None:
            await asyncio.wait({entry.task})

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
            Cancelled: another caller of the same operation cancelled it.
        """
        if op_id in self._expired:
            raise OpExpired(
                f"what op_id {op_id} answered is not kept any more, and it is not run again", op_id=op_id
            )
        # As text that is no text of JSON, too (half a character): whether it is taken is for the action to say.
        digest = hash(json.dumps((method.method, asked), sort_keys=True, default=_plain))
        entry = self._running.get(op_id) or self._finished.get(op_id)
        if entry is None:
            task = asyncio.create_task(_run(action))
            entry = self._running[op_id] = Entry(digest, task)
            task.add_done_callback(lambda task: self._done(op_id, method, task))
        elif entry.digest != digest:
            raise OpMismatch(f"op_id {op_id} came before with other params", op_id=op_id)
        if (running := entry.task) is not None:
            await self._wait(entry, running, caller)
            if running.cancelled():
                raise Cancelled("the operation was cancelled by another caller")
            result: T = running.result()
            return result
        if entry.error is not None:
            raise entry.error
        return entry.result  # type: ignore[no-any-return]

    async def close(self) -> None:
        """Cancel what runs and wait for it."""
        tasks = {entry.task for entry in self._running.values() if entry.task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _wait(self, entry: Entry, task: asyncio.Task[Any], caller: Caller | None) -> None:
        entry.waiting += 1
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if entry.waiting == 1 and not (caller is not None and caller.abandoned):
                task.cancel()
                await asyncio.wait({task})
            raise
        finally:
            entry.waiting -= 1

    def _done(self, op_id: str, method: type[Effect[Any]], task: asyncio.Task[Any]) -> None:
        entry = self._running.pop(op_id)
        if task.cancelled():
            return
        entry.error = task.exception()
        if isinstance(entry.error, AgentServerError) and did_nothing(method, entry.error):
            return
        if isinstance(entry.error, OpMismatch):
            return  # the action knew better whose op_id it is: the right call may still come
        entry.task, entry.ended = None, time.monotonic()
        if entry.error is None:
            entry.result = task.result()
            entry.weight = self._weigh(entry.result)
        self._finished[op_id] = entry
        if entry.weight:
            self._bytes += entry.weight
            self._heavy[op_id] = entry
        while self._bytes > KEPT_BYTES and len(self._heavy) > 1:
            self._lighten(self._heavy.popitem(last=False)[1])
        self._expire()

    def _lighten(self, entry: Entry) -> None:
        entry.result = self._strip(entry.result)
        self._bytes -= entry.weight
        entry.weight = 0

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


async def _run(action: Callable[[], Awaitable[T]]) -> T:
    return await action()
