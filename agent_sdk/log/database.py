"""The rows of conversations, their events and settings, in the file of a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from agent_sdk.log.chain import ChainBroken, link, origin, sum_of
from agent_sdk.log.formats import LAST_SEQ, SEQ_BITS, event_id, event_ids, make_tables, open_turn, version_of
from agent_sdk.log.operations import Operations
from agent_sdk.log.storage import DAMAGE, SpaceReserve, Storage
from agent_sdk.protocol.errors import ConversationDamaged, ConversationNotFound

WAL_BYTES_KEPT = 64 << 20
TAILS_KNOWN = 10_000
PAGES_GIVEN_BACK = 1000
"""In one commit: 4 MiB, which others wait for."""

_FIELDS = "id, epoch, created, meta, origin, open_turn, damaged, recovered"
_UPDATE = f"UPDATE conversations SET {_FIELDS.replace(',', ' = ?,')} = ?, sum = ? WHERE id = ?"


class Tail(NamedTuple):
    """Where a conversation's events end."""

    key: int
    seq: int
    chain: bytes


class Conversation(NamedTuple):
    """The row of a conversation."""

    id: str
    epoch: str
    created: float
    meta: bytes
    origin: bytes
    open_turn: str | None
    damaged: str | None
    recovered: str | None


class ConversationRow(Struct, frozen=True, kw_only=True):
    """One conversation of a log, with what its events say."""

    id: str
    epoch: str
    created_at: float
    updated_at: float
    """Of the last event; seconds since the Unix epoch, like `created_at`."""
    head_seq: int
    meta: dict[str, Any]
    open_turn: str | None
    """The run_id of a turn that has begun and not ended; empty: a message came, and no turn has read it."""
    damaged: bool
    """Nothing of it is served; it can only be deleted."""


class Database(Storage):
    """One connection to the file of a log, or to a log in memory.

    Raises:
        PathDenied, PathError, StorageFull: the file cannot be opened or made.
        Conflict: it was written by a newer version, or is no log.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False, sole: bool = False) -> None:
        """Open the file.

        Args:
            sole: no other process uses it, and this one keeps a reserve of room.
        """
        super().__init__(path, read_only=read_only)
        self.operations = Operations(self)
        self._tails: dict[str, Tail] = {}
        """What is known of the ends of conversations; of use while nobody else writes to the file."""
        self._data_version: int | None = None
        self._spoiled: dict[str, str] = {}
        """Conversations that are not used until they are opened anew, and why."""
        try:
            version_of(self)
            if not read_only:
                self.space = SpaceReserve(self, reserve_of(path) if path and sole else None)
                self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        # auto_vacuum has to come before the first table: what is deleted can be given back to a full disk.
        # FULL: a commit returns after its fsync. Without it a power loss takes acknowledged events along.
        for setting in (
            "auto_vacuum=INCREMENTAL",
            "journal_mode=WAL",
            "synchronous=FULL",
            f"journal_size_limit={WAL_BYTES_KEPT}",
        ):
            self.rows(f"PRAGMA {setting}")
        make_tables(self)

    @contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        try:
            with super().transaction(begin):
                data_version = self.connection.pragma("data_version")
                if data_version != self._data_version or len(self._tails) > TAILS_KNOWN:
                    self._tails.clear()
                    self._data_version = data_version
                yield
        except BaseException:
            self._tails.clear()
            raise
        self.look()
        self.space.after_commit()

    # --- conversations ---

    def create(self, conversation: str, epoch: str, at: float, meta: bytes) -> Conversation:
        """Make a conversation; an existing one stays what it is. Return its row.

        Raises:
            ConversationDamaged: it exists, and cannot be used any more.
        """
        self._spoiled.pop(conversation, None)
        if not self.rows("SELECT 1 FROM conversations WHERE id = ?", (conversation,)):
            made = (conversation, epoch, at, meta, origin(conversation, epoch), None, None, None)
            self.rows(
                f"INSERT INTO conversations ({_FIELDS}, sum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*made, sum_of(*made)),
            )
        return self.conversation(conversation)

    def conversation(self, conversation: str) -> Conversation:
        """Return the row of a conversation.

        Raises:
            ConversationNotFound: there is no such conversation.
            ConversationDamaged: nothing of it may be used.
        """
        self.key(conversation)
        rows = self.rows(f"SELECT {_FIELDS}, sum FROM conversations WHERE id = ?", (conversation,))
        *fields, sum = rows[0]
        if sum_of(*fields) != sum:
            raise damaged(conversation, "what is noted about it is not what was written")
        return Conversation(*fields)

    def change(self, conversation: str, **fields: object) -> None:
        """Replace fields of a conversation's row."""
        self._tails.pop(conversation, None)
        self._write(self.conversation(conversation)._replace(**fields))  # type: ignore[arg-type]

    def note_turn(self, conversation: str) -> None:
        """Keep in the row what its events say of a turn that is open, or that is to begin."""
        self._note(self.conversation(conversation), open_turn(self, self.tail(conversation).key))

    def note_message(self, conversation: str) -> None:
        """Keep in the row that the last event is a message: it waits, unless a turn is open that will see it."""
        row = self.conversation(conversation)
        self._note(row, row.open_turn or "")

    def _note(self, row: Conversation, now: str | None) -> None:
        if now != row.open_turn:
            self._write(row._replace(open_turn=now))

    def _write(self, row: Conversation) -> None:
        self.rows(_UPDATE, (*row, sum_of(*row), row.id))

    def spoil(self, conversation: str, why: str) -> None:
        """Refuse the use of a conversation until `create` is called for it."""
        self._tails.pop(conversation, None)
        self._spoiled[conversation] = why

    def renew(self, reason: str) -> None:
        """Give every conversation another epoch, and a reason to tell its readers: events may be gone."""
        for id, epoch in self.rows("SELECT id, lower(hex(randomblob(16))) FROM conversations"):
            with suppress(ConversationDamaged):
                self.change(id, epoch=epoch, recovered=reason)

    def conversations(self, ids: Sequence[str] | None = None) -> list[ConversationRow]:
        """Return all conversations, or those of these ids, newest first; nothing of others is read."""
        fields = ", ".join(f"c.{name}" for name in Conversation._fields)
        wanted = "" if ids is None else f"WHERE c.id IN ({', '.join('?' * len(ids))})"
        rows = self.rows(
            f"SELECT {fields}, c.sum, coalesce(e.id & {LAST_SEQ}, 0), coalesce(e.at, c.created) "
            "FROM conversations c LEFT JOIN events e ON e.id = (SELECT max(id) FROM events "
            f"WHERE id BETWEEN c.key << {SEQ_BITS} AND (c.key << {SEQ_BITS}) | {LAST_SEQ}) {wanted} "
            "ORDER BY c.key DESC",
            tuple(ids or ()),
        )
        return [_listed(Conversation(*row), sum_of(*row) == sum, head, at) for *row, sum, head, at in rows]

    def delete(self, conversation: str) -> None:
        """Remove a conversation with everything that belongs to it, damaged or not."""
        self._tails.pop(conversation, None)
        key = self.key(conversation, even_damaged=True)
        self.rows("DELETE FROM events WHERE id BETWEEN ? AND ?", event_ids(key))
        for table in ("operations", "settings"):
            self.rows(f"DELETE FROM {table} WHERE conversation = ?", (key,))
        self.rows("DELETE FROM conversations WHERE key = ?", (key,))

    def shrink(self) -> bool:
        """Give some of the room that deletions left in the file back to the disk; return whether there is more."""
        before = self.value("PRAGMA freelist_count")
        self.rows(f"PRAGMA incremental_vacuum({PAGES_GIVEN_BACK})")
        return bool(0 < self.value("PRAGMA freelist_count") < before)

    # --- events ---

    def head(self, conversation: str) -> int:
        """Return the last seq, 0 when there are no events."""
        last = self.value(
            "SELECT max(id) FROM events WHERE id BETWEEN ? AND ?", event_ids(self.key(conversation))
        )
        return (last or 0) & LAST_SEQ

    def tail(self, conversation: str) -> Tail:
        """Return where the next event goes."""
        if self.connection.in_transaction and (known := self._tails.get(conversation)):
            return known
        key = self.key(conversation)
        rows = self.rows(
            "SELECT id, chain FROM events WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1", event_ids(key)
        )
        id, chain = rows[0] if rows else (0, self._origin(key))
        return Tail(key, id & LAST_SEQ, chain)

    def insert(self, conversation: str, tail: Tail, rows: Sequence[tuple[float, bytes]]) -> None:
        """Write events as (at, body) after the tail."""
        chain, linked = tail.chain, []
        first, _ = event_ids(tail.key)
        for seq, (at, body) in enumerate(rows, tail.seq + 1):
            chain = link(chain, seq, body)
            linked.append((first + seq, at, body, chain))
        with self.translated():
            self.connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", linked)
        self._tails[conversation] = Tail(tail.key, tail.seq + len(linked), chain)

    def page(self, conversation: str, after: int, limit: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Return (seq, body) in order: at most `limit`, and no more than `max_bytes` unless one alone is longer.

        Raises:
            ChainBroken: an event that would have been returned is not what was written.
        """
        found: list[tuple[int, bytes]] = []
        size = 0
        with Storage.transaction(self, "BEGIN"):
            for seq, _, body, _ in self._verified(conversation, after, limit):
                size += len(body)
                if found and size > max_bytes:
                    break
                found.append((seq, body))
        return found

    def _verified(
        self, conversation: str, after: int, limit: int
    ) -> Iterator[tuple[int, float, bytes, bytes]]:
        try:
            yield from self.verified(self.key(conversation), after, limit)
        except DAMAGE as exc:
            raise damaged(conversation, str(exc)) from exc

    def verified(self, key: int, after: int, limit: int) -> Iterator[tuple[int, float, bytes, bytes]]:
        """Yield (seq, at, body, chain) of the events after a seq, each proven to be what was written.

        Raises:
            ChainBroken: the next one is not, or is missing.
        """
        after = min(max(after, 0), LAST_SEQ)
        previous: bytes | None = self._origin(key)
        if after:
            previous = self.value("SELECT chain FROM events WHERE id = ?", (event_id(key, after),))
        expected = after + 1
        events = "SELECT id, at, body, chain FROM events WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
        for id, at, body, chain in self.connection.execute(events, (*event_ids(key, after), limit)):
            seq = id & LAST_SEQ
            if seq != expected or previous is None or link(previous, seq, body) != chain:
                raise ChainBroken(expected)
            yield seq, at, body, chain
            previous, expected = chain, seq + 1

    def cut(self, conversation: str, from_seq: int) -> None:
        """Remove the events from a seq on."""
        self.rows("DELETE FROM events WHERE id BETWEEN ? AND ?", event_ids(self.key(conversation), from_seq))
        self._tails.pop(conversation, None)
        self.note_turn(conversation)

    def whole_after(self, key: int, seq: int) -> bool:
        """Return whether any event after this one is what was written, or may be."""
        bounds = event_ids(key, seq)
        last: tuple[int, bytes] | None = None
        events = "SELECT id, body, chain FROM events WHERE id BETWEEN ? AND ? ORDER BY id"
        for id, body, chain in self.connection.execute(events, bounds):
            if last is None and id != bounds[0]:
                return True  # this one is missing, so nothing can be said of the next
            if last is not None and last[0] + 1 == id and link(last[1], id & LAST_SEQ, body) == chain:
                return True
            last = id, chain
        return False

    # --- settings ---

    def store_settings(self, conversation: str, plain: bytes, sealed: bytes | None) -> None:
        """Replace what is kept beside the events."""
        key = self.key(conversation)
        self.rows(
            "INSERT OR REPLACE INTO settings VALUES (?, ?, ?, ?)",
            (key, plain, sealed, sum_of(key, plain, sealed)),
        )

    def settings(self, conversation: str) -> tuple[bytes, bytes | None] | None:
        """Return what is kept beside the events, None when nothing is."""
        key = self.key(conversation)
        rows = self.rows("SELECT plain, sealed, sum FROM settings WHERE conversation = ?", (key,))
        if not rows:
            return None
        plain, sealed, sum = rows[0]
        if sum_of(key, plain, sealed) != sum:
            raise damaged(conversation, "its settings are not what was written")
        return plain, sealed

    def settings_of(self, ids: Sequence[str]) -> dict[str, tuple[bytes, bytes | None]]:
        """Return `settings` of several; what has none, is damaged or does not exist is left out."""
        found = {}
        for id in ids:
            with suppress(ConversationNotFound, ConversationDamaged):
                if settings := self.settings(id):
                    found[id] = settings
        return found

    def key(self, conversation: str, *, even_damaged: bool = False) -> int:
        """Return the key of a conversation's row."""
        rows = self.rows("SELECT key, damaged FROM conversations WHERE id = ?", (conversation,))
        if not rows:
            raise ConversationNotFound(f"no conversation {conversation}", conversation=conversation)
        key, why = rows[0]
        why = why or self._spoiled.get(conversation)
        if why and not even_damaged:
            raise damaged(conversation, why)
        return int(key)

    def _origin(self, key: int) -> bytes:
        return bytes(self.value("SELECT origin FROM conversations WHERE key = ?", (key,)))


def _listed(row: Conversation, whole: bool, head: int, at: float) -> ConversationRow:
    return ConversationRow(
        id=row.id,
        epoch=row.epoch,
        created_at=row.created,
        updated_at=at,
        head_seq=head,
        meta=msgspec.json.decode(row.meta) if whole else {},
        open_turn=row.open_turn,
        damaged=bool(row.damaged) or not whole,
    )


def reserve_of(path: Path) -> Path:
    """Return where the reserve of a log is."""
    return path.with_name(f"{path.name}.reserve")


def damaged(conversation: str, why: str) -> ConversationDamaged:
    """Return what is raised instead of serving a conversation that is not what was written."""
    return ConversationDamaged(
        f"conversation {conversation} is damaged: {why}; it can only be deleted", conversation=conversation
    )
