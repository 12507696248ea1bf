"""What calls return, here and over the wire alike: plain data."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Status = Literal["exited", "killed", "timeout", "running", "spawn_failed", "unknown"]
"""`killed`: ended by a signal; `timeout`: ended by us when its time was over; `running`: `yield_after`
passed first; `spawn_failed`: it never started, `reason` says why; `unknown`: nobody can know."""

State = Literal["idle", "running", "awaiting", "paused", "failed", "closed", "damaged"]
"""`awaiting`: a request has to be answered first, or see `waiting_for`; `failed`: the last turn failed,
`run` tries again; `damaged`: the log cannot be read."""


class Exit(Struct, frozen=True, kw_only=True):
    """How a process ended."""

    status: Status
    exit_code: int | None = None
    signal: int | None = None
    duration: float = 0.0
    reason: str = ""


class ProcessInfo(Struct, frozen=True, kw_only=True):
    """One process of a workspace, running or ended."""

    id: str
    command: str | list[str]
    pid: int
    pty: bool
    running: bool
    started_at: float
    """Seconds since the Unix epoch."""
    exit: Exit | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdin_bytes: int = 0
    """What it was given of its input so far; see `process.input`."""


class Transferred(Struct, frozen=True):
    """A file that arrived whole."""

    size: int
    """Bytes."""
    sha256: str
    """Lower-case hexadecimal; both ends computed it and agree."""
    mode: int = 0
    """Permission bits of the written or read file."""


class FileInfo(Struct, frozen=True, kw_only=True):
    """One entry of the file system."""

    path: str
    """Relative to the workspace's root, with `/`."""
    type: Literal["file", "dir", "symlink", "other"]
    size: int = 0
    mode: int = 0
    """Permission bits, e.g. 0o644."""
    modified_at: float = 0.0
    target: str | None = None
    """Of a symlink, as written."""


class GitChange(Struct, frozen=True, kw_only=True):
    """A path that differs from the base."""

    path: str
    status: Literal["added", "modified", "deleted", "renamed", "untracked"]
    old_path: str | None = None


class WorkspaceInfo(Struct, frozen=True, kw_only=True):
    """What and where a workspace is, and what holds there."""

    root: str
    """Absolute, as the commands see it."""
    working_dir: str
    """Where commands start when no cwd is given; absolute."""
    platform: str
    python: str
    confined: bool
    """Whether file calls are kept below the root."""
    isolation: str = "none"
    user: int = 0
    pid: int = 0
    running: int = 0
    """How many processes run and shells are open in it."""
    operations: tuple[str, ...] = ()
    """The op_ids of the calls that are carried out in it."""


class Accepted(Struct, frozen=True):
    """A message is in the log."""

    seq: int
    run_id: str
    """The turn that will answer it."""


class Stats(Struct, frozen=True, kw_only=True):
    """What a conversation consumed so far; computed from its log."""

    model_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None
    """US dollars of the calls whose price is known; None when no price is known."""
    tool_calls: int = 0
    turns: int = 0


class PendingRequest(Struct, frozen=True, kw_only=True):
    """A request that waits for an answer."""

    request_id: str
    request: Literal["approval", "client_tool"]
    tool: str
    arguments: str


class RunningOperation(Struct, frozen=True, kw_only=True):
    """A call that changes the workspace and has begun. Repeating it attaches to it."""

    op_id: str
    method: str


class Snapshot(Struct, frozen=True, kw_only=True):
    """A conversation at one moment."""

    id: str
    state: State
    epoch: str
    """Changes when the log is made anew; a cursor is (epoch, seq)."""
    head_seq: int
    title: str | None = None
    tags: dict[str, str] = {}
    created_at: float = 0.0
    updated_at: float = 0.0
    stats: Stats = Stats()
    pending: tuple[PendingRequest, ...] = ()
    run_id: str | None = None
    """The running or last turn."""
    model: str | None = None
    operations: tuple[RunningOperation, ...] = ()
    """Calls of clients that are under way in the workspace, oldest first."""
    waiting_for: str = ""
    """What the agent waits for besides `pending`, e.g. a key that the server does not keep; a sentence."""
