"""Many conversations: what idle ones cost, how soon a server that was killed is back, durable events of a hundred."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.events import UserMessage
from bench.audience import audience
from bench.measure import Row, percentile, rss_mib
from bench.server import running_server

IDLE = 5000
RESTART = 1000
WRITERS = 100
RATE = 5000
SECONDS = 5.0


async def measure() -> list[Row]:
    """5 000 idle conversations, a restart with 1 000, 5 000 events/s of 100."""
    memory, each = await _idle()
    with tempfile.TemporaryDirectory() as folder:
        restart = await _restart(Path(folder))
        rate, acknowledged = await _steadily(Path(folder) / "log.sqlite")
    return [
        Row(
            name=f"server RSS, {IDLE} idle conversations connected",
            value=memory,
            unit="MiB",
            target="<= 250",
            met=memory <= 250,
        ),
        Row(name="of that, each", value=each, unit="KiB", target="<= 40", met=each <= 40),
        Row(
            name=f"kill -9 to /health with {RESTART} conversations",
            value=restart,
            unit="s",
            target="<= 2",
            met=restart <= 2,
        ),
        Row(
            name=f"durable events/s of {WRITERS} conversations",
            value=rate,
            unit="events/s",
            target=f">= {RATE}",
            met=rate >= RATE * 0.99,
        ),
        Row(
            name="their acknowledgement, p99",
            value=acknowledged * 1000,
            unit="ms",
            target="<= 25",
            met=acknowledged <= 0.025,
        ),
    ]


async def _idle() -> tuple[float, float]:
    async with running_server() as server:
        before = rss_mib(server.pid)
        async with audience(server, IDLE):
            after = rss_mib(server.pid)
    return after, (after - before) * 1024 / IDLE


async def _restart(data: Path) -> float:
    async with running_server(data, kill=True) as server, audience(server, RESTART):
        pass
    async with running_server(data) as server:
        return server.seconds_to_health


async def _steadily(path: Path) -> tuple[float, float]:
    """Each conversation appends at its own pace, whether the last append is acknowledged or not."""
    event, taken = UserMessage(text="x" * 900), list[float]()
    async with EventLog.open(path) as log:
        for number in range(WRITERS):
            await log.create(str(number))
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def append(conversation: str) -> None:
            asked = time.perf_counter()
            await log.append(conversation, [event])
            taken.append(time.perf_counter() - asked)

        async with asyncio.TaskGroup() as appending:
            total = int(RATE * SECONDS)
            for number in range(total):
                ahead = began + number / RATE - loop.time()
                if ahead > 0:
                    await asyncio.sleep(ahead)
                appending.create_task(append(str(number % WRITERS)))
        return total / (loop.time() - began), percentile(taken, 0.99)
