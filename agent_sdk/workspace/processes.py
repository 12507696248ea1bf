"""The processes of a workspace: started, listed, and forgotten when too many have ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from agent_sdk.protocol.errors import ProcessNotFound
from agent_sdk.protocol.results import ProcessInfo
from agent_sdk.workspace.children import Child, Children
from agent_sdk.workspace.disk import Folder
from agent_sdk.workspace.launch import Launch
from agent_sdk.workspace.running import Running
from agent_sdk.workspace.spool import Spool
from agent_sdk.workspace.terminal import open_terminal

ENDED_KEPT = 64
SPOOL_KEPT_BYTES = 1 << 30


class Processes:
    """The processes of one workspace, oldest first; of the ended ones the last 64, or 1 GiB of output."""

    def __init__(self, children: Children, spool_folder: str, *, kept_bytes: int = SPOOL_KEPT_BYTES) -> None:
        self._children = children
        self._spool_folder = spool_folder
        self._kept_bytes = kept_bytes
        self._running: dict[str, Running] = {}
        self._ended: dict[str, Running] = {}
        """Those of `_running` that have ended, the first to end first."""
        self._ended_on_disk = 0
        """Bytes of disk that the output of those takes."""
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
        merge: bool = False,
        listed: bool = True,
    ) -> Running:
        """Start a program with pipes, or with a terminal of `size` (rows, columns).

        Args:
            command: as the caller wrote it.
            launch: what to run.
            folder: where; the descriptor stays the caller's.
            stdin: whether it gets input (`feed`), or reads an empty one.
            size: of its terminal; None: pipes.
            merge: its standard error goes into its standard output.
            listed: whether callers see it in `infos`; if not, it has to be given to `drop`.

        Raises:
            SpawnFailed: it did not start.
        """
        if size is None:
            running = self._start_on_pipes(command, launch, folder, stdin, merge)
        else:
            running = self._start_on_terminal(command, launch, folder, size)
        child = running.child
        if listed:
            self._running[child.id] = running
            child.over.add_done_callback(lambda _: self._settle(running))
        else:
            self._hidden.add(running)
        return running

    def _start_on_pipes(
        self, command: str | list[str], launch: Launch, folder: Folder, stdin: bool, merge: bool
    ) -> Running:
        ours: list[int] = []
        theirs: list[int] = []
        try:
            if stdin:
                _pair(theirs, ours, *os.pipe())
            source = theirs[0] if stdin else subprocess.DEVNULL
            outputs = []
            for _ in range(1 if merge else 2):
                _pair(ours, theirs, *os.pipe())
                outputs.append(theirs[-1])
            child = self._children.spawn(launch, folder, stdin=source, stdout=outputs[0], stderr=outputs[-1])
        except BaseException:
            _close(ours)
            raise
        finally:
            _close(theirs)
        running = Running(command, child, None)
        if stdin:
            running.feed_from(ours.pop(0))
        running.listen("stdout", ours[0], self._spool(child, "out"))
        if not merge:
            running.listen("stderr", ours[1], self._spool(child, "err"))
        return running

    def _start_on_terminal(
        self, command: str | list[str], launch: Launch, folder: Folder, size: tuple[int, int]
    ) -> Running:
        terminal = open_terminal(*size)
        none = subprocess.DEVNULL
        environment = {"TERM": "xterm-256color", **launch.environment}
        launch = replace(launch, environment=environment, terminal=terminal.name)
        try:
            child = self._children.spawn(launch, folder, stdin=none, stdout=none, stderr=none)
            second = os.dup(terminal.master)
        except BaseException:
            terminal.close_slave()
            os.close(terminal.master)
            raise
        running = Running(command, child, terminal)
        running.feed_from(second)
        running.listen("stdout", terminal.master, self._spool(child, "out"))
        return running

    def _spool(self, child: Child, kind: str) -> Spool:
        path = os.path.join(self._spool_folder, f"{child.id}.{kind}")
        return Spool(path, on_written=partial(self._wrote, child.id))

    def _wrote(self, process_id: str, size: int) -> None:
        if process_id in self._ended:
            self._ended_on_disk += size

    def find(self, process_id: str) -> Running:
        """Return a process.

        Raises:
            ProcessNotFound: there is none of this id, or it ended long ago.
        """
        running = self._running.get(process_id)
        if running is None:
            raise ProcessNotFound(f"no such process: {process_id:.80}", process=process_id[:80])
        return running

    def infos(self) -> list[ProcessInfo]:
        """Describe all, oldest first."""
        return [running.info() for running in self._running.values()]

    def _settle(self, running: Running) -> None:
        for name, spool in running.spools.items():
            if spool.wrapped and not running.intakes[name].open:
                self.hold(spool.settle(final=True))
        self._ended[running.child.id] = running
        self._ended_on_disk += running.on_disk
        self._forget_old()

    def _forget_old(self) -> None:
        for process_id, oldest in tuple(self._ended.items()):
            too_much = self._ended_on_disk > self._kept_bytes and len(self._ended) > 1
            if len(self._ended) <= ENDED_KEPT and not too_much:
                return
            if not oldest.readers:
                self._ended_on_disk -= oldest.on_disk
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

    def hold(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
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


def _pair(readers: list[int], writers: list[int], reader: int, writer: int) -> None:
    readers.append(reader)
    writers.append(writer)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
