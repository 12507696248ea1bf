"""The same names, blocking: every method is one call into one event loop in one daemon thread.

The loop is shared by everything in this module, starts with the first use and ends after the last
`close` (or `with` block). Callbacks run in the caller's own thread, while it waits in a method of
this module; so they may block, print, or touch a GUI without locks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any, Literal, Self

from agent_sdk import api
from agent_sdk import workspace as contract
from agent_sdk.conversation import Accepted, Callback, Cursor, OnDelta, OnReset, Outcome, Snapshot, Stats
from agent_sdk.definition import LLM, Agent
from agent_sdk.local.workspace import LocalWorkspace as AsyncLocalWorkspace
from agent_sdk.portal import Caller
from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.protocol.events import Event
from agent_sdk.protocol.methods import SnapshotTaken
from agent_sdk.protocol.specs import ConfirmationPolicy, Model, Sandbox
from agent_sdk.remote.connection import HEARTBEAT_SECONDS
from agent_sdk.remote.reconnecting import OnConnection
from agent_sdk.remote.workspace import RemoteWorkspace as AsyncRemoteWorkspace
from agent_sdk.tools import tool
from agent_sdk.workspace import (
    ExecResult,
    Exit,
    FileInfo,
    GitChange,
    OnOutput,
    OutputName,
    ProcessInfo,
    ShellResult,
    Transferred,
    WorkspaceInfo,
)

__all__ = ["LLM", "Agent", "Conversation", "LocalWorkspace", "RemoteWorkspace", "Sandbox", "tool"]


class Process:
    """Blocking twin of workspace.Process."""

    def __init__(self, caller: Caller, process: contract.Process) -> None:
        self._caller = caller
        self._async = process

    @property
    def id(self) -> str:
        """Unique in its workspace."""
        return self._async.id

    def write(self, data: bytes) -> None:
        """See workspace.Process.write."""
        self._caller.call(lambda: self._async.write(data))

    def close_stdin(self) -> None:
        """See workspace.Process.close_stdin."""
        self._caller.call(self._async.close_stdin)

    def output(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> Iterator[bytes]:
        """See workspace.Process.output."""
        return self._caller.iterate(lambda: self._async.output(since, stream=stream, follow=follow))

    def chunks(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> Iterator[tuple[int, bytes]]:
        """See workspace.Process.chunks."""
        return self._caller.iterate(lambda: self._async.chunks(since, stream=stream, follow=follow))

    def signal(self, name: str) -> None:
        """See workspace.Process.signal."""
        self._caller.call(lambda: self._async.signal(name))

    def resize(self, *, rows: int, cols: int) -> None:
        """See workspace.Process.resize."""
        self._caller.call(lambda: self._async.resize(rows=rows, cols=cols))

    def wait(self, timeout: float | None = None) -> Exit:
        """See workspace.Process.wait."""
        return self._caller.call(lambda: self._async.wait(timeout))


class Shell:
    """Blocking twin of workspace.Shell."""

    def __init__(self, caller: Caller, shell: contract.Shell) -> None:
        self._caller = caller
        self._async = shell

    def run(
        self,
        command: str,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        op_id: str | None = None,
    ) -> ShellResult:
        """See workspace.Shell.run."""
        return self._caller.call(lambda: self._async.run(command, timeout=timeout, quiet=quiet, op_id=op_id))

    def send(
        self,
        data: bytes,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        op_id: str | None = None,
    ) -> ShellResult:
        """See workspace.Shell.send."""
        return self._caller.call(lambda: self._async.send(data, timeout=timeout, quiet=quiet, op_id=op_id))

    def reset(self, *, op_id: str | None = None) -> None:
        """See workspace.Shell.reset."""
        self._caller.call(lambda: self._async.reset(op_id=op_id))


class Files:
    """Blocking twin of workspace.Files."""

    def __init__(self, caller: Caller, files: contract.Files) -> None:
        self._caller = caller
        self._async = files

    def read(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """See workspace.Files.read."""
        return self._caller.call(lambda: self._async.read(path, offset=offset, limit=limit))

    def write(self, path: str, data: bytes, *, mode: int | None = None) -> Transferred:
        """See workspace.Files.write."""
        return self._caller.call(lambda: self._async.write(path, data, mode=mode))

    def list(self, path: str = ".", *, depth: int = 1, hidden: bool = True) -> list[FileInfo]:
        """See workspace.Files.list."""
        return self._caller.call(lambda: self._async.list(path, depth=depth, hidden=hidden))

    def stat(self, path: str) -> FileInfo:
        """See workspace.Files.stat."""
        return self._caller.call(lambda: self._async.stat(path))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """See workspace.Files.remove."""
        self._caller.call(lambda: self._async.remove(path, recursive=recursive))

    def move(self, source: str, target: str) -> None:
        """See workspace.Files.move."""
        self._caller.call(lambda: self._async.move(source, target))

    def mkdir(self, path: str) -> None:
        """See workspace.Files.mkdir."""
        self._caller.call(lambda: self._async.mkdir(path))


class Git:
    """Blocking twin of workspace.Git."""

    def __init__(self, caller: Caller, git: contract.Git) -> None:
        self._caller = caller
        self._async = git

    def changes(self, path: str = ".", *, base: str | None = None) -> list[GitChange]:
        """See workspace.Git.changes."""
        return self._caller.call(lambda: self._async.changes(path, base=base))

    def diff(self, path: str = ".", *, base: str | None = None) -> str:
        """See workspace.Git.diff."""
        return self._caller.call(lambda: self._async.diff(path, base=base))


class Workspace:
    """Blocking twin of any workspace: `with` it, then use it."""

    def __init__(self, workspace: contract.Workspace) -> None:
        self.asynchronous = workspace
        """The async workspace behind this one."""
        self._caller = Caller()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._caller.open()
        self._stack.callback(self._caller.close)
        try:
            self._caller.call(self.asynchronous.__aenter__)
        except BaseException:
            self._stack.close()
            raise
        self._stack.callback(lambda: self._caller.call(lambda: self.asynchronous.__aexit__(None, None, None)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def on_close(self, close: Callable[[], None]) -> None:
        """Call this before the workspace closes."""
        self._stack.callback(close)

    @property
    def files(self) -> Files:
        """Files and folders."""
        return Files(self._caller, self.asynchronous.files)

    @property
    def git(self) -> Git:
        """The git repository."""
        return Git(self._caller, self.asynchronous.git)

    def describe(self) -> WorkspaceInfo:
        """See workspace.Workspace.describe."""
        return self._caller.call(self.asynchronous.describe)

    def execute(
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
        """See workspace.Workspace.execute."""
        return self._caller.call(
            lambda: self.asynchronous.execute(
                command,
                cwd=cwd,
                env=env,
                stdin=stdin,
                timeout=timeout,
                yield_after=yield_after,
                on_output=on_output and partial(self._caller.post, on_output),
            )
        )

    def start(
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
        """See workspace.Workspace.start."""
        started = self._caller.call(
            lambda: self.asynchronous.start(
                command, cwd=cwd, env=env, pty=pty, rows=rows, cols=cols, timeout=timeout
            )
        )
        return Process(self._caller, started)

    def processes(self) -> list[ProcessInfo]:
        """See workspace.Workspace.processes."""
        return self._caller.call(self.asynchronous.processes)

    def process(self, process_id: str) -> Process:
        """See workspace.Workspace.process."""
        return Process(self._caller, self.asynchronous.process(process_id))

    def shell(self, name: str = "default") -> Shell:
        """See workspace.Workspace.shell."""
        return Shell(self._caller, self.asynchronous.shell(name))

    def upload(self, source: str | PathLike[str], target: str) -> Transferred:
        """See workspace.Workspace.upload."""
        return self._caller.call(lambda: self.asynchronous.upload(source, target))

    def download(self, source: str, target: str | PathLike[str]) -> Transferred:
        """See workspace.Workspace.download."""
        return self._caller.call(lambda: self.asynchronous.download(source, target))

    # The three names other agent SDKs use, in the blocking API only.

    def execute_command(
        self, command: str | list[str], *, cwd: str | None = None, timeout: float | None = None
    ) -> ExecResult:
        """Alias of execute."""
        return self.execute(command, cwd=cwd, timeout=timeout)

    def file_upload(self, source: str | PathLike[str], target: str) -> Transferred:
        """Alias of upload."""
        return self.upload(source, target)

    def file_download(self, source: str, target: str | PathLike[str]) -> Transferred:
        """Alias of download."""
        return self.download(source, target)


class LocalWorkspace(Workspace):
    """Blocking twin of LocalWorkspace."""

    def __init__(
        self, dir: str | PathLike[str] = ".", *, working_dir: str | None = None, confined: bool = True
    ) -> None:
        super().__init__(AsyncLocalWorkspace(dir, working_dir=working_dir, confined=confined))


class RemoteWorkspace(Workspace):
    """Blocking twin of RemoteWorkspace."""

    asynchronous: AsyncRemoteWorkspace

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        sandbox: Sandbox | None = None,
        working_dir: str | None = None,
        conversation: str | None = None,
        connect_timeout: float | None = 5.0,
        reconnect_timeout: float | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        on_connection: OnConnection | None = None,
    ) -> None:
        super().__init__(
            AsyncRemoteWorkspace(
                url,
                api_key,
                sandbox=sandbox,
                working_dir=working_dir,
                conversation=conversation,
                connect_timeout=connect_timeout,
                reconnect_timeout=reconnect_timeout,
                heartbeat=heartbeat,
                on_connection=on_connection and partial(self._pass_on, on_connection),
            )
        )

    def pause(self) -> None:
        """See remote.workspace.RemoteWorkspace.pause."""
        self._caller.call(self.asynchronous.pause)

    def resume(self) -> None:
        """See remote.workspace.RemoteWorkspace.resume."""
        self._caller.call(self.asynchronous.resume)

    def snapshot(self) -> SnapshotTaken:
        """See remote.workspace.RemoteWorkspace.snapshot."""
        return self._caller.call(self.asynchronous.snapshot)

    def _pass_on(self, told: OnConnection, reason: AgentServerError | None) -> None:
        self._caller.post(told, reason)


class Conversation:
    """Blocking twin of Conversation; callbacks run in the caller's thread."""

    def __init__(
        self,
        agent: Agent | None,
        workspace: Workspace | str | PathLike[str] = ".",
        *,
        id: str | None = None,
        since: Cursor | int | None = None,
        callbacks: Sequence[Callback] = (),
        on_delta: OnDelta | None = None,
        on_reset: OnReset | None = None,
        persistence_dir: str | PathLike[str] | None = None,
        max_iterations: int = 500,
        confirmation: ConfirmationPolicy | None = None,
        secrets: dict[str, str] | None = None,
        title: str | None = None,
        tags: dict[str, str] | None = None,
        agent_runs: Literal["here"] | None = None,
    ) -> None:
        """See agent_sdk.api.Conversation."""
        self._caller = Caller()
        self._cursor: Cursor | None = None
        if isinstance(workspace, Workspace):
            workspace.on_close(self._caller.close)
        self._async = api.Conversation(
            agent,
            workspace.asynchronous if isinstance(workspace, Workspace) else workspace,
            id=id,
            since=since,
            callbacks=[partial(self._pass_on, told) for told in callbacks],
            on_delta=on_delta and partial(self._caller.post, on_delta),
            on_reset=on_reset and partial(self._pass_on, on_reset),
            persistence_dir=persistence_dir,
            max_iterations=max_iterations,
            confirmation=confirmation,
            secrets=secrets,
            title=title,
            tags=tags,
            agent_runs=agent_runs,
        )

    def __enter__(self) -> Self:
        self._caller.call(self._async.__aenter__)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """See conversation.Conversation.id."""
        return self._async.id

    @property
    def cursor(self) -> Cursor:
        """See conversation.Conversation.cursor."""
        return self._cursor or self._async.cursor

    def _pass_on(self, told: Callable[[Any], object], item: Event | Cursor) -> None:
        # It runs later, in the caller's thread, when the loop may be further on.
        self._caller.post(self._tell, told, item, self._async.cursor)

    def _tell(self, told: Callable[[Any], object], item: Event | Cursor, cursor: Cursor) -> None:
        self._cursor = cursor
        told(item)

    def send_message(self, text: str, *, mode: Literal["enqueue", "interrupt"] = "enqueue") -> Accepted:
        """See conversation.Conversation.send_message."""
        return self._caller.call(lambda: self._async.send_message(text, mode=mode))

    def run(self, timeout: float | None = None) -> Outcome:
        """See conversation.Conversation.run."""
        return self._caller.call(lambda: self._async.run(timeout))

    def pause(self) -> None:
        """See conversation.Conversation.pause."""
        self._caller.call(self._async.pause)

    def interrupt(self, reason: str = "") -> None:
        """See conversation.Conversation.interrupt."""
        self._caller.call(lambda: self._async.interrupt(reason))

    def respond(self, request_id: str, answer: Literal["approve", "reject"], *, reason: str = "") -> None:
        """See conversation.Conversation.respond."""
        self._caller.call(lambda: self._async.respond(request_id, answer, reason=reason))

    def events(self, since: Cursor | int = 0, follow: bool = False) -> Iterator[Event]:
        """See conversation.Conversation.events."""
        return self._caller.iterate(lambda: self._async.events(since, follow))

    def state(self) -> Snapshot:
        """See conversation.Conversation.state."""
        return self._caller.call(self._async.state)

    def stats(self) -> Stats:
        """See conversation.Conversation.stats."""
        return self._caller.call(self._async.stats)

    def update_secrets(self, secrets: dict[str, str]) -> None:
        """See conversation.Conversation.update_secrets."""
        self._caller.call(lambda: self._async.update_secrets(secrets))

    def set_confirmation_policy(self, policy: ConfirmationPolicy) -> None:
        """See conversation.Conversation.set_confirmation_policy."""
        self._caller.call(lambda: self._async.set_confirmation_policy(policy))

    def switch_llm(self, llm: Model) -> None:
        """See conversation.Conversation.switch_llm."""
        self._caller.call(lambda: self._async.switch_llm(llm))

    def set_title(self, title: str | None = None, *, tags: dict[str, str] | None = None) -> None:
        """See conversation.Conversation.set_title."""
        self._caller.call(lambda: self._async.set_title(title, tags=tags))

    def close(self) -> None:
        """See conversation.Conversation.close."""
        self._caller.call(self._async.close)
        self._caller.close()

    def delete(self) -> None:
        """See conversation.Conversation.delete."""
        self._caller.call(self._async.delete)
        self._caller.close()
