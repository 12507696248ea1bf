"""The rows of conversations, their events and settings, in the file of a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from agent_sdk.local.chain import ChainBroken, link, origin, sum_of
from agent_sdk.local.formats import bring_up_to_date, open_turn, version_of
from agent_sdk.local.operations import Operations
from agent_sdk.local.storage import Storage
from agent_sdk.protocol.errors import ConversationDamaged, ConversationNotFound

WAL_BYTES_KEPT = 64 << 20

_FIELDS = "id, epoch, created, meta, origin, open_turn, damaged, recovered"


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


class Listed(NamedTuple):
    """A conversation with what its events say."""

    row: Conversation
    whole: bool
    """The row is what was written."""
    head: int
    at: float
    """Of the last event; when it was made, if there is none."""


class Database(Storage):
    """One connection to the file of a log, or to a log in memory.

    Raises:
        PathDenied, PathError, StorageFull: the file cannot be opened or made.
        Conflict: it was written by a newer version, or is no log.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        super().__init__(path, read_only=read_only)
        self.operations = Operations(self)
        try:
            version_of(self)
            if not read_only:
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
        bring_up_to_date(self)

    # --- conversations ---

    def create(self, conversation: str, epoch: str, at: float, meta: bytes) -> Conversation:
        """Make a conversation; an existing one stays what it is. Return its row.

        Raises:
            ConversationDamaged: it exists, and cannot be used any more.
        """
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
        self._key(conversation)
        rows = self.rows(f"SELECT {_FIELDS}, sum FROM conversations WHERE id = ?", (conversation,))
        *fields, sum = rows[0]
        if sum_of(*fields) != sum:
            raise _damaged(conversation, "what is noted about it is not what was written")
        return Conversation(*fields)

    def change(self, conversation: str, **fields: object) -> None:
        """Replace fields of a conversation's row."""
        row = self.conversation(conversation)._replace(**fields)  # type: ignore[arg-type]
        names = ", ".join(f"{name} = ?" for name in Conversation._fields)
        self.rows(
            f"UPDATE conversations SET {names}, sum = ? WHERE id = ?", (*row, sum_of(*row), conversation)
        )

    def conversations(self) -> list[Listed]:
        """Return all conversations, newest first."""
        fields = ", ".join(f"c.{name}" for name in Conversation._fields)
        rows = self.rows(
            f"SELECT {fields}, c.sum, coalesce(e.seq, 0), coalesce(e.at, c.created) "
            "FROM conversations c LEFT JOIN events e ON e.conversation = c.key AND e.seq = "
            "(SELECT max(seq) FROM events WHERE conversation = c.key) ORDER BY c.key DESC"
        )
        return [Listed(Conversation(*row), sum_of(*row) == sum, head, at) for *row, sum, head, at in rows]

    def delete(self, conversation: str) -> None:
        """Remove a conversation with everything that belongs to it, damaged or not."""
        key = self._key(conversation, even_damaged=True)
        for table in ("events", "operations", "settings"):
            self.rows(f"DELETE FROM {table} WHERE conversation = ?", (key,))
        self.rows("DELETE FROM conversations WHERE key = ?", (key,))

    # --- events ---

    def head(self, conversation: str) -> int:
        """Return the last seq, 0 when there are no events."""
        key = self._key(conversation)
        return int(self.value("SELECT coalesce(max(seq), 0) FROM events WHERE conversation = ?", (key,)))

    def tail(self, conversation: str) -> Tail:
        """Return where the next event goes."""
        key = self._key(conversation)
        rows = self.rows(
            "SELECT seq, chain FROM events WHERE conversation = ? ORDER BY seq DESC LIMIT 1", (key,)
        )
        seq, chain = rows[0] if rows else (0, self._origin(key))
        return Tail(key, seq, chain)

    def insert(self, tail: Tail, rows: Sequence[tuple[float, bytes]]) -> None:
        """Write events as (at, body) after the tail."""
        chain, linked = tail.chain, []
        for seq, (at, body) in enumerate(rows, tail.seq + 1):
            chain = link(chain, seq, body)
            linked.append((tail.key, seq, at, body, chain))
        with self.translated():
            self.connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", linked)

    def page(self, conversation: str, after: int, limit: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Return (seq, body) in order: at most `limit`, and no more than `max_bytes` unless one alone is longer.

        Raises:
            ChainBroken: an event that would have been returned is not what was written.
        """
        found: list[tuple[int, bytes]] = []
        size = 0
        with self.snapshot():
            for seq, body in self.verified(self._key(conversation), max(after, 0), limit):
                size += len(body)
                if found and size > max_bytes:
                    break
                found.append((seq, body))
        return found

    def verified(self, key: int, after: int, limit: int) -> Iterator[tuple[int, bytes]]:
        """Yield (seq, body) of the events after a seq, each proven to be what was written.

        Raises:
            ChainBroken: the next one is not, or is missing.
        """
        events = "SELECT seq, body, chain FROM events WHERE conversation = ? AND seq > ? ORDER BY seq LIMIT ?"
        previous: bytes | None = self._origin(key)
        if after:
            known = "SELECT chain FROM events WHERE conversation = ? AND seq = ?"
            previous = self.value(known, (key, after))
        expected = after + 1
        for seq, body, chain in self.connection.execute(events, (key, after, limit)):
            if seq != expected or previous is None or link(previous, seq, body) != chain:
                raise ChainBroken(expected)
            yield seq, body
            previous, expected = chain, seq + 1

    def cut(self, conversation: str, from_seq: int) -> None:
        """Remove the events from a seq on."""
        key = self._key(conversation)
        self.rows("DELETE FROM events WHERE conversation = ? AND seq >= ?", (key, from_seq))
        self.change(conversation, open_turn=open_turn(self, key))

    def whole_after(self, conversation: str, seq: int) -> bool:
        """Return whether any event after this one is what was written."""
        events = "SELECT seq, body, chain FROM events WHERE conversation = ? AND seq >= ? ORDER BY seq"
        last: tuple[int, bytes] | None = None
        for number, body, chain in self.connection.execute(events, (self._key(conversation), seq)):
            if last is not None and last[0] + 1 == number and link(last[1], number, body) == chain:
                return True
            last = number, chain
        return False

    # --- settings ---

    def store_settings(self, conversation: str, plain: bytes, sealed: bytes | None) -> None:
        """Replace what is kept beside the events."""
        key = self._key(conversation)
        self.rows(
            "INSERT OR REPLACE INTO settings VALUES (?, ?, ?, ?)",
            (key, plain, sealed, sum_of(key, plain, sealed)),
        )

    def settings(self, conversation: str) -> tuple[bytes, bytes | None] | None:
        """Return what is kept beside the events, None when nothing is."""
        key = self._key(conversation)
        rows = self.rows("SELECT plain, sealed, sum FROM settings WHERE conversation = ?", (key,))
        if not rows:
            return None
        plain, sealed, sum = rows[0]
        if sum_of(key, plain, sealed) != sum:
            raise _damaged(conversation, "its settings are not what was written")
        return plain, sealed

    def _key(self, conversation: str, *, even_damaged: bool = False) -> int:
        rows = self.rows("SELECT key, damaged FROM conversations WHERE id = ?", (conversation,))
        if not rows:
            raise ConversationNotFound(f"no conversation {conversation}", conversation=conversation)
        key, damaged = rows[0]
        if damaged and not even_damaged:
            raise _damaged(conversation, damaged)
        return int(key)

    def _origin(self, key: int) -> bytes:
        return bytes(self.value("SELECT origin FROM conversations WHERE key = ?", (key,)))


def _damaged(conversation: str, why: str) -> ConversationDamaged:
    return ConversationDamaged(
        f"conversation {conversation} is damaged: {why}; it can only be deleted", conversation=conversation
    )
