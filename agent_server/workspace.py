"""A workspace whose box starts at its first use, and anew when it was lost or let go of.

Conversations that only talk cost no process. It is the Workspace contract around the RemoteWorkspace
that leads to the box; several conversations may share one.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from os import PathLike
from typing import Self

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
from agent_server.boxes import BoxLink


class HostedWorkspace:
    """See the module's docstring. Nothing starts before the first use."""

    def __init__(self, link: BoxLink) -> None:
        self.link = link

    def __repr__(self) -> str:
        return f"<HostedWorkspace {self.link!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    @property
    def is_running(self) -> bool:
        """Whether there is a box, or one is starting."""
        return self.link.is_running

    async def opened(self) -> RemoteWorkspace:
        """Return the way to the box, starting it when there is none."""
        return RemoteWorkspace.over(self.link)

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
