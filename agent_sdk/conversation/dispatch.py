"""Events on their way to everybody in this process who wants them: each exactly once, in the order of `seq`.

Listeners are called at once, in the moment of the commit, and must be quick: they are how a server
feeds its connections. Callbacks are the user's and may take their time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from agent_sdk.cancellation import tell
from agent_sdk.conversation.contract import Callback, OnDelta
from agent_sdk.protocol.events import Delta, Event

logger = logging.getLogger("agent_sdk")

Listener = Callable[[int, bytes], None]
"""Called with (seq, JSON)."""
DeltaListener = Callable[[Delta], None]
Unsubscribe = Callable[[], None]


class Dispatcher:
    """Callbacks are called from a task of its own, so that a slow one delays later events and nothing else.

    The task exists only while something waits to be delivered.
    """

    def __init__(self, callbacks: Sequence[Callback], on_delta: OnDelta | None) -> None:
        self._callbacks = tuple(callbacks)
        self.observers: tuple[Callback, ...] = ()
        """The agent's; like callbacks, for new events only."""
        self._on_delta = on_delta
        self._listeners: dict[object, Listener] = {}
        self._delta_listeners: dict[object, DeltaListener] = {}
        self._waiting: deque[Event | Delta] | None = None
        """Made for the first callback: most conversations of a server have none."""
        self._past: AsyncIterator[Event] | None = None
        self._task: asyncio.Task[None] | None = None
        self.seq = 0
        """Of the event that the callbacks were given last."""

    def subscribe(self, listener: Listener) -> Unsubscribe:
        """Tell `listener` of every event from now on; return how to end that."""
        key = object()
        self._listeners[key] = listener
        return lambda: _forget(self._listeners, key)

    def subscribe_deltas(self, listener: DeltaListener) -> Unsubscribe:
        """Tell `listener` of every transient piece from now on; return how to end that."""
        key = object()
        self._delta_listeners[key] = listener
        return lambda: _forget(self._delta_listeners, key)

    def begin_with(self, past: AsyncIterator[Event]) -> None:
        """Give the callbacks these events before all that is published from now on."""
        if self._callbacks:
            self._past = past
            self._wake()

    def publish(self, event: Event, body: bytes) -> None:
        """Tell everybody of an event that is in the log now."""
        for listener in list(self._listeners.values()):
            try:
                listener(event.seq, body)
            except Exception:  # one broken listener must not take events from the others
                logger.exception("a listener failed")
        if self._callbacks or self.observers:
            self._enqueue(event)

    def publish_delta(self, delta: Delta) -> None:
        """Tell everybody of a transient piece; callbacks get it in order with the events."""
        for listener in list(self._delta_listeners.values()):
            try:
                listener(delta)
            except Exception:  # nor the answer from the turn
                logger.exception("a listener failed")
        if self._on_delta is not None:
            self._enqueue(delta)

    @property
    def delivering(self) -> bool:
        """Whether it is a callback that asks."""
        return self._task is not None and self._task is asyncio.current_task()

    async def drained(self) -> None:
        """Return when the callbacks have seen everything; at once when a callback itself asks."""
        while self._task is not None and not self.delivering:
            await asyncio.wait({self._task})

    def _enqueue(self, item: Event | Delta) -> None:
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(item)
        self._wake()

    def _wake(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._deliver())

    async def _deliver(self) -> None:
        try:
            if self._past is not None:
                async for event in self._past:
                    await self._tell_all(event, self._callbacks)
                self._past = None
            while self._waiting:
                item = self._waiting.popleft()
                if not isinstance(item, Delta):
                    await self._tell_all(item, (*self._callbacks, *self.observers))
                elif self._on_delta is not None:
                    await tell(self._on_delta, item)
        except Exception:  # the past could not be read; later events would come out of order
            logger.exception("the events before cannot be delivered")
            self._callbacks = ()
        finally:
            self._task = None

    async def _tell_all(self, event: Event, callbacks: tuple[Callback, ...]) -> None:
        self.seq = event.seq
        for callback in callbacks:
            await tell(callback, event)


def _forget(listeners: dict[object, Listener] | dict[object, DeltaListener], key: object) -> None:
    listeners.pop(key, None)
