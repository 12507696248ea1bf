"""The event log: what is in it has happened. Knows no agent and no client.

One file holds the conversations of a server, or of a folder. Writing is done by one connection in
one thread; an append returns after its fsync. Reading uses a connection of its own, so that a
long replay delays no append.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import LeaseLost, OpMismatch
from agent_sdk.protocol.events import Event, Unknown, encode

if TYPE_CHECKING:
    import asyncio

    from agent_sdk.local.clerk import Clerk
    from agent_sdk.local.database import Database

PAGE_EVENTS = 1000
PAGE_BYTES = 512 << 10


class Record(NamedTuple):
    """An event that is in the log, and its JSON."""

    event: Event
    body: bytes


Records = list[Record]


class Operation(Struct, frozen=True):
    """What a state-changing call is remembered by."""

    op_id: str
    digest: bytes
    """Of its params; the same op_id with another digest is another call."""
    result: bytes | Callable[[Sequence[Event]], bytes]
    """What it answers, or a function of the numbered events that makes it (called in the log's thread)."""


class ConversationRow(Struct, frozen=True, kw_only=True):
    """One conversation of a log."""

    id: str
    epoch: str
    created_at: float
    updated_at: float
    """Of the last event; seconds since the Unix epoch, like `created_at`."""
    head_seq: int
    meta: dict[str, Any]


class EventLog:
    """See the module's docstring. All methods may be called at any time from the loop that opened it.

    Raises (any method):
        ConversationNotFound: there is no such conversation.
        StorageFull: nothing was written; it works again when there is room.
        WorkspaceUnavailable: the disk failed or another process holds the file; nothing was written.
        StateConflict: the log is closed.
    """

    def __init__(self, writer: Clerk, reader: Clerk) -> None:
        self._writer = writer
        self._reader = reader
        self._heads: dict[str, int] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path | None) -> AsyncIterator[EventLog]:
        """Open the log in this file, making it and its folder; None: in memory. Leaving writes what is queued.

        Raises:
            PathDenied, PathError, StorageFull: the place cannot be used.
            Conflict: the file was written by a newer version, or is something else.
        """
        from agent_sdk.local.clerk import Clerk  # noqa: PLC0415  SQLite is loaded by those who need it
        from agent_sdk.local.database import Database, make_folder  # noqa: PLC0415

        def open_writer() -> Database:
            if path is not None:
                make_folder(path.parent)
            return Database(path)

        clerks: list[Clerk] = []
        try:
            clerks.append(Clerk(open_writer, name="event-log-writer"))
            await clerks[0].ready()
            if path is not None:
                clerks.append(Clerk(lambda: Database(path, read_only=True), name="event-log-reader"))
                await clerks[1].ready()
            yield cls(clerks[0], clerks[-1])
        finally:
            for clerk in reversed(clerks):
                await clerk.stop()

    async def create(self, conversation: str, meta: dict[str, Any] | None = None) -> str:
        """Make a conversation, or attach to the existing one, whose `meta` stays; return its epoch."""
        epoch, at, encoded = new_id(), time.time(), msgspec.json.encode(meta or {})

        def work(database: Database) -> str:
            self._heads.pop(conversation, None)
            return database.create(conversation, epoch, at, encoded)

        return await self._writer.submit(work, writes=True)

    async def append(
        self, conversation: str, events: Sequence[Event], *, op: Operation | None = None
    ) -> list[Event]:
        """Write events, all or none, and return them with `seq` and `at` after the commit.

        With `op` its row is written in the same commit. When the operation is already known nothing is
        appended and the list is empty: `operation` returns what it answered. Cancelling ends the waiting only.

        Raises:
            LeaseLost: another process has written to this conversation since `create`.
            OpMismatch: the op_id is known with another digest.
        """
        return [record.event for record in await self.submit(conversation, events, op=op)]

    def submit(
        self, conversation: str, events: Sequence[Event], *, op: Operation | None = None
    ) -> asyncio.Future[list[Record]]:
        """Like `append`, but queue it now; submissions are committed in their order."""

        def work(database: Database) -> list[Record]:
            return self._write(database, conversation, events, op)

        return self._writer.submit(work, writes=True)

    async def operation(self, conversation: str, op_id: str) -> Operation | None:
        """Return a remembered operation."""
        row = await self._writer.submit(
            lambda database: database.operation(conversation, op_id), writes=False
        )
        return Operation(op_id, row[0], row[1]) if row else None

    async def read(
        self, conversation: str, after: int = 0, limit: int = PAGE_EVENTS, max_bytes: int = PAGE_BYTES
    ) -> list[tuple[int, bytes]]:
        """Return (seq, JSON) of the events after a seq, in order.

        At most `limit`, and no more than `max_bytes` together unless the first alone is longer.
        """
        return await self._reader.submit(
            lambda database: database.page(conversation, after, limit, max_bytes), writes=False
        )

    async def head(self, conversation: str) -> int:
        """Return the seq of the last event, 0 when there is none."""
        return await self._reader.submit(lambda database: database.head(conversation), writes=False)

    async def list(self) -> list[ConversationRow]:
        """Return all conversations, newest first."""
        rows = await self._reader.submit(lambda database: database.conversations(), writes=False)
        return [
            ConversationRow(
                id=id,
                epoch=epoch,
                created_at=created,
                meta=msgspec.json.decode(meta),
                head_seq=seq,
                updated_at=at,
            )
            for id, epoch, created, meta, seq, at in rows
        ]

    async def set_meta(self, conversation: str, meta: dict[str, Any]) -> None:
        """Replace what is noted about a conversation: any JSON, nothing secret."""
        encoded = msgspec.json.encode(meta)
        await self._writer.submit(lambda database: database.set_meta(conversation, encoded), writes=True)

    async def delete(self, conversation: str) -> None:
        """Remove a conversation with all its events."""

        def work(database: Database) -> None:
            self._heads.pop(conversation, None)
            database.delete(conversation)

        await self._writer.submit(work, writes=True)

    def _write(
        self, database: Database, conversation: str, events: Sequence[Event], op: Operation | None
    ) -> Records:
        """In the writer's thread, inside a transaction that may still fail."""
        if op is not None and (known := database.operation(conversation, op.op_id)):
            if known[0] != op.digest:
                raise OpMismatch("this op_id was used for another call", op_id=op.op_id)
            return []
        head = database.head(conversation)
        # Heads only ever grow, and one that a failed commit has left too high must not lock us out.
        if head > self._heads.get(conversation, head):
            raise LeaseLost("another process writes to this conversation; open it anew")
        records = [_number(event, head + nth) for nth, event in enumerate(events, 1)]
        database.insert(conversation, [(r.event.seq, r.event.at, r.body) for r in records])
        self._heads[conversation] = head + len(records)
        if op is not None:
            result = op.result if isinstance(op.result, bytes) else op.result([r.event for r in records])
            database.put_operation(conversation, op.op_id, op.digest, result)
        return records


def _number(event: Event, seq: int) -> Record:
    if isinstance(event, Unknown):
        raise TypeError("an event of an unknown kind cannot be written anew: its seq is part of its JSON")
    numbered = replace(event, seq=seq, at=time.time())
    return Record(numbered, encode(numbered))
