"""Bytes that belong to a call: both go on at the same time, and the call's error is the one that counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from msgspec.structs import replace

from agent_sdk.protocol.errors import AgentServerError, ConnectionLost, TransferBroken
from agent_sdk.protocol.methods.method import Method
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteReader, Chunk
from agent_sdk.workspace.output import HEAD_BYTES, TAIL_BYTES, Output

A = TypeVar("A")


class Collector:
    """The head and tail of a stream whose middle may be missing, over however many connections it came."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self.position = 0
        """Behind the last byte that came."""

    def add(self, chunk: Chunk) -> bytes:
        """Take a piece; returns what of it had not come before."""
        new = data = chunk.data[max(0, self.position - chunk.offset) :]
        self.position = max(self.position, chunk.offset + len(chunk.data))
        room = HEAD_BYTES - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        return new

    def output(self, size: int) -> Output:
        """Return what was collected of a stream of `size` bytes in all, or of more where more has come."""
        return Output(bytes(self._head), bytes(self._tail[-TAIL_BYTES:]), max(size, self.position))


async def collected(call: Coroutine[Any, Any, A], *outputs: tuple[Collector, ByteReader]) -> A:
    """Await a call and the output it sends, which is collected as it comes."""
    for collector, reader in outputs:
        reader.deliver(collector.add)
    answer = await call
    for _, reader in outputs:
        await reader.delivered()
    return answer


async def with_output(call: Coroutine[Any, Any, A], *listening: Coroutine[Any, Any, None]) -> A:
    """Await a call, and those who take the output it sends meanwhile.

    Output may exceed one window of credit, so it has to be read before the call is answered. When the connection is
    lost, what had come is taken to its end, so that nobody misses a byte or sees one twice.
    """
    calling = asyncio.ensure_future(call)
    tasks: set[asyncio.Future[Any]] = {calling, *map(asyncio.ensure_future, listening)}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failures = [task.exception() for task in tasks if task.done()]
        if any(isinstance(error, TransferBroken) for error in failures):
            await calling
        if any(isinstance(error, ConnectionLost) for error in failures):
            await asyncio.wait(tasks)
        for error in (calling.exception() if calling.done() else None, *failures):
            if error is not None:
                raise error
        return calling.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def sent_by(peer: Peer, call: Method[A]) -> AsyncIterator[tuple[ByteReader, asyncio.Future[A]]]:
    """Make a call that sends bytes over its `channel`; yield them and its answer, which comes when the block ends.

    Leaving early gives the call up.
    """
    async with peer.open_reader() as reader:
        calling = asyncio.ensure_future(peer.call(replace(call, channel=reader.channel)))
        calling.add_done_callback(lambda done: _pass_failure(done, reader))
        try:
            yield reader, calling
            await calling
        except TransferBroken:
            await calling
            raise
        finally:
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)


def _pass_failure(call: asyncio.Future[Any], reader: ByteReader) -> None:
    """Tell whoever waits for bytes that the call was refused: it never opens its stream then."""
    if not call.cancelled() and isinstance(error := call.exception(), AgentServerError):
        reader.fail(error)
