"""Paths inside the root of a workspace, walked by hand so that none of them leads out.

Theory of operation. A path is walked one name at a time from a descriptor of the root, each folder
opened with O_NOFOLLOW from the descriptor of the one before it. Symlinks are read and their names
walked in turn; `..` goes back to the descriptor that was held before. So whatever somebody swaps for
a symlink meanwhile, every folder that was passed is one that was below the root, and the operation
itself (open, rename, unlink, …) names one entry of such a folder and does not follow it. There is no
check that could be out of date.

An unconfined workspace walks the same way from `/`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    IsADirectory,
    NotADirectory,
    OutsideWorkspace,
)
from agent_sdk.workspace.disk import path_error
from agent_sdk.workspace.environment import encode

PATH_BYTES = 4096
NAME_BYTES = 255
SYMLINKS = 40

# O_PATH opens a folder one may pass but not list.
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Entry:
    """A name in an open folder: what a path leads to. The descriptor is only lent."""

    folder: int
    name: bytes
    """`.` when the path leads to the root itself."""
    names: tuple[bytes, ...]
    """All names from where the walk starts, symlinks resolved."""
    slash: bool
    """The path says that this is a folder."""
    shown: str

    def stat(self) -> os.stat_result | None:
        """Return what is there now, a symlink itself; None: nothing."""
        try:
            return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, flags: int) -> int:
        """Open it; a symlink that took its place meanwhile is refused, a FIFO does not hang."""
        if self.slash:
            flags |= os.O_DIRECTORY
        return os.open(
            self.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=self.folder
        )

    def check_file_name(self) -> None:
        """Refuse a path that can only be a folder."""
        if self.name == b"." or self.slash:
            found = self.stat()
            if found is not None and not stat.S_ISDIR(found.st_mode):
                raise NotADirectory(f"Not a directory: {self.shown}", path=self.shown)
            raise IsADirectory(f"Is a directory: {self.shown}", path=self.shown)


class Root:
    """The folder a workspace is confined to, and the one in it where relative paths start."""

    def __init__(self, folder: str, *, home: str | None = None, confined: bool = True) -> None:
        """Take a folder as root; nothing is opened yet.

        Args:
            folder: existing or not; made absolute, symlinks resolved.
            home: where relative paths start, relative to `folder` or absolute; None: at `folder`.
            confined: False: paths may lead anywhere.
        """
        self.path = os.path.realpath(folder)
        self.home = self.path if home is None else os.path.realpath(os.path.join(self.path, home))
        self.confined = confined
        top = _names(os.fsencode(self.path))
        # The caller may know the root by another name (a symlink to it); paths below that one are fine, too.
        # The real name comes first: it may lie below the other one.
        given = _names(os.fsencode(os.path.abspath(folder)))
        self._aliases = (tuple(top), tuple(given)) if confined else ((),)
        self._top = self.path if confined else "/"
        self._home = tuple(_names(os.fsencode(self.home)))[len(top) if confined else 0 :]

    def shown(self, names: tuple[bytes, ...]) -> str:
        """Return the path of resolved names as the contract shows it: relative to the home, or absolute."""
        if names[: len(self._home)] == self._home:
            return _text(names[len(self._home) :]) or "."
        return os.path.join(self._top, _text(names))

    def leads_home(self, names: tuple[bytes, ...]) -> bool:
        """Whether resolved names are those of the home or of a folder it is in."""
        return names == self._home[: len(names)]

    def absolute(self, names: tuple[bytes, ...]) -> str:
        """Return the absolute path of resolved names."""
        return os.path.join(self._top, os.fsdecode(b"/".join(names))) if names else self._top

    @contextmanager
    def entry(
        self,
        path: str,
        *,
        follow: bool = True,
        made: list[bytes] | None = None,
        field: str = "path",
    ) -> Iterator[Entry]:
        """Walk to a path and lend its entry, whether anything is there or not. Blocks.

        Args:
            path: relative to the home, or absolute.
            follow: also when the last name is a symlink.
            made: make missing folders on the way, and put the names of the last ones here; None: make none.
            field: what the messages call the path.

        Raises:
            InvalidParams, OutsideWorkspace, PathNotFound, NotADirectory, PathDenied, PathError: as it deserves.
        """
        raw = check_path(path, field)
        walk = _Walk(self, path, follow=follow, made=made)
        try:
            yield walk.to(raw)
        except AgentServerError:  # some are OSErrors, too
            raise
        except OSError as exc:
            raise path_error(exc, path) from exc
        finally:
            walk.close()

    def open_top(self) -> int:
        """Open where all walks start."""
        return os.open(self._top, _PASS)

    def start_names(self, raw: bytes, path: str) -> list[bytes]:
        """Return the names to walk from the top for a path of a caller."""
        if raw.startswith(b"/"):
            return self.below(raw, path)
        return [*self._home, *_names(raw)]

    def below(self, raw: bytes, path: str) -> list[bytes]:
        """Return the names that follow the root in an absolute path.

        Raises:
            OutsideWorkspace: it does not begin with the root.
        """
        names = _names(raw)
        for alias in self._aliases:
            if tuple(names[: len(alias)]) == alias:
                return names[len(alias) :]
        raise OutsideWorkspace(f"the path leads out of the workspace: {path}", path=path)


class _Walk:
    """One way from the root, with all the descriptors that are needed to go back."""

    def __init__(self, root: Root, path: str, *, follow: bool, made: list[bytes] | None) -> None:
        self._root = root
        self._path = path
        self._follow = follow
        self._made = made
        self._fds: list[int] = []
        self._names: list[bytes] = []
        self._symlinks = 0

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def to(self, raw: bytes) -> Entry:
        todo = deque(self._root.start_names(raw, self._path))
        slash = raw.endswith(b"/") or raw.rsplit(b"/", 1)[-1] in (b".", b"..")
        self._fds.append(self._root.open_top())
        while todo:
            name = todo.popleft()
            if name == b"..":
                self._up()
                continue
            found = self._look(name, last=not todo)
            if found is not None and stat.S_ISLNK(found.st_mode) and (todo or self._follow or slash):
                todo = self._target_of(name, todo)
            elif not todo:
                return Entry(self._fds[-1], name, (*self._names, name), slash, self._path)
            else:
                self._enter(name)
        return Entry(self._fds[-1], b".", tuple(self._names), True, self._path)

    def _up(self) -> None:
        if self._names:
            self._names.pop()
            os.close(self._fds.pop())
            if self._made:
                self._made.clear()  # they are not on the way any more
        elif self._root.confined:
            raise OutsideWorkspace(f"the path leads out of the workspace: {self._path}", path=self._path)

    def _look(self, name: bytes, *, last: bool) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self._fds[-1], follow_symlinks=False)
        except FileNotFoundError:
            if not last:
                if self._made is None:
                    raise
                with suppress(FileExistsError):  # somebody else made it just now
                    os.mkdir(name, dir_fd=self._fds[-1])
                    self._made.append(name)
            return None

    def _enter(self, name: bytes) -> None:
        self._fds.append(os.open(name, _PASS, dir_fd=self._fds[-1]))
        self._names.append(name)

    def _target_of(self, name: bytes, rest: deque[bytes]) -> deque[bytes]:
        self._symlinks += 1
        if self._symlinks > SYMLINKS:
            raise OSError(errno.ELOOP, "too many symbolic links")
        target = os.readlink(name, dir_fd=self._fds[-1])
        if not target.startswith(b"/"):
            return deque([*_names(target), *rest])
        names = self._root.below(target, self._path)
        while self._names:
            self._up()
        return deque([*names, *rest])


def check_path(path: object, field: str = "path") -> bytes:
    """Return a path as bytes; what no system call would take is refused by name."""
    raw = encode(path, field)
    if not raw:
        raise InvalidParams(f"{field}: empty")
    if len(raw) > PATH_BYTES:
        raise InvalidParams(f"{field}: at most {PATH_BYTES} bytes (got {len(raw)})")
    longest = max(map(len, raw.split(b"/")))
    if longest > NAME_BYTES:
        raise InvalidParams(f"{field}: a name in it has {longest} bytes, at most {NAME_BYTES}")
    return raw


def _names(raw: bytes) -> list[bytes]:
    return [name for name in raw.split(b"/") if name not in (b"", b".")]


def _text(names: tuple[bytes, ...]) -> str:
    # Names that are no UTF-8 are shown escaped: JSON has no way to carry them.
    return b"/".join(names).decode("utf-8", "backslashreplace")
