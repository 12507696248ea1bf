"""What calls return, here and over the wire alike: plain data."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

# What comes from a box may be of a program that an attacker wrote: numbers are what they can be, or the answer makes
# no sense.
Bytes = Annotated[int, Meta(ge=0, le=2**53)]
ExitCode = Annotated[int, Meta(ge=-(2**31), le=2**32 - 1)]
Signal = Annotated[int, Meta(ge=0, le=128)]
Mode = Annotated[int, Meta(ge=0, le=0o7777777)]
Number = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]

Status = Literal["exited", "killed", "timeout", "running", "spawn_failed", "unknown"]
"""`killed`: ended by a signal; `timeout`: ended by us when its time was over; `running`: `yield_after`
passed first; `spawn_failed`: it never started, `reason` says why; `unknown`: nobody can know."""

State = Literal["idle", "running", "awaiting", "paused", "failed", "closed", "damaged"]
"""`awaiting`: a request has to be answered first, or see `waiting_for`; `failed`: the last turn failed,
`run` tries again; `damaged`: the log cannot be read."""
BUSY: tuple[State, ...] = ("running", "awaiting")
"""Those of a conversation in which a turn goes on, or will when it is answered."""


class Exit(Struct, frozen=True, kw_only=True):
    """How a process ended."""

    status: Status
    exit_code: ExitCode | None = None
    signal: Signal | None = None
    duration: Seconds = 0.0
    reason: str = ""


class ProcessInfo(Struct, frozen=True, kw_only=True):
    """One process of a workspace, running or ended."""

    id: str
    command: str | list[str]
    pid: Number
    pty: bool
    running: bool
    started_at: Seconds
    """Seconds since the Unix epoch."""
    exit: Exit | None = None
    stdout_bytes: Bytes = 0
    stderr_bytes: Bytes = 0
    stdin_bytes: Bytes = 0
    """What it was given of its input so far; see `process.input`."""


class Transferred(Struct, frozen=True):
    """A file that arrived whole."""

    size: Bytes
    """Bytes."""
    sha256: str
    """Lower-case hexadecimal; both ends computed it and agree."""
    mode: Mode = 0
    """Permission bits of the written or read file."""


class FileInfo(Struct, frozen=True, kw_only=True):
    """One entry of the file system."""

    path: str
    """Relative to the working folder, with `/`; absolute when it is not below that."""
    type: Literal["file", "dir", "symlink", "other"]
    size: Bytes = 0
    mode: Mode = 0
    """Permission bits, e.g. 0o644."""
    modified_at: float = 0.0
    target: str | None = None
    """Of a symlink, as written."""


class GitChange(Struct, frozen=True, kw_only=True):
    """A path that differs from the base."""

    path: str
    status: Literal["added", "modified", "deleted", "renamed", "untracked"]
    old_path: str | None = None


class Mount(Struct, frozen=True, kw_only=True):
    """A line of /proc/self/mountinfo."""

    target: str
    kind: str
    """Of the file system."""
    options: tuple[str, ...] = ()
    """Of the mount itself: ro, nosuid, nodev, noexec."""
    device: int = 0
    """With `inode`: which file or folder is there, as `stat` tells; 0: not known."""
    inode: int = 0


class Profile(Struct, frozen=True, kw_only=True):
    """What is in force for the commands of a box, as it finds it itself; None: it cannot tell."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    capabilities: str = ""
    """Effective, as a hexadecimal number (CapEff)."""
    capabilities_bound: str = ""
    """The most that a program could get (CapBnd)."""
    no_new_privileges: bool = False
    seccomp: int = 0
    """0 none, 2 filtered."""
    seccomp_filters: int = 0
    read_only_root: bool = False
    pids_max: int | None = None
    memory_max: int | None = None
    """Bytes."""
    cpus: float | None = None
    open_files: int | None = None
    file_bytes: int | None = None
    """The longest file a process may write."""
    interfaces: tuple[str, ...] = ()
    """Of the network."""
    mounts: tuple[Mount, ...] = ()
    kernel: str = ""
    """What /proc/version begins with."""


class Usage(Struct, frozen=True, kw_only=True):
    """What a sandbox uses at the moment, as its engine counts; None: not known."""

    cpu_seconds: Seconds | None = None
    memory: Bytes | None = None
    """Bytes, without the page cache that can be given back."""
    memory_max: Bytes | None = None
    pids: Bytes | None = None
    pids_max: Bytes | None = None
    disk: Bytes | None = None
    """Bytes that the workspace occupies."""
    disk_max: Bytes | None = None


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
    """`none`, `user` (a user of its own), `bwrap`, or the runtime of its container (`runc`, `runsc`)."""
    image: str | None = None
    """Of the container."""
    sandbox: str | None = None
    """`locked` or `task`; None: it is no sandbox."""
    root_quota: str = ""
    """What limits a root that is writable: the engine's driver, or `none`. Empty: it is read-only, or no sandbox's."""
    disk_quota: str = "none"
    """What enforces the limit of the disk: `none`, or the mechanism."""
    profile: Profile | None = None
    usage: Usage | None = None
    user: Number = 0
    pid: Number = 0
    running: Number = 0
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


class Wait(Struct, frozen=True, kw_only=True):
    """Something that the agent needs before it can go on."""

    what: Literal["key", "approval", "client_tool", "box", "disk", "server"]
    reason: str
    """What is missing and what to do about it, in one sentence."""
    request_id: str | None = None
    """Of an approval or a client tool."""
    tool: str = ""
    """That is to be approved or run."""


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
    workspace: str = ""
    """Tells workspaces apart: conversations that share one say the same here. Empty: it is not on a server."""
    operations: tuple[RunningOperation, ...] = ()
    """Calls of clients that are under way in the workspace, oldest first."""
    waiting_for: str = ""
    """What the agent waits for, or would wait for as soon as it works; a sentence each of `waits`."""
    waits: tuple[Wait, ...] = ()
    """The same for programs."""
