"""The event log: what is in it has happened. Knows no agent and no client.

One file holds the conversations of a server, or of a folder. Writing is done by one connection in
one thread; an append returns after its fsync. Reading uses a connection of its own, so that a
long replay delays no append.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent_sdk.idempotency import Asked, BackEnd, Known
from agent_sdk.ids import new_id
from agent_sdk.log.chain import ChainBroken
from agent_sdk.protocol.errors import ConversationDamaged, LeaseLost, StorageFull
from agent_sdk.protocol.events import (
    Event,
    LogRecovered,
    TurnEnded,
    TurnStarted,
    Unknown,
    UserMessage,
    encode,
)

if TYPE_CHECKING:
    import asyncio

    from agent_sdk.log.database import ConversationRow, Database
    from agent_sdk.log.operations import Operations
    from agent_sdk.log.thread import DatabaseThread

T = TypeVar("T")

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


class EventLog:
    """The log of all conversations. All methods may be called at any time from the loop that opened it.

    Raises (any method):
        ConversationNotFound: there is no such conversation.
        ConversationDamaged: it is not what was written; only `delete` and `list` go on.
        StorageFull: nothing was written; it works again when there is room.
        WorkspaceUnavailable: the disk failed or another process holds the file; nothing was written.
        StateConflict: the log is closed.
    """

    def __init__(self, writer: DatabaseThread, reader: DatabaseThread, recovered: tuple[str, ...]) -> None:
        self._writer = writer
        self._reader = reader
        self.recovered = recovered
        """What had to be done about damage when the log was opened, a sentence each."""
        self._heads: dict[str, int] = {}
        """Used by the writer's thread alone."""

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path | None, *, sole: bool = False) -> AsyncIterator[EventLog]:
        """Open the log in this file, making it and its folder; None: in memory. Leaving writes what is queued.

        Args:
            sole: the caller sees to it that no other process uses the file: it is examined and, where it
                is damaged, saved; and a reserve of room is kept beside it, so that a full disk can be
                made room on.

        Raises:
            PathDenied, PathError, StorageFull: the place cannot be used.
            Conflict: the file was written by a newer version, or is something else.
        """
        # SQLite is loaded by those who need it.
        from agent_sdk.log.database import Database  # noqa: PLC0415
        from agent_sdk.log.recovery import open_log  # noqa: PLC0415
        from agent_sdk.log.thread import DatabaseThread  # noqa: PLC0415

        recovered: builtins.list[str] = []

        def open_writer() -> Database:
            database, sentences = open_log(path, sole=sole)
            recovered.extend(sentences)
            return database

        async with AsyncExitStack() as stack:
            writer = reader = await stack.enter_async_context(
                DatabaseThread(open_writer, name="event-log-writer")
            )
            if path is not None:
                reader = await stack.enter_async_context(
                    DatabaseThread(lambda: Database(path, read_only=True), name="event-log-reader")
                )
            yield cls(writer, reader, tuple(recovered))

    @property
    def failed(self) -> asyncio.Future[BaseException]:
        """Done, with the error, when the disk has failed: nothing is acknowledged any more, so end the program.

        Shield it when waiting for it.
        """
        return self._writer.failed

    def pending_writes(self) -> int:
        """Return how many jobs wait to be written."""
        return self._writer.pending

    @property
    def full(self) -> bool:
        """Whether the last write found no room; reading and deleting go on, and the next write tries again."""
        return self._writer.full

    async def create(self, conversation: str, meta: dict[str, Any] | None = None) -> str:
        """Make a conversation, or attach to the existing one, whose `meta` stays; return its epoch."""
        epoch, at, encoded = new_id(), time.time(), msgspec.json.encode(meta or {})

        def work(database: Database) -> str:
            self._heads.pop(conversation, None)
            row = database.create(conversation, epoch, at, encoded)
            if row.recovered is not None:
                self._tell_of_recovery(database, conversation, row.recovered)
            return row.epoch

        return await self._write(conversation, work)

    async def append(
        self, conversation: str, events: Sequence[Event], *, op: Operation | None = None
    ) -> list[Event]:
        """Write events, all or none, and return them with `seq` and `at` after the commit.

        With `op` its row is written in the same commit. When the operation is already known nothing is
        appended and the list is empty: `operations` tells what it answered. Cancelling ends the waiting only.

        Raises:
            LeaseLost: another process has written to this conversation since `create`.
            OpMismatch: the op_id is known with another digest.
            OpExpired: the op_id is known, and what it answered is not.
        """
        return [record.event for record in await self.submit(conversation, events, op=op)]

    def submit(
        self,
        conversation: str,
        events: Sequence[Event],
        *,
        op: Operation | None = None,
        settings: tuple[bytes, bytes | None] | None = None,
    ) -> asyncio.Future[list[Record]]:
        """Like `append`, but queue it now; submissions of a conversation are committed in their order.

        With `settings` the stored settings of the conversation are replaced in the same commit.
        """

        work = partial(self._append, conversation, events, op, settings)
        return self._writer.submit(work, lane=conversation, writes=True)

    def operations(self, conversation: str) -> LoggedOperations:
        """Return what is remembered of the calls of a conversation."""
        return LoggedOperations(self._writer, conversation)

    async def read(
        self,
        conversation: str,
        after: int = 0,
        limit: int = PAGE_EVENTS,
        max_bytes: int = PAGE_BYTES,
        *,
        mend: bool = False,
    ) -> builtins.list[tuple[int, bytes]]:
        """Return (seq, JSON) of the events after a seq, in order, each proven to be what was written.

        At most `limit`, and no more than `max_bytes` together unless the first alone is longer.

        Args:
            mend: nobody uses the conversation yet: cut a damaged end off, begin a new epoch, and say so
                in a LogRecovered. Damage that whole events follow is never mended.
        """
        while True:
            try:
                return await self._reader.submit(
                    lambda database: database.page(conversation, after, limit, max_bytes), writes=False
                )
            except ChainBroken as broken:
                seq = broken.seq
            await self._write(conversation, partial(self._judge, conversation, seq, mend))
            if not mend:
                raise ConversationDamaged(
                    f"conversation {conversation} is damaged from seq {seq} on",
                    conversation=conversation,
                    seq=seq,
                ) from None

    async def epoch(self, conversation: str) -> str:
        """Return the present epoch."""
        return await self._reader.submit(
            lambda database: database.conversation(conversation).epoch, writes=False
        )

    async def head(self, conversation: str) -> int:
        """Return the seq of the last event, 0 when there is none."""
        return await self._reader.submit(lambda database: database.head(conversation), writes=False)

    async def list(self, ids: Sequence[str] | None = None) -> builtins.list[ConversationRow]:
        """Return all conversations, or those of these ids, newest first; what does not exist is left out."""
        return await self._reader.submit(lambda database: database.conversations(ids), writes=False)

    async def set_meta(self, conversation: str, meta: dict[str, Any]) -> None:
        """Replace what is noted about a conversation: any JSON, nothing secret."""
        encoded = msgspec.json.encode(meta)
        await self._write(conversation, lambda database: database.change(conversation, meta=encoded))

    async def store_settings(self, conversation: str, plain: bytes, sealed: bytes | None) -> None:
        """Replace what is kept beside the events; nothing secret in `plain`."""
        await self._write(conversation, lambda database: database.store_settings(conversation, plain, sealed))

    async def settings(self, conversation: str) -> tuple[bytes, bytes | None] | None:
        """Return what `store_settings` kept, None when it kept nothing."""
        return await self._writer.submit(
            lambda database: database.settings(conversation), lane=conversation, writes=False
        )

    async def settings_of(self, ids: Sequence[str]) -> dict[str, tuple[bytes, bytes | None]]:
        """Return `settings` of several as of the last commit; what has none or cannot be read is left out."""
        return await self._reader.submit(lambda database: database.settings_of(ids), writes=False)

    async def delete(self, conversation: str) -> None:
        """Remove a conversation with all that belongs to it, and give its room back to the disk."""

        def work(database: Database) -> None:
            self._heads.pop(conversation, None)
            database.delete(conversation)

        await self._writer.submit(work, lane=conversation, writes=True, frees=True)
        with suppress(StorageFull):  # what is free in the file is used by what is written next
            while await self._write(conversation, lambda database: database.shrink()):
                pass

    def _write(self, conversation: str, work: Callable[[Database], T]) -> asyncio.Future[T]:
        return self._writer.submit(work, lane=conversation, writes=True)

    # --- in the writer's thread, inside a transaction that may still fail ---

    def _append(
        self,
        conversation: str,
        events: Sequence[Event],
        op: Operation | None,
        settings: tuple[bytes, bytes | None] | None,
        database: Database,
    ) -> Records:
        if settings is not None:
            database.store_settings(conversation, *settings)
        tail = database.tail(conversation)
        call = None if op is None else Asked(op.op_id, op.digest)
        if call is not None and database.operations.find(tail.key, call):
            return []
        # Heads only ever grow, and one that a failed commit has left too high must not lock us out.
        if tail.seq > self._heads.get(conversation, tail.seq):
            raise LeaseLost("another process writes to this conversation; open it anew")
        records, messages, turns = [], False, False
        for seq, event in enumerate(events, tail.seq + 1):
            if isinstance(event, Unknown):
                raise TypeError(
                    "an event of an unknown kind cannot be written anew: its seq is part of its JSON"
                )
            numbered = replace(event, seq=seq, at=time.time())
            records.append(Record(numbered, encode(numbered)))
            messages = messages or isinstance(event, UserMessage)
            turns = turns or isinstance(event, TurnStarted | TurnEnded)
        database.insert(conversation, tail, [(event.at, body) for event, body in records])
        self._heads[conversation] = tail.seq + len(records)
        if turns:
            database.note_turn(conversation)
        elif messages:  # without a look at what came before: there may be any number of them
            database.note_message(conversation)
        if op is not None and call is not None:
            result = op.result if isinstance(op.result, bytes) else op.result([r.event for r in records])
            database.operations.put(tail.key, call, result)
        return records

    def _judge(self, conversation: str, seq: int, mend: bool, database: Database) -> None:
        """An event was found that is not what was written."""
        why = f"the event with seq {seq} is not what was written"
        if database.whole_after(database.key(conversation), seq):
            database.change(conversation, damaged=why)
        elif mend:
            database.cut(conversation, seq)
            database.change(conversation, epoch=new_id())
            self._heads.pop(conversation, None)
            self._tell_of_recovery(database, conversation, "the end of the log was damaged")
        else:
            database.spoil(conversation, why)

    def _tell_of_recovery(self, database: Database, conversation: str, reason: str) -> None:
        head = database.tail(conversation).seq
        self._append(conversation, [LogRecovered(reason=reason, after_seq=head)], None, None, database)
        database.change(conversation, recovered=None)


class LoggedOperations(BackEnd[bytes]):
    """The operations of one conversation. What is begun or finished is on the disk when that returns.

    Raises (any method):
        ConversationNotFound, StorageFull, …: what EventLog raises.
        OutcomeUnknown: what is remembered is damaged.
    """

    def __init__(self, writer: DatabaseThread, conversation: str) -> None:
        self._writer = writer
        self._conversation = conversation

    async def find(self, call: Asked) -> Known[bytes] | None:
        """Return what `begin` returns, without beginning anything."""

        def work(rows: Operations, key: int) -> Known[bytes] | None:
            row = rows.find(key, call)
            return None if row is None else row.known

        return await self._do(work, writes=False)

    async def begin(self, call: Asked) -> Known[bytes] | None:
        def work(rows: Operations, key: int) -> Known[bytes] | None:
            if row := rows.find(key, call):
                return row.known
            rows.begin(key, call)
            return None

        return await self._do(work)

    async def finish(self, op_id: str, answer: bytes) -> None:
        await self._do(lambda rows, key: rows.finish(key, op_id, answer))

    async def withdraw(self, op_id: str) -> None:
        await self._do(lambda rows, key: rows.withdraw(key, op_id))

    async def begun(self) -> list[Known[bytes]]:
        """Return what has begun and not finished, oldest first."""
        return await self._do(lambda rows, key: [row.known for row in rows.begun(key)], writes=False)

    async def instance_of(self, process_id: str) -> str | None:
        """Return the box in which an operation of the conversation has started this process, if that is remembered."""
        words = b'"process_id":%b' % msgspec.json.encode(process_id)
        return await self._do(lambda rows, key: rows.answered(key, words), writes=False)

    def _do(self, work: Callable[[Operations, int], T], *, writes: bool = True) -> asyncio.Future[T]:
        return self._writer.submit(
            lambda database: work(database.operations, database.key(self._conversation)),
            lane=self._conversation,
            writes=writes,
        )
