"""Which conversations go by themselves: those that were only looked at, and those that nobody used for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Protocol

import msgspec
from msgspec import Struct

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import AgentServerError
from agent_server.logs import Logs

EVERY_SECONDS = 3600.0
LOOKED_AT_SECONDS = 86_400.0
"""After so long nobody comes back any more to what was only looked at, and not left properly."""
FEW_EVENTS = 10
OF_NOBODY = ("conversation_created", "workspace_changed")
"""What is in a log to which no client has added anything."""


class _Kind(Struct):
    type: str


class Removable(Protocol):
    """The conversations, as Retention sees them."""

    def in_memory(self, id: str) -> bool:
        """Whether somebody uses it, or did a short while ago."""
        ...

    async def is_empty(self, id: str) -> bool:
        """Whether nothing would be missed."""
        ...

    async def remove(self, id: str, *, unless_used: bool = False) -> None:
        """Remove it with its log and workspace."""
        ...


class Retention:
    """Which conversations go by themselves. Leaving it ends its tasks; what it was removing the next server removes."""

    def __init__(self, conversations: Removable, log: EventLog, logs: Logs, longest: float | None) -> None:
        """Take what it looks at; `longest`: seconds without an event after which a conversation goes, None: never."""
        self._conversations = conversations
        self._log = log
        self._logs = logs
        self._longest = longest
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Look now, and every hour."""
        self._start(self._for_ever())

    async def end(self) -> None:
        """End what it does; may be called again."""
        await cancel_and_wait(*self._tasks)

    def left(self, id: str, head_seq: int) -> None:
        """Remove a conversation that somebody has left for good, when it was only looked at."""
        if head_seq <= FEW_EVENTS:
            self._start(self._remove_if_empty(id))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _for_ever(self) -> None:
        while True:
            try:
                await self._look()
            except AgentServerError as exc:
                self._logs.log.warning("retention_failed", problem=str(exc))
            await asyncio.sleep(EVERY_SECONDS)

    async def _look(self) -> None:
        now = time.time()
        for row in await self._log.list():
            idle = now - row.updated_at
            if self._conversations.in_memory(row.id):
                continue
            if self._longest is not None and idle > self._longest:
                await self._conversations.remove(row.id)
            elif idle > LOOKED_AT_SECONDS and row.head_seq <= FEW_EVENTS and not row.damaged:
                await self._remove_if_empty(row.id)

    async def _remove_if_empty(self, id: str) -> None:
        try:
            if await self._is_untouched(id) and await self._conversations.is_empty(id):
                await self._conversations.remove(id, unless_used=True)
        except (AgentServerError, OSError) as exc:  # then it stays
            self._logs.log.debug("conversation_kept", conversation=id, problem=str(exc))

    async def _is_untouched(self, id: str) -> bool:
        events = await self._log.read(id, 0, FEW_EVENTS + 1)
        kinds = {msgspec.json.decode(body, type=_Kind).type for _, body in events}
        return len(events) <= FEW_EVENTS and kinds <= set(OF_NOBODY)
