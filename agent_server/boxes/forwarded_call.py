"""One call that is forwarded to a box, with its bytes: in order, at their offsets, under the credit of both ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, Self

from msgspec.structs import replace

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import ConnectionLost, TransferBroken
from agent_sdk.protocol.methods.method import Effect, Method, Stream
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.rpc.stream import ByteReader, ByteWriter

KEPT_BYTES = 64 << 10
"""Of the output of an operation, to be given again."""


class ForwardedCall:
    """One call that is forwarded to a box, in the task that answers it; a repeated call is another one.

    Enter it before anything begins: a call whose streams are not free is refused then.

    It may be tried again over another connection to the same box.
    """

    def __init__(self, params: Any, call: Inbound) -> None:
        self.params = params
        self.call = call
        self.instance = ""
        """Of the box it is in."""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it is through, or has been stopped."""
        self.stopped = False
        """Whether another call or the end of the server has stopped it, not its caller."""
        self.in_vain = False
        """Whether it failed so that the box has forgotten it."""
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self.let_go = False
        """Whether being cancelled leaves the call to the box, instead of cancelling it there."""
        self.once = False
        """Whether bytes of the caller belong to it, which cannot be sent again."""
        self.broken = False
        """Whether it was sent over a connection that broke, so that nobody knows how far it came."""
        self.kept: dict[str, bytearray] | None = {}
        """The output that passed, by field; None: more than is kept."""
        self.streams: dict[str, CallerStream] = {}
        """The streams to the caller, by field."""
        self.coming: list[asyncio.Task[None]] = []
        """Who passes the caller's bytes on."""
        self._readers: dict[str, ByteReader] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Take up the caller's streams.

        Raises:
            InvalidParams: a number is not that of a stream the caller has just opened.
        """
        async with self._stack:
            for stream in self.params.takes:
                if channel := getattr(self.params, stream.channel):
                    reading = self.call.reading(channel)
                    self._readers[stream.channel] = await self._stack.enter_async_context(reading)
            for stream in self.params.gives:
                if channel := getattr(self.params, stream.channel):
                    writing = self.call.writing(channel, getattr(self.params, stream.since))
                    writer = await self._stack.enter_async_context(writing)
                    self.streams[stream.channel] = CallerStream(writer, stream)
            self._stack = self._stack.pop_all()
        self.once = bool(self._readers)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End the streams to the caller, right before its answer; where there is none, break them off."""
        if kind is None:
            for stream in self.streams.values():
                await stream.finish(0)
        await self._stack.aclose()

    def stop(self) -> None:
        """Stop it, unless its caller has cancelled it already."""
        if not self.task.cancelling():
            self.stopped = True
            self.task.cancel()

    async def through(self, peer: Peer) -> Any:
        """Make the call over this connection and return its answer, when all its bytes have passed.

        Raises:
            ConnectionLost: the connection to the box ended.
            AgentServerError: what the box answered.
        """
        self.kept = {}
        async with AsyncExitStack() as stack:
            fields: dict[str, Any] = {}
            self.coming = []
            for field, reader in self._readers.items():
                writer = await stack.enter_async_context(peer.open_writer())
                fields[field] = writer.channel
                self.coming.append(asyncio.create_task(_bring_in(reader, writer)))
            outputs = await self._take_out(stack, peer, fields)
            try:
                answer = await peer.call(replace(self.params, **fields), leave=lambda: self.let_go)
                for field in carrying(self.params, answer):
                    if field in outputs:
                        await outputs[field].begin()
                return answer
            finally:
                await cancel_and_wait(*self.coming, *(output.pump for output in outputs.values()))

    async def _take_out(
        self, stack: AsyncExitStack, peer: Peer, fields: dict[str, Any]
    ) -> dict[str, _Output]:
        outputs = {}
        for field, to_caller in self.streams.items():
            reader = await stack.enter_async_context(peer.open_reader())
            fields[field] = reader.channel
            if isinstance(self.params, Effect) and to_caller.since:
                if to_caller.since <= KEPT_BYTES:
                    fields[to_caller.stream.since] = 0  # to be kept whole
                else:
                    self.kept = None
            outputs[field] = _Output(reader, to_caller, partial(self._keep, field))
        return outputs

    def _keep(self, field: str, offset: int, data: bytes) -> None:
        if self.kept is None or not isinstance(self.params, Effect):
            return
        kept = self.kept.setdefault(field, bytearray())
        if offset == len(kept) and sum(map(len, self.kept.values())) + len(data) <= KEPT_BYTES:
            kept += data
        else:
            self.kept = None


class _Output:
    """What a box says over one stream; a task passes it on from the first byte on: most commands say nothing."""

    def __init__(
        self, reader: ByteReader, to_caller: CallerStream, keep: Callable[[int, bytes], None]
    ) -> None:
        self.pump: asyncio.Task[None] | None = None
        self._reader = reader
        self._to_caller = to_caller
        self._keep = keep
        reader.when_data_comes(self.begin)

    def begin(self) -> asyncio.Task[None]:
        """Pass it on, once; the task ends when all of it is on its way to the caller."""
        if self.pump is None:  # the answer, which is awaited, may come before the first byte
            self.pump = asyncio.create_task(self._pass_on())
        return self.pump

    async def _pass_on(self) -> None:
        async for chunk in self._reader:
            self._keep(chunk.offset, chunk.data)
            await self._to_caller.pass_on(chunk.offset, chunk.data)
        await self._to_caller.finish(self._reader.size, self._reader.trailer)


class CallerStream:
    """A stream to the caller; one who is gone or wants no more holds nothing up."""

    def __init__(self, writer: ByteWriter, stream: Stream) -> None:
        self.stream = stream
        self.since = writer.since
        self._writer = writer

    async def pass_on(self, offset: int, data: bytes) -> None:
        """Send what the caller has not got yet."""
        with suppress(ConnectionLost, TransferBroken):
            await self._writer.write_at(offset, data)

    async def finish(self, size: int, trailer: bytes = b"") -> None:
        """End the stream at this size, where it has not ended yet."""
        with suppress(ConnectionLost, TransferBroken):
            await self._writer.finish(trailer, size=size)


async def _bring_in(reader: ByteReader, writer: ByteWriter) -> None:
    """Pass the caller's bytes on. Where they break off, the box hears of it at once."""
    async with writer:
        with suppress(TransferBroken, ConnectionLost):
            try:
                async for offset, data in reader:
                    await writer.write_at(offset, data)
            except (TransferBroken, ConnectionLost):
                await writer.flushed()  # what came before counts
                raise
            await writer.finish(reader.trailer, size=reader.size)


def carrying(params: Method[Any], answer: Any) -> tuple[str, ...]:
    """Return the fields whose streams the box has sent bytes over with this answer; the others need no waiting for."""
    sizes = ((stream.channel, not stream.size or getattr(answer, stream.size)) for stream in params.gives)
    return tuple(channel for channel, size in sizes if size)
