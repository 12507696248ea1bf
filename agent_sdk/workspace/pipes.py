"""The pipes and terminals of a process, read and written without blocking the loop."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from agent_sdk.protocol.errors import InvalidParams, ProcessNotFound

SMALLEST_READ, LARGEST_READ = 64 << 10, 1 << 20
Reading = Literal["lines", "keys", "edited"]


class PipeReader:
    """Reads from a process whenever something comes, at most 1 MiB per turn of the loop. It owns the descriptor."""

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


class PipeWriter:
    """Writes to a process, however long that does not read. It owns the descriptor."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`: the writing end of a pipe, or the master of a terminal."""
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

    async def write_last(self, data: bytes) -> None:
        """Write all of it, as far as somebody reads, and close."""
        with suppress(ProcessNotFound):
            await self.write(data)
        self.close()

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


@dataclass
class Terminal:
    """The side of a terminal where a person would sit (`master`), and its other side."""

    master: int
    slave: int
    name: str
    """Path of the other side."""

    def discard_input(self) -> None:
        """Drop what was typed and not read."""
        termios.tcflush(self.slave, termios.TCIFLUSH)

    def close_slave(self) -> None:
        """Let the master see the end once no process has the other side open. Harmless when repeated."""
        slave, self.slave = self.slave, -1
        if slave >= 0:
            os.close(slave)


def open_terminal(rows: int, cols: int) -> Terminal:
    """Open a terminal; both descriptors are the caller's.

    The other side stays open here as well: a master whose other side nobody has open yet reads as ended.
    """
    master, slave = os.openpty()
    resize(master, rows, cols)
    return Terminal(master, slave, os.ttyname(slave))


def resize(master: int, rows: int, cols: int) -> None:
    """Set the size in characters; the programs on the terminal get WINCH."""
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def reading(fd: int) -> Reading:
    """Return how the program on a terminal reads: `lines`, single `keys`, or keys of a line that is `edited`.

    Who edits a line (or a whole screen) takes Enter as the key that it is; who asks for a key (`read -n1`) does not.
    """
    modes = termios.tcgetattr(fd)
    if modes[3] & termios.ICANON:
        return "lines"
    return "keys" if modes[0] & termios.ICRNL else "edited"


def make_plain(fd: int) -> None:
    """Have bytes pass as they are: no echo of what is typed, no carriage return before a newline.

    Keys keep their meaning (^C interrupts, ^D ends the input).
    """
    modes = termios.tcgetattr(fd)
    modes[1] &= ~termios.OPOST
    modes[3] &= ~(termios.ECHO | termios.ECHONL)
    modes[3] |= termios.ICANON | termios.ISIG
    modes[0] |= termios.ICRNL
    termios.tcsetattr(fd, termios.TCSANOW, modes)
