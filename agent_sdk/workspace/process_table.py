"""The processes of a workspace: started, listed, ended with all that came of them, and forgotten in the end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Coroutine
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import ProcessNotFound, WorkspaceUnavailable
from agent_sdk.protocol.results import ProcessInfo
from agent_sdk.workspace.child_process import ChildProcess
from agent_sdk.workspace.contract import KILL_GRACE_SECONDS, OutputName
from agent_sdk.workspace.disk import Folder
from agent_sdk.workspace.environment import MARKER
from agent_sdk.workspace.launch import Interpreter, Launch, spawn
from agent_sdk.workspace.limits import LimitWatch
from agent_sdk.workspace.pipes import Terminal, open_terminal
from agent_sdk.workspace.process_tree import Tree, end_tree, tick_now
from agent_sdk.workspace.spool import Spool

ENDED_KEPT = 64
SPOOL_KEPT_BYTES = 1 << 30
SESSIONS = 4096
SH = Interpreter("/bin/sh")


class ProcessTable:
    """The processes of one workspace, oldest first; of the ended ones the last 64, or 1 GiB of output."""

    def __init__(
        self,
        spool_folder: str,
        *,
        sh: Interpreter = SH,
        limits: LimitWatch | None = None,
        kept_bytes: int = SPOOL_KEPT_BYTES,
    ) -> None:
        """Begin with none.

        Args:
            spool_folder: for the output of processes.
            sh: gives programs their terminal.
            limits: looked at when one has ended.
            kept_bytes: how much output of ended ones is kept on the disk.
        """
        self._spool_folder = spool_folder
        self._sh = sh
        self._limits = limits
        self._kept_bytes = kept_bytes
        self._nonce = os.urandom(6).hex()
        self._count = 0
        self.leaders: dict[int, int | None] = {}
        """As a Tree has them; kept after their end, because what they left behind is in their session."""
        self._living: set[ChildProcess] = set()
        self._closed = False
        self._listed: dict[str, ChildProcess] = {}
        self._ended: dict[str, ChildProcess] = {}
        """Those of `_listed` that have ended, the first to end first."""
        self._ended_on_disk = 0
        """Bytes of disk that the output of those takes."""
        self._hidden: set[ChildProcess] = set()
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
        merge: bool = False,
        listed: bool = True,
    ) -> ChildProcess:
        """Start a program with pipes, or with a terminal of `size` (rows, columns).

        Args:
            command: as the caller wrote it.
            launch: what to run.
            folder: where; the descriptor stays the caller's.
            stdin: whether it gets input, or reads an empty one.
            size: of its terminal; None: pipes.
            merge: its standard error goes into its standard output.
            listed: whether callers see it in `infos`; if not, it has to be given to `drop`.

        Raises:
            SpawnFailed: it did not start.
        """
        if size is None:
            child = self._start_on_pipes(command, launch, folder, stdin, merge)
        else:
            child = self._start_on_terminal(command, launch, folder, size)
        if listed:
            self._listed[child.id] = child
            child.over.add_done_callback(lambda _: self._settle(child))
        else:
            self._hidden.add(child)
        return child

    def _start_on_pipes(
        self, command: str | list[str], launch: Launch, folder: Folder, stdin: bool, merge: bool
    ) -> ChildProcess:
        names: tuple[OutputName, ...] = ("stdout",) if merge else ("stdout", "stderr")
        with ExitStack() as until_started, ExitStack() as unless_started:
            source, sink = _pipe(until_started, unless_started) if stdin else (subprocess.DEVNULL, -1)
            outputs = [_pipe(unless_started, until_started) for _ in names]
            child = self.spawn(
                launch, folder, stdin=source, stdout=outputs[0][1], stderr=outputs[-1][1], command=command
            )
            unless_started.pop_all()
        if stdin:
            child.write_to(sink)
        for name, (reader, _) in zip(names, outputs, strict=True):
            child.read_from(reader, name, self._spool(child, name))
        return child

    def _start_on_terminal(
        self, command: str | list[str], launch: Launch, folder: Folder, size: tuple[int, int]
    ) -> ChildProcess:
        terminal = open_terminal(*size)
        environment = {"TERM": "xterm-256color", **launch.environment}
        launch = replace(launch, environment=environment, terminal=terminal.name)
        try:
            child = self.spawn(launch, folder, command=command, terminal=terminal)
            second = os.dup(terminal.master)
        except BaseException:
            terminal.close_slave()
            os.close(terminal.master)
            raise
        child.write_to(second)
        child.read_from(terminal.master, "stdout", self._spool(child, "stdout"))
        return child

    def spawn(
        self,
        launch: Launch,
        folder: Folder,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        command: str | list[str] = "",
        terminal: Terminal | None = None,
    ) -> ChildProcess:
        """Start a program, which is not listed. The descriptors stay the caller's.

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
        self.leaders[popen.pid] = None
        tree = Tree(f"{MARKER}={name}\0".encode(), {popen.pid: None})
        child = ChildProcess(
            name, popen, tree, started, since, command=command, terminal=terminal, keeper=keeper, why=why
        )
        child.on_reaped = partial(self._note_end, popen.pid)
        self._living.add(child)
        child.over.add_done_callback(lambda _: self._living.discard(child))
        return child

    def _note_end(self, pid: int, tick: int) -> None:
        """Take note that the number of a leader is no longer its own."""
        self.leaders[pid] = tick
        if len(self.leaders) > SESSIONS:
            # What is forgotten here can still be found by its marker.
            oldest = next(pid for pid, ended in self.leaders.items() if ended is not None)
            del self.leaders[oldest]

    def _spool(self, child: ChildProcess, name: OutputName) -> Spool:
        path = os.path.join(self._spool_folder, f"{child.id}.{name.removeprefix('std')}")
        return Spool(path, on_written=partial(self._wrote, child.id))

    def _wrote(self, process_id: str, size: int) -> None:
        if process_id in self._ended:
            self._ended_on_disk += size

    def find(self, process_id: str) -> ChildProcess:
        """Return a process.

        Raises:
            ProcessNotFound: there is none of this id, or it ended long ago.
        """
        child = self._listed.get(process_id)
        if child is None:
            raise ProcessNotFound(f"no such process: {process_id:.80}", process=process_id[:80])
        return child

    def infos(self) -> list[ProcessInfo]:
        """Describe all, oldest first."""
        return [child.info() for child in self._listed.values()]

    def _settle(self, child: ChildProcess) -> None:
        for name, spool in child.spools.items():
            if spool.wrapped and not child.readers[name].open:
                self.hold(spool.settle(final=True))
        self._ended[child.id] = child
        self._ended_on_disk += child.on_disk
        self._forget_old()

    def _forget_old(self) -> None:
        for process_id, oldest in tuple(self._ended.items()):
            too_much = self._ended_on_disk > self._kept_bytes and len(self._ended) > 1
            if len(self._ended) <= ENDED_KEPT and not too_much:
                return
            if not oldest.in_use:
                self._ended_on_disk -= oldest.on_disk
                del self._listed[process_id], self._ended[process_id]
                self._forget(oldest)

    def _forget(self, child: ChildProcess) -> None:
        """Drop the output. What its children still write is read, or the pipe would break under them."""
        child.forgotten = True
        self._hidden.add(child)
        for spool in child.spools.values():
            spool.on_room = None
            self.hold(spool.close())
        for reader in child.readers.values():
            reader.resume()
        self._hidden = {each for each in self._hidden if not each.forgotten or each.is_heard}

    async def drop(self, child: ChildProcess) -> None:
        """End what a process that is not listed left behind, and forget it."""
        if child.exit is None:
            child.end()
            await child.ended()
        self._forget(child)

    def hold(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something in the background; the workspace waits for it when it closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end(self) -> None:
        """End every process tree: HUP and TERM, after 5 s KILL. Nothing can be started any more."""
        self._closed = True
        if self._count == 0:
            return
        waiting = [child.over for child in self._living]
        await asyncio.gather(*(child.begun(KILL_GRACE_SECONDS) for child in self._living))
        await end_tree(Tree(f"{MARKER}={self._nonce}-".encode(), self.leaders), hang_up=True)
        if waiting:
            await asyncio.wait(waiting)

    async def close(self) -> None:
        """Close all descriptors and spools; the processes have to be ended already."""
        for child in (*self._listed.values(), *self._hidden):
            child.close()
        await cancel_and_wait(*self._tasks)
        for child in (*self._listed.values(), *self._hidden):
            for spool in child.spools.values():
                await spool.close()
        self._listed.clear()
        self._ended.clear()
        self._hidden.clear()


def _pipe(reader_closes: ExitStack, writer_closes: ExitStack) -> tuple[int, int]:
    """Open a pipe; returns its two ends, which these close."""
    reader, writer = os.pipe()
    reader_closes.callback(os.close, reader)
    writer_closes.callback(os.close, writer)
    return reader, writer
