"""Methods of a workspace: answered by a box, and by a server on behalf of its box."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from agent_sdk.protocol.methods.method import (
    Argument,
    Channel,
    Done,
    Effect,
    Method,
    Ms,
    Name,
    Notice,
    Offset,
    OpId,
    Path,
    Stream,
    UserName,
)
from agent_sdk.protocol.results import (
    Bytes,
    Exit,
    ExitCode,
    FileInfo,
    GitChange,
    ProcessInfo,
    Seconds,
    Signal,
    Status,
    Transferred,
    WorkspaceInfo,
)

Keys = Annotated[str, Meta(max_length=1024, pattern="^[\\u0000-\\u00ff]*$")]
"""Bytes of a terminal, one character U+0000..U+00FF per byte."""


class Describe(Method[WorkspaceInfo], frozen=True, kw_only=True):
    """Say what and where the workspace is."""

    method = "workspace.describe"


class Executed(Struct, frozen=True, kw_only=True):
    """What came of a command; its output went over the channels."""

    status: Status
    exit_code: ExitCode | None = None
    signal: Signal | None = None
    duration: Seconds = 0.0
    process_id: str | None = None
    reason: str = ""
    stdout_bytes: Bytes = 0
    """Bytes written in all; the channel carried the first 64 KiB and the last 1 MiB, with `follow` all that is kept."""
    stderr_bytes: Bytes = 0
    stdout_text: str | None = None
    stderr_text: str | None = None


class Execute(Effect[Executed], frozen=True, kw_only=True):
    """Run a command and wait for its end. Exactly one of `argv` and `shell`."""

    method = "execute"
    begins = True
    takes = (Stream("stdin", ""),)
    gives = (
        Stream("stdout", "stdout_since", "stdout_bytes", "stdout_text", "follow"),
        Stream("stderr", "stderr_since", "stderr_bytes", "stderr_text", "follow"),
    )
    argv: Annotated[list[Argument], Meta(min_length=1, max_length=4096)] | None = None
    shell: str | None = None
    cwd: Path | None = None
    env: Annotated[dict[str, Argument], Meta(max_length=1024)] = {}
    timeout_ms: Ms | None = None
    yield_after_ms: Ms | None = None
    user: UserName | None = None
    """As whom it runs, by name or number, where this workspace may change users; None: as all of its commands."""
    stdin: Channel = 0
    """A channel from the caller, or 0: empty. The command begins when all has come. What has come when it breaks off is
    kept for ten minutes: ask `upload.offset`, and let the channel of the repeated call begin at that offset."""
    stdout: Channel = 0
    stderr: Channel = 0
    merge: bool = False
    """Standard error goes into standard output, in the order in which it is written."""
    follow: bool = False
    """Send output while the command runs."""
    stdout_since: Offset = 0
    """What a repeated call has already; the channel begins at this offset."""
    stderr_since: Offset = 0


class Started(Struct, frozen=True):
    """A process runs."""

    process_id: str


class ProcessStart(Effect[Started], frozen=True, kw_only=True):
    """Start a command and return at once. Exactly one of `argv` and `shell`."""

    method = "process.start"
    begins = True
    argv: Annotated[list[Argument], Meta(min_length=1, max_length=4096)] | None = None
    shell: str | None = None
    cwd: Path | None = None
    env: Annotated[dict[str, Argument], Meta(max_length=1024)] = {}
    pty: bool = False
    rows: Annotated[int, Meta(ge=1, le=65535)] = 24
    cols: Annotated[int, Meta(ge=1, le=65535)] = 80
    timeout_ms: Ms | None = None
    user: UserName | None = None
    """As in `execute`."""


class ProcessList(Method[list[ProcessInfo]], frozen=True, kw_only=True):
    """The processes of the workspace, oldest first."""

    method = "process.list"


class ProcessWait(Method[Exit], frozen=True, kw_only=True):
    """Wait for the end of a process; -32007 when it still runs after `timeout_ms`."""

    method = "process.wait"
    process_id: Name
    timeout_ms: Ms | None = None


class Count(Struct, frozen=True):
    """How many bytes."""

    bytes: Bytes


class ProcessInput(Method[Count], frozen=True, kw_only=True):
    """Feed a process from a channel of the caller; answered when the channel ends, which closes its input."""

    method = "process.input"
    takes = (Stream(),)
    process_id: Name
    channel: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
    since: Offset = 0
    """Where in all the input of the process the channel begins; what the process got already is skipped."""


class ProcessOutput(Method[Count], frozen=True, kw_only=True):
    """Send output from byte `since` over a channel; answered at its end with the size in all."""

    method = "process.output"
    gives = (Stream(),)
    process_id: Name
    channel: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
    stream: Literal["stdout", "stderr"] = "stdout"
    since: Offset = 0
    follow: bool = True


class ProcessSignal(Effect[Done], frozen=True, kw_only=True):
    """Send a signal to the process group."""

    method = "process.signal"
    process_id: Name
    name: Annotated[str, Meta(pattern=r"^[A-Z0-9]{2,10}$")]


class ProcessResize(Method[Done], frozen=True, kw_only=True):
    """Set the size of the terminal."""

    method = "process.resize"
    process_id: Name
    rows: Annotated[int, Meta(ge=1, le=65535)]
    cols: Annotated[int, Meta(ge=1, le=65535)]


class ShellAnswer(Struct, frozen=True, kw_only=True):
    """What a shell answered, as workspace.ShellResult has it; the output went over the channel."""

    status: Literal["done", "quiet", "timeout", "busy", "ended", "unknown", "said"]
    exit_code: ExitCode | None = None
    cwd: str = ""
    full_output: str | None = None
    full_output_lacks: Bytes = 0
    output_bytes: Bytes = 0
    text: str | None = None
    reason: str = ""


class ShellRun(Effect[ShellAnswer], frozen=True, kw_only=True):
    """Run one command in the persistent shell of this name."""

    method = "shell.run"
    gives = (Stream(size="output_bytes", text="text"),)
    name: Name = "default"
    command: str
    timeout_ms: Ms | None = None
    quiet_ms: Ms | None = 30_000
    until: Keys = ""
    """Answer also when this was printed since the last answer, with `said`; empty: nothing is looked for."""
    channel: Channel = 0
    since: Offset = 0
    """What a repeated call has already of the output; the channel begins at this offset."""


class ShellSend(Effect[ShellAnswer], frozen=True, kw_only=True):
    """Type into the running command of a shell."""

    method = "shell.send"
    gives = (Stream(size="output_bytes", text="text"),)
    name: Name = "default"
    keys: str = ""
    """The bytes to type, one character U+0000..U+00FF per byte."""
    enter: bool | None = False
    """Press Enter after them; null: where the program reads lines and they do not end with one."""
    timeout_ms: Ms | None = None
    quiet_ms: Ms | None = 30_000
    until: Keys = ""
    """See `shell.run`."""
    channel: Channel = 0
    since: Offset = 0
    """See `shell.run`."""


class ShellReset(Effect[Done], frozen=True, kw_only=True):
    """End the shell with all it runs; start a fresh one."""

    method = "shell.reset"
    name: Name = "default"
    fresh: bool = True
    """False: its next use starts the fresh one."""


class Upload(Effect[Transferred], frozen=True, kw_only=True):
    """Write a file from a channel of the caller, whole or not at all.

    The channel's end frame carries the SHA-256 (32 bytes) of the whole. What has come when it breaks off is kept
    for ten minutes: ask `upload.offset`, and repeat the call from there.
    """

    method = "upload"
    begins = True
    takes = (Stream(),)
    path: Path
    channel: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
    size: Offset | None = None
    """Of the whole."""
    mode: Annotated[int, Meta(ge=0, le=0o777)] | None = None
    since: Offset = 0
    """What came of it over other channels; this one begins at that offset."""
    unpack: bool = False
    """It is a tar archive, and `path` the folder that it is unpacked into once all of it has come."""


class UploadOffset(Method[Count], frozen=True, kw_only=True):
    """Let go of the channel that an upload, or the `stdin` of an `execute`, may still come over, and say how much of it
    has come; 0 when unknown. The next channel may begin there."""

    method = "upload.offset"
    op_id: OpId


class Download(Method[Transferred], frozen=True, kw_only=True):
    """Send a regular file over a channel; the end frame carries the SHA-256 of all from `offset` on."""

    method = "download"
    gives = (Stream(),)
    path: Path
    channel: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
    offset: Offset = 0
    length: Offset | None = None
    since: Offset = 0
    """What of it came over other channels, counted from `offset`; this one begins at that offset."""
    as_is: bool = False
    """Take what is there, also when the file changes meanwhile; 64 MiB at most."""
    pack: bool = False
    """`path` is a folder: send what is in it as a tar archive, files, folders and symlinks."""
    exclude: Annotated[list[str], Meta(max_length=1000)] = []
    """With `pack`: patterns of what is left out; with a `/` of paths in the folder, without one of names."""


LISTED = 10_000
"""Entries of a folder in one answer."""


class FilesList(Method[list[FileInfo]], frozen=True, kw_only=True):
    """What is in a folder, sorted by path, `limit` entries at once: where so many come there may be more."""

    method = "files.list"
    path: Path = "."
    depth: Annotated[int, Meta(ge=1, le=64)] = 1
    hidden: bool = True
    after: str | None = None
    """The last path of the entries before."""
    limit: Annotated[int, Meta(ge=1, le=LISTED)] = LISTED


class FilesStat(Method[FileInfo], frozen=True, kw_only=True):
    """Describe a path; a symlink itself."""

    method = "files.stat"
    path: Path
    follow: bool = False
    """Describe what a symlink leads to."""


class FilesRemove(Effect[Done], frozen=True, kw_only=True):
    """Remove a file, symlink or folder."""

    method = "files.remove"
    path: Path
    recursive: bool = False


class FilesMove(Effect[Done], frozen=True, kw_only=True):
    """Rename; an existing file is replaced."""

    method = "files.move"
    source: Path
    target: Path


class FilesMkdir(Effect[Done], frozen=True, kw_only=True):
    """Make a folder and its parents."""

    method = "files.mkdir"
    path: Path


class GitChanges(Method[list[GitChange]], frozen=True, kw_only=True):
    """What differs from `base`."""

    method = "git.changes"
    path: Path = "."
    base: Annotated[str, Meta(min_length=1, max_length=256)] | None = None


class DiffText(Struct, frozen=True):
    """A unified diff, at most 1 MiB."""

    text: str


class GitDiff(Method[DiffText], frozen=True, kw_only=True):
    """The unified diff against `base`."""

    method = "git.diff"
    path: Path = "."
    base: Annotated[str, Meta(min_length=1, max_length=256)] | None = None


class PauseWorkspace(Effect[Done], frozen=True, kw_only=True):
    """Freeze the container of the workspace with all that runs in it; its next use wakes it."""

    method = "workspace.pause"


class ResumeWorkspace(Effect[Done], frozen=True, kw_only=True):
    """Let a frozen container go on."""

    method = "workspace.resume"


class SnapshotTaken(Struct, frozen=True, kw_only=True):
    """A copy of the files of a workspace."""

    id: str
    size: Bytes
    """Bytes."""


class SnapshotWorkspace(Effect[SnapshotTaken], frozen=True, kw_only=True):
    """Copy the files of the workspace as they are now; a new workspace may begin with them (Sandbox.snapshot)."""

    method = "workspace.snapshot"


class Claim(Effect[WorkspaceInfo], frozen=True, kw_only=True):
    """Give a box that was started in advance its identity, before anything runs in it; answered by a box only."""

    method = "box.claim"
    instance: OpId
    """What it calls itself from now on."""
    env: dict[str, str] = {}
    """Added to the environment of its commands."""
    token: str = ""
    """What later connections have to give as `auth` of their `initialize`; commands in the box do not know it."""


class LimitReached(Notice, frozen=True, kw_only=True):
    """Something in the box ran into a limit; sent by a box to whoever is connected to it."""

    method = "box.limit"
    limit: Literal["memory", "pids", "disk"]
    detail: str = ""


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
"""Answered by whatever serves a Workspace: a box, and a server on behalf of its box."""
SANDBOX: tuple[type[Method[Any]], ...] = (PauseWorkspace, ResumeWorkspace, SnapshotWorkspace)
"""Answered by a server about the container of a workspace."""
BOX: tuple[type[Method[Any]], ...] = (Claim,)
"""Answered by a box about itself."""
NOTICES: tuple[type[Notice], ...] = (LimitReached,)
