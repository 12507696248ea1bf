"""Many idle clients in one process: `python -m bench.crowd HOST PORT KEY COUNT` prints `ready`, and stays until
its standard input ends.

Each has a conversation of its own, follows its events and answers pings. They speak WebSocket by hand,
because thousands of full clients would be the larger part of what is measured.
"""

from __future__ import annotations

import asyncio
import os
import sys
from base64 import b64encode

AT_ONCE = 50
"""Below the number of strangers that a server lets in from one address."""
TEXT, PING, PONG = 0x1, 0x9, 0xA
INITIALIZE = (
    b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":'
    b'{"protocol_version":1,"client":{"name":"crowd","version":"0"},"resume":{"after_seq":0}}}'
)


class Idler(asyncio.Protocol):
    """One client."""

    def __init__(self, key: str) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._key = key
        self._transport: asyncio.Transport | None = None
        self._read = b""
        self._upgraded = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        lines = [
            "GET /v1/conversations/new HTTP/1.1",
            "Host: localhost",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Protocol: agentrpc.v1",
            f"Authorization: Bearer {self._key}",
        ]
        transport.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._read += data
        if not self._upgraded:
            head, end, rest = self._read.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in head:
                raise SystemExit(f"refused: {head.decode()}")
            self._upgraded, self._read = True, rest
            self._send(TEXT, INITIALIZE)
        while self._next_frame():
            pass

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if not self.ready.done():
            self.ready.set_exception(exc or ConnectionError("closed"))

    def _next_frame(self) -> bool:
        if len(self._read) < 4:
            return False
        length, start = self._read[1], 2
        if length == 126:
            length, start = int.from_bytes(self._read[2:4], "big"), 4
        if len(self._read) < start + length:
            return False
        opcode, payload = self._read[0] & 0xF, self._read[start : start + length]
        self._read = self._read[start + length :]
        if opcode == PING:
            self._send(PONG, payload)
        elif b'"method":"events"' in payload and not self.ready.done():
            self.ready.set_result(None)
        return True

    def _send(self, opcode: int, payload: bytes) -> None:
        assert self._transport is not None
        size = bytes([0x80 | len(payload)])
        if len(payload) > 125:
            size = bytes([0x80 | 126]) + len(payload).to_bytes(2, "big")
        self._transport.write(bytes([0x80 | opcode]) + size + b"\0\0\0\0" + payload)  # a mask of zeros


async def main(host: str, port: str, key: str, count: str) -> None:
    """Connect them all, then wait."""
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(AT_ONCE)

    async def connect() -> Idler:
        async with places:
            _, idler = await loop.create_connection(lambda: Idler(key), host, int(port))
            await idler.ready
            return idler

    idlers = await asyncio.gather(*(connect() for _ in range(int(count))))
    print(f"ready {len(idlers)}", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
