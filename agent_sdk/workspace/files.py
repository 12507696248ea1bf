"""The files of a workspace folder of this machine; see the contract in `agent_sdk.workspace.contract`."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing, suppress
from typing import Literal

from agent_sdk.protocol.errors import (
    InvalidParams,
    LimitExceeded,
    NotADirectory,
    NotARegularFile,
    PathNotFound,
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
_LARGEST = 2**63 - 1
_KERNELS = ("/proc/", "/sys/")


class LocalFiles(Files):
    """Implements `workspace.Files`; also what the byte streams of the workspace are made of."""

    def __init__(self, root: Root) -> None:
        self._root = root

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        _check_count(offset, "offset")
        if limit is not None:
            _check_count(limit, "limit")
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
        self, path: str, *, offset: int = 0, length: int | None = None, as_is: bool = False
    ) -> AsyncIterator[Source]:
        """Open a file for reading, as Workspace.read_stream does; with `as_is` what `read` returns."""
        _check_count(offset, "offset")
        if length is not None:
            _check_count(length, "length")
        opened = await open_in_thread(_open_source, self._root, path, offset, length, as_is)
        with closing(opened) as source:
            yield source

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
            file = await self.open_atomic(path, mode, unpack=unpack)
            stack.push_async_callback(file.aclose)
            async for chunk in chunks:
                await file.write(chunk)
            return await file.commit(size=size)

    async def open_atomic(self, path: str, mode: int | None, *, unpack: bool = False) -> AtomicFile:
        """Open a file to be replaced as a whole, which has to be closed; parents are made.

        With `unpack` it is an archive, and `path` the folder it is for.
        """
        if mode is not None and not 0 <= mode <= 0o777:
            raise InvalidParams(f"mode: 0..0o777 (got {mode:#o})")
        if unpack:
            return await open_in_thread(_open_archive, self._root, path)
        return await open_in_thread(_open_atomic, self._root, path, mode)

    async def packed(self, path: str, exclude: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """Yield a folder as an archive."""
        with closing(await open_in_thread(_open_folder, self._root, path)) as folder:
            async with aclosing(pack(folder, exclude)) as pieces:
                async for piece in pieces:
                    yield piece

    async def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        """Return what is in a folder; a symlink to a folder below `path` is listed, not entered."""
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 64:
            raise InvalidParams(f"depth: 1..64 (got {depth!r:.40})")
        return await in_thread(_listing, self._root, path, depth, hidden)


def _check_count(value: object, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise InvalidParams(f"{field}: a number of bytes from 0 to 2**63-1 (got {value!r:.40})")


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
