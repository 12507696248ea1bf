"""Files and git there."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ChangedDuringRead
from agent_sdk.protocol.methods.workspace import (
    LISTED,
    Download,
    FilesList,
    GitDiff,
    Upload,
)
from agent_sdk.remote.link import ask_page
from agent_sdk.remote.transfers import NO_CHANNEL, Repeatable, incoming, outgoing
from agent_sdk.remote.verbs import Part
from agent_sdk.workspace.contract import FileInfo, Files, Git, Transferred
from agent_sdk.workspace.disk import Progress


class RemoteFiles(Part, Files, part="files"):
    """The files of a workspace there."""

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


class RemoteGit(Part, Git, part="git"):
    """The git repository of a workspace there."""

    async def diff(self, path: str = ".", *, base: str | None = None) -> str:
        return (await self._ask(GitDiff(path=path, base=base))).text
