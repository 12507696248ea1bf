"""Events on their way to callbacks: each exactly once, in the order of `seq`, none skipped."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import OrderedDict
from collections.abc import Sequence

from msgspec import Raw

from agent_sdk.conversation import Callback, Cursor, OnDelta, Outcome, outcome_of
from agent_sdk.protocol import events as event_types
from agent_sdk.protocol.errors import AgentServerError, ConnectionLost, TransferBroken
from agent_sdk.protocol.events import Delta, Event, TurnEnded
from agent_sdk.rpc.peer import Peer

logger = logging.getLogger("agent_sdk")

OUTCOMES_KEPT = 256


class Delivery:
    """The client's end of one conversation's stream of events.

    One task hands events over; a slow callback delays later ones and nothing else. The first error
    that ends the stream (connection lost, history gone, a gap) is raised to everybody who waits.
    """

    def __init__(self, callbacks: Sequence[Callback], on_delta: OnDelta | None) -> None:
        self._callbacks = callbacks
        self._on_delta = on_delta
        self._queue: asyncio.Queue[Event | Delta] = asyncio.Queue()
        self._moved = asyncio.Event()
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []
        self._error: AgentServerError | None = None
        self._taken = 0
        self.since = 0
        self.seq = 0
        self.closed = False
        self.epoch = ""
        self._given = 0

    @property
    def cursor(self) -> Cursor:
        """Of the event that the callbacks were given last."""
        return Cursor(self.epoch, self._given)

    def start(self, *, since: int) -> None:
        """Begin after this seq."""
        self.since = self.seq = self._taken = self._given = since
        self._tasks.append(asyncio.create_task(self._deliver()))

    def follow(self, peer: Peer) -> None:
        """Learn when this connection ends."""
        self._tasks.append(asyncio.create_task(self._watch(peer)))

    def take(self, raws: Sequence[Raw]) -> None:
        """Accept events as they arrive; known ones are dropped, a gap ends the stream."""
        for raw in raws:
            event = event_types.decode(raw)
            if event.seq <= self._taken:
                continue
            if event.seq != self._taken + 1:
                self._fail(TransferBroken(f"event {event.seq} came after event {self._taken}"))
                return
            self._taken = event.seq
            self._queue.put_nowait(event)

    def take_delta(self, delta: Delta) -> None:
        """Accept a transient piece."""
        if self._on_delta is not None:
            self._queue.put_nowait(delta)

    def reset(self, reason: str) -> None:
        """The history is gone: the stream cannot go on as if nothing had happened."""
        self._fail(TransferBroken(f"the server's history was reset: {reason}; open the conversation again"))

    async def outcome(self, run_id: str) -> Outcome:
        """Wait until the callbacks have seen the end of this turn."""
        while run_id not in self._outcomes:
            await self._wait()
        return self._outcomes[run_id]

    async def wait_beyond(self, seq: int) -> bool:
        """Wait for an event after `seq`; False when there will be none because the conversation was closed."""
        while self.seq <= seq:
            if self.closed:
                return False
            await self._wait()
        return True

    async def close(self) -> None:
        """Stop the delivery; what was not handed over yet is dropped here and stays in the log."""
        self.closed = True
        me = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not me]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._wake()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        if self.closed:
            raise ConnectionLost("the conversation was closed meanwhile")
        await self._moved.wait()

    def _wake(self) -> None:
        # Whoever waits has the old event object; the next wait gets a fresh one.
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _fail(self, error: AgentServerError) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    async def _watch(self, peer: Peer) -> None:
        lost = await peer.wait_closed()
        await self._queue.join()
        self._fail(lost)

    async def _deliver(self) -> None:
        while True:
            item = await self._queue.get()
            if isinstance(item, Delta):
                if self._on_delta is not None:
                    await _tell(self._on_delta, item)
            else:
                self._given = item.seq
                for callback in self._callbacks:
                    await _tell(callback, item)
                self._delivered(item)
            self._queue.task_done()

    def _delivered(self, event: Event) -> None:
        self.seq = event.seq
        if isinstance(event, TurnEnded):
            self._outcomes[event.run_id] = outcome_of(event)
            if len(self._outcomes) > OUTCOMES_KEPT:
                self._outcomes.popitem(last=False)
        self._wake()


async def _tell(callback: Callback | OnDelta, item: Event | Delta) -> None:
    try:
        waiting = callback(item)  # type: ignore[arg-type]
        if inspect.isawaitable(waiting):
            await waiting
    except Exception:  # a callback is the user's; its error must not stop the events
        logger.exception("a callback failed")
