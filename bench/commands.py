"""execute("true") and a shell's round trip, beside a bare subprocess."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable

from agent_sdk import LocalWorkspace, RemoteWorkspace
from bench.measure import Row, percentile, times
from bench.server import running_server

COUNT = 300


async def measure() -> list[Row]:
    """Here and over a server's WebSocket, through its box."""
    bare = await times(COUNT, _bare)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        async with LocalWorkspace(folder) as here:
            rows += _beside("execute true, here", await times(COUNT, lambda: here.execute("true")), bare)
            rows += _beside("execute [true], here", await times(COUNT, lambda: here.execute(["true"])), bare)
            rows += await _shell("shell round trip, here", lambda: here.shell().run("echo hi"), bare)
    async with (
        running_server() as server,
        RemoteWorkspace(server.url, server.api_key) as there,
    ):
        rows += _beside("execute true, there", await times(COUNT, lambda: there.execute("true")), bare)
        rows += await _shell("shell round trip, there", lambda: there.shell().run("echo hi"), bare)
    return rows


async def _bare() -> None:
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", "true", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    await process.communicate()


def _beside(name: str, taken: list[float], bare: list[float]) -> list[Row]:
    p50, p99 = percentile(taken, 0.5) * 1000, percentile(taken, 0.99) * 1000
    limit50, limit99 = percentile(bare, 0.5) * 1000, percentile(bare, 0.99) * 1000
    return [
        Row(
            name=f"{name}, p50",
            value=p50,
            unit="ms",
            limit=limit50,
            limit_name="bare subprocess",
            target="<= 4 and <= 2x",
            met=p50 <= 4 and p50 <= 2 * limit50,
        ),
        Row(
            name=f"{name}, p99",
            value=p99,
            unit="ms",
            limit=limit99,
            limit_name="bare subprocess",
            target="<= 30",
            met=p99 <= 30,
        ),
    ]


async def _shell(name: str, run: Callable[[], Awaitable[object]], bare: list[float]) -> list[Row]:
    taken = await times(COUNT, run)
    return [
        Row(
            name=f"{name}, p50",
            value=percentile(taken, 0.5) * 1000,
            unit="ms",
            limit=percentile(bare, 0.5) * 1000,
            limit_name="bare subprocess",
        ),
        Row(name=f"{name}, p99", value=percentile(taken, 0.99) * 1000, unit="ms"),
    ]
