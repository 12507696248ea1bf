"""A process as its users see it; see the contract in `agent_sdk.workspace.contract`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from agent_sdk.protocol.errors import ProcessNotFound, StateConflict, TimedOut
from agent_sdk.protocol.results import Exit
from agent_sdk.workspace.arguments import check_seconds, check_signal, check_size
from agent_sdk.workspace.contract import ExecResult, Output, OutputName, Process
from agent_sdk.workspace.feed import Feed
from agent_sdk.workspace.processes import Processes
from agent_sdk.workspace.running import Running
from agent_sdk.workspace.terminal import resize

PIECE_BYTES = 256 << 10
END_OF_FILE = b"\x04"


class LocalProcess(Process):
    """Implements `workspace.Process`."""

    def __init__(self, processes: Processes, process_id: str) -> None:
        self._processes = processes
        self._id = process_id

    def __repr__(self) -> str:
        return f"<LocalProcess {self._id}>"

    @property
    def id(self) -> str:
        return self._id

    def _find(self) -> Running:
        return self._processes.find(self._id)

    def _feed(self) -> Feed:
        feed = self._find().feed
        if feed is None or not feed.open:
            raise ProcessNotFound(f"the process has ended or closed its input: {self._id}", process=self._id)
        return feed

    async def write(self, data: bytes) -> None:
        await self._feed().write(data)

    async def write_at(self, offset: int, data: bytes) -> None:
        """Write to its standard input what lies behind `offset`, as Feed.write_at does."""
        await self._feed().write_at(offset, data)

    async def close_stdin(self) -> None:
        running = self._find()
        if running.feed is None:
            return
        if running.terminal is None:
            running.feed.close()
        elif running.feed.open:
            await running.feed.write(END_OF_FILE)

    async def output(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[bytes]:
        async with aclosing(self.chunks(since, stream=stream, follow=follow)) as chunks:
            async for _, data in chunks:
                yield data

    async def chunks(
        self,
        since: int = 0,
        *,
        stream: OutputName = "stdout",
        follow: bool = True,
        until: asyncio.Future[Any] | None = None,
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yield like `output`, each piece with its offset.

        `until`: end with what there is when this is done, instead of with the process.
        """
        running = self._find()
        spool, over = running.spools.get(stream), until or running.child.over
        if spool is None:
            return
        with running.reading():
            end = None if follow and not over.done() else spool.size
            position = since
            while end is None or position < end:
                news = spool.changed()
                found, data = await spool.read(position, PIECE_BYTES)
                if data:
                    news.cancel()
                    data = data if end is None else data[: max(0, end - found)]
                    if data:
                        yield found, data
                    position = found + len(data)
                elif end is not None:
                    return
                else:
                    await asyncio.wait((news, over), return_when=asyncio.FIRST_COMPLETED)
                    news.cancel()
                if end is None and over.done():
                    end = max(position, spool.size)

    async def signal(self, name: str) -> None:
        """Send a signal to its process group; on a terminal the foreground job gets it, too."""
        number = check_signal(name)
        running = self._find()
        foreground = 0
        if running.terminal is not None:
            with suppress(OSError):
                foreground = os.tcgetpgrp(running.terminal.master)
        running.child.send(number, foreground)

    async def resize(self, *, rows: int, cols: int) -> None:
        """Set the size of its terminal; a process without one is a StateConflict."""
        check_size(rows, cols)
        running = self._find()
        if running.terminal is None:
            raise StateConflict(f"the process has no terminal: {self._id}")
        if not running.child.alive:
            raise ProcessNotFound(f"the process has ended: {self._id}", process=self._id)
        resize(running.terminal.master, rows, cols)

    async def wait(self, timeout: float | None = None) -> Exit:
        check_seconds(timeout, "timeout")
        over = self._find().child.over
        await asyncio.wait((over,), timeout=timeout)
        if not over.done():
            raise TimedOut(f"the process still runs after {timeout} s: {self._id}", seconds=timeout)
        return over.result()


async def result_of(running: Running, process: LocalProcess) -> ExecResult:
    """Return how a command stands: what it said so far, and how it ended when it did."""
    child, spools = running.child, running.spools
    exit = child.exit
    return ExecResult(
        status="running" if exit is None else exit.status,
        exit_code=None if exit is None else exit.exit_code,
        signal=None if exit is None else exit.signal,
        out=await spools["stdout"].output(),
        err=await spools["stderr"].output() if "stderr" in spools else Output(),
        duration=time.monotonic() - child.started if exit is None else exit.duration,
        process_id=child.id,
        process=process,
        reason="" if exit is None else exit.reason,
    )
