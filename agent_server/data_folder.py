"""The folder of everything that lasts, and the lock that keeps a second server out of it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from agent_sdk.protocol.errors import IsolationUnavailable
from agent_server.refusal import CANNOT_CREATE, TRY_LATER, StartRefused
from workspaces.confinement import NOT_CONFINED, Isolation, confinement

LOCK_FILE = "lock"
ADDRESS_FILE = "address"


class DataFolder:
    """Where things are below the data folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.confinement = NOT_CONFINED
        """How boxes that are processes are kept apart from the server."""

    @property
    def log(self) -> Path:
        """The database of all conversations."""
        return self.root / "log.db"

    @contextmanager
    def announced(self, url: str) -> Iterator[None]:
        """Let `agent-server health` find the server by this folder for the length of the block."""
        file = self.root / ADDRESS_FILE
        try:
            file.write_text(f"{url}\n")
        except OSError as exc:
            raise StartRefused(f"{file} cannot be written: {exc.strerror}", exit_code=CANNOT_CREATE) from None
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    @property
    def boxes(self) -> Path:
        """A folder per box, named after its owner: its socket, and what a later server finds it by."""
        return self.root / "boxes"

    @property
    def output(self) -> Path:
        """A folder per box: what commands said, for as long as their box lives."""
        return self.root / "output"

    @property
    def condemned(self) -> Path:
        """A file per workspace that is being removed, named after its owner, until all of it is gone."""
        return self.root / "condemned"

    @property
    def runtimes(self) -> Path:
        """A folder per runtime of the Runtime API."""
        return self.root / "runtimes"

    async def confine(self, isolation: Isolation, user: int) -> None:
        """Keep boxes apart like this from now on, and this folder from them: they pass through it, and see nothing.

        Raises:
            StartRefused: this machine has not what it takes; nothing less is done.
        """
        try:
            self.confinement = await confinement(isolation, user, self.root)
            if self.confinement.user is not None:
                await asyncio.to_thread(self._open_to, self.confinement.user)
            await self.confinement.check(self.root)
        except IsolationUnavailable as exc:
            raise StartRefused(str(exc)) from None
        except OSError as exc:
            raise StartRefused(f"{exc.filename} cannot be kept from boxes: {exc.strerror}") from None

    def _open_to(self, group: int) -> None:
        """Let nobody but a group pass, and hand it what was made before boxes had a user of their own. Blocks."""
        passages = [self.root / name for name in ("workspaces", "output", "runtime")]
        for entry in self.root.iterdir():
            if entry not in passages:
                entry.chmod(entry.stat().st_mode & stat.S_IRWXU)
        for folder in (*passages, self.root):
            folder.mkdir(exist_ok=True, mode=0o700)
            os.chown(folder, -1, group)
            folder.chmod(0o710)
        for workspace in (self.root / "workspaces").iterdir():
            if workspace.stat().st_uid == os.geteuid():
                self.confinement.take_over(workspace)

    def workspace(self, conversation: str) -> Path:
        """The folder in which the commands of a conversation run."""
        return self.root / "workspaces" / conversation


def address_in(root: Path) -> str | None:
    """Return where the server of a data folder listens; None when none does, as far as the folder tells.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        return (root / ADDRESS_FILE).read_text().strip() or None
    except FileNotFoundError:
        return None


@contextmanager
def locked(root: Path) -> Iterator[DataFolder]:
    """Make the folder, mode 0700, and hold its lock. The kernel gives the lock back even after `kill -9`.

    Raises:
        StartRefused: the folder cannot be made or written, or another server holds it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StartRefused(
            f"the data folder {root} cannot be written: {exc.strerror}; choose another with --data",
            exit_code=CANNOT_CREATE,
        ) from None
    try:
        _lock(descriptor, root)
        yield DataFolder(root)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        raise StartRefused(
            f"the data folder {root} belongs to a running server ({owner}); stop it or choose another with --data",
            exit_code=TRY_LATER,
        ) from None
    except OSError as exc:
        raise StartRefused(
            f"the data folder {root} cannot be locked: {exc.strerror}; put it on a local disk",
            exit_code=CANNOT_CREATE,
        ) from None
    try:
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()}, started {started}\n".encode(), 0)
        (root / "workspaces").mkdir(exist_ok=True, mode=0o700)
    except OSError as exc:
        raise StartRefused(
            f"the data folder {root} cannot be written: {exc.strerror}; make room or choose another with --data",
            exit_code=CANNOT_CREATE,
        ) from None
