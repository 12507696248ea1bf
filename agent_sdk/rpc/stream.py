"""Byte streams under credit: one end writes, the other reads; memory is bounded by one window."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Self

from agent_sdk.protocol import frame as frames
from agent_sdk.protocol.errors import AgentServerError, LimitExceeded, TransferBroken
from agent_sdk.protocol.window import ReceiveWindow, SendWindow
from agent_sdk.rpc.lanes import Frame, Lanes, Line, Source
from agent_sdk.rpc.pipe import wake

QUEUED_FRAMES = 4
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

    def __init__(
        self, channel: int, window_bytes: int, lanes: Lanes, leave: Callable[[ByteReader], None]
    ) -> None:
        """Streams are made by `Peer.open_reader` and `Inbound.reading`."""
        self.channel = channel
        self._leave = leave
        self.trailer = b""
        self.window = ReceiveWindow(window_bytes)
        self._lanes = lanes
        self._chunks: deque[Chunk] = deque()
        self._error: AgentServerError | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._on_data: Callable[[], object] | None = None
        self._take: Callable[[Chunk], object] | None = None
        self._told = time.monotonic()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._leave(self)

    @property
    def size(self) -> int:
        """The position behind the last byte that arrived; after the end, the size of it all."""
        return self.window.position

    def deliver(self, take: Callable[[Chunk], object]) -> None:
        """From now on hand each piece to `take` as it comes, instead of keeping it for whoever iterates."""
        self._take = take
        while self._chunks:
            self._hand_over(self._chunks.popleft())

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
        """The next chunk. Cancelling loses nothing.

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
                self._hand_over(chunk)
                return
            self._chunks.append(chunk)
            if self._on_data is not None:
                react, self._on_data = self._on_data, None
                react()
        if self._arrived is not None:
            wake(self._arrived)

    def _hand_over(self, chunk: Chunk) -> None:
        assert self._take is not None
        self._take(chunk)
        self._consumed(chunk)

    def _consumed(self, chunk: Chunk) -> None:
        """Give the sender new credit."""
        now = time.monotonic()
        allowed = self.window.consumed(len(chunk.data), any_room=now - self._told > CREDIT_SECONDS)
        if allowed is not None and self._error is None:
            self._told = now
            self._lanes.put_control(frames.credit(self.channel, allowed))

    def fail(self, error: AgentServerError) -> None:
        """Nothing more comes; without effect when all of it has come."""
        if not self.over:
            self._error = error
            wake(self._arrived)


class ByteWriter(Source):
    """The sending end. One task at a time.

    Attributes:
        channel: the stream's number, for the params of a call.
        offset: position of the next byte.
    """

    def __init__(
        self,
        channel: int,
        window_bytes: int,
        lanes: Lanes,
        on_end: Callable[[int], None],
        leave: Callable[[ByteWriter], None],
    ) -> None:
        """Streams are made by `Peer.open_writer` and `Inbound.writing`."""
        self.channel = channel
        self.offset = 0
        self.finished = False
        self.in_turn = False
        self._window = SendWindow(window_bytes)
        self._longest = FIRST_BYTES
        self._lanes = lanes
        self._on_end = on_end
        self._leave = leave
        self.waiting: Line[bytes] = Line()
        self._error: AgentServerError | None = None
        self._room: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._leave(self)

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
                self._longest = min(self._longest, self._lanes.payload_bytes)
                taken = self._window.take(min(len(view), self._longest))
            if not taken:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
                continue
            self.waiting.append(frames.data(self.channel, self.offset, view[:taken]))
            self._lanes.put_bulk(self)
            self.offset += taken
            self._longest *= 2
            view = view[taken:]

    async def skip_to(self, offset: int) -> None:
        """Leave out the bytes up to `offset`, which lies not behind the present one."""
        if offset < self.offset:
            raise ValueError(f"offset {offset} lies behind {self.offset}")
        self.offset = offset

    async def finish(self, trailer: bytes = b"") -> None:
        """Say that this was all; does not wait until the reader has read it.

        Args:
            trailer: at most 256 bytes for the reader, e.g. a SHA-256.

        Raises:
            TransferBroken: the reader gave up.
            ConnectionLost: the connection ended.
        """
        if len(trailer) > frames.TRAILER_BYTES:
            raise ValueError(f"a trailer has at most {frames.TRAILER_BYTES} bytes")
        if self._error is not None:
            raise self._error
        if not self.finished:
            self.finished = True
            self.waiting.append(frames.end(self.channel, self.offset, trailer))
            self._lanes.put_bulk(self)

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
            self._on_end(self.channel)
        return frame

    def granted(self, allowed: int) -> None:
        """The reader has room; raises BadBinaryHeader when it takes credit back."""
        if self._window.granted(allowed):
            wake(self._room)

    def fail(self, error: AgentServerError) -> None:
        """Send nothing more; `write` and `finish` raise from now on."""
        self._error = self._error or error
        self.waiting.items = None
        wake(self._room)
