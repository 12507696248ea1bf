"""A box as a child process of this machine: started, waited for, ended. What it does inside is its own business."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import agent_sdk
from agent_sdk.local.process_tree import Tree, end_tree
from agent_sdk.protocol.errors import PathNotFound, WorkspaceUnavailable

SOCKET_BYTES = 107
"""Longest path of a Unix socket (sun_path of Linux, without its NUL)."""
MARKER = "AGENT_BOX"
"""Names a box in its environment, which its commands inherit: so they are found when it could not end them."""
START_SECONDS = 30.0
END_SECONDS = 8.0
"""Longer than the 5 s that a box gives its commands between TERM and KILL."""
LAST_WORDS = 20
LONGEST_LINE = 64 << 10

OnLine = Callable[[str], None]


class BoxProcess:
    """One box. Entering starts it and waits until it listens; leaving ends it and everything that runs in it.

    Cancelling while it starts ends it, too.
    """

    def __init__(
        self,
        root: Path,
        socket: Path,
        *,
        working_dir: Path | None = None,
        spool: Path | None = None,
        confined: bool = True,
        linger: float = 30.0,
        environment: Mapping[str, str] | None = None,
        on_line: OnLine | None = None,
    ) -> None:
        """Describe it.

        Args:
            root: the folder of the workspace; it must exist.
            socket: where it should listen; when the path is too long for a socket, it is in a private
                temporary folder instead, see `url`.
            working_dir: where commands start; None: the root.
            spool: folder below which it keeps the output of commands; None: a temporary place.
            confined: whether file calls are kept below the root.
            linger: seconds it goes on without any connection.
            environment: all it knows of the environment; None: a PATH and nothing else.
            on_line: called with each line it says on standard error.
        """
        self.root = root
        self._socket = socket
        self._working_dir = working_dir
        self._spool = spool
        self._confined = confined
        self._linger = linger
        self._mark = f"{MARKER}={secrets.token_hex(8)}"
        self._environment = {"PATH": os.defpath} if environment is None else dict(environment)
        self._environment[MARKER] = self._mark.removeprefix(f"{MARKER}=")
        self._on_line = on_line
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._folder: Path | None = None

    def __repr__(self) -> str:
        pid = self._process.pid if self._process else None
        return f"<BoxProcess of {self.root} {f'pid {pid}' if pid else 'not started'}>"

    @property
    def url(self) -> str:
        """Where it listens, as `RemoteWorkspace` takes it."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """Its process id; None before it started."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        if not self.root.is_dir():
            raise PathNotFound(f"no such folder: {self.root}", path=str(self.root))
        self._place_socket()
        try:
            await self._start()
        except BaseException:
            await asyncio.shield(self._end())
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.shield(self._end())

    async def wait_ended(self) -> int:
        """Wait until it has ended by itself or otherwise; returns its exit code, negative for a signal."""
        if self._process is None:
            raise WorkspaceUnavailable("the box was not started", phase="start")
        return await self._process.wait()

    def _place_socket(self) -> None:
        if len(os.fsencode(self._socket)) > SOCKET_BYTES:
            self._folder = Path(tempfile.mkdtemp(prefix="agent-box-"))
            self._socket = self._folder / "box.sock"
        else:
            self._socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def _start(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                # Beside the package, so that `-m` finds it however it was installed.
                cwd=Path(agent_sdk.__file__).parent.parent,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=LONGEST_LINE,
            )
        except OSError as exc:
            raise WorkspaceUnavailable(f"the box did not start: {exc.strerror}", phase="start") from None
        self._listening = asyncio.create_task(self._listen(self._process))
        try:
            async with asyncio.timeout(START_SECONDS):
                said = await self._first_line(self._process)
        except TimeoutError:
            raise WorkspaceUnavailable(
                f"the box was not ready after {START_SECONDS:.0f} s", phase="start"
            ) from None
        if said != b"ready":
            await self._end()
            words = " | ".join(self._last_words) or said.decode(errors="replace") or "it said nothing"
            raise WorkspaceUnavailable(f"the box ended at its start: {words}", phase="start")

    def _command(self) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "agent_sdk.box",
            "--socket",
            str(self._socket),
            "--root",
            str(self.root),
        ]
        if self._working_dir is not None:
            command += ["--working-dir", str(self._working_dir)]
        if self._spool is not None:
            command += ["--spool", str(self._spool)]
        if not self._confined:
            command.append("--unconfined")
        return [*command, "--linger", str(self._linger)]

    async def _first_line(self, process: asyncio.subprocess.Process) -> bytes:
        assert process.stdout is not None
        try:
            return (await process.stdout.readline()).strip()
        except ValueError:  # longer than the limit: no box of ours
            return b""

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Read what it says on standard error until it closes that."""
        assert process.stderr is not None
        rest = b""
        while data := await process.stderr.read(LONGEST_LINE):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._heard(line)
            if len(rest) > LONGEST_LINE:
                self._heard(rest)
                rest = b""
        if rest:
            self._heard(rest)

    def _heard(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last_words.append(text)
            if self._on_line is not None:
                self._on_line(text)

    async def _end(self) -> None:
        if self._process is not None:
            await self._end_process(self._process)
        if (listening := self._listening) is not None:
            self._listening = None
            # Its own session is gone with it; whoever still holds the pipe has left that session.
            await asyncio.wait([listening], timeout=1.0)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            self._socket.unlink(missing_ok=True)

    async def _end_process(self, process: asyncio.subprocess.Process) -> None:
        """End the box; a box that crashes or does not end by itself does not end what it runs, so we do."""
        _signal(process, os.kill, signal.SIGTERM)
        try:
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
        except TimeoutError:
            _signal(process, os.killpg, signal.SIGKILL)
            await process.wait()
        if process.returncode != 0:
            await end_tree(Tree(f"{self._mark}\0".encode()))


def _signal(
    process: asyncio.subprocess.Process, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    if process.returncode is None:  # after that the number may be somebody else's
        try:
            send(process.pid, number)
        except ProcessLookupError:
            return
