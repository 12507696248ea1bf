"""Byte streams under credit: one end writes, the other reads; memory is bounded by one window.

A stream is opened by the caller, who puts its number into the params of a call; the handler takes it up by that number.
What is written to it waits until the call is on its way: any number of calls may wait for their turn. Frames may still
overtake the handler's start, so what arrives for a stream of the other end that nobody has taken up yet is kept, within
bounds. Frames of a stream that is over may be on their way for a while: they are dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self, TypeVar

from agent_sdk.protocol import frame as frames
from agent_sdk.protocol.errors import (
    AgentServerError,
    BadBinaryHeader,
    ConnectionLost,
    InvalidParams,
    LimitExceeded,
    TransferBroken,
)
from agent_sdk.protocol.frame import ReceiveWindow, SendWindow
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.lanes import Frame, Lanes, Line, Source
from agent_sdk.rpc.pipe import wake

QUEUED_FRAMES = 4
PENDING_STREAMS = 64
PENDING_WINDOWS = 8
REMEMBERED = 4096
UNKNOWN_FRAMES = 10_000
FIRST_BYTES = 4 << 10
"""The first frame of a stream; each one may be twice as long as the one before it, so that something arrives also
over a connection that is thin and does not live long."""
CREDIT_SECONDS = 0.25
"""After so long a reader tells how far it is, however little that is: a sign of life on a thin line."""


class Chunk(NamedTuple):
    """Some bytes and where they belong."""

    offset: int
    data: bytes


class ByteReader:
    """The receiving end: an async iterator of chunks in order. One task at a time.

    Offsets grow; a gap means that the sender left bytes out. Reading is what gives the sender new
    credit, so a reader that does not read stops the sender and nobody else.

    Attributes:
        channel: the stream's number, for the params of a call.
        trailer: what the end frame carried, e.g. a SHA-256; empty before the end.
    """

    def __init__(self, channel: int, table: StreamTable) -> None:
        """Streams are made by `Peer.open_reader` and `Inbound.reading`."""
        self.channel = channel
        self.trailer = b""
        self.window = ReceiveWindow(table.window)
        self._table = table
        self._chunks: deque[Chunk] = deque()
        self._error: AgentServerError | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._on_data: Callable[[], object] | None = None
        self._take: Callable[[Chunk], object] | None = None
        self._told = time.monotonic()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self.over:
            self._table.lanes.put_control(frames.reset(self.channel, "the reader stopped"))
        self._table.end(self.channel, self.window.expected)

    @property
    def size(self) -> int:
        """The position behind the last byte that arrived; after the end, the size of it all."""
        return self.window.position

    def deliver(self, take: Callable[[Chunk], object]) -> None:
        """From now on hand each piece to `take` as it comes, instead of keeping it for whoever iterates."""
        self._take = take
        while self._chunks:
            take(chunk := self._chunks.popleft())
            self._consumed(chunk)

    async def delivered(self) -> None:
        """Wait until the last piece was handed over.

        Raises:
            TransferBroken: the other end gave up, after what it had sent.
            ConnectionLost: the connection ended, after what had come.
        """
        while not self.window.ended:
            if self._error is not None:
                raise self._error
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived

    def when_data_comes(self, react: Callable[[], object]) -> None:
        """Call `react` once: when the first bytes come, or now if some wait already."""
        if self._chunks:
            react()
        else:
            self._on_data = react

    @property
    def over(self) -> bool:
        """Whether nothing can come any more."""
        return self.window.ended or self._error is not None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """Return the next chunk. Cancelling loses nothing.

        Raises:
            TransferBroken: the other end gave up, after what it had sent.
            ConnectionLost: the connection ended, after what had come.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.window.ended:
                raise StopAsyncIteration
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        chunk = self._chunks.popleft()
        self._consumed(chunk)
        return chunk

    async def read_all(self, limit: int) -> bytes:
        """Everything until the end.

        Raises:
            LimitExceeded: more than `limit` bytes came.
            TransferBroken: the sender left bytes out or gave up.
            ConnectionLost: the connection ended.
        """
        parts: list[bytes] = []
        got = 0
        if self._error is not None:
            raise self._error
        async for chunk in self:
            if chunk.offset != got:
                raise TransferBroken(f"{chunk.offset - got} bytes are missing at {got}")
            got += len(chunk.data)
            if got > limit:
                raise LimitExceeded(f"more than {limit} bytes", field="bytes", limit=limit, got=got)
            parts.append(chunk.data)
        if got != self.size:
            raise TransferBroken(f"{self.size - got} bytes are missing at the end")
        return b"".join(parts)

    def take(self, frame: frames.Data | frames.End) -> None:
        """Accept a frame; raises BadBinaryHeader when it breaks the rules."""
        if self._error is not None:
            return
        if isinstance(frame, frames.End):
            self.window.end(frame.offset)
            self.trailer = frame.trailer
        else:
            self.window.arrived(frame.offset, len(frame.payload))
            chunk = Chunk(frame.offset, frame.payload)
            if self._take is not None:
                self._take(chunk)
                self._consumed(chunk)
                return
            self._chunks.append(chunk)
            if self._on_data is not None:
                react, self._on_data = self._on_data, None
                react()
        if self._arrived is not None:
            wake(self._arrived)

    def _consumed(self, chunk: Chunk) -> None:
        """Give the sender new credit."""
        now = time.monotonic()
        allowed = self.window.consumed(len(chunk.data), any_room=now - self._told > CREDIT_SECONDS)
        if allowed is not None and self._error is None:
            self._told = now
            self._table.lanes.put_control(frames.credit(self.channel, allowed))

    def fail(self, error: AgentServerError) -> None:
        """End with an error, without effect when all of it has come."""
        if not self.over:
            self._error = error
            wake(self._arrived)


class ByteWriter(Source):
    """The sending end. One task at a time.

    Attributes:
        channel: the stream's number, for the params of a call.
        offset: position of the next byte.
        since: what lies before it the reader has got over another stream.
    """

    def __init__(self, channel: int, table: StreamTable, since: int = 0, *, is_known: bool = True) -> None:
        """Made by `Peer.open_writer` and `Inbound.writing`; one that is not known sends nothing until `announced`."""
        self.channel = channel
        self.offset = 0
        self.since = since
        self.finished = False
        self.in_turn = False
        self.waiting: Line[bytes] = Line()
        self._window = SendWindow(table.other_window)
        self._longest = FIRST_BYTES
        self._table = table
        self._is_known = is_known
        self._error: AgentServerError | None = None
        self._room: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self.finished and self._table.has(self):
            self.fail(TransferBroken("the stream was left unfinished"))
            self._close(frames.reset(self.channel, "the writer stopped"))

    def announced(self) -> None:
        """Send from now on: the call that names it is on its way."""
        self._is_known = True
        if self.waiting.items is not None:
            self._table.lanes.put_bulk(self)

    def drop(self) -> None:
        """Break if it is not announced: the call that names it is not made."""
        if not self._is_known:
            self.fail(TransferBroken("the call was not made"))
            self._table.end(self.channel)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; waits for the reader's credit and for the connection. `data` may be reused afterwards.

        Cancelling leaves a part of `data` sent: `offset` says how much.

        Raises:
            TransferBroken: the reader gave up.
            ConnectionLost: the connection ended.
        """
        view = memoryview(data).cast("B")
        while True:
            if self._error is not None:
                raise self._error
            if not len(view):
                return
            taken = 0
            if len(self.waiting) < QUEUED_FRAMES:
                self._longest = min(self._longest, self._table.lanes.payload_bytes)
                taken = self._window.take(min(len(view), self._longest))
            if not taken:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
                continue
            self.waiting.append(frames.data(self.channel, self.offset, view[:taken]))
            if self._is_known:
                self._table.lanes.put_bulk(self)
            self.offset += taken
            self._longest *= 2
            view = view[taken:]

    async def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Like `write`, of bytes that begin at `offset`, those that the reader has not got; a gap is left out."""
        if rest := data[max(0, self.since - offset, self.offset - offset) :]:
            self.offset = offset + len(data) - len(rest)
            await self.write(rest)

    async def finish(self, trailer: bytes = b"", *, size: int = 0) -> None:
        """Say that this was all; does not wait until the reader has read it.

        Args:
            trailer: at most 256 bytes for the reader, e.g. a SHA-256.
            size: of it all, where its end was left out.

        Raises:
            TransferBroken: the reader gave up.
            ConnectionLost: the connection ended.
        """
        if len(trailer) > frames.TRAILER_BYTES:
            raise ValueError(f"a trailer has at most {frames.TRAILER_BYTES} bytes")
        if self._error is not None:
            raise self._error
        if self.finished:
            return
        self.offset = max(self.offset, size)
        self._close(frames.end(self.channel, self.offset, trailer))

    def _close(self, last: bytes) -> None:
        """Send the last frame, behind those that wait."""
        self.finished = True
        if self._is_known and self.waiting.items is None:  # it needs no turn among those who send much
            self._table.lanes.put_control(last)
            self._table.end(self.channel)
        else:
            self.waiting.append(last)

    async def flushed(self) -> None:
        """Wait until what was written is on its way, or never will be."""
        while self.waiting.items is not None:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def next_frame(self) -> Frame:
        frame = Frame(self.waiting.popleft(), False)
        if self._room is not None:
            wake(self._room)
        if self.finished and self.waiting.items is None:
            self._table.end(self.channel)
        return frame

    def granted(self, allowed: int) -> None:
        """Take credit: the reader has room; raises BadBinaryHeader when it takes credit back."""
        if self._window.granted(allowed):
            wake(self._room)

    def fail(self, error: AgentServerError) -> None:
        """Send nothing more; `write` and `finish` raise from now on."""
        self._error = self._error or error
        self.waiting.items = None
        wake(self._room)


S = TypeVar("S", bound=ByteReader | ByteWriter)


class Pending:
    """What came for a stream before anybody took it up."""

    def __init__(self, reader: ByteReader) -> None:
        self.reader = reader
        self.allowed = 0
        self.broken: TransferBroken | None = None


class StreamTable:
    """The byte streams of one connection."""

    def __init__(self, lanes: Lanes, limits: Limits, *, opener: bool) -> None:
        """Make an empty table; `opener`: our numbers are odd."""
        self.other_window = limits.window_bytes
        self.unknown = 0
        """Data frames of streams that never existed, or past what a stream's credit can explain."""
        self.lanes = lanes
        self.window = limits.window_bytes
        self._ours = 1 if opener else 0
        self._last = -1 if opener else 0
        self._open: dict[int, ByteReader | ByteWriter] = {}
        self._pending: dict[int, Pending] = {}
        self._closed: dict[int, int] = {}
        self._lost: ConnectionLost | None = None

    def open_reader(self) -> ByteReader:
        """Return a stream of ours that the other end writes; enter it."""
        self._last += 2
        return self._add(ByteReader(self._last, self))

    def open_writer(self) -> ByteWriter:
        """Return a stream of ours that the other end reads; enter it, and make the call that names it."""
        self._last += 2
        return self._add(ByteWriter(self._last, self, is_known=False))

    def writers(self, channels: Iterable[int]) -> list[ByteWriter]:
        """Return those of these streams that are open and that we write."""
        return [found for each in channels if isinstance(found := self._open.get(each), ByteWriter)]

    def reading(self, channel: int) -> ByteReader:
        """Return a stream of theirs that they write; enter it.

        Raises:
            InvalidParams: it is none that they have just opened.
        """
        pending = self._take_up(channel)
        return self._add(pending.reader if pending else ByteReader(channel, self))

    def writing(self, channel: int, since: int) -> ByteWriter:
        """Return a stream of theirs that we write; enter it. They have got what lies before byte `since`.

        Raises:
            InvalidParams: it is none that they have just opened.
        """
        pending = self._take_up(channel)
        writer = ByteWriter(channel, self, since)
        if pending is not None:
            if pending.broken is not None:
                writer.fail(pending.broken)
            writer.granted(max(pending.allowed, self.other_window))
        return self._add(writer)

    def receive(self, frame: frames.BinaryFrame) -> None:
        """Hand a frame to its stream.

        Raises:
            BadBinaryHeader: it breaks the rules of its stream, or too many belong to none.
        """
        match frame:
            case frames.Data() | frames.End():
                stream = self._open.get(frame.stream)
                if isinstance(stream, ByteReader):
                    stream.take(frame)
                else:
                    self._unopened(frame, stream)
            case frames.Credit():
                self._credit(frame)
            case frames.Reset():
                self._reset(frame)
        if self._pending:
            self._bound_pending()

    def has(self, stream: ByteReader | ByteWriter) -> bool:
        """Return whether this stream is open."""
        return self._open.get(stream.channel) is stream

    def end(self, channel: int, expected: int = 0) -> None:
        """Forget a stream, except for how many bytes may still be on their way."""
        if self._open.pop(channel, None) is None and self._pending.pop(channel, None) is None:
            return
        self._closed[channel] = expected
        if len(self._closed) > REMEMBERED:
            del self._closed[next(iter(self._closed))]

    def lose(self, lost: ConnectionLost) -> None:
        """End all streams: the connection is gone."""
        self._lost = lost
        for stream in self._open.values():
            stream.fail(lost)
        self._pending.clear()

    def _take_up(self, channel: int) -> Pending | None:
        if channel <= 0 or channel % 2 == self._ours or channel in self._open or channel in self._closed:
            raise InvalidParams(f"channel {channel} is not one you have just opened")
        return self._pending.pop(channel, None)

    def _add(self, stream: S) -> S:
        if self._lost is not None:
            stream.fail(self._lost)
        self._open[stream.channel] = stream
        return stream

    def _unopened(self, frame: frames.Data | frames.End, stream: ByteWriter | None) -> None:
        if stream is not None:
            raise BadBinaryHeader(f"stream {frame.stream} flows the other way")
        if (pending := self._pending_one(frame.stream)) is not None:
            pending.reader.take(frame)
        elif isinstance(frame, frames.Data):
            left = self._closed.get(frame.stream, 0) - len(frame.payload)
            if left >= 0:
                self._closed[frame.stream] = left
            else:
                self.unknown += 1
                if self.unknown > UNKNOWN_FRAMES:
                    raise BadBinaryHeader("too many frames of unknown streams")

    def _credit(self, frame: frames.Credit) -> None:
        stream = self._open.get(frame.stream)
        if isinstance(stream, ByteWriter):
            stream.granted(frame.allowed)
        elif stream is not None:
            raise BadBinaryHeader(f"stream {frame.stream} flows the other way")
        elif (pending := self._pending_one(frame.stream)) is not None:
            pending.allowed = frame.allowed

    def _reset(self, frame: frames.Reset) -> None:
        error = TransferBroken(f"the other end gave up: {frame.reason}")
        stream = self._open.get(frame.stream)
        if stream is not None:
            stream.fail(error)
            if isinstance(stream, ByteWriter):
                self.end(stream.channel)
        elif (pending := self._pending_one(frame.stream)) is not None:
            pending.broken = error
            pending.reader.fail(error)

    def _pending_one(self, channel: int) -> Pending | None:
        if channel <= 0 or channel % 2 == self._ours or channel in self._closed:
            return None
        if channel not in self._pending:
            self._pending[channel] = Pending(ByteReader(channel, self))
        return self._pending[channel]

    def _bound_pending(self) -> None:
        """Give up the oldest while too many streams, or too many bytes, wait to be taken up."""
        most = PENDING_WINDOWS * self.window
        pending = self._pending.values()
        while len(pending) > PENDING_STREAMS or sum(each.reader.window.held for each in pending) > most:
            channel = next(iter(self._pending))
            reader = self._pending[channel].reader
            if not reader.over:
                self.lanes.put_control(frames.reset(channel, "nobody took the stream up"))
            self.end(channel, reader.window.expected)
