"""The files of a workspace folder of this machine.

They may come in parts: what has come of an upload whose bytes broke off waits for the rest.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing, suppress
from dataclasses import dataclass
from typing import Literal

from agent_sdk.protocol.checks import Count, Mode, Path
from agent_sdk.protocol.errors import (
    ConnectionLost,
    InvalidParams,
    LimitExceeded,
    NotADirectory,
    NotARegularFile,
    OpMismatch,
    PathNotFound,
    TransferBroken,
)
from agent_sdk.protocol.results import FileInfo, Transferred
from agent_sdk.workspace.atomic_file import AtomicFile
from agent_sdk.workspace.contract import Files
from agent_sdk.workspace.disk import (
    Folder,
    Source,
    in_thread,
    open_in_thread,
    refuse_irregular,
)
from agent_sdk.workspace.folders import FolderFile, pack
from agent_sdk.workspace.paths import Entry, Root

READ_BYTES = 64 << 20
ENTRIES = 100_000
KEPT_SECONDS = 600.0
KEPT = 32
"""More than that may not wait at the same time; the oldest gives way."""
_KERNELS = ("/proc/", "/sys/")


class LocalFiles(Files):
    """Implements `workspace.Files`; also what the byte streams of the workspace are made of."""

    def __init__(self, root: Root) -> None:
        self._root = root

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        return await in_thread(_read, self._root, path, offset, limit)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        async with aclosing(await self.open_atomic(path, mode)) as file:
            await file.write(data)
            return await file.commit()

    async def stat(self, path: str, *, follow: bool = False) -> FileInfo:
        """Describe a path; a symlink itself, with `follow` what it leads to."""
        return await in_thread(_describe, self._root, path, follow)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove what is at a path; a folder with content and no `recursive` is a PathError ENOTEMPTY."""
        await in_thread(_remove, self._root, path, recursive)

    async def move(self, source: str, target: str) -> None:
        """Rename, replacing an existing file; a symlink is moved itself."""
        await in_thread(_move, self._root, source, target)

    async def mkdir(self, path: str) -> None:
        await in_thread(_make_folder, self._root, path)

    @asynccontextmanager
    async def read_stream(
        self, path: Path, *, offset: Count = 0, length: Count | None = None, as_is: bool = False
    ) -> AsyncIterator[Source]:
        """Open a file for reading, as Workspace.read_stream does; with `as_is` what `read` returns."""
        opened = await open_in_thread(_open_source, self._root, path, offset, length, as_is)
        with closing(opened) as source:
            yield source

    async def write_stream(
        self,
        path: Path,
        chunks: AsyncIterable[bytes],
        *,
        size: Count | None = None,
        mode: Mode | None = None,
        unpack: bool = False,
    ) -> Transferred:
        """Write a file from pieces, as Workspace.write_stream does; with `unpack` an archive for a folder."""
        async with AsyncExitStack() as stack:
            if isinstance(chunks, AsyncGenerator):
                stack.push_async_callback(chunks.aclose)
            file = await self.open_atomic(path, mode, unpack=unpack)
            stack.push_async_callback(file.aclose)
            async for chunk in chunks:
                await file.write(chunk)
            return await file.commit(size=size)

    async def open_atomic(self, path: Path, mode: Mode | None, *, unpack: bool = False) -> AtomicFile:
        """Open a file to be replaced as a whole, which has to be closed; parents are made.

        With `unpack` it is an archive, and `path` the folder it is for.
        """
        if unpack:
            return await open_in_thread(_open_archive, self._root, path)
        return await open_in_thread(_open_atomic, self._root, path, mode)

    async def packed(self, path: Path, exclude: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """Yield a folder as an archive."""
        with closing(await open_in_thread(_open_folder, self._root, path)) as folder:
            async with aclosing(pack(folder, exclude)) as pieces:
                async for piece in pieces:
                    yield piece

    async def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        """Return what is in a folder; a symlink to a folder below `path` is listed, not entered."""
        return await in_thread(_listing, self._root, path, depth, hidden)


# --- what blocks: the same below a root, in a thread ---


def _open_atomic(root: Root, path: str, mode: int | None) -> AtomicFile:
    with root.entry(path, made=[]) as entry:
        entry.check_file_name()
        _refuse_kernels(root, entry)
        return AtomicFile(os.dup(entry.folder), entry.name, path, mode).open()


def _open_archive(root: Root, path: str) -> FolderFile:
    """Open what an archive is written to that comes for this folder; the folder is made."""
    made = _make_folder(root, path)
    with root.entry(path) as entry:
        return FolderFile(entry.open(os.O_RDONLY | os.O_DIRECTORY), path, made).open()


def _open_folder(root: Root, path: str) -> Folder:
    with root.entry(path) as entry:
        return Folder(entry.open(os.O_RDONLY | os.O_DIRECTORY), path)


def _open_source(root: Root, path: str, offset: int, length: int | None, as_is: bool) -> Source:
    """Open a regular file for reading; with `as_is` no more of it than is read at once."""
    with root.entry(path) as entry:
        found = entry.stat()
        if found is None:
            raise PathNotFound(f"No such file or directory: {path}", path=path)
        refuse_irregular(found.st_mode, path)
        _refuse_kernels(root, entry)
        source = Source(entry.open(os.O_RDONLY), path, offset=offset, length=length, as_is=as_is)
    if as_is and (wanted := source.left) > READ_BYTES:
        source.close()
        raise LimitExceeded(
            f"limit: at most {READ_BYTES} bytes at once, and these are {wanted}; read a part, or download it: {path}",
            field="limit",
            limit=READ_BYTES,
            got=wanted,
            path=path,
        )
    return source


def _read(root: Root, path: str, offset: int, limit: int | None) -> bytes:
    with closing(_open_source(root, path, offset, limit, as_is=True)) as source:
        return source.read()


def _listing(root: Root, path: str, depth: int, hidden: bool) -> list[FileInfo]:
    """Return what is in a folder, sorted by path."""
    with root.entry(path) as entry:
        listing = _Listing(root, hidden)
        fd = entry.open(os.O_RDONLY | os.O_DIRECTORY)
        try:
            listing.add_folder(fd, entry.names, depth)
        finally:
            os.close(fd)
    if listing.count > ENTRIES:
        raise LimitExceeded(
            f"path: {listing.count} entries {depth} levels deep, and at most {ENTRIES} are listed; "
            f"list a folder in it, or fewer levels: {path}",
            field="path",
            limit=ENTRIES,
            got=listing.count,
            path=path,
        )
    return sorted(listing.found, key=lambda info: info.path)


class _Listing:
    def __init__(self, root: Root, hidden: bool) -> None:
        self._root = root
        self._hidden = hidden
        self.found: list[FileInfo] = []
        self.count = 0
        """Also of those that are too many."""

    def add_folder(self, fd: int, names: tuple[bytes, ...], depth: int) -> None:
        for name in sorted(map(os.fsencode, os.listdir(fd))):
            if self._hidden or not name.startswith(b"."):
                with suppress(OSError):  # gone meanwhile, or not for us to see into
                    self._add(fd, name, (*names, name), depth)

    def _add(self, fd: int, name: bytes, names: tuple[bytes, ...], depth: int) -> None:
        state = os.stat(name, dir_fd=fd, follow_symlinks=False)
        self.count += 1
        if self.count <= ENTRIES:
            self.found.append(_info(self._root, fd, name, names, state))
        if depth > 1 and stat.S_ISDIR(state.st_mode):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                self.add_folder(below, names, depth - 1)
            finally:
                os.close(below)


def _describe(root: Root, path: str, follow: bool) -> FileInfo:
    """Describe a path, a symlink itself or what it leads to."""
    with root.entry(path, follow=follow) as entry:
        found = entry.stat()
        if found is None:
            raise PathNotFound(f"No such file or directory: {path}", path=path)
        if entry.slash and not stat.S_ISDIR(found.st_mode):
            raise NotADirectory(f"Not a directory: {path}", path=path)
        return _info(root, entry.folder, entry.name, entry.names, found)


def _info(root: Root, folder: int, name: bytes, names: tuple[bytes, ...], found: os.stat_result) -> FileInfo:
    kind = _kind(found.st_mode)
    target = os.readlink(name, dir_fd=folder) if kind == "symlink" else None
    return FileInfo(
        path=root.shown(names),
        type=kind,
        size=found.st_size,
        mode=found.st_mode & 0o777,
        modified_at=found.st_mtime,
        target=None if target is None else target.decode("utf-8", "backslashreplace"),
    )


def _remove(root: Root, path: str, recursive: bool) -> None:
    """Remove a file, a symlink or a folder."""
    with root.entry(path, follow=False) as entry:
        _refuse_home(root, entry)
        found = entry.stat()
        if found is None:
            raise PathNotFound(f"No such file or directory: {path}", path=path)
        if stat.S_ISDIR(found.st_mode):
            if recursive:
                import shutil  # noqa: PLC0415  1 MB of compression modules, rarely needed

                shutil.rmtree(os.fsdecode(entry.name), dir_fd=entry.folder)
            else:
                os.rmdir(entry.name, dir_fd=entry.folder)
        elif entry.slash:
            raise NotADirectory(f"Not a directory: {path}", path=path)
        else:
            os.unlink(entry.name, dir_fd=entry.folder)


def _move(root: Root, source: str, target: str) -> None:
    """Rename; an existing file is replaced."""
    with root.entry(source, follow=False) as old:
        _refuse_home(root, old)
        found = old.stat()
        if found is None:
            raise PathNotFound(f"No such file or directory: {source}", path=source)
        is_folder = stat.S_ISDIR(found.st_mode)
        if old.slash and not is_folder:
            raise NotADirectory(f"Not a directory: {source}", path=source)
        with root.entry(target, follow=False, made=[], field="target") as new:
            _refuse_home(root, new)
            if not is_folder:
                new.check_file_name()
            if new.names[: len(old.names)] == old.names and new.names != old.names:
                raise InvalidParams(f"target: a folder cannot move into itself: {target}")
            os.rename(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)


def _make_folder(root: Root, path: str) -> list[bytes]:
    """Make a folder and its parents; returns the names of those that were not there."""
    made: list[bytes] = []
    with root.entry(path, made=made) as entry:
        try:
            os.mkdir(entry.name, dir_fd=entry.folder)
            made.append(entry.name)
        except FileExistsError:
            found = entry.stat()
            if found is None or not stat.S_ISDIR(found.st_mode):
                raise NotADirectory(f"Not a directory: {path}", path=path) from None
    return made


def _refuse_home(root: Root, entry: Entry) -> None:
    if root.leads_home(entry.names):
        raise InvalidParams(f"path: the root itself cannot be moved or removed: {entry.shown}")


def _refuse_kernels(root: Root, entry: Entry) -> None:
    """Files of the kernel say that they are regular, but have no size, may not end, or do something when read."""
    if root.absolute(entry.names).startswith(_KERNELS):
        raise NotARegularFile(f"not a regular file: {entry.shown}", path=entry.shown)


def _kind(mode: int) -> Literal["file", "dir", "symlink", "other"]:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "dir"
    return "symlink" if stat.S_ISLNK(mode) else "other"


class Uploads:
    """Files that come in parts. Nothing of them is to be seen before all has come and was verified."""

    def __init__(self, files: LocalFiles, *, seconds: float = KEPT_SECONDS) -> None:
        """Take the files they go to, and for how long a part waits."""
        self._files = files
        self._seconds = seconds
        self._waiting: dict[str, _Part] = {}
        self._coming: dict[str, asyncio.Task[object]] = {}
        self._leaving: set[str] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def size(self, op_id: str) -> int:
        """Return how many bytes of an upload wait for the rest."""
        return self._waiting[op_id].file.size if op_id in self._waiting else 0

    def give_way(self, op_id: str) -> bool:
        """Let go of the bytes that come for this upload just now, if any do: others will, over another connection."""
        if (task := self._coming.get(op_id)) is None:
            return False
        self._leaving.add(op_id)
        return task.cancel()

    async def receive(
        self,
        op_id: str,
        path: str,
        pieces: AsyncIterable[tuple[int, bytes]],
        digest: Callable[[], bytes],
        *,
        since: int,
        size: int | None,
        mode: int | None,
        unpack: bool,
    ) -> Transferred:
        """Write a file from pieces with their offsets, on behind what has come of it.

        Args:
            op_id: names the upload.
            path: of the file.
            pieces: what comes.
            digest: the SHA-256 of the whole, asked for when all has come.
            since: where the pieces begin; 0: anew.
            size: of the whole.
            mode: permission bits.
            unpack: it is an archive, for a folder.

        Raises:
            TransferBroken: it broke off, and what has come is kept; or what came is not what was sent.
        """
        if not since and op_id in self._waiting:
            self._drop(op_id)
        file = await self._take(op_id, path, mode, unpack)
        try:
            await self._append(op_id, file, pieces, since)
        except (ConnectionLost, TransferBroken) as exc:
            self._keep(op_id, path, mode, file)
            raise TransferBroken(f"it broke off after {file.size} bytes, which are kept: {exc}") from None
        except BaseException:
            await file.aclose()
            raise
        async with aclosing(file):
            return await file.commit(size=size, digest=digest())

    async def _append(
        self, op_id: str, file: AtomicFile, pieces: AsyncIterable[tuple[int, bytes]], since: int
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._coming[op_id] = task
        try:
            if since != file.size:
                raise TransferBroken(f"since: it goes on at {file.size} (got {since})")
            async for offset, data in pieces:
                if offset != file.size:
                    raise TransferBroken(f"bytes are missing at {file.size}")
                await file.write(data)
        except asyncio.CancelledError:
            if op_id not in self._leaving:
                raise
            task.uncancel()
            raise TransferBroken("another call goes on with it") from None
        finally:
            self._leaving.discard(op_id)
            del self._coming[op_id]

    async def close(self) -> None:
        """Remove what waits."""
        for op_id in tuple(self._waiting):
            self._drop(op_id)
        await asyncio.gather(*self._closing)

    async def _take(self, op_id: str, path: str, mode: int | None, unpack: bool) -> AtomicFile:
        if (part := self._waiting.pop(op_id, None)) is not None:
            if (part.path, part.mode) != (path, mode):
                self._waiting[op_id] = part
                raise OpMismatch(f"op_id {op_id} came before with other params", op_id=op_id)
            part.timer.cancel()
            return part.file
        return await self._files.open_atomic(path, mode, unpack=unpack)

    def _keep(self, op_id: str, path: str, mode: int | None, file: AtomicFile) -> None:
        timer = asyncio.get_running_loop().call_later(self._seconds, self._drop, op_id)
        self._waiting[op_id] = _Part(path, mode, file, timer)
        if len(self._waiting) > KEPT:
            self._drop(next(iter(self._waiting)))

    def _drop(self, op_id: str) -> None:
        part = self._waiting.pop(op_id)
        part.timer.cancel()
        closing = asyncio.create_task(part.file.aclose())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


@dataclass(frozen=True)
class _Part:
    """What has come of a file, and when that is given up."""

    path: str
    mode: int | None
    file: AtomicFile
    timer: asyncio.TimerHandle
