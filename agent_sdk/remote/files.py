"""Files and git there."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import LimitExceeded
from agent_sdk.protocol.methods import (
    FilesList,
    FilesMkdir,
    FilesMove,
    FilesRemove,
    FilesStat,
    GitChanges,
    GitDiff,
)
from agent_sdk.rpc.peer import Peer
from agent_sdk.workspace import FileInfo, FileStream, GitChange, Transferred

READ_BYTES = 64 << 20


class _Place(Protocol):
    """What of a RemoteWorkspace is needed here."""

    @property
    def peer(self) -> Peer: ...

    def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[FileStream]: ...

    async def write_stream(
        self, path: str, chunks: AsyncIterable[bytes], *, size: int | None = None, mode: int | None = None
    ) -> Transferred: ...


class RemoteFiles:
    """See workspace.Files."""

    def __init__(self, place: _Place) -> None:
        self._place = place

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """See Files.read."""
        wanted = READ_BYTES + 1 if limit is None else min(limit, READ_BYTES)
        data = bytearray()
        async with self._place.read_stream(path, offset=offset, length=wanted) as stream:
            async for piece in stream:
                data += piece
        if limit is None and len(data) > READ_BYTES:
            raise LimitExceeded(
                f"{path} is longer than {READ_BYTES} bytes; give a limit, or download it",
                field="path",
                limit=READ_BYTES,
            )
        return bytes(data)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        """See Files.write."""
        return await self._place.write_stream(path, _once(data), size=len(data), mode=mode)

    async def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        """See Files.list."""
        return await self._place.peer.call(FilesList(path=path, depth=depth, hidden=hidden))

    async def stat(self, path: str) -> FileInfo:
        """See Files.stat."""
        return await self._place.peer.call(FilesStat(path=path))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """See Files.remove."""
        await self._place.peer.call(FilesRemove(op_id=new_id(), path=path, recursive=recursive))

    async def move(self, source: str, target: str) -> None:
        """See Files.move."""
        await self._place.peer.call(FilesMove(op_id=new_id(), source=source, target=target))

    async def mkdir(self, path: str) -> None:
        """See Files.mkdir."""
        await self._place.peer.call(FilesMkdir(op_id=new_id(), path=path))


class RemoteGit:
    """See workspace.Git."""

    def __init__(self, place: _Place) -> None:
        self._place = place

    async def changes(self, path: str = ".", *, base: str | None = None) -> list[GitChange]:
        """See Git.changes."""
        return await self._place.peer.call(GitChanges(path=path, base=base))

    async def diff(self, path: str = ".", *, base: str | None = None) -> str:
        """See Git.diff."""
        return (await self._place.peer.call(GitDiff(path=path, base=base))).text


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
