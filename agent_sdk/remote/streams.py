"""A call with its bytes: both go on at the same time, and the call's error is the one that counts.

When a connection is lost, bytes go on over the next one at an offset: `Collector` knows what of them has come here,
`Arrived` and the process itself what has come there, and `Kept` has what may have to be sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from msgspec.structs import replace

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import AgentServerError, ConnectionLost, MethodNotFound, TransferBroken
from agent_sdk.protocol.methods.method import Method
from agent_sdk.protocol.methods.workspace import UploadOffset
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteReader, Chunk
from agent_sdk.workspace.output import HEAD_BYTES, TAIL_BYTES, Output

A = TypeVar("A")

NO_CHANNEL = 1
"""Stands in a call until the connection is known whose channel it will name."""
KEPT_BYTES = 4 << 20
"""Of bytes that cannot be had again: more than the windows of all streams on the way hold together."""
PIECE_BYTES = 64 << 10


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


class Arrived:
    """How many of the bytes that belong to a call the other end has."""

    def __init__(self, op_id: str) -> None:
        self._op_id = op_id
        self._size: int | None = None

    async def ask(self, peer: Peer) -> int:
        """Return how many have come there; nothing is asked where none were sent yet."""
        if self._size is None:
            self._size = 0
            return 0
        try:
            size = (await peer.call(UploadOffset(op_id=self._op_id))).bytes
        except MethodNotFound:
            size = 0
        peer.progress += size > self._size
        self._size = size
        return size


class Kept:
    """The end of bytes that cannot be had again; what of them was sent 4 MiB ago has arrived."""

    def __init__(self, at: int = 0) -> None:
        self.first = at
        """Position of the first byte that is kept."""
        self._bytes = bytearray()

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.first + len(self._bytes)

    def add(self, data: bytes) -> None:
        """Keep this, too, now that all before it was sent."""
        arrived = max(0, len(self._bytes) - KEPT_BYTES)
        del self._bytes[:arrived]
        self.first += arrived
        self._bytes += data

    def cut(self, end: int) -> None:
        """Drop what lies behind this position."""
        del self._bytes[end - self.first :]

    def at(self, position: int) -> bytes:
        """Return a piece of what begins at this position, which is kept; empty: that is the end."""
        start = position - self.first
        return bytes(memoryview(self._bytes)[start : start + PIECE_BYTES])


async def collected(call: Coroutine[Any, Any, A], *outputs: tuple[Collector, ByteReader]) -> A:
    """Await a call and the output it sends, which is collected as it comes."""
    for collector, reader in outputs:
        reader.deliver(collector.add)
    answer = await call
    for _, reader in outputs:
        await reader.delivered()
    return answer


async def with_bytes(
    call: Coroutine[Any, Any, A],
    *taking: Coroutine[Any, Any, None],
    giving: Coroutine[Any, Any, None] | None = None,
) -> A:
    """Await a call, and those who move its bytes meanwhile, to the end of both.

    Bytes may exceed one window of credit, so they have to move before the call is answered. Where they cannot, the
    call's answer says why.

    Args:
        call: sends bytes, or is sent them.
        taking: take what it sends. When the connection is lost, what had come is taken to its end, so that nobody
            misses a byte or sees one twice.
        giving: sends it what it is to have.
    """
    calling = asyncio.ensure_future(call)
    waited = {calling, *(asyncio.ensure_future(each) for each in taking)}
    tasks: set[asyncio.Future[Any]] = {*waited, *([] if giving is None else [asyncio.ensure_future(giving)])}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failures = {task: error for task in tasks if task.done() and (error := task.exception()) is not None}
        if any(isinstance(error, TransferBroken) for error in failures.values()):
            await calling
        if any(isinstance(failures.get(task), ConnectionLost) for task in waited):
            await asyncio.wait(waited)
        for error in (calling.exception() if calling.done() else None, *failures.values()):
            if error is not None:
                raise error
        return calling.result()
    finally:
        await cancel_and_wait(*tasks)


@asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do this as long as the block runs, which alone decides what becomes of it."""
    working = asyncio.ensure_future(work)
    try:
        yield
    finally:
        await cancel_and_wait(working)


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
            await cancel_and_wait(calling)


def _pass_failure(call: asyncio.Future[Any], reader: ByteReader) -> None:
    """Tell whoever waits for bytes that the call was refused: it never opens its stream then."""
    if not call.cancelled() and isinstance(error := call.exception(), AgentServerError):
        reader.fail(error)
