"""Reading a log and going on with what comes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from agent_sdk.conversation.journal import Journal
from agent_sdk.protocol.events import Event, decode

BUFFERED_BYTES = 1 << 20
"""Of events kept for a reader that is slow; one that is slower reads them from the log again."""


class Follower:
    """One reader of one journal: first what the log has, then live, without a gap. Unsubscribe it by `close`."""

    def __init__(self, journal: Journal, since: int) -> None:
        self._journal = journal
        self._seq = since
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._buffered = 0
        self._behind = True
        self._ended = False
        self._news = asyncio.Event()
        self._unsubscribe = journal.delivery.subscribe(self._listen)

    async def events(self, *, follow: bool) -> AsyncIterator[Event]:
        """Yield the events after `since`; with `follow` go on until `end`."""
        while True:
            if self._behind:
                self._behind = False
                async for seq, body in self._journal.pages(self._seq):
                    self._seq = seq
                    yield decode(body)
            while self._buffer:
                seq, body = self._buffer.popleft()
                self._buffered -= len(body)
                if seq > self._seq:
                    self._seq = seq
                    yield decode(body)
            if self._behind:
                continue
            if not follow or self._ended:
                return
            self._news.clear()
            await self._news.wait()

    def end(self) -> None:
        """Nothing will come any more; what came is still yielded."""
        self._ended = True
        self._news.set()

    def close(self) -> None:
        """Stop listening."""
        self._unsubscribe()

    def _listen(self, seq: int, body: bytes) -> None:
        if not self._behind:
            self._buffer.append((seq, body))
            self._buffered += len(body)
            if self._buffered > BUFFERED_BYTES and len(self._buffer) > 1:
                self._buffer.clear()
                self._buffered, self._behind = 0, True
        self._news.set()
