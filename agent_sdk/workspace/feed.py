"""Bytes on their way into a process, without blocking the loop and without a limit on how long it may not read."""

from __future__ import annotations

import asyncio
import os

from agent_sdk.protocol.errors import InvalidParams, ProcessNotFound


class Feed:
    """Writes to a descriptor: a pipe's writing end or a terminal's master. It owns the descriptor."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`."""
        os.set_blocking(fd, False)
        self._fd = fd
        self._turn = asyncio.Lock()
        self._room: asyncio.Future[None] | None = None
        self.taken = 0
        """Bytes that went in so far."""

    @property
    def open(self) -> bool:
        """Whether it can still be written to."""
        return self._fd >= 0

    async def write(self, data: bytes) -> None:
        """Write all of it, after what others began to write; cancelling leaves the rest unwritten.

        Raises:
            ProcessNotFound: nobody can read it any more.
        """
        async with self._turn:
            await self._write(memoryview(data))

    async def write_at(self, offset: int, data: bytes) -> None:
        """Like `write`, for bytes that belong at `offset` of all the input: what went in already is left out.

        Raises:
            ProcessNotFound: nobody can read it any more.
            InvalidParams: bytes before `offset` are missing.
        """
        async with self._turn:
            if offset > self.taken:
                raise InvalidParams(
                    f"$.params.since: the process got {self.taken} bytes so far, and these begin at {offset}"
                )
            await self._write(memoryview(data)[self.taken - offset :])

    async def _write(self, view: memoryview) -> None:
        while True:
            view = view[self.write_now(view) :]
            if not view:
                return
            await self._wait_for_room()

    def write_now(self, data: bytes | memoryview) -> int:
        """Write what fits at this moment; returns how much that was.

        Raises:
            ProcessNotFound: nobody can read it any more.
        """
        if self._fd < 0:
            raise ProcessNotFound("the process has ended or closed its input")
        try:
            taken = os.write(self._fd, data) if data else 0
        except BlockingIOError:
            return 0
        except OSError:  # EPIPE; EIO from a terminal
            self.close()
            raise ProcessNotFound("the process has ended or closed its input") from None
        self.taken += taken
        return taken

    async def _wait_for_room(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._fd
        room = self._room = loop.create_future()
        loop.add_writer(fd, _settle, room)
        try:
            await room
        finally:
            self._room = None
            if self._fd == fd:
                loop.remove_writer(fd)

    def close(self) -> None:
        """Close it; whoever waits for room learns it. Harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._room is not None:
                asyncio.get_running_loop().remove_writer(fd)
                _settle(self._room)
            os.close(fd)


def _settle(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
