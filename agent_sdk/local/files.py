"""The files of a workspace folder of this machine; see the contract in `agent_sdk.workspace`."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from agent_sdk.disk import AtomicFile, Source, in_thread, refuse_irregular
from agent_sdk.local.paths import Entry, Root
from agent_sdk.protocol.errors import (
    InvalidParams,
    LimitExceeded,
    NotADirectory,
    PathError,
    PathNotFound,
)
from agent_sdk.protocol.results import FileInfo, Transferred

READ_BYTES = 64 << 20
ENTRIES = 10_000
_LARGEST = 2**63 - 1


class LocalFiles:
    """Implements `workspace.Files`; also what the byte streams of the workspace are made of."""

    def __init__(self, root: Root) -> None:
        self._root = root

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """See Files.read."""
        _check_count(offset, "offset")
        if limit is not None:
            _check_count(limit, "limit")
        return await in_thread(self._read, path, offset, limit)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        """See Files.write."""
        async with self._atomic(path, mode) as file:
            await file.write(data)
            return await file.commit()

    async def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        """See Files.list; a symlink to a folder below `path` is listed, not entered."""
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 64:
            raise InvalidParams(f"depth: 1..64 (got {depth!r:.40})")
        return await in_thread(self._list, path, depth, hidden)

    async def stat(self, path: str) -> FileInfo:
        """See Files.stat."""
        return await in_thread(self._stat, path)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """See Files.remove; a folder with content and no `recursive` is a PathError ENOTEMPTY."""
        await in_thread(self._remove, path, recursive)

    async def move(self, source: str, target: str) -> None:
        """See Files.move; a symlink is moved itself."""
        await in_thread(self._move, source, target)

    async def mkdir(self, path: str) -> None:
        """See Files.mkdir."""
        await in_thread(self._mkdir, path)

    @asynccontextmanager
    async def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[Source]:
        """See Workspace.read_stream."""
        _check_count(offset, "offset")
        if length is not None:
            _check_count(length, "length")
        opened: list[Source] = []
        try:
            await in_thread(self._open_source, path, offset, length, opened)
            yield opened[0]
        finally:
            for source in opened:
                source.close()

    async def write_stream(
        self, path: str, chunks: AsyncIterable[bytes], *, size: int | None = None, mode: int | None = None
    ) -> Transferred:
        """See Workspace.write_stream."""
        if size is not None:
            _check_count(size, "size")
        async with self._atomic(path, mode) as file:
            async for chunk in chunks:
                await file.write(chunk)
            return await file.commit(size=size)

    @asynccontextmanager
    async def _atomic(self, path: str, mode: int | None) -> AsyncIterator[AtomicFile]:
        if mode is not None and not 0 <= mode <= 0o777:
            raise InvalidParams(f"mode: 0..0o777 (got {mode:#o})")
        opened: list[AtomicFile] = []
        try:
            await in_thread(self._open_atomic, path, mode, opened)
            yield opened[0]
        finally:
            for file in opened:
                await in_thread(file.close)

    # --- what blocks ---

    def _open_atomic(self, path: str, mode: int | None, opened: list[AtomicFile]) -> None:
        with self._root.entry(path, make_parents=True) as entry:
            entry.check_file_name()
            file = AtomicFile(os.dup(entry.folder), entry.name, path, mode)
            opened.append(file)
            file.open()

    def _open_source(self, path: str, offset: int, length: int | None, opened: list[Source]) -> None:
        with self._root.entry(path) as entry:
            fd = _open_file(entry)
            opened.append(Source(fd, path, offset=offset, length=length))

    def _read(self, path: str, offset: int, limit: int | None) -> bytes:
        with self._root.entry(path) as entry:
            fd = _open_file(entry)
            try:
                wanted = READ_BYTES + 1 if limit is None else min(limit, READ_BYTES + 1)
                data = _read_up_to(fd, offset, wanted)
            finally:
                os.close(fd)
        if len(data) > READ_BYTES:
            raise LimitExceeded(
                f"limit: at most {READ_BYTES} bytes at once: {path}",
                field="limit",
                limit=READ_BYTES,
                path=path,
            )
        return data

    def _list(self, path: str, depth: int, hidden: bool) -> list[FileInfo]:
        found: list[FileInfo] = []
        with self._root.entry(path) as entry:
            names = entry.names
            fd = _open_folder(entry)
        try:
            self._list_folder(fd, names, depth, hidden, found)
        finally:
            os.close(fd)
        return sorted(found, key=lambda info: info.path)

    def _list_folder(
        self, fd: int, names: tuple[bytes, ...], depth: int, hidden: bool, found: list[FileInfo]
    ) -> None:
        for name in sorted(map(os.fsencode, os.listdir(fd))):
            if len(found) >= ENTRIES:
                return
            if not hidden and name.startswith(b"."):
                continue
            try:
                state = os.stat(name, dir_fd=fd, follow_symlinks=False)
                found.append(self._info(fd, name, (*names, name), state))
                if depth > 1 and stat.S_ISDIR(state.st_mode):
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    below = os.open(name, flags, dir_fd=fd)
                    try:
                        self._list_folder(below, (*names, name), depth - 1, hidden, found)
                    finally:
                        os.close(below)
            except OSError:
                continue  # gone meanwhile, or not for us to see into

    def _stat(self, path: str) -> FileInfo:
        with self._root.entry(path, follow=False) as entry:
            found = entry.stat()
            if found is None:
                raise PathNotFound(f"no such file or folder: {path}", path=path)
            if entry.slash and not stat.S_ISDIR(found.st_mode):
                raise NotADirectory(f"not a folder: {path}", path=path)
            return self._info(entry.folder, entry.name, entry.names, found)

    def _info(self, folder: int, name: bytes, names: tuple[bytes, ...], found: os.stat_result) -> FileInfo:
        kind = _kind(found.st_mode)
        target = os.readlink(name, dir_fd=folder) if kind == "symlink" else None
        return FileInfo(
            path=self._root.shown(names),
            type=kind,
            size=found.st_size,
            mode=found.st_mode & 0o777,
            modified_at=found.st_mtime,
            target=None if target is None else target.decode("utf-8", "backslashreplace"),
        )

    def _remove(self, path: str, recursive: bool) -> None:
        with self._root.entry(path, follow=False) as entry:
            _refuse_root(entry)
            found = entry.stat()
            if found is None:
                raise PathNotFound(f"no such file or folder: {path}", path=path)
            if stat.S_ISDIR(found.st_mode):
                if recursive:
                    shutil.rmtree(os.fsdecode(entry.name), dir_fd=entry.folder)
                else:
                    os.rmdir(entry.name, dir_fd=entry.folder)
            elif entry.slash:
                raise NotADirectory(f"not a folder: {path}", path=path)
            else:
                os.unlink(entry.name, dir_fd=entry.folder)

    def _move(self, source: str, target: str) -> None:
        with self._root.entry(source, follow=False) as old:
            _refuse_root(old)
            found = old.stat()
            if found is None:
                raise PathNotFound(f"no such file or folder: {source}", path=source)
            is_folder = stat.S_ISDIR(found.st_mode)
            if old.slash and not is_folder:
                raise NotADirectory(f"not a folder: {source}", path=source)
            with self._root.entry(target, follow=False, make_parents=True, field="target") as new:
                _refuse_root(new)
                if not is_folder:
                    new.check_file_name()
                if new.names[: len(old.names)] == old.names and new.names != old.names:
                    raise InvalidParams(f"target: a folder cannot move into itself: {target}")
                os.rename(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)

    def _mkdir(self, path: str) -> None:
        with self._root.entry(path, make_parents=True) as entry:
            try:
                os.mkdir(entry.name, dir_fd=entry.folder)
            except FileExistsError:
                found = entry.stat()
                if found is None or not stat.S_ISDIR(found.st_mode):
                    raise NotADirectory(f"exists and is not a folder: {path}", path=path) from None


def _check_count(value: object, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise InvalidParams(f"{field}: a number of bytes from 0 to 2**63-1 (got {value!r:.40})")


def _refuse_root(entry: Entry) -> None:
    if entry.name == b".":
        raise InvalidParams(f"path: the root itself cannot be moved or removed: {entry.shown}")


def _open_file(entry: Entry) -> int:
    found = entry.stat()
    if found is None:
        raise PathNotFound(f"no such file: {entry.shown}", path=entry.shown)
    refuse_irregular(found.st_mode, entry.shown)
    fd = entry.open(os.O_RDONLY)
    try:
        refuse_irregular(os.fstat(fd).st_mode, entry.shown)
    except PathError:
        os.close(fd)
        raise
    return fd


def _open_folder(entry: Entry) -> int:
    return entry.open(os.O_RDONLY | os.O_DIRECTORY)


def _read_up_to(fd: int, offset: int, wanted: int) -> bytes:
    blocks: list[bytes] = []
    while wanted > 0:
        block = os.pread(fd, min(wanted, 1 << 20), offset)
        if not block:
            break
        blocks.append(block)
        wanted -= len(block)
        offset += len(block)
    return b"".join(blocks)


def _kind(mode: int) -> Literal["file", "dir", "symlink", "other"]:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "dir"
    return "symlink" if stat.S_ISLNK(mode) else "other"
