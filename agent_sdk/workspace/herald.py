"""Telling a caller what a process says, in the order it came, at the caller's pace.

The process never waits for the caller: what is not told yet is in the spools.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque

from agent_sdk.protocol.results import Exit
from agent_sdk.workspace.contract import OnOutput, OutputName
from agent_sdk.workspace.process import PIECE_BYTES
from agent_sdk.workspace.running import Running

TURNS = 4096
"""How often the streams may change places before the order between them is no longer kept."""


class Herald:
    """Calls `on_output` with the output of one process."""

    def __init__(self, running: Running, on_output: OnOutput) -> None:
        """Listen to a process that has said nothing yet."""
        self._running = running
        self._on_output = on_output
        # Which stream came next, and how far: (name, offset of its end).
        self._turns: deque[tuple[OutputName, int]] = deque()
        self._told: dict[OutputName, int] = {"stdout": 0, "stderr": 0}
        self._news = asyncio.Event()
        running.on_news = self._note

    def _note(self, name: OutputName, size: int) -> None:
        turns = self._turns
        if turns and turns[-1][0] == name:
            turns[-1] = (name, size)
        elif len(turns) >= TURNS and turns[-2][0] == name:
            turns[-2] = (name, size)
        else:
            turns.append((name, size))
        self._news.set()

    async def tell(self, until: float | None) -> None:
        """Call until the process is over and all is told, or until the loop's clock says `until`."""
        loop, over = asyncio.get_running_loop(), self._running.child.over
        try:
            while True:
                while self._turns:
                    if until is not None and loop.time() >= until:
                        return
                    await self._tell_turn(*self._turns.popleft())
                if over.done():
                    return
                self._news.clear()
                left = None if until is None else until - loop.time()
                if left is not None and left <= 0:
                    return
                await _first(self._news, over, left)
        finally:
            self._running.on_news = None

    async def _tell_turn(self, name: OutputName, end: int) -> None:
        spool = self._running.spools[name]
        while self._told[name] < end:
            position = self._told[name]
            found, data = await spool.read(position, min(PIECE_BYTES, end - position))
            data = data[: max(0, end - found)]
            self._told[name] = found + len(data) if data else end
            if data:
                answer = self._on_output(name, data)
                if inspect.isawaitable(answer):
                    await answer


async def _first(news: asyncio.Event, over: asyncio.Future[Exit], seconds: float | None) -> None:
    waiting = asyncio.ensure_future(news.wait())
    try:
        await asyncio.wait((waiting, over), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
