"""Files on their way, as bytes that belong to a call. Both ends compute the SHA-256 of the whole.

When the connection is lost they go on over the next one behind what has come; so a file arrives as well
over a link on which no connection lives long enough for all of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

from msgspec.structs import replace

from agent_sdk.ids import sha256
from agent_sdk.protocol.errors import (
    AgentServerError,
    ChangedDuringRead,
    ConnectionLost,
    IsADirectory,
    MethodNotFound,
    NotARegularFile,
    TransferBroken,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.methods.workspace import Download, FilesStat, Upload, UploadOffset
from agent_sdk.protocol.results import Transferred
from agent_sdk.remote.link import Link, ask, passed, persistent
from agent_sdk.remote.streams import sent_by
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteWriter
from agent_sdk.workspace.disk import Progress

NO_CHANNEL = 1
"""Stands in a call until the connection is known whose channel it will name."""
KEPT_BYTES = 4 << 20
"""Of a source that cannot be read again: more than the windows of all streams on the way hold together."""


@asynccontextmanager
async def incoming(link: Link, call: Download) -> AsyncIterator[Incoming]:
    """Open a file of the other end for reading; nothing of it comes before it is iterated over."""
    stream = Incoming(link, call)
    try:
        yield stream
    finally:
        await stream.close()


class Incoming:
    """A file on its way here, verified at the end. One iteration only.

    It raises ChangedDuringRead also where the file was changed while there was no connection.
    """

    def __init__(self, link: Link, call: Download) -> None:
        self._link = link
        self._call = call
        self._bytes = self._read()
        self._trailer = b""
        self.size = 0
        self.mode = 0o644

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._bytes

    async def look(self) -> None:
        """Learn size and mode now.

        Raises:
            PathNotFound, IsADirectory, NotARegularFile: there is no file to read.
        """
        path = self._call.path
        info = await ask(self._link, FilesStat(path=path, follow=True))
        if info.type == "dir":
            raise IsADirectory(f"is a folder: {path}", path=path)
        if info.type != "file":
            raise NotARegularFile(f"not a regular file: {path}", path=path)
        self.size, self.mode = info.size, info.mode

    async def close(self) -> None:
        """Give up what has not come yet."""
        await self._bytes.aclose()

    async def _read(self) -> AsyncGenerator[bytes, None]:
        digest, position, since = sha256(), 0, 0
        while True:
            since = position
            peer = (await self._link.linked()).peer
            try:
                async with aclosing(self._come(peer, position)) as pieces:
                    async for data in pieces:
                        digest.update(data)
                        position += len(data)
                        yield data
                break
            except AgentServerError as exc:
                await passed(peer, exc)
        if self._trailer != digest.digest():
            path = self._call.path
            if since:
                raise ChangedDuringRead(f"the file changed between two connections: {path}", path=path)
            raise TransferBroken("the SHA-256 of the bytes that came differs from the sender's")

    async def _come(self, peer: Peer, since: int) -> AsyncGenerator[bytes, None]:
        """What comes over one connection."""
        async with sent_by(peer, replace(self._call, since=since)) as (reader, answering):
            async for chunk in reader:
                if chunk.offset != since:
                    raise TransferBroken(f"bytes are missing at {since}")
                since += len(chunk.data)
                yield chunk.data
            answer = await answering
            self._trailer, self.mode = reader.trailer, answer.mode
            self.size = max(self.size, answer.size)


async def outgoing(link: Link, call: Upload, source: Source, progress: Progress) -> Transferred:
    """Write a file of the other end, over as many connections as it takes.

    Raises:
        TransferBroken: what was written is not what was sent; nothing was kept.
    """
    async with aclosing(_Outgoing(call, source, progress)) as going:
        return await persistent(link, going.attempt, changes_something=False)


class Source(Protocol):
    """The bytes to send."""

    def behind(self, since: int) -> AsyncGenerator[bytes, None]:
        """Yield what lies behind these bytes; the generator before it has ended or was closed.

        Raises:
            ConnectionLost: they cannot be had again.
        """
        ...

    def digest(self) -> bytes:
        """Return the SHA-256 of all, once the end was yielded."""
        ...

    async def aclose(self) -> None:
        """Give up what has not been read."""
        ...


class Repeatable(Source):
    """A Source that can be read from its beginning as often as needed."""

    def __init__(self, chunks: Callable[[], AsyncGenerator[bytes, None]]) -> None:
        self._chunks = chunks
        self._digest = sha256()

    async def behind(self, since: int) -> AsyncGenerator[bytes, None]:
        self._digest, position = sha256(), 0
        async with aclosing(self._chunks()) as chunks:
            async for data in chunks:
                self._digest.update(data)
                position += len(data)
                if position > since:
                    yield data[max(0, len(data) - (position - since)) :]

    def digest(self) -> bytes:
        return self._digest.digest()

    async def aclose(self) -> None:
        """Do nothing: what is read is closed by who reads it."""


class Once(Source):
    """A Source that is read once; of what was read so much is kept as can be on its way."""

    def __init__(self, chunks: AsyncIterable[bytes]) -> None:
        self._chunks = aiter(chunks)
        self._digest = sha256()
        self._kept: deque[bytes] = deque()
        self._first = self._end = 0
        self._reading: asyncio.Task[bytes | None] | None = None

    async def behind(self, since: int) -> AsyncGenerator[bytes, None]:
        if not self._first <= since <= self._end:
            raise ConnectionLost("the connection was lost, and the bytes that were on their way are used up")
        position = self._first
        for data in tuple(self._kept):
            position += len(data)
            if position > since:
                yield data[max(0, len(data) - (position - since)) :]
        while (next_ := await self._next()) is not None:
            yield next_

    async def _next(self) -> bytes | None:
        """Read on. Cancelling loses nothing: who reads next gets it."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(_anext(self._chunks))
        await asyncio.wait((self._reading,))
        data = self._reading.result()
        self._reading = None
        if data is not None:
            self._digest.update(data)
            self._kept.append(data)
            self._end += len(data)
            while self._first + len(self._kept[0]) <= self._end - KEPT_BYTES:
                self._first += len(self._kept.popleft())
        return data

    def digest(self) -> bytes:
        return self._digest.digest()

    async def aclose(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if isinstance(self._chunks, AsyncGenerator):
            await self._chunks.aclose()


async def _anext(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


async def come(peer: Peer, op_id: str, before: int) -> int:
    """Return how many of the bytes that belong to a call have come to the other end; `before`: when last asked."""
    try:
        size = (await peer.call(UploadOffset(op_id=op_id))).bytes
    except MethodNotFound:
        size = 0
    peer.progress += size > before
    return size


class _Outgoing:
    def __init__(self, call: Upload, source: Source, progress: Progress) -> None:
        self._call = call
        self._source = source
        self._progress = progress
        self._come: int | None = None
        """How much of it the other end has; None: nothing was sent."""

    async def attempt(self, peer: Peer) -> Transferred:
        """Send what the other end has not got, and go on as long as that is more each time."""
        before = self._come
        self._come = 0 if before is None else await come(peer, self._call.op_id, before)
        while True:
            try:
                return await self._send(peer, self._come)
            except (TransferBroken, WorkspaceUnavailable):
                before, self._come = self._come, await come(peer, self._call.op_id, self._come)
                if self._come <= before:
                    raise

    async def _send(self, peer: Peer, since: int) -> Transferred:
        async with peer.open_writer() as writer:
            await writer.skip_to(since)
            call = replace(self._call, channel=writer.channel, since=since)
            calling = asyncio.ensure_future(peer.call(call))
            writing = asyncio.ensure_future(self._write(writer))
            try:
                await asyncio.wait((calling, writing), return_when=asyncio.FIRST_EXCEPTION)
                for task in (calling, writing):
                    if task.done() and (error := task.exception()) is not None:
                        raise error
                answer = calling.result()
            finally:
                calling.cancel()
                writing.cancel()
                await asyncio.gather(calling, writing, return_exceptions=True)
        if answer.sha256 != self._source.digest().hex():
            raise TransferBroken("the SHA-256 of what was written differs from what was sent")
        return answer

    async def _write(self, writer: ByteWriter) -> None:
        """Send all that is left. Where the other end wants no more, its answer says why: it may have the file."""
        position, wanted = writer.offset, True
        await self._progress.reach(position)
        async with aclosing(self._source.behind(position)) as chunks:
            async for data in chunks:
                if wanted:
                    wanted = await _accepted(writer.write(data))
                position += len(data)
                await self._progress.reach(position)
        if wanted:
            await _accepted(writer.finish(self._source.digest()))

    async def aclose(self) -> None:
        """Give up what was not sent."""
        await self._source.aclose()


async def _accepted(writing: Awaitable[None]) -> bool:
    try:
        await writing
    except TransferBroken:
        return False
    return True
