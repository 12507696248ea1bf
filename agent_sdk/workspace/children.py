"""The processes a workspace has started: their numbers, their ends, and the end of all that came of them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from msgspec.structs import replace

from agent_sdk.protocol.errors import ProcessNotFound, WorkspaceUnavailable
from agent_sdk.protocol.results import Exit, Status
from agent_sdk.workspace.contract import KILL_GRACE_SECONDS
from agent_sdk.workspace.disk import Folder
from agent_sdk.workspace.environment import MARKER
from agent_sdk.workspace.launch import Interpreter, Launch, spawn
from agent_sdk.workspace.limits import LimitWatch
from agent_sdk.workspace.process_tree import Tree, children, end_tree, tick_now

SESSIONS = 4096
SH = Interpreter("/bin/sh")


class Child:
    """A started process. Its end is seen here and nowhere else; the exit code comes from wait() alone."""

    def __init__(
        self,
        process_id: str,
        popen: subprocess.Popen[bytes],
        tree: Tree,
        started: float,
        since: int,
        *,
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
        self.exit: Exit | None = None
        self.on_death: Callable[[], Coroutine[Any, Any, None] | None] = _nothing
        """Called once when the process itself has ended; `over` waits for what it returns."""
        self.over: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        """Done when it has ended, all it said is taken and, if it is being ended, its whole tree has."""
        self._last_words: asyncio.Task[None] | None = None
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

    def send(self, number: signal.Signals, foreground: int = 0) -> None:
        """Send a signal to its process group, and to the one in the foreground of its terminal.

        Raises:
            ProcessNotFound: it has ended.
        """
        if not self.alive:
            raise ProcessNotFound(f"the process has ended: {self.id}", process=self.id)
        # The leader first: of a signal that came after its program's end it would know nothing.
        groups = dict.fromkeys((self.pid, foreground or self.pid))
        for pid in children(self.pid) if self._keeper is not None else ():
            with suppress(ProcessLookupError):
                groups[os.getpgid(pid)] = None  # a shell with jobs leaves the group that it was started in
        for group in groups:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    def look(self) -> None:
        """Notice at once if it has ended, before the loop comes to tell."""
        if self.alive and self._keeper is None and self._pidfd >= 0:
            self._reap()

    def end(
        self, verdict: Status | None = None, *, hang_up: bool = False, grace: float = KILL_GRACE_SECONDS
    ) -> None:
        """Begin to end its whole tree; `over` follows. A second call changes nothing.

        Args:
            verdict: the status of its Exit when it was not over yet; None: what wait() says.
            hang_up: see `end_tree`.
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
        cancelled: asyncio.CancelledError | None = None
        ending = self._ending
        while ending is not None and not (ending.done() and self.over.done()):
            try:
                await asyncio.wait((ending, self.over), return_when=asyncio.ALL_COMPLETED)
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled

    # --- the end of the process itself ---

    def _watch(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:  # out of descriptors, or refused
            threading.Thread(target=self._wait_in_thread, name=f"wait-{self.pid}", daemon=True).start()
        else:
            self._loop.add_reader(self._pidfd, self._reap)

    def _wait_in_thread(self) -> None:
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            status = -1
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._died, status)

    def _reap(self) -> None:
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # somebody else in this program has taken the exit code
            pid, status = self.pid, -1
        if pid:
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
                self._last_words = self._loop.create_task(rest)
                self._last_words.add_done_callback(lambda _: self._settle())
        return self._lasted

    def _died(self, status: int) -> None:
        self._tree.leaders[self.pid] = tick_now()
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
            if found is None and self._last_words is not None and not self._last_words.done():
                return
            self._loop.remove_reader(self._keeper)
            self._keeper.close()
            self._keeper = None
        tasks = [task for task in (self._last_words, self._ending) if task is not None]
        if found is None or self.over.done() or not all(task.done() for task in tasks):
            return
        if self._verdict is not None:
            seconds = time.monotonic() - self.started
            found = replace(found, status=self._verdict, exit_code=None, duration=seconds)
        self.exit = found
        self.over.set_result(found)


class Children:
    """All of a workspace. `close` ends every process that came of it."""

    def __init__(self, sh: Interpreter = SH, limits: LimitWatch | None = None) -> None:
        """Begin with none.

        Args:
            sh: gives programs their terminal.
            limits: looked at when one has ended.
        """
        self._sh = sh
        self._limits = limits
        self._nonce = os.urandom(6).hex()
        self._count = 0
        # Pids of leaders; kept after their end, because what they left behind is in their session.
        self._leaders: dict[int, int | None] = {}
        self._living: set[Child] = set()
        self._closed = False

    def spawn(self, launch: Launch, folder: Folder, *, stdin: int, stdout: int, stderr: int) -> Child:
        """Start a program. The descriptors stay the caller's.

        Raises:
            SpawnFailed: it did not start.
            WorkspaceUnavailable: the workspace is closed.
        """
        if self._closed:
            raise WorkspaceUnavailable("the workspace is closed")
        self._count += 1
        name = f"{self._nonce}-{self._count}"
        started, since = time.monotonic(), tick_now()
        why = None
        if self._limits is not None:
            why = partial(self._limits.why, self._limits.look())
        keeper = None
        with ExitStack() as until_started, ExitStack() as unless_started:
            if launch.terminal is not None:
                keeper, theirs = socket.socketpair()
                unless_started.callback(keeper.close)
                until_started.callback(theirs.close)
                stdin = stdout = theirs.fileno()
            popen = spawn(launch, folder, name, self._sh, stdin=stdin, stdout=stdout, stderr=stderr)
            unless_started.pop_all()
        if self._limits is not None:
            self._limits.expose(popen.pid)
        if keeper is not None:
            with suppress(BrokenPipeError):  # it was killed at once
                keeper.send(b"\n")
        self._leaders[popen.pid] = None
        tree = Tree(f"{MARKER}={name}\0".encode(), {popen.pid: None})
        child = Child(name, popen, tree, started, since, keeper=keeper, why=why)
        self._living.add(child)
        child.over.add_done_callback(lambda _: self._ended(child))
        return child

    def _ended(self, child: Child) -> None:
        self._living.discard(child)
        self._leaders[child.pid] = tick_now()
        if len(self._leaders) > SESSIONS:
            # What is forgotten here can still be found by its marker.
            oldest = next(pid for pid, ended in self._leaders.items() if ended is not None)
            del self._leaders[oldest]

    async def close(self) -> None:
        """End every process tree: HUP and TERM, after 5 s KILL. Nothing can be started any more."""
        self._closed = True
        if self._count == 0:
            return
        waiting = [child.over for child in self._living]
        await asyncio.gather(*(child.begun(KILL_GRACE_SECONDS) for child in self._living))
        await end_tree(Tree(f"{MARKER}={self._nonce}-".encode(), self._leaders), hang_up=True)
        if waiting:
            await asyncio.wait(waiting)


def _nothing() -> None:
    return None
