"""Bytes that belong to a call: both go on at the same time, and the call's error is the one that counts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from agent_sdk.digest import sha256
from agent_sdk.protocol.errors import AgentServerError, InvalidParams, TransferBroken
from agent_sdk.protocol.results import Transferred
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteReader, ByteWriter
from agent_sdk.workspace import HEAD_BYTES, TAIL_BYTES, OnOutput, Output, OutputName

A = TypeVar("A")
B = TypeVar("B")


async def together(call: Awaitable[A], bytes_: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """Await a call and the moving of its bytes; whichever fails ends the other.

    Where both fail, the call's error is raised: broken bytes are mostly its consequence.
    """
    calling = asyncio.ensure_future(call)
    moving = asyncio.ensure_future(bytes_)
    try:
        await asyncio.wait({calling, moving}, return_when=asyncio.FIRST_EXCEPTION)
        if moving.done() and isinstance(moving.exception(), TransferBroken):
            await calling
        for task in (calling, moving):
            if task.done() and (error := task.exception()) is not None:
                raise error
        return calling.result(), moving.result()
    finally:
        calling.cancel()
        moving.cancel()
        await asyncio.gather(calling, moving, return_exceptions=True)


class Collector:
    """The head and tail of a stream whose middle may be missing."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        room = HEAD_BYTES - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]

    def output(self, size: int) -> Output:
        """Return what was collected of a stream of `size` bytes in all."""
        return Output(bytes(self._head), bytes(self._tail[-TAIL_BYTES:]), size)


async def with_output(
    call: Awaitable[A], readers: Sequence[ByteReader], sizes: Callable[[A], Sequence[int]]
) -> tuple[A, list[Output]]:
    """Await a call and the output it sends meanwhile.

    Output may exceed one window of credit, so it has to be read before the call is answered. A stream
    that stayed empty is never opened by the other end.

    Args:
        sizes: how many bytes each stream had, from the answer.
    """
    collecting = [asyncio.ensure_future(_collect(reader)) for reader in readers]
    try:
        answer = await call
        outputs = [
            (await collected).output(size) if size else Output()
            for collected, size in zip(collecting, sizes(answer), strict=True)
        ]
        return answer, outputs
    finally:
        for collected in collecting:
            collected.cancel()
        await asyncio.gather(*collecting, return_exceptions=True)


async def _collect(reader: ByteReader) -> Collector:
    collector = Collector()
    async for chunk in reader:
        collector.add(chunk.data)
    return collector


async def pump(out: ByteReader, err: ByteReader, on_output: OnOutput) -> tuple[Collector, Collector]:
    """Hand output to the callback as it comes, one piece at a time; return what both streams said."""
    turn = asyncio.Lock()

    async def follow(name: OutputName, reader: ByteReader) -> Collector:
        collector = Collector()
        async for chunk in reader:
            collector.add(chunk.data)
            async with turn:
                waiting = on_output(name, chunk.data)
                if inspect.isawaitable(waiting):
                    await waiting
        return collector

    return await together(follow("stdout", out), follow("stderr", err))


@asynccontextmanager
async def feed(peer: Peer, data: bytes | None) -> AsyncIterator[int]:
    """Yield the channel that carries `data` to the other end; 0 where there is nothing to carry."""
    if not data:
        yield 0
        return
    async with peer.open_writer() as writer:
        feeding = asyncio.ensure_future(_write(writer, data))
        try:
            yield writer.channel
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def _write(writer: ByteWriter, data: bytes) -> None:
    await writer.write(data)
    await writer.finish()


async def send(writer: ByteWriter, chunks: AsyncIterable[bytes]) -> str:
    """Send a file's bytes and their SHA-256; returns it as hexadecimal text."""
    digest = sha256()
    async for data in chunks:
        digest.update(data)
        await writer.write(data)
    await writer.finish(digest.digest())
    return digest.hexdigest()


class Incoming:
    """A file on its way here: its bytes, verified at the end. One iteration only."""

    def __init__(self, reader: ByteReader, call: Awaitable[Transferred]) -> None:
        self._reader = reader
        self._call = asyncio.ensure_future(call)
        self._call.add_done_callback(lambda done: pass_failure(done, reader))
        self.size = 0
        self.mode = 0o644

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._read()

    async def _read(self) -> AsyncIterator[bytes]:
        digest = sha256()
        try:
            async for chunk in self._reader:
                digest.update(chunk.data)
                yield chunk.data
        except TransferBroken:
            await self._call
            raise
        answer = await self._call
        if self._reader.trailer != digest.digest():
            raise TransferBroken("the SHA-256 of the bytes that came differs from the sender's")
        self.size, self.mode = answer.size, answer.mode

    async def close(self) -> None:
        """Give up what has not come yet."""
        self._call.cancel()
        await asyncio.gather(self._call, return_exceptions=True)


def pass_failure(call: asyncio.Future[Any], reader: ByteReader) -> None:
    """A call was answered: a refused one never opens its stream, and whoever waits for bytes has to hear of it."""
    if not call.cancelled() and isinstance(error := call.exception(), AgentServerError):
        reader.fail(error)


def milliseconds(field: str, seconds: float | None) -> int | None:
    """Convert seconds to the wire's milliseconds.

    Raises:
        InvalidParams: outside 0.001..86 400.
    """
    if seconds is None:
        return None
    if not 0.001 <= seconds <= 86_400:
        raise InvalidParams(f"{field} must be 0.001..86400 seconds (got {seconds!r})")
    return max(1, round(seconds * 1000))
