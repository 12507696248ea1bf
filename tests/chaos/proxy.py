"""A TCP proxy in front of a server, for everything a bad network does to a connection."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Literal, Self

from tests.chaos.client import Place
from tests.chaos.server import free_port

PIECE = 1 << 16
Direction = Literal["up", "down"]
"""`up`: from the client to the server."""


class Proxy:
    """See the module's docstring. It is a client.Place, with the server's `up`.

    What it does to a connection is decided when that begins; `hold` and `cut` hit those that are there.
    """

    def __init__(self, server: Place) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.up = server.up
        self.passed = {"up": 0, "down": 0}
        """Bytes that went through, over all connections."""
        self.connections = 0
        self.cuts: list[tuple[Direction, int]] = []
        """For each of the next connections: after how many bytes of which direction it is cut."""
        self.piece = PIECE
        """The most that is passed on at once."""
        self.delay = 0.0
        """Seconds that each piece takes."""
        self.refuse = False
        """Whether new connections are reset at once."""
        self.on_connection: Callable[[], object] = lambda: None
        """Called when one is made, before anything passes through it."""
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = server
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._begin, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._listener.wait_closed()

    def hold(self) -> None:
        """Pass nothing on, say nothing: what a half-open connection is like."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass on again, what was held first."""
        self._flowing.set()

    def cut(self, *, reset: bool = False) -> None:
        """End all connections; with `reset` as a crash does."""
        for writers in self._open.values():
            for writer in writers:
                _end(writer, reset=reset)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            _end(writer, reset=True)
            return
        self.connections += 1
        self.on_connection()
        task = asyncio.create_task(self._connect(reader, writer))
        self._open[task] = [writer]
        task.add_done_callback(self._open.pop)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = self._open[asyncio.current_task()]
        cut_after = dict([self.cuts.pop(0)] if self.cuts else [])
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            writers.append(other_writer)
            both = [
                asyncio.create_task(self._pass("up", reader, other_writer, cut_after.get("up"))),
                asyncio.create_task(self._pass("down", other_reader, writer, cut_after.get("down"))),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        except OSError:
            pass
        finally:
            for each in writers:
                each.close()
            await asyncio.gather(*(each.wait_closed() for each in writers), return_exceptions=True)

    async def _pass(
        self, way: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None
    ) -> None:
        """Until the end of either side, or `left` bytes have passed."""
        while data := await reader.read(self.piece):
            if self.delay:
                await asyncio.sleep(self.delay)
            await self._flowing.wait()
            data = data if left is None else data[:left]
            writer.write(data)
            await writer.drain()
            self.passed[way] += len(data)
            if left is not None and not (left := left - len(data)):
                return


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset and (sock := writer.get_extra_info("socket")) is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort() if reset else writer.close()
