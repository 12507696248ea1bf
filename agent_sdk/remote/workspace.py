"""A Workspace there: the contract as calls and byte streams over a Peer."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from os import PathLike
from typing import Any, Self

from msgspec import Raw

from agent_sdk.disk import atomic_file, open_source
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ConnectionLost, InvalidParams, TransferBroken
from agent_sdk.protocol.methods import (
    Describe,
    Download,
    Execute,
    Executed,
    Method,
    ProcessList,
    ProcessStart,
    Upload,
)
from agent_sdk.protocol.specs import Sandbox, WorkspaceSpec
from agent_sdk.remote.connection import Connection, connect
from agent_sdk.remote.files import RemoteFiles, RemoteGit
from agent_sdk.remote.process import RemoteProcess, RemoteShell
from agent_sdk.remote.streams import Incoming, feed, milliseconds, pump, send, together, with_output
from agent_sdk.rpc.peer import Handler, Peer
from agent_sdk.workspace import (
    ExecResult,
    FileStream,
    OnOutput,
    Output,
    Process,
    ProcessInfo,
    Shell,
    Transferred,
    WorkspaceInfo,
)

Closing = Callable[[], Awaitable[None]]


class RemoteWorkspace:
    """A workspace on an agent server, or behind any Peer that serves one.

    Entering connects: the server makes a workspace and a conversation for it. One connection serves
    both; the first Conversation on the workspace shares it. Leaving closes the connection.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        sandbox: Sandbox | None = None,
        working_dir: str | None = None,
        conversation: str | None = None,
    ) -> None:
        """Describe it; nothing is reached before `async with`.

        Args:
            url: `http://host:port`, `https://…`, or `unix:///path` of a box.
            api_key: the server's key.
            sandbox: run the commands in a container the server manages.
            working_dir: an existing folder of the server's machine; None: a fresh one.
            conversation: id of an existing conversation, whose workspace this is then; None: a new one.

        Raises:
            InvalidParams: an existing conversation has its workspace already.
        """
        if conversation is not None and (sandbox is not None or working_dir is not None):
            raise InvalidParams(
                "conversation: it has its workspace already; leave out sandbox and working_dir"
            )
        self.url = url
        self.api_key = api_key
        self._conversation = conversation or "new"
        self._spec = WorkspaceSpec(sandbox=sandbox, working_dir=working_dir)
        self._stack = AsyncExitStack()
        self._peer: Peer | None = None
        self._closing: list[Closing] = []
        self.connection: Connection | None = None
        self.handlers: dict[type[Method[Any]], Handler] = {}
        self.on_notice: Callable[[str, Raw], None] | None = None
        self.claimed = False

    @classmethod
    def over(cls, peer: Peer) -> Self:
        """Return the workspace that this Peer's other end serves; the Peer stays the caller's."""
        workspace = cls("")
        workspace._peer = peer
        return workspace

    def __repr__(self) -> str:
        return f"<RemoteWorkspace {self.url or 'over a peer'} {'open' if self._peer else 'not open'}>"

    async def __aenter__(self) -> Self:
        if self._peer is None:
            self.connection = await self._stack.enter_async_context(
                connect(
                    self.url,
                    self.api_key,
                    conversation=self._conversation,
                    workspace=self._spec,
                    handlers=self.handlers,
                    on_notice=self._noticed,
                )
            )
            self._peer = self.connection.peer
            self._stack.callback(self._forget)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for close in reversed(self._closing):
            await close()
        self._closing.clear()
        await self._stack.aclose()

    def on_close(self, close: Closing) -> None:
        """Call this before the connection closes; conversations let go of their connections with it."""
        self._closing.append(close)

    def _forget(self) -> None:
        self._peer = None

    def _noticed(self, method: str, params: Raw) -> None:
        if self.on_notice is not None:
            self.on_notice(method, params)

    @property
    def attached(self) -> bool:
        """Whether it is the workspace of a conversation that existed before."""
        return self._conversation != "new"

    @property
    def peer(self) -> Peer:
        """The open connection's Peer.

        Raises:
            ConnectionLost: the workspace is not entered.
        """
        if self._peer is None:
            raise ConnectionLost("the workspace is not open; enter it with `async with`")
        return self._peer

    @property
    def files(self) -> RemoteFiles:
        """Files and folders."""
        return RemoteFiles(self)

    @property
    def git(self) -> RemoteGit:
        """The git repository."""
        return RemoteGit(self)

    async def describe(self) -> WorkspaceInfo:
        """See Workspace.describe."""
        return await self.peer.call(Describe())

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
        """See Workspace.execute. Cancelling waits until the other end has ended the process tree."""
        peer = self.peer
        async with AsyncExitStack() as stack:
            out = await stack.enter_async_context(peer.open_reader())
            err = await stack.enter_async_context(peer.open_reader())
            given = stdin.encode() if isinstance(stdin, str) else stdin
            source = await stack.enter_async_context(feed(peer, given))
            call = Execute(
                op_id=new_id(),
                **_command(command),
                cwd=cwd,
                env=dict(env or {}),
                timeout_ms=milliseconds("timeout", timeout),
                yield_after_ms=milliseconds("yield_after", yield_after),
                stdin=source,
                stdout=out.channel,
                stderr=err.channel,
                follow=on_output is not None,
            )
            if on_output is None:
                answer, (stdout, stderr) = await with_output(
                    peer.call(call), (out, err), lambda ended: (ended.stdout_bytes, ended.stderr_bytes)
                )
            else:
                answer, said = await together(peer.call(call), pump(out, err, on_output))
                stdout = said[0].output(answer.stdout_bytes)
                stderr = said[1].output(answer.stderr_bytes)
            return _result(answer, stdout, stderr)

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
        started = await self.peer.call(
            ProcessStart(
                op_id=new_id(),
                **_command(command),
                cwd=cwd,
                env=dict(env or {}),
                pty=pty,
                rows=rows,
                cols=cols,
                timeout_ms=milliseconds("timeout", timeout),
            )
        )
        return RemoteProcess(self.peer, started.process_id)

    async def processes(self) -> list[ProcessInfo]:
        """See Workspace.processes."""
        return await self.peer.call(ProcessList())

    def process(self, process_id: str) -> Process:
        """See Workspace.process."""
        return RemoteProcess(self.peer, process_id)

    def shell(self, name: str = "default") -> Shell:
        """See Workspace.shell."""
        return RemoteShell(self.peer, name)

    async def upload(self, source: str | PathLike[str], target: str) -> Transferred:
        """See Workspace.upload."""
        async with open_source(source) as opened:
            return await self.write_stream(target, opened, size=opened.size, mode=opened.mode)

    async def download(self, source: str, target: str | PathLike[str]) -> Transferred:
        """See Workspace.download."""
        async with atomic_file(target) as file, self.read_stream(source) as stream:
            async for data in stream:
                await file.write(data)
            return await file.commit(mode=stream.mode)

    @asynccontextmanager
    async def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[FileStream]:
        """See Workspace.read_stream; the SHA-256 of the other end is checked at the end."""
        async with self.peer.open_reader() as reader:
            call = Download(path=path, channel=reader.channel, offset=offset, length=length)
            stream = Incoming(reader, self.peer.call(call))
            try:
                yield stream
            finally:
                await stream.close()

    async def write_stream(
        self, path: str, chunks: AsyncIterable[bytes], *, size: int | None = None, mode: int | None = None
    ) -> Transferred:
        """See Workspace.write_stream; the other end checks the SHA-256."""
        async with self.peer.open_writer() as writer:
            call = Upload(op_id=new_id(), path=path, channel=writer.channel, size=size, mode=mode)
            answer, digest = await together(self.peer.call(call), send(writer, chunks))
        if answer.sha256 != digest:
            raise TransferBroken("the SHA-256 of what was written differs from what was sent")
        return answer


def _command(command: str | list[str]) -> dict[str, Any]:
    return {"shell": command} if isinstance(command, str) else {"argv": list(command)}


def _result(answer: Executed, stdout: Output, stderr: Output) -> ExecResult:
    return ExecResult(
        status=answer.status,
        exit_code=answer.exit_code,
        signal=answer.signal,
        duration=answer.duration,
        process_id=answer.process_id,
        reason=answer.reason,
        out=stdout,
        err=stderr,
    )
