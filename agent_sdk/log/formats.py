"""The format of a log's file: its tables, and how a file of another format is told.

No older format was ever released, so there is no way from one to this.
"""

from __future__ import annotations

from typing import Any

from agent_sdk.log.storage import Storage
from agent_sdk.protocol.errors import Conflict

VERSION = 2

SCHEMA = """
CREATE TABLE conversations (
    key INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    epoch TEXT NOT NULL,
    created REAL NOT NULL,
    meta BLOB NOT NULL,
    origin BLOB NOT NULL,   -- what the first event is chained to
    open_turn TEXT,         -- run_id of a turn that began and did not end
    damaged TEXT,           -- why nothing of it is served
    recovered TEXT,         -- what its readers have to be told: the end of the file was lost
    sum BLOB NOT NULL       -- over all fields but key
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, -- key of the conversation << 36 | seq
    at REAL NOT NULL,
    body BLOB NOT NULL,
    chain BLOB NOT NULL     -- over the body and everything before it
);
CREATE TABLE operations (
    conversation INTEGER NOT NULL,
    nth INTEGER NOT NULL,   -- counts the operations of a conversation
    op_id TEXT NOT NULL,
    state INTEGER NOT NULL, -- 0 begun, 1 finished, 2 expired
    digest BLOB NOT NULL,
    method TEXT NOT NULL,
    instance TEXT NOT NULL, -- of the box it was sent to
    at REAL NOT NULL,       -- by the clock of the machine, for people
    age REAL NOT NULL,      -- by the clock of the log, which counts while the log is open
    result BLOB NOT NULL,
    sum BLOB NOT NULL,
    PRIMARY KEY (conversation, nth)
) WITHOUT ROWID;
CREATE UNIQUE INDEX operations_by_id ON operations (conversation, op_id);
CREATE INDEX operations_by_state ON operations (conversation, state, nth);
CREATE TABLE settings (
    conversation INTEGER PRIMARY KEY,
    plain BLOB NOT NULL,
    sealed BLOB,
    sum BLOB NOT NULL
);
CREATE TABLE clock (seconds REAL NOT NULL);  -- that the log has been open in its life
INSERT INTO clock VALUES (0);
"""

SEQ_BITS = 36
LAST_SEQ = (1 << SEQ_BITS) - 1


_MESSAGE, _ANSWER, _STARTED, _ENDED = b"user_messa", b"agent_mess", b"turn_start", b"turn_ended"
"""How types of events begin, behind `{"type":"`."""


def event_id(key: int, seq: int) -> int:
    """Return the id of an event's row. One number, not two: such rows of up to 4 KB stay on one page."""
    return key << SEQ_BITS | seq


def event_ids(key: int, seq: int = 0) -> tuple[int, int]:
    """Return the first and the last id that the events of a conversation can have, from a seq on."""
    return key << SEQ_BITS | seq, key << SEQ_BITS | LAST_SEQ


def version_of(storage: Storage) -> int:
    """Return the format of the file, before anything in it is touched; 0: it is empty.

    Raises:
        Conflict: another version wrote it, or it is no log.
    """
    version = int(storage.value("PRAGMA user_version"))
    if version > VERSION:
        raise Conflict(
            f"{storage.path} was written by a newer version of this program (format {version}, this one "
            f"knows {VERSION}); use that version, or another folder"
        )
    if 0 < version < VERSION:
        raise Conflict(
            f"{storage.path} has format {version}, which no released version wrote; use another folder"
        )
    if version == 0 and storage.value("SELECT count(*) FROM sqlite_schema"):
        raise Conflict(f"{storage.path} is an SQLite file, but no event log; use another folder")
    if version == VERSION:
        _check_tables(storage)
    return version


def _check_tables(storage: Storage) -> None:
    """A changed letter in the definition of a table would hide its rows without a word."""
    made = {sql for (sql,) in storage.rows("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}
    if made != {sql.strip() for sql in SCHEMA.split(";") if sql.strip().startswith("CREATE")}:
        raise Conflict(
            f"the tables of {storage.path} are not those of an event log, or damaged; use another folder"
        )


def make_tables(storage: Storage) -> None:
    """Make the tables in a file that is empty; all of them or none.

    Raises:
        StorageFull: there is no room for it.
    """
    if version_of(storage) == VERSION:
        return
    with storage.transaction():
        if version_of(storage) == 0:  # another process may have been faster since
            storage.rows(SCHEMA)
            storage.rows(f"PRAGMA user_version={VERSION}")


def open_turn(storage: Storage, key: int) -> str | None:
    """Return the run_id of the turn that is open; empty: a message waits for the next turn; None: nothing waits.

    A message that came since the last turn began waits when no answer of the model has seen it.
    """
    ended, waits, seen = False, False, None
    with storage.translated():
        for id, kind in storage.connection.execute(
            "SELECT id, substr(body, 10, 10) FROM events WHERE id BETWEEN ? AND ? "
            "AND substr(body, 10, 10) IN (?, ?, ?, ?) ORDER BY id DESC",
            (*event_ids(key), _MESSAGE, _ANSWER, _STARTED, _ENDED),
        ):
            if kind == _MESSAGE:
                waits = waits or id & LAST_SEQ > (seen or 0)
            elif kind == _ANSWER:
                seen = _field(storage, id, "seen_seq") if seen is None else seen
            elif kind == _STARTED and not ended:
                return str(_field(storage, id, "run_id"))
            elif ended:
                break
            else:
                ended = True
    return "" if waits else None


def _field(storage: Storage, id: int, name: str) -> Any:
    return storage.value("SELECT CAST(body AS TEXT) ->> ? FROM events WHERE id = ?", (name, id))
