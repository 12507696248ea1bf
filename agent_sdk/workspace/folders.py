"""Folders on their way, as one stream: a tar archive that is made while it is sent, and unpacked when all has come.

Files, folders and symlinks travel, with permission bits and times. A symlink that leads out of the folder, a
device, a FIFO or a socket is refused by both ends, with its name; `exclude` leaves such things out. An archive
that comes is only believed as far as it was checked: no name and no link in it leads out of its folder.

What is unpacked is added to what is there: files of the same name are replaced, each as a whole, others stay.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, closing, suppress
from fnmatch import fnmatchcase
from os import PathLike
from typing import TYPE_CHECKING

from agent_sdk.protocol.errors import (
    AgentServerError,
    ChangedDuringRead,
    LimitExceeded,
    NotADirectory,
    NotARegularFile,
    OutsideWorkspace,
    TransferBroken,
)
from agent_sdk.protocol.results import Transferred
from agent_sdk.workspace.atomic_file import AtomicFile
from agent_sdk.workspace.disk import (
    BLOCK_BYTES,
    PIECE_BYTES,
    Folder,
    in_thread,
    local_path,
    open_folder,
    open_in_thread,
    path_error,
)

if TYPE_CHECKING:
    import tarfile

ENTRIES = 1_000_000
DEPTH = 200
HEAD_BYTES = 1 << 20
"""More than any honest entry needs for its name."""
NAME_BYTES = 4096
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


async def packed(folder: str | PathLike[str], exclude: Sequence[str]) -> AsyncGenerator[bytes, None]:
    """Yield a folder of this machine as an archive, in pieces of at most 64 KiB."""
    with closing(await open_in_thread(open_folder, local_path(folder))) as opened:
        async with aclosing(pack(opened, exclude)) as pieces:
            async for piece in pieces:
                yield piece


async def pack(folder: Folder, exclude: Sequence[str]) -> AsyncGenerator[bytes, None]:
    """Yield an open folder as an archive.

    Args:
        folder: stays the caller's.
        exclude: patterns (`*`, `?`, `[…]`) of what is left out with all that is in it: with a `/` they are
            compared with the path in the folder, without one with the name.

    Raises:
        OutsideWorkspace: a symlink leads out of the folder.
        NotARegularFile: something in it is no file, folder or symlink.
        ChangedDuringRead: a file changes meanwhile.
    """
    blocks = _Packer(folder.path, exclude).blocks(folder.fd)
    while block := await in_thread(next, blocks, b""):
        for start in range(0, len(block), PIECE_BYTES):
            yield block[start : start + PIECE_BYTES]


class _Packer:
    def __init__(self, shown: str, exclude: Sequence[str]) -> None:
        self._shown = shown
        self._exclude = tuple(exclude)
        self._count = 0

    def blocks(self, fd: int) -> Iterator[bytes]:
        """Yield the archive in blocks that are worth a visit to a thread."""
        block = bytearray()
        for part in self._folder(fd, ""):
            block += part
            if len(block) >= BLOCK_BYTES:
                yield bytes(block)
                block.clear()
        yield bytes(block) + bytes(1024)  # two empty records: the end

    def _folder(self, fd: int, above: str) -> Iterator[bytes]:
        for name in sorted(os.listdir(fd)):
            path = above + name
            if any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in self._exclude):
                continue
            self._count += 1
            if self._count > ENTRIES:
                raise LimitExceeded(
                    f"more than {ENTRIES} entries: {self._shown}", field="entries", limit=ENTRIES
                )
            try:
                yield from self._entry(fd, name, path)
            except AgentServerError:
                raise
            except OSError as exc:
                raise path_error(exc, os.path.join(self._shown, path)) from exc

    def _entry(self, fd: int, name: str, path: str) -> Iterator[bytes]:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            target = os.readlink(name, dir_fd=fd)
            _check_link(path, target)
            yield _head(path, found, b"2", target=target)
        elif stat.S_ISDIR(found.st_mode):
            if path.count("/") >= DEPTH:
                raise LimitExceeded(
                    f"folders more than {DEPTH} levels deep: {path}", field="depth", limit=DEPTH
                )
            yield _head(path, found, b"5")
            below = os.open(name, FOLDER, dir_fd=fd)
            try:
                yield from self._folder(below, f"{path}/")
            finally:
                os.close(below)
        elif stat.S_ISREG(found.st_mode):
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
            try:
                yield from self._file(source, path)
            finally:
                os.close(source)
        else:
            raise NotARegularFile(f"no file, folder or symlink; exclude it: {path}", path=path)

    def _file(self, source: int, path: str) -> Iterator[bytes]:
        first = os.fstat(source)
        yield _head(path, first, b"0", size=first.st_size)
        left = first.st_size
        while left and (data := os.read(source, min(left, BLOCK_BYTES))):
            left -= len(data)
            yield data
        now = os.fstat(source)
        if left or (now.st_size, now.st_mtime_ns) != (first.st_size, first.st_mtime_ns):
            raise ChangedDuringRead(f"the file changed: {os.path.join(self._shown, path)}", path=path)
        yield bytes(-first.st_size % 512)


def _head(path: str, found: os.stat_result, kind: bytes, *, size: int = 0, target: str = "") -> bytes:
    import tarfile  # noqa: PLC0415  1 MB of compression modules, rarely needed

    info = tarfile.TarInfo(path)
    info.type, info.size, info.linkname = kind, size, target
    info.mode, info.mtime = found.st_mode & 0o777, found.st_mtime
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _check_link(path: str, target: str) -> None:
    """Refuse a symlink that leads out of the folder. `..` may only come first: behind a name it could be anywhere."""
    names = [name for name in target.split("/") if name not in ("", ".")]
    up = next((place for place, name in enumerate(names) if name != ".."), len(names))
    if target.startswith("/") or up > path.count("/") or ".." in names[up:] or not target:
        raise OutsideWorkspace(
            f"a symlink leads out of the folder; exclude it: {path} -> {target}", path=path
        )


class FolderFile(AtomicFile):
    """An archive that comes for a folder; `commit` unpacks it there when it is whole. Nothing of it is seen before."""

    def __init__(self, folder: int, path: str, made: Sequence[bytes]) -> None:
        """Begin with nothing.

        Args:
            folder: its descriptor, which is taken over.
            path: for messages.
            made: the names of the folders that were made for it, the folder itself last; nothing is left of them
                when nothing is unpacked there.
        """
        super().__init__(folder, b".", path)
        self._made = list(made)

    def close(self) -> None:
        folder = os.dup(self._folder) if self._made else -1
        super().close()
        with suppress(OSError):  # there is something in it, or it is gone
            while self._made:
                above = os.open(b"..", FOLDER, dir_fd=folder)
                os.close(folder)
                folder = above
                os.rmdir(self._made.pop(), dir_fd=folder)
        self._made.clear()
        if folder >= 0:
            os.close(folder)

    def _refuse(self) -> None:
        """The folder is there and may have things in it."""

    def _put(self, *, durable: bool = True) -> int:
        try:
            _unpack(self._fd, self._folder, self._path)
        except AgentServerError:
            raise
        except OSError as exc:
            raise path_error(exc, self._path) from exc
        self._made.clear()
        return os.fstat(self._folder).st_mode & 0o777


async def unpacked(folder: str | PathLike[str], pieces: AsyncIterator[bytes]) -> Transferred:
    """Write the archive that comes into a folder of this machine; it and its parents are made."""
    async with AsyncExitStack() as stack:
        if isinstance(pieces, AsyncGenerator):
            stack.push_async_callback(pieces.aclose)
        file = await stack.enter_async_context(aclosing(await open_in_thread(_open, local_path(folder))))
        async for data in pieces:
            await file.write(data)
        return await file.commit()


def _open(path: str) -> FolderFile:
    made: list[bytes] = []
    above = os.path.abspath(path)
    while not os.path.lexists(above):
        above, name = os.path.split(above)
        made.insert(0, os.fsencode(name))
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError:
        raise NotADirectory(f"not a folder: {path}", path=path) from None
    except OSError as exc:
        raise path_error(exc, path) from exc
    return FolderFile(open_folder(path).fd, path, made).open()


class _Heads:
    """The archive as tarfile reads it, which believes whatever length a header claims."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEAD_BYTES:
            raise TransferBroken(f"an entry's head of {size} bytes in the archive")
        data = os.pread(self._fd, size, self._position)
        self._position += len(data)
        return data


def _unpack(fd: int, folder: int, shown: str) -> None:
    import tarfile  # noqa: PLC0415  see _head

    times: list[tuple[str, float, int]] = []
    try:
        with tarfile.TarFile(fileobj=_Heads(fd), mode="r", encoding="utf-8") as archive:  # type: ignore[arg-type]
            for count in range(ENTRIES + 1):
                if (info := archive.next()) is None:
                    break
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if count == ENTRIES:
                    raise LimitExceeded(
                        f"more than {ENTRIES} entries: {shown}", field="entries", limit=ENTRIES
                    )
                _unpack_one(info, fd, folder)
                if info.isdir():
                    times.append((info.name, info.mtime, info.mode))
    except tarfile.TarError as exc:
        raise TransferBroken(f"what came is no archive: {exc}") from None
    for name, mtime, mode in reversed(times):  # whatever was put into them has changed them
        below = _enter(folder, name.split("/"), make=False)
        try:
            os.fchmod(below, (mode & 0o777) | 0o700)
            os.utime(below, (mtime, mtime))
        finally:
            os.close(below)


def _unpack_one(info: tarfile.TarInfo, fd: int, folder: int) -> None:
    names = info.name.split("/")
    if any(name in ("", ".", "..") for name in names) or "\0" in info.name:
        raise OutsideWorkspace(f"a name leads out of the folder: {info.name!r}", path=info.name)
    if len(os.fsencode(info.name)) > NAME_BYTES:
        raise LimitExceeded(f"a name of more than {NAME_BYTES} bytes", field="name", limit=NAME_BYTES)
    if info.isdir():
        return os.close(_enter(folder, names))
    if info.issym():
        _check_link(info.name, info.linkname)
    elif not info.isreg() or info.issparse():
        raise NotARegularFile(f"no file, folder or symlink: {info.name}", path=info.name)
    place, name = _enter(folder, names[:-1]), os.fsencode(names[-1])
    try:
        if info.issym():
            temporary = f".{os.urandom(8).hex()}.part"
            os.symlink(info.linkname, temporary, dir_fd=place)
            os.rename(temporary, name, src_dir_fd=place, dst_dir_fd=place)
        else:
            _write(AtomicFile(os.dup(place), name, info.name, info.mode & 0o777), fd, info)
    except AgentServerError:
        raise
    except OSError as exc:
        raise path_error(exc, info.name) from exc
    finally:
        os.close(place)
    return None


def _write(file: AtomicFile, fd: int, info: tarfile.TarInfo) -> None:
    try:
        file.open()
        file.fill(fd, info.offset_data, info.size, info.mtime)
    finally:
        file.close()


def _enter(folder: int, names: Sequence[str], *, make: bool = True) -> int:
    """Open a folder below another one, never through a symlink."""
    fd = os.dup(folder)
    for name in names:
        try:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=fd)
            below = os.open(name, FOLDER, dir_fd=fd)
        except OSError as exc:
            raise path_error(exc, "/".join(names)) from exc
        finally:
            os.close(fd)
        fd = below
    return fd
