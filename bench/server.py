"""A real server as a child process, and the box it starts."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
from msgspec import Struct

from bench.measure import children


class Server(Struct, frozen=True):
    """A running server."""

    url: str
    api_key: str
    pid: int
    seconds_to_health: float

    def box(self) -> int:
        """Return the process id of its only box."""
        return next(iter(children(self.pid)))


class _Ready(Struct):
    url: str
    api_key_file: str
    pid: int


@asynccontextmanager
async def running_server(
    data: Path | None = None, *, kill: bool = False, **options: str
) -> AsyncIterator[Server]:
    """Start `agent-server serve` on a free port; end it with SIGTERM, or SIGKILL.

    Args:
        data: its data folder; None: a fresh one.
        kill: end it without a word.
        options: as in the environment, without the prefix.
    """
    with tempfile.TemporaryDirectory() as fresh:
        chosen = {"boxes_on_stop": "end", **options}
        began = time.perf_counter()
        arguments = ("-m", "agent_server", "serve", "--port", "0", "--json", "--data", str(data or fresh))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **{f"AGENT_SERVER_{name.upper()}": value for name, value in chosen.items()}},
        )
        assert process.stdout is not None
        try:
            ready = msgspec.json.decode(await process.stdout.readline(), type=_Ready)
            async with aiohttp.ClientSession() as session, session.get(f"{ready.url}/health") as answer:
                answer.raise_for_status()
            took = time.perf_counter() - began
            yield Server(ready.url, Path(ready.api_key_file).read_text().strip(), ready.pid, took)
        finally:
            if process.returncode is None:
                (process.kill if kill else process.terminate)()
            await process.wait()
