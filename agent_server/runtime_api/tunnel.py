"""Two network connections joined into one: bytes go through as they are, in both directions, at the slower one's pace.

So everything of a WebSocket arrives that is sent: fragments, pings, close codes, extensions.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast


class Tunnel:
    """Joins two transports, which it closes together."""

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when both connections are closed."""
        self._ends: list[_End] = []

    def join(self, near: Any, far: Any) -> None:
        """Take over two connections of aiohttp whose upgrade is done.

        Args:
            near: the protocol of the one, a client's; it is told when its connection is lost.
            far: the same of the other, to a server.
        """
        one, other = _End(self, near), _End(self, far)
        self._ends = [one, other]
        one.other, other.other = other, one
        # What came with the head of the upgrade is handed over by `set_parser`, at once.
        far.set_parser(_Early(one), None)
        near.set_parser(_Early(other))
        for end in self._ends:
            end.take_over()

    def close(self) -> None:
        """Close both connections; what is on its way is sent before."""
        for end in self._ends:
            end.transport.close()

    def lost(self) -> None:
        """One of the connections is gone: the other one goes, too."""
        self.close()
        if all(end.is_lost for end in self._ends) and not self.over.done():
            self.over.set_result(None)


class _End(asyncio.Protocol):
    other: _End

    def __init__(self, tunnel: Tunnel, protocol: Any) -> None:
        self._tunnel = tunnel
        self._protocol = protocol
        self.transport = cast(asyncio.Transport, protocol.transport)
        self.is_lost = False

    def take_over(self) -> None:
        if self.transport.is_closing():
            self.connection_lost(None)
            return
        self.transport.set_protocol(self)
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.is_lost = True
        self._protocol.connection_lost(exc)
        self._tunnel.lost()


class _Early:
    """What aiohttp takes for a parser of WebSocket frames."""

    def __init__(self, to: _End) -> None:
        self._to = to

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._to.transport.write(data)
        return False, b""

    def feed_eof(self) -> None:
        """Nothing came."""
