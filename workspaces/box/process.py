"""A box as a process of this machine: started or found, waited for, ended or let go on without us.

It has a folder of its own: `box.sock` is where it listens, `box.json` says which process it is, `box.log`
is its standard error. Its name (`instance`) stands in its environment, which its commands inherit, and
in `box.json` before it starts. So whatever is killed at whichever moment, whoever comes next finds all of it.

One that is confined is not let into that folder: it inherits the socket, and nothing that it says or does
is believed when it is ended.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
from msgspec import Struct

import agent_sdk
from agent_sdk.box.process import RECORD, SOCKET
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import IsolationUnavailable, PathNotFound, WorkspaceUnavailable
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.rpc.unix import listen_unix
from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.process_tree import Tree, children, end_tree
from workspaces.backend.records import (
    LAST_BYTES,
    Child,
    Identity,
    boot_id,
    first_line,
    last_lines,
    read_record,
    write_record,
)
from workspaces.box.confinement import NOT_CONFINED, Confinement, Isolation
from workspaces.box.contract import Box

MARKER = "AGENT_BOX"
"""Names a box in its environment, which its commands inherit: so they are found when it could not end them."""
LOG = "box.log"
START_SECONDS = 30.0
END_SECONDS = 8.0
"""Longer than the 5 s that a box gives its commands between TERM and KILL."""
_DIED_BY = 128
"""What bwrap adds to the number of the signal that ended its process."""


class Record(Struct, frozen=True):
    """Which process a box is."""

    instance: str
    boot: str
    """Of the machine: after another one nothing of it can be left."""
    started: float
    """Seconds since the Unix epoch."""
    pid: int = 0
    """0: it was about to start."""
    token: str = ""
    """What connections have to show."""
    ticks: int = 0
    """When the process started, as the kernel counts: tells it from a later one of the same number."""
    isolation: Isolation = "none"
    user: int | None = None


class BoxProcess(Box):
    """One box. `async with` starts it, unless it was found, and ends it with everything that runs in it.

    Cancelling while it starts ends it, too.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        *,
        working_dir: Path | None = None,
        spool: Path | None = None,
        confined: bool = True,
        linger: float = 3600.0,
        environment: Mapping[str, str] | None = None,
        instance: str | None = None,
        confinement: Confinement = NOT_CONFINED,
    ) -> None:
        """Describe it.

        Args:
            root: the folder of the workspace; it must exist.
            folder: its own, made at its start and removed at its end.
            working_dir: where commands start; None: the root.
            spool: its own folder for the output of commands, removed at its end; None: a temporary place.
            confined: whether file calls are kept below the root.
            linger: seconds it goes on without any connection.
            environment: all it knows of the environment; None: a PATH and nothing else.
            instance: its name; None: a new one.
            confinement: how it is kept apart from us.
        """
        self.root = root
        self.folder = folder
        self.instance = instance or new_id()
        self._working_dir = working_dir
        self._spool = spool
        self._confined = confined
        self._linger = linger
        self._environment = {"PATH": os.defpath} if environment is None else dict(environment)
        self._confinement = confinement
        self._child: Child | None = None
        self._token = secrets.token_urlsafe(24)
        self._ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def find(
        cls, folder: Path, spool: Path | None = None, confinement: Confinement = NOT_CONFINED
    ) -> Self | None:
        """Return the box that lives in this folder. Of a dead one everything is ended and removed.

        Args:
            folder: its own.
            spool: what it was given at its start.
            confinement: what boxes have now. A box that was started with another one is ended, too.
        """
        record = read_record(folder / RECORD, Record)
        if record is None:  # nothing was started before that file was whole
            await in_thread(_remove, spool, folder, confinement)
            return None
        started = Confinement(isolation=record.isolation, user=record.user)
        box = cls(folder, folder, spool=spool, instance=record.instance, confinement=started)
        if record.boot == boot_id():
            child = None
            with suppress(WorkspaceUnavailable):  # what cannot be held is of no use, and is ended
                child = Child.find(Identity(record.boot, record.pid, record.ticks))
            if child is not None:
                box._hold(child)
                box._token = record.token
                if (started.isolation, started.user) == (confinement.isolation, confinement.user):
                    return box
                await box.end()
            await end_tree(box._tree, grace=0)
        await in_thread(_remove, spool, folder, started)
        return None

    def __repr__(self) -> str:
        return f"<BoxProcess {self.instance} {f'pid {self.pid}' if self.pid else 'not started'}>"

    @property
    def url(self) -> str:
        return f"unix://{self.folder / SOCKET}"

    @property
    def token(self) -> str:
        return self._token

    @property
    def pid(self) -> int | None:
        """The process id of the box; None before it started."""
        return self._child.pid if self._child is not None else None

    @property
    def ended(self) -> asyncio.Future[int | None]:
        return self._ended

    async def __aenter__(self) -> Self:
        if self._child is None:
            await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.end()

    async def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            PathNotFound: the root is missing.
            PathDenied: its place leads elsewhere by now.
            WorkspaceUnavailable: it did not start; the sentence has its last words.
        """
        if not self.root.is_dir():
            raise PathNotFound(f"No such file or directory: {self.root}", path=str(self.root))
        self._confinement.check_folder(self._working_dir or self.root)
        try:
            await self._start()
        except BaseException:
            self.kill()  # nothing runs in it yet that would have to be asked to end
            await self.end()
            raise

    async def end(self) -> None:
        """End it with everything that runs in it, and remove its folders. Cancelling does not stop that."""
        await asyncio.shield(asyncio.ensure_future(self._end()))

    def kill(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    def let_go(self) -> None:
        if self._child is not None:
            self._child.let_go()

    def last_words(self) -> str:
        """Return the end of what it said on standard error, as one line. Blocks for some system calls."""
        lines = (line.strip() for line in last_lines(self.folder / LOG))
        return " | ".join(line for line in lines if line)

    @property
    def cause(self) -> str:
        """`killed` by a signal, or `exit`; empty when only its starter could know."""
        code = self._ended.result() if self._ended.done() else None
        return "" if code is None else "killed" if code < 0 else "exit"

    async def freeze(self) -> None:
        """Refuse to be frozen.

        Raises:
            IsolationUnavailable: always; a process with all its children cannot be frozen safely.
        """
        raise IsolationUnavailable(
            "this workspace is a plain process and cannot be paused; ask for a sandbox", wanted="pause"
        )

    async def completed(self, info: WorkspaceInfo) -> WorkspaceInfo:
        return msgspec.structs.replace(info, isolation=self._confinement.isolation)

    # --- its start ---

    async def _start(self) -> None:
        record = Record(
            instance=self.instance,
            boot=boot_id(),
            started=time.time(),
            isolation=self._confinement.isolation,
            user=self._confinement.user,
            token=self._token,
        )
        reading, writing = os.pipe()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_record(self.folder / RECORD, record)
            child = self._spawn(writing)
            self._hold(child)
            now = child.identity
            write_record(self.folder / RECORD, msgspec.structs.replace(record, pid=now.pid, ticks=now.ticks))
        except (OSError, WorkspaceUnavailable) as exc:
            os.close(reading)
            reason = getattr(exc, "strerror", None) or exc
            raise WorkspaceUnavailable(f"the box did not start: {reason}", phase="start") from None
        finally:
            os.close(writing)
        try:
            async with asyncio.timeout(START_SECONDS):
                said = await first_line(reading, LAST_BYTES)
        except TimeoutError:
            raise WorkspaceUnavailable(
                f"the box was not ready after {START_SECONDS:.0f} s", phase="start"
            ) from None
        if said != b"ready":
            words = self.last_words() or said.decode(errors="replace") or "it said nothing"
            raise WorkspaceUnavailable(f"the box ended at its start: {words}", phase="start")

    def _spawn(self, stdout: int) -> Child:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        confined = self._confinement.isolation != "none"
        with ExitStack() as stack:
            log = os.open(self.folder / LOG, flags, 0o600)
            stack.callback(os.close, log)
            given = [stack.enter_context(_pipe_with(self._token))]
            if confined:
                given.append(stack.enter_context(listen_unix(str(self.folder / SOCKET))).fileno())
                if self._spool is not None:
                    self._confinement.give(self._spool)
            return Child.start(
                self._command(*given),
                # Beside the package, so that `-m` finds it however it was installed.
                cwd=Path(agent_sdk.__file__).parent.parent,
                environment={
                    **self._confinement.environment(self._environment, self._working_dir or self.root),
                    MARKER: self.instance,
                },
                stdout=stdout,
                stderr=log,
                inherited=given,
                umask=self._confinement.umask,
            )

    def _command(self, token: int, listening: int | None = None) -> list[str]:
        place = ["--folder", str(self.folder)] if listening is None else ["--listen", str(listening)]
        options = [*place, "--root", str(self.root), "--instance", self.instance, "--token-fd", str(token)]
        if self._working_dir is not None:
            options += ["--working-dir", str(self._working_dir)]
        if self._spool is not None:
            options += ["--spool", str(self._spool)]
        if not self._confined:
            options.append("--unconfined")
        options += ["--linger", str(self._linger)]
        return self._confinement.command(options, [place for place in (self.root, self._spool) if place])

    # --- its end ---

    def _hold(self, child: Child) -> None:
        self._child = child
        child.ended.add_done_callback(self._gone)

    def _gone(self, ended: asyncio.Future[int | None]) -> None:
        code = ended.result()
        if self._confinement.isolation == "bwrap" and code is not None and code > _DIED_BY:
            code = _DIED_BY - code
        self._ended.set_result(code)

    @property
    def _tree(self) -> Tree:
        # Its environment may be hidden; then its session leads to it.
        leaders = {} if self._child is None else {self._child.pid: self._child.ended_at}
        return Tree(f"{MARKER}={self.instance}\0".encode(), leaders, self._confinement.user)

    async def _end(self) -> None:
        """A box that crashes or does not end by itself does not end what it runs, and removes nothing: so we do."""
        child = self._child
        if child is not None and child.is_held:
            await self._ask_to_end(child)
            await asyncio.wait([child.ended], timeout=END_SECONDS)
        if (self.folder / RECORD).exists():
            await end_tree(self._tree, grace=0)
            if child is not None and child.is_held:
                await child.ended
        await in_thread(_remove, self._spool, self.folder, self._confinement)

    async def _ask_to_end(self, child: Child) -> None:
        if self._confinement.isolation == "bwrap":
            # bwrap passes no signal on: to the first process of its namespaces, and from there to the box.
            for first in await in_thread(children, child.pid):
                for box in (await in_thread(children, first))[:1]:
                    with suppress(OSError):
                        os.kill(box, signal.SIGTERM)
        else:
            child.signal(signal.SIGTERM)


@contextmanager
def _pipe_with(text: str) -> Iterator[int]:
    """The end of a pipe from which this text can be read, and nothing more."""
    reading, writing = os.pipe()
    try:
        os.write(writing, text.encode())
        os.close(writing)
        yield reading
    finally:
        os.close(reading)


def _remove(spool: Path | None, folder: Path, confinement: Confinement) -> None:
    if spool is not None:
        confinement.remove(spool)
    NOT_CONFINED.remove(folder)
