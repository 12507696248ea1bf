"""What clients did and saw: records, one JSON line each, so that a run can be judged again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

FILE = "history.jsonl"
PATIENCE = 30
"""Seconds without any news after which a run gives up, so that it ends."""


class Called(Struct, frozen=True, kw_only=True, tag="called"):
    """A call that changes something, with all its repetitions: one op_id, one record when it is over."""

    client: str
    conversation: str
    op_id: str
    kind: str
    digest: str
    """Of the params."""
    begun: float
    """Seconds of this process's monotonic clock, like `ended`."""
    ended: float
    tries: int = 1
    outcome: Literal["ok", "error", "none"]
    """`none`: no answer ever came; whether it happened is open."""
    error: str = ""
    """The kind of the error."""
    seq: int = 0
    """Of its event, where the answer names one."""
    status: str = ""
    """Of a command, where the answer names one."""


class Saw(Struct, frozen=True, kw_only=True, tag="saw"):
    """An event as it reached a subscriber's callback."""

    client: str
    conversation: str
    epoch: str
    seq: int
    digest: str


class Begins(Struct, frozen=True, kw_only=True, tag="begins"):
    """A subscriber begins after this event: at its start, and when it was told that history is gone."""

    client: str
    conversation: str
    after: int


class Reached(Struct, frozen=True, kw_only=True, tag="reached"):
    """What a subscriber must have seen at the end: every event up to this one."""

    client: str
    conversation: str
    seq: int


class Ran(Struct, frozen=True, kw_only=True, tag="ran"):
    """A side effect of a command, read from a file that the command itself wrote."""

    op_id: str
    what: Literal["start", "end"]


class Left(Struct, frozen=True, kw_only=True, tag="left"):
    """Something that should be gone: a process, a folder, a mount."""

    what: str


Record = Called | Saw | Begins | Reached | Ran | Left


class Entry(Struct, frozen=True):
    """One event of the final log."""

    seq: int
    body: bytes


class Final(Struct, frozen=True):
    """A conversation as its log has it in the end."""

    epoch: str
    events: list[Entry]


Logs = dict[str, Final]


class History:
    """The records of a run, in memory and, with a folder, in a file."""

    def __init__(self, folder: Path | None = None) -> None:
        self.records: list[Record] = []
        self.answers = 0
        """How many calls are over."""
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []
        self._file = (folder / FILE).open("ab", buffering=1 << 16) if folder else None

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(msgspec.json.encode(record) + b"\n")
        if isinstance(record, Called):
            self.answers += 1
            for wanted, waiter in self._awaited:
                if wanted <= self.answers and not waiter.done():
                    waiter.set_result(None)

    @property
    def last_call(self) -> Called:
        """The call that was over last."""
        return next(record for record in reversed(self.records) if isinstance(record, Called))

    async def more(self, answers: int) -> None:
        """Wait until so many further calls are over."""
        waiter = asyncio.get_running_loop().create_future()
        self._awaited.append((self.answers + answers, waiter))
        async with asyncio.timeout(PATIENCE):
            await waiter
        self._awaited = [pair for pair in self._awaited if not pair[1].done()]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def load(folder: Path) -> Iterator[Record]:
    """The records of a kept run."""
    with (folder / FILE).open("rb") as file:
        for line in file:
            yield msgspec.json.decode(line, type=Record)


def digest(thing: Any) -> str:
    """A short fingerprint of JSON, however it is written."""
    return hashlib.sha256(msgspec.json.encode(thing, order="sorted")).hexdigest()[:16]
