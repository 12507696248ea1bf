"""Opening a log that may have been damaged: examined, and saved where that is needed.

What is whole in a damaged file goes into a new one, conversation by conversation.

Before that the WAL is asked whether commits in it can no longer be read. SQLite takes the frames up to the first one
whose checksum is wrong and forgets the rest without a word. That is right for a commit that was being written when the
power went: nobody heard of it. But a commit begins only when the one before it is on the disk. So when a whole commit
follows a broken one, what has been acknowledged is gone. Damage to the very last commit cannot be told from one that
was cut short.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from agent_sdk.ids import new_id
from agent_sdk.log.chain import ChainBroken, sum_of
from agent_sdk.log.database import Conversation, Database, reserve_of
from agent_sdk.log.formats import LAST_SEQ, event_id, event_ids, open_turn
from agent_sdk.log.storage import DAMAGE, Storage, make_folder, path_error
from agent_sdk.protocol.errors import AgentServerError, Conflict, StorageFull

END_LOST = "the end of the log was damaged"
END_UNSURE = "the log's file was damaged; what can be read is whole, but events at its end may be missing"

_FIELDS = ", ".join(Conversation._fields)


def salvage(source: Database, path: Path) -> str:
    """Write a new log with everything in `source` that can be proven to be whole; return what came of it.

    A conversation whose end cannot be read keeps what is before it; one that is damaged elsewhere, or
    whose row was changed, is listed as damaged. One whose row cannot be read is not in the new log.
    All get a new epoch: where pages are missing, nothing proves that what is read goes to the end.
    """
    fresh = Database(path)
    counts = {"whole": 0, "cut": 0, "damaged": 0}
    try:
        with fresh.transaction():
            for key in sorted(set(_keys(source))):
                with suppress(Conflict):
                    counts[_copy(source, fresh, key)] += 1
            with suppress(Conflict):
                fresh.rows(
                    "UPDATE clock SET seconds = ?", (source.value("SELECT max(seconds) FROM clock") or 0,)
                )
    finally:
        fresh.close()
    return f"{counts['whole']} conversations are whole, {counts['cut']} lost their end, {counts['damaged']} are damaged"


def _keys(source: Database) -> Iterator[int]:
    """Yield the keys that can be reached from either end of the table."""
    for order in ("ASC", "DESC"):
        with suppress(*DAMAGE):
            for (key,) in source.connection.execute(f"SELECT key FROM conversations ORDER BY key {order}"):
                yield int(key)


def _copy(source: Database, fresh: Database, key: int) -> str:
    *fields, sum = source.rows(f"SELECT {_FIELDS}, sum FROM conversations WHERE key = ?", (key,))[0]
    row = Conversation(*fields)
    if sum_of(*row) != sum:
        row = row._replace(damaged=row.damaged or "what is noted about it is not what was written")
    lost = None if row.damaged else _copy_events(source, fresh, key)
    state = "damaged" if row.damaged else "whole"
    if lost is not None:
        fresh.rows("DELETE FROM events WHERE id BETWEEN ? AND ?", event_ids(key, lost))
        state = "cut" if _is_end(source, key, lost) else "damaged"
    if not _copy_others(source, fresh, key) and state == "whole":
        state = "cut"
    if state != "damaged":
        told = END_LOST if state == "cut" else END_UNSURE
        row = row._replace(epoch=new_id(), recovered=told, open_turn=open_turn(fresh, key))
    elif not row.damaged:
        row = row._replace(damaged=f"the event with seq {lost} is not what was written")
    fresh.rows("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (key, *row, sum_of(*row)))
    return state


def _copy_events(source: Database, fresh: Database, key: int) -> int | None:
    """Return the seq of the first event that is not whole."""
    seq = 0
    try:
        for seq, at, body, chain in source.verified(key, 0, LAST_SEQ):
            fresh.rows("INSERT INTO events VALUES (?, ?, ?, ?)", (event_id(key, seq), at, body, chain))
    except ChainBroken as broken:
        return broken.seq
    except (*DAMAGE, Conflict):
        return seq + 1
    return None


def _is_end(source: Database, key: int, seq: int) -> bool:
    """Return whether nothing that can be read follows an event."""
    try:
        with source.translated():
            return not source.whole_after(key, seq)
    except Conflict:
        pass
    try:
        last = source.value("SELECT max(id) FROM events WHERE id BETWEEN ? AND ?", event_ids(key, seq))
    except Conflict:
        return True
    return last is None or last == event_id(key, seq)


def _copy_others(source: Database, fresh: Database, key: int) -> bool:
    """Copy operations and settings that are whole; return whether all were."""
    whole = True
    for table, proven in (("operations", _proven_operation), ("settings", _proven_settings)):
        try:
            for row in source.connection.execute(f"SELECT * FROM {table} WHERE conversation = ?", (key,)):
                if proven(row):
                    fresh.rows(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
                else:
                    whole = False
        except DAMAGE:
            whole = False
    return whole


def _proven_operation(row: tuple[Any, ...]) -> bool:
    return bool(sum_of(*row[2:-1]) == row[-1])


def _proven_settings(row: tuple[Any, ...]) -> bool:
    return bool(sum_of(*row[:-1]) == row[-1])


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


# --- the WAL ---


WAL_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24

_MAGIC = {0x377F0682: "<II", 0x377F0683: ">II"}
_MASK = 0xFFFFFFFF
_INDEX_VERSION = 3007000


class Frame(NamedTuple):
    """A page as it lies in the WAL."""

    commits: bool
    current: bool
    """It belongs to what was written since the WAL began anew."""
    sums: tuple[int, int]
    content: bytes
    """What its checksum is over."""


def frames_read(database: Path) -> int:
    """Return up to which frame SQLite reads the WAL of a database that it has just been opened; 0: it does not tell.

    It stands in the index of the WAL, which SQLite makes anew with the first connection (sqlite.org/walformat.html).
    """
    try:
        with database.with_name(f"{database.name}-shm").open("rb") as file:
            version, _, _, ready, frames = struct.unpack("=IIIB3xI", file.read(20))
    except (OSError, struct.error):
        return 0
    return int(frames) if version == _INDEX_VERSION and ready else 0


def commits_lost(path: Path, read: int = 0) -> bool:
    """Return whether commits in this WAL were acknowledged and cannot be read.

    Args:
        path: of the WAL.
        read: up to which frame SQLite reads it: only what comes behind is looked at, because its own checksums
            are a hundred times as fast as ours.
    """
    try:
        with path.open("rb") as file:
            data = file.read()
    except OSError:  # it is not there; or SQLite will say what is wrong with it
        return False
    if len(data) <= WAL_HEADER_BYTES + FRAME_HEADER_BYTES or not any(data[:WAL_HEADER_BYTES]):
        return False
    magic, _, page_size, _, *salts_and_sums = struct.unpack(">8I", data[:WAL_HEADER_BYTES])
    order = _MAGIC.get(magic)
    if order is None or _checksum(data[:24], (0, 0), order) != tuple(salts_and_sums[2:]):
        return True
    sums = tuple(salts_and_sums[2:])
    first = WAL_HEADER_BYTES + read * (FRAME_HEADER_BYTES + page_size)
    if first > len(data):
        first = WAL_HEADER_BYTES
    if first > WAL_HEADER_BYTES:
        last = first - FRAME_HEADER_BYTES - page_size
        sums = struct.unpack(">2I", data[last + 16 : last + FRAME_HEADER_BYTES])
    return _lost(_frames(data, page_size, tuple(salts_and_sums[:2]), first), sums, order)


def _lost(frames: Iterator[Frame], sums: tuple[int, ...], order: str) -> bool:
    unknown_end = False
    broken = False
    for frame in frames:
        whole = frame.current and _checksum(frame.content, sums, order) == frame.sums
        if not whole and not broken:
            # The commit that it belongs to may end with it, or with the next whole one that ends a commit.
            broken, unknown_end = True, not frame.commits
        elif broken and whole and frame.commits:
            if not unknown_end:
                return True
            unknown_end = False
        sums = frame.sums
    return False


def _frames(data: bytes, page_size: int, salts: tuple[int, ...], first: int) -> Iterator[Frame]:
    size = FRAME_HEADER_BYTES + page_size
    for start in range(first, len(data) - size + 1, size):
        header = struct.unpack(">6I", data[start : start + FRAME_HEADER_BYTES])
        content = data[start : start + 8] + data[start + FRAME_HEADER_BYTES : start + size]
        yield Frame(header[1] != 0, header[2:4] == salts, header[4:6], content)


def _checksum(data: bytes, start: tuple[int, ...], order: str) -> tuple[int, int]:
    first, second = start
    for one, other in struct.iter_unpack(order, data):
        first = first + one + second & _MASK
        second = second + other + first & _MASK
    return first, second
