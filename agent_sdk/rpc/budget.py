"""Memory for what arrives in pieces, shared by all connections: whole messages are needed, but not any number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent_sdk.protocol.errors import Overloaded

PATIENCE_SECONDS = 30.0
RETRY_AFTER_MS = 1000


class Budget:
    """Bytes that several may hold. Where all are in use, who has held some for long without an end gives way."""

    def __init__(self, limit: int, *, patience: float = PATIENCE_SECONDS) -> None:
        """Take the bytes, and the seconds that a message may take while others wait for room."""
        self.limit = limit
        self.used = 0
        self._patience = patience
        self._holders: dict[Share, float] = {}
        """And since when, those who came first first."""

    def __repr__(self) -> str:
        return f"<Budget {self.used} of {self.limit} bytes>"

    def share(self, give_way: Callable[[], None] | None = None) -> Share:
        """Return a share, of nothing yet; `give_way` is called when it has been taken away."""
        return Share(self, give_way)

    def _take(self, share: Share, size: int) -> None:
        now = asyncio.get_running_loop().time()
        for holder, since in list(self._holders.items()):
            if self.used + size <= self.limit or now - since < self._patience:
                break
            if holder is not share and holder.give_way is not None:
                holder.close()
                holder.give_way()
        if self.used + size > self.limit:
            raise Overloaded(
                f"limit {self.limit} bytes of messages that are on their way; send it again in a moment",
                limit=self.limit,
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._holders.setdefault(share, now)
        self.used += size

    def _give(self, share: Share, size: int, *, all: bool) -> None:
        self.used -= size
        if all:
            self._holders.pop(share, None)


class Share:
    """What one of them holds."""

    def __init__(self, budget: Budget, give_way: Callable[[], None] | None) -> None:
        """Shares are made by `Budget.share`."""
        self.give_way = give_way
        self._budget = budget
        self._size = 0

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            Overloaded: there is no room; details: limit, retry_after_ms.
        """
        self._budget._take(self, size)
        self._size += size

    def give(self, size: int) -> None:
        """Give bytes back; never more than it holds."""
        size = min(size, self._size)
        self._size -= size
        self._budget._give(self, size, all=not self._size)

    def close(self) -> None:
        """Give all of it back."""
        self.give(self._size)
