"""Room on the disk: for moving the WAL into the file, and for deleting when there is none left.

The file cannot be brought up to date when it cannot grow, so nothing more is written then: the WAL
stays short. Beside the log of a server lies a reserve of 8 MiB (less on a small disk), twice what a WAL
needs. Only a deletion may use it up, because deleting needs some room before it frees any. As long as
it is used up nothing else is written, or what was freed would be gone before the next deletion.
"""

from __future__ import annotations

import os
from pathlib import Path

import apsw

from agent_sdk.log.storage import Storage
from agent_sdk.protocol.errors import AgentServerError, StorageFull

LARGEST = 8 << 20
SMALLEST = 256 << 10
SHARE = 8
"""Of the free room, at most one part in so many."""
PAGE_BYTES = 4096
WAL_PAGES = 1000
PAGES_AT_ONCE = 100


class SpaceReserve:
    """The room of one log's file; without `path` none is kept."""

    def __init__(self, storage: Storage, path: Path | None) -> None:
        self._storage = storage
        self._path = path
        self._size = _size(path) if path else 0
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


def _size(path: Path) -> int:
    disk = os.statvfs(path.parent)
    room = min(LARGEST, disk.f_bavail * disk.f_frsize // SHARE)
    present = path.stat().st_size if path.exists() else 0
    return max(present, room) if max(present, room) >= SMALLEST else 0
