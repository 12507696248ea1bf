"""Processes that outlive whoever started them, and what is written down so that a later process finds them.

Files are written whole or not at all, whatever happens meanwhile, and read where they make sense.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

import msgspec
from msgspec import Struct

from agent_sdk.ids import new_id
from agent_sdk.protocol.checks import whole
from agent_sdk.protocol.errors import WorkspaceUnavailable
from agent_sdk.workspace.launch import with_default_signals
from agent_sdk.workspace.process_tree import started_ticks, tick_now

R = TypeVar("R", bound=Struct)
LAST_LINES = 20
LAST_BYTES = 64 << 10
UNKNOWN = "unknown"
"""A machine whose processes cannot be told from others'."""


class Identity(Struct, frozen=True):
    """Which process it is, on this machine and for ever."""

    boot: str
    """Of the machine: after another one nothing of it can be left."""
    pid: int
    ticks: int
    """When it started, as the kernel counts: tells it from a later process of the same number."""


def read_record(file: Path, kind: type[R]) -> R | None:
    """Return what was written to a file; None: nothing, or something else. Blocks."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def write_record(file: Path, record: Struct) -> None:
    """Write it in the place of what is there. Blocks."""
    _write(file, msgspec.json.encode(record))


def instance_of(file: Path) -> str:
    """Return the id that a file keeps, made with the first look. Blocks."""
    with suppress(FileNotFoundError):
        return file.read_text(encoding="ascii").strip()
    _write(file, f"{new_id()}\n".encode())
    return file.read_text(encoding="ascii").strip()


def last_lines(log: Path) -> list[str]:
    """Return the end of a log, at most 20 lines. Blocks."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    return []


def boot_id() -> str:
    """Name what the machine's kernel has been through since it was started; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def this_process() -> str:
    """Return a name of this process that no other one ever has."""
    return f"{_machine()}.{os.getpid()}.{started_ticks(os.getpid()) or 0}"


def is_dead(owner: str) -> bool:
    """Whether the process of this name has ended; False also for those of other machines and containers."""
    machine, _, process = owner.partition(".")
    pid, _, ticks = process.partition(".")
    number, began = whole(pid), whole(ticks)
    if machine in ("", UNKNOWN) or machine != _machine() or number is None or began is None:
        return False
    return started_ticks(number) != began


def _machine() -> str:
    """The run of the kernel, and the process ids that are meant: containers count their own."""
    boot = boot_id()
    try:
        return f"{boot}-{Path('/proc/self/ns/pid').readlink().name.strip('pid:[]')}" if boot else UNKNOWN
    except OSError:
        return UNKNOWN


def _write(file: Path, content: bytes) -> None:
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_bytes(content)
    fresh.replace(file)


class Child:
    """A process that is held by a pidfd, so that no signal meets another one. `let_go` gives the pidfd back."""

    def __init__(self, pid: int) -> None:
        """Hold a process.

        Raises:
            OSError: there is none of this number.
        """
        self.pid = pid
        self.ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """Done when it has ended, with its exit code (negative for a signal), which only its starter learns."""
        self.ended_at: int | None = None
        """When it has ended, as the kernel counts."""
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._gone)

    def __repr__(self) -> str:
        return f"<Child {self.pid}{' ended' if self.ended.done() else ''}>"

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        stdout: int,
        stderr: int,
        inherited: Sequence[int] = (),
        umask: int = -1,
    ) -> Self:
        """Start it in a session of its own.

        Raises:
            OSError: it cannot be started, or not be held (pidfds are refused, or no descriptor is left).
        """
        popen = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            pass_fds=inherited,
            umask=umask,
            preexec_fn=with_default_signals(),
        )
        try:
            child = cls(popen.pid)
        except OSError:
            popen.kill()
            popen.wait()
            raise
        popen.returncode = 0  # its end is seen here, and it may outlive us: Popen has nothing to wait for
        return child

    @classmethod
    def find(cls, identity: Identity) -> Self | None:
        """Return the process of this identity, if it lives.

        Raises:
            WorkspaceUnavailable: it cannot be held: pidfds are refused, or no descriptor is left.
        """
        if identity.boot != boot_id():
            return None
        child = None
        try:
            child = cls(identity.pid)
            if started_ticks(identity.pid) == identity.ticks:
                return child
        except ProcessLookupError:
            return None
        except OSError as exc:
            if child is not None:
                child.let_go()
            reason = f"process {identity.pid} is there, but cannot be held: {exc.strerror}"
            raise WorkspaceUnavailable(reason, phase="start") from None
        child.let_go()
        return None

    @property
    def is_held(self) -> bool:
        """Whether it lives, and was not let go of."""
        return self._pidfd >= 0

    @property
    def identity(self) -> Identity:
        """What a later process finds it by."""
        return Identity(boot_id(), self.pid, started_ticks(self.pid) or 0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def let_go(self) -> None:
        """Leave it to itself."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _gone(self) -> None:
        self.let_go()
        self.ended_at = tick_now()
        code = None
        with suppress(ChildProcessError):  # somebody else started it
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, os.WNOHANG)[1])
        if not self.ended.done():
            self.ended.set_result(code)


async def first_line(fd: int, limit: int) -> bytes:
    """Return the first line of a pipe, or what came before its end; empty when it is longer than `limit` bytes.

    Close the descriptor, also when cancelled.
    """
    reader = asyncio.StreamReader(limit=limit)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
    )
    try:
        return (await reader.readline()).strip()
    except ValueError:
        return b""
    finally:
        transport.close()
