"""Files that are replaced as a whole: the target is the old file or the new one, never a part.

What is written goes to a temporary file in the target's folder, is made durable and then renamed. Nothing here is
confined to a folder; `files.py` hands in folders it has already checked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from os import PathLike
from typing import Self

from agent_sdk.ids import sha256
from agent_sdk.protocol.errors import AgentServerError, TransferBroken
from agent_sdk.protocol.results import Transferred
from agent_sdk.workspace.disk import (
    BLOCK_BYTES,
    PERMISSIONS,
    in_thread,
    local_path,
    open_in_thread,
    path_error,
    refuse_irregular,
)

_NO_TMPFILE = (None, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
"""What a system says that has no files without a name; None: Python knows of none."""
_OPEN_FILES = "/proc/self/fd"


class AtomicFile:
    """A file that comes into being as a whole, or not at all."""

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

    def open(self) -> Self:
        """Make the temporary file; when that fails, close all. Blocks."""
        try:
            self._refuse()
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def _make(self) -> None:
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

    async def aclose(self) -> None:
        """Remove what was not committed, without blocking the loop; harmless when repeated."""
        await in_thread(self.close)

    def _write_all(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _flush(self) -> None:
        self._digest.update(self._buffer)
        self._size += len(self._buffer)
        try:
            self._write_all(self._buffer)
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
            self._write_all(data)
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


@asynccontextmanager
async def atomic_file(path: str | PathLike[str], mode: int | None = None) -> AsyncIterator[AtomicFile]:
    """Open a file of this machine to be replaced as a whole; parents are made.

    Leaving without `commit`, for whatever reason, leaves the old file and nothing else.

    Raises:
        PathDenied, NotADirectory, IsADirectory, NotARegularFile, StorageFull: as the path deserves.
    """
    async with aclosing(await open_in_thread(_open_atomic, local_path(path), mode)) as file:
        yield file


def _open_atomic(path: str, mode: int | None) -> AtomicFile:
    # A symlink stays: what it points to is replaced.
    folder, name = os.path.split(os.path.realpath(path))
    try:
        if not name or path.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _make_folders(folder)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return AtomicFile(fd, os.fsencode(name), path, mode).open()
    except AgentServerError:
        raise
    except OSError as exc:
        raise path_error(exc, path) from exc
