"""A Pipe moves whole frames, in order, both ways, and knows why it ended. It knows nothing of their meaning."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from agent_sdk.protocol.errors import ConnectionLost

MEMORY_BYTES = 256 << 10


class Pipe(Protocol):
    """One end of a connection."""

    async def send(self, frame: bytes | bytearray | memoryview, *, text: bool) -> None:
        """Send a frame; waits while the transport is full. The frame may be reused afterwards.

        Cancelling leaves the frame sent or not sent, never in part.

        Raises:
            ConnectionLost: the connection has ended.
        """
        ...

    def send_now(self, frame: bytes, *, text: bool) -> bool:
        """Send a frame if nothing has to be waited for; returns whether it was sent. `send` says why it was not."""
        return False

    async def receive(self) -> tuple[bytes, bool]:
        """The next frame, and whether it is text. One caller at a time; cancelling loses nothing.

        Raises:
            ConnectionLost: the connection has ended; `close_code` and `reason` in its details.
        """
        ...

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection, telling the other end why. Takes a bounded time; may be called again."""
        ...


def lost(code: int, reason: str = "") -> ConnectionLost:
    """The error that says how a connection ended; 1006: without a word."""
    why = f": {reason}" if reason else ""
    return ConnectionLost(f"the connection ended with {code}{why}", close_code=code, reason=reason)


class MemoryPipe(Pipe):
    """One end of a pair inside this process. It holds at most 256 KiB, or one frame, per direction."""

    def __init__(self) -> None:
        self._other = self
        self._frames: deque[tuple[bytes, bool]] = deque()
        self._held = 0
        self._lost: ConnectionLost | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._left: asyncio.Future[None] | None = None

    async def send(self, frame: bytes | bytearray | memoryview, *, text: bool) -> None:
        other = self._other
        while self._lost is None and other._frames and other._held + len(frame) > MEMORY_BYTES:
            if other._left is None or other._left.done():
                other._left = asyncio.get_running_loop().create_future()
            await asyncio.shield(other._left)
        if self._lost is not None:
            raise self._lost
        other._frames.append((bytes(frame), text))
        other._held += len(frame)
        wake(other._arrived)

    async def receive(self) -> tuple[bytes, bool]:
        while not self._frames:
            if self._lost is not None:
                raise self._lost
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        frame, text = self._frames.popleft()
        self._held -= len(frame)
        wake(self._left)
        return frame, text

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection. The other end still receives what was sent before."""
        self._frames.clear()
        self._end(lost(code, reason))
        self._other._end(lost(code, reason))

    def _end(self, reason: ConnectionLost) -> None:
        self._lost = self._lost or reason
        wake(self._arrived)
        wake(self._left)


def memory_pipes() -> tuple[Pipe, Pipe]:
    """Two connected ends inside this process."""
    here, there = MemoryPipe(), MemoryPipe()
    here._other, there._other = there, here
    return here, there


def wake(waiter: asyncio.Future[None] | None) -> None:
    """Let whoever waits on it go on."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
