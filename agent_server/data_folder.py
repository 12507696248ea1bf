"""The folder of everything that lasts, and the lock that keeps a second server out of it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from agent_sdk.box.process import RECORD
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import IsolationUnavailable
from agent_server.config.sources import CANNOT_CREATE, TRY_LATER, StartRefused
from agent_server.keys import KEY_FILE
from workspaces.box.confinement import NOT_CONFINED, Confinement, Isolation, confinement
from workspaces.box.sandboxes import IDENTITY

LOCK_FILE = "lock"
"""Tells people who has the folder. What keeps others out is the lock on the folder itself."""
LOG_FILE = "log.db"
ADDRESS_FILE = "address"
CLIENTS_FILE = "clients.json"
PLACE_FILE = "place"
PASSAGES = ("workspaces", "output", "runtime")
"""Boxes that are another user go through these."""
OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class DataFolder:
    """Where things are below the data folder."""

    def __init__(self, root: Path, *, copied: bool = False) -> None:
        self.root = root
        self.copied = copied
        """It is a copy of another data folder, and was never used by a server before."""
        self.confinement = NOT_CONFINED
        """How boxes that are processes are kept apart from the server."""

    @property
    def log(self) -> Path:
        """The database of all conversations."""
        return self.root / LOG_FILE

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
    def names(self) -> Path:
        """A file per box that calls are written down for while nothing has begun in it."""
        return self.root / "names"

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

    def note_clients(self, clients: dict[str, int]) -> None:
        """Write down how many clients each conversation has when the server is stopped. Blocks."""
        with suppress(OSError):  # a full disk: nobody is waited for
            (self.root / CLIENTS_FILE).write_bytes(msgspec.json.encode(clients))

    def take_clients(self) -> dict[str, int]:
        """Return what `note_clients` has written, once. Blocks."""
        file = self.root / CLIENTS_FILE
        with suppress(OSError, msgspec.DecodeError):
            noted = file.read_bytes()
            file.unlink()
            return msgspec.json.decode(noted, type=dict[str, int])
        return {}

    async def confine(self, isolation: Isolation, user: int, *, umask: int = -1) -> None:
        """Keep boxes apart like this from now on, and this folder from them: they pass through it, and see nothing.

        Nobody else gets into it in any case, also where it was there before and open to others.

        Args:
            isolation: how.
            user: of the boxes.
            umask: of commands that run as this user; -1: that of this process.

        Raises:
            StartRefused: this machine has not what it takes; nothing less is done.
        """
        try:
            self.confinement = await confinement(isolation, user, self.root)
            if isolation == "none":
                self.confinement = Confinement(umask=umask)
            await asyncio.to_thread(self._close, self.confinement.user)
            await self.confinement.check(self.root)
        except IsolationUnavailable as exc:
            raise StartRefused(str(exc)) from None
        except OSError as exc:
            raise StartRefused(f"{exc.filename} cannot be kept from boxes: {exc.strerror}") from None

    def _close(self, group: int | None) -> None:
        """Let nobody but a group pass, and hand it what was made before boxes had a user of their own. Blocks."""
        passages = () if group is None else tuple(self.root / name for name in PASSAGES)
        for entry in self.root.iterdir():
            if entry not in passages:
                _close_to_others(entry)
        if group is None:
            _close_to_others(self.root)
            return
        for folder in (*passages, self.root):
            folder.mkdir(exist_ok=True, mode=0o700)
            os.chown(folder, -1, group)
            folder.chmod(0o710)
        for workspace in (self.root / "workspaces").iterdir():
            if workspace.stat(follow_symlinks=False).st_uid == os.geteuid():
                self.confinement.take_over(workspace)

    def workspace(self, conversation: str) -> Path:
        """Return the folder in which the commands of a conversation run."""
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


def _close_to_others(path: Path) -> None:
    """Take the rights of others away, if it is ours to do so: no link is followed, no other name of a file changed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a link, a socket, or somebody else's, who has closed it
        return
    try:
        found = os.fstat(descriptor)
        own = stat.S_ISDIR(found.st_mode) or found.st_nlink == 1
        if own and found.st_mode & OF_OTHERS:
            with suppress(PermissionError):  # a volume that belongs to another user: what is in it is closed
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & stat.S_IRWXU)
    finally:
        os.close(descriptor)


class Place(Struct, frozen=True):
    """Which folder this is. It is noted in the folder itself, so a copy is seen to be one."""

    device: int
    inode: int
    path: str

    def is_same(self, now: Place) -> bool:
        """Return whether both are one folder.

        It may have been moved, and after the machine has started anew its device may have another number.
        """
        return self.inode == now.inode and (self.device == now.device or self.path == now.path)


@contextmanager
def locked(root: Path) -> Iterator[DataFolder]:
    """Make the folder, mode 0700, and hold its lock. The kernel gives the lock back even after `kill -9`.

    A copy of a data folder forgets what runs for the original, and gets an identity of its own.

    Raises:
        StartRefused: the folder cannot be made or written, or another server holds it.
    """
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            _refuse_what_is_not_ours(root, folder)
            note = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, note)
        except OSError as exc:
            raise _not_written(root, exc, "choose another with --data") from None
        for descriptor in (folder, note):  # the second one keeps out servers that look at nothing else
            _lock(descriptor, note, root)
        try:
            started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            os.ftruncate(note, 0)
            os.pwrite(note, f"pid {os.getpid()}, started {started}\n".encode(), 0)
            for name in ("workspaces", "output"):
                (root / name).mkdir(exist_ok=True, mode=0o700)
            copied = _is_copy(root, os.fstat(folder))
        except OSError as exc:
            raise _not_written(root, exc, "make room or choose another with --data") from None
        yield DataFolder(root, copied=copied)


def _not_written(root: Path, exc: OSError, mend: str) -> StartRefused:
    sentence = f"the data folder {root} cannot be written: {exc.strerror}; {mend}"
    return StartRefused(sentence, exit_code=CANNOT_CREATE)


def _lock(descriptor: int, note: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(note, 200, 0).decode(errors="replace").strip() or "another process"
        raise StartRefused(
            f"the data folder {root} belongs to a running server ({owner}); stop it or choose another with --data",
            exit_code=TRY_LATER,
        ) from None
    except OSError as exc:
        raise StartRefused(
            f"the data folder {root} cannot be locked: {exc.strerror}; put it on a local disk",
            exit_code=CANNOT_CREATE,
        ) from None


def _refuse_what_is_not_ours(root: Path, folder: int) -> None:
    """Refuse a folder of others, which is not closed to them: /tmp or a home given by mistake stays what it is."""
    mode = stat.S_IMODE(os.fstat(folder).st_mode)
    names = set(os.listdir(folder)) - {"lost+found"}
    if mode & OF_OTHERS and names and not names & {LOG_FILE, LOCK_FILE, KEY_FILE}:
        raise StartRefused(
            f"the data folder {root} holds other things, and others may enter it (mode {mode:04o}); "
            f"choose another with --data, or run: chmod 700 {root}",
            exit_code=CANNOT_CREATE,
        )


def _is_copy(root: Path, folder: os.stat_result) -> bool:
    """Note which folder this is, and return whether it is a copy of another; what runs for that is forgotten."""
    file = root / PLACE_FILE
    known, now = None, Place(folder.st_dev, folder.st_ino, str(root.resolve()))
    with suppress(FileNotFoundError, msgspec.DecodeError):
        known = msgspec.json.decode(file.read_bytes(), type=Place)
    copied = known is not None and not known.is_same(now)
    if copied:
        _forget(root)
    fresh = file.with_name(f"{PLACE_FILE}.new")
    fresh.write_bytes(msgspec.json.encode(now))
    fresh.replace(file)
    return copied


def _forget(root: Path) -> None:
    """Forget the processes and containers of the original without touching them; no file of a user is removed."""
    (root / IDENTITY).unlink(missing_ok=True)
    for record in (root / "boxes").glob(f"*/{RECORD}"):
        record.unlink()
    for promise in (root / "names").glob("*"):  # what has not begun here may have begun there since
        promise.unlink()
    for mount in (*(root / "mounts").glob("*"), *(root / "spools" / "mounts").glob("*")):
        if not mount.is_mount():
            shutil.rmtree(mount, ignore_errors=True)
    runtimes = root / "runtimes"
    if runtimes.is_dir() and any(runtimes.iterdir()):
        runtimes.rename(root / f"runtimes.of-the-original-{new_id()}")
