"""Many clients in one process: `python -m bench.crowd URL KEY COUNT CONVERSATION`.

They speak WebSocket by hand, because many full clients would be the larger part of what is measured. Each
follows the events of its conversation (`new`: one of its own) and answers pings. `ready` is printed when all
are there. Each line of standard input is a seq; when all have come to it, a line tells what they saw since
the line before. The end of standard input is the end.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from base64 import b64encode
from typing import Self
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

AT_ONCE = 50
"""Below the number of strangers that a server lets in from one address."""
TEXT, PING, PONG = 0x1, 0x9, 0xA
SEQ = re.compile(rb'"seq":(\d+)')
SENT = re.compile(rb'"sent":"(\d+)"')
"""The moment an event was asked for: the value of a tag, nanoseconds of the monotonic clock of this machine."""


class Report(Struct):
    """What the clients saw, all together."""

    deliveries: int
    seconds: float
    """Between the first and the last event."""
    latencies: list[float]
    """Seconds, of every event that says when it was asked for."""


class Client(asyncio.Protocol):
    """One client."""

    def __init__(self, key: str, path: str, report: Report) -> None:
        """Say where to, and where to write down what is seen."""
        self.seq = 0
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._key = key
        self._path = path
        self._report = report
        self._transport: asyncio.Transport | None = None
        self._read = b""
        self._upgraded = False

    @classmethod
    async def connect(cls, url: str, key: str, conversation: str, report: Report) -> Self:
        """Connect, and wait for the first event."""
        parts = urlsplit(url)
        path = f"/v1/conversations/{conversation}"
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: cls(key, path, report), str(parts.hostname), parts.port or 80
        )
        await client.until(1)
        return client

    async def until(self, seq: int) -> None:
        """Wait for this event."""
        while self.seq < seq:
            self.news = asyncio.get_running_loop().create_future()
            await self.news

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(upgrade(self._path, self._key))

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
            assert self._transport is not None
            self._transport.write(initialize())
        position = 0
        while (after := self._frame(position)) > position:
            position = after
        self._read = self._read[position:]

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if not self.news.done():
            self.news.set_exception(exc or ConnectionError("closed"))

    def _frame(self, start: int) -> int:
        """Take the frame that starts here; returns where the next one does, or the same when it is not whole yet."""
        read = self._read
        if len(read) < start + 2:
            return start
        length, begin = read[start + 1], start + 2
        wide = {126: 2, 127: 8}.get(length, 0)
        if wide:
            length, begin = int.from_bytes(read[begin : begin + wide], "big"), begin + wide
        if len(read) < begin + length:
            return start
        payload = read[begin : begin + length]
        if read[start] & 0xF == PING:
            assert self._transport is not None
            self._transport.write(frame(PONG, payload))
        elif payload.startswith(b'{"jsonrpc":"2.0","method":"events"'):
            self._events(payload)
        return begin + length

    def _events(self, payload: bytes) -> None:
        now, report = time.monotonic(), self._report
        seqs = SEQ.findall(payload)
        if report.deliveries == 0:
            report.seconds = -now
        report.deliveries += len(seqs)
        report.latencies += [now - int(sent) / 1e9 for sent in SENT.findall(payload)]
        self.seq = int(seqs[-1])
        if not self.news.done():
            self.news.set_result(None)


def upgrade(path: str, key: str) -> bytes:
    """Return the request for a WebSocket."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {b64encode(os.urandom(16)).decode()}",
        "Sec-WebSocket-Protocol: agentrpc.v1",
        f"Authorization: Bearer {key}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def initialize() -> bytes:
    """Return the first message, which also asks for all events, in its frame."""
    params = {
        "protocol_version": 1,
        "client": {"name": "crowd", "version": "0"},
        "resume": {"after_seq": 0},
    }
    return frame(
        TEXT, msgspec.json.encode({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params})
    )


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a frame as a client sends it; the mask is zeros."""
    size = bytes([0x80 | len(payload)])
    if len(payload) > 125:
        size = bytes([0x80 | 126]) + len(payload).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + size + b"\0\0\0\0" + payload


async def main(url: str, key: str, count: str, conversation: str) -> None:
    """Connect them all, report, wait for the end."""
    places = asyncio.Semaphore(AT_ONCE)
    report = Report(0, 0.0, [])

    async def connect() -> Client:
        async with places:
            return await Client.connect(url, key, conversation, report)

    clients = await asyncio.gather(*(connect() for _ in range(int(count))))
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        await asyncio.gather(*(client.until(int(line)) for client in clients))
        report.seconds += time.monotonic()
        print(msgspec.json.encode(report).decode(), flush=True)
        report.deliveries, report.latencies = 0, []


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
