"""What waits to be sent on one connection, in three lanes, and who goes next.

control  answers, calls, notices, credit, and the end of a stream none of whose bytes wait: always first
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
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from agent_sdk.protocol import frame as frames
from agent_sdk.protocol.codec import EVENTS, MESSAGES
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.pipe import wake

BATCH_BYTES = 64 << 10
WHOLE_BYTES = 256 << 10
"""Longer messages travel in pieces, so that others can overtake them."""
CONTROL_FRAMES = 4096

Left = Callable[[], object]
T = TypeVar("T")


class Line(Generic[T]):
    """A queue that costs next to nothing while it is empty, as most are: an empty deque has 760 bytes.

    Attributes:
        items: what is in it; None: nothing. To look at it is cheaper than to ask for the length.
    """

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: deque[T] | None = None

    def __len__(self) -> int:
        return 0 if self.items is None else len(self.items)

    @property
    def first(self) -> T:
        """Who goes next; there must be somebody."""
        assert self.items is not None
        return self.items[0]

    def append(self, item: T) -> None:
        """Come last."""
        if self.items is None:
            self.items = deque()
        self.items.append(item)

    def popleft(self) -> T:
        """Take the first; there must be one."""
        assert self.items is not None
        item = self.items.popleft()
        if not self.items:
            self.items = None
        return item


class Frame(NamedTuple):
    """Something a pipe can send."""

    data: bytes
    text: bool


class Source(Protocol):
    """A source of bulk frames."""

    in_turn: bool
    """Whether it waits in the bulk lane; the lanes' business."""
    waiting: Line[Any]
    """What it still has to send."""

    def next_frame(self) -> Frame:
        """The next frame of what is waiting, which is then on its way."""
        ...


class LongMessages(Source):
    """Messages that travel in pieces, one after the other, and short ones that must not overtake them."""

    def __init__(self, stream: int) -> None:
        self.in_turn = False
        self.whole_bytes = WHOLE_BYTES
        self.piece_bytes = frames.PAYLOAD_BYTES
        self._stream = stream
        self.waiting: Line[tuple[bytes, Left | None]] = Line()
        self._position = 0

    def put(self, message: bytes, left: Left | None = None) -> None:
        """Queue a message; `left` is called when its last frame goes."""
        self.waiting.append((message, left))

    def next_frame(self) -> Frame:
        message, left = self.waiting.first
        start, end = self._position, self._position + self.piece_bytes
        whole = start == 0 and len(message) <= self.whole_bytes
        last = whole or end >= len(message)
        self._position = 0 if last else end
        if last:
            self.waiting.popleft()
            if left is not None:
                left()
        if whole:
            return Frame(message, True)
        return Frame(frames.piece(self._stream, start, memoryview(message)[start:end], last=last), False)


class Lanes:
    """What waits to be sent on one connection, in three lanes."""

    def __init__(
        self, budget: int, on_work: Callable[[], object], send_now: Callable[[bytes, bool], bool]
    ) -> None:
        """Make empty lanes.

        Args:
            budget: bytes of events that may wait.
            on_work: called when there may be something to send; it must not call back.
            send_now: called with a frame, and whether it is text, that goes before all that waits: sends it and
                returns True if nothing has to be waited for.
        """
        self.closing = False
        """Whether only the control lane is still served."""
        self.payload_bytes = frames.PAYLOAD_BYTES
        """The longest payload the other end accepts."""
        self.frames_left = 0
        """How many frames have gone: whether a reader reads at all."""
        self.control_is_full = False
        """Whether the other end does not read what it asked for."""
        self._budget = budget
        self._on_work = on_work
        self._send_now = send_now
        self._control: deque[tuple[bytes, bool, Left | None]] | None = None  # a Line, without its calls
        self._events: Line[tuple[str | None, bytes]] = Line()
        self._waiting_bytes = 0
        self._long_events = LongMessages(EVENTS)
        self._long_messages = LongMessages(MESSAGES)
        self._bulk: Line[Source] = Line()
        self._room: asyncio.Future[None] | None = None
        self._flushed: asyncio.Future[None] | None = None

    @property
    def sends_long_event(self) -> bool:
        """Whether an event is on its way in pieces."""
        return self._long_events.waiting.items is not None

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
            self._put_control(message, True, left)
        return long

    def put_control(self, frame: bytes) -> None:
        """Queue a binary frame in the control lane."""
        self._put_control(frame, False, None)

    def put_event(self, event: bytes, epoch: str) -> bool:
        """Queue an event; False when it does not fit into what is left of the budget.

        One that is longer than the budget fits when nothing else waits, or it could never be sent.
        """
        if self._waiting_bytes and not self._fits(len(event)):
            return False
        self._events.append((epoch, event))
        self._waiting_bytes += len(event)
        self._on_work()
        return True

    def put_delta(self, message: bytes) -> bool:
        """Queue a whole `delta` notification behind the events; False and dropped when half the budget is used."""
        if self._waiting_bytes >= self._budget // 2:
            return False
        self._events.append((None, message))
        self._waiting_bytes += len(message)
        self._on_work()
        return True

    def put_bulk(self, source: Source) -> None:
        """Let this source have its turns until it has no frames."""
        if not source.in_turn:
            source.in_turn = True
            self._bulk.append(source)
        self._on_work()

    def next_frame(self) -> Frame | None:
        """Who goes next; None: nobody."""
        if self._control is not None:
            data, text, left = self._control.popleft()
            if not self._control:
                self._control = None
            if left is not None:
                left()
            frame: Frame | None = Frame(data, text)
        elif self.closing:
            wake(self._flushed)
            return None
        elif self._long_events.waiting.items is not None:
            frame = self._long_events.next_frame()
        elif self._events.items is not None:
            frame = self._next_events()
        elif self._bulk.items is not None:
            frame = self._next_bulk()
        else:
            return None
        self.frames_left += frame is not None
        return frame

    async def room(self, size: int = 0) -> bool:
        """Wait until the events lane is below half of its budget, and an event of `size` bytes fits.

        Returns False when nothing more leaves the lane.
        """
        while not self.closing and not (self._is_low() and self._fits(size)):
            if self._room is None or self._room.done():
                self._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)
        return not self.closing

    async def flushed(self) -> None:
        """From now on serve the control lane only; wait until it is empty."""
        self.closing = True
        self._flushed = asyncio.get_running_loop().create_future()
        self.wake_all()
        await self._flushed

    def wake_all(self) -> None:
        """Let everybody who waits look again."""
        self._on_work()
        wake(self._room)

    def _put_control(self, data: bytes, text: bool, left: Left | None) -> None:
        if self._control is None:
            if self._send_now(data, text):
                self.frames_left += 1
                if left is not None:
                    left()
                return
            self._control = deque()
        self._control.append((data, text, left))
        self.control_is_full = len(self._control) >= CONTROL_FRAMES
        self._on_work()

    def _is_low(self) -> bool:
        return self._waiting_bytes < self._budget // 2

    def _fits(self, size: int) -> bool:
        return not self._waiting_bytes or self._waiting_bytes + size <= self._budget

    def _free(self, size: int) -> None:
        self._waiting_bytes -= size
        if self._room is not None and self._is_low():
            wake(self._room)

    def _next_events(self) -> Frame:
        epoch, first = self._events.popleft()
        batch, size = [first], len(first)
        freed = len(first)
        while epoch is not None and self._events.items is not None:
            other, event = self._events.first
            size += len(event) + 1
            if other != epoch or size > BATCH_BYTES:
                break
            batch.append(event)
            freed += len(event)
            self._events.popleft()
        message = first if epoch is None else events_message(epoch, batch)
        if len(message) <= self._long_events.whole_bytes:
            self._free(freed)
            return Frame(message, True)
        self._long_events.put(message, partial(self._free, freed))
        return self._long_events.next_frame()

    def _next_bulk(self) -> Frame | None:
        while self._bulk.items is not None:
            source = self._bulk.popleft()
            if source.waiting.items is None:
                source.in_turn = False
                continue
            frame = source.next_frame()
            if source.waiting.items:
                self._bulk.append(source)
            else:
                source.in_turn = False
            return frame
        return None


def events_message(epoch: str, events: list[bytes]) -> bytes:
    """An `events` notification around events that are JSON already."""
    head = b'{"jsonrpc":"2.0","method":"events","params":{"epoch":%b,"events":[' % msgspec.json.encode(epoch)
    return b"".join((head, b",".join(events), b"]}}"))
