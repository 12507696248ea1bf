"""The SQLite file below the event log: its tables, and the only code that speaks to apsw.

A Database is one connection. It is made and used in one thread and knows nothing of asyncio. SQLite
comes with apsw because a log must not depend on how old the machine's own SQLite is (3.7.0 to 3.51.2
can lose a WAL file when two connections checkpoint at once).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import apsw

from agent_sdk.protocol.errors import (
    AgentServerError,
    Conflict,
    ConversationNotFound,
    PathDenied,
    PathError,
    StorageFull,
    WorkspaceUnavailable,
)

VERSION = 1
BUSY_SECONDS = 10.0
WAL_BYTES_KEPT = 64 << 20

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_SCHEMA = """
CREATE TABLE conversations (
    key INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    epoch TEXT NOT NULL,
    created REAL NOT NULL,
    meta BLOB NOT NULL
);
CREATE TABLE events (
    conversation INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    at REAL NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (conversation, seq)
) WITHOUT ROWID;
CREATE TABLE operations (
    conversation INTEGER NOT NULL,
    op_id TEXT NOT NULL,
    digest BLOB NOT NULL,
    result BLOB NOT NULL,
    PRIMARY KEY (conversation, op_id)
) WITHOUT ROWID;
"""


def make_folder(path: Path) -> None:
    """Make the folder of a log, readable by its owner only; an existing one is fine.

    Raises:
        PathDenied, PathError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise _path_error(exc.errno, path) from exc


class Database:
    """One connection to the file, or to a database in memory.

    Raises:
        PathDenied, PathError, StorageFull: the file cannot be opened or made.
        Conflict: it was written by a newer version, or is no log.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        self._path = path
        self.broken = False
        """The device failed; nothing that is written from here on can be trusted to arrive."""
        flags = (
            apsw.SQLITE_OPEN_READONLY if read_only else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        )
        with self._translated():
            self._connection = apsw.Connection(str(path) if path else ":memory:", flags=flags)
        try:
            with self._translated():
                self._connection.set_busy_timeout(int(BUSY_SECONDS * 1000))
                version = self._check()
                if not read_only:
                    self._prepare(version)
        except BaseException:
            self._connection.close()
            raise

    def _check(self) -> int:
        """Return the version of the format, before anything in the file is touched."""
        version = int(self._value("PRAGMA user_version"))
        if version > VERSION:
            raise Conflict(
                f"{self._path} was written by a newer version of this program (format {version}, this one "
                f"knows {VERSION}); use that version, or another folder"
            )
        if version == 0 and self._value("SELECT count(*) FROM sqlite_schema"):
            raise Conflict(f"{self._path} is an SQLite file, but no event log; use another folder")
        return version

    def _prepare(self, version: int) -> None:
        # FULL: a commit returns after its fsync. Without it a power loss takes acknowledged events along.
        for setting in ("journal_mode=WAL", "synchronous=FULL", f"journal_size_limit={WAL_BYTES_KEPT}"):
            self._connection.execute(f"PRAGMA {setting}").fetchall()
        if version == 0:
            with self.transaction():
                # Another process may have been faster since the check.
                if self._value("PRAGMA user_version") == 0:
                    self._connection.execute(_SCHEMA)
                    self._connection.execute(f"PRAGMA user_version={VERSION}")

    def close(self) -> None:
        """Close the connection; the last one moves what is left in the WAL into the file."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it, durable when the block is left, or nothing of it when the block raises."""
        with self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself; a second ROLLBACK would be an error.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def create(self, conversation: str, epoch: str, at: float, meta: bytes) -> str:
        """Make a conversation and return its epoch; an existing one keeps its own."""
        self._connection.execute(
            "INSERT INTO conversations (id, epoch, created, meta) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (conversation, epoch, at, meta),
        )
        return str(self._value("SELECT epoch FROM conversations WHERE id = ?", (conversation,)))

    def head(self, conversation: str) -> int:
        """Return the last seq, 0 when there are no events.

        Raises:
            ConversationNotFound: there is no such conversation.
        """
        key = self._key(conversation)
        return int(self._value("SELECT coalesce(max(seq), 0) FROM events WHERE conversation = ?", (key,)))

    def insert(self, conversation: str, rows: Sequence[tuple[int, float, bytes]]) -> None:
        """Write events as (seq, at, body)."""
        key = self._key(conversation)
        self._connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", [(key, *row) for row in rows])

    def page(self, conversation: str, after: int, limit: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Return (seq, body) in order: at most `limit`, and no more than `max_bytes` unless one alone is longer."""
        key, size = self._key(conversation), 0
        found: list[tuple[int, bytes]] = []
        with self._translated():
            rows = self._connection.execute(
                "SELECT seq, body FROM events WHERE conversation = ? AND seq > ? ORDER BY seq LIMIT ?",
                (key, after, limit),
            )
            for row in rows:
                seq, body = cast(tuple[int, bytes], row)
                size += len(body)
                if found and size > max_bytes:
                    break
                found.append((seq, body))
        return found

    def put_operation(self, conversation: str, op_id: str, digest: bytes, result: bytes) -> None:
        """Remember what an operation answered."""
        row = (self._key(conversation), op_id, digest, result)
        self._connection.execute("INSERT INTO operations VALUES (?, ?, ?, ?)", row)

    def operation(self, conversation: str, op_id: str) -> tuple[bytes, bytes] | None:
        """Return (digest, result) of an operation, None when it is not known."""
        key = self._key(conversation)
        with self._translated():
            rows = self._connection.execute(
                "SELECT digest, result FROM operations WHERE conversation = ? AND op_id = ?", (key, op_id)
            ).fetchall()
        return cast(tuple[bytes, bytes], rows[0]) if rows else None

    def set_meta(self, conversation: str, meta: bytes) -> None:
        """Replace what is noted about a conversation."""
        self._connection.execute(
            "UPDATE conversations SET meta = ? WHERE key = ?", (meta, self._key(conversation))
        )

    def conversations(self) -> list[tuple[str, str, float, bytes, int, float]]:
        """Return (id, epoch, created, meta, last seq, time of the last event), newest first."""
        with self._translated():
            rows = self._connection.execute(
                "SELECT c.id, c.epoch, c.created, c.meta, coalesce(e.seq, 0), coalesce(e.at, c.created) "
                "FROM conversations c LEFT JOIN events e ON e.conversation = c.key AND e.seq = "
                "(SELECT max(seq) FROM events WHERE conversation = c.key) ORDER BY c.key DESC"
            ).fetchall()
        return cast(list[tuple[str, str, float, bytes, int, float]], rows)

    def delete(self, conversation: str) -> None:
        """Remove a conversation with its events and operations."""
        key = self._key(conversation)
        for table in ("events", "operations"):
            self._connection.execute(f"DELETE FROM {table} WHERE conversation = ?", (key,))
        self._connection.execute("DELETE FROM conversations WHERE key = ?", (key,))

    def _key(self, conversation: str) -> int:
        with self._translated():
            rows = self._connection.execute(
                "SELECT key FROM conversations WHERE id = ?", (conversation,)
            ).fetchall()
        if not rows:
            raise ConversationNotFound(f"no conversation {conversation}", conversation=conversation)
        return cast(int, rows[0][0])

    def _value(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        return self._connection.execute(query, values).fetchall()[0][0]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what apsw raises into the errors of this project."""
        try:
            yield
        except apsw.Error as exc:
            raise self._translate(exc) from exc

    def _translate(self, exc: apsw.Error) -> AgentServerError:
        connection = getattr(self, "_connection", None)
        number = connection.system_errno if connection is not None else 0
        where = str(self._path or "memory")
        if isinstance(exc, apsw.FullError) or (isinstance(exc, apsw.IOError) and number in _NO_SPACE):
            return StorageFull(f"no space is left for the log {where}; make room and try again", path=where)
        if isinstance(exc, apsw.CantOpenError | apsw.ReadOnlyError | apsw.PermissionsError):
            return _path_error(number, self._path or Path())
        if isinstance(exc, apsw.NotADBError | apsw.CorruptError):
            return Conflict(f"{where} is no event log, or it is damaged: {exc}; use another folder")
        self.broken = isinstance(exc, apsw.IOError)
        return WorkspaceUnavailable(f"the log {where} cannot be used: {exc}", phase="storage")


def _path_error(number: int | None, path: Path) -> AgentServerError:
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
