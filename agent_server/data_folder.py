"""The folder of everything that lasts, and the lock that keeps a second server out of it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from agent_server.refusal import CANNOT_CREATE, TRY_LATER, StartRefused
from workspaces.box_process import SOCKET_BYTES

LOCK_FILE = "lock"
LONGEST_NAME = 48
"""Of a socket in its folder: a slash, the id of a conversation, a suffix."""


class DataFolder:
    """Where things are below the data folder."""

    def __init__(self, root: Path, sockets: Path) -> None:
        self.root = root
        self.sockets = sockets
        """Where boxes listen; in the data folder, where that path is short enough for sockets."""

    @property
    def log(self) -> Path:
        """The database of all conversations."""
        return self.root / "log.db"

    @property
    def output(self) -> Path:
        """What commands said, for as long as their box lives."""
        return self.root / "output"

    def workspace(self, conversation: str) -> Path:
        """The folder in which the commands of a conversation run."""
        return self.root / "workspaces" / conversation


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
        with _sockets(root) as sockets:
            yield DataFolder(root, sockets)
    finally:
        os.close(descriptor)


@contextmanager
def _sockets(root: Path) -> Iterator[Path]:
    """The folder of the boxes' sockets. A path that is too long is replaced by one that is the same at every start,
    so that a server that was killed leaves one folder behind at most, and its successor finds it."""
    folder = root / "boxes"
    if len(os.fsencode(folder)) > SOCKET_BYTES - LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(root)).hexdigest()
        folder = Path(tempfile.gettempdir(), f"agent-boxes-{digest[:16]}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as exc:
        raise StartRefused(f"{folder} cannot be made: {exc.strerror}", exit_code=CANNOT_CREATE) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StartRefused(f"{folder} belongs to somebody else; remove it", exit_code=CANNOT_CREATE)
    folder.chmod(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
