"""What the server is doing right now, so that it can stop without breaking off what has begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agent_sdk.protocol.errors import RETRY_AFTER_MS as RETRY_AFTER_MS
from agent_sdk.protocol.errors import Overloaded, draining


class Work:
    """Calls that change something, downloads, and agent turns, while they run."""

    def __init__(self, *, max_turns: int = 1000, max_pending_writes: int = 10_000) -> None:
        """Begin with nothing under way.

        Args:
            max_turns: agent turns at a time; those that were begun by a former server count, and go on.
            max_pending_writes: writes that may wait for the log.
        """
        self.draining = False
        """Whether the server is about to stop."""
        self.pending_writes: Callable[[], int] = int
        """Tells how many writes wait for the log."""
        self.disk_full: Callable[[], bool] = bool
        """Tells whether the log finds no room."""
        self._max_turns = max_turns
        self._max_pending_writes = max_pending_writes
        self._turns = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Work {self._running} under way{', draining' if self.draining else ''}>"

    @property
    def running(self) -> int:
        """How many calls are under way."""
        return self._running

    def admit(self) -> None:
        """Let new work begin.

        Raises:
            Overloaded: the server drains, or the log has too much to write; details: reason, retry_after_ms.
        """
        if self.draining:
            raise draining()
        if (waiting := self.pending_writes()) >= self._max_pending_writes:
            raise _too_much("writes wait for the log", self._max_pending_writes, waiting)

    def admit_turn(self) -> None:
        """Let a new turn begin, or a message that one will answer be written.

        Raises:
            Overloaded: as many turns run as may; details: reason, limit, retry_after_ms.
        """
        if self._turns >= self._max_turns:
            raise _too_much("turns run", self._max_turns, self._turns)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count an agent turn."""
        self._turns += 1
        try:
            with self.under_way():
                yield
        finally:
            self._turns -= 1

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Count something that the end of the server should wait for."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def finished(self, seconds: float) -> bool:
        """Wait until nothing is under way, at most this long; returns whether it came to that."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def _too_much(what: str, limit: int, got: int) -> Overloaded:
    return Overloaded(
        f"limit {limit} {what}; call again in a moment",
        reason=what,
        limit=limit,
        got=got,
        retry_after_ms=RETRY_AFTER_MS,
    )
