"""Events on their way to the callbacks of this process: each exactly once, in the order of `seq`."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Sequence

from agent_sdk.conversation import Callback, OnDelta
from agent_sdk.protocol.events import Delta, Event

logger = logging.getLogger("agent_sdk")


class Delivery:
    """Calls the callbacks from a task of its own, so that a slow one delays later events and nothing else.

    The task exists only while something waits to be delivered.
    """

    def __init__(self, callbacks: Sequence[Callback], on_delta: OnDelta | None) -> None:
        self._callbacks = tuple(callbacks)
        self._on_delta = on_delta
        self._waiting: deque[Event | Delta] = deque()
        self._task: asyncio.Task[None] | None = None

    def put(self, event: Event) -> None:
        """Deliver an event after those before it."""
        if self._callbacks:
            self._enqueue(event)

    def put_delta(self, delta: Delta) -> None:
        """Deliver a transient piece, in order with the events."""
        if self._on_delta is not None:
            self._enqueue(delta)

    @property
    def delivering(self) -> bool:
        """Whether it is a callback that asks."""
        return self._task is not None and self._task is asyncio.current_task()

    async def drained(self) -> None:
        """Return when everything has been delivered; at once when a callback itself asks."""
        while self._task is not None and not self.delivering:
            await asyncio.wait({self._task})

    def _enqueue(self, item: Event | Delta) -> None:
        self._waiting.append(item)
        if self._task is None:
            self._task = asyncio.create_task(self._deliver())

    async def _deliver(self) -> None:
        try:
            while self._waiting:
                item = self._waiting.popleft()
                if isinstance(item, Delta):
                    if self._on_delta is not None:
                        await _tell(self._on_delta, item)
                else:
                    for callback in self._callbacks:
                        await _tell(callback, item)
        finally:
            self._task = None


async def _tell(callback: Callback | OnDelta, item: Event | Delta) -> None:
    try:
        waiting = callback(item)  # type: ignore[arg-type]
        if inspect.isawaitable(waiting):
            await waiting
    except Exception:  # a callback is the user's; its error must not stop the events
        logger.exception("a callback failed")
