"""Calls that carry an op_id: each is carried out once, however often it comes while its workspace is open."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from agent_sdk.ids import checked_op_id, digest_of
from agent_sdk.protocol.errors import AgentServerError, OpMismatch

KEPT = 1000
"""Results of ended calls."""

T = TypeVar("T")


class _Call:
    def __init__(self, digest: bytes, task: asyncio.Task[Any]) -> None:
        self.digest = digest
        self.task = task
        self.waiting = 0

    @property
    def counts(self) -> bool:
        """Whether it runs, or has an answer that stays the same when it is asked for again."""
        if not self.task.done():
            return True
        error = None if self.task.cancelled() else self.task.exception()
        return not (self.task.cancelled() or (isinstance(error, AgentServerError) and error.retryable))


class Repeats:
    """The calls of a workspace that carry an op_id, while it is open. Close it."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}

    async def run(self, op_id: str, call: tuple[Any, ...], action: Callable[[], Awaitable[T]]) -> T:
        """Carry it out, or attach to it, or return what it returned. Cancelling the last who waits cancels it.

        Raises:
            InvalidParams: the op_id is no UUID.
            OpMismatch: it was used for another call.
        """
        checked_op_id(op_id)
        digest = digest_of(*call)
        known = self._calls.get(op_id)
        if known is None or not known.counts:
            known = self._calls[op_id] = _Call(digest, asyncio.create_task(_run(action)))
            self._forget()
        if known.digest != digest:
            raise OpMismatch(f"op_id {op_id} came before with other arguments", op_id=op_id)
        known.waiting += 1
        try:
            await asyncio.wait({known.task})
        except asyncio.CancelledError:
            if known.waiting == 1:
                known.task.cancel()
                await asyncio.wait({known.task})
            raise
        finally:
            known.waiting -= 1
        result: T = known.task.result()
        return result

    async def close(self) -> None:
        """Cancel what runs and wait for it."""
        tasks = {call.task for call in self._calls.values() if not call.task.done()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _forget(self) -> None:
        ended = [op_id for op_id, call in self._calls.items() if call.task.done()]
        for op_id in ended[: max(0, len(self._calls) - KEPT)]:
            del self._calls[op_id]


async def _run(action: Callable[[], Awaitable[T]]) -> T:
    return await action()
