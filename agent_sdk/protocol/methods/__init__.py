"""Every method of the protocol: a class is the method, its fields are the params, R is the result.

Client and server, docs and golden files are all made from these classes, so they cannot drift.
Params refuse unknown fields; results tolerate them. Times in params are whole milliseconds, in
results seconds. Bytes never travel in JSON: a field `channel` (also `stdout`, `stderr`) names a byte
stream the caller opened for them, 0 means none. On a connection without byte streams (plain HTTP)
answers that have bytes carry them as `text`, UTF-8 with wrong bytes replaced.

Calls of class Effect change something: `op_id` is their identity. The same op_id with the same
params attaches to the running call or gets its stored result; with other params it is refused.

method:       what every method is
connection:   initialize, ping, cancel; the notices
workspace:    commands, processes, shells, files, git
conversation: messages, turns, events, settings; tools of the client
"""

from __future__ import annotations

from typing import Any, get_args

from agent_sdk.protocol.methods.connection import (
    CancelCall,
    CancelNotice,
    CancelOutcome,
    ClientInfo,
    DeltaNotice,
    Draining,
    EventsNotice,
    Initialize,
    Initialized,
    Ping,
    Pong,
    Resume,
    SyncReset,
)
from agent_sdk.protocol.methods.conversation import (
    Configure,
    Delete,
    EventPage,
    GetEvents,
    GetState,
    Interrupt,
    ListConversations,
    Pause,
    RegisterTools,
    Respond,
    Run,
    RunAnswer,
    SendMessage,
    SetConfirmationPolicy,
    SetTitle,
    Subscribe,
    Subscribed,
    SwitchLlm,
    ToolCall,
    ToolOutput,
    UpdateSecrets,
)
from agent_sdk.protocol.methods.method import (
    Done,
    Effect,
    Method,
    Notice,
    R,
)
from agent_sdk.protocol.methods.workspace import (
    LISTED,
    Claim,
    Count,
    Describe,
    DiffText,
    Download,
    Execute,
    Executed,
    FilesList,
    FilesMkdir,
    FilesMove,
    FilesRemove,
    FilesStat,
    GitChanges,
    GitDiff,
    LimitReached,
    PauseWorkspace,
    ProcessInput,
    ProcessList,
    ProcessOutput,
    ProcessResize,
    ProcessSignal,
    ProcessStart,
    ProcessWait,
    ResumeWorkspace,
    ShellAnswer,
    ShellReset,
    ShellRun,
    ShellSend,
    SnapshotTaken,
    SnapshotWorkspace,
    Started,
    Upload,
    UploadOffset,
)

__all__ = [
    "LISTED",
    "BOX",
    "CLIENT",
    "CONNECTION",
    "CONVERSATION",
    "CancelCall",
    "CancelNotice",
    "CancelOutcome",
    "Claim",
    "ClientInfo",
    "Configure",
    "Count",
    "Delete",
    "DeltaNotice",
    "Describe",
    "DiffText",
    "Done",
    "Download",
    "Draining",
    "Effect",
    "EventPage",
    "EventsNotice",
    "Execute",
    "Executed",
    "FilesList",
    "FilesMkdir",
    "FilesMove",
    "FilesRemove",
    "FilesStat",
    "GetEvents",
    "GetState",
    "GitChanges",
    "GitDiff",
    "Initialize",
    "Initialized",
    "Interrupt",
    "LimitReached",
    "ListConversations",
    "Method",
    "NOTICES",
    "Notice",
    "Pause",
    "PauseWorkspace",
    "Ping",
    "Pong",
    "ProcessInput",
    "ProcessList",
    "ProcessOutput",
    "ProcessResize",
    "ProcessSignal",
    "ProcessStart",
    "ProcessWait",
    "R",
    "RegisterTools",
    "Respond",
    "Resume",
    "ResumeWorkspace",
    "Run",
    "RunAnswer",
    "SendMessage",
    "SetConfirmationPolicy",
    "SANDBOX",
    "SetTitle",
    "ShellAnswer",
    "ShellReset",
    "ShellRun",
    "ShellSend",
    "SnapshotTaken",
    "SnapshotWorkspace",
    "Started",
    "Subscribe",
    "Subscribed",
    "SwitchLlm",
    "SyncReset",
    "ToolCall",
    "ToolOutput",
    "UpdateSecrets",
    "Upload",
    "UploadOffset",
    "WORKSPACE",
    "all_methods",
    "result_type",
]

# Answered by whatever serves a Workspace: a box, and a server on behalf of its box.
WORKSPACE: tuple[type[Method[Any]], ...] = (
    Describe,
    Execute,
    ProcessStart,
    ProcessList,
    ProcessWait,
    ProcessInput,
    ProcessOutput,
    ProcessSignal,
    ProcessResize,
    ShellRun,
    ShellSend,
    ShellReset,
    Upload,
    UploadOffset,
    Download,
    FilesList,
    FilesStat,
    FilesRemove,
    FilesMove,
    FilesMkdir,
    GitChanges,
    GitDiff,
)
# Answered by a server about the container of a workspace.
SANDBOX: tuple[type[Method[Any]], ...] = (PauseWorkspace, ResumeWorkspace, SnapshotWorkspace)
# Answered by a box about itself.
BOX: tuple[type[Method[Any]], ...] = (Claim,)
CONVERSATION: tuple[type[Method[Any]], ...] = (
    Configure,
    RegisterTools,
    SendMessage,
    Run,
    Pause,
    Interrupt,
    Respond,
    GetState,
    GetEvents,
    Subscribe,
    UpdateSecrets,
    SetConfirmationPolicy,
    SwitchLlm,
    SetTitle,
    Delete,
    ListConversations,
)
CONNECTION: tuple[type[Method[Any]], ...] = (Initialize, Ping, CancelCall)
CLIENT: tuple[type[Method[Any]], ...] = (ToolCall,)
NOTICES: tuple[type[Notice], ...] = (
    EventsNotice,
    DeltaNotice,
    SyncReset,
    Draining,
    CancelNotice,
    LimitReached,
)


def all_methods() -> dict[str, type[Method[Any]]]:
    """Method name to class."""
    return {cls.method: cls for cls in CONNECTION + WORKSPACE + SANDBOX + BOX + CONVERSATION + CLIENT}


def result_type(method: type[Method[R]]) -> type[R]:
    """The R of a method class."""
    return get_args(method.__orig_bases__[0])[0]  # type: ignore[attr-defined,no-any-return]
