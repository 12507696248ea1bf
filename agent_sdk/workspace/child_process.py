"""A started process: its number, its end, its streams, and the end of all that came of it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from signal import Signals
from typing import Any

from msgspec.structs import replace

from agent_sdk.protocol.errors import ProcessNotFound
from agent_sdk.protocol.results import Exit, ProcessInfo, Status
from agent_sdk.workspace.contract import KILL_GRACE_SECONDS, OutputName
from agent_sdk.workspace.disk import until_done
from agent_sdk.workspace.pipes import End, PipeReader, PipeWriter, Terminal, end_of, take_trailing_output
from agent_sdk.workspace.process_tree import Tree, children, end_tree, tick_now
from agent_sdk.workspace.spool import Spool

OnNews = Callable[[OutputName, int], None]

_FILTER_SECONDS = 1.0
"""So much longer than the command may take what it wrote through, when it ended in time itself."""


class ChildProcess:
    """A started process and its streams; it stays one after its end.

    Its end is seen here and nowhere else; the exit code comes from wait() alone.
    """

    def __init__(
        self,
        process_id: str,
        popen: subprocess.Popen[bytes],
        tree: Tree,
        started: float,
        since: int,
        *,
        command: str | list[str] = "",
        terminal: Terminal | None = None,
        keeper: socket.socket | None = None,
        why: Callable[[int | None], str] | None = None,
    ) -> None:
        """Begin to wait for the end of `popen`.

        Args:
            process_id: unique in the workspace.
            popen: what was started just now.
            tree: how to find what will come of it.
            started: when, on the monotonic clock.
            since: when, in clock ticks since boot; what came of it is not older.
            command: as the caller wrote it.
            terminal: its own.
            keeper: `popen` keeps the terminal of a program that is its child; it says here when that has begun and
                when it has ended, and ends when this is closed.
            why: called at its end, for the reason of its Exit.
        """
        self.id = process_id
        self.pid = popen.pid
        self.started = started
        """On the monotonic clock, right before the spawn."""
        self.since = since
        self.started_at = time.time()
        self.command = command
        self.terminal = terminal
        self.stdin: PipeWriter | None = None
        self.spools: dict[OutputName, Spool] = {}
        self.readers: dict[OutputName, PipeReader] = {}
        self.on_news: OnNews | None = None
        """Called with the name of a stream and its size when more came, up to the process's end."""
        self.in_use = 0
        """How many need its output at this moment; until then it is not forgotten."""
        self.forgotten = False
        self.exit: Exit | None = None
        self.on_death = self._take_rest
        """Called once when the process itself has ended; `over` waits for what it returns."""
        self.on_reaped: Callable[[int], object] = lambda tick: None
        """Called with the tick at which its number has become free for others."""
        self.over: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        """Done when it has ended, all it said is taken and, if it is being ended, its whole tree has."""
        self._trailing_output: asyncio.Task[None] | None = None
        self._ends: set[End] = set()
        self._source: End | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._popen = popen
        self._tree = tree
        self._ending: asyncio.Task[None] | None = None
        self._verdict: Status | None = None
        self._lasted: float | None = None
        """Seconds up to the end of the program."""
        self._found: Exit | None = None
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.create_future()
        self._pidfd = -1
        self._why = why
        if keeper is not None:
            self._loop.add_reader(keeper, self._told)
        else:
            self._begun.set_result(None)
        self._watch()

    @property
    def alive(self) -> bool:
        """Whether the process itself runs (its number is still its own)."""
        return self._lasted is None

    async def begun(self, timeout: float | None = None) -> None:
        """Wait until the program is there that signals are for, or has ended, but so many seconds at most."""
        if not self._begun.done():
            await asyncio.wait((self._begun,), timeout=timeout)

    def signal(self, number: Signals) -> None:
        """Send a signal to its process group, and to the one in the foreground of its terminal.

        Raises:
            ProcessNotFound: it has ended.
        """
        if not self.alive:
            raise ProcessNotFound(f"the process has ended: {self.id}", process=self.id)
        # The leader first: of a signal that came after its program's end it would know nothing.
        groups = {self.pid: None}
        if self.terminal is not None:
            with suppress(OSError):
                groups[os.tcgetpgrp(self.terminal.master) or self.pid] = None
        for pid in children(self.pid) if self._keeper is not None else ():
            with suppress(ProcessLookupError):
                groups[os.getpgid(pid)] = None  # a shell with jobs leaves the group that it was started in
        for group in groups:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    def end(
        self, verdict: Status | None = None, *, hang_up: bool = False, grace: float = KILL_GRACE_SECONDS
    ) -> None:
        """Begin to end its whole tree; `over` follows. A second call changes nothing.

        Args:
            verdict: the status of its Exit when it was not over yet; None: what wait() says.
            hang_up: send HUP as well, which interactive shells obey (they ignore TERM).
            grace: seconds between TERM and KILL.
        """
        if self._ending is None:
            if not self.over.done():
                self._verdict = verdict
            self._ending = self._loop.create_task(self._end_tree(hang_up, grace))
            self._ending.add_done_callback(lambda _: self._settle())

    async def _end_tree(self, hang_up: bool, grace: float) -> None:
        await self.begun(grace)
        await end_tree(self._tree, hang_up=hang_up, grace=grace)

    async def ended(self) -> None:
        """Wait until the tree that is being ended has ended, even when cancelled meanwhile."""
        if self._ending is not None:
            await until_done(self._ending, self.over)

    # --- the end of the process itself ---

    def _watch(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:  # out of descriptors, or refused
            threading.Thread(target=self._wait_in_thread, name=f"wait-{self.pid}", daemon=True).start()
        else:
            self._loop.add_reader(self._pidfd, self._reap)

    def _wait_in_thread(self) -> None:
        with suppress(ChildProcessError):
            os.waitid(
                os.P_PID, self.pid, os.WEXITED | os.WNOWAIT
            )  # its number stays its own until the loop knows
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        if self._found is not None:
            return
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # somebody else in this program has taken the exit code
            pid, status = self.pid, -1
        if pid:
            if self._pidfd >= 0:
                self._loop.remove_reader(self._pidfd)
                os.close(self._pidfd)
            self._died(status)

    def _told(self) -> None:
        if self._keeper is None:
            return
        said = b""
        with suppress(ConnectionResetError):  # the keeper itself was killed, as when nothing comes
            said = self._keeper.recv(64)
        if said and not self._begun.done():
            self._begun.set_result(None)
        if b"ended" in said or not said:
            self._loop.remove_reader(self._keeper)
        if b"ended" in said:
            self._ended_itself()
            self._settle()

    def _ended_itself(self) -> float:
        """Take note of the end of the program, once; returns how long it lasted."""
        if self._lasted is None:
            self._lasted = time.monotonic() - self.started
            if not self._begun.done():
                self._begun.set_result(None)
            if (rest := self.on_death()) is not None:
                self._trailing_output = self._loop.create_task(rest)
                self._trailing_output.add_done_callback(lambda _: self._settle())
        return self._lasted

    def _died(self, status: int) -> None:
        tick = self._tree.leaders[self.pid] = tick_now()
        self.on_reaped(tick)
        self._popen.returncode = 0  # it has been waited for
        seconds = self._ended_itself()
        if status < 0:
            self._found = Exit(status="unknown", duration=seconds, reason="its exit code was lost")
        elif os.WIFSIGNALED(status):
            self._found = Exit(status="killed", signal=os.WTERMSIG(status), duration=seconds)
        else:
            self._found = Exit(status="exited", exit_code=os.WEXITSTATUS(status), duration=seconds)
        if self._why is not None and (reason := self._why(self._found.exit_code)):
            self._found = replace(self._found, reason=reason)
        self._settle()

    def _settle(self) -> None:
        found = self._found
        if self._keeper is not None and self._lasted is not None:
            if found is None and self._trailing_output is not None and not self._trailing_output.done():
                return
            self._loop.remove_reader(self._keeper)
            self._keeper.close()
            self._keeper = None
        if found is None or self.over.done():
            return
        for task in (self._trailing_output, self._ending):
            if task is not None and not task.done():
                return
        if self._verdict is not None:
            seconds = time.monotonic() - self.started
            found = replace(found, status=self._verdict, exit_code=None, duration=seconds)
        self.exit = found
        self.on_news = None
        if self._timer is not None:
            self._timer.cancel()
        self.over.set_result(found)

    # --- its streams ---

    def write_to(self, fd: int) -> None:
        """Write its input to `fd`, which it takes over."""
        self._source = end_of(fd)
        self.stdin = PipeWriter(fd)

    def read_from(self, fd: int, name: OutputName, spool: Spool) -> None:
        """Keep what comes from `fd`, which it takes over, in `spool`."""
        self.spools[name] = spool
        self._ends.add(end_of(fd if self.terminal is None else self.terminal.slave))

        def take(data: bytes) -> bool:
            if self.forgotten:
                return True
            spool.feed(data)
            if self.on_news is not None:
                self.on_news(name, spool.size)
            return not spool.full

        reader = self.readers[name] = PipeReader(fd, take)
        spool.on_room = reader.resume

    def _take_rest(self) -> Coroutine[Any, Any, None] | None:
        """Take what it said last; return what waits for the rest, when others still have its pipes open.

        What its children in the background say later is kept, but nobody waits for it.
        """
        if self.stdin is not None:
            self.stdin.close()
        self._drain()
        if self.terminal is not None:
            self.terminal.close_slave()
            self._drain()
        if not self.is_heard:
            return None
        return take_trailing_output(
            self.readers.values(), self._ends, self.pid, self.since, source=self._source
        )

    def _drain(self) -> None:
        for reader in self.readers.values():
            reader.drain()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep its output from being forgotten."""
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1

    def limit(self, seconds: float | None) -> None:
        """End its tree `seconds` after its start."""
        if seconds is not None:
            left = self.started + seconds - time.monotonic()
            self._timer = self._loop.call_later(max(0.0, left), self._time_over)

    def _time_over(self) -> None:
        if self.alive and self._keeper is None:
            self._reap()  # it may have ended before the loop came to tell
        if self.alive:
            self.end("timeout")
        elif not self.over.done():
            self._timer = self._loop.call_later(_FILTER_SECONDS, self.end, "timeout")

    @property
    def on_disk(self) -> int:
        """Bytes of disk its output takes."""
        return sum(spool.on_disk for spool in self.spools.values())

    @property
    def is_heard(self) -> bool:
        """Whether somebody can still write to its streams."""
        return any(reader.open for reader in self.readers.values())

    def info(self) -> ProcessInfo:
        """Describe it."""
        sizes = {name: spool.size for name, spool in self.spools.items()}
        return ProcessInfo(
            id=self.id,
            command=self.command,
            pid=self.pid,
            pty=self.terminal is not None,
            running=self.exit is None,
            started_at=self.started_at,
            exit=self.exit,
            stdout_bytes=sizes.get("stdout", 0),
            stderr_bytes=sizes.get("stderr", 0),
            stdin_bytes=self.stdin.taken if self.stdin is not None else 0,
        )

    def close(self) -> None:
        """Close its descriptors; its output stays readable."""
        if self.stdin is not None:
            self.stdin.close()
        self._drain()
        for reader in self.readers.values():
            reader.close()
