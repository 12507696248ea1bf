"""The folder of a box in a container, on this machine: the record of it, and what is mounted at /run/agent in it.

The record is beside what the container sees. Nothing in there is believed: a name may lead anywhere by the time it
is used, so the socket is opened once, is looked at, and is connected to through its descriptor.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from msgspec import Struct

from agent_sdk.box.process import RECORD, SOCKET
from agent_sdk.protocol.errors import IsolationUnavailable, WorkspaceUnavailable
from agent_sdk.protocol.specs import Sandbox
from workspaces.backend.records import read_record, write_record

READY = "ready"
READY_LINE = b"ready\n"


class Record(Struct, frozen=True, kw_only=True):
    """Which container a box is. It is written before there is one, so that none is ever unowned."""

    instance: str
    container: str
    """Its name."""
    spec: Sandbox
    image: str
    runtime: str
    token: str = ""
    """What connections have to show once it is claimed."""
    root_quota: str = ""
    """What limits a root that is writable."""
    claimed: bool = False
    """Whether it was found as it should be, and got its identity."""


class BoxFolder:
    """The folder of a box in a container, on this machine. Blocks for some system calls."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.run = place / "run"
        self.etc = place / "etc"

    def read(self) -> Record | None:
        """Return the record, if there is one of a container."""
        return read_record(self.place / RECORD, Record)

    def write(self, record: Record) -> None:
        """Keep the record; it is whole or not there, whatever happens meanwhile."""
        write_record(self.place / RECORD, record)

    def make(self) -> None:
        """Make it anew for a container that is about to start."""
        self.remove()
        self.place.mkdir(parents=True, mode=0o700)
        self.run.mkdir()
        self.run.chmod(0o777)  # for the user of the box; nobody else gets into the folder above
        os.mkfifo(self.run / READY)
        (self.run / READY).chmod(0o666)

    def lay_out(self, contents: Iterable[bytes]) -> None:
        """Write files that the container sees in the place of its image's, each under its number."""
        self.etc.mkdir(mode=0o711)
        for number, content in enumerate(contents):
            (self.etc / str(number)).write_bytes(content)
            (self.etc / str(number)).chmod(0o644)

    def seal(self, owner: int | None = None) -> None:
        """Let nothing more be made in what the container sees: its commands could fill our disk.

        Args:
            owner: whose the folder is from then on, where commands may be who it belonged to.

        Raises:
            IsolationUnavailable: this server cannot give it away.
            WorkspaceUnavailable: there is more in it than the box has made.
        """
        (self.run / READY).unlink(missing_ok=True)
        self.run.chmod(0o755)
        if owner is not None:
            try:
                os.chown(self.run, owner, owner)
            except PermissionError:
                raise IsolationUnavailable(
                    'sandbox.profile: "task" takes a server that is root, or has the capability CHOWN',
                    wanted="task",
                ) from None
        if more := set(os.listdir(self.run)) - {SOCKET}:
            raise WorkspaceUnavailable(
                f"there is something in the folder of the box's socket: {', '.join(sorted(more))[:200]}",
                phase="ready",
            )

    def remove(self) -> None:
        """Remove all of it. The record goes last: while it is there, something may be left."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.place, ignore_errors=True)

    def rename(self, to: BoxFolder) -> BoxFolder:
        """Give it to somebody else, also while a container has it mounted; returns it under its new name."""
        to.remove()
        self.place.rename(to.place)
        return to

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[asyncio.Future[bytes]]:
        """What the box says when it is ready. Enter it before the container starts."""
        loop = asyncio.get_running_loop()
        said: asyncio.Future[bytes] = loop.create_future()
        # For writing, too: so it has no end when the box closes it.
        fifo = os.open(self.run / READY, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)

        def read() -> None:
            loop.remove_reader(fifo)
            said.set_result(os.read(fifo, 64))

        loop.add_reader(fifo, read)
        try:
            yield said
        finally:
            loop.remove_reader(fifo)
            os.close(fifo)
            said.cancel()

    def open_socket(self) -> int:
        """Return a descriptor of the socket on which the box listens, good for nothing but connecting to it.

        Raises:
            WorkspaceUnavailable: there is none, or something else is in its place.
        """
        try:
            descriptor = os.open(self.run / SOCKET, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:
            raise WorkspaceUnavailable(f"the box has no socket: {exc.strerror}", phase="ready") from None
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with suppress(OSError):
                os.close(descriptor)
            raise WorkspaceUnavailable("something else is in the place of the box's socket", phase="ready")
        return descriptor
