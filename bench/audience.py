"""A crowd of clients as a child process, and somebody who makes events for it."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from agent_sdk.ids import new_id
from agent_sdk.protocol.methods.conversation import SetTitle
from agent_sdk.remote.connection import Connection
from bench.crowd import Report
from bench.server import Server

IN_FLIGHT = 32


class Audience:
    """Clients that follow events in a process of their own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def freeze(self) -> None:
        """Stop the process: its sockets stay open, and nobody reads them."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    async def until(self, seq: int) -> Report:
        """Wait until all have seen this event; returns what they saw since the last report."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"%d\n" % seq)
        return msgspec.json.decode(await self._process.stdout.readline(), type=Report)


@asynccontextmanager
async def audience(server: Server, count: int, conversation: str = "new") -> AsyncIterator[Audience]:
    """Connect so many clients to one conversation, or each to one of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.crowd", server.url, server.api_key, str(count), conversation),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=64 << 20,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if await process.stdout.readline() != b"ready\n":
            raise SystemExit("the clients could not connect")
        yield Audience(process)
    finally:
        process.stdin.close()
        await process.wait()


async def make_event(writer: Connection, size: int) -> None:
    """Write one event of about so many bytes; it says when that was asked for."""
    tags = {"sent": str(time.monotonic_ns()), "x": "x" * max(size - 180, 0)}
    await writer.peer.call(SetTitle(op_id=new_id(), tags=tags))


async def make_events(writer: Connection, count: int, size: int) -> None:
    """Write so many events as fast as it goes."""
    left = iter(range(count))

    async def make() -> None:
        for _ in left:
            await make_event(writer, size)

    await asyncio.gather(*(make() for _ in range(IN_FLIGHT)))


async def make_steadily(writer: Connection, rate: float, seconds: float, size: int) -> int:
    """Write events at this rate, however long each takes; returns how many."""
    loop = asyncio.get_running_loop()
    began, count = loop.time(), int(rate * seconds)
    under_way: set[asyncio.Task[None]] = set()
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
        under_way.add(asyncio.create_task(make_event(writer, size)))
        if len(under_way) > IN_FLIGHT:
            _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait(under_way)
    return count
