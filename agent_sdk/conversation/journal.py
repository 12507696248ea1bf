"""One conversation's part of the event log, and everybody who follows it.

What is submitted is committed in the order of submission. In the moment the loop learns of a commit,
and before anybody who waited for it goes on, history and state grow and the listeners are called. So
nobody ever hears of an event that is not in the log, and nobody misses one because a waiter was
cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from agent_sdk.agent.history import History
from agent_sdk.agent.mask import Mask, MaskedStream
from agent_sdk.agent.turn_state import TurnState
from agent_sdk.conversation.delivery import Delivery
from agent_sdk.conversation.state import ConversationState
from agent_sdk.log.event_log import EventLog, Operation, Record
from agent_sdk.protocol.events import Delta, Event, decode


class Journal:
    """One conversation's part of the event log: what is appended to it, what follows from it, and who is told."""

    def __init__(self, log: EventLog, conversation: str, epoch: str, delivery: Delivery) -> None:
        self.log = log
        self.conversation = conversation
        self.epoch = epoch
        self.history = History()
        self.state = ConversationState()
        self.delivery = delivery
        self.mask = Mask()
        """Hides secrets in all that is written and published: the one place where that is done for clients."""
        self._streams: tuple[str, MaskedStream, MaskedStream] | None = None
        """The turn whose answer is streamed, its text and its thinking."""
        self._under_way: set[asyncio.Future[list[Record]]] = set()
        self._reducers: list[Callable[[Event], None]] = []

    @property
    def head_seq(self) -> int:
        """The seq of the last event."""
        return self.history.head_seq

    @property
    def turn(self) -> TurnState:
        """What the log says of turns."""
        return self.state.turn

    async def replay(self) -> None:
        """Take in what the log has already; nobody is told of it. A damaged end is cut off.

        Raises:
            ConversationDamaged: the damage is not at the end.
        """
        while page := await self.log.read(self.conversation, self.head_seq, mend=True):
            for _, body in page:
                self._grow(decode(body))
        self.epoch = await self.log.epoch(self.conversation)

    async def reduce(self, reducer: Callable[[Event], None]) -> None:
        """Call it with every event that the log has, and from then on with every new one, before anybody is told."""
        async for _, body in self.pages(0):
            reducer(decode(body))
        self._reducers.append(reducer)

    async def pages(self, after: int) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (seq, JSON) of the events after a seq, up to the head.

        The file may be ahead of the head for a moment. An event that the state does not know of yet is not
        shown to anybody, or whoever sees it and asks for the state would be told the state before it.
        """
        while after < self.head_seq:
            page = await self.log.read(self.conversation, after)
            if not page:
                return
            for seq, body in page:
                if seq > self.head_seq:
                    return
                after = seq
                yield seq, body

    def submit(
        self,
        *events: Event,
        op: Operation | None = None,
        settings: tuple[bytes, bytes | None] | None = None,
    ) -> asyncio.Future[list[Record]]:
        """Queue events; the future comes with the commit, after all who follow were told. Do not cancel it."""
        self._end_streams()
        masked = [self.mask.event(event) for event in events]
        future = self.log.submit(self.conversation, masked, op=op, settings=settings)
        self._under_way.add(future)
        future.add_done_callback(self._committed)
        return future

    async def append(self, *events: Event, op: Operation | None = None) -> None:
        """Queue events and wait for the commit; cancelling ends the waiting only.

        Raises:
            StorageFull, WorkspaceUnavailable, LeaseLost: nothing of it was written.
        """
        await asyncio.shield(self.submit(*events, op=op))

    async def mend(self) -> None:
        """Close a turn that nobody runs any more, if there is one."""
        if events := self.turn.missing_end():
            await self.append(*events)

    async def settle(self) -> None:
        """Return when nothing is queued any more; without giving way when nothing is."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def delta(self, run_id: str, text: str, thinking: str) -> None:
        """Pass on a transient piece of an answer, as far as it can be no part of a secret."""
        if self._streams is None or self._streams[0] != run_id:
            self._end_streams()
            self._streams = run_id, MaskedStream(self.mask), MaskedStream(self.mask)
        _, texts, thoughts = self._streams
        self._publish(run_id, texts.feed(text), thoughts.feed(thinking))

    def _end_streams(self) -> None:
        """Pass on what was held: the answer is written, or goes on no more."""
        if self._streams is not None:
            run_id, texts, thoughts = self._streams
            self._streams = None
            self._publish(run_id, texts.flush(), thoughts.flush())

    def _publish(self, run_id: str, text: str, thinking: str) -> None:
        if text or thinking:
            delta = Delta(run_id=run_id, after_seq=self.head_seq, text=text, thinking=thinking)
            self.delivery.publish_delta(delta)

    def _committed(self, future: asyncio.Future[list[Record]]) -> None:
        self._under_way.discard(future)
        if future.cancelled() or future.exception() is not None:
            return
        for event, body in future.result():
            self._grow(event)
            self.delivery.publish(event, body)

    def _grow(self, event: Event) -> None:
        self.history.add(event)
        self.state.add(event)
        for reducer in self._reducers:
            reducer(event)
