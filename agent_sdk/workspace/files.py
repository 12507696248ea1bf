"""The files of a workspace folder of this machine; see the contract in `agent_sdk.workspace.contract`."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.results import FileInfo, Transferred
from agent_sdk.workspace import entries
from agent_sdk.workspace.contract import Files
from agent_sdk.workspace.disk import AtomicFile, Source, in_thread
from agent_sdk.workspace.folders import pack
from agent_sdk.workspace.paths import Root

_LARGEST = 2**63 - 1


class LocalFiles(Files):
    """Implements `workspace.Files`; also what the byte streams of the workspace are made of."""

    def __init__(self, root: Root) -> None:
        self._root = root

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        _check_count(offset, "offset")
        if limit is not None:
            _check_count(limit, "limit")
        return await in_thread(entries.read, self._root, path, offset, limit)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        async with self._atomic(path, mode) as file:
            await file.write(data)
            return await file.commit()

    async def stat(self, path: str, *, follow: bool = False) -> FileInfo:
        """Describe a path; a symlink itself, with `follow` what it leads to."""
        return await in_thread(entries.describe, self._root, path, follow)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove what is at a path; a folder with content and no `recursive` is a PathError ENOTEMPTY."""
        await in_thread(entries.remove, self._root, path, recursive)

    async def move(self, source: str, target: str) -> None:
        """Rename, replacing an existing file; a symlink is moved itself."""
        await in_thread(entries.move, self._root, source, target)

    async def mkdir(self, path: str) -> None:
        await in_thread(entries.make_folder, self._root, path)

    @asynccontextmanager
    async def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None, as_is: bool = False
    ) -> AsyncIterator[Source]:
        """Open a file for reading, as Workspace.read_stream does; with `as_is` what `read` returns."""
        _check_count(offset, "offset")
        if length is not None:
            _check_count(length, "length")
        opened: list[Source] = []
        try:
            await in_thread(entries.open_source, self._root, path, offset, length, as_is, opened)
            yield opened[0]
        finally:
            for source in opened:
                source.close()

    async def write_stream(
        self,
        path: str,
        chunks: AsyncIterable[bytes],
        *,
        size: int | None = None,
        mode: int | None = None,
        unpack: bool = False,
    ) -> Transferred:
        """Write a file from pieces, as Workspace.write_stream does; with `unpack` an archive for a folder."""
        if size is not None:
            _check_count(size, "size")
        async with AsyncExitStack() as stack:
            if isinstance(chunks, AsyncGenerator):
                stack.push_async_callback(chunks.aclose)
            file = await stack.enter_async_context(self._atomic(path, mode, unpack=unpack))
            async for chunk in chunks:
                await file.write(chunk)
            return await file.commit(size=size)

    @asynccontextmanager
    async def _atomic(
        self, path: str, mode: int | None, *, unpack: bool = False
    ) -> AsyncIterator[AtomicFile]:
        opened: list[AtomicFile] = []
        try:
            await self.open_atomic(path, mode, opened, unpack=unpack)
            yield opened[0]
        finally:
            for file in opened:
                await in_thread(file.close)

    async def open_atomic(
        self, path: str, mode: int | None, opened: list[AtomicFile], *, unpack: bool = False
    ) -> None:
        """Open a file to be replaced as a whole, into `opened`, from where it has to be closed; parents are made.

        With `unpack` it is an archive, and `path` the folder it is for.
        """
        if mode is not None and not 0 <= mode <= 0o777:
            raise InvalidParams(f"mode: 0..0o777 (got {mode:#o})")
        if unpack:
            await in_thread(entries.open_archive, self._root, path, opened)
        else:
            await in_thread(entries.open_atomic, self._root, path, mode, opened)

    async def packed(self, path: str, exclude: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """Yield a folder as an archive; see folders.pack."""
        opened: list[int] = []
        try:
            await in_thread(entries.open_folder, self._root, path, opened)
            async with aclosing(pack(opened[0], path, exclude)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            for fd in opened:
                os.close(fd)

    async def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        """Return what is in a folder; a symlink to a folder below `path` is listed, not entered."""
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 64:
            raise InvalidParams(f"depth: 1..64 (got {depth!r:.40})")
        return await in_thread(entries.listing, self._root, path, depth, hidden)


def _check_count(value: object, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise InvalidParams(f"{field}: a number of bytes from 0 to 2**63-1 (got {value!r:.40})")
