"""An agent server as a process of this machine: what stands behind the Runtime API where there is no engine.

It has a folder of its own: `data` is the server's, `process.json` says which process it is, `server.log` is
its standard error. Its name stands in its environment, so it is found even when nobody came to write down
its number. It listens on the loopback, on a port that the kernel chooses.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

import agent_sdk
from agent_sdk.protocol.errors import WorkspaceUnavailable
from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.process_tree import Tree, end_tree
from workspaces.backend.child import Child, first_line
from workspaces.backend.records import Identity, last_lines, read_record, write_record
from workspaces.box.process import BoxProcess

MARKER = "AGENT_RUNTIME"
RECORD = "process.json"
LOG = "server.log"
END_SECONDS = 15.0
"""Longer than a server may take that is told to drain for 5 s."""
LONGEST_LINE = 64 << 10


class Record(Struct, frozen=True):
    """Where a server is that was ready."""

    identity: Identity
    url: str


class _Ready(Struct):
    url: str


class ServerProcess:
    """One server. `start` starts it or finds the one that runs; it goes on when it is let go of."""

    def __init__(
        self, folder: Path, *, name: str, api_key: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Describe it.

        Args:
            folder: its own; it must exist.
            name: unique on this machine.
            api_key: what its clients need.
            environment: what it knows of the environment besides, its options included.
        """
        self.url = ""
        """Where it listens, once it was started."""
        self._folder = folder
        self._name = name
        self._environment = {**(environment or {}), "AGENT_SERVER_API_KEY": api_key, MARKER: name}
        self._child: Child | None = None

    def __repr__(self) -> str:
        return f"<ServerProcess {self._name} {self.url or 'not started'}>"

    async def start(self, timeout: float = 60.0) -> None:
        """Find the server that runs here, or start one; returns when it accepts connections.

        Whatever raises, or a cancel, leaves none that runs.

        Args:
            timeout: seconds.

        Raises:
            WorkspaceUnavailable: it did not start, or not in time; the sentence has its last words.
        """
        if self._child is not None and not self._child.ended.done():
            return
        try:
            self._child = await self._find()
            if self._child is None:
                await self._end_strays()  # its boxes go on: the next server finds them
                async with asyncio.timeout(timeout):
                    self._child = await self._start()
        except TimeoutError:
            await self.stop()
            raise WorkspaceUnavailable(
                f"the server was not ready after {timeout:g} s: {await in_thread(self.last_words)}",
                phase="ready",
            ) from None
        except BaseException:
            await self.stop()
            raise

    async def died(self) -> int | None:
        """Wait for its end; returns its exit code (negative for a signal), None when nobody knows it."""
        assert self._child is not None, "it was not started"
        return await asyncio.shield(self._child.ended)

    async def stop(self) -> None:
        """End it with its boxes and all that runs in them; what it has written stays. Cancelling does not stop that."""
        await asyncio.shield(asyncio.ensure_future(self._stop()))

    def let_go(self) -> None:
        """Leave it to itself: it can be found again."""
        if self._child is not None:
            self._child.let_go()
            self._child = None

    def last_words(self) -> str:
        """Return the end of its log. Blocks for some system calls."""
        return "\n".join(last_lines(self._folder / LOG))

    # --- its start ---

    async def _find(self) -> Child | None:
        record = await in_thread(read_record, self._folder / RECORD, Record)
        child = Child.find(record.identity) if record else None
        self.url = record.url if record and child else ""
        return child

    async def _start(self) -> Child:
        reading, writing = os.pipe()
        try:
            child = self._spawn(writing)
        except OSError as exc:
            os.close(reading)
            raise WorkspaceUnavailable(f"the server did not start: {exc.strerror}", phase="start") from None
        finally:
            os.close(writing)
        self._child = child
        line = await first_line(reading, LONGEST_LINE)
        try:
            self.url = msgspec.json.decode(line, type=_Ready).url
        except msgspec.DecodeError:
            code = await asyncio.shield(child.ended) if not line else None
            words = " | ".join((await in_thread(self.last_words)).splitlines())
            raise WorkspaceUnavailable(
                f"the server ended at its start with {code}: {words or 'it said nothing'}", phase="start"
            ) from None
        await in_thread(write_record, self._folder / RECORD, Record(child.identity, self.url))
        return child

    def _spawn(self, stdout: int) -> Child:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        log = os.open(self._folder / LOG, flags, 0o600)
        data = str(self._folder / "data")
        command = [sys.executable, "-m", "agent_server", "serve", "--json", "--host", "127.0.0.1"]
        try:
            return Child.start(
                [*command, "--port", "0", "--data", data],
                # Beside the package, so that `-m` finds it however it was installed.
                cwd=Path(agent_sdk.__file__).parent.parent,
                environment=self._environment,
                stdout=stdout,
                stderr=log,
            )
        finally:
            os.close(log)

    # --- its end ---

    async def _stop(self) -> None:
        if self._child is not None and not self._child.ended.done():
            self._child.signal(signal.SIGTERM)
            await asyncio.wait([self._child.ended], timeout=END_SECONDS)
        await self._end_strays()
        if self._child is not None:
            await self._child.ended
        await self._end_boxes()
        (self._folder / RECORD).unlink(missing_ok=True)

    async def _end_strays(self) -> None:
        """End a server whose number nobody came to write down."""
        await end_tree(Tree(f"{MARKER}={self._name}\0".encode()), grace=0)

    async def _end_boxes(self) -> None:
        """End what a server leaves that was killed."""
        boxes = self._folder / "data" / "boxes"
        for folder in await in_thread(_folders, boxes):
            box = await BoxProcess.find(folder, self._folder / "data" / "output" / folder.name)
            if box is not None:
                await box.end()


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
