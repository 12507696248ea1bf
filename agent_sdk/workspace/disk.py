"""Files of this machine, read and written in constant memory without holding up the event loop.

Reading notices when the file changes meanwhile. Writing goes to a temporary file in the target's
folder, is made durable and then renamed, so the target is the old file or the new one, never a part.
Nothing here is confined to a folder; `local/files.py` hands in folders it has already checked.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from os import PathLike
from typing import TypeVar, TypeVarTuple, Unpack

from agent_sdk.protocol.checks import OsText
from agent_sdk.protocol.errors import (
    AgentServerError,
    ChangedDuringRead,
    InvalidParams,
    IsADirectory,
    LimitExceeded,
    NotADirectory,
    NotARegularFile,
    PathDenied,
    PathError,
    PathExists,
    PathNotFound,
    StorageFull,
    TransferBroken,
)
from agent_sdk.protocol.results import Transferred
from agent_sdk.workspace.digest import sha256

PIECE_BYTES = 64 << 10
BLOCK_BYTES = 1 << 20
"""Disk is read and written in blocks of this size: one visit to a thread costs as much as copying 100 KiB."""
PERMISSIONS = 0o777
_NO_TMPFILE = (None, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
"""What a system says that has no files without a name; None: Python knows of none."""

LocalPath = OsText | PathLike[str]
"""Of this machine."""
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


OnProgress = Callable[[int, int], Awaitable[None] | None]
"""Called with how many bytes of a file have moved, and how many there are."""


class Progress:
    """How far a file has come, for who wants to know; over a second connection it is told from where it was."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress = on_progress
        self._total = total
        self._reached = -1

    async def watch(self, source: Source) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file that is on its way."""
        position = 0
        await self.reach(0)
        async for data in source:
            yield data
            position += len(data)
            await self.reach(position)

    async def reach(self, position: int) -> None:
        """So many bytes have moved."""
        if self._on_progress is not None and position > self._reached:
            self._reached = position
            waiting = self._on_progress(position, self._total)
            if inspect.isawaitable(waiting):
                await waiting


async def in_thread(work: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
    """Run blocking work in a thread and wait for its end, even when cancelled meanwhile.

    A thread cannot be stopped: giving up earlier would close descriptors under its hands.
    """
    try:
        future = asyncio.get_running_loop().run_in_executor(None, work, *args)
    except RuntimeError:  # the program is ending, and there are no threads any more
        return work(*args)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        future.exception()
        raise cancelled
    return future.result()


_BY_ERRNO: dict[int, type[AgentServerError]] = {
    errno.ENOENT: PathNotFound,
    errno.ENOTDIR: NotADirectory,
    errno.EISDIR: IsADirectory,
    errno.EEXIST: PathExists,
    errno.EACCES: PathDenied,
    errno.EPERM: PathDenied,
    errno.EROFS: PathDenied,
    errno.ENOSPC: StorageFull,
    errno.EDQUOT: StorageFull,
    errno.ENAMETOOLONG: InvalidParams,
    errno.EFBIG: LimitExceeded,
    errno.ENXIO: NotARegularFile,
}


def path_error(exc: OSError, path: str) -> AgentServerError:
    """Return the error of the contract for what the system said about a path; its words come first."""
    number = exc.errno or errno.EIO
    words = "not a regular file" if number == errno.ENXIO else os.strerror(number)
    cls = _BY_ERRNO.get(number, PathError)
    return cls(f"{words}: {path}", path=path, errno=errno.errorcode.get(number, "EIO"))


def refuse_irregular(mode: int, path: str) -> None:
    """Raise unless `mode` (st_mode) is that of a regular file."""
    if stat.S_ISDIR(mode):
        raise IsADirectory(f"Is a directory: {path}", path=path)
    if not stat.S_ISREG(mode):
        raise NotARegularFile(f"not a regular file: {path}", path=path)


class Source:
    """An open file and its bytes from `offset` on, in pieces of at most 64 KiB. It owns the descriptor."""

    def __init__(
        self, fd: int, path: str, *, offset: int = 0, length: int | None = None, as_is: bool = False
    ) -> None:
        """Takes over `fd`; it has to be open on a regular file.

        Args:
            offset: where to begin.
            length: how much at most.
            as_is: take what is there, also when the file changes meanwhile.
        """
        self._fd = fd
        self._path = path
        self._as_is = as_is
        self._first = os.fstat(fd)
        self.size = self._first.st_size
        self.mode = self._first.st_mode & PERMISSIONS
        self._position = offset
        self._end = self.size if length is None else min(self.size, offset + length)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the bytes in order.

        Raises:
            ChangedDuringRead: the file is not what it was when it was opened.
        """
        while self._position < self._end:
            block = memoryview(await in_thread(self._read_block))
            if not block:
                return
            for start in range(0, len(block), PIECE_BYTES):
                yield bytes(block[start : start + PIECE_BYTES])
        if not self._as_is:
            await in_thread(self._check_unchanged)

    def _read_block(self) -> bytes:
        try:
            data = os.pread(self._fd, min(BLOCK_BYTES, self._end - self._position), self._position)
        except OSError as exc:
            raise path_error(exc, self._path) from exc
        if not data and not self._as_is:
            raise ChangedDuringRead(f"the file became shorter: {self._path}", path=self._path)
        self._position += len(data)
        return data

    def _check_unchanged(self) -> None:
        now, first = os.fstat(self._fd), self._first
        if (now.st_size, now.st_mtime_ns) != (first.st_size, first.st_mtime_ns):
            raise ChangedDuringRead(f"the file changed: {self._path}", path=self._path)

    def close(self) -> None:
        """Close the descriptor; harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class AtomicFile:
    """A file that comes into being as a whole; see `atomic_file`."""

    def __init__(self, folder: int, name: bytes, path: str, mode: int | None = None) -> None:
        """Takes over the descriptor `folder`.

        Args:
            folder: the folder of the target.
            name: of the target in it.
            path: of the target, for messages.
            mode: permission bits; None: those of the file that is replaced, else 0o644 less the umask.
        """
        self._folder = folder
        self._name = name
        self._path = path
        self._mode = mode
        self._fd = -1
        self._temporary = b""
        self._replaced: os.stat_result | None = None
        self._buffer = bytearray()
        self._digest = sha256()
        self._size = 0

    async def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they go to the disk 1 MiB at a time."""
        self._buffer += data
        if len(self._buffer) >= BLOCK_BYTES:
            await in_thread(self._flush)

    @property
    def size(self) -> int:
        """How many bytes came so far."""
        return self._size + len(self._buffer)

    async def commit(
        self, *, size: int | None = None, digest: bytes | None = None, mode: int | None = None
    ) -> Transferred:
        """Make the file durable and put it in the target's place.

        Args:
            size: bytes that should have come.
            digest: their SHA-256.
            mode: as in the constructor, for those who learn it late.

        Raises:
            TransferBroken: what came differs from what should have come; nothing is kept.
        """
        if mode is not None:
            self._mode = mode
        return await in_thread(self._commit, size, digest)

    def open(self) -> None:
        """Make the temporary file. Blocks."""
        self._refuse()
        private = self._mode is not None or self._replaced is not None
        mode = 0o600 if private else 0o644
        try:  # Without a name: whatever kills this process, nothing is left.
            if not os.path.exists(_OPEN_FILES):
                raise OSError(errno.ENOSYS, "no /proc, where it gets its name in the end")
            self._fd = os.open(b".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=self._folder)
        except (OSError, AttributeError) as exc:
            if getattr(exc, "errno", None) not in _NO_TMPFILE:
                raise
            self._temporary = _hidden_name()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._temporary, flags, mode, dir_fd=self._folder)

    def _refuse(self) -> None:
        """Refuse to replace what is no file, or may not be written: a rename asks for the folder's permission only."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._replaced = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
            refuse_irregular(self._replaced.st_mode, self._path)
            os.close(os.open(self._name, flags, dir_fd=self._folder))
        except FileNotFoundError:
            pass
        except OSError as exc:
            if exc.errno != errno.ETXTBSY:  # a program that runs can be replaced, though not written
                raise

    def close(self) -> None:
        """Remove what was not committed. Blocks; harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._temporary:
            with suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._folder)
            self._temporary = b""
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)

    def _flush(self) -> None:
        view = memoryview(self._buffer)
        self._digest.update(view)
        self._size += len(view)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as exc:
            raise path_error(exc, self._path) from exc
        self._buffer = bytearray()

    def _commit(self, size: int | None, digest: bytes | None) -> Transferred:
        self._flush()
        if size is not None and size != self._size:
            raise TransferBroken(
                f"{size} bytes were announced and {self._size} came: {self._path}", path=self._path
            )
        if digest is not None and digest != self._digest.digest():
            raise TransferBroken(
                f"the SHA-256 of the {self._size} bytes that came differs from the sender's: {self._path}",
                path=self._path,
            )
        return Transferred(self._size, self._digest.hexdigest(), self._put())

    def fill(self, fd: int, offset: int, size: int, mtime: float) -> None:
        """Be a part of another file, and in the target's place; not durable by itself. Blocks."""
        while size:
            data = os.pread(fd, min(size, BLOCK_BYTES), offset)
            if not data:
                raise TransferBroken(f"{size} bytes are missing: {self._path}", path=self._path)
            offset, size = offset + len(data), size - len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        os.utime(self._fd, (mtime, mtime))
        self._put(durable=False)

    def _put(self, *, durable: bool = True) -> int:
        """Take the target's place; returns the mode."""
        try:
            mode = self._settle_mode()
            if durable:
                os.fsync(self._fd)
            if not self._temporary:
                name = _hidden_name()
                os.link(f"{_OPEN_FILES}/{self._fd}", name, dst_dir_fd=self._folder, follow_symlinks=True)
                self._temporary = name
            os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._temporary = b""
            if durable:
                _sync_folder(self._folder)
        except OSError as exc:
            raise path_error(exc, self._path) from exc
        return mode

    def _settle_mode(self) -> int:
        old = self._replaced
        if old is not None and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            with suppress(PermissionError):
                os.fchown(self._fd, old.st_uid, old.st_gid)
        if self._mode is not None:
            os.fchmod(self._fd, self._mode & PERMISSIONS)
        elif old is not None:
            os.fchmod(self._fd, old.st_mode & PERMISSIONS)
        return os.fstat(self._fd).st_mode & PERMISSIONS


_OPEN_FILES = "/proc/self/fd"


def _hidden_name() -> bytes:
    """A name that is short whatever the target's is: the file system's limit is 255 bytes for both."""
    return f".{os.urandom(8).hex()}.part".encode()


def _sync_folder(folder: int) -> None:
    """Make the rename durable, where the folder may be read and its file system can do that."""
    try:
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _make_folders(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def local_path(path: str | PathLike[str]) -> str:
    """Return a path of this machine as text."""
    text = os.fsdecode(os.fspath(path))
    if not text or "\0" in text:
        raise InvalidParams("the path on this machine is empty or contains a NUL character")
    return text


@asynccontextmanager
async def open_source(path: str | PathLike[str]) -> AsyncIterator[Source]:
    """Open a regular file of this machine for reading.

    Raises:
        PathNotFound, PathDenied, IsADirectory, NotARegularFile: as the path deserves.
    """
    opened: list[Source] = []
    try:
        await in_thread(_open_source, local_path(path), opened)
        yield opened[0]
    finally:
        for source in opened:
            source.close()


def _open_source(path: str, opened: list[Source]) -> None:
    try:
        # O_NONBLOCK: opening a FIFO nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as exc:
        raise path_error(exc, path) from exc
    source = Source(fd, path)
    opened.append(source)
    refuse_irregular(os.fstat(fd).st_mode, path)


@asynccontextmanager
async def atomic_file(path: str | PathLike[str], mode: int | None = None) -> AsyncIterator[AtomicFile]:
    """Open a file of this machine to be replaced as a whole; parents are made.

    Leaving without `commit`, for whatever reason, leaves the old file and nothing else.

    Raises:
        PathDenied, NotADirectory, IsADirectory, NotARegularFile, StorageFull: as the path deserves.
    """
    opened: list[AtomicFile] = []
    try:
        await in_thread(_open_atomic, local_path(path), mode, opened)
        yield opened[0]
    finally:
        for file in opened:
            await in_thread(file.close)


def _open_atomic(path: str, mode: int | None, opened: list[AtomicFile]) -> None:
    # A symlink stays: what it points to is replaced.
    folder, name = os.path.split(os.path.realpath(path))
    try:
        if not name or path.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _make_folders(folder)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        file = AtomicFile(fd, os.fsencode(name), path, mode)
        opened.append(file)
        file.open()
    except AgentServerError:
        raise
    except OSError as exc:
        raise path_error(exc, path) from exc
