"""A workspace whose box starts at its first use, and anew when it was lost or let go of.

Conversations that only talk cost no process. It is the Workspace contract around the RemoteWorkspace
that leads to the box; several conversations may share one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from os import PathLike
from typing import Literal, NamedTuple, Self

from agent_sdk.protocol.errors import WorkspaceUnavailable
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.workspace import (
    ExecResult,
    Exit,
    FileInfo,
    Files,
    FileStream,
    Git,
    GitChange,
    OnOutput,
    OutputName,
    Process,
    ProcessInfo,
    Shell,
    ShellResult,
    Transferred,
    WorkspaceInfo,
)


class Place(NamedTuple):
    """A box that runs, and the way to it."""

    workspace: RemoteWorkspace
    ended: Callable[[], Awaitable[object]]
    """Returns when the box has ended by itself."""


OpenPlace = Callable[[], AbstractAsyncContextManager[Place]]
OnChange = Callable[[Literal["ready", "stopped", "lost"]], None]


class HostedWorkspace:
    """See the module's docstring. Nothing starts before the first use; `close` is for good."""

    def __init__(self, open_place: OpenPlace, on_change: OnChange) -> None:
        """Take what starts a box and ends it again, and whom to tell about it."""
        self._open_place = open_place
        self._on_change = on_change
        self._opening: asyncio.Future[RemoteWorkspace] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._let_go: asyncio.Event | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<HostedWorkspace {'running' if self.is_running else 'at rest'}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def is_running(self) -> bool:
        """Whether there is a box, or one is starting."""
        return self._opening is not None

    async def opened(self) -> RemoteWorkspace:
        """Return the way to the box, starting it when there is none. Cancelling does not stop its start.

        Raises:
            WorkspaceUnavailable: it did not start, or the workspace is closed.
        """
        while self._opening is None:
            if self._closed:
                raise WorkspaceUnavailable("the workspace is closed", phase="closed")
            former = self._keeper
            if former is not None:
                await asyncio.wait([former])  # its box is still ending
                if self._keeper is former:
                    self._keeper = None
                continue
            self._let_go = asyncio.Event()
            self._opening = asyncio.get_running_loop().create_future()
            self._keeper = asyncio.create_task(self._keep(self._opening, self._let_go))
        return await asyncio.shield(self._opening)

    async def release(self) -> None:
        """End the box with all that runs in it; the next use starts another, when this one has ended."""
        self._opening = None
        if self._let_go is not None:
            self._let_go.set()
        if self._keeper is not None:
            await asyncio.wait([self._keeper])

    async def close(self) -> None:
        """End the box; the workspace cannot be used any more."""
        self._closed = True
        await self.release()

    async def _keep(self, opening: asyncio.Future[RemoteWorkspace], let_go: asyncio.Event) -> None:
        """Own one box from its start to its end."""
        state: Literal["stopped", "lost"] = "stopped"
        try:
            async with self._open_place() as place:
                opening.set_result(place.workspace)
                self._on_change("ready")
                state = await _stay(place, let_go)
                self._opening = None
        except Exception as exc:  # noqa: BLE001  whoever waits for the box gets it, whatever it is
            if opening.done():
                state = "lost"
            else:
                opening.set_exception(exc)
                opening.exception()  # those who waited may be gone
        finally:
            self._opening = None
            self._on_change(state)

    # --- the contract ---

    @property
    def files(self) -> Files:
        """Files and folders."""
        return _Files(self.opened)

    @property
    def git(self) -> Git:
        """The git repository."""
        return _Git(self.opened)

    async def describe(self) -> WorkspaceInfo:
        """See Workspace.describe."""
        return await (await self.opened()).describe()

    async def execute(
        self,
        command: str | list[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | str | None = None,
        timeout: float | None = None,
        yield_after: float | None = None,
        on_output: OnOutput | None = None,
    ) -> ExecResult:
        """See Workspace.execute."""
        return await (await self.opened()).execute(
            command,
            cwd=cwd,
            env=env,
            stdin=stdin,
            timeout=timeout,
            yield_after=yield_after,
            on_output=on_output,
        )

    async def start(
        self,
        command: str | list[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        pty: bool = False,
        rows: int = 24,
        cols: int = 80,
        timeout: float | None = None,
    ) -> Process:
        """See Workspace.start."""
        return await (await self.opened()).start(
            command, cwd=cwd, env=env, pty=pty, rows=rows, cols=cols, timeout=timeout
        )

    async def processes(self) -> list[ProcessInfo]:
        """See Workspace.processes; without a box there are none."""
        return await (await self.opened()).processes() if self.is_running else []

    def process(self, process_id: str) -> Process:
        """See Workspace.process."""
        return _Process(self.opened, process_id)

    def shell(self, name: str = "default") -> Shell:
        """See Workspace.shell."""
        return _Shell(self.opened, name)

    async def upload(self, source: str | PathLike[str], target: str) -> Transferred:
        """See Workspace.upload."""
        return await (await self.opened()).upload(source, target)

    async def download(self, source: str, target: str | PathLike[str]) -> Transferred:
        """See Workspace.download."""
        return await (await self.opened()).download(source, target)

    @asynccontextmanager
    async def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[FileStream]:
        """See Workspace.read_stream."""
        workspace = await self.opened()
        async with workspace.read_stream(path, offset=offset, length=length) as stream:
            yield stream

    async def write_stream(
        self, path: str, chunks: AsyncIterable[bytes], *, size: int | None = None, mode: int | None = None
    ) -> Transferred:
        """See Workspace.write_stream."""
        return await (await self.opened()).write_stream(path, chunks, size=size, mode=mode)


async def _stay(place: Place, let_go: asyncio.Event) -> Literal["stopped", "lost"]:
    """Wait until the box is not wanted any more or has ended by itself; returns which."""
    wanted = asyncio.ensure_future(let_go.wait())
    ended = asyncio.ensure_future(place.ended())
    try:
        await asyncio.wait([wanted, ended], return_when=asyncio.FIRST_COMPLETED)
        return "stopped" if wanted.done() else "lost"
    finally:
        for task in (wanted, ended):
            task.cancel()
        await asyncio.gather(wanted, ended, return_exceptions=True)


_Open = Callable[[], Awaitable[RemoteWorkspace]]


class _Files:
    def __init__(self, opened: _Open) -> None:
        self._opened = opened

    async def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        return await (await self._opened()).files.read(path, offset=offset, limit=limit)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        return await (await self._opened()).files.write(path, data, mode=mode)

    async def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        return await (await self._opened()).files.list(path, depth=depth, hidden=hidden)

    async def stat(self, path: str) -> FileInfo:
        return await (await self._opened()).files.stat(path)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        await (await self._opened()).files.remove(path, recursive=recursive)

    async def move(self, source: str, target: str) -> None:
        await (await self._opened()).files.move(source, target)

    async def mkdir(self, path: str) -> None:
        await (await self._opened()).files.mkdir(path)


class _Git:
    def __init__(self, opened: _Open) -> None:
        self._opened = opened

    async def changes(self, path: str = ".", *, base: str | None = None) -> list[GitChange]:
        return await (await self._opened()).git.changes(path, base=base)

    async def diff(self, path: str = ".", *, base: str | None = None) -> str:
        return await (await self._opened()).git.diff(path, base=base)


class _Process:
    def __init__(self, opened: _Open, process_id: str) -> None:
        self._opened = opened
        self._id = process_id
        self._process: Process | None = None

    @property
    def id(self) -> str:
        return self._id

    async def _there(self) -> Process:
        """The process over there: one object for all writes, because closing it is what ends its input."""
        if self._process is None:
            self._process = (await self._opened()).process(self._id)
        return self._process

    async def write(self, data: bytes) -> None:
        await (await self._there()).write(data)

    async def close_stdin(self) -> None:
        await (await self._there()).close_stdin()

    async def output(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[bytes]:
        async for data in (await self._there()).output(since, stream=stream, follow=follow):
            yield data

    async def chunks(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[tuple[int, bytes]]:
        async for chunk in (await self._there()).chunks(since, stream=stream, follow=follow):
            yield chunk

    async def signal(self, name: str) -> None:
        await (await self._there()).signal(name)

    async def resize(self, *, rows: int, cols: int) -> None:
        await (await self._there()).resize(rows=rows, cols=cols)

    async def wait(self, timeout: float | None = None) -> Exit:
        return await (await self._there()).wait(timeout)


class _Shell:
    def __init__(self, opened: _Open, name: str) -> None:
        self._opened = opened
        self._name = name

    async def run(
        self,
        command: str,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        op_id: str | None = None,
    ) -> ShellResult:
        return (
            await (await self._opened())
            .shell(self._name)
            .run(command, timeout=timeout, quiet=quiet, op_id=op_id)
        )

    async def send(
        self,
        data: bytes,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        op_id: str | None = None,
    ) -> ShellResult:
        return (
            await (await self._opened())
            .shell(self._name)
            .send(data, timeout=timeout, quiet=quiet, op_id=op_id)
        )

    async def reset(self, *, op_id: str | None = None) -> None:
        await (await self._opened()).shell(self._name).reset(op_id=op_id)
