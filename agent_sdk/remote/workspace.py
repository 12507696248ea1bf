"""A Workspace there: the contract as calls and byte streams over a link."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar

from msgspec.structs import replace

from agent_sdk.ids import new_id, op_id_or_new
from agent_sdk.protocol.checks import Heartbeat, Name, Path, Patience, check_input, checked
from agent_sdk.protocol.errors import (
    AgentServerError,
    ChangedDuringRead,
    ConnectionLost,
    ConversationNotFound,
    InvalidParams,
    OutcomeUnknown,
)
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.protocol.methods.method import Method
from agent_sdk.protocol.methods.workspace import (
    Describe,
    Download,
    Execute,
    PauseWorkspace,
    ProcessList,
    ProcessStart,
    ResumeWorkspace,
    SnapshotTaken,
    SnapshotWorkspace,
    Upload,
)
from agent_sdk.protocol.specs import Sandbox, WorkspaceSpec
from agent_sdk.remote.connection import HEARTBEAT_SECONDS, checked_address, checked_key, checked_trust
from agent_sdk.remote.files import Once, RemoteFiles, RemoteGit, Source, incoming, outgoing
from agent_sdk.remote.link import Link, ask, asking, persistent
from agent_sdk.remote.process import Command, RemoteProcess, RemoteShell
from agent_sdk.remote.reconnecting import OnConnection, ServerLink, Target
from agent_sdk.remote.streams import NO_CHANNEL
from agent_sdk.workspace.atomic_file import atomic_file
from agent_sdk.workspace.contract import (
    ExecResult,
    FileStream,
    OnOutput,
    Process,
    Transferred,
    Workspace,
)
from agent_sdk.workspace.disk import LocalPath, OnProgress, Progress, open_source
from agent_sdk.workspace.folders import packed, unpacked
from agent_sdk.workspace.verbs import milliseconds

if TYPE_CHECKING:
    from ssl import SSLContext  # what is wrong with another value `checked_trust` says better

T = TypeVar("T")
Closing = Callable[[], Awaitable[None]]


class RemoteWorkspace(Workspace):
    """A workspace on an agent server, or behind any link to something that serves one.

    Entering connects: the server makes a workspace and a conversation for it. One connection serves
    both; the first Conversation on the workspace shares it. A connection that is lost is made again,
    and calls under way go on over the next one: nothing runs twice, output comes once. Leaving closes it.
    """

    @checked
    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        ssl: SSLContext | None = None,
        sandbox: Sandbox | None = None,
        working_dir: Path | None = None,
        conversation: Name | None = None,
        connect_timeout: Patience | None = 5.0,
        reconnect_timeout: Patience | None = None,
        heartbeat: Heartbeat = HEARTBEAT_SECONDS,
        on_connection: OnConnection | None = None,
    ) -> None:
        """Describe the workspace; `async with` connects.

        Args:
            url: `http://host:port`, `https://…`, or `unix:///path` of a box.
            api_key: the server's key; spaces and line ends around it do not count.
            ssl: the authorities whose certificates are trusted, and a certificate of the client where the server
                asks for one; None: those that this machine trusts, or that SSL_CERT_FILE names. Verification cannot
                be turned off.
            sandbox: run the commands in a container the server manages.
            working_dir: an existing folder of the server's machine; None: a fresh one.
            conversation: id of an existing conversation, whose workspace this is then; None: a new one.
            connect_timeout: seconds for which entering tries again while no server answers or the server is busy;
                None: for ever. A try under way may take 30 s more. A wrong key fails at once.
            reconnect_timeout: seconds for which a lost connection is tried again; after them all calls that wait
                fail. None: for ever.
            heartbeat: seconds of silence after which the server is asked whether it is alive.
            on_connection: called with the reason when the connection is lost or cannot be made at once, and with
                None when there is a connection again.

        Raises:
            InvalidParams: an argument is not acceptable; or `sandbox` or `working_dir` is given for an existing
                conversation, which has its workspace already.
        """
        if conversation is not None and (sandbox is not None or working_dir is not None):
            raise InvalidParams(
                "conversation: it has its workspace already; leave out sandbox and working_dir"
            )
        spec = WorkspaceSpec(sandbox=sandbox, working_dir=working_dir)
        self._target = Target(
            url=checked_address(url),
            api_key=checked_key(api_key),
            ssl=checked_trust(ssl),
            conversation=conversation or new_id(),
            workspace=spec if conversation is None else None,
            connect_timeout=connect_timeout,
            reconnect_timeout=reconnect_timeout,
            heartbeat=heartbeat,
            on_connection=on_connection,
        )
        self._stack = AsyncExitStack()
        self._link: Link | None = None
        self._used = False
        self.joining = asyncio.Lock()
        """Held by the conversation that is about to take it over or to share it."""
        self._closing = AsyncExitStack()

    @classmethod
    def over(cls, link: Link) -> Self:
        """Return the workspace that is served at the other end of this link, which stays the caller's."""
        workspace = cls("unix:///")
        workspace._target = replace(workspace._target, url="")
        workspace._link = link
        return workspace

    def __repr__(self) -> str:
        where = self._target.url or "over a link"
        return f"<RemoteWorkspace {where} {'open' if self._link else 'not open'}>"

    async def __aenter__(self) -> Self:
        if self._link is None:
            self._link = await self._stack.enter_async_context(ServerLink(self._target))
            self._stack.callback(self._forget)
        return self

    async def __aexit__(self, *exc: object) -> None:
        async with self._stack:  # also where a conversation cannot close properly
            await self._closing.pop_all().aclose()

    def on_close(self, close: Closing) -> None:
        """Call this before the connection closes; conversations let go of their connections with it."""
        self._closing.push_async_callback(close)

    def _forget(self) -> None:
        self._link = None

    @property
    def target(self) -> Target:
        """Where it is; for conversations that need a connection of their own."""
        return self._target

    @property
    def conversation(self) -> str | None:
        """Id of the conversation that was made with it, or whose workspace it is; None where there is none."""
        return self._target.conversation if isinstance(self._link, ServerLink) else None

    @property
    def attached(self) -> bool:
        """Whether it is the workspace of a conversation that existed before."""
        return self._target.workspace is None

    @property
    def link(self) -> Link:
        """The way to the other end.

        Raises:
            ConnectionLost: the workspace is not entered.
        """
        self._used = True
        return self._link or self.untouched_link

    @property
    def untouched_link(self) -> Link:
        """The same, for who does not use the files or the processes."""
        if self._link is None:
            raise ConnectionLost("the workspace is not open; enter it with `async with`")
        return self._link

    async def become(self, conversation: str, *, make: bool) -> ServerLink | None:
        """Be the workspace of this conversation from now on, if nobody has used the present one; None: somebody has.

        What was made by entering is removed again.

        Args:
            conversation: its id.
            make: whether it is made where there is none of the id.

        Raises:
            ConversationNotFound: there is none.
            OpMismatch: it has another workspace than the options of this one say.
        """
        before, spec = self._link, self._target.workspace
        if self._used or spec is None or not isinstance(before, ServerLink) or before.was_attached:
            return None
        made = replace(self._target, conversation=conversation)
        existing = replace(made, workspace=None)
        link = ServerLink(made if make and spec != WorkspaceSpec() else existing)
        try:
            await self._stack.enter_async_context(link)
        except ConversationNotFound:
            if not make:
                raise
            link = await self._stack.enter_async_context(ServerLink(made))
        self._link, self._target = link, existing
        with suppress(AgentServerError):
            await ask(before, Delete(op_id=new_id()))
        await before.close()
        return link

    @property
    def files(self) -> RemoteFiles:
        """Files and folders."""
        return RemoteFiles.of(self.link)

    @property
    def git(self) -> RemoteGit:
        """The git repository."""
        return RemoteGit.of(self.link)

    async def _ask(self, call: Method[T]) -> T:
        return await ask(self.link, call)

    describe = asking(Workspace.describe, Describe)
    processes = asking(Workspace.processes, ProcessList)

    async def pause(self) -> None:
        """Freeze the container of the workspace with all that runs in it; its next use wakes it.

        Raises:
            IsolationUnavailable: it is no sandbox.
        """
        await self._ask(PauseWorkspace(op_id=new_id()))

    async def resume(self) -> None:
        """Let a frozen container go on; nothing happens to one that runs."""
        await self._ask(ResumeWorkspace(op_id=new_id()))

    async def snapshot(self) -> SnapshotTaken:
        """Copy the files as they are now; nothing in the workspace runs meanwhile.

        Returns its id, with which a new workspace may begin: `Sandbox(image=…, snapshot=id)`.

        Raises:
            IsolationUnavailable: it is no sandbox, or the server cannot.
            StorageFull: there is no room for a copy.
        """
        return await self._ask(SnapshotWorkspace(op_id=new_id()))

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
        merge: bool = False,
        op_id: str | None = None,
        user: str | None = None,
    ) -> ExecResult:
        """Run a command and wait for its end; the arguments are those of Workspace.execute.

        Cancelling waits until the other end has ended the process tree; while there is no connection it
        returns at once, and the command goes on. Where the place was lost the status is `unknown`.
        """
        call = Execute(
            op_id=op_id_or_new(op_id),
            **_command(command),
            cwd=cwd,
            env=dict(env or {}),
            timeout_ms=milliseconds("timeout", timeout),
            yield_after_ms=milliseconds("yield_after", yield_after),
            merge=merge,
            user=user,
        )
        command_there = Command(call, check_input(stdin), on_output)
        try:
            result = await persistent(link := self.link, command_there.attempt)
        except OutcomeUnknown as exc:
            return ExecResult(status="unknown", reason=str(exc))
        if result.process_id is None:
            return result
        return replace(result, process=RemoteProcess.of(link, result.process_id))

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
        op_id: str | None = None,
        user: str | None = None,
    ) -> Process:
        started = await ask(
            self.link,
            ProcessStart(
                op_id=op_id_or_new(op_id),
                **_command(command),
                cwd=cwd,
                env=dict(env or {}),
                pty=pty,
                rows=rows,
                cols=cols,
                timeout_ms=milliseconds("timeout", timeout),
                user=user,
            ),
        )
        return RemoteProcess.of(self.link, started.process_id)

    def process(self, process_id: str) -> Process:
        return RemoteProcess.of(self.link, process_id)

    def shell(self, name: str = "default") -> RemoteShell:
        return RemoteShell.of(self.link, name)

    async def upload(
        self,
        source: LocalPath,
        target: str,
        *,
        on_progress: OnProgress | None = None,
        op_id: str | None = None,
    ) -> Transferred:
        call_id = op_id_or_new(op_id)
        async with open_source(source) as opened:
            size, mode = opened.size, opened.mode

        async def content() -> AsyncGenerator[bytes, None]:
            async with open_source(source) as opened:
                if opened.size != size:
                    raise ChangedDuringRead(f"the file changed: {source}", path=str(source))
                async for data in opened:
                    yield data

        progress = Progress(on_progress, size)
        return await outgoing(self.link, _upload(call_id, target, size, mode), Source(content), progress)

    async def download(
        self, source: str, target: LocalPath, *, on_progress: OnProgress | None = None
    ) -> Transferred:
        call = Download(path=source, channel=NO_CHANNEL)
        async with atomic_file(target) as file, incoming(self.link, call) as stream:
            if on_progress is not None:
                await stream.look()
            progress = Progress(on_progress, stream.size)
            await progress.reach(0)
            async for data in stream:
                await file.write(data)
                await progress.reach(file.size)
            return await file.commit(mode=stream.mode)

    async def upload_dir(self, local: LocalPath, remote: str, *, exclude: Sequence[str] = ()) -> Transferred:
        """Copy a folder there; over another connection it goes on where it was, unless a file has changed."""
        call = Upload(op_id=new_id(), path=remote, channel=NO_CHANNEL, unpack=True)
        source = Source(lambda: packed(local, exclude))
        return await outgoing(self.link, call, source, Progress(None, 0))

    async def download_dir(
        self, local: LocalPath, remote: str, *, exclude: Sequence[str] = ()
    ) -> Transferred:
        """Copy a folder here; over another connection it goes on where it was, unless a file has changed."""
        call = Download(path=remote, channel=NO_CHANNEL, pack=True, exclude=list(exclude))
        async with incoming(self.link, call) as stream:
            return await unpacked(local, aiter(stream))

    @asynccontextmanager
    async def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[FileStream]:
        """Open a file for reading in pieces; the SHA-256 of the other end is checked at the end.

        When the connection is lost it goes on over the next one. A file that was changed meanwhile raises
        ChangedDuringRead at the end.
        """
        async with incoming(
            self.link, Download(path=path, channel=NO_CHANNEL, offset=offset, length=length)
        ) as stream:
            await stream.look()
            yield stream

    async def write_stream(
        self, path: str, chunks: AsyncIterable[bytes], *, size: int | None = None, mode: int | None = None
    ) -> Transferred:
        """Write a file from pieces; the other end checks the SHA-256.

        `chunks` is read once. When the connection is lost it goes on over the next one, as long as the other
        end has all but the last 4 MiB; else, where its box was lost, this raises ConnectionLost, and nothing
        was written.
        """
        return await outgoing(
            self.link, _upload(new_id(), path, size, mode), Once(chunks), Progress(None, size or 0)
        )


def _upload(op_id: str, path: str, size: int | None, mode: int | None) -> Upload:
    return Upload(op_id=op_id, path=path, channel=NO_CHANNEL, size=size, mode=mode)


def _command(command: str | list[str]) -> dict[str, Any]:
    if isinstance(command, str):
        return {"shell": command}
    if not isinstance(command, list | tuple):
        raise InvalidParams(f"command: expected text or a list of texts, got {type(command).__name__}")
    return {"argv": list(command)}
