"""Saving what is whole in a damaged file into a new one, conversation by conversation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent_sdk.ids import new_id
from agent_sdk.log.chain import ChainBroken, sum_of
from agent_sdk.log.database import Conversation, Database
from agent_sdk.log.formats import LAST_SEQ, event_id, open_turn
from agent_sdk.log.storage import DAMAGE
from agent_sdk.protocol.errors import Conflict

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
        fresh.rows(
            "DELETE FROM events WHERE id >= ? AND id <= ?", (event_id(key, lost), event_id(key, LAST_SEQ))
        )
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
        last = source.value("SELECT max(id) FROM events WHERE id BETWEEN ? AND ?", _bounds(key, seq))
    except Conflict:
        return True
    return last is None or last == event_id(key, seq)


def _bounds(key: int, seq: int) -> tuple[int, int]:
    return event_id(key, seq), event_id(key, LAST_SEQ)


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
