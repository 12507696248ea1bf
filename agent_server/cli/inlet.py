"""Standard input, read without a thread that could not be stopped and without changing the terminal."""

from __future__ import annotations

import asyncio
import os

PIECE_BYTES = 64 << 10
STDIN = 0


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
