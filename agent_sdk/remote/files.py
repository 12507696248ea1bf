"""Files there, as bytes that belong to calls, and git. Both ends compute the SHA-256 of the whole.

When the connection is lost they go on over the next one behind what has come; so a file arrives as well
over a link on which no connection lives long enough for all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from msgspec.structs import replace

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.ids import new_id, sha256
from agent_sdk.protocol.errors import (
    AgentServerError,
    ChangedDuringRead,
    ConnectionLost,
    IsADirectory,
    NotARegularFile,
    TransferBroken,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.methods.workspace import LISTED, Download, FilesList, FilesStat, GitDiff, Upload
from agent_sdk.remote.link import Link, Part, ask, ask_page, passed, persistent
from agent_sdk.remote.streams import NO_CHANNEL, Arrived, Kept, sent_by, with_bytes
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteWriter
from agent_sdk.workspace.contract import FileInfo, Files, Git, Transferred
from agent_sdk.workspace.disk import Progress

READS = 5
"""How often a file is read from its beginning that changes whenever the connection is lost."""


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


class Source:
    """The bytes to send: they can be read from their beginning as often as needed."""

    def __init__(self, chunks: Callable[[], AsyncGenerator[bytes, None]]) -> None:
        self._chunks = chunks
        self.digest = sha256()
        """Of all, once the end was yielded."""

    async def behind(self, since: int) -> AsyncGenerator[bytes, None]:
        """Yield what lies behind these bytes; the generator before it has ended or was closed.

        Raises:
            ConnectionLost: they cannot be had again.
        """
        self.digest, position = sha256(), 0
        async with aclosing(self._chunks()) as chunks:
            async for data in chunks:
                self.digest.update(data)
                position += len(data)
                if position > since:
                    yield data[max(0, len(data) - (position - since)) :]

    async def aclose(self) -> None:
        """Give up what has not been read."""


class Once(Source):
    """Bytes that are read once; of what was read so much is kept as can be on its way."""

    def __init__(self, chunks: AsyncIterable[bytes]) -> None:
        self._pieces = aiter(chunks)
        self.digest = sha256()
        self._kept = Kept()
        self._reading: asyncio.Task[bytes | None] | None = None

    async def behind(self, since: int) -> AsyncGenerator[bytes, None]:
        if not self._kept.first <= since <= self._kept.end:
            raise ConnectionLost("the connection was lost, and the bytes that were on their way are used up")
        while (data := self._kept.at(since)) or await self._read():
            if data:
                since += len(data)
                yield data

    async def _read(self) -> bool:
        """Read on; False: that was all. Cancelling loses nothing: who reads next gets it."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(_anext(self._pieces))
        await asyncio.wait((self._reading,))
        data = self._reading.result()
        self._reading = None
        if data is not None:
            self.digest.update(data)
            self._kept.add(data)
        return data is not None

    async def aclose(self) -> None:
        await cancel_and_wait(self._reading)
        if isinstance(self._pieces, AsyncGenerator):
            await self._pieces.aclose()


async def _anext(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


async def outgoing(link: Link, call: Upload, source: Source, progress: Progress) -> Transferred:
    """Write a file of the other end, over as many connections as it takes.

    Raises:
        TransferBroken: what was written is not what was sent; nothing was kept.
    """
    arrived = Arrived(call.op_id)

    async def attempt(peer: Peer) -> Transferred:
        """Send what the other end has not got, and go on as long as that is more each time."""
        since = await arrived.ask(peer)
        while True:
            try:
                return await send(peer, since)
            except (TransferBroken, WorkspaceUnavailable):
                before, since = since, await arrived.ask(peer)
                if since <= before:
                    raise

    async def send(peer: Peer, since: int) -> Transferred:
        async with peer.open_writer() as writer:
            calling = peer.call(replace(call, channel=writer.channel, since=since))
            answer = await with_bytes(calling, giving=_give(source, since, writer, progress))
        if answer.sha256 != source.digest.hexdigest():
            raise TransferBroken("the SHA-256 of what was written differs from what was sent")
        return answer

    async with aclosing(source):
        return await persistent(link, attempt, changes_something=False)


async def _give(source: Source, since: int, writer: ByteWriter, progress: Progress) -> None:
    """Send all from byte `since` on. Where the other end wants no more, its answer says why: it may have the file."""
    position, wanted = since, True
    await progress.reach(position)
    async with aclosing(source.behind(position)) as chunks:
        async for data in chunks:
            if wanted:
                wanted = await _accepted(writer.write_at(position, data))
            position += len(data)
            await progress.reach(position)
    if wanted:
        await _accepted(writer.finish(source.digest.digest(), size=position))


async def _accepted(writing: Awaitable[None]) -> bool:
    try:
        await writing
    except TransferBroken:
        return False
    return True


class RemoteFiles(Part, Files, part="files"):
    """The files of a workspace there."""

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        call = Download(path=path, channel=NO_CHANNEL, offset=offset, length=limit, as_is=True)
        for _ in range(READS):
            data = bytearray()
            try:
                async with incoming(self._link, call) as stream:
                    async for piece in stream:
                        data += piece
                return bytes(data)
            except ChangedDuringRead:  # while there was no connection: what came is of two states
                continue
        raise ChangedDuringRead(
            f"the file changed in each of {READS} readings while the connection was lost: {path}; "
            "read it when it is no longer written to",
            path=path,
        )

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        async def content() -> AsyncGenerator[bytes, None]:
            yield data

        call = Upload(op_id=new_id(), path=path, channel=NO_CHANNEL, size=len(data), mode=mode)
        return await outgoing(self._link, call, Source(content), Progress(None, len(data)))

    async def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        found: list[FileInfo] = []
        asked = LISTED

        def call(limit: int) -> FilesList:
            nonlocal asked
            asked = limit
            after = found[-1].path if found else None
            return FilesList(path=path, depth=depth, hidden=hidden, after=after, limit=limit)

        while True:
            page = await ask_page(self._link, call, LISTED)
            found += page
            if len(page) < asked:
                return found


class RemoteGit(Part, Git, part="git"):
    """The git repository of a workspace there."""

    async def diff(self, path: str = ".", *, base: str | None = None) -> str:
        return (await self._ask(GitDiff(path=path, base=base))).text
