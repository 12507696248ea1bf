"""Files up and down over the WebSocket, beside a plain copy; memory, and commands meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

from agent_sdk import RemoteWorkspace
from bench.measure import Row, forget_peak, peak_mib, percentile, rss_mib
from bench.server import Server, running_server

SIZE = 1 << 30


async def measure() -> list[Row]:
    """1 GiB each way; hashes must agree."""
    with tempfile.TemporaryDirectory() as folder:
        source, back, copy = (Path(folder) / name for name in ("source", "back", "copy"))
        digest = _make(source)
        began = time.perf_counter()
        await asyncio.to_thread(_plain_copy, source, copy)
        plain = SIZE / (time.perf_counter() - began) / 1e6
        copy.unlink()
        async with (
            running_server() as server,
            RemoteWorkspace(server.url, server.api_key) as workspace,
        ):
            await workspace.execute("true")
            up = await _watched("upload", server, workspace, workspace.upload(source, "big"), plain)
            down = await _watched("download", server, workspace, workspace.download("big", back), plain)
        if _hash(back) != digest:
            raise SystemExit("the file that came back differs")
        return [*up, *down]


async def _watched(
    name: str, server: Server, workspace: RemoteWorkspace, moving: Awaitable[object], plain: float
) -> list[Row]:
    pids = {"client": os.getpid(), "server": server.pid, "box": server.box()}
    before = {}
    for who, pid in pids.items():
        forget_peak(pid)
        before[who] = rss_mib(pid)
    began = time.perf_counter()
    task = asyncio.ensure_future(moving)
    waits = []
    while not task.done():
        asked = time.perf_counter()
        await workspace.execute("true")
        waits.append((time.perf_counter() - asked) * 1000)
    await task
    speed = SIZE / (time.perf_counter() - began) / 1e6
    rows = [
        Row(
            name=f"{name} 1 GiB",
            value=speed,
            unit="MB/s",
            limit=plain,
            limit_name="plain copy + fsync",
            target=">= 100",
            met=speed >= 100,
        ),
        Row(name=f"execute true during {name}, p50", value=percentile(waits, 0.5), unit="ms"),
        Row(
            name=f"execute true during {name}, p99",
            value=percentile(waits, 0.99),
            unit="ms",
            target="<= 50",
            met=percentile(waits, 0.99) <= 50,
        ),
    ]
    for who, pid in pids.items():
        grown = peak_mib(pid) - before[who]
        rows.append(
            Row(name=f"{name} 1 GiB, {who} grew by", value=grown, unit="MiB", target="<= 16", met=grown <= 16)
        )
    return rows


def _make(path: Path) -> str:
    block = os.urandom(1 << 20)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for nth in range(SIZE >> 20):
            piece = nth.to_bytes(8, "big") + block[8:]
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain_copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(1 << 20):
            writing.write(piece)
        writing.flush()
        os.fsync(writing.fileno())
