"""A process as its callers see it: what the contract says of one, and its output passed to a callback."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from signal import Signals
from typing import Any

from msgspec.structs import replace

from agent_sdk.protocol.errors import InvalidParams, ProcessNotFound, StateConflict, TimedOut
from agent_sdk.protocol.results import Exit
from agent_sdk.workspace.child_process import ChildProcess
from agent_sdk.workspace.contract import ExecResult, OnOutput, Output, OutputName, Process, ShellResult
from agent_sdk.workspace.pipes import PipeWriter, resize
from agent_sdk.workspace.process_table import ProcessTable

PIECE_BYTES = 256 << 10
END_OF_FILE = b"\x04"
NOT_KEPT = "its output is not kept any more"
TURNS = 4096
"""How often the streams may change places before the order between them is no longer kept."""


class LocalProcess(Process):
    """A process by its id, which is looked up at each call: the process may be forgotten by then."""

    def __init__(self, processes: ProcessTable, process_id: str) -> None:
        self._processes = processes
        self._id = process_id

    def __repr__(self) -> str:
        return f"<LocalProcess {self._id}>"

    @property
    def id(self) -> str:
        return self._id

    def _find(self) -> ChildProcess:
        return self._processes.find(self._id)

    def _stdin(self) -> PipeWriter:
        stdin = self._find().stdin
        if stdin is None or not stdin.open:
            raise ProcessNotFound(f"the process has ended or closed its input: {self._id}", process=self._id)
        return stdin

    async def write(self, data: bytes) -> None:
        await self._stdin().write(data)

    async def write_at(self, offset: int, data: bytes) -> None:
        """Write to its standard input what lies behind `offset`, as PipeWriter.write_at does."""
        await self._stdin().write_at(offset, data)

    async def close_stdin(self) -> None:
        child = self._find()
        if child.stdin is None:
            return
        if child.terminal is None:
            child.stdin.close()
        elif child.stdin.open:
            await child.stdin.write(END_OF_FILE)

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
        child = self._find()
        spool, over = child.spools.get(stream), until or child.over
        if spool is None:
            return
        with child.reading():
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

    def size(self, stream: OutputName) -> int:
        """Return how many bytes it has said there."""
        return spool.size if (spool := self._find().spools.get(stream)) is not None else 0

    async def signal(self, name: str) -> None:
        """Send a signal to its process group; on a terminal the foreground job gets it, too."""
        number = Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
        if number is None:
            raise InvalidParams(f"name: no such signal: {name!r:.40}")
        self._find().signal(number)

    async def resize(self, *, rows: int, cols: int) -> None:
        """Set the size of its terminal; a process without one is a StateConflict."""
        child = self._find()
        if child.terminal is None:
            raise StateConflict(f"the process has no terminal: {self._id}")
        if not child.alive:
            raise ProcessNotFound(f"the process has ended: {self._id}", process=self._id)
        resize(child.terminal.master, rows, cols)

    async def wait(self, timeout: float | None = None) -> Exit:
        over = self._find().over
        await asyncio.wait((over,), timeout=timeout)
        if not over.done():
            raise TimedOut(f"the process still runs after {timeout} s: {self._id}", seconds=timeout)
        return over.result()

    async def result(self) -> ExecResult:
        """Return how the command stands: what it said so far, and how it ended when it did."""
        child = self._find()
        spools, exit = child.spools, child.exit
        return ExecResult(
            status="running" if exit is None else exit.status,
            exit_code=None if exit is None else exit.exit_code,
            signal=None if exit is None else exit.signal,
            out=await spools["stdout"].output(),
            err=await spools["stderr"].output() if "stderr" in spools else Output(),
            duration=time.monotonic() - child.started if exit is None else exit.duration,
            process_id=self._id,
            process=self,
            reason="" if exit is None else exit.reason,
        )


class OutputPump:
    """Calls `on_output` with the output of a process, in the order it came, at the caller's pace.

    The process never waits for the caller: what is not passed on yet is in the spools.
    """

    def __init__(self, child: ChildProcess, on_output: OnOutput) -> None:
        """Listen to a process that has said nothing yet."""
        self._child = child
        self._on_output = on_output
        # Which stream came next, and how far: (name, offset of its end).
        self._turns: deque[tuple[OutputName, int]] = deque()
        self._passed: dict[OutputName, int] = {"stdout": 0, "stderr": 0}
        self._news = asyncio.Event()
        child.on_news = self._note

    def _note(self, name: OutputName, size: int) -> None:
        turns = self._turns
        if turns and turns[-1][0] == name:
            turns[-1] = (name, size)
        elif len(turns) >= TURNS and turns[-2][0] == name:
            turns[-2] = (name, size)
        else:
            turns.append((name, size))
        self._news.set()

    async def run(self, until: float | None) -> None:
        """Call until the process is over and all is passed on, or until the loop's clock says `until`."""
        loop, over = asyncio.get_running_loop(), self._child.over
        over.add_done_callback(lambda _: self._news.set())
        try:
            while True:
                while self._turns:
                    if until is not None and loop.time() >= until:
                        return
                    await self._pass_on(*self._turns.popleft())
                if over.done():
                    return
                self._news.clear()
                try:
                    async with asyncio.timeout_at(until):
                        await self._news.wait()
                except TimeoutError:
                    return
        finally:
            self._child.on_news = None

    async def _pass_on(self, name: OutputName, end: int) -> None:
        spool = self._child.spools[name]
        while self._passed[name] < end:
            position = self._passed[name]
            found, data = await spool.read(position, min(PIECE_BYTES, end - position))
            data = data[: max(0, end - found)]
            self._passed[name] = found + len(data) if data else end
            if data:
                answer = self._on_output(name, data)
                if inspect.isawaitable(answer):
                    await answer


def weight(result: object) -> int:
    """Return how many bytes of output a result holds, for a store that keeps it."""
    match result:
        case ExecResult(out=out, err=err):
            return len(out.head) + len(out.tail) + len(err.head) + len(err.tail)
        case ShellResult(output=output):
            return len(output.head) + len(output.tail)
        case _:
            return 0


def without_output(result: Any) -> Any:
    """Return a result without the bytes of its output; its sizes stay true."""
    match result:
        case ExecResult(out=out, err=err):
            sizes = {"out": Output(size=out.size), "err": Output(size=err.size)}
            return replace(result, **sizes, reason=result.reason or NOT_KEPT)
        case ShellResult(output=output):
            return replace(result, output=Output(size=output.size))
        case _:
            return result
