"""Files and git there."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ChangedDuringRead
from agent_sdk.protocol.methods.workspace import (
    LISTED,
    Download,
    FilesList,
    FilesMkdir,
    FilesMove,
    FilesRemove,
    FilesStat,
    GitChanges,
    GitDiff,
    Upload,
)
from agent_sdk.remote.link import Link, ask, ask_page
from agent_sdk.remote.transfers import NO_CHANNEL, Repeatable, incoming, outgoing
from agent_sdk.workspace.contract import FileInfo, Files, Git, GitChange, Transferred
from agent_sdk.workspace.disk import Progress


class RemoteFiles(Files):
    """The files of a workspace there."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        call = Download(path=path, channel=NO_CHANNEL, offset=offset, length=limit, as_is=True)
        while True:
            data = bytearray()
            try:
                async with incoming(self._link, call) as stream:
                    async for piece in stream:
                        data += piece
                return bytes(data)
            except ChangedDuringRead:  # while there was no connection: what came is of two states
                continue

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        async def content() -> AsyncGenerator[bytes, None]:
            yield data

        call = Upload(op_id=new_id(), path=path, channel=NO_CHANNEL, size=len(data), mode=mode)
        return await outgoing(self._link, call, Repeatable(content), Progress(None, len(data)))

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

    async def stat(self, path: str) -> FileInfo:
        return await ask(self._link, FilesStat(path=path))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        await ask(self._link, FilesRemove(op_id=new_id(), path=path, recursive=recursive))

    async def move(self, source: str, target: str) -> None:
        await ask(self._link, FilesMove(op_id=new_id(), source=source, target=target))

    async def mkdir(self, path: str) -> None:
        await ask(self._link, FilesMkdir(op_id=new_id(), path=path))


class RemoteGit(Git):
    """The git repository of a workspace there."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def changes(self, path: str = ".", *, base: str | None = None) -> list[GitChange]:
        return await ask(self._link, GitChanges(path=path, base=base))

    async def diff(self, path: str = ".", *, base: str | None = None) -> str:
        return (await ask(self._link, GitDiff(path=path, base=base))).text
