"""The rows of operations: what has begun, and what it answered.

They are what the log remembers as a back end of `agent_sdk.idempotency` (`event_log.LoggedOperations`). What is not
kept any more shrinks to a mark that the op_id was used, so that it never runs again: an answer that is older than
KEPT_SECONDS, when there are KEPT newer ones in its conversation.
Age is counted by a clock that runs only while the log is open, so no jump of the machine's clock ends
it early. Rows shrink two at a time when new ones are written; there is no timer.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from agent_sdk.idempotency import KEPT, KEPT_SECONDS, Asked, Known
from agent_sdk.log.chain import sum_of
from agent_sdk.protocol.errors import OutcomeUnknown

if TYPE_CHECKING:
    from agent_sdk.log.storage import Storage

TRIMMED_AT_ONCE = 2
NOTED_EVERY = 60.0

BEGUN, FINISHED, EXPIRED = range(3)

_FIELDS = "op_id, state, digest, method, instance, at, age, result"


class OperationRow(NamedTuple):
    """One remembered operation."""

    op_id: str
    state: int
    digest: bytes
    method: str
    instance: str
    at: float
    age: float
    result: bytes

    @property
    def known(self) -> Known[bytes]:
        """What is told of it."""
        answer = None if self.state == BEGUN else self.result
        return Known(op_id=self.op_id, method=self.method, instance=self.instance, at=self.at, answer=answer)


class Operations:
    """The operations of one connection's file. `key` is that of a conversation's row."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._started = time.monotonic()
        self._before: float | None = None
        self._noted = 0.0

    def find(self, key: int, call: Asked) -> OperationRow | None:
        """Return what is remembered of a call.

        Raises:
            OpExpired: its answer is not known any more.
            OpMismatch: the op_id was used with other params.
            OutcomeUnknown: what is remembered is damaged.
        """
        row = self._row(key, call.op_id)
        if row is not None:
            call.check(None if row.state == EXPIRED else row.digest)
        return row

    def begin(self, key: int, call: Asked) -> None:
        """Remember that a call is about to run."""
        self._insert(key, call, BEGUN, b"")

    def put(self, key: int, call: Asked, result: bytes) -> None:
        """Remember a call that has run."""
        self._insert(key, call, FINISHED, result)

    def finish(self, key: int, op_id: str, result: bytes) -> None:
        """Remember what an operation answered that was begun; nothing happens when it was not."""
        row = self._row(key, op_id)
        if row is not None and row.state == BEGUN:
            self._update(key, row._replace(state=FINISHED, result=result))

    def withdraw(self, key: int, op_id: str) -> None:
        """Forget an operation that was begun in vain."""
        self._storage.rows(
            "DELETE FROM operations WHERE conversation = ? AND op_id = ? AND state = ?", (key, op_id, BEGUN)
        )

    def begun(self, key: int) -> list[OperationRow]:
        """Return the operations that have begun and not finished, oldest first; but none whose row is damaged."""
        rows = self._storage.rows(
            f"SELECT {_FIELDS}, sum FROM operations WHERE conversation = ? AND state = ? ORDER BY nth",
            (key, BEGUN),
        )
        found = []
        for row in rows:
            with suppress(OutcomeUnknown):
                found.append(_whole(*row))
        return found

    def answered(self, key: int, words: bytes) -> str | None:
        """Return the instance whose operation has these bytes in its answer; None: there is none that is kept."""
        rows = self._storage.rows(
            "SELECT instance FROM operations WHERE conversation = ? AND state = ? AND instr(result, ?) LIMIT 1",
            (key, FINISHED, words),
        )
        return str(rows[0][0]) if rows else None

    def _row(self, key: int, op_id: str) -> OperationRow | None:
        rows = self._storage.rows(
            f"SELECT {_FIELDS}, sum FROM operations WHERE conversation = ? AND op_id = ?", (key, op_id)
        )
        return _whole(*rows[0]) if rows else None

    def _insert(self, key: int, call: Asked, state: int, result: bytes) -> None:
        last = self._storage.value("SELECT max(nth) FROM operations WHERE conversation = ?", (key,))
        nth = (last or 0) + 1
        row = OperationRow(
            call.op_id, state, call.digest, call.method, call.instance, time.time(), self._clock(), result
        )
        self._storage.rows(
            "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (key, nth, *row, sum_of(*row))
        )
        self._trim(key, nth - KEPT, row.age - KEPT_SECONDS)

    def _trim(self, key: int, nth: int, age: float) -> None:
        rows = self._storage.rows(
            f"SELECT {_FIELDS} FROM operations WHERE conversation = ? AND state = ? AND nth <= ? "
            "ORDER BY nth LIMIT ?",
            (key, FINISHED, nth, TRIMMED_AT_ONCE),
        )
        for fields in rows:
            row = OperationRow(*fields)
            if row.age <= age:
                self._update(key, row._replace(state=EXPIRED, digest=b"", result=b""))

    def _update(self, key: int, row: OperationRow) -> None:
        self._storage.rows(
            "UPDATE operations SET state = ?, digest = ?, result = ?, sum = ? WHERE conversation = ? AND op_id = ?",
            (row.state, row.digest, row.result, sum_of(*row), key, row.op_id),
        )

    def _clock(self) -> float:
        """Seconds that the log has been open in its life; a process that is killed forgets the last minute."""
        if self._before is None:
            self._before = self._noted = float(self._storage.value("SELECT seconds FROM clock"))
        seconds = self._before + time.monotonic() - self._started
        if seconds - self._noted > NOTED_EVERY:
            self._noted = seconds
            self._storage.rows("UPDATE clock SET seconds = ?", (seconds,))
        return seconds


def _whole(*fields: Any) -> OperationRow:
    *values, sum = fields
    row = OperationRow(*values)
    if sum_of(*row) != sum:
        raise OutcomeUnknown("what is remembered of this operation is damaged", op_id=row.op_id)
    return row
