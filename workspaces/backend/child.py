"""A child process that may outlive whoever started it: started, watched, found again by a later process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from agent_sdk.protocol.errors import WorkspaceUnavailable
from agent_sdk.workspace.launch import with_default_signals
from agent_sdk.workspace.process_tree import started_ticks, tick_now
from workspaces.backend.records import Identity, boot_id


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
