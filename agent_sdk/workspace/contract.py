"""The contract of a Workspace: a place where commands run and files live.

Two implementations exist, `agent_sdk.workspace.local` here and `agent_sdk.remote.workspace` there.
They behave alike; one test suite holds both to it. Paths are relative to the working folder, which is
the root unless another one was chosen, or absolute and below the root. Bytes are bytes: text is a view on them.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Self

from msgspec import Struct

from agent_sdk.protocol.checks import Cells, Count, Depth, Limit, Mode, Name, OpId, OsText, Path, Until, Verbs
from agent_sdk.protocol.errors import LimitExceeded, ProcessNotFound
from agent_sdk.protocol.results import (
    Exit,
    FileInfo,
    GitChange,
    ProcessInfo,
    Status,
    Transferred,
    WorkspaceInfo,
)
from agent_sdk.workspace.disk import LocalPath, OnProgress
from agent_sdk.workspace.output import Output, OutputName, ShellResult

__all__ = [
    "ExecResult",
    "Exit",
    "FileInfo",
    "FileStream",
    "Files",
    "Git",
    "GitChange",
    "OnOutput",
    "Output",
    "OutputName",
    "Process",
    "ProcessInfo",
    "Shell",
    "ShellResult",
    "Status",
    "Transferred",
    "Workspace",
    "WorkspaceInfo",
]

OnOutput = Callable[[OutputName, bytes], Awaitable[None] | None]

KILL_GRACE_SECONDS = 5.0


class ExecResult(Struct, frozen=True, kw_only=True):
    """What came of a command. A non-zero exit code is a result, not an error."""

    status: Status
    exit_code: int | None = None
    """From wait() only; None unless `status` is `exited` (or `spawn_failed`: 127 not found, 126 not executable)."""
    signal: int | None = None
    """The signal that ended it."""
    out: Output = Output()
    err: Output = Output()
    duration: float = 0.0
    """Seconds from spawn to the end, or until the answer."""
    process_id: str | None = None
    reason: str = ""
    """Why it did not start or what went wrong, e.g. `ENOENT: No such file or directory: src`."""
    process: Process | None = None
    """For what it says later; None: it did not start, or its place was lost."""

    @property
    def returncode(self) -> int | None:
        """One number, as shells have it: the exit code, 128 + n for signal n, 124 when its time was over, 126 or 127
        when it did not start (why is in `stderr`). None: it still runs, or nobody knows how it ended."""
        match self.status:
            case "killed":
                return 128 + (self.signal or 0)
            case "timeout":
                return 124
            case "spawn_failed":
                return self.exit_code or 127
        return self.exit_code

    async def whole(self, stream: OutputName = "stdout") -> bytes:
        """Return all that the command said, also what lies between head and tail; of one that runs on, to its end.

        Raises:
            LimitExceeded: there was more than is kept (256 MiB and the last 1 MiB).
            ProcessNotFound: only the last processes are kept, and this is none of them any more.
        """
        output = self.out if stream == "stdout" else self.err
        if self.status != "running" and not output.omitted:
            return output.head + output.tail
        if self.process is None:
            raise ProcessNotFound("the process is not known any more")
        whole = bytearray()
        async for offset, data in self.process.chunks(stream=stream):
            if offset > len(whole):
                raise LimitExceeded(
                    f"the output is not kept whole: {offset - len(whole)} bytes behind the first {len(whole)} are "
                    "gone; send it into a file to have it all",
                    field=stream,
                )
            whole += data
        return bytes(whole if self.status == "running" else whole[: output.size])

    @property
    def stdout(self) -> str:
        """Standard output as text, decoded as UTF-8, without what is missing in its middle."""
        return self.out.text

    @property
    def stderr(self) -> str:
        """Standard error as text, decoded as UTF-8; of a command that did not start the reason."""
        return f"{self.reason}\n" if self.status == "spawn_failed" else self.err.text

    @property
    def timed_out(self) -> bool:
        """Whether it was killed because `timeout` was over."""
        return self.status == "timeout"

    @property
    def truncated(self) -> bool:
        """Whether stdout or stderr lack bytes in the middle."""
        return self.out.omitted > 0 or self.err.omitted > 0


class FileStream(Protocol):
    """A file being read: its bytes in order, in one iteration."""

    size: int
    """Bytes of the whole file, whatever part of it is read."""
    mode: int
    """Permission bits."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class Process(Verbs, Protocol):
    """A started process. A process goes on when no client listens; output is kept, and read by offset."""

    @property
    def id(self) -> str:
        """Unique in its workspace."""
        ...

    async def write(self, data: bytes) -> None:
        """Write to the standard input of the process; wait while the process does not read.

        Raises:
            ProcessNotFound: the process has ended, or closed its input.
        """
        ...

    async def close_stdin(self) -> None:
        """End the standard input of the process; on a PTY, send end-of-file (^D)."""
        ...

    def output(
        self, since: Count = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[bytes]:
        """Yield the output from byte `since` on, until the process ends; without `follow`, only what is there already.

        Of more than 256 MiB the middle is lost, and the iterator goes on with the last 1 MiB. A PTY has only stdout.
        """
        ...

    def chunks(
        self, since: Count = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Yield like `output`, each piece with its offset, which shows where a gap is."""
        ...

    async def signal(self, name: str) -> None:
        """Send a signal (`INT`, `TERM`, `KILL`, …) to the process group of the process.

        Raises:
            ProcessNotFound: it has ended.
            InvalidParams: no such signal.
        """
        ...

    async def resize(self, *, rows: Cells, cols: Cells) -> None:
        """Set the size of the terminal, 1..65535 rows and columns."""
        ...

    async def wait(self, timeout: Limit | None = None) -> Exit:
        """Wait for the end of the process; cancelling ends the waiting only.

        Raises:
            TimedOut: the process still runs after `timeout` seconds.
        """
        ...


class Shell(Verbs, Protocol):
    """A persistent bash in a terminal: folder, variables, functions and jobs stay between commands."""

    async def run(
        self,
        command: OsText,
        *,
        timeout: Limit | None = None,
        quiet: Limit | None = 30.0,
        until: Until | None = None,
        op_id: OpId | None = None,
    ) -> ShellResult:
        """Run one command (any bash text) and wait until it ends, is quiet, or the time is over.

        Neither limit ends the command. Cancelling interrupts it (^C). `timeout` and `quiet` are seconds;
        None waits for ever. With `until` (1..1024 bytes, such as the prompt of an interpreter) the call also returns
        as soon as the output since the last answer contains it. `op_id` names the call where the shell is in another
        process: a call that is repeated under the same op_id attaches to the first.
        """
        ...

    async def send(
        self,
        data: bytes,
        *,
        enter: bool | None = False,
        timeout: Limit | None = None,
        quiet: Limit | None = 30.0,
        until: Until | None = None,
        op_id: OpId | None = None,
    ) -> ShellResult:
        """Type exactly these bytes into the running command (empty: only look), then wait like `run`.

        Args:
            data: what is typed.
            enter: press Enter after it. None: as a person would, unless it ends with a newline: where the program
                reads lines, and after more than one character where it edits lines itself, but never where it
                reads single keys (`read -n1`).
            timeout, quiet, until, op_id: as for `run`.
        """
        ...

    async def close(self, *, op_id: OpId | None = None) -> None:
        """End the shell with all it runs and forget it; its next use begins anew, in the working folder."""
        ...

    async def reset(self, *, op_id: OpId | None = None) -> None:
        """End the shell with all it runs and start a fresh one in the working folder."""
        ...


class Files(Verbs, Protocol):
    """The files of a workspace. Every path is confined to the root, symlinks included.

    All methods raise PathNotFound, OutsideWorkspace, PathDenied, NotARegularFile, IsADirectory,
    NotADirectory or InvalidParams (empty, NUL, longer than 4096 bytes) where a path is not acceptable.
    """

    async def read(self, path: Path, *, offset: Count = 0, limit: Count | None = None) -> bytes:
        """Return the bytes of a regular file, at most 64 MiB (LimitExceeded)."""
        ...

    async def write(self, path: Path, data: bytes, *, mode: Mode | None = None) -> Transferred:
        """Replace a file as a whole or not at all; parents are made; an existing file keeps its mode."""
        ...

    async def list(self, path: Path = ".", *, depth: Depth = 1, hidden: bool = True) -> list[FileInfo]:
        """Return what is in a folder, sorted by path, down to `depth` levels.

        Raises:
            LimitExceeded: there are more than 100 000 entries; it says how many.
        """
        ...

    async def stat(self, path: Path) -> FileInfo:
        """Describe a path; a symlink itself, not its target."""
        ...

    async def remove(self, path: Path, *, recursive: bool = False) -> None:
        """Remove a file, a symlink, or a folder (with its content only when `recursive`)."""
        ...

    async def move(self, source: Path, target: Path) -> None:
        """Rename, replacing an existing file; parents of the target are made."""
        ...

    async def mkdir(self, path: Path) -> None:
        """Make a folder and its parents; an existing one is fine."""
        ...


class Git(Verbs, Protocol):
    """The git repository in a workspace folder."""

    async def changes(self, path: Path = ".", *, base: OsText | None = None) -> list[GitChange]:
        """Return what differs from `base` (None: HEAD, or nothing without a commit), untracked included.

        Raises:
            StateConflict: not a git repository.
        """
        ...

    async def diff(self, path: Path = ".", *, base: OsText | None = None) -> str:
        """Return the unified diff of a file or folder against `base`, at most 1 MiB of text."""
        ...


class Workspace(Verbs, Protocol):
    """A place to work. Enter it with `async with`; leaving ends everything that runs in it."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    @property
    def files(self) -> Files:
        """Files and folders."""
        ...

    @property
    def git(self) -> Git:
        """The git repository."""
        ...

    async def describe(self) -> WorkspaceInfo:
        """Say what and where this is."""
        ...

    async def execute(
        self,
        command: OsText | list[OsText],
        *,
        cwd: OsText | None = None,
        env: Mapping[OsText, OsText] | None = None,
        stdin: bytes | str | None = None,
        timeout: Limit | None = None,
        yield_after: Limit | None = None,
        on_output: OnOutput | None = None,
        merge: bool = False,
        op_id: OpId | None = None,
        user: OsText | None = None,
    ) -> ExecResult:
        """Run a command and wait for its end; cancelling ends the whole process tree (TERM, after 5 s KILL).

        Args:
            command: text is run by bash (sh where there is none), a list is run as it is.
            cwd: below the root; relative ones start at the working folder.
            env: added to the workspace's environment; names starting with `AGENT_` are reserved.
            stdin: its whole input; None: empty.
            timeout: seconds from its start until the tree is killed, 0.001..86 400; the result then has
                `timed_out` and what it had said. None: no limit.
            yield_after: seconds after which the call answers with status `running` and a process id.
            on_output: called in order with each piece of output; a slow one delays the answer, not the command.
            merge: standard error goes into standard output, in the order in which it is written.
            op_id: a UUID that names the call. A call that is repeated under the same op_id attaches to the command,
                or returns what the first call returned; on a server any process may repeat it. None: a fresh one.
            user: the user who runs the command, as `name`, `number` or either with `:group`, from the workspace's
                /etc/passwd. None: the user of all commands. Another one needs a sandbox with profile="task", or a
                workspace that may change users.

        Raises:
            InvalidParams, OutsideWorkspace, PolicyDenied: the arguments are not acceptable.
            IsolationUnavailable: commands of this workspace cannot run as that user.
            OpMismatch: the op_id was used for another call.
            WorkspaceUnavailable: the workspace is gone.
        """
        ...

    async def start(
        self,
        command: OsText | list[OsText],
        *,
        cwd: OsText | None = None,
        env: Mapping[OsText, OsText] | None = None,
        pty: bool = False,
        rows: Cells = 24,
        cols: Cells = 80,
        timeout: Limit | None = None,
        op_id: OpId | None = None,
        user: OsText | None = None,
    ) -> Process:
        """Start a command and return at once; it runs until it or the workspace ends. `op_id`, `user`: as in `execute`.

        Raises:
            PathNotFound, PathDenied: the program or folder is missing or not executable.
        """
        ...

    async def processes(self) -> list[ProcessInfo]:
        """Return the processes of this workspace, oldest first; ended ones are kept for a while."""
        ...

    def process(self, process_id: str) -> Process:
        """Return the process with this id; whether it exists shows at the first use."""
        ...

    def shell(self, name: Name = "default") -> Shell:
        """Return the persistent shell of this name; it starts at its first use."""
        ...

    async def upload(
        self,
        source: LocalPath,
        target: Path,
        *,
        on_progress: OnProgress | None = None,
        op_id: OpId | None = None,
    ) -> Transferred:
        """Copy a file of this machine into the workspace: whole and verified, or not at all.

        A file may have any size, and takes constant memory; parent folders are made, and the mode bits are kept. A
        slow `on_progress` delays the transfer. After a lost connection the transfer goes on where it was. `op_id`: as
        in `execute`.

        Raises:
            PathNotFound, PathDenied, IsADirectory, NotARegularFile, StorageFull: a path cannot be read or written.
            ChangedDuringRead: the file was changed during the transfer.
        """
        ...

    async def download(
        self, source: Path, target: LocalPath, *, on_progress: OnProgress | None = None
    ) -> Transferred:
        """Copy a file of the workspace to this machine; the mirror image of `upload`."""
        ...

    async def upload_dir(self, local: LocalPath, remote: Path, *, exclude: Sequence[str] = ()) -> Transferred:
        """Copy what is in a folder of this machine into one of the workspace, as one stream.

        `exclude`: patterns (`.git`, `*.pyc`, `build/*`) of names, or with a `/` of paths in the folder.
        """
        ...

    async def download_dir(
        self, local: LocalPath, remote: Path, *, exclude: Sequence[str] = ()
    ) -> Transferred:
        """Copy what is in a folder of the workspace into one of this machine; the mirror image of `upload_dir`."""
        ...

    def read_stream(
        self, path: Path, *, offset: Count = 0, length: Count | None = None
    ) -> AbstractAsyncContextManager[FileStream]:
        """Open a regular file for reading in pieces of at most 64 KiB.

        Raises ChangedDuringRead while iterating when the file changes meanwhile.
        """
        ...

    async def write_stream(
        self, path: Path, chunks: AsyncIterable[bytes], *, size: Count | None = None, mode: Mode | None = None
    ) -> Transferred:
        """Write a file from pieces: temporary file, fsync, rename. An error leaves nothing behind.

        Raises:
            TransferBroken: `size` was given and differs from what came.
        """
        ...
