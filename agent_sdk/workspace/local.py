"""A workspace on this machine: a folder, and the processes that were started in it.

The contract is `agent_sdk.workspace.contract.Workspace`. This file only puts the parts together: arguments are
checked, a folder is opened, a program is launched, its output is kept, its end is awaited.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from agent_sdk.idempotency import IdempotencyStore, InMemory
from agent_sdk.ids import checked_op_id
from agent_sdk.protocol.checks import OsText, check_input, checked
from agent_sdk.protocol.errors import (
    InvalidParams,
    NotADirectory,
    OutsideWorkspace,
    PathNotFound,
    StateConflict,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.methods.workspace import Execute, ProcessStart, Upload
from agent_sdk.protocol.results import ProcessInfo, Transferred, WorkspaceInfo
from agent_sdk.workspace.atomic_file import atomic_file
from agent_sdk.workspace.bash import Bash, Report
from agent_sdk.workspace.child_process import ChildProcess
from agent_sdk.workspace.contract import ExecResult, FileStream, OnOutput, Workspace
from agent_sdk.workspace.disk import (
    Folder,
    LocalPath,
    OnProgress,
    Progress,
    in_thread,
    open_source,
    path_error,
    until_done,
)
from agent_sdk.workspace.environment import (
    check_argv,
    check_command,
    check_environment,
    temporary_folder,
    workspace_environment,
)
from agent_sdk.workspace.files import LocalFiles, Uploads
from agent_sdk.workspace.folders import packed, unpacked
from agent_sdk.workspace.git import LocalGit
from agent_sdk.workspace.launch import (
    Interpreter,
    Launch,
    SpawnFailed,
    find_bash,
    find_sh,
    open_folder,
)
from agent_sdk.workspace.limits import LimitWatch
from agent_sdk.workspace.paths import Root
from agent_sdk.workspace.process import LocalProcess, OutputPump, weight, without_output
from agent_sdk.workspace.process_table import ProcessTable
from agent_sdk.workspace.shell import LocalShell
from agent_sdk.workspace.users import other_user


@dataclass
class _Open:
    """What exists between entering and leaving."""

    processes: ProcessTable
    spool_folder: str
    environment: dict[str, str]
    shell: Interpreter
    shells: dict[str, LocalShell] = field(default_factory=dict)

    def running(self) -> int:
        """How many processes run and shells are open."""
        shells = sum(shell.is_open for shell in self.shells.values())
        return shells + sum(info.running for info in self.processes.infos())


class LocalWorkspace(Workspace):
    """A folder of this machine. Enter it with `async with`; leaving ends all processes it started."""

    @checked
    def __init__(
        self,
        dir: LocalPath = ".",
        *,
        working_dir: LocalPath | None = None,
        confined: bool = True,
        spool_dir: LocalPath | None = None,
        env: Mapping[OsText, OsText] | None = None,
        spare_bash: Sequence[OsText] = (),
        limits: LimitWatch | None = None,
        isolated: bool = False,
    ) -> None:
        """Describe the workspace; nothing happens before `async with`.

        Args:
            dir: the root, an existing folder.
            working_dir: where commands and relative paths start, below the root (unless unconfined); None: the root.
            confined: False: paths may lead out of the root. Commands themselves are never confined here.
            spool_dir: where a folder for the output of commands is made, and removed; None: a temporary place.
            env: added to the environment of every command.
            spare_bash: words that start a bash, for a machine that has none.
            limits: tells which limit of the kernel commands have run into; asked whenever a command has ended.
            isolated: whether what runs here is kept apart from all else, so that also git repositories of other
                users may be looked at.
        """
        home = None if working_dir is None else os.fspath(working_dir)
        self._root = Root(os.fspath(dir), home=home, confined=confined)
        self.root = self._root.path
        """Absolute, symlinks resolved."""
        self.working_dir = self._root.home
        self._spool_dir = None if spool_dir is None else os.path.abspath(os.fspath(spool_dir))
        self._env = check_environment(env)
        self._spare_bash = spare_bash
        self._limits = limits
        self._open: _Open | None = None
        self._closing = AsyncExitStack()
        self._files = LocalFiles(self._root)
        self.uploads = Uploads(self._files)
        """Files that come in parts, over connections that are lost."""
        self.operations = IdempotencyStore(InMemory(weigh=weight, strip=without_output))
        """What changes something in it, by op_id."""
        self._git = LocalGit(
            self._root, self._run_git, lambda: self._opened().spool_folder, isolated=isolated
        )

    def __repr__(self) -> str:
        return f"<LocalWorkspace {self.root} {'open' if self._open else 'not open'}>"

    async def __aenter__(self) -> Self:
        """Make the spool folder.

        Raises:
            PathNotFound, NotADirectory: the root or the working folder is missing or no folder.
            OutsideWorkspace: the working folder is not below the root.
            StateConflict: it is entered already.
        """
        if self._open is not None:
            raise StateConflict("the workspace is entered already")
        self._open = await in_thread(self._make)
        return self

    def _make(self) -> _Open:
        for folder in (self.root, self.working_dir):
            if not os.path.exists(folder):
                raise PathNotFound(f"No such file or directory: {folder}", path=folder)
            if not os.path.isdir(folder):
                raise NotADirectory(f"Not a directory: {folder}", path=folder)
        if self._root.confined and os.path.commonpath((self.root, self.working_dir)) != self.root:
            raise OutsideWorkspace(
                f"the working folder is not below the root: {self.working_dir}", path=self.working_dir
            )
        spool_dir = self._spool_dir or temporary_folder()
        try:
            os.makedirs(spool_dir, mode=0o700, exist_ok=True)
            spool_folder = os.path.join(spool_dir, f"agent-output-{os.urandom(8).hex()}")
            os.mkdir(spool_folder, mode=0o700)
        except OSError as exc:
            raise path_error(exc, spool_dir) from exc
        environment = workspace_environment(self._env)
        sh = find_sh(environment, self._spare_bash)
        processes = ProcessTable(spool_folder, sh=sh, limits=self._limits)
        shell = find_bash(environment, self._spare_bash)
        return _Open(processes, spool_folder, environment, shell)

    async def __aexit__(self, *exc: object) -> None:
        """End every process tree (TERM, after 5 s KILL) and remove the spool folder; conversations close before."""
        task = asyncio.ensure_future(self._close())
        try:
            await until_done(task)
        finally:
            task.result()

    async def _close(self) -> None:
        try:
            await self._closing.pop_all().aclose()
        finally:
            opened, self._open = self._open, None
            if opened is not None:
                await self.operations.close()
                self.operations = IdempotencyStore(InMemory(weigh=weight, strip=without_output))
                await self.uploads.close()
                await opened.processes.end()
                for shell in opened.shells.values():
                    await shell.close()
                await opened.processes.close()
                await in_thread(_remove_folder, opened.spool_folder)

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Call this before it closes; conversations close with it."""
        self._closing.push_async_callback(close)

    def _opened(self) -> _Open:
        if self._open is None:
            raise WorkspaceUnavailable("the workspace is not open; enter it with `async with`")
        return self._open

    def add_environment(self, env: Mapping[str, str]) -> None:
        """Add to the environment of every command that starts from now on."""
        self._opened().environment.update(check_environment(env))

    @property
    def files(self) -> LocalFiles:
        return self._files

    @property
    def git(self) -> LocalGit:
        return self._git

    async def describe(self) -> WorkspaceInfo:
        machine = os.uname()
        return WorkspaceInfo(
            root=self.root,
            working_dir=self.working_dir,
            platform=f"{machine.sysname}-{machine.release}-{machine.machine}",
            python=sys.version.split()[0],
            confined=self._root.confined,
            user=os.geteuid(),
            pid=os.getpid(),
            running=0 if self._open is None else self._open.running(),
        )

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
        on_start: Callable[[LocalProcess], None] | None = None,
    ) -> ExecResult:
        """Run a command, as Workspace.execute says; `on_start` gets the process as soon as it runs."""
        if op_id is not None:
            options: dict[str, Any] = {
                "cwd": cwd,
                "env": env,
                "timeout": timeout,
                "yield_after": yield_after,
                "merge": merge,
                "user": user,
            }
            work = partial(
                self.execute, command, stdin=stdin, on_output=on_output, on_start=on_start, **options
            )
            return await self.operations.run_as(checked_op_id(op_id), Execute, (command, options), work)
        if timeout is not None and yield_after is not None and yield_after > timeout:
            raise InvalidParams(f"yield_after: {yield_after} s is after the timeout of {timeout} s")
        data = check_input(stdin)
        try:
            child = self._launch(command, cwd, env, user, stdin=bool(data), merge=merge)
        except SpawnFailed as failed:
            return ExecResult(status="spawn_failed", exit_code=failed.exit_code, reason=failed.reason)
        process = LocalProcess(self._opened().processes, child.id)
        child.limit(timeout)
        if on_start is not None:
            on_start(process)
        if child.stdin is not None:
            self._opened().processes.hold(child.stdin.write_last(data))
        with child.reading():
            try:
                await _wait(child, yield_after, on_output)
            except BaseException:
                # Cancelled, or the callback failed: nobody is left who could want the command to go on.
                child.end()
                await child.ended()
                raise
            return await process.result()

    def _launch(
        self,
        command: str | list[str],
        cwd: str | None,
        env: Mapping[str, str] | None,
        user: str | None,
        *,
        stdin: bool,
        size: tuple[int, int] | None = None,
        merge: bool = False,
    ) -> ChildProcess:
        opened = self._opened()
        checked = check_command(command)
        other = other_user(user)
        own = other.environment if other is not None else {}
        environment = {**opened.environment, **own, **check_environment(env)}
        if isinstance(checked, bytes):
            launch = opened.shell.launch((b"-c", checked), environment)
        else:
            launch = Launch(checked, environment)
        launch = replace(launch, user=other)
        with closing(self._folder(cwd)) as folder:
            return opened.processes.start(command, launch, folder, stdin=stdin, size=size, merge=merge)

    async def _run_git(
        self, argv: list[str], folder: str, environment: dict[str, str], limit: int
    ) -> tuple[int | None, bytes, str]:
        opened = self._opened()
        inherited = {name: value for name, value in opened.environment.items() if name[:4] != "GIT_"}
        launch = Launch(check_argv(argv), {**inherited, **environment})
        try:
            with closing(open_folder(self._root, folder)) as place:
                child = opened.processes.start(argv, launch, place, stdin=False, listed=False)
        except SpawnFailed as failed:
            return failed.exit_code, b"", failed.reason
        try:
            await asyncio.wait((child.over,))
            out = await child.spools["stdout"].beginning(limit)
            err = await child.spools["stderr"].output()
        finally:
            await opened.processes.drop(child)
        exit = child.exit
        return None if exit is None else exit.exit_code, out, err.text

    def _folder(self, cwd: str | None) -> Folder:
        """Open where a command starts; relative paths start at the working folder."""
        return open_folder(self._root, self.working_dir if cwd is None else cwd)

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
    ) -> LocalProcess:
        if op_id is not None:
            options: dict[str, Any] = {
                "cwd": cwd,
                "env": env,
                "pty": pty,
                "rows": rows,
                "cols": cols,
                "timeout": timeout,
                "user": user,
            }
            work = partial(self.start, command, **options)
            return await self.operations.run_as(checked_op_id(op_id), ProcessStart, (command, options), work)
        try:
            child = self._launch(command, cwd, env, user, stdin=True, size=(rows, cols) if pty else None)
        except SpawnFailed as failed:
            raise failed.error from None
        child.limit(timeout)
        try:
            await child.begun()
        except BaseException:  # cancelled: nobody will know that it runs
            child.end()
            await child.ended()
            raise
        return LocalProcess(self._opened().processes, child.id)

    async def processes(self) -> list[ProcessInfo]:
        return self._opened().processes.infos()

    def process(self, process_id: str) -> LocalProcess:
        return LocalProcess(self._opened().processes, process_id)

    def shell(self, name: str = "default") -> LocalShell:
        opened = self._opened()
        if name not in opened.shells:
            opened.shells[name] = LocalShell(name, opened.spool_folder, self._start_bash, self._limits)
        return opened.shells[name]

    def _start_bash(self, take: Callable[[bytes], bool], on_report: Callable[[Report], None]) -> Bash:
        opened = self._opened()
        if not opened.shell.is_bash:
            raise WorkspaceUnavailable("bash is needed for a shell, and is not installed")
        try:
            with closing(self._folder(None)) as folder:
                return Bash(opened.processes, folder, opened.environment, opened.shell, take, on_report)
        except SpawnFailed as failed:
            raise failed.error from None

    async def upload(
        self,
        source: LocalPath,
        target: str,
        *,
        on_progress: OnProgress | None = None,
        op_id: str | None = None,
    ) -> Transferred:
        if op_id is not None:
            work = partial(self.upload, source, target, on_progress=on_progress)
            return await self.operations.run_as(
                checked_op_id(op_id), Upload, (os.fspath(source), target), work
            )
        self._opened()
        async with open_source(source) as opened:
            chunks = Progress(on_progress, opened.size).watch(opened)
            return await self._files.write_stream(target, chunks, size=opened.size, mode=opened.mode)

    async def download(
        self, source: str, target: LocalPath, *, on_progress: OnProgress | None = None
    ) -> Transferred:
        self._opened()
        async with self._files.read_stream(source) as opened, atomic_file(target, opened.mode) as file:
            async with aclosing(Progress(on_progress, opened.size).watch(opened)) as chunks:
                async for data in chunks:
                    await file.write(data)
            return await file.commit(size=opened.size)

    async def upload_dir(self, local: LocalPath, remote: str, *, exclude: Sequence[str] = ()) -> Transferred:
        self._opened()
        return await self._files.write_stream(remote, packed(local, exclude), unpack=True)

    async def download_dir(
        self, local: LocalPath, remote: str, *, exclude: Sequence[str] = ()
    ) -> Transferred:
        self._opened()
        return await unpacked(local, self._files.packed(remote, exclude))

    def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[FileStream]:
        return self._files.read_stream(path, offset=offset, length=length)

    async def write_stream(
        self, path: str, chunks: AsyncIterable[bytes], *, size: int | None = None, mode: int | None = None
    ) -> Transferred:
        return await self._files.write_stream(path, chunks, size=size, mode=mode)


async def _wait(child: ChildProcess, yield_after: float | None, on_output: OnOutput | None) -> None:
    left = None if yield_after is None else max(0.0, child.started + yield_after - time.monotonic())
    if on_output is None:
        await asyncio.wait((child.over,), timeout=left)
    else:
        until = None if left is None else asyncio.get_running_loop().time() + left
        await OutputPump(child, on_output).run(until)


def _remove_folder(path: str) -> None:
    import shutil  # noqa: PLC0415  1 MB of compression modules, needed at the very end

    shutil.rmtree(path, ignore_errors=True)
