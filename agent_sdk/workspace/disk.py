"""Files of this machine, read in constant memory without holding up the event loop.

Reading notices when the file changes meanwhile. Nothing here is confined to a folder; `files.py` hands in
descriptors of what it has already checked.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol, TypeVar, TypeVarTuple, Unpack

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
)

PIECE_BYTES = 64 << 10
BLOCK_BYTES = 1 << 20
"""Disk is read and written in blocks of this size: one visit to a thread costs as much as copying 100 KiB."""
PERMISSIONS = 0o777

LocalPath = OsText | PathLike[str]
"""Of this machine."""
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Closable(Protocol):
    """Something that is open."""

    def close(self) -> None:
        """Close it. Harmless when repeated."""
        ...


Opened = TypeVar("Opened", bound=Closable)

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
        """Count bytes that have moved."""
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
    try:
        await until_done(future)
    except asyncio.CancelledError:
        future.exception()  # who cancelled wants to hear nothing else
        raise
    return future.result()


async def until_done(*futures: asyncio.Future[Any]) -> None:
    """Wait until all of these are done, even when cancelled meanwhile; then be cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled


async def open_in_thread(work: Callable[[Unpack[Ts]], Opened], *args: *Ts) -> Opened:
    """Open something in a thread. When cancelled meanwhile, close what was opened."""
    opened: list[Opened] = []
    try:
        await in_thread(lambda: opened.append(work(*args)))
    except BaseException:
        for each in opened:
            await in_thread(each.close)
        raise
    return opened[0]


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


@dataclass(frozen=True)
class Folder:
    """An open folder."""

    fd: int
    path: str

    def close(self) -> None:
        """Close the descriptor; not to be repeated."""
        os.close(self.fd)


def open_folder(path: str) -> Folder:
    """Open a folder of this machine. Blocks."""
    try:
        return Folder(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)
    except OSError as exc:
        raise path_error(exc, path) from exc


class Source:
    """An open file and its bytes from `offset` on, in pieces of at most 64 KiB. It owns the descriptor."""

    def __init__(
        self, fd: int, path: str, *, offset: int = 0, length: int | None = None, as_is: bool = False
    ) -> None:
        """Take over `fd`, which is closed again unless it is open on a regular file.

        Args:
            fd: readable.
            path: for messages.
            offset: where to begin.
            length: how much at most.
            as_is: take what is there, also when the file changes meanwhile.

        Raises:
            IsADirectory, NotARegularFile: it is no regular file.
        """
        self._fd = fd
        self._path = path
        self._as_is = as_is
        self._first = os.fstat(fd)
        self.size = self._first.st_size
        self.mode = self._first.st_mode & PERMISSIONS
        self._position = offset
        self._end = max(offset, self.size if length is None else min(self.size, offset + length))
        try:
            refuse_irregular(self._first.st_mode, path)
        except PathError:
            self.close()
            raise

    @property
    def left(self) -> int:
        """How many bytes follow."""
        return self._end - self._position

    def read(self) -> bytes:
        """Return all that follows and is there. Blocks."""
        return b"".join(iter(self._read_block, b""))

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
    with closing(await open_in_thread(_open_source, local_path(path))) as source:
        yield source


def _open_source(path: str) -> Source:
    try:
        # O_NONBLOCK: opening a FIFO nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as exc:
        raise path_error(exc, path) from exc
    return Source(fd, path)
