"""Standard output and error, written without ever holding up the loop.

A pager that waits, a terminal that is held (^S) or a full pipe would otherwise stop heartbeats, and
the server would hang up on us.
"""

from __future__ import annotations

import asyncio
import os
import select

ALWAYS_FITS = select.PIPE_BUF
"""A pipe that is ready takes this many bytes without waiting."""


class Outlet:
    """One descriptor to write to. Pieces arrive whole and in the order of the calls."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._turn = asyncio.Lock()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def columns(self) -> int | None:
        """Return the width of the terminal that it is; None when it is none."""
        try:
            return os.get_terminal_size(self.descriptor).columns or None
        except OSError:
            return None

    async def write(self, data: bytes) -> None:
        """Write all of it; cancelling leaves the rest unwritten.

        Raises:
            BrokenPipeError: nobody reads any more.
            OSError: the disk is full, …
        """
        async with self._turn:
            view = memoryview(data)
            while view:
                if not self._poll.poll(0):
                    await self._room()
                view = view[os.write(self.descriptor, view[:ALWAYS_FITS]) :]

    async def _room(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self.descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self.descriptor)
