"""Events: durable appends, from one end of a connection to the other, and replay of a long log."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

import msgspec
from msgspec import Raw

from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol import events
from agent_sdk.protocol.events import UserMessage
from agent_sdk.protocol.methods.connection import EventsNotice
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.rpc.unix import connect_unix, serve_unix
from bench.measure import Row

COUNT = 20_000
EVENT = UserMessage(text="x" * 900, seq=1)


async def measure() -> list[Row]:
    """1 KB events."""
    with tempfile.TemporaryDirectory() as folder:
        floor = await asyncio.to_thread(_fdatasyncs, Path(folder) / "floor")
        alone, together = await _appends(Path(folder) / "log.sqlite")
        one_way = await _one_way(f"{folder}/s")
        raw = await _raw(f"{folder}/r")
    return [
        Row(
            name="durable append of 1 KB, alone",
            value=alone * 1000,
            unit="ms",
            limit=floor * 1000,
            limit_name="write + fdatasync",
            target="<= 1 amortised",
        ),
        Row(
            name="durable append of 1 KB, 100 writers",
            value=together * 1000,
            unit="ms",
            limit=floor * 1000,
            limit_name="write + fdatasync",
            target="<= 1",
            met=together <= 0.001,
        ),
        Row(
            name="events of 1 KB one way",
            value=one_way,
            unit="events/s",
            limit=raw,
            limit_name="bare Unix socket, same bytes",
            target=">= 25000",
            met=one_way >= 25_000,
        ),
    ]


def _fdatasyncs(path: Path) -> float:
    body = events.encode(EVENT)
    with path.open("ab") as file:
        began = time.perf_counter()
        for _ in range(300):
            file.write(body)
            file.flush()
            os.fdatasync(file.fileno())
        return (time.perf_counter() - began) / 300


async def _appends(path: Path) -> tuple[float, float]:
    async with EventLog.open(path) as log:
        await log.create("bench", {})
        began = time.perf_counter()
        for _ in range(300):
            await log.append("bench", [EVENT])
        alone = (time.perf_counter() - began) / 300

        async def write() -> None:
            for _ in range(50):
                await log.append("bench", [EVENT])

        began = time.perf_counter()
        await asyncio.gather(*(write() for _ in range(100)))
        return alone, (time.perf_counter() - began) / 5000


async def _one_way(path: str) -> float:
    """From publish to the decoded event at the other end, both ends in this process."""
    body = events.encode(EVENT)
    came = 0
    all_came = asyncio.Event()

    def on_notice(method: str, params: Raw) -> None:
        nonlocal came
        for raw in msgspec.json.decode(params, type=EventsNotice).events:
            events.decode(raw)
            came += 1
        if came == COUNT:
            all_came.set()

    async def publish(pipe: Pipe) -> None:
        async with Peer(pipe, {}, opener=False) as peer:
            for _ in range(COUNT):
                if not peer.publish(body, epoch="e"):
                    raise SystemExit("over budget")
                await peer.room()
            await peer.wait_closed()

    async with serve_unix(path, publish):
        began = time.perf_counter()
        async with Peer(await connect_unix(path), {}, opener=True, on_notice=on_notice):
            await all_came.wait()
            return COUNT / (time.perf_counter() - began)


async def _raw(path: str) -> float:
    body = events.encode(EVENT)

    async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _batch in range(COUNT // 50):
            writer.write(body * 50)
            await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(write, path):
        began = time.perf_counter()
        reader, writer = await asyncio.open_unix_connection(path)
        while await reader.read(1 << 16):
            pass
        writer.close()
        return COUNT / (time.perf_counter() - began)
