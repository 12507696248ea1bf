"""Calls that change something run once per op_id, however often they come."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from agent_sdk.protocol.errors import AgentServerError, Cancelled, OpMismatch
from agent_sdk.protocol.methods import Effect
from agent_sdk.rpc.pipe import DISCONNECTED

FINISHED = 10_000
FINISHED_BYTES = 64 << 20
# Names of streams differ whenever a call is repeated; they do not belong to what it asks for.
CHANNELS = frozenset({"channel", "stdin", "stdout", "stderr", "follow"})

T = TypeVar("T")


class Entry:
    """One operation: what it was asked to do, and how far it is."""

    def __init__(self, digest: int, task: asyncio.Task[Any]) -> None:
        """Make an entry for a task that has just begun."""
        self.digest = digest
        self.task = task
        self.waiting = 0
        self.weight = 0


class Ledger:
    """In memory, for as long as the process lives.

    The 10 000 operations that ended last are kept, fewer when their results hold more than 64 MiB.
    """

    def __init__(self, finished: int = FINISHED, *, weigh: Callable[[Any], int] = lambda _: 0) -> None:
        """Make an empty ledger.

        Args:
            finished: how many ended operations are kept, oldest out.
            weigh: the bytes a result holds on to.
        """
        self._limit = finished
        self._weigh = weigh
        self._bytes = 0
        self._running: dict[str, Entry] = {}
        self._finished: OrderedDict[str, Entry] = OrderedDict()

    async def run(self, call: Effect[Any], action: Callable[[], Awaitable[T]]) -> T:
        """Run `action` for this call, or attach to its run, or return what it returned, or raise what it raised.

        Failures that are retryable are not kept: the same call then runs again. Cancelling the last
        one who waits cancels the action, waits for its end and forgets it; but an action whose
        callers only lost their connection goes on, so that they can come back to it.

        Raises:
            OpMismatch: the op_id came before with other params.
            Cancelled: another caller of the same operation cancelled it.
        """
        digest = _digest(call)
        entry = self._running.get(call.op_id) or self._finished.get(call.op_id)
        if entry is None:
            entry = Entry(digest, asyncio.create_task(_run(action)))
            self._running[call.op_id] = entry
            entry.task.add_done_callback(lambda _: self._done(call.op_id))
        elif entry.digest != digest:
            raise OpMismatch(f"op_id {call.op_id} came before with other params", op_id=call.op_id)
        await self._wait(entry)
        if entry.task.cancelled():
            raise Cancelled("the operation was cancelled by another caller")
        result: T = entry.task.result()
        return result

    async def close(self) -> None:
        """Cancel what runs and wait for it."""
        tasks = {entry.task for entry in self._running.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _wait(self, entry: Entry) -> None:
        entry.waiting += 1
        try:
            await asyncio.wait({entry.task})
        except asyncio.CancelledError as exc:
            if entry.waiting == 1 and exc.args != (DISCONNECTED,):
                entry.task.cancel()
                await asyncio.wait({entry.task})
            raise
        finally:
            entry.waiting -= 1

    def _done(self, op_id: str) -> None:
        entry = self._running.pop(op_id)
        if entry.task.cancelled():
            return
        error = entry.task.exception()
        if isinstance(error, AgentServerError) and error.retryable:
            return
        entry.weight = self._weigh(entry.task.result()) if error is None else 0
        self._bytes += entry.weight
        self._finished[op_id] = entry
        while len(self._finished) > self._limit or (self._bytes > FINISHED_BYTES and len(self._finished) > 1):
            _, oldest = self._finished.popitem(last=False)
            self._bytes -= oldest.weight


async def _run(action: Callable[[], Awaitable[T]]) -> T:
    return await action()


def _digest(call: Effect[Any]) -> int:
    """A fingerprint for this process alone: SipHash under a key nobody else has, so no two params can be made alike."""
    params = {name: getattr(call, name) for name in call.__struct_fields__ if name not in CHANNELS}
    return hash(call.method.encode() + b"\0" + msgspec.json.encode(params))
