"""Calls that change something run once per op_id, however often they come."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from agent_sdk.protocol.errors import OpMismatch
from agent_sdk.protocol.methods import Effect, R

FINISHED = 10_000


class Entry:
    """One operation: what it was asked to do, and how far it is."""

    def __init__(self, digest: bytes, task: asyncio.Task[Any]) -> None:
        """Make an entry for a task that has just begun."""
        self.digest = digest
        self.task = task
        self.waiting = 0


class Ledger:
    """In memory, for as long as the process lives; the 10 000 operations that ended last are kept."""

    def __init__(self, finished: int = FINISHED) -> None:
        """Make an empty ledger; `finished`: how many ended operations are kept, oldest out."""
        self._limit = finished
        self._running: dict[str, Entry] = {}
        self._finished: OrderedDict[str, Entry] = OrderedDict()

    async def run(self, call: Effect[R], action: Callable[[], Awaitable[R]]) -> R:
        """Run `action` for this call, or attach to its run, or return what it returned, or raise what it raised.

        Cancelling the last one who waits cancels the action and waits for its end; an operation that
        was cancelled is not kept, so the same op_id may run again.

        Raises:
            OpMismatch: the op_id came before with other params.
        """
        digest = _digest(call)
        entry = self._running.get(call.op_id) or self._finished.get(call.op_id)
        if entry is None:
            entry = Entry(digest, asyncio.create_task(_run(action)))
            self._running[call.op_id] = entry
            entry.task.add_done_callback(lambda _: self._done(call.op_id))
        elif entry.digest != digest:
            raise OpMismatch(f"op_id {call.op_id} came before with other params", op_id=call.op_id)
        result: R = await self._wait(entry)
        return result

    async def _wait(self, entry: Entry) -> Any:
        entry.waiting += 1
        try:
            return await asyncio.shield(entry.task)
        except asyncio.CancelledError:
            if entry.waiting == 1 and not entry.task.done():
                entry.task.cancel()
                await asyncio.wait({entry.task})
            raise
        finally:
            entry.waiting -= 1

    def _done(self, op_id: str) -> None:
        entry = self._running.pop(op_id)
        if entry.task.cancelled():
            return
        entry.task.exception()  # seen
        self._finished[op_id] = entry
        while len(self._finished) > self._limit:
            self._finished.popitem(last=False)


async def _run(action: Callable[[], Awaitable[R]]) -> R:
    return await action()


def _digest(call: Effect[Any]) -> bytes:
    return hashlib.blake2b(call.method.encode() + b"\0" + msgspec.json.encode(call), digest_size=16).digest()
