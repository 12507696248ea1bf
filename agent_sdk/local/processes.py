"""Processes of a workspace as its users see them: output by offset, input, signals, their ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from agent_sdk.local.arguments import check_seconds, check_signal, check_size
from agent_sdk.local.children import Child, Children
from agent_sdk.local.feed import Feed
from agent_sdk.local.intake import Intake
from agent_sdk.local.launch import Folder, Launch
from agent_sdk.local.spool import Spool
from agent_sdk.local.terminal import Terminal, open_terminal, resize
from agent_sdk.protocol.errors import InvalidParams, ProcessNotFound, StateConflict, TimedOut
from agent_sdk.protocol.results import Exit, ProcessInfo
from agent_sdk.workspace import OutputName

ENDED_KEPT = 64
SPOOL_KEPT_BYTES = 1 << 30
PIECE_BYTES = 256 << 10
END_OF_FILE = b"\x04"

OnNews = Callable[[OutputName, int], None]


class Running:
    """A process with its streams; it stays one after its end."""

    def __init__(self, command: str | list[str], child: Child, terminal: Terminal | None) -> None:
        self.command = command
        self.child = child
        self.terminal = terminal
        self.spools: dict[OutputName, Spool] = {}
        self.intakes: dict[OutputName, Intake] = {}
        self.feed: Feed | None = None
        self.on_news: OnNews | None = None
        """Called with the name of a stream and its size when more came, up to the process's end."""
        self.timer: asyncio.TimerHandle | None = None
        self.readers = 0
        """Who needs its output at this moment; until then it is not forgotten."""
        self.forgotten = False

    def listen(self, name: OutputName, fd: int, spool: Spool) -> None:
        """Keep what comes from `fd` in `spool`."""
        self.spools[name] = spool

        def take(data: bytes) -> bool:
            if self.forgotten:
                return True
            spool.feed(data)
            if self.on_news is not None:
                self.on_news(name, spool.size)
            return not spool.full

        intake = self.intakes[name] = Intake(fd, take)
        spool.on_room = intake.resume

    def died(self) -> None:
        """Take what it said last; what its children say later is kept, but nobody waits for it."""
        for intake in self.intakes.values():
            intake.drain()
        if self.terminal is not None:
            self.terminal.close_slave()
            for intake in self.intakes.values():
                intake.drain()
        self.on_news = None
        if self.timer is not None:
            self.timer.cancel()
        if self.feed is not None:
            self.feed.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep its output from being forgotten."""
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1

    def limit(self, seconds: float | None) -> None:
        """End its tree `seconds` after its start."""
        if seconds is not None:
            left = self.child.started + seconds - time.monotonic()
            self.timer = asyncio.get_running_loop().call_later(max(0.0, left), self._time_over)

    def _time_over(self) -> None:
        self.child.look()
        if self.child.alive:
            self.child.end("timeout")

    @property
    def on_disk(self) -> int:
        """Bytes of disk its output takes."""
        return sum(spool.on_disk for spool in self.spools.values())

    @property
    def is_heard(self) -> bool:
        """Whether somebody can still write to its streams."""
        return any(intake.open for intake in self.intakes.values())

    def info(self) -> ProcessInfo:
        """Describe it."""
        child = self.child
        sizes = {name: spool.size for name, spool in self.spools.items()}
        return ProcessInfo(
            id=child.id,
            command=self.command,
            pid=child.pid,
            pty=self.terminal is not None,
            running=child.exit is None,
            started_at=child.started_at,
            exit=child.exit,
            stdout_bytes=sizes.get("stdout", 0),
            stderr_bytes=sizes.get("stderr", 0),
        )

    def close(self) -> None:
        """Close its descriptors; its output stays readable."""
        self.died()
        for intake in self.intakes.values():
            intake.close()


class Processes:
    """The processes of one workspace, oldest first; of the ended ones the last 64, or 1 GiB of output."""

    def __init__(self, children: Children, spool_folder: str) -> None:
        self._children = children
        self._spool_folder = spool_folder
        self._running: dict[str, Running] = {}
        self._ended: dict[str, Running] = {}
        """Those of `_running` that have ended, the first to end first."""
        self._hidden: set[Running] = set()
        """Those nobody can ask for: not listed ones, and ended ones whose children still write."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(
        self,
        command: str | list[str],
        launch: Launch,
        folder: Folder,
        *,
        stdin: bool,
        size: tuple[int, int] | None = None,
        listed: bool = True,
    ) -> Running:
        """Start a program with pipes, or with a terminal of `size` (rows, columns).

        Args:
            command: as the caller wrote it.
            launch: what to run.
            folder: where; the descriptor stays the caller's.
            stdin: whether it gets input (`feed`), or reads an empty one.
            size: of its terminal; None: pipes.
            listed: whether callers see it in `list`; if not, it has to be given to `drop`.

        Raises:
            SpawnFailed: it did not start.
        """
        if size is None:
            running = self._start_on_pipes(command, launch, folder, stdin)
        else:
            running = self._start_on_terminal(command, launch, folder, size)
        child = running.child
        child.on_death = running.died
        if listed:
            self._running[child.id] = running
            child.over.add_done_callback(lambda _: self._settle(running))
        else:
            self._hidden.add(running)
        return running

    def _start_on_pipes(
        self, command: str | list[str], launch: Launch, folder: Folder, stdin: bool
    ) -> Running:
        ours: list[int] = []
        theirs: list[int] = []
        try:
            if stdin:
                _pair(theirs, ours, *os.pipe())
            for _ in range(2):
                _pair(ours, theirs, *os.pipe())
            source = theirs[0] if stdin else subprocess.DEVNULL
            out, err = theirs[-2:]
            child = self._children.spawn(launch, folder, stdin=source, stdout=out, stderr=err)
        except BaseException:
            _close(ours)
            raise
        finally:
            _close(theirs)
        running = Running(command, child, None)
        if stdin:
            running.feed = Feed(ours.pop(0))
        running.listen("stdout", ours[0], self._spool(child, "out"))
        running.listen("stderr", ours[1], self._spool(child, "err"))
        return running

    def _start_on_terminal(
        self, command: str | list[str], launch: Launch, folder: Folder, size: tuple[int, int]
    ) -> Running:
        terminal = open_terminal(*size)
        none = subprocess.DEVNULL
        launch = Launch(
            launch.argv,
            {"TERM": "xterm-256color", **launch.environment},
            launch.executable,
            terminal.name,
            launch.pass_fds,
        )
        try:
            child = self._children.spawn(launch, folder, stdin=none, stdout=none, stderr=none)
            second = os.dup(terminal.master)
        except BaseException:
            terminal.close_slave()
            os.close(terminal.master)
            raise
        running = Running(command, child, terminal)
        running.feed = Feed(second)
        running.listen("stdout", terminal.master, self._spool(child, "out"))
        return running

    def _spool(self, child: Child, kind: str) -> Spool:
        return Spool(os.path.join(self._spool_folder, f"{child.id}.{kind}"))

    def find(self, process_id: str) -> Running:
        """Return a process.

        Raises:
            ProcessNotFound: there is none of this id, or it ended long ago.
        """
        running = self._running.get(process_id)
        if running is None:
            raise ProcessNotFound(f"no such process: {process_id:.80}", process=process_id[:80])
        return running

    def list(self) -> list[ProcessInfo]:
        """Describe all, oldest first."""
        return [running.info() for running in self._running.values()]

    def _settle(self, running: Running) -> None:
        for name, spool in running.spools.items():
            if spool.wrapped and not running.intakes[name].open:
                self.hold(spool.settle(final=True))
        self._ended[running.child.id] = running
        self._forget_old()

    def _forget_old(self) -> None:
        kept = sum(running.on_disk for running in self._ended.values())
        for process_id, oldest in tuple(self._ended.items()):
            if len(self._ended) <= ENDED_KEPT and (kept <= SPOOL_KEPT_BYTES or len(self._ended) == 1):
                return
            if not oldest.readers:
                kept -= oldest.on_disk
                del self._running[process_id], self._ended[process_id]
                self._forget(oldest)

    def _forget(self, running: Running) -> None:
        """Drop the output. What its children still write is read, or the pipe would break under them."""
        running.forgotten = True
        self._hidden.add(running)
        for spool in running.spools.values():
            spool.on_room = None
            self.hold(spool.close())
        for intake in running.intakes.values():
            intake.resume()
        self._hidden = {each for each in self._hidden if not each.forgotten or each.is_heard}

    async def drop(self, running: Running) -> None:
        """End what a process that is not listed left behind, and forget it."""
        if running.child.exit is None:
            running.child.end()
            await running.child.ended()
        self._forget(running)

    def hold(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something in the background; the workspace waits for it when it closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Close all descriptors and spools; the processes have to be ended already."""
        for running in (*self._running.values(), *self._hidden):
            running.close()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        for running in (*self._running.values(), *self._hidden):
            for spool in running.spools.values():
                await spool.close()
        self._running.clear()
        self._ended.clear()
        self._hidden.clear()


class LocalProcess:
    """Implements `workspace.Process`."""

    def __init__(self, processes: Processes, process_id: str) -> None:
        self._processes = processes
        self._id = process_id

    def __repr__(self) -> str:
        return f"<LocalProcess {self._id}>"

    @property
    def id(self) -> str:
        """See Process.id."""
        return self._id

    def _find(self) -> Running:
        return self._processes.find(self._id)

    def _feed(self) -> Feed:
        feed = self._find().feed
        if feed is None or not feed.open:
            raise ProcessNotFound(f"the process has ended or closed its input: {self._id}", process=self._id)
        return feed

    async def write(self, data: bytes) -> None:
        """See Process.write."""
        await self._feed().write(data)

    async def close_stdin(self) -> None:
        """See Process.close_stdin."""
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
        """See Process.output."""
        async for _, data in self.chunks(since, stream=stream, follow=follow):
            yield data

    async def chunks(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Like `output`, with the offset of each piece, which shows where a gap is."""
        running = self._find()
        if stream not in ("stdout", "stderr"):
            raise InvalidParams(f"stream: stdout or stderr (got {stream!r:.40})")
        if isinstance(since, bool) or not isinstance(since, int) or since < 0:
            raise InvalidParams(f"since: a number of bytes, not negative (got {since!r:.40})")
        spool, over = running.spools.get(stream), running.child.over
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
        """See Process.signal; on a terminal the foreground job gets it, too."""
        number = check_signal(name)
        running = self._find()
        running.child.send(number)
        if running.terminal is not None:
            with suppress(OSError):
                foreground = os.tcgetpgrp(running.terminal.master)
                if foreground > 0 and foreground != running.child.pid:
                    os.killpg(foreground, number)

    async def resize(self, *, rows: int, cols: int) -> None:
        """See Process.resize; a process without a terminal is a StateConflict."""
        check_size(rows, cols)
        running = self._find()
        if running.terminal is None:
            raise StateConflict(f"the process has no terminal: {self._id}")
        if not running.child.alive:
            raise ProcessNotFound(f"the process has ended: {self._id}", process=self._id)
        resize(running.terminal.master, rows, cols)

    async def wait(self, timeout: float | None = None) -> Exit:
        """See Process.wait."""
        check_seconds(timeout, "timeout")
        over = self._find().child.over
        await asyncio.wait((over,), timeout=timeout)
        if not over.done():
            raise TimedOut(f"the process still runs after {timeout} s: {self._id}", seconds=timeout)
        return over.result()


def _pair(readers: list[int], writers: list[int], reader: int, writer: int) -> None:
    readers.append(reader)
    writers.append(writer)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
