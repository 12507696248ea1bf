"""One connection to an SQLite file: how it is opened, its transactions, and its errors in our words.

It is made and used in one thread and knows nothing of asyncio. SQLite comes with apsw because a log
must not depend on how old the machine's own SQLite is (3.7.0 to 3.51.2 can lose a WAL file when two
connections checkpoint at once).

Room on the disk is kept here, too: for moving the WAL into the file, and for deleting when there is none left. The file
cannot be brought up to date when it cannot grow, so nothing more is written then: the WAL stays short. Beside the log
of a server lies a reserve of 8 MiB (less on a small disk), twice what a WAL needs. Only a deletion may use it up,
because deleting needs some room before it frees any. As long as it is used up nothing else is written, or what was
freed would be gone before the next deletion.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from agent_sdk.protocol.errors import (
    AgentServerError,
    Conflict,
    PathDenied,
    PathError,
    StorageFull,
    WorkspaceUnavailable,
)

BUSY_SECONDS = 10.0
DAMAGE = (apsw.CorruptError, apsw.NotADBError, UnicodeDecodeError)
"""What says, raised by apsw, that something in the file cannot be right."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ONLY_READING = {
    apsw.SQLITE_IOERR_READ,
    apsw.SQLITE_IOERR_SHORT_READ,
    apsw.SQLITE_IOERR_NOMEM,
}


def make_folder(path: Path) -> None:
    """Make the folder of a log, readable by its owner only; an existing one is fine.

    Raises:
        PathDenied, PathError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise path_error(exc.errno, path) from exc


class Storage:
    """One connection to the file, or to a database in memory.

    Raises:
        PathDenied, PathError, StorageFull: the file cannot be opened or made.
        Conflict: it is no database, or a damaged one.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        self.path = path
        self.broken: AgentServerError | None = None
        """The device failed; nothing that is written from here on can be trusted to arrive."""
        self._names: tuple[str, ...] = ()
        self._seen: dict[str, tuple[int, int] | None] = {}
        """What the file and its WAL were when they were seen first: device and inode."""
        if path is not None and not read_only:
            _make_file(path)
        flags = (
            apsw.SQLITE_OPEN_READONLY if read_only else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        )
        with self.translated():
            self.connection = apsw.Connection(str(path) if path else ":memory:", flags=flags)
        self.connection.set_busy_timeout(int(BUSY_SECONDS * 1000))
        if path is not None:
            self._names = (os.path.abspath(path),)
            self.look()
            self._names += (f"{self._names[0]}-wal",)

    def look(self) -> None:
        """Check that the files still have their names; what is written to one that has none is lost for everybody."""
        for name in self._names:
            try:
                found = os.stat(name)
            except FileNotFoundError:
                if name not in self._seen:
                    continue  # the WAL comes with the first write
                now = None
            except OSError:  # says nothing about the name
                continue
            else:
                now = found.st_dev, found.st_ino
            if now != self._seen.setdefault(name, now):
                self.broken = self.broken or WorkspaceUnavailable(
                    f"{name} was removed or replaced while it was in use; what was written last may be lost: "
                    "start the program anew",
                    phase="storage",
                )

    def close(self) -> None:
        """Close the connection; the last one moves what is left in the WAL into the file."""
        self.connection.close()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Run a statement and return its rows as tuples."""
        try:
            return self.connection.execute(query, values).fetchall()
        except (apsw.Error, UnicodeDecodeError) as exc:
            raise self._translate(exc) from exc

    def value(self, query: str, values: Sequence[Any] = ()) -> Any:
        """Return the first field of the first row, None when there is no row."""
        found = self.rows(query, values)
        return found[0][0] if found else None

    @contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        """All of it, durable when the block is left, or nothing of it when the block raises.

        With `BEGIN` nothing is written: what is read in the block is the state of one moment.
        """
        try:
            self.connection.execute(begin)
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself; a second ROLLBACK would be an error.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
        except (apsw.Error, UnicodeDecodeError) as exc:
            raise self._translate(exc) from exc

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what apsw raises into the errors of this project."""
        try:
            yield
        except (apsw.Error, UnicodeDecodeError) as exc:
            raise self._translate(exc) from exc

    def _translate(self, exc: apsw.Error | UnicodeDecodeError) -> AgentServerError:
        connection = getattr(self, "connection", None)
        number = connection.system_errno if connection is not None else 0
        where = str(self.path or "memory")
        if isinstance(exc, apsw.FullError) or (isinstance(exc, apsw.IOError) and number in _NO_SPACE):
            return StorageFull(f"no space is left for the log {where}; make room and try again", path=where)
        if isinstance(exc, apsw.CantOpenError | apsw.ReadOnlyError | apsw.PermissionsError):
            return path_error(number, self.path or Path())
        if isinstance(exc, DAMAGE):
            return Conflict(f"{where} is no event log, or it is damaged: {exc}; use another folder")
        error = WorkspaceUnavailable(f"the log {where} cannot be used: {exc}", phase="storage")
        if isinstance(exc, apsw.IOError) and getattr(exc, "extendedresult", 0) not in _ONLY_READING:
            self.broken = error
        return error


def _make_file(path: Path) -> None:
    """Make it, readable by its owner only; SQLite gives what it makes beside it the same rights.

    Raises:
        PathDenied, PathError, StorageFull: it cannot be made.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise path_error(exc.errno, path) from exc


def path_error(number: int | None, path: Path) -> AgentServerError:
    """One sentence about a place that cannot be used, with what to do."""
    folder = path if path.is_dir() or not path.suffix else path.parent
    if number in _NO_SPACE:
        return StorageFull(
            f"no space is left for the log in {folder}; make room and try again", path=str(folder)
        )
    reason = os.strerror(number) if number else "not writable"
    kind = PathDenied if number in (None, 0, errno.EACCES, errno.EPERM, errno.EROFS) else PathError
    return kind(
        f"the log cannot be written in {folder}: {reason}; choose another folder or change its permissions",
        path=str(folder),
        errno=errno.errorcode.get(number or 0, "EACCES"),
    )


RESERVE_LARGEST = 8 << 20
RESERVE_SMALLEST = 256 << 10
RESERVE_SHARE = 8
"""Of the free room, at most one part in so many."""
PAGE_BYTES = 4096
WAL_PAGES = 1000
PAGES_AT_ONCE = 100


class SpaceReserve:
    """The room of one log's file; without `path` none is kept."""

    def __init__(self, storage: Storage, path: Path | None) -> None:
        self._storage = storage
        self._path = path
        self._size = _reserve_size(path) if path else 0
        self._spent = False
        self._cramped = False
        """The WAL could not be moved into the file."""
        self._wal_pages = 0
        self._longest = min(WAL_PAGES, self._size // PAGE_BYTES // 2 or WAL_PAGES)
        storage.connection.set_wal_hook(self._committed)
        self._make()

    def admit(self) -> None:
        """Return when something else than a deletion may be written.

        Raises:
            StorageFull: there is no room for it.
        """
        if (self._spent or self._cramped) and not self._recovered():
            where = str(self._storage.path)
            raise StorageFull(f"no space is left for the log {where}; make room and try again", path=where)

    def after_commit(self) -> None:
        """Move the WAL into the file when it is long."""
        if self._wal_pages >= self._longest:
            self._cramped = not self._checkpoint(apsw.SQLITE_CHECKPOINT_PASSIVE)

    def spend(self) -> bool:
        """Give the room up for a deletion; return whether there was any."""
        if self._path is None or self._spent or self._size == 0:
            return False
        self._path.unlink(missing_ok=True)
        self._spent = True
        self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
        return True

    def give_back(self) -> None:
        """Return to the disk what a deletion freed in the file, and take the reserve from it again."""
        pages = 0
        if not self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE):
            self.spend()  # the deletion found room in the WAL, and the file has none for what is in there
        while self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE):
            before, pages = pages, self._storage.value("PRAGMA page_count")
            if pages == before or not self._storage.value("PRAGMA freelist_count"):
                break  # a file that began in an older format keeps its pages, for what is written next
            try:
                self._storage.rows(f"PRAGMA incremental_vacuum({PAGES_AT_ONCE})")
            except StorageFull:
                break
        self._make()

    def _recovered(self) -> bool:
        wal = Path(f"{self._storage.path}-wal")
        needed = self._size * self._spent + (wal.stat().st_size if wal.exists() else 0)
        disk = os.statvfs(wal.parent)
        if disk.f_bavail * disk.f_frsize < needed:
            return False
        self._cramped = not self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)
        self._make()
        return not (self._cramped or self._spent)

    def _make(self) -> None:
        if self._path is None or self._size == 0:
            return
        try:
            with self._path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
            self._spent = False
        except OSError:
            # What was written before the room ended would be missed by everybody.
            self._path.unlink(missing_ok=True)
            self._spent = True

    def _committed(self, connection: apsw.Connection, name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self, mode: int) -> bool:
        """Return whether there was room for it. A disk that failed is noted by the storage."""
        try:
            with self._storage.translated():
                self._storage.connection.wal_checkpoint(mode=mode)
        except StorageFull:
            return False
        except AgentServerError:
            pass  # somebody else uses the file: next time
        return True


def _reserve_size(path: Path) -> int:
    disk = os.statvfs(path.parent)
    room = min(RESERVE_LARGEST, disk.f_bavail * disk.f_frsize // RESERVE_SHARE)
    present = path.stat().st_size if path.exists() else 0
    return max(present, room) if max(present, room) >= RESERVE_SMALLEST else 0
