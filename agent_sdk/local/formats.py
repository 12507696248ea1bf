"""The formats of a log's file: the tables of the present one, and the way to it from each older one.

A step runs in one transaction together with the new number in `user_version`: a process that is
killed in the middle leaves the old format, and the next one begins anew. It needs room for a second
copy of the events; without it the file stays what it was.
"""

from __future__ import annotations

from agent_sdk.local.chain import link, origin, sum_of
from agent_sdk.local.storage import Storage
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

LAST_SEQ = (1 << 36) - 1
ROWS_AT_ONCE = 1000


def event_id(key: int, seq: int) -> int:
    """Return the id of an event's row. One number, not two: such rows of up to 4 KB stay on one page."""
    return key << 36 | seq


def version_of(storage: Storage) -> int:
    """Return the format of the file, before anything in it is touched; 0: it is empty.

    Raises:
        Conflict: it was written by a newer version, or is no log.
    """
    version = int(storage.value("PRAGMA user_version"))
    if version > VERSION:
        raise Conflict(
            f"{storage.path} was written by a newer version of this program (format {version}, this one "
            f"knows {VERSION}); use that version, or another folder"
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


def bring_up_to_date(storage: Storage) -> None:
    """Make the tables, or turn those of an older format into the present ones; all of it or nothing.

    Raises:
        StorageFull: there is no room for it.
    """
    if version_of(storage) == VERSION:
        return
    with storage.transaction():
        # Another process may have been faster since.
        version = version_of(storage)
        if version == 0:
            storage.rows(SCHEMA)
        elif version == 1:
            _from_1(storage)
        storage.rows(f"PRAGMA user_version={VERSION}")


def _from_1(storage: Storage) -> None:
    """Format 1 had no chain, no settings, and remembered only operations that had finished."""
    for table in ("conversations", "events", "operations"):
        storage.rows(f"ALTER TABLE {table} RENAME TO {table}_1")
    storage.rows(SCHEMA)
    for key, id, epoch, created, meta in storage.rows("SELECT * FROM conversations_1 ORDER BY key"):
        first = origin(id, epoch)
        _chain_events(storage, key, first)
        _copy_operations(storage, key, created)
        row = (id, epoch, created, meta, first, open_turn(storage, key), None, None)
        storage.rows(
            "INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (key, *row, sum_of(*row))
        )
    for table in ("conversations_1", "events_1", "operations_1"):
        storage.rows(f"DROP TABLE {table}")


def _chain_events(storage: Storage, key: int, first: bytes) -> None:
    chain, after = first, 0
    page = "SELECT seq, at, body FROM events_1 WHERE conversation = ? AND seq > ? ORDER BY seq LIMIT ?"
    while rows := storage.rows(page, (key, after, ROWS_AT_ONCE)):
        for seq, at, body in rows:
            chain, after = link(chain, seq, body), seq
            storage.rows("INSERT INTO events VALUES (?, ?, ?, ?)", (event_id(key, seq), at, body, chain))


def _copy_operations(storage: Storage, key: int, at: float) -> None:
    rows = storage.rows("SELECT op_id, digest, result FROM operations_1 WHERE conversation = ?", (key,))
    for nth, (op_id, digest, result) in enumerate(rows, 1):
        fields = (op_id, 1, digest, "", "", at, 0.0, result)
        storage.rows(
            "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, nth, *fields, sum_of(*fields)),
        )


def open_turn(storage: Storage, key: int) -> str | None:
    """Return the run_id of the turn that began last, unless it ended; empty when a message came after its end."""
    rows = storage.rows(
        "SELECT CAST(body AS TEXT) ->> 'type', CAST(body AS TEXT) ->> 'run_id' FROM events "
        "WHERE id BETWEEN ? AND ? AND substr(body, 1, 15) IN (?, ?, ?) ORDER BY id DESC",
        (
            event_id(key, 0),
            event_id(key, LAST_SEQ),
            *(b'{"type":"turn_s', b'{"type":"turn_e', b'{"type":"user_m'),
        ),
    )
    waits = None
    for kind, run_id in rows:
        if kind != "user_message":
            return run_id if kind == "turn_started" else waits
        waits = ""
    return waits
