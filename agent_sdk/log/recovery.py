"""Opening a log that may have been damaged: examined, and saved where that is needed."""

from __future__ import annotations

import os
import shutil
import struct
import time
from pathlib import Path
from typing import NamedTuple

from agent_sdk.log.database import Database, reserve_of
from agent_sdk.log.salvage import salvage
from agent_sdk.log.storage import Storage, make_folder, path_error
from agent_sdk.log.wal import commits_lost, frames_read
from agent_sdk.protocol.errors import AgentServerError, Conflict, StorageFull

EXAMINED_BYTES = 256 << 20
"""A larger file is not examined when it is opened; its events are proven whenever they are read."""

ASKED_BYTES = 1 << 20
"""A shorter WAL is checked faster than SQLite is asked."""
FILLED_UP_BYTES = 1 << 30
HEADER_BYTES = 100

WAL_BROKEN = "the last commits in the log's WAL are damaged; acknowledged events may be gone"


class Opening(NamedTuple):
    """An open log, and what had to be done about it."""

    database: Database
    recovered: tuple[str, ...]


def open_log(path: Path | None, *, sole: bool) -> Opening:
    """Open a log for writing.

    Raises:
        PathDenied, PathError, StorageFull: the place cannot be used.
        Conflict: another version wrote it, it is something else, or cannot be read at all.
    """
    if path is not None:
        make_folder(path.parent)
    if path is None or not sole:
        return Opening(Database(path), ())
    try:
        return _examined(path)
    except AgentServerError:
        raise
    except OSError as exc:
        raise path_error(exc.errno, path) from exc


def _examined(path: Path) -> Opening:
    _refuse_what_is_no_file(path)
    recovered = []
    _fill_up(path)
    lost = commits_lost(_wal(path), _frames_read(path))
    database = _opened(path)
    try:
        if lost:
            with database.transaction():
                database.renew(WAL_BROKEN)
            recovered.append(WAL_BROKEN)
        if path.stat().st_size <= EXAMINED_BYTES and not _sound(database):
            recovered.append(_replaced(database, path))
            database = _opened(path)
    except BaseException:
        database.close()
        raise
    return Opening(database, tuple(recovered))


def _refuse_what_is_no_file(path: Path) -> None:
    if path.is_symlink():
        raise Conflict(f"{path} is a symbolic link; give the place of the file itself, or another folder")
    wal = _wal(path)
    if (not path.exists() or path.stat().st_size == 0) and wal.exists() and wal.stat().st_size:
        raise Conflict(f"{wal} has no log that it belongs to; bring {path.name} back, or remove both")


def _fill_up(path: Path) -> None:
    """Put empty pages in the place of those that a file has lost at its end: SQLite reads nothing of it before."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if header.startswith(b"SQLite format 3\0") and len(header) == HEADER_BYTES:
        page_size, pages = struct.unpack_from(">H", header, 16)[0], struct.unpack_from(">I", header, 28)[0]
        if path.stat().st_size < page_size * pages <= path.stat().st_size + FILLED_UP_BYTES:
            os.truncate(path, page_size * pages)


def _frames_read(path: Path) -> int:
    """Have SQLite read the WAL, which changes nothing, and return how far it comes."""
    try:
        if _wal(path).stat().st_size < ASKED_BYTES:
            return 0
        asked = Storage(path, read_only=True)
    except (OSError, AgentServerError):  # it is told when the log is opened
        return 0
    try:
        asked.value("SELECT count(*) FROM sqlite_schema")
        return frames_read(path)
    except AgentServerError:
        return 0
    finally:
        asked.close()


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _opened(path: Path) -> Database:
    try:
        return Database(path, sole=True)
    except StorageFull:
        # Opening needs a few pages itself: half of the reserve is enough for that, and for a deletion.
        reserve = reserve_of(path)
        if not reserve.exists():
            raise
        os.truncate(reserve, reserve.stat().st_size // 2)
        return Database(path, sole=True)


def _sound(database: Database) -> bool:
    try:
        return bool(database.value("PRAGMA integrity_check(1)") == "ok")
    except Conflict:
        return False


def _replaced(database: Database, path: Path) -> str:
    """Save what can be read into a new file, and put it in the place of the damaged one, which is kept."""
    fresh = path.with_name(f"{path.name}.saving")
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for leftover in (fresh, _wal(fresh)):
        leftover.unlink(missing_ok=True)
    try:
        saved = salvage(database, fresh)
    except AgentServerError:
        fresh.unlink(missing_ok=True)
        raise
    database.close()
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:  # this kind of file system has no second names
        shutil.copyfile(path, kept)
    if _wal(path).exists():
        os.replace(_wal(path), _wal(kept))
    os.replace(fresh, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return f"the log's file was damaged: {saved}; the damaged file is {kept}"
