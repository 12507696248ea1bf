"""Standard input, read without a thread that could not be stopped and without changing the terminal; standard output
and error, written without ever holding up the loop.

A pager that waits, a terminal that is held (^S) or a full pipe would otherwise stop heartbeats, and
the server would hang up on us.
"""

from __future__ import annotations

import asyncio
import os
import select

PIECE_BYTES = 64 << 10
STDIN = 0
ALWAYS_FITS = select.PIPE_BUF
"""A pipe that is ready takes this many bytes without waiting."""


class Inlet:
    """One descriptor to read from."""

    def __init__(self, descriptor: int = STDIN) -> None:
        self._descriptor = descriptor

    async def read(self) -> bytes:
        """Return the next bytes, at most 64 KiB; nothing at the end. Cancelling loses nothing.

        Raises:
            OSError: it cannot be read, e.g. because it is closed.
        """
        await self._ready()
        return os.read(self._descriptor, PIECE_BYTES)

    async def read_all(self) -> bytes:
        """Return everything up to the end."""
        pieces = []
        while piece := await self.read():
            pieces.append(piece)
        return b"".join(pieces)

    async def _ready(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._descriptor, ready.set)
        except PermissionError:
            return  # a regular file or /dev/null: never a reason to wait
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._descriptor)


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
