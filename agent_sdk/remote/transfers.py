"""Files on their way, as bytes that belong to a call. Both ends compute the SHA-256."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from msgspec.structs import replace

from agent_sdk.digest import sha256
from agent_sdk.protocol.errors import ConnectionLost, TransferBroken, WorkspaceLost
from agent_sdk.protocol.methods import Download, Upload
from agent_sdk.protocol.results import Transferred
from agent_sdk.remote.link import Link, persistent
from agent_sdk.remote.streams import pass_failure, together
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteReader, ByteWriter

NO_CHANNEL = 1
"""Stands in a call until the connection is known whose channel it will name."""


@asynccontextmanager
async def incoming(peer: Peer, call: Download) -> AsyncIterator[Incoming]:
    """Open a file of the other end; its bytes come over this connection or not at all."""
    async with peer.open_reader() as reader:
        stream = Incoming(reader, peer.call(replace(call, channel=reader.channel)))
        try:
            yield stream
        finally:
            await stream.close()


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


async def outgoing(link: Link, call: Upload, chunks: Callable[[], AsyncIterable[bytes]]) -> Transferred:
    """Write a file of the other end, over as many connections as it takes; `chunks` is called for each.

    Raises:
        TransferBroken: what was written is not what was sent; nothing was kept.
    """
    attempts = 0

    async def attempt(peer: Peer) -> Transferred:
        nonlocal attempts
        attempts += 1
        try:
            return await _send(peer, call, chunks())
        except (TransferBroken, WorkspaceLost):
            if attempts == 1:
                raise
        # It attached to the attempt before it, which broke when its connection did.
        return await _send(peer, call, chunks())

    return await persistent(link, attempt)


def once(chunks: AsyncIterable[bytes]) -> Callable[[], AsyncIterator[bytes]]:
    """Return a source of bytes that cannot be read again.

    Raises:
        ConnectionLost: by its second reading.
    """
    begun = False

    async def read() -> AsyncIterator[bytes]:
        nonlocal begun
        if begun:
            raise ConnectionLost("the connection was lost, and the bytes that were on their way are used up")
        begun = True
        async for data in chunks:
            yield data

    return read


async def _send(peer: Peer, call: Upload, chunks: AsyncIterable[bytes]) -> Transferred:
    async with peer.open_writer() as writer:
        calling = peer.call(replace(call, channel=writer.channel))
        answer, digest = await together(calling, _write(writer, chunks))
    if answer.sha256 != digest:
        raise TransferBroken("the SHA-256 of what was written differs from what was sent")
    return answer


async def _write(writer: ByteWriter, chunks: AsyncIterable[bytes]) -> str:
    digest = sha256()
    async for data in chunks:
        digest.update(data)
        await writer.write(data)
    await writer.finish(digest.digest())
    return digest.hexdigest()
