"""Readers: a hundred of one conversation, one of a long log, a frozen and a slow one beside fifty healthy ones."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.events import ConversationCreated, TitleChanged
from agent_sdk.remote.connection import connect
from bench import crowd
from bench.audience import audience, make_events, make_steadily
from bench.measure import Row, forget_peak, peak_mib, percentile, rss_mib
from bench.server import Server, running_server

SUBSCRIBERS = 100
WRITTEN = 1000
LONG = 100_000
HEALTHY = 50
RATE = 2000
SECONDS = 18.0
"""Longer than it takes to be over the budget, and then the ten seconds until the end."""
SMALL = 250
SIZE = 1000
THIN = 10_000
"""Bytes a second that the slow client reads."""


async def measure() -> list[Row]:
    """Fan-out, replay of 100 000 events, slow readers beside others."""
    return [await _fan_out(), *await _replay(), *await _neighbours()]


async def _fan_out() -> Row:
    async with running_server() as server, connect(server.url, server.api_key) as writer:
        assert writer.conversation is not None
        async with audience(server, SUBSCRIBERS, writer.conversation) as readers:
            await make_events(writer, WRITTEN, SIZE)
            report = await readers.until(1 + WRITTEN)
    rate = report.deliveries / report.seconds
    return Row(
        name=f"deliveries of 1 KB events to {SUBSCRIBERS} subscribers",
        value=rate,
        unit="events/s",
        target=">= 25000",
        met=rate >= 25_000,
    )


async def _replay() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        await _long_log(data)
        async with running_server(data) as server, connect(server.url, server.api_key) as writer:
            assert writer.conversation is not None
            async with audience(server, 1, writer.conversation) as live:
                await make_events(writer, 20, SIZE)
                await live.until(21)
                before = rss_mib(server.pid)
                forget_peak(server.pid)
                others = asyncio.create_task(make_steadily(writer, 100, 4.0, SIZE))
                began = time.perf_counter()
                async with audience(server, 1, "long") as reader:
                    replay = await reader.until(LONG)
                    took = time.perf_counter() - began
                    report = await live.until(21 + await others)
                    grown = peak_mib(server.pid) - before
    rate, latency = LONG / replay.seconds, percentile(report.latencies, 0.99)
    return [
        Row(
            name=f"replay of {LONG} events",
            value=rate,
            unit="events/s",
            target=">= 20000",
            met=rate >= 20_000,
        ),
        Row(name="from connecting to its last event", value=took, unit="s"),
        Row(name="memory it took", value=grown, unit="MiB", target="<= 64", met=grown <= 64),
        Row(
            name="live events of another meanwhile, p99",
            value=latency * 1000,
            unit="ms",
            target="<= 100",
            met=latency <= 0.1,
        ),
    ]


async def _long_log(data: Path) -> None:
    """Write a conversation of 100 000 events where a server finds it."""
    async with EventLog.open(data / "log.db") as log:
        await log.create("long", {"owner": "long"})
        await log.append("long", [ConversationCreated(conversation="long")])
        event = TitleChanged(title="title", tags={"x": "x" * (SMALL - 100)})
        for _ in range(LONG // 1000):
            await log.append("long", [event] * 1000)


async def _neighbours() -> list[Row]:
    alone, _, _ = await _healthy()
    beside, closed, memory = await _healthy(_frozen, _thin)
    return [
        Row(
            name=f"{HEALTHY} readers at {RATE} events/s, p99",
            value=beside * 1000,
            unit="ms",
            limit=alone * 1000,
            limit_name="without a frozen and a thin one",
            target="<= limit + 50",
            met=beside <= alone + 0.05,
        ),
        Row(name="frozen and thin ones closed with 4408", value=closed, unit="", target="2", met=closed == 2),
        Row(name="server memory, peak", value=memory, unit="MiB", target="<= 260", met=memory <= 260),
    ]


Neighbour = Callable[[Server, str], AbstractAsyncContextManager[None]]


async def _healthy(*neighbours: Neighbour) -> tuple[float, float, float]:
    """The p99 of the healthy in seconds, how many readers were closed, and the server's peak memory in MiB."""
    async with AsyncExitStack() as stack:
        # On a machine with little time to spare the slow ones would be found out by their missing pongs first.
        server = await stack.enter_async_context(running_server(heartbeat_seconds="600"))
        writer = await stack.enter_async_context(connect(server.url, server.api_key))
        assert writer.conversation is not None
        readers = await stack.enter_async_context(audience(server, HEALTHY, writer.conversation))
        for neighbour in neighbours:
            await stack.enter_async_context(neighbour(server, writer.conversation))
        count = await make_steadily(writer, RATE, SECONDS, SIZE)
        report = await readers.until(1 + count)
        return percentile(report.latencies, 0.99), await _closed(server), peak_mib(server.pid)


@asynccontextmanager
async def _frozen(server: Server, conversation: str) -> AsyncIterator[None]:
    async with audience(server, 1, conversation) as one:
        one.freeze()
        try:
            yield
        finally:
            one.thaw()


@asynccontextmanager
async def _thin(server: Server, conversation: str) -> AsyncIterator[None]:
    """Somebody who reads 10 KB a second."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as thin:
        thin.sendall(crowd.upgrade(f"/v1/conversations/{conversation}", server.api_key))
        thin.recv(4096)
        thin.sendall(crowd.initialize())
        thin.setblocking(False)
        reading = asyncio.create_task(_sip(thin))
        try:
            yield
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _sip(thin: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    got = b"all"
    while got:
        got = await loop.sock_recv(thin, THIN // 10)
        await asyncio.sleep(0.1)


async def _closed(server: Server) -> float:
    """How many readers the server has closed because they were slow."""
    headers = {"Authorization": f"Bearer {server.api_key}"}
    async with (
        aiohttp.ClientSession(server.url, headers=headers) as session,
        session.get("/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    return float(
        next(line for line in lines if line.startswith("agent_server_slow_readers_total")).split()[1]
    )
