"""A way to an engine that holds one call, so that a test can break something at exactly that point."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

SECONDS = 60
CHUNK = 1 << 16
When = Literal["asked", "answered"]
"""Before the engine hears of it; or when it has done it and nobody has heard the answer."""


class HeldEngine:
    """Listens on a Unix socket and passes everything on, in both directions, but for the call that is held."""

    def __init__(self, folder: Path, engine: str = "/var/run/docker.sock") -> None:
        self.url = f"unix://{folder / 'held.sock'}"
        self._socket = folder / "held.sock"
        self._engine = engine
        self._call: tuple[bytes, When] | None = None
        self._reached = asyncio.Event()
        self._release = asyncio.Event()
        self._passing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._pass, self._socket)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._release.set()
        self._server.close()
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)
        await self._server.wait_closed()

    def hold(self, method: str, path: str, when: When) -> None:
        """Hold the next call whose method is this and whose path has this pattern."""
        self._call = (f"{method} \\S*{path}[ ?]".encode(), when)
        self._reached.clear()
        self._release.clear()

    async def reached(self) -> None:
        """Wait until that call is held."""
        async with asyncio.timeout(SECONDS):
            await self._reached.wait()

    def release(self) -> None:
        """Let it go on, if whoever made it is still there."""
        self._release.set()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        try:
            with suppress(OSError):
                there, back = await asyncio.open_unix_connection(self._engine)
                try:
                    await self._both(reader, writer, there, back)
                finally:
                    back.close()
        finally:
            writer.close()
            self._passing.discard(task)

    async def _both(self, reader, writer, there, back) -> None:
        answer_is_held = False

        async def ask() -> None:
            nonlocal answer_is_held
            while data := await reader.read(CHUNK):
                if self._call is not None and re.match(self._call[0], data):
                    (_, when), self._call = self._call, None
                    answer_is_held = when == "answered"
                    if when == "asked":
                        await self._hold()
                back.write(data)
                await back.drain()

        async def tell() -> None:
            nonlocal answer_is_held
            while data := await there.read(CHUNK):
                if answer_is_held:
                    answer_is_held = False
                    await self._hold()
                writer.write(data)
                await writer.drain()

        # Either end that closes ends both.
        tasks = [asyncio.create_task(ask()), asyncio.create_task(tell())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hold(self) -> None:
        self._reached.set()
        await self._release.wait()
