"""A process with its streams: what it says is kept, what it is told is fed to it, its time is limited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from agent_sdk.protocol.results import Exit, ProcessInfo
from agent_sdk.workspace.children import Child
from agent_sdk.workspace.contract import OutputName
from agent_sdk.workspace.feed import Feed
from agent_sdk.workspace.intake import Intake
from agent_sdk.workspace.last_words import End, end_of, last_words
from agent_sdk.workspace.spool import Spool
from agent_sdk.workspace.terminal import Terminal

OnNews = Callable[[OutputName, int], None]

_FILTER_SECONDS = 1.0
"""So much longer than the command may take what it wrote through, when it ended in time itself."""


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
        self._ends: set[End] = set()
        self._source: End | None = None
        child.on_death = self._died
        child.over.add_done_callback(self._over)

    def feed_from(self, fd: int) -> None:
        """Write its input to `fd`."""
        self._source = end_of(fd)
        self.feed = Feed(fd)

    def listen(self, name: OutputName, fd: int, spool: Spool) -> None:
        """Keep what comes from `fd` in `spool`."""
        self.spools[name] = spool
        self._ends.add(end_of(fd if self.terminal is None else self.terminal.slave))

        def take(data: bytes) -> bool:
            if self.forgotten:
                return True
            spool.feed(data)
            if self.on_news is not None:
                self.on_news(name, spool.size)
            return not spool.full

        intake = self.intakes[name] = Intake(fd, take)
        spool.on_room = intake.resume

    def _died(self) -> Coroutine[Any, Any, None] | None:
        """Take what it said last; returns what waits for the rest, when others still have its pipes open.

        What its children in the background say later is kept, but nobody waits for it.
        """
        if self.feed is not None:
            self.feed.close()
        self._drain()
        if self.terminal is not None:
            self.terminal.close_slave()
            self._drain()
        if not self.is_heard:
            return None
        return last_words(
            self.intakes.values(), self._ends, self.child.pid, self.child.since, source=self._source
        )

    def _drain(self) -> None:
        for intake in self.intakes.values():
            intake.drain()

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
        elif not self.child.over.done():
            self.timer = asyncio.get_running_loop().call_later(_FILTER_SECONDS, self.child.end, "timeout")

    def _over(self, over: asyncio.Future[Exit]) -> None:
        self.on_news = None
        if self.timer is not None:
            self.timer.cancel()

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
            stdin_bytes=self.feed.taken if self.feed is not None else 0,
        )

    def close(self) -> None:
        """Close its descriptors; its output stays readable."""
        if self.feed is not None:
            self.feed.close()
        self._drain()
        for intake in self.intakes.values():
            intake.close()
