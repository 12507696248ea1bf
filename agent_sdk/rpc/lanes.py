"""What waits to be sent on one connection, in three lanes, and who goes next.

control  answers, calls, notices, credit: always first
events   durable events and deltas, in order; what has queued up shares a frame
bulk     byte streams and long messages, one frame each in turn

Putting something in never waits: whoever has news must not be slowed down by whoever reads them. So
every lane is bounded by what may be put in: calls by their number, events by a budget, streams by
their credit and by the frames each may have here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from agent_sdk.protocol import frame as frames
from agent_sdk.protocol.endpoint import EVENTS, MESSAGES
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.pipe import wake

BATCH_BYTES = 64 << 10
WHOLE_BYTES = 256 << 10
"""Longer messages travel in pieces, so that others can overtake them."""
CONTROL_FRAMES = 4096

Left = Callable[[], object]


class Frame(NamedTuple):
    """Something a pipe can send."""

    data: bytes
    text: bool


class Source(Protocol):
    """Somebody with bulk frames."""

    def has_frames(self) -> bool:
        """Whether `next_frame` may be called."""
        ...

    def next_frame(self) -> Frame:
        """The next frame, which is then on its way."""
        ...


class LongMessages:
    """Messages that travel in pieces, one after the other, and short ones that must not overtake them."""

    def __init__(self, stream: int) -> None:
        self.whole_bytes = WHOLE_BYTES
        self.piece_bytes = frames.PAYLOAD_BYTES
        self._stream = stream
        self._messages: deque[tuple[bytes, Left | None]] = deque()
        self._position = 0

    def has_frames(self) -> bool:
        """See Source."""
        return bool(self._messages)

    def put(self, message: bytes, left: Left | None = None) -> None:
        """Queue a message; `left` is called when its last frame goes."""
        self._messages.append((message, left))

    def next_frame(self) -> Frame:
        """See Source."""
        message, left = self._messages[0]
        start, end = self._position, self._position + self.piece_bytes
        whole = start == 0 and len(message) <= self.whole_bytes
        last = whole or end >= len(message)
        self._position = 0 if last else end
        if last:
            self._messages.popleft()
            if left is not None:
                left()
        if whole:
            return Frame(message, True)
        return Frame(frames.piece(self._stream, start, memoryview(message)[start:end], last=last), False)


class Lanes:
    """See the module's docstring."""

    def __init__(self, budget: int) -> None:
        """Make empty lanes; `budget`: bytes of events that may wait."""
        self.closing = False
        """Whether only the control lane is still served."""
        self.payload_bytes = frames.PAYLOAD_BYTES
        """The longest payload the other end accepts."""
        self._budget = budget
        self._control: deque[tuple[bytes, bool, Left | None]] = deque()
        self._events: deque[tuple[str | None, bytes]] = deque()
        self._waiting_bytes = 0
        self._long_events = LongMessages(EVENTS)
        self._long_messages = LongMessages(MESSAGES)
        self._bulk: deque[Source] = deque()
        self._in_turn: set[Source] = set()
        self._work: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._flushed: asyncio.Future[None] | None = None

    @property
    def control_is_full(self) -> bool:
        """Whether the other end does not read what it asked for."""
        return len(self._control) >= CONTROL_FRAMES

    def use(self, limits: Limits) -> None:
        """From now on these are the limits of the other end."""
        self.payload_bytes = min(frames.PAYLOAD_BYTES, limits.payload_bytes)
        for messages in (self._long_events, self._long_messages):
            messages.whole_bytes = min(WHOLE_BYTES, limits.frame_bytes)
            messages.piece_bytes = self.payload_bytes

    def put_message(self, message: bytes, left: Left | None = None, *, after_long: bool = False) -> bool:
        """Queue a call, an answer or a notice; returns whether it went behind the long messages.

        Args:
            message: JSON. A long one travels in pieces in the bulk lane.
            left: called when the message, or its last piece, goes.
            after_long: go behind the long messages in any case.
        """
        long = after_long or len(message) > self._long_messages.whole_bytes
        if long:
            self._long_messages.put(message, left)
            self.put_bulk(self._long_messages)
        else:
            self._control.append((message, True, left))
            wake(self._work)
        return long

    def put_control(self, frame: bytes) -> None:
        """Queue a binary frame in the control lane."""
        self._control.append((frame, False, None))
        wake(self._work)

    def put_event(self, event: bytes, epoch: str) -> bool:
        """Queue an event; False when the budget is used up.

        An event that is longer than half the budget counts as half of it, or it could never be sent.
        """
        if self._waiting_bytes >= self._budget:
            return False
        self._events.append((epoch, event))
        self._waiting_bytes += self._cost(event)
        wake(self._work)
        return True

    def put_delta(self, message: bytes) -> bool:
        """Queue a whole `delta` notification behind the events; False and dropped when half the budget is used."""
        if self._waiting_bytes >= self._budget // 2:
            return False
        self._events.append((None, message))
        self._waiting_bytes += self._cost(message)
        wake(self._work)
        return True

    def put_bulk(self, source: Source) -> None:
        """Let this source have its turns until it has no frames."""
        if source not in self._in_turn:
            self._in_turn.add(source)
            self._bulk.append(source)
        wake(self._work)

    def next_frame(self) -> Frame | None:
        """Who goes next; None: nobody."""
        if self._control:
            data, text, left = self._control.popleft()
            if left is not None:
                left()
            return Frame(data, text)
        if self.closing:
            wake(self._flushed)
            return None
        if self._long_events.has_frames():
            return self._long_events.next_frame()
        if self._events:
            return self._next_events()
        return self._next_bulk()

    async def work(self) -> None:
        """Wait until there may be something to send."""
        self._work = asyncio.get_running_loop().create_future()
        await self._work

    async def room(self) -> None:
        """Wait until the events lane is below half of its budget."""
        while self._waiting_bytes >= self._budget // 2 and not self.closing:
            if self._room is None or self._room.done():
                self._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)

    async def flushed(self) -> None:
        """From now on serve the control lane only; wait until it is empty."""
        self.closing = True
        self._flushed = asyncio.get_running_loop().create_future()
        self.wake_all()
        await self._flushed

    def wake_all(self) -> None:
        """Let everybody who waits look again."""
        wake(self._work)
        wake(self._room)

    def _cost(self, event: bytes) -> int:
        return min(len(event), self._budget // 2)

    def _next_events(self) -> Frame:
        epoch, first = self._events.popleft()
        batch, size = [first], len(first)
        freed = self._cost(first)
        while epoch is not None and self._events:
            other, event = self._events[0]
            size += len(event) + 1
            if other != epoch or size > BATCH_BYTES:
                break
            batch.append(event)
            freed += self._cost(event)
            self._events.popleft()
        self._waiting_bytes -= freed
        if self._waiting_bytes < self._budget // 2:
            wake(self._room)
        return self._whole_or_piece(first if epoch is None else events_message(epoch, batch))

    def _whole_or_piece(self, message: bytes) -> Frame:
        if len(message) <= self._long_events.whole_bytes:
            return Frame(message, True)
        self._long_events.put(message)
        return self._long_events.next_frame()

    def _next_bulk(self) -> Frame | None:
        while self._bulk:
            source = self._bulk.popleft()
            if not source.has_frames():
                self._in_turn.discard(source)
                continue
            frame = source.next_frame()
            if source.has_frames():
                self._bulk.append(source)
            else:
                self._in_turn.discard(source)
            return frame
        return None


def events_message(epoch: str, events: list[bytes]) -> bytes:
    """An `events` notification around events that are JSON already."""
    head = b'{"jsonrpc":"2.0","method":"events","params":{"epoch":%b,"events":[' % msgspec.json.encode(epoch)
    return b"".join((head, b",".join(events), b"]}}"))
