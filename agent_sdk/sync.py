"""The same names, blocking: every method is one call into one event loop in one daemon thread.

The loop is shared by everything in this module, starts with the first use and ends after the last
`close` (or `with` block). Any number of threads may use one object. What is passed to a call
(`on_output=`) runs in the thread of that call; the callbacks of an object run one at a time and in
order, in the thread that has waited longest in one of its methods; so they may block, print, or touch
a GUI without locks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, Self

from agent_sdk import api
from agent_sdk.conversation import contract as contracts
from agent_sdk.conversation.contract import Cursor
from agent_sdk.definition import LLM, Agent, ConversationOptions
from agent_sdk.portal import Caller, Twin, blocking, constructed, ending, fact, iterating, making, part
from agent_sdk.protocol.checks import OsText, taking
from agent_sdk.protocol.events import Event
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.remote.server import AgentServer as AsyncAgentServer
from agent_sdk.remote.workspace import RemoteWorkspace as AsyncRemoteWorkspace
from agent_sdk.tools import tool
from agent_sdk.workspace import contract
from agent_sdk.workspace.local import LocalWorkspace as AsyncLocalWorkspace

__all__ = [
    "LLM",
    "Agent",
    "AgentServer",
    "Conversation",
    "LocalWorkspace",
    "RemoteWorkspace",
    "Sandbox",
    "tool",
]


class Process(Twin):
    """Blocking twin of workspace.Process."""

    id = fact(contract.Process.id)
    write = blocking(contract.Process.write)
    close_stdin = blocking(contract.Process.close_stdin)
    output = iterating(contract.Process.output)
    chunks = iterating(contract.Process.chunks)
    signal = blocking(contract.Process.signal)
    resize = blocking(contract.Process.resize)
    wait = blocking(contract.Process.wait)


class ExecResult(contract.ExecResult, frozen=True, kw_only=True):
    """Blocking twin of workspace.ExecResult: the same facts, but `whole` waits."""

    caller: Caller
    asynchronous: contract.ExecResult

    def whole(self, stream: contract.OutputName = "stdout") -> bytes:  # type: ignore[override]
        return self.caller.call(self.asynchronous.whole, stream)


def _executed(caller: Caller, result: contract.ExecResult) -> ExecResult:
    facts = {name: getattr(result, name) for name in result.__struct_fields__}
    if result.process is not None:
        facts["process"] = Process(caller, result.process)
    return ExecResult(**facts, caller=caller, asynchronous=result)


class Shell(Twin):
    """Blocking twin of workspace.Shell."""

    run = blocking(contract.Shell.run)
    send = blocking(contract.Shell.send)
    reset = blocking(contract.Shell.reset)
    close = blocking(contract.Shell.close)


class Files(Twin):
    """Blocking twin of workspace.Files."""

    read = blocking(contract.Files.read)
    write = blocking(contract.Files.write)
    list = blocking(contract.Files.list)
    stat = blocking(contract.Files.stat)
    remove = blocking(contract.Files.remove)
    move = blocking(contract.Files.move)
    mkdir = blocking(contract.Files.mkdir)


class Git(Twin):
    """Blocking twin of workspace.Git."""

    changes = blocking(contract.Git.changes)
    diff = blocking(contract.Git.diff)


class Workspace(Twin):
    """Blocking twin of any workspace: `with` it, then use it."""

    asynchronous: contract.Workspace

    def __init__(self, workspace: contract.Workspace) -> None:
        super().__init__(Caller(self.close), workspace)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._caller.open()
        self._stack.callback(self._caller.close)
        try:
            self._caller.call(self.asynchronous.__aenter__)
        except BaseException:
            self._stack.close()
            raise
        self._stack.callback(partial(self._caller.call, self.asynchronous.__aexit__, None, None, None))
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave it: everything that runs in it ends."""
        self._stack.close()

    def on_close(self, close: Callable[[], None]) -> None:
        """Call this before the workspace closes."""
        self._stack.callback(close)

    files = part(contract.Workspace.files, Files)
    git = part(contract.Workspace.git, Git)
    describe = blocking(contract.Workspace.describe)
    execute = making(contract.Workspace.execute, _executed)
    processes = blocking(contract.Workspace.processes)
    upload = blocking(contract.Workspace.upload)
    download = blocking(contract.Workspace.download)
    upload_dir = blocking(contract.Workspace.upload_dir)
    download_dir = blocking(contract.Workspace.download_dir)
    start = making(contract.Workspace.start, Process)
    process = making(contract.Workspace.process, Process)
    shell = making(contract.Workspace.shell, Shell)

    # The three names other agent SDKs use, in the blocking API only.
    execute_command = execute
    file_upload = upload
    file_download = download


class LocalWorkspace(Workspace):
    """Blocking twin of LocalWorkspace."""

    @constructed(AsyncLocalWorkspace)
    def __init__(self, workspace: AsyncLocalWorkspace) -> None:
        super().__init__(workspace)


class RemoteWorkspace(Workspace):
    """Blocking twin of RemoteWorkspace."""

    @constructed(AsyncRemoteWorkspace)
    def __init__(self, workspace: AsyncRemoteWorkspace) -> None:
        super().__init__(workspace)

    pause = blocking(AsyncRemoteWorkspace.pause)
    resume = blocking(AsyncRemoteWorkspace.resume)
    snapshot = blocking(AsyncRemoteWorkspace.snapshot)


class AgentServer(Twin):
    """Blocking twin of AgentServer."""

    @constructed(AsyncAgentServer)
    def __init__(self, server: AsyncAgentServer) -> None:
        caller = Caller(lambda: None)
        caller.close()  # nothing is kept between calls: the loop ends with each
        super().__init__(caller, server)

    def __repr__(self) -> str:
        return repr(self.asynchronous)

    conversations = blocking(AsyncAgentServer.conversations)
    delete = blocking(AsyncAgentServer.delete)


@dataclass(frozen=True, eq=False, repr=False)
class _ConversationOptions(ConversationOptions):
    workspace: Workspace | OsText | PathLike[str] = "."  # type: ignore[assignment]


class Conversation(Twin):
    """Blocking twin of Conversation; callbacks run in a thread that waits in one of its methods."""

    asynchronous: contracts.Conversation

    @taking(_ConversationOptions)
    def __init__(self, options: _ConversationOptions) -> None:
        caller, workspace, on_waiting = Caller(self.close), options.workspace, options.on_waiting
        self._cursor: Cursor | None = None
        if isinstance(workspace, Workspace):
            workspace.on_close(caller.close)
        there = {
            "workspace": workspace.asynchronous if isinstance(workspace, Workspace) else workspace,
            "callbacks": [partial(self._pass_on, told) for told in options.callbacks],
            "on_delta": options.on_delta and partial(caller.post, options.on_delta),
            "on_reset": options.on_reset and partial(self._pass_on, options.on_reset),
            "on_waiting": partial(caller.post, on_waiting) if callable(on_waiting) else on_waiting,
        }
        conversation = api.Conversation(**{**vars(options), **there})
        super().__init__(caller, conversation)

    def __enter__(self) -> Self:
        self._caller.call(self.asynchronous.__aenter__)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def cursor(self) -> Cursor:
        """The place of the event that the callbacks were given last; within a callback, of that very event."""
        return self._cursor or self.asynchronous.cursor

    def _pass_on(self, told: Callable[[Any], object], item: Event | Cursor) -> None:
        # It runs later, in the caller's thread, when the loop may be further on.
        self._caller.post(self._tell, told, item, self.asynchronous.cursor)

    def _tell(self, told: Callable[[Any], object], item: Event | Cursor, cursor: Cursor) -> object:
        self._cursor = cursor
        return told(item)

    id = fact(contracts.Conversation.id)
    send_message = blocking(contracts.Conversation.send_message)
    run = blocking(contracts.Conversation.run)
    pause = blocking(contracts.Conversation.pause)
    interrupt = blocking(contracts.Conversation.interrupt)
    respond = blocking(contracts.Conversation.respond)
    events = iterating(contracts.Conversation.events)
    state = blocking(contracts.Conversation.state)
    stats = blocking(contracts.Conversation.stats)
    update_secrets = blocking(contracts.Conversation.update_secrets)
    set_confirmation_policy = blocking(contracts.Conversation.set_confirmation_policy)
    switch_llm = blocking(contracts.Conversation.switch_llm)
    set_title = blocking(contracts.Conversation.set_title)
    close = ending(contracts.Conversation.close)
    delete = ending(contracts.Conversation.delete)
