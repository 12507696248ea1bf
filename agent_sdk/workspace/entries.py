"""What can be done with a file or folder below a root. Everything here blocks; `files.py` calls it in threads."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Literal

from agent_sdk.protocol.errors import (
    InvalidParams,
    LimitExceeded,
    NotADirectory,
    NotARegularFile,
    PathError,
    PathNotFound,
)
from agent_sdk.protocol.results import FileInfo
from agent_sdk.workspace.disk import AtomicFile, Source, refuse_irregular
from agent_sdk.workspace.folders import FolderFile
from agent_sdk.workspace.paths import Entry, Root

READ_BYTES = 64 << 20
ENTRIES = 100_000
_KERNELS = ("/proc/", "/sys/")


def open_atomic(root: Root, path: str, mode: int | None, opened: list[AtomicFile]) -> None:
    """Open a file to be replaced as a whole, into `opened`; parents are made."""
    with root.entry(path, made=[]) as entry:
        entry.check_file_name()
        _refuse_kernels(root, entry)
        file = AtomicFile(os.dup(entry.folder), entry.name, path, mode)
        opened.append(file)
        file.open()


def open_archive(root: Root, path: str, opened: list[AtomicFile]) -> None:
    """Open what an archive is written to that comes for this folder, into `opened`; the folder is made."""
    made = make_folder(root, path)
    with root.entry(path) as entry:
        file = FolderFile(entry.open(os.O_RDONLY | os.O_DIRECTORY), path, made)
        opened.append(file)
        file.open()


def open_folder(root: Root, path: str, opened: list[int]) -> None:
    """Open a folder, into `opened`."""
    with root.entry(path) as entry:
        opened.append(entry.open(os.O_RDONLY | os.O_DIRECTORY))


def open_source(
    root: Root, path: str, offset: int, length: int | None, as_is: bool, opened: list[Source]
) -> None:
    """Open a regular file for reading, into `opened`; with `as_is` as `read` does."""
    with root.entry(path) as entry:
        fd = _open_file(root, entry)
        opened.append(Source(fd, path, offset=offset, length=length, as_is=as_is))
        if as_is:
            _readable(fd, path, offset, length)


def read(root: Root, path: str, offset: int, limit: int | None) -> bytes:
    """Return bytes of a regular file, as they are."""
    with root.entry(path) as entry:
        fd = _open_file(root, entry)
        try:
            return _read_up_to(fd, offset, _readable(fd, path, offset, limit))
        finally:
            os.close(fd)


def _readable(fd: int, path: str, offset: int, limit: int | None) -> int:
    """Return how many bytes there are to read."""
    left = max(0, os.fstat(fd).st_size - offset)
    wanted = left if limit is None else min(left, limit)
    if wanted > READ_BYTES:
        raise LimitExceeded(
            f"limit: at most {READ_BYTES} bytes at once, and these are {wanted}; read a part, or download it: {path}",
            field="limit",
            limit=READ_BYTES,
            got=wanted,
            path=path,
        )
    return wanted


def listing(root: Root, path: str, depth: int, hidden: bool) -> list[FileInfo]:
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


def describe(root: Root, path: str, follow: bool) -> FileInfo:
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


def remove(root: Root, path: str, recursive: bool) -> None:
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


def move(root: Root, source: str, target: str) -> None:
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


def make_folder(root: Root, path: str) -> list[bytes]:
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


def _open_file(root: Root, entry: Entry) -> int:
    found = entry.stat()
    if found is None:
        raise PathNotFound(f"No such file or directory: {entry.shown}", path=entry.shown)
    refuse_irregular(found.st_mode, entry.shown)
    _refuse_kernels(root, entry)
    fd = entry.open(os.O_RDONLY)
    try:
        refuse_irregular(os.fstat(fd).st_mode, entry.shown)
    except PathError:
        os.close(fd)
        raise
    return fd


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
