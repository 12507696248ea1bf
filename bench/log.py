"""The event log when it is long: appending, opening, reading, listing."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from agent_sdk.log.database import Database
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.events import UserMessage, encode
from bench.measure import Row, rss_mib

SHORT, LONG = 1_000, 1_000_000
CONVERSATIONS = 1_000
EVENT = UserMessage(text="x" * 20, seq=1)


async def measure() -> list[Row]:
    """Events of 64 bytes, one conversation."""
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / "log.db", Path(folder) / "short.db"
        await asyncio.to_thread(_fill, path, LONG)
        await asyncio.to_thread(_fill, other, SHORT)
        began = time.perf_counter()
        async with EventLog.open(path, sole=True) as log, EventLog.open(other) as beside:
            opened = time.perf_counter() - began
            before = rss_mib()
            # In turns, so that both meet the same disk.
            rounds = [(await _append(log), await _append(beside)) for _ in range(12)]
            long, short = (min(seconds) for seconds in zip(*rounds, strict=True))
            read = await _read(log)
            grown = rss_mib() - before
    listed = await _list()
    return [
        Row(
            name="append at 1 M events, against at 1 k",
            value=long / short,
            unit="x",
            target="<= 1.2",
            met=long <= 1.2 * short,
        ),
        Row(name="memory for appending at and reading 1 M events", value=grown, unit="MiB"),
        Row(name="opening and examining 1 M events", value=opened * 1000, unit="ms"),
        Row(
            name="reading events, each proven",
            value=read,
            unit="events/s",
            target=">= 20000",
            met=read >= 20_000,
        ),
        Row(
            name="opening and listing 1 000 conversations",
            value=listed * 1000,
            unit="ms",
            target="<= 1000",
            met=listed <= 1,
        ),
    ]


def _fill(path: Path, count: int) -> None:
    """Make it this long, below the log and quickly."""
    database = Database(path)
    with database.transaction():
        database.create("bench", "epoch", 0.0, b"{}")
    body = encode(EVENT)
    while (missing := count - database.head("bench")) > 0:
        with database.transaction():
            database.insert("bench", database.tail("bench"), [(0.0, body)] * min(missing, 50_000))
    database.close()


async def _append(log: EventLog) -> float:
    """Return the seconds of an append among 100 writers."""
    await log.create("bench")

    async def write() -> None:
        for _ in range(10):
            await log.append("bench", [EVENT])

    began = time.perf_counter()
    await asyncio.gather(*(write() for _ in range(100)))
    return (time.perf_counter() - began) / 1000


async def _read(log: EventLog) -> float:
    began, seq = time.perf_counter(), 0
    while seq < 200_000 and (page := await log.read("bench", seq)):
        seq = page[-1][0]
    return seq / (time.perf_counter() - began)


async def _list() -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        async with EventLog.open(path) as log:
            for number in range(CONVERSATIONS):
                await log.create(f"{number}", {"owner": f"{number}"})
                await log.append(f"{number}", [EVENT] * 20)
        began = time.perf_counter()
        async with EventLog.open(path, sole=True) as log:
            await log.list()
            return time.perf_counter() - began
