"""Bytes on their way from a descriptor of a process into whatever takes them, without blocking the loop."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress

SMALLEST_READ, LARGEST_READ = 64 << 10, 1 << 20


class Intake:
    """Reads a descriptor whenever something comes, at most 1 MiB per turn of the loop. It owns the descriptor."""

    def __init__(self, fd: int, take: Callable[[bytes], bool]) -> None:
        """Start reading.

        Args:
            fd: the reading end of a pipe, or the master of a terminal.
            take: gets each piece; returns whether it wants more now (else `resume` has to be called).
        """
        self._fd = fd
        self._take = take
        self._amount = SMALLEST_READ
        self._listening = False
        self._loop = asyncio.get_running_loop()
        self.heard = self._loop.time()
        """When something came last, on the loop's clock."""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when nobody can write to it any more, or when it was closed."""
        os.set_blocking(fd, False)
        self.resume()

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return self._fd >= 0

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`, and cannot know what there is to read."""
        return self.open and not self._listening

    def resume(self) -> None:
        """Read on after `take` had enough."""
        if self._fd >= 0 and not self._listening:
            self._loop.add_reader(self._fd, self._ready)
            self._listening = True

    def drain(self, limit: int = LARGEST_READ) -> None:
        """Take what is there at this moment, up to `limit` bytes, whether it is wanted or not."""
        while self._fd >= 0 and limit > 0:
            data = self._read()
            if not data:
                return
            limit -= len(data)
            self._take(data)

    def close(self) -> None:
        """Stop; harmless when repeated."""
        self._pause()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if not self.ended.done():
            self.ended.set_result(None)

    def _ready(self) -> None:
        data = self._read()
        if data and not self._take(data):
            self._pause()

    def _pause(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._fd)
            self._listening = False

    def _read(self) -> bytes:
        """Return what is there; nothing when there is nothing now, and after closing at the end."""
        try:
            data = os.read(self._fd, self._amount)
        except BlockingIOError:
            return b""
        except OSError:  # a terminal without writers says EIO
            data = b""
        if not data:
            self.close()
            return b""
        self.heard = self._loop.time()
        if len(data) == self._amount:
            self._widen()
        return data

    def _widen(self) -> None:
        """Whoever fills a whole read writes much: fewer, larger reads, and a wider pipe."""
        if self._amount < LARGEST_READ:
            self._amount = min(LARGEST_READ, self._amount * 4)
            # It fails on a terminal, and when the user's share of pipe memory is used up.
            with suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, LARGEST_READ)
