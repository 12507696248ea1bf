from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from agent_server.config.options import ServerConfig
from agent_server.serve import Stop, serving
from tests.server.wire import GUARD, Wire
from workspaces.backend.contract import Ready

KEY = "test-key-0123456789abcdef"


class ServerLog(io.StringIO):
    """What a server logs, from a thread of its own; and whoever waits for a line."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        self._loop.call_soon_threadsafe(self._more.set)
        return written

    async def until(self, event: str, times: int = 1) -> dict[str, Any]:
        """Wait for a line that tells of this, so many times."""
        async with asyncio.timeout(GUARD):
            while True:
                self._more.clear()
                told = [
                    line for line in map(json.loads, self.getvalue().splitlines()) if line["event"] == event
                ]
                if len(told) >= times:
                    return told[times - 1]
                await self._more.wait()


class Running:
    """A server that runs in this process, on a free port of the loopback."""

    def __init__(self, ready: Ready, log: ServerLog, stop: Stop) -> None:
        self.url = ready.url
        self.port = urlsplit(ready.url).port
        self.key = KEY
        self.log = log
        self.stop = stop

    def http(self, key: str | None = KEY) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return aiohttp.ClientSession(self.url, headers=headers)

    async def wire(self) -> Wire:
        return await Wire.open(self.port)

    @asynccontextmanager
    async def session(self, path: str = "/v1/conversations/new", **params: Any) -> AsyncIterator[Wire]:
        """A WebSocket that has initialised; `answer` is what the server said."""
        async with await self.wire() as wire:
            await wire.upgrade(self.key, path)
            wire.answered = (await wire.initialize(**params))["result"]
            yield wire


Start = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a server with some options; when it has ended there must be no traceback and no key in its log."""

    @asynccontextmanager
    async def started(**options: Any) -> AsyncIterator[Running]:
        given = {
            "port": 0,
            "data": str(tmp_path / "data"),
            "api_key": KEY,
            "log_format": "json",
            "log_level": "debug",
            "drain_seconds": 5.0,
            "boxes_on_stop": "end",
            "box_linger_seconds": 120.0,
            "box_environment": {"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            **options,
        }
        log, ready, stop = ServerLog(), asyncio.get_running_loop().create_future(), Stop()
        async with serving(ServerConfig(**given), on_ready=ready.set_result, stop=stop, log_to=log):
            yield Running(ready.result(), log, stop)
        written = log.getvalue()
        assert "Traceback" not in written, written
        assert KEY not in written

    return started


@pytest.fixture
async def server(start: Start) -> AsyncIterator[Running]:
    async with start() as running:
        yield running
